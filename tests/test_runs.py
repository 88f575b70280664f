"""Whole runs: they resume bit for bit, save policies that act, and refuse bad settings.

Most run in this process. Processes are started where a process is the point: one that is killed,
one that gets Ctrl-C, one in a folder of its own. """
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import common

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import QUICK, SMALL, build, command, run, run_of, tiny_data

# it has no policy
ALGORITHMS = [
    path.stem for path in sorted((ROOT / "algorithms").glob("*.py")) if path.stem != "fqe"
]
DISCRETE = ("cql_discrete", "dqn", "rem")
NARROW = {  # constants of a file that would be too slow
    "decision_transformer": dict(CONTEXT=5, WIDTH=16, LAYERS=1),
    "morel": dict(DYNAMICS_HIDDEN=(32, 32)),
    **dict.fromkeys(("mopo", "combo"), dict(DYNAMICS_HIDDEN=(20, 20, 20, 20))),
}
ENV = "pendulum-random"
FEW = ["--env", ENV, *QUICK[2:]]


@pytest.fixture(scope="session")
def small_data(minari_root):
    """4,000 transitions each, for all runs of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for body in ("pendulum", "cartpole"):
            build(patch, body, "random", 4000)


class Interrupted(Exception):
    """Raised in the middle of a run."""


def interrupt(monkeypatch, call, after: int) -> None:
    """A run that ends after this update, and saves nothing then."""
    step = common.Run.step

    def interrupted_step(run, number, *rest):
        step(run, number, *rest)
        if number == after:
            run.close()
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(common.Run, "step", interrupted_step)
        call()


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def weights(folder) -> dict:
    return torch.load(folder / "policy.pt", weights_only=True)["actor"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_resumes_bit_for_bit_and_its_policy_acts_on_raw_observations(
    name, small_data, tmp_path, monkeypatch
):
    """Uninterrupted, and interrupted between two checkpoints and resumed: the same numbers
    everywhere. Then policy.pt alone rebuilds the policy that was evaluated: same final returns, in
    the environment's own units. And policy.pt2 acts."""
    module, env = importlib.import_module(name), "cartpole-random" if name in DISCRETE else ENV
    for constant, value in NARROW.get(name, {}).items():
        monkeypatch.setattr(module, constant, value)
    # the pendulum's episodes of 200 steps would take most of this test's time
    if "Short-v0" not in gym.registry:
        gym.register("Short-v0", gym.spec("Pendulum-v1").entry_point, max_episode_steps=20)
    args = module.Args(
        env=env,
        steps=50,
        eval_every=20,
        eval_episodes=1,
        final_episodes=2,
        device="cpu",
        eval_env="auto" if name in DISCRETE else "Short-v0",
        out=str(tmp_path / "a"),
        **SMALL.get(name, {}),
    )
    module.train(args)
    with monkeypatch.context() as patch:
        patch.setattr(common, "export_policy", lambda *_: None)  # once is enough
        interrupt(
            monkeypatch, lambda: module.train(replace(args, out=str(tmp_path / "b"))), after=30
        )
        module.train(replace(args, out=str(tmp_path / "b"), resume=True))

    first, second = run_of(name, tmp_path / "a"), run_of(name, tmp_path / "b")
    assert same(weights(first), weights(second))
    result, again = (json.loads((path / "result.json").read_text()) for path in (first, second))
    assert all(result[key] == again[key] for key in ("final_returns", "curve", "dataset", "score"))
    assert [point["step"] for point in result["curve"]] == [20, 40, 50]

    saved = torch.load(first / "policy.pt", weights_only=True)
    act = common.load_policy(first)
    torch.manual_seed(1000)
    returns = common.evaluate(act, saved["env_spec"], 2, 10**6 * 1000)
    np.testing.assert_allclose(returns, result["final_returns"], rtol=1e-5)
    assert (first / "policy.pt2").exists() == (not hasattr(act, "start"))
    if not hasattr(act, "start"):
        raw = torch.randn(3, 4 if name in DISCRETE else 3)
        own = torch.export.load(first / "policy.pt2").module()(raw)
        assert own.shape == act(raw).shape
        assert set(own.tolist()) <= {0, 1} if name in DISCRETE else own.abs().max() <= 2
    for key in (
        "algorithm env seed steps args dataset env_id versions hardware curve final_returns score "
        "seconds updates_per_second"
    ).split():
        assert key in result
    for key in ("name", "fingerprint", "transitions", "episodes", "return_mean"):
        assert result["dataset"][key]
    assert list(first.glob("events*"))


