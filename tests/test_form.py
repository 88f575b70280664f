"""The form of the files: copies that are copies, tags that are on both sides, settings with a source, results that match."""
import ast
import json
import re
import sys
from dataclasses import MISSING, fields

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "algorithms").glob("*.py"))
ALLOWED = {  # (file, definition): why it differs from the same name elsewhere; of the names not listed, all are equal
    ("sac", "Actor"): "a Gaussian before tanh, on raw observations",
    ("cql", "Actor"): "as sac's",
    ("sac", "critic_loss"): "as td3_bc's", ("td3_bc", "critic_loss"): "(E3), the plain squared error",
    ("cql", "critic_loss"): "with the conservative term",
    ("dqn", "critic_loss"): "Huber, one network", ("dqn", "td_target"): "the best of numbered actions",
    ("rem", "critic_loss"): "Huber, combinations of heads", ("rem", "td_target"): "of combinations of heads",
    ("rem", "QNetwork"): "K heads", ("dqn", "QNetwork"): "one head",
    ("dqn", "interact"): "numbered actions, ε-greedy", ("sac", "interact"): "continuous actions",
    ("td3_bc", "actor_loss"): "DDPG's with cloning", ("bc", "actor_loss"): "cloning alone",
    ("sac", "actor_loss"): "with entropy", ("cql", "actor_loss"): "as sac's",
    ("td3_bc", "td_target"): "smoothed target action", ("cql", "td_target"): "a sampled action, no entropy",
}
FREE = {"Args", "update", "train"}  # differ everywhere


def source(node: ast.AST) -> str:
    """The code alone: equation tags, and so comments and docstrings, are numbered per file."""
    node = ast.parse(ast.unparse(node)).body[0]
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
            part.body = part.body[1:]
    return ast.unparse(node)


def test_what_is_repeated_is_repeated_exactly():
    """A fix in one copy must reach the others: every definition of the same name is the same code, but for ALLOWED."""
    variants = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in FREE:
                if (path.stem, node.name) not in ALLOWED:
                    variants.setdefault(node.name, {}).setdefault(source(node), []).append(path.stem)
    different = {name: list(codes.values()) for name, codes in variants.items() if len(codes) > 1}
    assert not different
    assert len(variants["polyak_update"][next(iter(variants["polyak_update"]))]) >= 3  # the test sees copies at all


def test_copies_that_say_as_sacs_are_sacs():
    code = {path.stem: {node.name: source(node) for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
            for path in FILES}
    for name in ("Actor", "actor_loss"):
        assert code["cql"][name] == code["sac"][name]
    assert code["sac"]["critic_loss"] == code["td3_bc"]["critic_loss"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_equation_stands_in_docstring_and_code(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    code = text.split('"""', 2)[-1]
    tags = set(re.findall(r"\(E\d+\)", docstring))
    assert tags and tags == set(re.findall(r"\(E\d+\)", code))
    assert tags == set(re.findall(r"^\s*# (\(E\d+\))", code, re.M)), "each tag stands over the lines that compute it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_setting_says_where_it_is_from(path):
    """A trailing comment that --help shows, ending in [P...], [C file], [=] or [D...]; the run's own settings need none."""
    run_settings = {"env", "seed", "device", "out", "resume", "online"}
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


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*/seed*.json")), ids=lambda path: "-".join(path.parts[-3:]))
def test_committed_results_used_the_defaults(path):
    """The table can't drift from the code: but for what says how long and where, every setting is the file's default."""
    result = json.loads(path.read_text())
    script = result["algorithm"].split("-")[0]
    defaults = {field.name: field.default for field in fields(__import__(script).Args)}
    free = {"env", "seed", "steps", "device", "eval_every", "out", "resume", "top_fraction", "lagrange", "cql_weight"}
    assert {key: value for key, value in result["args"].items() if key not in free} == {
        key: value for key, value in defaults.items() if key not in free}
    assert not result["args"]["out"].startswith("/"), "a path of somebody's machine"
    assert len(result["final_returns"]) == 100 and result["curve"][-1]["step"] == result["steps"]
    assert path.parts[-3:] == (result["algorithm"], result["env"], f"seed{result['seed']}.json")
