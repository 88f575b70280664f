"""report.py: runs under way, what counts as present, what has not run; and grid.py's list."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import bc
import numpy as np
import pytest
import td3_bc
import torch
import tyro
from conftest import ROOT

sys.path.append(str(ROOT / "results"))
import grid
import report


def make_run(folder, name, **files):
    run = folder / name / "hopper-medium" / "seed0"
    run.mkdir(parents=True)
    for file, content in files.items():
        path = run / file.replace("_", ".")
        if isinstance(content, str):
            path.write_text(content)
        else:
            torch.save(content, path)


def test_progress_shows_every_run_and_names_what_cannot_be_read(tmp_path, capsys):
    settings = json.dumps({"steps": 100})
    half = {"step": 50, "seconds": 5.0, "curve": [{"score": None}, {"score": 12.34}]}
    done = json.dumps({"steps": 100, "score": None, "updates_per_second": 7.0})
    make_run(tmp_path, "bc", settings_json=settings, checkpoint_pt=half)
    make_run(tmp_path, "iql", settings_json=settings, result_json=done)
    longer = dict(settings_json=json.dumps({"steps": 200}), result_json=done, checkpoint_pt=half)
    make_run(tmp_path, "td3_bc", **longer)
    make_run(tmp_path, "awac", settings_json=settings)
    make_run(tmp_path, "crr", settings_json="")
    make_run(tmp_path, "sac", settings_json=settings, checkpoint_pt="{half")
    report.progress(tmp_path)
    rows = {line.split("/")[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["bc"].split()[1:5] == ["50", "100", "12.3", "10.0"]
    assert rows["td3_bc"].split()[1:3] == ["50", "200"], "a finished run that goes on"
    assert "finished" in rows["iql"] and "–" in rows["iql"] and "no checkpoint yet" in rows["awac"]
    assert "can't be read" in rows["crr"] and "can't be read" in rows["sac"]


def test_progress_of_a_folder_without_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.progress(tmp_path)
    assert stop.value.code == 2 and "no runs in" in capsys.readouterr().err


def test_which_runs_are_of_the_present_build(tmp_path, monkeypatch):
    """By the data's numbers, to two digits; a run without a share of the episodes has others."""
    numbers = {"transitions": 10, "episodes": 2, "return_mean": 3.14159}
    monkeypatch.setattr(report, "CARD", tmp_path / "card.json")
    report.CARD.write_text(json.dumps([{"name": "a", **numbers, "return_mean": 3.14}]))

    def run(env="a", holdout=0.0, **changed):
        return {"env": env, "args": {"holdout": holdout}, "dataset": numbers | changed}

    assert report.is_current(run()) and report.is_current(run(transitions=9, holdout=0.1))
    assert not report.is_current(run(env="c")) and not report.is_current(run("c", 0.1))
    for changed in ({"transitions": 11}, {"episodes": 3}, {"return_mean": 3.16}):
        assert not report.is_current(run(**changed))


def test_a_result_on_other_data_is_refused(tmp_path, monkeypatch, capsys):
    source = ROOT / "results" / "scores" / "bc" / "hopper-medium" / "seed0.json"
    result = json.loads(source.read_text())
    result["dataset"]["episodes"] += 1
    path = tmp_path / "scores" / "bc" / "hopper-medium" / "seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    monkeypatch.setattr(report, "HERE", tmp_path)
    with pytest.raises(SystemExit) as stop:
        report.committed()
    assert stop.value.code == 2
    assert "another hopper-medium than the card tells of" in capsys.readouterr().err


def test_the_settings_that_a_run_changed():
    """Beside its length, seed and the like; what TUNED has for a dataset is no change."""
    defaults = {
        "env": "hopper-medium",
        "seed": 3,
        "steps": 7,
        "num_critics": 50,
        "diversity_weight": 1.0,
        "gamma": 0.99,
    }
    assert (
        report.other_settings({"algorithm": "edac", "env": "hopper-medium", "args": defaults}) == ""
    )
    changed = defaults | {"num_critics": 10, "gamma": 0.9}
    assert (
        report.other_settings({"algorithm": "edac-sac-n", "env": "hopper-medium", "args": changed})
        == "num_critics 10, gamma 0.9"
    )


