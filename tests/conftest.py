"""Every test finds the algorithm files as modules, and runs on one thread."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
import common  # noqa: F401  before torch: it settles how threads wait

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def exact():
    """Double precision and a fixed seed: a fast and a slow computation must then agree to eight
    digits."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def minari_root(tmp_path_factory):
    """One Minari root for all runs; each dataset is built on first use."""
    root = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    yield root
    del os.environ["MINARI_DATASETS_PATH"]
