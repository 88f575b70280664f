"""Choose behaviour policies among an online run's snapshots; write them to results/behavior/<body>.npz.

    python results/behavior/choose.py hopper runs/sac-online/hopper/seed0

Each snapshot plays stochastically, as it will when it collects data, with its weights rounded to the float16 in which they
are stored. `medium` is the first snapshot whose mean return is within 5% of D4RL v2's, `expert` the one that comes nearest
to it: so more training can only improve the expert, and leaves the other levels as they were. `medium-replay` mixes
snapshots evenly spaced over a stretch of training that ends at or before medium: of all stretches, the one whose mixture,
with the same number of transitions from each snapshot, comes nearest to D4RL v2's mean return. The discrete bodies also have
`replay`: snapshots evenly spaced over the whole run, each with the ε of its time.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]  # lets this file find common.py
from collect import HERE, behavior_policy
from common import NAMES, SUITE, check, evaluate

TARGET = {  # mean returns of D4RL v2; of the others, ours
    "hopper": {"medium": 1422.06, "medium-replay": 467.30, "expert": 3511.36},
    "walker2d": {"medium": 2852.09, "medium-replay": 682.70, "expert": 4920.51},
    "halfcheetah": {"medium": 4770.33, "medium-replay": 3093.29, "expert": 10656.43},
    "pendulum": {"medium": -400.0, "medium-replay": -1000.0, "expert": -150.0},
    "cartpole": {"medium": 200.0, "medium-replay": 60.0, "expert": 500.0},
    "acrobot": {"medium": -200.0, "medium-replay": -400.0, "expert": -80.0},
}
MIXED = 9  # snapshots in medium-replay; with medium and expert the file stays below 2 MB
REPLAYED = 25  # snapshots in the discrete bodies' replay, whose networks are small
EPISODES = 40


def pack(paths: list[Path]) -> dict[str, np.ndarray]:
    """Networks of sac.py or dqn.py as arrays weight<i> (P, out, in) and bias<i> (P, out), and the ε (P,) of dqn.py's."""
    saved = [torch.load(path, weights_only=True) for path in paths]
    networks = {f"{kind}{i}": np.stack([np.float16(one[f"net.{2 * i}.{kind}"]) for one in saved])
                for i in range(3) for kind in ("weight", "bias")}
    return networks | ({"epsilon": np.array([float(one["epsilon"]) for one in saved])} if "epsilon" in saved[0] else {})


def choose(returns: np.ndarray, lengths: np.ndarray, target: dict[str, float]) -> dict[str, list[int]]:
    """Snapshot numbers per level, from each snapshot's mean return and mean episode length."""
    expert = int(np.abs(returns - target["expert"]).argmin())
    miss = np.abs(returns / target["medium"] - 1)
    medium = int((miss < 0.05).argmax() if (miss < 0.05).any() else miss.argmin())

    def mixture(first: int, last: int) -> list[int]:
        return np.unique(np.linspace(first, last, MIXED).round().astype(int)).tolist()

    def mixture_miss(mixed: list[int]) -> float:
        episodes = 1 / lengths[mixed]  # equal transitions from each: the shorter, the more episodes
        return abs((episodes * returns[mixed]).sum() / episodes.sum() - target["medium-replay"])

    wide = min(MIXED, medium)
    mixtures = [mixture(first, last) for first in range(medium) for last in range(first + wide, medium + 1)]
    return {"medium": [medium], "expert": [expert], "medium-replay": min(mixtures, key=mixture_miss)}


def main(body: str, run: Path) -> None:
    paths = sorted((run / "snapshots").glob("*.pt"))
    check(body in TARGET and paths, f"usage: choose.py BODY RUN, a body of {', '.join(TARGET)} and its run with snapshots/")
    HERE.joinpath(f"{body}.npz").unlink(missing_ok=True)
    everything = HERE / f".{body}-all.npz"
    np.savez(everything, **pack(paths))
    played = []
    for i in tqdm(range(len(paths)), desc=f"playing {body}'s snapshots"):
        steps = []
        returns = evaluate(behavior_policy(everything, body, i, seed=i), SUITE[body][0], EPISODES, 10**8,
                           record=lambda *step: steps.append(step[0]))
        played.append((returns.mean(), returns.std(), len(steps) / EPISODES))
    everything.unlink()
    means, stds, lengths = np.array(played).T
    levels = choose(means, lengths, TARGET[body])
    if f"{body}-replay" in NAMES:
        levels["replay"] = np.linspace(0, len(paths) - 1, REPLAYED).round().astype(int).tolist()
    kept = sorted({i for chosen in levels.values() for i in chosen})
    steps = [int(paths[i].stem) for i in kept]
    np.savez_compressed(HERE / f"{body}.npz", **pack([paths[i] for i in kept]), steps=steps, returns=means[kept],
                        levels=json.dumps({level: [kept.index(i) for i in chosen] for level, chosen in levels.items()}))
    for i, path in enumerate(paths):
        marks = ", ".join(level for level, chosen in levels.items() if i in chosen)
        print(f"step {int(path.stem):>9,}   return {means[i]:8.1f} ± {stds[i]:6.1f}   length {lengths[i]:6.1f}   {marks}")


if __name__ == "__main__":
    check(len(sys.argv) == 3, "usage: python results/behavior/choose.py BODY RUN, e.g. hopper runs/sac-online/hopper/seed0")
    main(sys.argv[1], Path(sys.argv[2]))
