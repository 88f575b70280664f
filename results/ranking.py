"""FQE's estimates against what the policies really earn: results/ranking.json, results/ranking.png.

    python algorithms/fqe.py --env hopper-medium --steps 100000 --policies runs/*/hopper-medium/seed?/policy.pt
    python results/ranking.py runs/fqe/hopper-medium/seed0/result.json

Left: a point for each policy. Estimates are discounted and know no time limit, so only the order can be compared. Right: how
the rank correlation came about, for it is no use if it depends on when one stops.
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
        for policy in one["policies"]:
            algorithm, _, seed = policy["policy"].split("/")[-4:-1]
            left.plot(policy["return_mean"], policy["estimate"], "o")
            left.annotate(f"{algorithm} {seed.removeprefix('seed')}", (policy["return_mean"], policy["estimate"]), fontsize=7,
                          xytext=(4, 2), textcoords="offset points")
        known = one["spearman"] is not None
        left.set(title=f"{one['env']}: Spearman's correlation " + (f"{one['spearman']:.2f}" if known else "undefined"),
                 xlabel="return of rollouts, mean", ylabel="FQE's estimate")
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