def test_core_hours_of_what_has_not_run(monkeypatch):
    """A run counts when it has the grid's length; the others take their length over the median
    speed of all runs of their name."""
    files = {"bc": "bc.py --steps 7200", "cql": "cql.py --steps 3600"}
    parts = {"1": (["a"], files, "0-2"), "4": (["b", "c"], {"cql": files["cql"]}, "0")}
    parts |= {part: ([], {}, "0") for part in "2356"}
    monkeypatch.setattr(report, "PARTS", parts)

    def run(steps, speed):
        return {"steps": steps, "updates_per_second": speed}

    results = {
        "a": {"bc": [run(9000, 1.0), run(7199, 3.0), run(60, 2.0)], "cql": [run(60, 4.0)]},
        "c": {"cql": [run(3600, 4.0)]},
    }
    rows = [line.split(" | ") for line in report.missing_table(results)[2:]]
    assert [row[1:] for row in rows] == [
        ["2", "2.0", "0.0", "0.0 |"],  # two seeds of 7200 / 2 seconds
        ["4", "0.8", "0.2", "0.0 |"],  # three of 3600 / 4 seconds, and one on b
        ["| 3", "0", "0 |"],
    ]


def run_grid(*options):
    command = [sys.executable, str(ROOT / "results" / "grid.py"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_grid_lists_a_command_for_each_seed():
    listed = run_grid("--list", "--part", "1", "--only", "bc", "--seeds", "3-4", "--steps", "70")
    assert listed.returncode == 0
    assert listed.stdout.splitlines() == [
        "python results/grid.py --run bc algorithms/bc.py --steps 70 --eval-every 10000 "
        f"--env hopper-medium-replay --seed {seed} --threads 1 --out runs"
        for seed in (3, 4)
    ]


@pytest.mark.parametrize("options", [("--env", "hoper-medium"), ("--seeds", "a"), ("--only", "x")])
def test_the_grid_refuses_what_fits_no_run(options):
    refused = run_grid("--list", *options)
    assert refused.returncode == 2 and not refused.stdout and "error: " in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--run"], "--env is missing"),
        (["--run", "bc", "algorithms/bc.py", "--env"], "--env is missing"),
        (["--jobs", "0"], "at least one run at a time"),
    ],
)
def test_a_line_of_the_grid_that_is_not_whole_runs_nothing(options, message):
    refused = run_grid(*options)
    assert refused.returncode == 2 and message in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("own", [["--q-weight", "100"], ["--final-episodes", "2"]])
def test_the_grid_takes_no_result_of_other_settings(tmp_path, monkeypatch, own):
    """What someone ran by hand in the same folder is no result of the grid."""
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    monkeypatch.setattr(grid, "data_now", lambda result: result["dataset"])
    command = "algorithms/td3_bc.py --env hopper-medium --seed 0 --out runs --steps 30".split()
    folder = tmp_path / "runs" / "td3_bc" / "hopper-medium" / "seed0"
    folder.mkdir(parents=True)
    args = asdict(tyro.cli(td3_bc.Args, args=[*command[1:], *own]))
    result = {"steps": 30, "env": args["env"], "args": args, "dataset": {}}
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="is of another run"):
        grid.run("td3_bc", command, history=False)
    assert not (tmp_path / "results").exists()
    assert grid.run("td3_bc", command + own, history=False) == 0


def test_the_grid_takes_no_result_of_other_data(tmp_path, monkeypatch):
    """The dataset was built anew, or the file was changed, after the end of the run."""
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    columns = {
        "observations": np.zeros((20, 2), np.float32),
        "actions": np.linspace(-1, 1, 20, dtype=np.float32)[:, None],
        "rewards": np.arange(20.0),
        "terminals": np.arange(20) % 5 == 4,
    }
    file = tmp_path / "own.npz"
    np.savez(file, **columns)
    options = ["--seed", "0", "--out", "runs", "--steps", "3", "--eval-env", "none"]
    monkeypatch.chdir(tmp_path)
    bc.train(tyro.cli(bc.Args, args=["--env", str(file), *options]))
    (tmp_path / "runs" / "bc" / "own").rename(tmp_path / "runs" / "bc" / "d")
    command = ["algorithms/bc.py", "--env", "d", *options]
    assert grid.run("bc", command, history=False) == 0
    np.savez(file, **columns | {"rewards": columns["rewards"] + 1})
    with pytest.raises(SystemExit, match="has learned from other data"):
        grid.run("bc", command, history=False)


