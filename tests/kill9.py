"""kill -9 at random moments of building a dataset, training, saving and evaluating; then --resume.
Not part of make test.

    python tests/kill9.py 100          (100 kills; --seed chooses other moments)

A run without kills comes first. Then the same command is started again and again, in folders of its
own, and killed after a random time, with all its processes or alone, until it comes to its end;
then once more from the beginning, with the dataset to be built anew, until there were as many kills
as asked for. After each kill the dataset is absent or whole, and so is the checkpoint. Each end is
bit for bit the end of the run without kills: weights, curve, final returns, dataset. """
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
PLAN = [
    "--env",
    "pendulum-random",
    "--steps",
    "400",
    "--eval-every",
    "5",
    "--eval-episodes",
    "1",
    "--final-episodes",
    "2",
    "--device",
    "cpu",
    "--threads",
    "1",
]  # saves 80 times
DATASET = Path("minari", "local", "pendulum", "random-v0")
FOLDER = Path("runs", "td3_bc", "pendulum-random", "seed0")


def start(place: Path) -> subprocess.Popen:
    """The command in its own session; it resumes where there is a checkpoint."""
    environment = os.environ | {"MINARI_DATASETS_PATH": str(place / "minari")}
    resume = ["--resume"] if (place / FOLDER / "checkpoint.pt").exists() else []
    command = [
        sys.executable,
        str(ROOT / "algorithms" / "td3_bc.py"),
        *PLAN,
        "--out",
        str(place / "runs"),
        *resume,
    ]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=open(place / "stderr", "w"),
        start_new_session=True,
    )


def end(place: Path) -> dict:
    """What must be equal, to the last bit."""
    result = json.loads((place / FOLDER / "result.json").read_text())
    saved = torch.load(place / FOLDER / "policy.pt", weights_only=True)
    torch.export.load(place / FOLDER / "policy.pt2")
    weights = {name: value.numpy().tobytes() for name, value in saved["actor"].items()}
    return {"weights": weights} | {
        key: result[key] for key in ("curve", "final_returns", "score", "dataset")
    }


def state(place: Path) -> str:
    """Where the kill fell, as far as the files say. What is there must be whole."""
    if not (place / DATASET).exists():
        return "before the dataset was built"
    with np.load(place / DATASET / "columns.npz") as columns:
        assert len(columns["obs"]) == len(columns["truncated"]) >= 20_000
    checkpoint = place / FOLDER / "checkpoint.pt"
    if not checkpoint.exists():
        return "before the first checkpoint"
    saved = torch.load(checkpoint, weights_only=True)
    parts = [path.name for path in (place / FOLDER).glob(".*")]
    if parts:
        return f"after step {saved['step']}, while it wrote {parts[0]}"
    return f"after step {saved['step']}" + (", at its end" if saved["step"] == 400 else "")


def cycle(place: Path, kills: int, longest: float, rng: random.Random) -> int:
    """One run from the beginning to its end, with at most so many kills; how many there were."""
    for count in range(kills + 1):
        process = start(place)
        try:
            process.wait(None if count == kills else rng.uniform(0, longest))
            assert process.returncode == 0, (place / "stderr").read_text()
            return count
        except subprocess.TimeoutExpired:
            alone = rng.random() < 0.5
            if alone:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(
                f"  kill -9 of {'the process' if alone else 'all processes'} {state(place)}",
                flush=True,
            )
    return kills


def main(kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        whole.mkdir()
        began = time.time()
        cycle(whole, 0, 0.0, rng)
        longest = time.time() - began
        expected = end(whole)
        print(
            f"the run without kills took {longest:.0f} s, {len(expected['curve'])} evaluations",
            flush=True,
        )
        left, ends = kills, 0
        while left:
            place = Path(folder, "killed")
            place.mkdir()
            count = cycle(place, left, longest, rng)
            left -= count
            ends += 1
            assert end(place) == expected, "the end differs"
            print(f"the end after {count} kills is the same, bit for bit", flush=True)
            shutil.rmtree(place)
    print(f"{kills} kills, {ends} ends: nothing lost")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.kills, options.seed)
