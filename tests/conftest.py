"""Every test finds the algorithm files as modules, and runs on one thread."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
torch.set_num_threads(1)


@pytest.fixture
def exact():
    """Double precision and a fixed seed: a fast and a slow computation must then agree to eight digits."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