@pytest.mark.parametrize("content", ["", "[1]", "{}", "7"])
def test_a_damaged_result_is_named(tmp_path, monkeypatch, capsys, content):
    file = tmp_path / "scores" / "bc" / "d" / "seed0.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    monkeypatch.setattr(report, "HERE", tmp_path)
    with pytest.raises(SystemExit) as stop:
        report.committed()
    assert stop.value.code == 2 and str(file) in capsys.readouterr().err


def test_ctrl_c_waits_for_the_run(tmp_path, monkeypatch):
    """The signal reaches the run, too, which saves and leaves; its exit code is the grid's."""
    class Child:
        returncode = 0

        def __init__(self, *_, **__):
            pass

        def poll(self):
            raise KeyboardInterrupt

        def wait(self):
            self.returncode = 2

    monkeypatch.setattr(grid, "ROOT", tmp_path)
    monkeypatch.setattr(grid.subprocess, "Popen", Child)
    monkeypatch.setattr(grid.signal, "signal", lambda *_: None)
    command = "algorithms/bc.py --env d --seed 0 --out runs --steps 30".split()
    assert grid.run("bc", command, history=False) == 2 and not (tmp_path / "results").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_grid_ends_its_runs_and_starts_no_other(number):
    """Ctrl-C reaches the whole group of processes, kill the grid alone."""
    sleep = "import signal, time; signal.signal(2, signal.SIG_DFL); print('run', flush=True)\n"
    sleep += "time.sleep(60)"
    runs = f"[[sys.executable, '-c', {sleep!r}]] * 3"
    program = "import grid, signal, sys\n"  # a job in the background inherits an ignored SIGINT
    program += "signal.signal(2, signal.default_int_handler)\n"
    program += f"sys.exit(grid.run_all({runs}, 1))"
    stopped = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT / "results",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert stopped.stdout.readline() == "run\n"
    os.killpg(stopped.pid, number) if number == signal.SIGINT else stopped.send_signal(number)
    out, error = stopped.communicate(timeout=30)
    assert stopped.returncode == 2 and out == "", "no other run was started"
    assert error == "error: stopped; the same command resumes\n"


@pytest.mark.parametrize("content", ["", "[1]", "{}"])
def test_the_grid_names_a_damaged_result(tmp_path, monkeypatch, content):
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    folder = tmp_path / "runs" / "bc" / "d" / "seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)
    command = "algorithms/bc.py --env d --seed 0 --out runs --steps 30".split()
    with pytest.raises(SystemExit, match="is damaged"):
        grid.run("bc", command, history=False)


@pytest.mark.parametrize("name, longer", [("td3_bc", ["--resume"]), ("iql", [])])
def test_the_grid_runs_what_has_too_few_updates(tmp_path, monkeypatch, name, longer):
    """A result of fewer updates than asked for is no finished run: the run goes on where it was.
    IQL's learning rate has ended, so that it begins anew."""
    asked = []

    class Child:
        returncode = 0

        def __init__(self, command, **_):
            steps = command[command.index("--steps") + 1]
            asked.append(command[1 + command.index(str(steps)):])
            (folder / "result.json").write_text(json.dumps({"steps": int(steps), "dataset": {}}))

        def poll(self):
            return 0

    monkeypatch.setattr(grid, "ROOT", tmp_path)
    monkeypatch.setattr(grid.subprocess, "Popen", Child)
    monkeypatch.setattr(grid.signal, "signal", lambda *_: None)
    monkeypatch.setattr(grid, "data_now", lambda result: result["dataset"])
    folder = tmp_path / "runs" / name / "d" / "seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    for steps in ("100", "100", "300"):
        command = f"algorithms/{name}.py --env d --seed 0 --out runs --steps {steps}".split()
        assert grid.run(name, command, history=False) == 0
    assert asked == [["--resume"], longer], "the second has nothing to do"
    committed = tmp_path / "results" / "scores" / name / "d" / "seed0.json"
    assert json.loads(committed.read_text())["steps"] == 300
