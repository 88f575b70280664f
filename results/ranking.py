"""FQE's estimates against what policies really earn: ranking.json and figures/ranking.png.

    for name in bc td3_bc iql sac; do
        python algorithms/$name.py --env hopper-medium --holdout 0.1 --steps 20000 --out runs/judged
    done                       (and the runs of results/grid.py --part studies, held out alike)
    python algorithms/fqe.py --env hopper-medium --holdout 0.1 --steps 40000 --eval-every 2000 \\
        --policies runs/judged runs/awac-beta-2 runs/awac-beta-10 runs/plas-vae-* \\
        runs/bear-actor-lr-* runs/bear-mmd-0.12 runs/morel-horizon-*

The long runs, on hopper-medium-replay, all with --holdout 0.1 --out runs/held-out: td3_bc, iql,
crr, awac and bc of 100,000 updates, awr of 500,000, sac of 30,000, mopo of 100,000 with
--dynamics-epochs 10, rebrac of 20,000 with --target-rate 0.02.

    fqe="python algorithms/fqe.py --env hopper-medium-replay --holdout 0.1 --steps 40000 \\
        --eval-every 2000 --policies runs/held-out"
    $fqe --out runs/1; $fqe --target-rate 0.02 --out runs/2
    $fqe --target-rate 0.02 --gamma 0.998 --out runs/3
    python results/ranking.py runs/fqe/*/seed0/result.json runs/[123]/fqe/*/seed0/result.json

The policies are played here once more, for the discounted return of EPISODES episodes: that is what
FQE estimates. What a policy is chosen for is its return, which rollouts give. Left: a point for
each policy, with both and the estimate; the line is the right order. Right: the rank correlations
during training, which are of no use if they depend on when one stops.
"""
import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algorithms")]  # finds common.py, fqe.py
import style
from common import evaluate, fail, load_dataset, load_policy

import matplotlib.pyplot as plt
import numpy as np
from fqe import spearman
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

EPISODES = 20
SEED = 3 * 10**9  # of the episodes, apart from those of training's evaluations


def discounted_return(act, env_spec: str, gamma: float) -> float:
    """Σ_t γᵗ r_t, the mean over EPISODES episodes."""
    rewards = [[] for _ in range(EPISODES)]

    def record(i, obs, action, reward, *_):
        rewards[i].append(reward)

    evaluate(act, env_spec, EPISODES, SEED, record=record)
    return float(np.mean([np.dot(gamma ** np.arange(len(one)), one) for one in rewards]))


def measure(result: dict) -> None:
    """Adds the discounted return of each policy, and the estimates' rank correlation with it."""
    gamma = result["args"]["gamma"]
    env_spec = load_dataset(result["env"], "cpu").env_spec
    for policy in tqdm(result["policies"], desc=result["env"], leave=False):
        act = load_policy(policy["policy"])
        policy["discounted_mean"] = discounted_return(act, env_spec, gamma)
    truth = np.array([policy["discounted_mean"] for policy in result["policies"]])
    for point in result["curve"]:
        point["spearman_discounted"] = spearman(np.array(point["estimates"]), truth)


def read(path: Path) -> dict:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} can't be read: {error}")
    if not isinstance(result, dict) or result.get("regret") is None:
        fail(f"{path} compares no policies with rollouts; give result.json files of fqe.py")
    return result


def draw(results: list[dict]) -> None:
    """A row for each result."""
    size = (12, 4.6 * len(results))
    figure, axes = plt.subplots(len(results), 2, figsize=size, squeeze=False)
    for one, (left, right) in zip(results, axes):
        draw_ranks(one, left)
        steps = [point["step"] for point in one["curve"]]
        for key, color, label in (("spearman", style.POLICY, "with returns"),
                                  ("spearman_discounted", style.TRUTH, "with discounted returns")):
            values = [point[key] for point in one["curve"]]
            right.plot(steps, values, marker=".", color=color, label=label)
        right.axhline(0, color=style.DATA, linewidth=0.8)
        right.legend(loc="lower right")
        right.set(title=f"{len(one['policies'])} policies, regret {one['regret']:.0f}",
                  xlabel="updates", ylabel="Spearman's correlation", ylim=(-1.05, 1.05))
    figure.savefig(HERE / "figures" / "ranking.png")


def draw_ranks(one: dict, axis: plt.Axes) -> None:
    """Each policy by its rank in rollouts and in estimates, with its three values."""
    policies = one["policies"]
    by_return = sorted(policy["return_mean"] for policy in policies)
    by_estimate = sorted(policy["estimate"] for policy in policies)
    for policy in policies:
        out, algorithm, _, seed = policy["policy"].split("/")[-5:-1]
        algorithm = out if out.startswith(algorithm) else algorithm  # a study: awac-beta-10
        x = 1 + by_return.index(policy["return_mean"])
        y = 1 + by_estimate.index(policy["estimate"])
        axis.plot(x, y, "o", color=style.ESTIMATE)
        text = (f"{algorithm} {seed.removeprefix('seed')}: {policy['return_mean']:.0f}, "
                f"{policy['discounted_mean']:.0f}, {policy['estimate']:.0f}")
        axis.annotate(text, (x, y), fontsize=8, xytext=(5, -2), textcoords="offset points")
    axis.plot([1, len(policies)], [1, len(policies)], color=style.TRUTH, linewidth=0.8)
    axis.set_xlim(right=1.6 * len(policies))  # room for the labels
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    gamma, rate = one["args"]["gamma"], one["args"]["target_rate"]
    axis.set(title=f"{one['env']}, γ = {gamma:g}, ρ = {rate:g}",
             xlabel="rank by the mean return of rollouts", ylabel="rank by FQE's estimate")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="result.json files of fqe.py")
    results = [read(path) for path in parser.parse_args().results]
    for result in results:
        measure(result)
    (HERE / "ranking.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    draw(results)
