"""Rebuild tables and pictures from the committed results: python results/report.py card|table|plots

card   results/datasets.json from the built datasets, results/datasets.png from their returns, and the README's dataset card
table  the README's table of results, from results/<algorithm>/<env>/seed<k>.json
plots  results/curves.png, a panel for each dataset, from the same files
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from minari.storage import get_dataset_path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # lets this file find common.py
from common import NAMES, SUITE, check, load_dataset

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
D4RL_V2 = {  # mean returns of D4RL's v2 datasets, over complete episodes
    "halfcheetah-random": -288.80, "halfcheetah-medium": 4770.33, "halfcheetah-medium-replay": 3093.29,
    "halfcheetah-medium-expert": 7713.38, "halfcheetah-expert": 10656.43, "hopper-random": 18.40, "hopper-medium": 1422.06,
    "hopper-medium-replay": 467.30, "hopper-medium-expert": 2089.88, "hopper-expert": 3511.36, "walker2d-random": 1.87,
    "walker2d-medium": 2852.09, "walker2d-medium-replay": 682.70, "walker2d-medium-expert": 3796.57, "walker2d-expert": 4920.51,
}
PUBLISHED = {  # (algorithm, dataset): score, where from; 1M updates unless it says otherwise
    **{("bc", env): f"{score} (v2, in IQL's table)" for env, score in {
        "hopper-medium": 52.9, "hopper-medium-replay": 18.1, "walker2d-medium": 75.3, "walker2d-medium-replay": 26.0,
        "halfcheetah-medium": 42.6, "halfcheetah-medium-replay": 36.6}.items()},
    ("td3_bc", "hopper-medium"): "59.3 (v2, paper App. C.3)",
    ("sac", "hopper-medium"): "0.8 (v0, D4RL paper)",
    ("cql", "hopper-medium"): "61.9 (v2, rerun in EDAC's paper)",
}


def write_readme(section: str, lines: list[str]) -> None:
    """Replace what stands between <!-- section --> and <!-- /section -->."""
    text, block = README.read_text(), "\n".join(lines)
    pattern = rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)"
    check(re.search(pattern, text, re.S), f"README.md has no section <!-- {section} -->")
    README.write_text(re.sub(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.S))


def card() -> None:
    rows, samples = [], {}
    for name in sorted(NAMES, key=lambda name: list(SUITE).index(name.split("-")[0])):
        body, level = name.split("-", 1)
        parts = ("medium", "expert") if level == "medium-expert" else (level,)
        folders = [get_dataset_path(f"local/{body}/{part}-v0") for part in parts]
        if not all(folder.exists() for folder in folders):
            continue
        data = load_dataset(name, "cpu", discrete=f"{body}-replay" in NAMES)
        returns, score = data.returns(), data.score
        samples[name] = returns
        rows.append(dict(
            name=name, transitions=len(data.packed), episodes=len(returns), return_mean=round(float(returns.mean()), 2),
            return_std=round(float(returns.std()), 2), score=round(score(returns), 2), d4rl_v2_return_mean=D4RL_V2.get(name),
            d4rl_v2_score=round(score(D4RL_V2[name]), 2) if name in D4RL_V2 else None,
            build_seconds=sum(int((folder / "build_seconds").read_text()) for folder in folders)))
        print(rows[-1])
    (HERE / "datasets.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    lines = ["| dataset | transitions | episodes | return | score | D4RL v2: return | score | built in |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        known = row["d4rl_v2_score"] is not None
        d4rl = [f"{row['d4rl_v2_return_mean']:.0f}", f"{row['d4rl_v2_score']:.1f}"] if known else ["–", "–"]
        lines.append(f"| {row['name']} | {row['transitions']:,} | {row['episodes']:,} | {row['return_mean']:.0f} ± "
                     f"{row['return_std']:.0f} | {row['score']:.1f} | {d4rl[0]} | {d4rl[1]} | {row['build_seconds']} s |")
    write_readme("datasets", lines)
    bodies = list(dict.fromkeys(name.split("-")[0] for name in samples))
    figure, axes = plt.subplots(len(bodies), 1, figsize=(8, 2.6 * len(bodies)), squeeze=False)
    for body, axis in zip(bodies, axes[:, 0]):
        bins = np.histogram_bin_edges(np.concatenate([r for n, r in samples.items() if n.startswith(body)]), 60)
        for level, color in dict(random="tab:gray", replay="tab:purple", medium="tab:green", expert="tab:red",
                                 **{"medium-replay": "tab:orange", "medium-expert": "black"}).items():
            if (returns := samples.get(f"{body}-{level}")) is not None:
                share, shape = np.full(len(returns), 100 / len(returns)), "step" if level == "medium-expert" else "stepfilled"
                axis.hist(returns, bins, weights=share, histtype=shape, alpha=0.45, color=color, label=level)
        axis.set(title=body, xlabel="episode return", ylabel="% of episodes", yscale="symlog")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(HERE / "datasets.png", dpi=110)


def committed() -> dict[tuple[str, str], list[dict]]:
    """Results by (env, algorithm), one per seed."""
    results = defaultdict(list)
    for path in sorted(HERE.glob("*/*/seed*.json")):
        result = json.loads(path.read_text())
        results[result["env"], result["algorithm"]].append(result)
    return results


def table() -> None:
    results = committed()
    lines = ["| dataset | algorithm | updates | seeds × episodes | score | the data | published | updates/s, 1 thread |",
             "|---|---|---:|---:|---:|---:|---|---:|"]
    scores = {row["name"]: row["score"] for row in json.loads((HERE / "datasets.json").read_text())}
    for (env, algorithm), runs in sorted(results.items()):
        finals = [run["score"] for run in runs]
        spread = f" ± {np.std(finals):.1f}" if len(finals) > 1 else ""
        lines.append(
            f"| {env} | {algorithm} | {runs[0]['steps']:,} | {len(runs)} × {len(runs[0]['final_returns'])} | "
            f"{np.mean(finals):.1f}{spread} | {scores.get(env, float('nan')):.1f} | {PUBLISHED.get((algorithm, env), '–')} | "
            f"{np.mean([run['updates_per_second'] for run in runs]):.0f} |")
    write_readme("results", lines)
    print("\n".join(lines))


def plots() -> None:
    results = committed()
    envs = sorted({env for env, algorithm in results if algorithm != "bc"})  # a clone alone is in the table
    figure, axes = plt.subplots(len(envs), 2, figsize=(12, 4 * len(envs)), squeeze=False)
    for env, (left, right) in zip(envs, axes):
        for (other, algorithm), runs in sorted(results.items()):
            if other != env:
                continue
            steps = [point["step"] for point in runs[0]["curve"]]
            scores = np.array([[point["score"] for point in run["curve"]] for run in runs])
            line, = left.plot(steps, scores.mean(0), label=f"{algorithm} ({len(runs)})")
            left.fill_between(steps, scores.min(0), scores.max(0), alpha=0.15, color=line.get_color())
            metrics = runs[0]["curve"][-1]["metrics"]
            for key, style in (("q_policy", "-"), ("q_data", ":")):
                if key in metrics:
                    values = np.mean([[point["metrics"].get(key, np.nan) for point in run["curve"]] for run in runs], 0)
                    right.plot(steps, values, style, color=line.get_color(), label=f"{algorithm} {key}")
        mean = next(run["dataset"]["return_mean"] for (other, _), runs in results.items() if other == env for run in runs)
        low, high = SUITE[env.split("-")[0]][1:]
        left.axhline(100 * (mean - low) / (high - low), color="black", linewidth=0.8, linestyle="--", label="the data")
        left.set(title=env, xlabel="updates", ylabel="score (10 episodes per point)")
        right.set(title="what the critic believes", xlabel="updates", ylabel="mean Q", yscale="symlog")
        left.legend(loc="lower right", ncols=2, fontsize=8)
        right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "curves.png", dpi=100)


if __name__ == "__main__":
    commands = {"card": card, "table": table, "plots": plots}
    check(len(sys.argv) == 2 and sys.argv[1] in commands, __doc__.splitlines()[0])
    commands[sys.argv[1]]()
