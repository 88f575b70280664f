"""What a Decision Transformer achieves against what it is asked for: asked.json, figures/asked.png.

    python results/asked.py --policy runs/decision_transformer/hopper-medium/seed0 --episodes 20

For each policy a grid of requests, from 0 (or the worst return in the data, if that is below) to
half as much again as the best return in the data, and among them the two targets of its run. Where
asking works, the points follow the diagonal up to that best return, and nothing more comes beyond.
"""
import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algorithms")]  # finds common.py and the class
import style
from common import check_range, evaluate, fail, load_dataset, load_policy

import matplotlib.pyplot as plt
import numpy as np
import torch
from decision_transformer import Player
from tqdm import tqdm

SEED = 2000  # of the episodes, apart from those of training's evaluations


def ask(folder: Path, requests: int, episodes: int) -> dict:
    """Plays `episodes` for each request; all requests meet the same first states."""
    folder = folder.parent if folder.name == "policy.pt" else folder
    run = folder / "result.json"
    if not run.exists():
        fail(f"{folder}: there must be policy.pt and result.json of a run")
    own = load_policy(folder)
    if not isinstance(own, Player):
        fail(f"{folder} holds no policy of decision_transformer.py, it can't be asked for a return")
    env_spec = torch.load(folder / "policy.pt", weights_only=True)["env_spec"]
    if env_spec is None:
        fail(f"{folder} was trained without an environment, so nothing can be played")
    result = json.loads(run.read_text())
    returns = load_dataset(result["env"], "cpu").returns()
    best, worst = float(returns.max()), float(returns.min())
    target = float(own.actor.target_return)
    targets = [target, target / 2 if target > 0 else 2 * target]  # as decision_transformer.py
    grid = np.linspace(min(0.0, worst), best + abs(best) / 2, requests)
    asked = np.union1d(grid, targets)
    achieved = []
    for request in tqdm(asked, desc=result["env"], unit=" requests", leave=False):
        player = Player(own.actor, request)
        achieved.append(evaluate(player, env_spec, episodes, 10**6 * SEED).tolist())
        print(f"{result['env']}, seed {result['seed']}: asked for {request:8.1f}, "
              f"got {np.mean(achieved[-1]):8.1f} ± {np.std(achieved[-1]):.1f}", flush=True)
    return {"env": result["env"], "seed": result["seed"], "steps": result["steps"],
            "episodes": episodes, "targets": targets, "asked": asked.tolist(), "returns": achieved,
            "data_best": best, "data_mean": float(returns.mean())}


def draw(results: list[dict]) -> None:
    """A panel for each dataset, a line for each seed."""
    envs = list(dict.fromkeys(one["env"] for one in results))
    figure, axes = plt.subplots(1, len(envs), figsize=(7 * len(envs), 4.8), squeeze=False)
    for env, axis in zip(envs, axes[0]):
        runs = [one for one in results if one["env"] == env]
        for one in runs:
            asked = np.array(one["asked"])
            mean, std = np.mean(one["returns"], axis=1), np.std(one["returns"], axis=1)
            axis.errorbar(asked, mean, std, marker="o", markersize=5, capsize=2,
                          color=style.POLICY, label="achieved, mean ± deviation")
            own = np.isin(asked, one["targets"])
            axis.plot(asked[own], mean[own], "s", markersize=9, color=style.SECOND,
                      label="at the run's own targets")
        axis.plot(asked, asked, color=style.TRUTH, linewidth=1, label="as asked")
        axis.axhline(runs[0]["data_best"], color=style.DATA, linestyle="--", label="data's best")
        axis.axhline(runs[0]["data_mean"], color=style.DATA, linestyle=":", label="data's mean")
        axis.set(title=f"{env}, {runs[0]['steps']:,} updates, {runs[0]['episodes']} episodes each",
                 xlabel="return asked for", ylabel="return achieved")
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles))
        axis.legend(unique.values(), unique.keys())
    figure.savefig(HERE / "figures" / "asked.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, nargs="+", required=True,
                        help="run folders of decision_transformer.py")
    parser.add_argument("--episodes", type=int, default=20, help="per request")
    parser.add_argument("--requests", type=int, default=13, help="points of the grid")
    options = parser.parse_args()
    check_range(options, "requests episodes", 1)
    results = [ask(path, options.requests, options.episodes) for path in options.policy]
    (HERE / "asked.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    draw(results)
