"""What a Decision Transformer achieves against what it is asked for: results/asked.json, results/asked.png.

    python results/asked.py --policy runs/decision_transformer/hopper-medium/seed0/policy.pt --episodes 20

For each policy a grid of requests, from 0 (or the worst return in the data, if below) to half as much again as the best return
in the data, and among them the two targets of its run. Where asking works, the points follow the diagonal up to that best
return, and beyond it nothing more comes.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algorithms")]  # lets this file find common.py and the policy's class
from decision_transformer import Actor, Player

from common import check, evaluate, load_dataset

SEED = 2000  # of the episodes, apart from those of training's evaluations


def ask(path: Path, requests: int, episodes: int) -> dict:
    """Plays `episodes` for each request; all requests meet the same first states."""
    run = path.with_name("result.json")
    check(path.exists() and run.exists(), f"{path}: there must be this file and the result.json of its run beside it")
    saved, result = torch.load(path, map_location="cpu", weights_only=True), json.loads(run.read_text())
    check(saved["algorithm"] == "decision_transformer", f"{path} is of {saved['algorithm']}, which can't be asked for a return")
    actor = Actor(saved["obs_dim"], saved["action_dim"])
    actor.load_state_dict(saved["actor"])
    returns = load_dataset(result["env"], "cpu").returns()
    best, worst = float(returns.max()), float(returns.min())
    target = float(actor.target_return)
    targets = [target, target / 2 if target > 0 else 2 * target]  # as decision_transformer.py's last lines
    asked = np.union1d(np.linspace(min(0.0, worst), best + abs(best) / 2, requests), targets)
    achieved = []
    for request in tqdm(asked, desc=result["env"], unit=" requests", leave=False):
        player = Player(actor, request)
        achieved.append(evaluate(player, saved["env_id"], episodes, 10**6 * SEED, record=player.record).tolist())
        print(f"{result['env']}, seed {result['seed']}: asked for {request:8.1f}, got {np.mean(achieved[-1]):8.1f} "
              f"± {np.std(achieved[-1]):.1f}", flush=True)
    return dict(env=result["env"], seed=result["seed"], steps=result["steps"], episodes=episodes, targets=targets,
                asked=asked.tolist(), returns=achieved, data_best=best, data_mean=float(returns.mean()))


def draw(results: list[dict]) -> None:
    """A panel for each dataset, a line for each seed."""
    envs = list(dict.fromkeys(one["env"] for one in results))
    figure, axes = plt.subplots(1, len(envs), figsize=(6 * len(envs), 4.5), squeeze=False)
    for env, axis in zip(envs, axes[0]):
        runs = [one for one in results if one["env"] == env]
        for one in runs:
            mean, std = np.mean(one["returns"], axis=1), np.std(one["returns"], axis=1)
            points = axis.errorbar(one["asked"], mean, std, marker="o", markersize=4, capsize=2, label=f"seed {one['seed']}")
            own = np.isin(one["asked"], one["targets"])
            axis.plot(np.array(one["asked"])[own], mean[own], "s", color=points[0].get_color(), label="its run's targets")
        asked = np.array(runs[0]["asked"])
        axis.plot(asked, asked, color="black", linewidth=0.6, label="as asked")
        axis.axhline(runs[0]["data_best"], color="grey", linestyle="--", linewidth=0.8, label="the data's best")
        axis.axhline(runs[0]["data_mean"], color="grey", linestyle=":", linewidth=0.8, label="the data's mean")
        axis.set(title=f"{env}, {runs[0]['steps']:,} updates, {runs[0]['episodes']} episodes each",
                 xlabel="return asked for", ylabel="return achieved, mean ± std")
        axis.legend()
    figure.tight_layout()
    figure.savefig(HERE / "asked.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, nargs="+", required=True, help="policy.pt files of decision_transformer.py")
    parser.add_argument("--episodes", type=int, default=20, help="per request")
    parser.add_argument("--requests", type=int, default=13, help="points of the grid")
    options = parser.parse_args()
    results = [ask(path, options.requests, options.episodes) for path in options.policy]
    (HERE / "asked.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    draw(results)
