"""make bench: for each algorithm updates/s, GFLOP per update, and the share of this machine's own
matrix-product rate.

The rate is that of a (B, 256) x (256, 256) product, the one that fills an update with the usual
networks; B is 256, as in a batch. Updates run on random data of hopper's shape (11 observations, 3
actions), for discrete actions of cartpole's, so nothing has to be built.

What comes before the updates that count, like the fit of a learned model, is left out or kept
short. A model's rollouts (mopo, morel, combo) count: too rare for the few updates that are seen
here, the first one is timed apart, at its default size, and its time and FLOP are shared out over
the rollout_every updates that it serves. Nobody falls in it, so it goes all the way. """
import argparse
import importlib
import io
import json
import math
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]
import common

import gymnasium as gym
import torch
from gymnasium import spaces
from torch.utils.flop_counter import FlopCounterMode

ALGORITHMS = (
    "bc",
    "td3_bc",
    "rebrac",
    "iql",
    "awac",
    "crr",
    "awr",
    "bcq",
    "plas",
    "bear",
    "brac",
    "uwac",
    "sac",
    "cql",
    "edac",
    "msg",
    "algae_dice",
    "dqn",
    "rem",
    "cql_discrete",
    "mopo",
    "morel",
    "combo",
    "decision_transformer",
    "mabcq",
)
STAGES = {  # what comes before the updates that count, kept short
    "awr": dict(value_steps=1, actor_steps=10**9),
    "bear": dict(warm_up_steps=0),
    "plas": dict(vae_steps=1),
    "brac": dict(behavior_steps=1, warm_start_steps=0),
    "uwac": dict(warm_up_steps=0),
    # one rollout, before the updates that count
    **dict.fromkeys(("mopo", "morel", "combo"), dict(rollout_every=10**9)),
}


class Enough(Exception):
    """Raised from Run.step when the measurement is over."""


def random_data(name: str, device: str, discrete: bool | None = False, **_) -> common.Dataset:
    """100,000 transitions of hopper's shape, or of cartpole's."""
    n, obs_dim, action_dim = 100_000, 4 if discrete else 11, 3
    action = torch.randint(2, (n,)) if discrete else torch.rand(n, action_dim) * 2 - 1
    columns = {
        "obs": torch.randn(n, obs_dim),
        "action": action,
        "reward": torch.randn(n),
        "next_obs": torch.randn(n, obs_dim),
        "terminated": torch.zeros(n),
        "truncated": torch.arange(n) % 1000 == 999,
    }
    space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (action_dim,))
    env_spec = gym.spec("CartPole-v1" if discrete else "Hopper-v5").to_json()
    return common.Dataset("random numbers", columns, space, env_spec, (0.0, 1.0), device)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(name: str, device: str, threads: int, seconds: float) -> tuple[float, float]:
    """(updates per second, FLOP per update), through the file's own train()."""
    module = importlib.import_module(name)
    seen = dict(calls=0, flops=0.0, began=0.0, rollout=0.0)
    warm_up = 10  # updates, also where a CUDA graph is recorded
    counter = FlopCounterMode(display=False)
    plain_update, plain_imagine = module.update, getattr(module, "imagine", None)

    # counts the FLOP of the second and third call: of two kinds of update, their mean
    def counted(*args, **kwargs):
        seen["calls"] += 1
        if seen["calls"] not in (2, 3):
            return plain_update(*args, **kwargs)
        with counter:
            metrics = plain_update(*args, **kwargs)
        seen["flops"] += counter.get_total_flops() / 2
        return metrics

    def rollout(*args):
        if device == "cuda":
            plain_imagine(*args)  # warm-up
        wait(device)
        began = time.time()
        with counter:
            rows = plain_imagine(*args)
        wait(device)
        seen["rollout"] = (time.time() - began) / module.Args.rollout_every
        seen["flops"] += counter.get_total_flops() / module.Args.rollout_every
        return rows

    def step(run, number, metrics):
        if number == warm_up:
            wait(device)
            seen["began"] = time.time()
        elif number > warm_up and number % 5 == 0:
            wait(device)
            elapsed = time.time() - seen["began"]
            if elapsed > seconds:
                seen["rate"] = 1 / (elapsed / (number - warm_up) + seen["rollout"])
                raise Enough

    patches = dict(load_dataset=random_data, update=counted)
    if plain_imagine:
        patches |= dict(
            imagine=rollout,
            fit=lambda *_: None,
            FALLS={"Hopper-v5": lambda obs: obs[:, 0] > math.inf},
        )
    silent = dict(begin=lambda run, learned, actor: 0, step=step, save=lambda run, number: None)
    arguments = module.Args(
        device=device, threads=threads, steps=10**9, out="/nonexistent", **STAGES.get(name, {})
    )
    with patch.multiple(module, **patches), patch.multiple(common.Run, **silent):
        try:
            module.train(arguments)
        except Enough:
            pass
    return seen["rate"], seen["flops"]


def matmul_rate(device: str, seconds: float = 1.0) -> float:
    """FLOP per second of a (256, 256) by (256, 256) product."""
    a, b = torch.randn(256, 256, device=device), torch.randn(256, 256, device=device)
    for _ in range(50):
        a @ b
    count, began = 0, time.time()
    while time.time() - began < seconds:
        for _ in range(100):
            torch.mm(a, b)
        wait(device)
        count += 100
    return count * 2 * 256**3 / (time.time() - began)


def main(options: argparse.Namespace) -> None:
    products = common.PRODUCTS
    if options.products == "default" and hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # as if common.py had chosen nothing
        products = "PyTorch's default"
    for threads in options.threads:
        torch.set_num_threads(threads)
        rate = matmul_rate(options.device)
        print(
            f"{options.device}, {threads} threads, PyTorch {torch.__version__}, "
            f"products by {products}: {rate / 1e9:.0f} GFLOP/s"
        )
        print(f"{'algorithm':<21}{'updates/s':>11}{'GFLOP/update':>14}{'GFLOP/s':>10}{'share':>8}")
        for name in options.algorithms:
            with redirect_stderr(io.StringIO()) as said:  # progress bars would run into the table
                try:
                    updates, flops = measure(name, options.device, threads, options.seconds)
                except SystemExit:
                    sys.exit(said.getvalue())
            print(
                f"{name:<21}{updates:11.1f}{flops / 1e9:14.3f}{updates * flops / 1e9:10.1f}"
                f"{updates * flops / rate:8.2f}",
                flush=True,
            )
            if options.save:
                row = {
                    "label": options.save,
                    "threads": threads,
                    "algorithm": name,
                    "updates_per_second": round(updates, 1),
                    "gflop": round(flops / 1e9, 3),
                    "share": round(updates * flops / rate, 2),
                }
                save(row)


def save(row: dict) -> None:
    """Into results/speed.json, from which report.py makes a table; a row of the same label, threads
    and file is replaced."""
    path = ROOT / "results" / "speed.json"
    key = ("label", "threads", "algorithm")
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [other for other in rows if [other[k] for k in key] != [row[k] for k in key]] + [row]
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of measurement per algorithm")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[torch.get_num_threads()],
        help="one table for each number",
    )
    parser.add_argument(
        "--products",
        default="chosen",
        choices=("chosen", "default"),
        help="float32 matrix products as common.py chooses them, or as PyTorch does by itself",
    )
    parser.add_argument(
        "--save",
        metavar="LABEL",
        help="also into results/speed.json, under this name of the machine's state",
    )
    parser.add_argument("algorithms", nargs="*", default=ALGORITHMS)
    main(parser.parse_args())