def test_a_killed_run_resumes_to_the_same_policy_bit_for_bit(small_data, tmp_path):
    """kill -9 of a process after the first checkpoint; then --resume. An uninterrupted run ends
    with the same numbers."""
    import td3_bc

    args = td3_bc.Args(
        env=ENV,
        steps=240,
        eval_every=80,
        eval_episodes=2,
        final_episodes=2,
        device="cpu",
        out=str(tmp_path / "whole"),
    )
    td3_bc.train(args)
    (tmp_path / "killed").mkdir()
    killed = subprocess.Popen(
        command("td3_bc", tmp_path / "killed", "--steps", "240", "--eval-every", "80", quick=FEW),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    while not list((tmp_path / "killed").glob("*/*/*/checkpoint.pt")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (run_of("td3_bc", tmp_path / "killed") / "result.json").exists()
    td3_bc.train(replace(args, out=str(tmp_path / "killed"), resume=True))
    results = [
        json.loads((run_of("td3_bc", tmp_path / name) / "result.json").read_text())
        for name in ("whole", "killed")
    ]
    assert (
        results[0]["score"] == results[1]["score"] is not None
        and results[0]["curve"] == results[1]["curve"]
    )
    assert same(
        weights(run_of("td3_bc", tmp_path / "whole")),
        weights(run_of("td3_bc", tmp_path / "killed")),
    )


def test_ctrl_c_leaves_a_checkpoint(small_data, tmp_path):
    process = subprocess.Popen(
        command("bc", tmp_path, "--steps", "1000000", "--eval-every", "500000", quick=FEW),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("bc/*/seed0/events*")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the same command with --resume continues" in error and "Traceback" not in error
    saved = torch.load(run_of("bc", tmp_path) / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < 1_000_000


def test_a_second_signal_ends_the_run_at_once(tmp_path, capsys):
    """Where an update takes long, the first one waits for its end; a second Ctrl-C does not.
    SIGTERM may come to every process of a job and once more from the parent, so a second one
    changes nothing."""
    record = begin(tmp_path, steps=100)
    record.step(1, {})
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
        assert record.stop
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGINT)
    assert "stopped; nothing was saved yet" in capsys.readouterr().err
    record.close()


def test_a_closed_terminal_saves_and_ends_the_run(tmp_path):
    """SIGHUP is as SIGTERM, but for a run that shall outlive its terminal, as nohup starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    record = begin(tmp_path, steps=100)
    record.step(1, {})
    signal.raise_signal(signal.SIGHUP)
    assert record.stop
    record.close()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    record = begin(tmp_path, steps=100)
    record.step(1, {})
    signal.raise_signal(signal.SIGHUP)
    assert not record.stop
    record.close()
    signal.signal(signal.SIGHUP, before)


def begin(tmp_path, **settings) -> common.Run:
    """A run of bc.py without bc.py."""
    args = importlib.import_module("bc").Args(out=str(tmp_path), device="cpu", **settings)
    record = common.Run(args, tiny_data())
    layer = torch.nn.Linear(1, 1)
    assert record.begin({"layer": layer}, layer) == 0
    return record


def test_a_signal_in_an_evaluation_is_no_failed_evaluation(tmp_path, capsys, monkeypatch):
    """The only message is that the run was stopped."""
    record = begin(tmp_path, steps=1, eval_every=1)
    record.actor.act = None
    monkeypatch.setattr(common, "evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        record.step(1, {})
    error = capsys.readouterr().err
    assert "stopped; the same command with --resume" in error and "failed" not in error
    record.close()


def test_a_signal_ends_a_resumed_run_at_once_where_only_the_score_is_missing(tmp_path, capsys):
    record = begin(tmp_path, steps=1, eval_every=1, eval_episodes=0)
    record.step(1, {})
    record.close()
    again = common.Run(replace(record.args, resume=True), record.data)
    again.begin(record.learned, record.actor)
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    assert "stopped" in capsys.readouterr().err
    again.close()


def test_a_checkpoint_without_an_evaluation(tmp_path):
    """run.save, as after a fit that comes before the first update: it resumes from there, and
    nothing is due."""
    record = begin(tmp_path, steps=100)
    record.learned["layer"].weight.data.fill_(7.0)
    record.save(0)
    record.close()
    args = replace(record.args, resume=True)
    again = common.Run(args, record.data)
    layer = torch.nn.Linear(1, 1)
    assert (
        again.begin({"layer": layer}, layer) == 0 and layer.weight.item() == 7 and again.curve == []
    )
    again.close()


def test_a_file_that_was_edited_resumes_with_a_note(tmp_path, capsys):
    record = begin(tmp_path, steps=4)
    record.save(0)
    record.close()
    again = common.Run(replace(record.args, resume=True), record.data)
    again.code = "of an edited file"
    again.begin(record.learned, record.actor)
    again.close()
    assert "note: bc.py has changed since" in capsys.readouterr().err


def test_a_metric_stays_until_a_step_reports_it_again(tmp_path):
    """With --policy-delay 3 not every logged step updates the actor; a resumed run knows the last
    value, too."""
    record = begin(tmp_path, steps=4, eval_every=2, eval_episodes=0)
    record.step(1, {"critic_loss": torch.tensor(1.0), "q_policy": torch.tensor(5.0)})
    record.step(2, {"critic_loss": torch.tensor(2.0)})
    record.close()
    again = common.Run(replace(record.args, resume=True), record.data)
    again.begin(record.learned, record.actor)
    again.step(3, {"critic_loss": torch.tensor(3.0)})
    again.step(4, {"critic_loss": torch.tensor(4.0)})
    again.close()
    assert [point["metrics"] for point in again.curve] == [
        {"critic_loss": 2.0, "q_policy": 5.0},
        {"critic_loss": 4.0, "q_policy": 5.0},
    ]


def test_evaluations_do_not_change_what_is_learned(small_data, tmp_path):
    """Neither its random numbers nor its weights: with one evaluation and with five the policy is
    the same."""
    bc = importlib.import_module("bc")
    folders = []
    for eval_every in (2, 10):
        bc.train(
            bc.Args(
                env=ENV,
                steps=10,
                eval_every=eval_every,
                eval_episodes=1,
                final_episodes=1,
                device="cpu",
                out=str(tmp_path / str(eval_every)),
            )
        )
        folders.append(run_of("bc", tmp_path / str(eval_every)))
    assert same(*map(weights, folders))


def test_the_actor_uses_the_bounds_and_the_statistics_of_the_data():
    """Pendulum's torque reaches ±2, and a standardised observation is not a raw one."""
    import td3_bc
    actor = td3_bc.Actor(3, 1)
    actor.obs_mean, actor.obs_std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0])
    actor.action_half = torch.tensor([2.0])
    raw = torch.randn(5, 3)
    torch.testing.assert_close(actor.act(raw), 2 * actor((raw - actor.obs_mean) / actor.obs_std))


def test_every_bad_setting_gets_one_line(small_data, tmp_path, capsys):
    def error(name, **settings):
        module = importlib.import_module(name)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.train(module.Args(**(dict(env=ENV, out=str(tmp_path), device="cpu") | settings)))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    assert "near are hopper-medium" in error("td3_bc", env="hoper-medium")
    assert "--steps must be at least 1" in error("bc", steps=0)
    assert "there is no" in error("bc", steps=10, resume=True)
    assert "--actor-lr must be at least 0, not inf" in error("bc", actor_lr=math.inf)
    assert "--policy-delay must be at least 1" in error("rebrac", policy_delay=0)
    assert "--num-samples must be at least 1" in error("crr", num_samples=0)
    assert "--top-fraction" in error("bc", top_fraction=0.0)
    assert "continuous actions" in error("dqn")
    assert "discrete actions" in error("td3_bc", env="cartpole-random")
    bc = importlib.import_module("bc")
    bc.train(
        bc.Args(
            env=ENV,
            out=str(tmp_path),
            device="cpu",
            steps=20,
            eval_every=20,
            eval_episodes=1,
            final_episodes=1,
        )
    )
    assert "actor_lr was 0.0003" in error("bc", steps=20, eval_every=20, actor_lr=1e-3, resume=True)
    assert "more than --steps 10" in error("bc", steps=10, resume=True)
    (tmp_path / "file").write_text("")
    assert "could not write" in error("bc", steps=10, out=str(tmp_path / "file"))
    if not torch.cuda.is_available():
        assert "cuda" in error("bc", device="cuda")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    small_data, tmp_path, capsys
):
    """A learning rate of 1e30 blows up after the first step: named, with the step."""
    bc = importlib.import_module("bc")
    with pytest.raises(SystemExit) as stop:
        bc.train(
            bc.Args(
                env=ENV, out=str(tmp_path), device="cpu", steps=300, eval_every=300, actor_lr=1e30
            )
        )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        stop.value.code == 2
        and "cloning_error is" in last
        and "by step 100; --resume would end the same way" in last
    )
    assert not (run_of("bc", tmp_path) / "checkpoint.pt").exists()


