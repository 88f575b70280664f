"""Rebuild tables and pictures from committed results: report.py card|tables|figures|progress [RUNS]

card      results/behavior/datasets.json and figures/datasets.png, from the built datasets
tables    the tables of results/README.md, from results/scores/ and published.json
figures   results/figures/, from results/scores/ and what overestimation.py and its like measured
progress  a table of the runs under way in a folder (default: runs): steps, speed, time left
"""
import importlib
import json
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]  # finds common.py and the algorithms
from common import MAY_CHANGE, NAMES, SUITE, fail, load_dataset
from style import CLONE, DATA, ESTIMATE, POLICY, plt, words

import numpy as np
import overestimation
from grid import ONE_AT_A_TIME, PARTS, seeds_of
from minari.storage import get_dataset_path

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures"
CARD = HERE / "behavior" / "datasets.json"
D4RL_V2 = {  # mean, standard deviation and maximum of the returns of D4RL's v2 datasets
    "halfcheetah-random": (-288.80, 80.43, -85.36),
    "halfcheetah-medium": (4770.33, 355.75, 5309.38),
    "halfcheetah-medium-replay": (3093.29, 1680.69, 4985.14),
    "halfcheetah-medium-expert": (7713.38, None, None),
    "halfcheetah-expert": (10656.43, 441.68, 11252.04),
    "hopper-random": (18.40, 17.45, 292.55),
    "hopper-medium": (1422.06, 378.95, 3222.36),
    "hopper-medium-replay": (467.30, 511.03, 3192.93),
    "hopper-medium-expert": (2089.88, None, None),
    "hopper-expert": (3511.36, 328.59, 3759.08),
    "walker2d-random": (1.87, 5.81, 75.03),
    "walker2d-medium": (2852.09, 1095.44, 4226.94),
    "walker2d-medium-replay": (682.70, 895.96, 4132.00),
    "walker2d-medium-expert": (3796.57, None, None),
    "walker2d-expert": (4920.51, 136.39, 5011.69),
}
MOST_PANELS = 8
RESULT_KEYS = {"env", "seed", "steps", "args", "dataset", "curve", "score", "updates_per_second"}
YOUNGER = ("td3_bc", "rebrac", "iql", "awac", "crr", "plas", "decision_transformer", "edac",
           "edac-sac-n", "msg", "algae_dice")  # methods that the notes' tables do not have


def write_section(section: str, lines: list[str], path: Path = HERE / "README.md") -> None:
    """Replaces what stands between <!-- section --> and <!-- /section --> in the page."""
    text = path.read_text()
    pattern = rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)"
    if not re.search(pattern, text, re.S):
        fail(f"{path} has no section <!-- {section} -->")
    block = "\n".join(lines)
    new = re.sub(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.S)
    path.write_text(new)


# ---- the datasets


def describe_dataset(name: str) -> dict | None:
    """What a built dataset really is, beside D4RL's figures; None where it is absent."""
    body, _, level = name.partition("-")
    levels = ("medium", "expert") if level == "medium-expert" else (level,)
    folders = [get_dataset_path(f"local/{body}/{part}-v0") for part in levels]
    if not all(folder.exists() for folder in folders):
        return None
    data = load_dataset(name, "cpu", discrete=None)
    returns = data.returns()
    counts, edges = np.histogram(returns, 40)
    seconds = sum(int((folder / "build_seconds").read_text()) for folder in folders)
    return {
        "name": name, "fingerprint": data.describe()["fingerprint"], "transitions": data.size,
        "episodes": len(returns), "return_mean": round(float(returns.mean()), 2),
        "return_std": round(float(returns.std()), 2), "return_max": round(float(returns.max()), 2),
        "score": round(data.score(returns), 2), "d4rl_v2": D4RL_V2.get(name),
        "build_seconds": seconds,
        "histogram": {"from": round(float(edges[0]), 1), "to": round(float(edges[-1]), 1),
                      "counts": counts.tolist()},
    }


def card() -> None:
    FIGURES.mkdir(exist_ok=True)
    rows = {row["name"]: row for row in json.loads(CARD.read_text())} if CARD.exists() else {}
    for name in sorted(NAMES, key=lambda name: list(SUITE).index(name.split("-")[0])):
        if row := describe_dataset(name):
            rows[name] = row
            print(row)
    ordered = [rows[name] for name in sorted(rows, key=NAMES.index)]
    CARD.write_text("[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n")
    write_section("card", card_table(ordered))
    draw_datasets(rows)


