"""The form of the files: copies that are copies, tags that are on both sides, settings with a
source, results that match."""
import ast
import json
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "results"))
import grid

FILES = sorted((ROOT / "algorithms").glob("*.py"))
SAC = {"sac", "cql", "edac", "mopo", "morel", "combo"}
# definitions that belong to the algorithm: which files share one form of it. Files not named have
# their own form.
FAMILIES = {
    "Actor": [
        SAC | {"msg"},
        {"bc", "td3_bc"},
        {"bear", "uwac"},
        {"crr", "iql"},
    ],
    "Critic": [
        SAC | {"algae_dice", "awac", "bcq", "bear", "brac", "iql", "mabcq", "msg", "plas", "td3_bc"}
    ],
    "QNetwork": [{"dqn", "cql_discrete"}],
    "critic_loss": [
        {
            "awac",
            "bcq",
            "bear",
            "brac",
            "crr",
            "iql",
            "mopo",
            "morel",
            "plas",
            "rebrac",
            "sac",
            "td3_bc",
        }
    ],
    "actor_loss": [SAC, {"awac", "crr", "iql"}],
    "entropy_coef_loss": [SAC | {"msg"}, {"algae_dice", "brac"}],
    "td_target": [{"awac", "crr"}],
    "Dynamics": [{"combo", "mopo"}],
    "dynamics_loss": [{"combo", "mopo"}],
    "fit": [{"combo", "mopo"}],
    "actor_rate": [],
    "imagine": [],
    "soft_max_q": [],
    "advantage": [],
    "weights": [],
    "value_loss": [],
}
FREE = {"Args", "update", "train"}  # differ everywhere


def source(node: ast.AST) -> str:
    """The code alone: equation tags, and so comments and docstrings, are numbered per file."""
    node = ast.parse(ast.unparse(node)).body[0]
    for part in ast.walk(node):
        if (
            isinstance(part, (ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(part) is not None
        ):
            part.body = part.body[1:]
    return ast.unparse(node)


def test_what_is_repeated_is_repeated_exactly():
    """A fix in one copy must reach the others: every definition of the same name is the same code,
    but for FAMILIES."""
    forms = {}  # name: {file: code}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in FREE:
                forms.setdefault(node.name, {})[path.stem] = source(node)
    for name, codes in forms.items():
        groups = [family & set(codes) for family in FAMILIES.get(name, [set(codes)])]
        groups += [{file} for file in codes if not any(file in group for group in groups)]
        found = {}
        for file, code in codes.items():
            found.setdefault(code, set()).add(file)
        assert sorted(map(sorted, found.values())) == sorted(
            sorted(group) for group in groups if group
        ), name
    assert len(forms["polyak_update"]) >= 3  # the test sees copies at all


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_equation_stands_in_docstring_and_code(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    code = text.split('"""', 2)[-1]
    tags = set(re.findall(r"\(E\d+\)", docstring))
    assert tags and tags == set(re.findall(r"\(E\d+\)", code))
    assert tags == set(re.findall(r"^\s*# (\(E\d+\))", code, re.M)), (
        "each tag stands over the lines that compute it"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_setting_says_where_it_is_from(path):
    """A trailing comment that --help shows, ending in [P...], [C file], [=] or [D...]; the run's
    own settings need none."""
    run_settings = {"env", "seed", "device", "threads", "eval_env", "holdout", "out", "resume"}
    tree = ast.parse(path.read_text())
    arguments = next(node for node in tree.body if getattr(node, "name", "") == "Args")
    lines = path.read_text().splitlines()
    for field in arguments.body:
        comment = lines[field.end_lineno - 1].partition("  # ")[2]
        assert comment, field.target.id
        if field.target.id not in run_settings:
            assert re.search(r"\[(P|C|=|D)[^\]]*\]", comment), f"{field.target.id}: {comment}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_help_is_complete(path, capsys, monkeypatch):
    import tyro
    module = __import__(path.stem)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        tyro.cli(module.Args)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in fields(module.Args):
        assert f"--{field.name.replace('_', '-')}" in text and field.default is not MISSING


RESULTS = sorted((ROOT / "results" / "scores").glob("*/*/seed*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: "-".join(path.parts[-3:]))
def test_committed_results_used_the_defaults(path):
    """The table can't drift from the code or the data: but for what says how long and where, every
    setting is the file's default, and the data are those of the card."""
    result = json.loads(path.read_text())
    assert not result["args"]["out"].startswith("/"), "a path of somebody's machine"
    assert len(result["final_returns"]) == 100 and result["curve"][-1]["step"] == result["steps"]
    study = grid.ONE_AT_A_TIME.get(path.parts[-3], "")  # says which settings differ
    algorithm = Path(study.split()[0]).stem if study else path.parts[-3]
    assert (algorithm, *path.parts[-2:]) == (
        result["algorithm"],
        result["env"],
        f"seed{result['seed']}.json",
    )
    rows = json.loads((ROOT / "results/behavior/datasets.json").read_text())
    card = next(row for row in rows if row["name"] == result["env"])
    if result["args"].get("holdout"):
        assert 0.89 < result["dataset"]["transitions"] / card["transitions"] < 0.91
        # that of hopper-medium with --holdout 0.1
        assert result["dataset"]["fingerprint"] == "f7c990bdc1b3f107"
    else:
        assert result["dataset"]["fingerprint"] == card["fingerprint"]
    module = __import__(result["algorithm"].split("-")[0])
    defaults = {field.name: field.default for field in fields(module.Args)}
    defaults |= getattr(module, "TUNED", {}).get(result["env"], {})
    free = {
        "env",
        "seed",
        "steps",
        "device",
        "threads",
        "eval_every",
        "out",
        "resume",
        "holdout",
        "num_critics",
        "agents",
        # how long a fit before step 1 or the first phase lasts; the table says it
        "behavior_steps",
        "warm_up_steps",
        "warmup_steps",
        "vae_steps",
        "dynamics_epochs",
    }
    free |= {option.replace("-", "_") for option in re.findall(r"--([a-z-]+)", study)}
    if "-" in result["algorithm"]:  # a mode that the name tells
        free |= {
            "top_fraction",
            "lagrange",
            "form",
            "ensemble",
            "double",
            "value_penalty",
            "weighting",
            "diversity_weight",
            "penalty_weight",
            "penalty",
            "rollout_policy",
            "reweight",
        }
    for key in set(defaults) - free:
        assert result["args"][key] == defaults[key], key
