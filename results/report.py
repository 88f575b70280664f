"""Rebuild tables and pictures from the committed results: python results/report.py card|table|plots

card   results/datasets.json from the built datasets, results/datasets.png from their returns, and the README's dataset card
table  the README's results, in the table of files and in that of results, from results/<algorithm>/<env>/seed<k>.json
plots  results/curves/<dataset>.png from the same files, a panel for each algorithm
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
    **{(name, f"hopper-{level}"): f"{score} ({source})" for name, source, scores in (
        ("td3_bc", "v2, paper App. C.3", (59.3, 60.9)), ("sac", "v0, D4RL paper", (0.8, 3.5)),
        ("iql", "v2, paper", (66.3, 94.7)), ("cql", "v2, rerun in EDAC's paper", (61.9, 86.3)),
        ("awac", "v2, rerun by IQL's authors", (57.0, 37.2)),
        ("crr", "v0, d3rlpy, binary", (26.1, 13.3)), ("awr", "v0, D4RL paper", (35.9, 28.4)),
        ("bcq", "v0, d3rlpy", (52.5, 16.1)), ("plas", "v0, d3rlpy", (58.1, 17.5)), ("bear", "v0, D4RL paper", (52.1, 33.7)),
        ("brac-p", "v0, D4RL paper", (32.7, 0.6)), ("rebrac", "v2, paper", (102.0, 98.1)),
        ("edac", "v2, paper, N = 50", (101.6, 101.0)), ("edac-sac-n", "v2, paper, N = 500, 200", (100.3, 101.8)),
        ("mopo", "v0, paper", (28.0, 67.5)), ("morel", "v0, paper", (95.4, 93.6)),
        ("combo", "v2, OfflineRL-Kit", (84.7, 90.1)), ("decision_transformer", "v2, paper", (67.6, 82.7)))
       for level, score in zip(("medium", "medium-replay"), scores)},
    ("mopo", "halfcheetah-medium-replay"): "53.1 (v0, paper)", ("morel", "halfcheetah-medium-replay"): "40.2 (v0, paper)",
    ("combo", "halfcheetah-medium-replay"): "66.5 (v2, OfflineRL-Kit)", ("algae_dice", "hopper-medium"): "1.2 (v0, D4RL paper)",
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
    means = {key: f"{np.mean([run['score'] for run in runs]):.0f}" for key, runs in results.items()}

    def with_scores(row: re.Match) -> str:
        """The last cell of a file's row: its scores on the datasets that its column names, or else on another."""
        hopper, other = ([means.get((env, row[2]), means.get((env, row[2] + "-p"), "–")) for env in envs]
                         for envs in (("hopper-medium", "hopper-medium-replay"), ("cartpole-replay",)))
        return f"{row[1]} {' / '.join(hopper) if other == ['–'] else f'{other[0]} on cartpole-replay'} |"

    README.write_text(re.sub(r"^(\|.*\]\(algorithms/(\w+)\.py\).*\|)[^|]*\|$", with_scores, README.read_text(), flags=re.M))


def plots() -> None:
    """results/curves/<dataset>.png: for each algorithm its scores, the clone's and the data's behind them, and its mean Q."""
    results = committed()
    for env in sorted({env for env, algorithm in results if algorithm != "bc"}):  # a clone alone is in the table
        runs_of = {algorithm: runs for (other, algorithm), runs in sorted(results.items()) if other == env}
        mean, (low, high) = next(iter(runs_of.values()))[0]["dataset"]["return_mean"], SUITE[env.split("-")[0]][1:]
        columns, scores = min(4, len(runs_of)), [p["score"] for runs in runs_of.values() for run in runs for p in run["curve"]]
        figure = plt.figure(figsize=(3.6 * columns, 4 * -(-len(runs_of) // columns)), layout="constrained")
        boxes = figure.subfigures(-(-len(runs_of) // columns), columns, squeeze=False).flat
        for box, (algorithm, runs) in zip(boxes, runs_of.items()):
            top, bottom = box.subplots(2, 1, sharex=True, height_ratios=(2, 1))
            for other, color, width in (("bc", "tab:gray", 0.8), (algorithm, "tab:blue", 1.5)):
                for run in runs_of.get(other, []):
                    top.plot([point["step"] for point in run["curve"]], [point["score"] for point in run["curve"]], color=color,
                             linewidth=width)
                    top.plot(run["steps"], run["score"], "o", color=color, markersize=5 if other == algorithm else 3)
            beliefs = [[(point["step"], point["metrics"][key]) for point in run["curve"] if key in point["metrics"]]
                       for key in ("q_policy", "q_data") for run in runs]
            for points, style in zip(beliefs, ["-"] * len(runs) + [":"] * len(runs)):
                bottom.plot(*zip(*points), style, color="tab:red", linewidth=1) if points else None
            top.axhline(100 * (mean - low) / (high - low), color="black", linewidth=0.8, linestyle="--")
            top.set(title=algorithm, ylabel="score", ylim=(min(scores) - 3, max(scores) + 3))
            positive = all(q > 0 for points in beliefs for _, q in points)
            bottom.set(xlabel="updates", ylabel="mean Q", yscale="log" if positive else "symlog")
            bottom.yaxis.get_major_locator().set_params(numticks=4)
            bottom.locator_params(axis="x", nbins=4)
            bottom.set_visible(any(beliefs))
            top.tick_params(labelbottom=not any(beliefs))
        figure.suptitle(f"{env}: each seed's evaluations in training and final score (dot), BC's in grey, the data's dashed; "
                        "below, mean Q of the policy's actions, and dotted of the data's", fontsize=9)
        (HERE / "curves").mkdir(exist_ok=True)
        figure.savefig(HERE / "curves" / f"{env}.png", dpi=80)
        plt.close(figure)


if __name__ == "__main__":
    commands = {"card": card, "table": table, "plots": plots}
    check(len(sys.argv) == 2 and sys.argv[1] in commands, __doc__.splitlines()[0])
    commands[sys.argv[1]]()
