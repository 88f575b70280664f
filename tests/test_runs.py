"""Whole runs, as a user starts them: they resume bit for bit, save policies that act, and refuse bad settings."""
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import QUICK, command, folder, run, tiny_data

import common

ALGORITHMS = [path.stem for path in sorted((ROOT / "algorithms").glob("*.py")) if path.stem != "fqe"]  # it has no policy
ENV = {"dqn": "cartpole-medium", "rem": "cartpole-medium"}  # the others run on pendulum-medium
MODEL = dict(batch_size=64, dynamics_epochs=1, rollout_starts=100, rollout_every=50)
SMALL = {  # where a default takes more than a test's time, or its 200 updates would not get to every part
    "awac": dict(batch_size=64), "awr": dict(value_steps=30, actor_steps=40), "bcq": dict(batch_size=16, num_samples=2),
    "bear": dict(batch_size=16, num_samples=2), "brac": dict(behavior_steps=50, warm_start_steps=50),
    "cql": dict(batch_size=32, num_samples=2), "edac": dict(batch_size=64, num_critics=3), "plas": dict(vae_steps=30),
    "rebrac": dict(batch_size=64), "decision_transformer": dict(batch_size=8, warmup_steps=10),
    "uwac": dict(batch_size=16, num_samples=2, passes=2, warm_up_steps=120),
    "mopo": MODEL, "morel": MODEL, "combo": MODEL | dict(num_samples=2), "mabcq": dict(agents=1, batch_size=16, num_samples=2),
}
NARROW = {  # constants of a file that would be too slow
    "decision_transformer": dict(CONTEXT=5, WIDTH=16, LAYERS=1), "morel": dict(DYNAMICS_HIDDEN=(32, 32)),
    **dict.fromkeys(("mopo", "combo"), dict(DYNAMICS_HIDDEN=(20, 20, 20, 20))),
}


def policy(name: str, out, env: str = "pendulum-medium") -> dict:
    return torch.load(folder(name, out, env) / "policy.pt", weights_only=True)


