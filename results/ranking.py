"""FQE's estimates against what the policies really earn: results/ranking.json, results/ranking.png.

    python algorithms/fqe.py --env hopper-medium --steps 40000 --eval-every 2000 \
        --policies $(ls runs/*/hopper-medium/seed?/policy.pt | grep -v bcq)
    python results/ranking.py runs/fqe/hopper-medium/seed0/result.json

(BCQ draws a hundred actions from a VAE in each state: an hour on a core for a million states.)
Left: a point for each policy, with its mean return and its estimate; the line is the right order. Estimates are discounted and
know no time limit, so only ranks can be compared. Right: how the rank correlation came about, for it is no use if it depends
on when one stops.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]  # lets this file find common.py
from common import check


def draw(results: list[dict]) -> None:
    """A row for each dataset."""
    figure, axes = plt.subplots(len(results), 2, figsize=(11, 4.2 * len(results)), squeeze=False, layout="constrained")
    for one, (left, right) in zip(results, axes):
        rank = {key: sorted(policy[key] for policy in one["policies"]).index for key in ("return_mean", "estimate")}
        for policy in one["policies"]:
            algorithm, _, seed = policy["policy"].split("/")[-4:-1]
            x, y = (1 + rank[key](policy[key]) for key in ("return_mean", "estimate"))
            left.plot(x, y, "o")
            left.annotate(f"{algorithm} {seed.removeprefix('seed')}: {policy['return_mean']:.0f}, {policy['estimate']:.0f}",
                          (x, y), fontsize=7, xytext=(5, -2), textcoords="offset points")
        left.plot([1, len(one["policies"])], [1, len(one["policies"])], color="grey", linewidth=0.8)
        left.set_xlim(right=1.3 * len(one["policies"]))
        known = one["spearman"] is not None
        left.set(title=f"{one['env']}: Spearman's correlation " + (f"{one['spearman']:.2f}" if known else "undefined"),
                 xlabel="rank by the mean return of rollouts", ylabel="rank by FQE's estimate")
        right.plot([point["step"] for point in one["curve"]], [point["spearman"] for point in one["curve"]], marker=".")
        right.axhline(0, color="grey", linewidth=0.8)
        right.set(title=f"{len(one['policies'])} policies, regret {one['regret']:.0f}", xlabel="updates",
                  ylabel="Spearman's correlation", ylim=(-1.05, 1.05))
    figure.savefig(HERE / "ranking.png", dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="result.json files of fqe.py")
    paths = parser.parse_args().results
    check(all(path.exists() for path in paths), f"not all of these exist: {', '.join(map(str, paths))}")
    results = [json.loads(path.read_text()) for path in paths]
    (HERE / "ranking.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    draw(results)
