"""Does Q promise more than the policy earns? overestimation.json, figures/overestimation.png.

    python results/grid.py --part 1 --seeds 0 --history      (keeps each checkpoint of a run)
    python results/overestimation.py runs/*/hopper-medium-replay/seed0

A run's policy plays EPISODES episodes from each of its kept checkpoints, or from its last one where
none were kept (then the run has a row of the table, and no panel). At their first states two
numbers are compared: what the critics say of the policy's action, their mean, and the discounted
return that the episode then brings. Both lines in a panel are of the same policy and states; where
red runs above black, Q errs upwards, as the notes say it must without a remedy.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algorithms")]  # finds common.py, algorithms
import common
import style

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

EPISODES = 10
SEED = 4 * 10**9  # of the episodes, apart from those of training's evaluations
COLUMNS = 4  # of the picture
MOST_PANELS = 8  # those that promise most


class Ready(Exception):
    """Raised in place of the training, when the run's networks exist."""


def networks_of(folder: Path) -> tuple[dict, common.Dataset, dict]:
    """What training changes, as the run's own file makes it, its data, and its settings."""
    settings = json.loads((folder / "settings.json").read_text())
    algorithm = settings.pop("algorithm")
    settings.pop("data")
    module = importlib.import_module(Path(file_of(algorithm)).stem)
    found = {}

    def begin(run, learned, actor):
        found.update(learned=learned, data=run.data)
        raise Ready

    no_fit = patch.object(module, "fit", lambda *_: None, create=True)  # of a model of the world
    arguments = module.Args(**settings | {"out": "/nonexistent", "resume": False})
    with patch.object(common.Run, "begin", begin), no_fit:
        try:
            module.train(arguments)
        except Ready:
            pass
    return found["learned"], found["data"], settings


def file_of(algorithm: str) -> str:
    """The file of a variant: brac-p is of brac.py."""
    for name in (algorithm, algorithm.rpartition("-")[0], algorithm.split("-")[0]):
        if (HERE.parent / "algorithms" / f"{name}.py").exists():
            return f"{name}.py"
    common.fail(f"{algorithm} is no file of algorithms/")


def compare(learned: dict, reward_unit: float, gamma: float, env_spec: str) -> tuple[float, ...]:
    """Mean promise and mean discounted return at the first states of EPISODES episodes."""
    actor = learned["actor"]
    critic = learned["critic"] if "critic" in learned else actor.critic
    first = [None] * EPISODES  # (obs, action) of each
    rewards = [[] for _ in range(EPISODES)]

    def record(i, obs, action, reward, *_):
        if first[i] is None:
            first[i] = (obs, action)
        rewards[i].append(reward)

    common.evaluate(actor.act, env_spec, EPISODES, SEED, record=record)
    obs, action = (torch.as_tensor(np.array(column), dtype=torch.float32)
                   for column in zip(*first))
    action = (action - actor.action_mid) / actor.action_half  # (E, A), as the critic knows them
    if hasattr(actor, "obs_mean"):
        obs = (obs - actor.obs_mean) / actor.obs_std
    promised = float(critic(obs, action).mean()) * reward_unit
    earned = [float(np.dot(gamma ** np.arange(len(r)), r)) for r in rewards]
    return promised, float(np.mean(earned))


@torch.no_grad()
def judge(folder: Path) -> dict | None:
    """The two numbers for each kept checkpoint of a run; None where it learns no Q."""
    with torch.enable_grad():
        learned, data, settings = networks_of(folder)
    if "critic" not in learned and not hasattr(learned.get("actor"), "critic"):
        common.notice(f"left out: {folder} learns no Q(s, a)")
        return None
    raw = common.load_dataset(settings["env"], "cpu", holdout=settings["holdout"])
    # a file may scale rewards (IQL): its Q is in that unit
    reward_unit = float(raw.reward.std() / data.reward.std())
    out, name = folder.parts[-4:-2]
    name = out if out.startswith(f"{name}-") else name  # a study: rebrac-target-rate-0.02
    points = []
    kept = sorted((folder / "history").glob("*.pt")) or [folder / "checkpoint.pt"]
    for path in tqdm(kept, desc=name, leave=False):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for key, part in learned.items():
            if isinstance(part, torch.nn.Module):
                part.load_state_dict(saved["learned"][key])
        promised, earned = compare(learned, reward_unit, settings["gamma"], data.env_spec)
        points.append([saved["step"], round(promised, 2), round(earned, 2)])
    points.sort()
    step, promised, earned = points[-1]
    print(f"{name}: after {step:,} updates Q promises {promised:.0f}, {earned:.0f} is earned")
    return {"name": name, "env": settings["env"], "seed": settings["seed"], "points": points}


def last_ratio(one: dict) -> float:
    """What a run's last Q promises, over what its last policy earns."""
    _, promised, earned = one["points"][-1]
    return promised / earned


def draw(results: list[dict]) -> None:
    """Panels of the runs whose last Q promises most over what is earned, the first the most."""
    results = [one for one in results if len(one["points"]) > 1]
    results = sorted(results, key=last_ratio, reverse=True)[:MOST_PANELS]
    rows = -(-len(results) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(12, 2.9 * rows), squeeze=False)
    for one, axis in zip(results, axes.flat):
        steps, promised, earned = np.array(one["points"]).T
        axis.plot(steps / 1000, promised, color=style.ESTIMATE)
        axis.plot(steps / 1000, earned, color=style.TRUTH)
        axis.set_title(one["name"])
        if promised.max() > 3 * earned.max():
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.25 * max(earned.max(), promised.max()))
    for axis in axes.flat[len(results):]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("thousand updates")
    step, promised, _ = results[-1]["points"][-1]
    earned = max(point[2] for point in results[-1]["points"])
    last = axes.flat[len(results) - 1]  # there Q is lowest, so that both texts find room
    last.text(step / 1000, 0.4 * promised, "what Q promises", ha="right", va="top",
              color=style.ESTIMATE, fontsize=11)
    last.text(step / 1000, 1.03 * earned, "what is earned", ha="right", va="bottom",
              color=style.TRUTH, fontsize=11)
    figure.supylabel("discounted return", fontsize=12)
    figure.savefig(HERE / "figures" / "overestimation.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    folders = [run.resolve() for run in parser.parse_args().runs]
    path = HERE / "overestimation.json"
    known = json.loads(path.read_text()) if path.exists() else []
    kept = {(one["name"], one["env"], one["seed"]): one for one in known}
    folders = [folder for folder in folders if (folder / "checkpoint.pt").exists()]
    if not folders:
        common.fail("no folder has a checkpoint.pt; give folders as runs/iql/hopper-medium/seed0")
    for one in filter(None, map(judge, folders)):
        kept[one["name"], one["env"], one["seed"]] = one
    lines = ",\n".join(json.dumps(one) for one in kept.values())
    path.write_text(f"[\n{lines}\n]\n")
    draw(list(kept.values()))