class Interrupted(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_goes_on_bit_for_bit_and_its_policy_acts_on_raw_observations(name, minari_root, tmp_path, monkeypatch):
    """Uninterrupted, and interrupted between two checkpoints and resumed: the same numbers everywhere. Then policy.pt alone
    rebuilds the policy that was evaluated: same final returns, in the environment's own units."""
    module, env, step = importlib.import_module(name), ENV.get(name, "pendulum-medium"), common.Run.step
    for constant, value in NARROW.get(name, {}).items():
        monkeypatch.setattr(module, constant, value)
    args = module.Args(env=env, steps=200, eval_every=80, eval_episodes=1, final_episodes=2, device="cpu",
                       out=str(tmp_path / "a"), **SMALL.get(name, {}))
    module.train(args)

    def interrupted_step(run, number, *rest):
        step(run, number, *rest)
        if number == 90:
            raise Interrupted

    monkeypatch.setattr(common.Run, "step", interrupted_step)
    with pytest.raises(Interrupted):
        module.train(replace(args, out=str(tmp_path / "b")))
    monkeypatch.setattr(common.Run, "step", step)
    module.train(replace(args, out=str(tmp_path / "b"), resume=True))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the interrupted run could not

    first, second = (next((tmp_path / letter).glob(f"*/{env}/seed0")) for letter in "ab")
    weights, resumed = (torch.load(path / "policy.pt", weights_only=True)["actor"] for path in (first, second))
    assert weights.keys() == resumed.keys() and all(torch.equal(weights[key], resumed[key]) for key in weights)
    result, again = (json.loads((path / "result.json").read_text()) for path in (first, second))
    assert all(result[key] == again[key] for key in ("final_returns", "curve", "dataset", "score"))
    assert [point["step"] for point in result["curve"]][-3:] == [80, 160, 200]  # a stage before may have an entry at 0

    saved = torch.load(first / "policy.pt", weights_only=True)
    actor = getattr(module, "Actor", getattr(module, "QNetwork", None))(saved["obs_dim"], saved["action_dim"])
    actor.load_state_dict(saved["actor"])
    torch.manual_seed(0)
    act = actor.act
    returns = common.evaluate(act, saved["env_id"], 2, 10**6 * 1000, record=getattr(act, "record", None))
    np.testing.assert_allclose(returns, result["final_returns"], rtol=1e-5)
    for key in ("algorithm env seed steps args dataset env_id versions hardware curve final_returns score seconds "
                "updates_per_second").split():
        assert key in result
    for key in ("name", "fingerprint", "transitions", "episodes", "return_mean"):
        assert result["dataset"][key]
    assert list(first.glob("events*"))


def test_a_killed_run_resumes_to_the_same_policy_bit_for_bit(minari_root, tmp_path):
    """kill -9 after the first checkpoint; then --resume. An uninterrupted run must end with the same numbers everywhere."""
    plan = ["--steps", "240", "--eval-every", "80"]
    assert "score" in run("td3_bc", tmp_path, *plan).stdout
    expected = policy("td3_bc", tmp_path)["actor"]
    shutil.move(folder("td3_bc", tmp_path), tmp_path / "uninterrupted")
    killed = subprocess.Popen(command("td3_bc", tmp_path, *plan), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder("td3_bc", tmp_path) / "checkpoint.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (folder("td3_bc", tmp_path) / "result.json").exists()
    run("td3_bc", tmp_path, *plan, "--resume")
    resumed = policy("td3_bc", tmp_path)["actor"]
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_ctrl_c_leaves_a_checkpoint(minari_root, tmp_path):
    process = subprocess.Popen(command("bc", tmp_path, "--steps", "1000000", "--eval-every", "500000"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while not list(folder("bc", tmp_path).glob("events*")):
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "--resume goes on from there" in error and "Traceback" not in error
    saved = torch.load(folder("bc", tmp_path) / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < 1_000_000


def test_the_actor_uses_the_bounds_and_the_statistics_of_the_data():
    """Pendulum's torque reaches ±2, and a standardised observation is not a raw one."""
    import td3_bc
    actor = td3_bc.Actor(3, 1)
    actor.obs_mean, actor.obs_std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0])
    actor.action_half = torch.tensor([2.0])
    raw = torch.randn(5, 3)
    torch.testing.assert_close(actor.act(raw), 2 * actor((raw - actor.obs_mean) / actor.obs_std))


def test_online_dqn_trains_and_snapshots(minari_root, tmp_path):
    plan = ["--online", "--random-steps", "100", "--snapshot-every", "100", "--eval-every", "150", "--steps", "300"]
    run("dqn", tmp_path, *plan, quick=["--env", "cartpole", "--eval-episodes", "1", "--final-episodes", "1", "--device", "cpu"])
    where = folder("dqn-online", tmp_path, "cartpole")
    checkpoint = torch.load(where / "checkpoint.pt", weights_only=True)
    assert int(checkpoint["size"]) == 300 and set(checkpoint["packed"][:, 4].tolist()) == {0, 1}
    assert 0.9 < torch.load(where / "snapshots" / "0000300.pt", weights_only=True)["epsilon"] < 1


def test_online_sac_trains_snapshots_and_resumes(minari_root, tmp_path):
    plan = ["--online", "--random-steps", "100", "--snapshot-every", "100", "--eval-every", "150"]
    quick = ["--env", "pendulum", "--eval-episodes", "1", "--final-episodes", "1", "--device", "cpu"]
    run("sac", tmp_path, *plan, "--steps", "150", quick=quick)
    where = folder("sac-online", tmp_path, "pendulum")
    checkpoint = torch.load(where / "checkpoint.pt", weights_only=True)
    assert int(checkpoint["size"]) == 150 and (where / "snapshots" / "0000100.pt").exists()
    torque = checkpoint["packed"][:, 3]
    assert torque.abs().max() <= 1 and torque[:100].std() > 0.4  # in [-1, 1], and uniform at first
    run("sac", tmp_path, *plan, "--steps", "300", "--resume", quick=quick)  # more steps than before may be asked for
    assert (where / "snapshots" / "0000300.pt").exists()


def test_every_bad_setting_gets_one_line(minari_root, tmp_path):
    run("td3_bc", tmp_path, "--steps", "20", "--eval-every", "20")  # builds the dataset, where no test did so before

    def error(name, *arguments, quick=QUICK):
        lines = run(name, tmp_path, *arguments, code=2, quick=quick).stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    assert "near are hopper-medium" in error("td3_bc", quick=["--env", "hoper-medium"])
    assert "--steps must be at least 1" in error("bc", "--steps", "0")
    assert "there is no" in error("bc", "--steps", "10", "--resume")
    assert "--policy-delay must be at least 1" in error("rebrac", "--policy-delay", "0")
    assert "--num-samples must be at least 1" in error("crr", "--num-samples", "0")
    assert "--top-fraction" in error("bc", "--top-fraction", "0")
    assert "a body" in error("sac", "--online", quick=["--env", "hopper-medium"])
    assert "discrete actions" in error("sac", "--online", quick=["--env", "cartpole"])
    assert "continuous actions" in error("dqn", "--online", quick=["--env", "pendulum"])
    assert "continuous actions" in error("dqn")
    run("bc", tmp_path, "--steps", "20", "--eval-every", "20")
    assert "actor_lr was 0.0003" in error("bc", "--steps", "20", "--eval-every", "20", "--actor-lr", "1e-3", "--resume")
    assert "more --steps" in error("bc", "--steps", "10", "--eval-every", "20", "--resume")
    (tmp_path / "file").write_text("")
    assert "could not write" in error("bc", "--steps", "10", "--out", str(tmp_path / "file"))
    if not torch.cuda.is_available():
        assert "cuda" in error("bc", quick=["--env", "pendulum-medium", "--device", "cuda"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(minari_root, tmp_path):
    """A learning rate of 1e30 blows up after the first step: named, with the step."""
    stopped = run("bc", tmp_path, "--steps", "300", "--eval-every", "300", "--actor-lr", "1e30", code=2)
    last = stopped.stderr.strip().splitlines()[-1]
    assert "cloning_error is" in last and "by step 100" in last
    assert not (folder("bc", tmp_path) / "checkpoint.pt").exists()


def test_the_progress_bar_leaves_out_what_comes_before_the_first_update(tmp_path, capsys):
    """A model may be fitted for a quarter of an hour first; counted in, it would make hours out of minutes to go."""
    args = importlib.import_module("bc").Args(out=str(tmp_path), steps=100)
    run = common.Run(args, tiny_data())
    assert run.resume() == 0
    time.sleep(1.0)
    for step in range(1, 4):
        run.step(step, {}, None)
    signal.signal(signal.SIGINT, run.handler)
    assert run.bar.n == 3 and run.bar.format_dict["elapsed"] < 0.5
    run.bar.close(), run.writer.close()


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, capsys, monkeypatch):
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


def test_a_copied_file_runs_with_nothing_but_common_beside_it(minari_root, tmp_path):
    """In an empty folder, on a dataset that is built already; one that is not built is refused in one line."""
    for source in (ROOT / "common.py", ROOT / "algorithms" / "td3_bc.py"):
        shutil.copy(source, tmp_path)
    copy = [sys.executable, "td3_bc.py", *QUICK, "--steps", "20", "--eval-every", "20"]
    done = subprocess.run(copy, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    copy[copy.index("pendulum-medium")] = "pendulum-expert"
    done = subprocess.run(copy, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "not built" in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"common.py", "runs", "td3_bc.py"}
