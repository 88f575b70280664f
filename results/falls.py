"""How soon a policy's rollouts in its own model are over: falls.json and figures/falls.png.

    python results/falls.py runs/mopo/hopper-medium/seed? runs/morel/hopper-medium/seed0 \\
        runs/*-horizon-5*/*/hopper-medium/seed0

From STARTS states of the data each run's last policy acts in the model that the run has fitted,
with mopo.py's or morel.py's own `imagine`. A curve is the share of rollouts that are over after k
steps: the body has fallen or, in MOReL, the model does not know the pair of state and action.
Training sees the first `horizon` steps alone.
"""
import argparse
import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algorithms")]  # finds common.py, algorithms
import style
from common import fail

import matplotlib.pyplot as plt
import torch
from overestimation import networks_of

STARTS = 2000
STEPS = 100


@torch.no_grad()
def judge(folder: Path) -> dict:
    """The share of imagined rollouts that are over after 1 to STEPS steps."""
    with torch.enable_grad():
        learned, data, settings = networks_of(folder)
    result = json.loads((folder / "result.json").read_text())
    module = importlib.import_module(result["algorithm"])
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    actor = learned["actor"]
    actor.load_state_dict(saved["learned"]["actor"])
    models = list(folder.parent.glob(f"{folder.name}-model-*.pt"))
    if len(models) != 1:
        fail(f"beside {folder} there are {len(models)} fitted models, not one")
    dynamics = module.Dynamics(data.obs_dim, data.action_dim)
    dynamics.load_state_dict(torch.load(models[0], map_location="cpu", weights_only=True))
    names = {field.name for field in fields(module.Args)} & settings.keys()
    args = module.Args(**{name: settings[name] for name in names})
    horizon = args.horizon
    args.horizon, args.rollout_starts = STEPS, STARTS
    torch.manual_seed(0)
    over = shares_over(module.imagine(args, data, dynamics, actor).terminated)
    print(f"{result['algorithm']}, horizon {horizon}, score {result['score']:.1f}: over after 5 "
          f"steps {over[4]:.1%}, 25 {over[24]:.1%}, {STEPS} {over[-1]:.1%}")
    return {"algorithm": result["algorithm"], "env": settings["env"], "seed": settings["seed"],
            "updates": saved["step"], "horizon": horizon, "beta": settings.get("beta"),
            "score": round(result["score"], 1), "over": over}


def shares_over(terminated: torch.Tensor) -> list[float]:
    """From the rows of `imagine`, step by step: what goes on after a step has a row in the next."""
    left = STARTS
    first = 0
    over = []
    for _ in range(STEPS):
        ended = int(terminated[first:first + left].sum())
        first += left
        left -= ended
        over.append(1 - left / STARTS)
    return over


def draw(results: list[dict]) -> None:
    """A panel for each algorithm, a curve for each run; it is thick as far as training saw."""
    names = sorted({one["algorithm"] for one in results})
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for name, axis in zip(names, axes[0]):
        runs_of = {}
        for one in results:
            if one["algorithm"] == name:
                runs_of.setdefault((one["horizon"], one["beta"]), []).append(one)
        colors = (style.SECOND, style.POLICY, style.TRUTH)
        height = 116.0  # of the lowest label so far
        for (seen, beta), color in zip(sorted(runs_of), colors):
            runs = runs_of[seen, beta]
            for one in runs:
                share = [100 * value for value in one["over"]]
                axis.plot(range(1, STEPS + 1), share, color=color, lw=1.5)
                axis.plot(range(1, seen + 1), share[:seen], color=color, lw=5)
            height = min(100 * runs[0]["over"][-1], height - 16)
            scores = ", ".join(f"{one['score']:.0f}" for one in runs)
            label = f"{seen} steps" if beta is None else f"{seen} steps, β {beta:g}"
            axis.text(STEPS + 2, height, f"{label}:\nscore {scores}", va="center",
                      color=style.words(color))
        axis.set(title=f"{name}, trained in the thick part", xlabel="steps in the model",
                 xlim=(0, 1.4 * STEPS), xticks=(0, 25, 50, 75, 100))
    axes[0, 0].set_ylabel("% of rollouts that are over")
    figure.savefig(HERE / "figures" / "falls.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of mopo.py or morel.py")
    results = [judge(run.resolve()) for run in parser.parse_args().runs]
    lines = ",\n".join(json.dumps(result) for result in results)
    (HERE / "falls.json").write_text(f"[\n{lines}\n]\n")
    draw(results)
