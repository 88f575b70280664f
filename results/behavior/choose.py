"""Choose a body's behaviour policies among the snapshots of a training run.

    python results/behavior/choose.py hopper runs/behavior/hopper/seed0

Writes results/behavior/<body>.npz. The training run is that of train.py. Its policy "reaches
medium" at the first step at which its last 20 training episodes have D4RL v2's mean return, and the
next 20 have it, too.

- `medium` is a snapshot around that step whose mean return is near D4RL v2's; of several the one
  with the nearest standard deviation.
- `medium-replay` is the replay buffer until that step: the uniform actions of the first steps, then
  every snapshot with the steps that it stands for.
- `expert` is the snapshot of the whole run whose mean return comes nearest to D4RL v2's expert.
- `replay`, of cartpole and acrobot, is the whole run in 25 snapshots, each with the ε of its time,
  as in REM's paper.

A snapshot plays stochastically here, as it will when it collects data, with its weights rounded to
the float16 in which they are stored.
"""
import hashlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]  # lets this file find common.py
from collect import HERE, behavior_policy
from common import NAMES, SUITE, evaluate, fail

import numpy as np
import torch
from tqdm import tqdm

TARGET = {  # mean returns of D4RL v2; of the bodies that D4RL lacks, ours
    "hopper": {"medium": 1422.06, "expert": 3511.36},
    "walker2d": {"medium": 2852.09, "expert": 4920.51},
    "halfcheetah": {"medium": 4770.33, "expert": 10656.43},
    "pendulum": {"medium": -400.0, "expert": -150.0},
    "cartpole": {"medium": 200.0, "expert": 500.0},
    "acrobot": {"medium": -200.0, "expert": -80.0},
}
MEDIUM_STD = {"hopper": 378.95, "walker2d": 1095.44, "halfcheetah": 355.75}  # D4RL v2's
EPISODES = 20  # that a candidate plays
FINALISTS = 10  # candidates for medium that play again,
MORE_EPISODES = 100  # so many: a snapshot's returns can lie in two heaps
NEAR_SCORE = 3.0  # normalised points that count as near
NEAR = 40  # snapshots before and after medium is reached that are candidates for it
EXPERTS = 40  # candidates for the expert, evenly over the run
MOST_REPLAYED = 150  # snapshots of medium-replay, so that the file stays small
REPLAYED = 25  # snapshots of replay


def pack(snapshots: list[dict]) -> dict[str, np.ndarray]:
    """weight<i> (P, out, in) and bias<i> (P, out), float16, of three layers; ε where one is."""
    packed = {}
    for i in range(3):
        for kind in ("weight", "bias"):
            layers = [np.float16(one[f"{2 * i}.{kind}"].numpy()) for one in snapshots]
            packed[f"{kind}{i}"] = np.stack(layers)
    if "epsilon" in snapshots[0]:
        packed["epsilon"] = np.array([float(one["epsilon"]) for one in snapshots])
    return packed


def step_of_medium(episodes: list[tuple[int, float]], target: float) -> int:
    """The first step at which the mean of the last 20 training episodes reaches the target, and
    that of the next 20 does not fall below it: a few lucky episodes do not count."""
    returns = np.array([value for _, value in episodes])
    for last in range(20, len(returns) - 19):
        if min(returns[last - 20:last].mean(), returns[last:last + 20].mean()) >= target:
            return episodes[last - 1][0]
    fail(f"the training run never kept a mean return of {target} over 40 episodes; train longer")


def replay_buffer(steps: np.ndarray, reached: int, random_steps: int) -> list[list]:
    """[snapshot, transitions], in the order of training: the buffer when medium was reached.

    A snapshot stands for the steps since the snapshot before it that is kept.
    """
    until = np.flatnonzero((steps > random_steps) & (steps <= reached))
    every = int(np.ceil(len(until) / MOST_REPLAYED))
    kept = until[every - 1::every]
    chosen, before = [[None, random_steps]], random_steps
    for i in kept:
        chosen.append([int(i), int(steps[i] - before)])
        before = steps[i]
    return chosen


def digest(packed: dict[str, np.ndarray], chosen: list[list]) -> str:
    """Tells the policies of a level from others."""
    result = hashlib.blake2b(json.dumps([share for _, share in chosen]).encode(), digest_size=8)
    numbers = [i for i, _ in chosen if i is not None]
    for key in sorted(packed):
        result.update(packed[key][numbers].tobytes())
    return result.hexdigest()


def main(body: str, run: Path) -> None:
    if not (run / "checkpoint.pt").exists():
        fail(f"there is no {run / 'checkpoint.pt'}; train.py writes it")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    snapshots, target = saved["snapshots"], TARGET[body]
    steps = np.array([one["step"] for one in snapshots])
    everything = HERE / f".{body}-all.npz"
    np.savez(everything, **pack(snapshots))

    def play(i: int, episodes: int) -> np.ndarray:
        act = behavior_policy(everything, body, int(i), seed=int(i))
        return evaluate(act, SUITE[body][0], episodes, 10**8)

    def distance_to_medium(i: int) -> tuple[float, float]:
        returns = play(i, MORE_EPISODES)
        played[i] = float(returns.mean())
        _, low, high = SUITE[body]
        points = 100 * abs(played[i] - target["medium"]) / (high - low)
        spread = returns.std() - MEDIUM_STD.get(body, returns.std())
        return max(points, NEAR_SCORE), abs(float(spread))

    reached = step_of_medium(saved["episodes"], target["medium"])
    nearest = int(np.abs(steps - reached).argmin())
    near = range(max(0, nearest - NEAR), min(len(steps), nearest + NEAR + 1))
    spread = np.unique(np.linspace(nearest, len(steps) - 1, EXPERTS).round().astype(int))
    played = {}
    for i in tqdm(sorted({*near, *spread.tolist()}), desc=f"playing {body}'s snapshots"):
        played[i] = float(play(i, EPISODES).mean())
    finalists = sorted(near, key=lambda i: abs(played[i] - target["medium"]))[:FINALISTS]
    medium = min(finalists, key=distance_to_medium)
    everything.unlink()

    levels = {
        "medium": [[medium, 1]],
        "expert": [[min(spread.tolist(), key=lambda i: abs(played[i] - target["expert"])), 1]],
        "medium-replay": replay_buffer(steps, reached, saved["random_steps"]),
    }
    if f"{body}-replay" in NAMES:
        whole = np.linspace(0, len(steps) - 1, REPLAYED).round().astype(int)
        levels["replay"] = [[int(i), 1] for i in whole]
    kept = sorted({i for chosen in levels.values() for i, _ in chosen if i is not None})
    packed = pack([snapshots[i] for i in kept])
    for level, chosen in levels.items():
        levels[level] = [[None if i is None else kept.index(i), share] for i, share in chosen]
    digests = {level: digest(packed, chosen) for level, chosen in levels.items()}
    np.savez_compressed(HERE / f"{body}.npz", **packed, steps=steps[kept], reached=reached,
                        trained=saved["step"], levels=json.dumps(levels),
                        digests=json.dumps(digests))
    print(f"medium is reached after {reached:,} of {saved['step']:,} steps")
    for level in ("medium", "expert"):
        i = kept[levels[level][0][0]]
        print(f"{level:<8} step {steps[i]:>9,}   mean return {played[i]:8.1f}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TARGET:
        fail("usage: python results/behavior/choose.py BODY RUN, "
             "e.g. hopper runs/behavior/hopper/seed0")
    main(sys.argv[1], Path(sys.argv[2]))
