"""FQE's estimates against what policies really earn: ranking.json and figures/ranking.png.

    for name in bc td3_bc iql sac; do
        python algorithms/$name.py --env hopper-medium --holdout 0.1 --steps 20000 --out runs/judged
    done                       (and the runs of results/grid.py --part studies, held out alike)
    python algorithms/fqe.py --env hopper-medium --holdout 0.1 --steps 40000 --eval-every 2000 \\
        --policies runs/judged runs/awac-beta-2 runs/awac-beta-10 runs/plas-vae-* \\
        runs/bear-actor-lr-* runs/bear-mmd-0.12 runs/morel-horizon-*
    python algorithms/fqe.py --env hopper-medium-replay --steps 40000 --eval-every 2000 \\
        --policies runs/*/hopper-medium-replay/seed*
    python results/ranking.py runs/fqe/hopper-medium*/seed0/result.json

On hopper-medium, training and judging see different episodes; the policies of hopper-medium-replay
are of the grid's long runs, which see all of them. Left: a point for each policy, with its mean
return and its estimate; the line is the right order. Estimates are discounted and know no time
limit, so only ranks can be compared. Right: the rank correlation during training, which is of no
use if it depends on when one stops.
"""
import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]  # finds common.py
import style
from common import fail

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


def draw(results: list[dict]) -> None:
    """A row for each dataset."""
    size = (12, 4.6 * len(results))
    figure, axes = plt.subplots(len(results), 2, figsize=size, squeeze=False)
    for one, (left, right) in zip(results, axes):
        draw_ranks(one, left)
        steps = [point["step"] for point in one["curve"]]
        right.plot(steps, [point["spearman"] for point in one["curve"]], marker=".",
                   color=style.POLICY)
        right.axhline(0, color=style.DATA, linewidth=0.8)
        right.set(title=f"{len(one['policies'])} policies, regret {one['regret']:.0f}",
                  xlabel="updates", ylabel="Spearman's correlation", ylim=(-1.05, 1.05))
    figure.savefig(HERE / "figures" / "ranking.png")


def draw_ranks(one: dict, axis: plt.Axes) -> None:
    """Each policy by its rank in rollouts and in estimates, with both values."""
    policies = one["policies"]
    by_return = sorted(policy["return_mean"] for policy in policies)
    by_estimate = sorted(policy["estimate"] for policy in policies)
    for policy in policies:
        out, algorithm, _, seed = policy["policy"].split("/")[-5:-1]
        algorithm = out if out.startswith(algorithm) else algorithm  # a study: awac-beta-10
        x = 1 + by_return.index(policy["return_mean"])
        y = 1 + by_estimate.index(policy["estimate"])
        axis.plot(x, y, "o", color=style.ESTIMATE)
        text = (f"{algorithm} {seed.removeprefix('seed')}: "
                f"{policy['return_mean']:.0f}, {policy['estimate']:.0f}")
        axis.annotate(text, (x, y), fontsize=8, xytext=(5, -2), textcoords="offset points")
    axis.plot([1, len(policies)], [1, len(policies)], color=style.TRUTH, linewidth=0.8)
    axis.set_xlim(right=1.45 * len(policies))  # room for the labels
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    correlation = "undefined" if one["spearman"] is None else f"{one['spearman']:.2f}"
    axis.set(title=f"{one['env']}: Spearman's correlation {correlation}",
             xlabel="rank by the mean return of rollouts", ylabel="rank by FQE's estimate")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="result.json files of fqe.py")
    paths = parser.parse_args().results
    for path in paths:
        if not path.exists():
            fail(f"there is no {path}")
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            fail(f"{path} can't be read: {error}")
        if not isinstance(result, dict) or result.get("regret") is None:
            fail(f"{path} compares no policies with rollouts; give result.json files of fqe.py")
        results.append(result)
    (HERE / "ranking.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    draw(results)