def test_the_progress_bar_leaves_out_what_comes_before_the_first_update(tmp_path):
    """A model may be fitted for a quarter of an hour first; counted in, it would make hours out of
    minutes to go."""
    record = begin(tmp_path, steps=100)
    time.sleep(1.0)
    for step in range(1, 4):
        record.step(step, {})
    assert record.bar.n == 3 and record.bar.format_dict["elapsed"] < 0.5
    record.close()


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, capsys):
    """A real limit on the size of files, so that the write itself fails."""
    import resource
    path = tmp_path / "checkpoint.pt"
    common.write_atomically(path, lambda part: torch.save({"step": 1}, part))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            common.write_atomically(path, lambda part: torch.save(torch.zeros(1_000_000), part))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert stop.value.code == 2 and "could not write" in capsys.readouterr().err
    assert torch.load(path, weights_only=True) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_signal_in_the_midst_of_a_write_leaves_nothing_half(tmp_path):
    """The old file stays, and no part lies beside it."""
    path = tmp_path / "policy.pt"
    path.write_text("old")

    def write(part):
        part.write_text("ne")
        raise SystemExit(2)

    with pytest.raises(SystemExit):
        common.write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(SystemExit) as stop:
        common.write_atomically(path / "below" / "a file", write)
    assert stop.value.code == 2


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    record = begin(tmp_path, steps=100)
    record.save(0)
    record.close()
    part = record.folder / ".12345.checkpoint.pt"
    part.write_text("half")
    again = common.Run(replace(record.args, resume=True), record.data)
    again.begin(record.learned, record.actor)
    again.close()
    assert not part.exists() and again.checkpoint.exists()