def card_table(rows: list[dict]) -> list[str]:
    lines = ["| dataset | transitions | episodes | return: mean ± std, maximum | score | "
             "D4RL v2: mean ± std, maximum | score |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        ours = f"{row['return_mean']:.0f} ± {row['return_std']:.0f}"
        if "return_max" in row:
            ours += f", {row['return_max']:.0f}"
        theirs = ["–", "–"]
        if row["d4rl_v2"]:
            mean, std, most = row["d4rl_v2"]
            _, low, high = SUITE[row["name"].split("-")[0]]
            spread = f" ± {std:.0f}, {most:.0f}" if std else ""
            theirs = [f"{mean:.0f}{spread}", f"{100 * (mean - low) / (high - low):.1f}"]
        lines.append(f"| {row['name']} | {row['transitions']:,} | {row['episodes']:,} | {ours} | "
                     f"{row['score']:.1f} | {theirs[0]} | {theirs[1]} |")
    return lines


def draw_datasets(rows: dict[str, dict]) -> None:
    """figures/datasets.png: the returns of the MuJoCo bodies' medium-replay, medium and expert, as
    far as the card has them."""
    shown = (("medium-replay", DATA), ("medium", POLICY), ("expert", ESTIMATE))
    bodies = [body for body in ("hopper", "walker2d", "halfcheetah")
              if "histogram" in rows.get(f"{body}-medium-replay", {})]
    figure, axes = plt.subplots(1, len(bodies), figsize=(4.5 * len(bodies), 3.8), squeeze=False)
    for body, axis in zip(bodies, axes[0]):
        for level, color in shown:
            histogram = rows.get(f"{body}-{level}", {}).get("histogram")
            if histogram:
                share = 100 * np.array(histogram["counts"]) / sum(histogram["counts"])
                edges = np.linspace(histogram["from"], histogram["to"], len(share) + 1)
                axis.stairs(share, edges, fill=True, color=color, alpha=0.6, label=level)
        axis.set(title=body, xlabel="return of an episode")
    axes[0, 0].set_ylabel("% of episodes")
    axes[0, 0].legend()
    figure.savefig(FIGURES / "datasets.png")


# ---- the results


def committed() -> dict[str, dict[str, list[dict]]]:
    """{dataset: {name of the run in grid.py: [result of each seed]}}."""
    results = defaultdict(lambda: defaultdict(list))
    for path in sorted((HERE / "scores").glob("*/*/*.json")):
        name, env = path.parts[-3:-1]
        if not re.fullmatch(r"seed\d+\.json", path.name):
            fail(f"{path} is none of the grid's results, which are called seed<k>.json")
        try:
            result = json.loads(path.read_text())
            missing = RESULT_KEYS - set(result)
        except (OSError, ValueError, TypeError) as error:
            fail(f"{path} can't be read: {error}")
        if missing:
            fail(f"{path} is no result of a run: it lacks {', '.join(sorted(missing))}")
        if not is_current(result):
            fail(f"{path} is of another {env} than the card tells of; run it again on this one")
        results[env][name].append(result)
    return results


def grid_results() -> dict:
    """What was committed, without the studies."""
    results = committed()
    for env, runs_of in results.items():
        results[env] = {name: runs for name, runs in runs_of.items() if name not in ONE_AT_A_TIME}
    return results


def mean_and_std(runs: list[dict]) -> str:
    scores = [run["score"] for run in runs]
    spread = f" ± {np.std(scores):.0f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.1f}{spread}"


def cell(runs: list[dict] | None) -> str:
    """A score in bold."""
    return f"**{mean_and_std(runs)}** " if runs else ""


def score_of_data(run: dict) -> float:
    """Of the dataset that this run was trained on."""
    _, low, high = SUITE[run["env"].split("-")[0]]
    return 100 * (run["dataset"]["return_mean"] - low) / (high - low)


def is_current(run: dict) -> bool:
    """Whether a run used the dataset that `make data` builds, as the card tells.

    Not by the fingerprint: processors round differently, and the last digits of the data with them.
    Of a run that left episodes out only the name is known.
    """
    row = next((row for row in json.loads(CARD.read_text()) if row["name"] == run["env"]), None)
    if row is None or run["args"].get("holdout", 0):
        return row is not None
    return all(round(run["dataset"][key], 2) == round(row[key], 2)
               for key in ("transitions", "episodes", "return_mean"))


def tables() -> None:
    results = grid_results()
    published = json.loads((HERE / "published.json").read_text())
    for table in ("uwac_table", "combo_table"):
        write_section(table, notes_table(results, published[table]))
    write_section("headline", headline(results), HERE.parent / "README.md")
    write_section("studies", study_table(committed()))
    write_section("speed", speed_table())
    write_section("younger_table", younger_table(results, published["other"]))
    write_section("results", result_table(results, published["other"]))
    write_section("missing", missing_table(committed()))
    write_section("promises", promise_table())


def headline(results: dict) -> list[str]:
    """What a clone and the best methods score on the dataset that separates them most."""
    env = "hopper-medium-replay"
    runs_of = results[env]
    order = sorted(runs_of, key=lambda name: np.mean([run["score"] for run in runs_of[name]]))
    best = [name for name in order if name != "bc"][-3:]
    scores = [f"{name} {mean_and_std(runs_of[name])}"
              + (" (one seed)" if len(runs_of[name]) == 1 else "") for name in best]
    data = score_of_data(runs_of["bc"][0])
    return [f"{env}: the data score {data:.1f}, a clone of them {mean_and_std(runs_of['bc'])}, "
            f"{', '.join(scores)}."]


def notes_table(results: dict, table: dict) -> list[str]:
    """One of the notes' tables: our score ± std over seeds, and the printed one in brackets."""
    columns = table["columns"]
    lines = ["| dataset | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for env, printed in table["scores"].items():
        cells = []
        for algorithm in columns:
            ours = cell(results.get(env, {}).get(algorithm))
            theirs = f"({printed[algorithm]})" if algorithm in printed else ""
            cells.append(ours + theirs)
        lines.append(f"| {env} | " + " | ".join(cells) + " |")
    return lines


def speed_table() -> list[str]:
    """Updates per second that tests/bench.py --save has measured: a row for each file."""
    rows = json.loads((HERE / "speed.json").read_text())
    columns = list(dict.fromkeys((row["label"], row["threads"]) for row in rows))
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    lines = ["| file | GFLOP | " + " | ".join(f"{label}, {n}" for label, n in columns) + " |",
             "|---|---:|" + "---:|" * len(columns)]
    for name in names:
        seen = {(row["label"], row["threads"]): row for row in rows if row["algorithm"] == name}
        gflop = next(iter(seen.values()))["gflop"]
        cells = [f"{seen[c]['updates_per_second']:g}" if c in seen else "" for c in columns]
        lines.append(f"| {name} | {gflop:.2f} | " + " | ".join(cells) + " |")
    return lines


def younger_table(results: dict, published: dict) -> list[str]:
    """A row for each method: our score in each dataset, and a published one in brackets."""
    envs = [env for env in NAMES if any(name in YOUNGER for name in results.get(env, {}))]
    lines = ["| method | " + " | ".join(envs) + " |", "|---|" + "---:|" * len(envs)]
    for name in YOUNGER:
        cells = []
        for env in envs:
            ours = cell(results[env].get(name))
            theirs = published.get(env, {}).get(name)
            cells.append(ours + (f"({theirs.split(' ')[0]})" if theirs else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def result_table(results: dict, published: dict) -> list[str]:
    lines = ["| dataset | algorithm | updates | seeds | score | data's score | published | "
             "updates/s | settings that are not the file's defaults |",
             "|---|---|---:|---:|---:|---:|---|---:|---|"]
    for env in sorted(results, key=NAMES.index):
        for algorithm, runs in sorted(results[env].items()):
            speed = np.mean([run["updates_per_second"] for run in runs])
            lines.append(
                f"| {env} | {algorithm} | {updates_of(runs)} | {len(runs)} | {mean_and_std(runs)}"
                f" | {score_of_data(runs[0]):.1f} | {published.get(env, {}).get(algorithm, '–')}"
                f" | {speed:.0f} | {other_settings(runs[0])} |")
    return lines


def updates_of(runs: list[dict], unit: int = 1) -> str:
    """The updates of the runs in units, as 100,000, or 60,000–100,000 where they differ."""
    lengths = sorted({run["steps"] // unit for run in runs})
    return "–".join(f"{length:,}" for length in (lengths[0], lengths[-1])[:len(lengths)])


def missing_table(results: dict) -> list[str]:
    """Core-hours of the grid's runs that are not committed in full length, at the median speed of
    what is committed of the same run."""
    columns = {"hopper-medium-replay": "123", "hopper-medium": "45", "the ten others": "6"}
    speeds, hours = defaultdict(list), defaultdict(lambda: defaultdict(float))
    for runs_of in results.values():
        for name, runs in runs_of.items():
            speeds[name] += [run["updates_per_second"] for run in runs]
    for column, parts in columns.items():
        for datasets, files, seeds in (PARTS[part] for part in parts):
            for name, command in files.items():
                steps = int(re.search(r"--steps (\d+)", command)[1])
                wanted = len(datasets) * len(seeds_of(seeds))
                done = sum(run["steps"] >= steps
                           for env in datasets for run in results.get(env, {}).get(name, []))
                seconds = steps / np.median(speeds[name])
                hours[name][column] += max(0, wanted - done) * seconds / 3600
    lines = ["| run | updates/s | " + " | ".join(columns) + " |",
             "|---|---:|" + "---:|" * len(columns)]
    for name in hours:
        cells = [f"{hours[name][column]:.1f}" for column in columns]
        lines.append(f"| {name} | {np.median(speeds[name]):.0f} | " + " | ".join(cells) + " |")
    sums = [f"{sum(row[column] for row in hours.values()):.0f}" for column in columns]
    return [*lines, "| all | | " + " | ".join(sums) + " |"]


def other_settings(run: dict) -> str:
    """What a run changed of its file's own settings, beside length, seed, threads and the like."""
    file = file_of(run["algorithm"])
    usual = asdict(file.Args()) | getattr(file, "TUNED", {}).get(run["env"], {})
    changed = [f"{name} {value:,}" if type(value) is int else f"{name} {value}"
               for name, value in run["args"].items()
               if name in usual and name not in MAY_CHANGE + ("seed",) and usual[name] != value]
    return ", ".join(changed)


def file_of(algorithm: str):
    """The module that made a result: brac of brac-p."""
    while not (HERE.parent / "algorithms" / f"{algorithm}.py").exists():
        algorithm = algorithm.rpartition("-")[0]
    return importlib.import_module(algorithm)


def promise_table() -> list[str]:
    """What overestimation.py measured at the last checkpoint of each run."""
    runs = json.loads((HERE / "overestimation.json").read_text())
    runs.sort(key=overestimation.last_ratio, reverse=True)
    runs.sort(key=lambda run: run["env"], reverse=True)
    lines = ["| dataset | run | seed | updates | Q promises | is earned | ratio |",
             "|---|---|---:|---:|---:|---:|---:|"]
    for run in runs:
        step, promised, earned = run["points"][-1]
        lines.append(f"| {run['env']} | {run['name']} | {run['seed']} | {step:,} | {promised:,.0f} "
                     f"| {earned:.0f} | {overestimation.last_ratio(run):.2f} |")
    return lines


def study_table(results: dict) -> list[str]:
    """Runs that differ in one setting: their evaluations in training, and the final score."""
    lines = ["| dataset | run | seed | updates | evaluations in training | score | the data |",
             "|---|---|---:|---:|---|---:|---:|"]
    for env in sorted(results, key=NAMES.index):
        for name in ONE_AT_A_TIME:
            for run in results[env].get(name, []):
                seen = ", ".join(f"{point['score']:.0f}" for point in run["curve"])
                lines.append(f"| {env} | {name} | {run['seed']} | {run['steps']:,} | {seen} | "
                             f"{run['score']:.1f} | {score_of_data(run):.1f} |")
    return lines


def figures() -> None:
    FIGURES.mkdir(exist_ok=True)
    results = grid_results()
    for env in ("hopper-medium-replay", "hopper-medium"):
        if env in results:
            draw_scores(env, results[env])
    for env in results:
        runs_of = {name: runs for name, runs in results[env].items() if name != "bc"}
        best = sorted(runs_of, key=lambda name: -np.mean([run["score"] for run in runs_of[name]]))
        if best:
            draw_curves(env, results[env], best[:MOST_PANELS])
    for name in ("overestimation", "ranking", "asked", "model_error"):
        importlib.import_module(name).draw(json.loads((HERE / f"{name}.json").read_text()))


def draw_scores(env: str, runs_of: dict) -> None:
    """figures/scores-<dataset>.png: a dot for each algorithm and seed; beside the name thousands of
    updates; lines for the data and a clone. Narrow, so that a phone shows it legibly."""
    order = sorted(runs_of, key=lambda name: np.mean([run["score"] for run in runs_of[name]]))
    figure, axis = plt.subplots(figsize=(6, 1.3 + 0.29 * len(order)))
    for row, name in enumerate(order):
        color = CLONE if name == "bc" else POLICY
        for run in runs_of[name]:
            axis.plot(run["score"], row, "o", color=color, markersize=8)
    if "bc" in runs_of:
        data = score_of_data(runs_of["bc"][0])
        clone = np.mean([run["score"] for run in runs_of["bc"]])
        sides = ("right", "left") if data < clone else ("left", "right")
        lines = ((data, "data ", DATA), (clone, " clone ", CLONE))
        for (score, text, color), side in zip(lines, sides):
            axis.axvline(score, color=color, linestyle="--")
            axis.text(score, len(order) - 0.3, text, color=words(color), ha=side)
    labels = [f"{name}, {updates_of(runs_of[name], 1000)}k" for name in order]
    axis.set_yticks(range(len(order)), labels)
    axis.set(title=env, xlabel="score of the final policy, 100 episodes",
             ylim=(-0.8, len(order) + 0.5))
    axis.set_xlim(left=min(axis.get_xlim()[0], -12))  # room for a word left of the data's line
    axis.grid(axis="y", color="#eeeeee")
    figure.savefig(FIGURES / f"scores-{env}.png")
    plt.close(figure)


def draw_curves(env: str, runs_of: dict, names: list[str]) -> None:
    """figures/curves-<dataset>.png: evaluations in training, at most eight methods, best first."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.8 * rows + 0.5),
                                sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names):
        for other, color in (("bc", CLONE), (name, POLICY)):
            for run in runs_of.get(other, []):
                steps = [point["step"] / 1000 for point in run["curve"]]
                axis.plot(steps, [point["score"] for point in run["curve"]], color=color)
                axis.plot(run["steps"] / 1000, run["score"], "o", color=color)
        axis.axhline(score_of_data(runs_of[name][0]), color=DATA, linestyle="--")
        axis.set(title=name, xlabel="thousand updates")
    for axis in list(axes.flat)[len(names):]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("score")
    figure.suptitle(f"{env}: the method blue, a clone light blue, the data grey")
    figure.savefig(FIGURES / f"curves-{env}.png", dpi=80)
    plt.close(figure)


# ---- runs under way


def progress(folder: Path) -> None:
    """What the checkpoints' folders tell: last evaluation, whether finished, minutes since."""
    runs = sorted(file.parent for depth in ("*/*", "*/*/*")  # a study's are one folder deeper
                  for file in folder.glob(f"{depth}/seed*/settings.json")
                  if file.parent.name.removeprefix("seed").isdecimal())  # not what was renamed
    if not runs:
        fail(f"no runs in {folder}; it must hold <algorithm>/<env>/seed<k>")
    print(f"{'run':<60}{'step':>12}{'of':>12}{'last score':>12}{'updates/s':>11}{'hours left':>12}")
    for run in runs:
        name = str(run.relative_to(folder))
        try:
            print(f"{name:<60}{progress_of(run)}")
        except Exception as error:  # one damaged file must not hide the other runs
            print(f"{name:<60}can't be read: {type(error).__name__}")


def progress_of(run: Path) -> str:
    """One run's row, without its name."""
    import torch

    steps = json.loads((run / "settings.json").read_text())["steps"]
    checkpoint = run / "checkpoint.pt"
    result = {}
    if (run / "result.json").exists():
        result = json.loads((run / "result.json").read_text())
    if result.get("steps", 0) >= steps:  # else a longer run is under way
        score = "–" if result["score"] is None else f"{result['score']:.1f}"
        return (f"{result['steps']:>12,}{result['steps']:>12,}{score:>12}"
                f"{result['updates_per_second']:>11.1f}{'finished':>12}")
    if not checkpoint.exists():
        return f"{0:>12,}{steps:>12,}{'no checkpoint yet':>35}"
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    speed = saved["step"] / max(saved["seconds"], 1e-9)
    scores = [point["score"] for point in saved["curve"] if point["score"] is not None]
    last = f"{scores[-1]:.1f}" if scores else "–"
    left = (steps - saved["step"]) / max(speed, 1e-9) / 3600
    silent = (time.time() - checkpoint.stat().st_mtime) / 60
    return (f"{saved['step']:>12,}{steps:>12,}{last:>12}{speed:>11.1f}{left:>12.1f}"
            f"   checkpoint {silent:.0f} minutes ago")


if __name__ == "__main__":
    commands = {"card": card, "tables": tables, "figures": figures}
    if len(sys.argv) > 1 and sys.argv[1] == "progress":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends without an error
        progress(Path(sys.argv[2] if len(sys.argv) > 2 else "runs"))
    elif len(sys.argv) == 2 and sys.argv[1] in commands:
        commands[sys.argv[1]]()
    else:
        fail(__doc__.splitlines()[0])