def test_ctrl_c_while_the_data_are_read(tmp_path, capsys, monkeypatch):
    def read(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "read_arrays", read)
    with pytest.raises(SystemExit):
        common.load_dataset("x.npz")
    assert (
        capsys.readouterr().err.strip()
        == "error: stopped while x.npz was loaded; no run was started"
    )


def test_ctrl_c_before_a_run_begins():
    """As while torch is loaded: one line, and the exit code of a program that Ctrl-C ended."""
    program = "import common\nraise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "error: stopped\n" and done.returncode in (130, -signal.SIGINT)


def test_a_full_disk_is_one_line(small_data, tmp_path):
    """TensorBoard writes in a thread of its own, whose traceback says nothing more."""
    program = f"""
import bc, errno
from tensorboard.summary.writer.record_writer import RecordWriter
def write(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")
RecordWriter.write = write
bc.train(bc.Args(env={ENV!r}, steps=200, eval_episodes=0, out={str(tmp_path)!r}))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "algorithms")])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path})
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == 2


def test_a_copied_file_runs_with_nothing_but_common_beside_it(small_data, tmp_path):
    """In an empty folder, on a dataset that is built already; one that is not built is refused in
    one line."""
    for source in (ROOT / "common.py", ROOT / "algorithms" / "td3_bc.py"):
        shutil.copy(source, tmp_path)
    copy = [sys.executable, "td3_bc.py", *FEW, "--steps", "20", "--eval-every", "20"]
    done = subprocess.run(copy, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout
    copy[copy.index(ENV)] = "pendulum-expert"
    done = subprocess.run(copy, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "not built" in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        "common.py",
        "runs",
        "td3_bc.py",
    }


def test_every_file_explains_its_settings(tmp_path):
    """--help of a file with values for single datasets, as a user asks for it."""
    assert "--env" in run("cql", tmp_path, "--help", quick=[]).stdout
