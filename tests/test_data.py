"""Datasets: what a row means, that every source says the same, and one clear line for every bad
one."""
import os
import shutil
import signal
import subprocess
import sys
import time

import common

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import build, tiny_data
from minari.data_collector import EpisodeBuffer

COLLECT = [sys.executable, str(ROOT / "results" / "behavior" / "collect.py")]


class World(gym.Env):
    """Lends its spaces; nothing is played in it."""
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)


def episodes(
    ends=("terminated", "truncated", "both", "unfinished"), lengths=(3, 2, 4, 2)
) -> list[dict]:
    """Episodes of a world where next_obs = obs + action: a row that is off by one shows. Each
    begins somewhere else."""
    rng, result = np.random.default_rng(0), []
    for number, (end, length) in enumerate(zip(ends, lengths)):
        action = rng.uniform(-1, 1, (length, 3)).astype(np.float32)
        obs = (100 * number + np.concatenate([np.zeros((1, 3)), np.cumsum(action, axis=0)])).astype(
            np.float32
        )
        terminated, truncated = np.zeros(length, bool), np.zeros(length, bool)
        terminated[-1], truncated[-1] = end in ("terminated", "both"), end in ("truncated", "both")
        result.append(
            dict(
                obs=obs,
                action=action,
                reward=rng.normal(size=length).astype(np.float32),
                terminated=terminated,
                truncated=truncated,
            )
        )
    return result


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty Minari root, and the world of `episodes` among the suite's bodies."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    if "World-v0" not in gym.registry:
        gym.register("World-v0", "test_data:World")
    monkeypatch.setitem(common.SUITE, "world", ("World-v0", 0.0, 10.0))
    return tmp_path


def save_minari(name: str, parts: list[dict], env="World-v0") -> None:
    buffers = [
        EpisodeBuffer(
            observations=e["obs"],
            actions=e["action"],
            rewards=e["reward"],
            terminations=e["terminated"],
            truncations=e["truncated"],
            infos={},
        )
        for e in parts
    ]
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(
            name, buffers, env=gym.make(env), ref_min_score=0.0, ref_max_score=10.0
        )


def save_d4rl(path, parts: list[dict], complete: bool = True, **replace) -> str:
    columns = (
        dict(
            observations=np.concatenate([e["obs"][:-1] for e in parts]),
            next_observations=np.concatenate([e["obs"][1:] for e in parts]),
            actions=np.concatenate([e["action"] for e in parts]),
            rewards=np.concatenate([e["reward"] for e in parts]),
            terminals=np.concatenate([e["terminated"] for e in parts]),
            timeouts=np.concatenate([e["truncated"] for e in parts]),
        )
        | replace
    )
    if not complete:
        del columns["next_observations"]
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = values
    return str(path)


def test_minari_rows_are_aligned_and_tell_termination_from_truncation(root):
    save_minari("test/world-v0", episodes())
    data = common.load_dataset("test/world-v0", "cpu")
    torch.testing.assert_close(data.next_obs, data.obs + data.action, rtol=0, atol=5e-5)
    assert data.terminated.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    assert data.truncated.tolist() == [False] * 4 + [True] + [False] * 3 + [True] + [False] * 2
    starts, stops = data.episodes()
    assert (starts.tolist(), stops.tolist()) == ([0, 3, 5, 9], [3, 5, 9, 11])
    expected = [e["reward"].sum() for e in episodes()]
    np.testing.assert_allclose(data.returns(), expected, rtol=1e-5)


def test_d4rl_file_and_minari_set_and_its_cache_give_the_same_tensors(root):
    save_minari("test/world-v0", episodes())
    path = save_d4rl(root / "world-medium-v2.hdf5", episodes())
    first, cached, file = (
        common.load_dataset(name, "cpu") for name in ("test/world-v0", "test/world-v0", path)
    )
    assert (root / "minari" / "test" / "world-v0" / "columns.npz").exists()
    for other in (cached, file):
        assert all(torch.equal(getattr(first, key), getattr(other, key)) for key in common.COLUMNS)
        assert first.score_range == other.score_range and common.env_id(
            first.env_spec
        ) == common.env_id(other.env_spec)


def test_d4rl_file_without_next_observations_loses_the_rows_whose_next_state_is_unknown(root):
    """The card's file: 3, 2 and 2 rows that end by termination, time limit, and not at all: 5 of 7
    rows can be used."""
    path = save_d4rl(
        root / "world.hdf5", episodes(("terminated", "truncated", "unfinished"), (3, 2, 2)), False
    )
    data = common.load_dataset(path, "cpu")
    assert data.size == len(data.obs) == 5 and data.terminated.tolist() == [0, 0, 1, 0, 0]
    living = data.terminated == 0
    torch.testing.assert_close(
        data.next_obs[living], (data.obs + data.action)[living], rtol=0, atol=5e-5
    )
    assert torch.equal(data.next_obs[2], data.obs[2]), "not another episode's first state"
    assert data.episodes()[1].tolist() == [3, 4, 5] and data.truncated.tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]


def test_scores_are_d4rls():
    data = tiny_data()
    data.score_range = common.SUITE["hopper"][1:]
    assert data.score([1422.06]) == pytest.approx(44.32, abs=0.005)
    assert (data.score([-20.272305]), data.score(3234.3)) == (0, 100)
    data.score_range = (np.nan, np.nan)
    assert data.score([3.0]) is None


def test_actions_are_scaled_to_one_and_sampling_is_uniform(root):
    parts = episodes(("truncated",) * 5, (200,) * 5)
    for part in parts:
        part["action"] = 2 * part["action"][:, :1]
    save_minari("test/pendulum-v0", parts, "Pendulum-v1")
    data = common.load_dataset("test/pendulum-v0", "cpu")
    action = torch.as_tensor(np.concatenate([part["action"] for part in parts]))
    torch.testing.assert_close(data.action * 2, action)
    torch.manual_seed(0)
    data.obs[:, 0] = torch.arange(1000)
    counts = torch.bincount(data.sample(400_000).obs[:, 0].long(), minlength=1000).double()
    # 400 ± √400 each, the first row and the last included
    assert counts.min() > 0 and abs(counts.std() - 20) < 2


def test_evaluate_in_lockstep_equals_one_episode_at_a_time():
    """Row i belongs to episode i to the end, also after others ended: the policy below depends on
    its row's history."""
    policy = lambda obs: torch.stack([obs[:, 1].cos(), obs[:, 4].sin(), obs[:, 8].cos()], dim=1)
    together = common.evaluate(policy, "Hopper-v5", 5, seed=3)
    alone = [common.evaluate(policy, "Hopper-v5", 1, seed=3 + i)[0] for i in range(5)]
    assert len(set(together)) == 5
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_many_episodes_are_played_in_groups(monkeypatch):
    """Each has its own seed and number, whatever the size of a group."""
    policy = lambda obs: torch.stack([obs[:, 1].cos(), obs[:, 4].sin(), obs[:, 8].cos()], dim=1)
    record = lambda i, *_: seen.append(i)
    seen = []
    together = common.evaluate(policy, "Hopper-v5", 5, seed=3, record=record)
    steps = sorted(seen)
    monkeypatch.setattr(common, "MAX_ENVS", 2)
    seen.clear()
    np.testing.assert_allclose(
        common.evaluate(policy, "Hopper-v5", 5, seed=3, record=record), together, rtol=1e-6
    )
    assert sorted(seen) == steps and set(steps) == set(range(5))


def test_a_policy_with_a_memory_is_told_what_happens():
    """start before the first observation, record after each step, in each group."""
    class Memory:
        def __init__(self):
            self.log = []

        def start(self, num):
            self.log.append(("start", num))

        def __call__(self, obs):
            self.log.append(("act", len(obs)))
            return torch.zeros(len(obs), 1)

        def record(self, i, reward):
            self.log.append(("record", i))

    act = Memory()
    two_steps = gym.make("Pendulum-v1", max_episode_steps=2).spec.to_json()
    common.evaluate(act, two_steps, 2)
    step = [("act", 2), ("record", 0), ("record", 1)]
    assert act.log == [("start", 2), *step, *step]


def test_batches_are_the_rows_that_were_drawn():
    """And a file may index a column of its own with them."""
    data = tiny_data(12)
    index = data.draw_rows(500)
    assert index.min() == 0 and index.max() == 11
    batch = data.rows(index)
    for name, column in batch._asdict().items():
        assert torch.equal(column, getattr(data, name)[index])


def test_what_is_kept_is_whole_episodes():
    data = tiny_data(12)
    reward = data.reward.clone()
    data.keep(np.r_[4:8, 8:12])
    assert (
        data.size == 8
        and torch.equal(data.reward, reward[4:])
        and data.episodes()[0].tolist() == [0, 4]
    )


def test_the_fingerprint_sees_every_column_and_is_quick():
    """A million rows of hopper's shape in less than a second, on a core of its own."""
    data = tiny_data(12)
    prints = [data.describe()["fingerprint"]]
    for name in common.COLUMNS:
        column = getattr(data, name)
        column[5] = ~column[5] if column.dtype == torch.bool else 1 - column[5]
        prints.append(data.describe()["fingerprint"])
    assert len(set(prints)) == 7 and data.describe()["fingerprint"] == prints[-1]
    n = 1_000_000
    zeros = {
        "obs": torch.zeros(n, 11),
        "action": torch.zeros(n, 3),
        "reward": torch.zeros(n),
        "next_obs": torch.zeros(n, 11),
        "terminated": torch.zeros(n),
        "truncated": torch.zeros(n, dtype=torch.bool),
    }
    data = common.Dataset("zeros", zeros, gym.spaces.Box(-1, 1, (3,)))
    began = time.process_time()
    data.describe()
    assert time.process_time() - began < 1


def bad(capsys, call) -> str:
    """What a wrong input says: one line on stderr, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ")
    return error[-1]


def test_every_bad_dataset_gets_one_line(root, capsys, monkeypatch):
    load = lambda name, **options: bad(capsys, lambda: common.load_dataset(name, "cpu", **options))
    assert "hopper-medium" in load("hoper-medium")
    assert "there is no file" in load(str(root / "hopper-medium-v2.hdf5"))
    whole = save_d4rl(root / "world.hdf5", episodes())
    (root / "world-cut.hdf5").write_bytes(open(whole, "rb").read()[:3000])
    assert "can't read" in load(str(root / "world-cut.hdf5"))
    assert "rewards" in load(_without(whole, root / "world-keys.hdf5", "rewards"))
    assert "differ in length" in load(
        save_d4rl(root / "world-short.hdf5", episodes(), rewards=np.zeros(3, np.float32))
    )
    assert "one number per row" in load(
        save_d4rl(root / "world-wide.hdf5", episodes(), rewards=np.zeros((11, 2), np.float32))
    )
    rewards = np.zeros(11, np.float32)
    rewards[7] = np.nan
    assert "[7]" in load(save_d4rl(root / "world-nan.hdf5", episodes(), rewards=rewards))
    shutil.copy(whole, root / "hopper-not.hdf5")
    assert "observations of shape (3,)" in load(str(root / "hopper-not.hdf5"))
    nothing = {
        key: np.zeros((0, 3), np.float32)
        for key in ("observations", "next_observations", "actions")
    }
    nothing |= {key: np.zeros(0, np.float32) for key in ("rewards", "terminals", "timeouts")}
    assert "empty" in load(save_d4rl(root / "world-empty.hdf5", episodes(), True, **nothing))
    lone = episodes(("truncated",), (1,))
    assert "next observation is known" in load(save_d4rl(root / "world-lone.hdf5", lone, False))
    assert "continuous actions" in load(whole, discrete=True)
    cart = [dict(obs=np.zeros((3, 4), np.float32), action=np.array([0, 1]), reward=np.ones(2),
                 terminated=np.array([False, True]), truncated=np.zeros(2, bool))]
    save_minari("test/cart-v0", cart, "CartPole-v1")
    assert "discrete actions" in load("test/cart-v0")
    assert (
        common.load_dataset("test/cart-v0", "cpu", discrete=True).sample(4).action.dtype
        == torch.int64
    )
    monkeypatch.setattr(
        minari,
        "download_dataset",
        lambda name, **_: (_ for _ in ()).throw(ConnectionError("no network")),
    )
    assert "no network" in load("mujoco/hopper/expert-v0")
    monkeypatch.setattr(common, "COLLECT", root / "gone.py")
    assert "not built" in load("hopper-expert")
    columns = root / "minari" / "test" / "cart-v0" / "columns.npz"
    columns.write_bytes(b"damaged")  # read anew from the dataset itself
    assert common.load_dataset("test/cart-v0", "cpu", discrete=True).size == 2
    (root / "minari" / "test" / "cart-v0" / "data" / "main_data.hdf5").write_bytes(b"damaged")
    columns.unlink()
    assert "can't read" in load("test/cart-v0", discrete=True)
    if not torch.cuda.is_available():
        assert "--device cuda" in bad(capsys, lambda: common.load_dataset(whole, "cuda"))


def test_actions_outside_the_bounds_are_clipped_with_a_notice(root, capsys):
    wild = np.full((11, 3), 1.5)
    data = common.load_dataset(save_d4rl(root / "world-wild.hdf5", episodes(), actions=wild), "cpu")
    assert "11 of 11 recorded actions" in capsys.readouterr().err and data.action.max() == 1


def test_two_datasets_that_are_joined_stay_two(root):
    """medium-expert: the last episode of the first does not go on in the second."""
    save_minari("test/one-v0", episodes(("unfinished",), (3,)))
    save_minari("test/two-v0", episodes(("truncated",), (2,)))
    data = common.join([common.read_minari("test/one-v0"), common.read_minari("test/two-v0")])
    assert data.columns["truncated"].tolist() == [False, False, True, False, True]


def _without(path: str, copy, key: str) -> str:
    with h5py.File(path) as source, h5py.File(copy, "w") as target:
        for name in set(source) - {key}:
            target[name] = source[name][:]
    return str(copy)


DIES_BEFORE_THE_END = """
import os, signal, sys
sys.path[:0] = ["results/behavior"]
import collect
# when it comes to publish, all is written and nothing has its name yet
collect.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
collect.build("pendulum", "random", 4000)
"""


def test_building_is_atomic_and_repeatable(tmp_path, monkeypatch):
    """Two builds at once both succeed; one killed before the end leaves nothing under the name; the
    same seed gives the same data, however many processes collect it."""
    here, there = (os.environ | {"MINARI_DATASETS_PATH": str(tmp_path / letter)} for letter in "ab")
    both = [
        subprocess.Popen([*COLLECT, "pendulum-random", "4000"], env=here, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(500) for process in both] == [0, 0]
    assert not list((tmp_path / "a").glob(".building-*"))
    killed = subprocess.run(
        [sys.executable, "-c", DIES_BEFORE_THE_END], cwd=ROOT, env=there, stderr=subprocess.DEVNULL
    )
    assert killed.returncode == -signal.SIGKILL
    # it had come that far
    assert list((tmp_path / "b").glob(".building-*/local/pendulum/random-v0/columns.npz"))
    assert not (tmp_path / "b" / "local").exists()

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "c"))
    build(monkeypatch, "pendulum", "random", 4000)
    files = [
        dict(np.load(tmp_path / letter / "local" / "pendulum" / "random-v0" / "columns.npz"))
        for letter in "ac"
    ]
    assert len(files[0]["obs"]) == 4000
    assert all(np.array_equal(files[0][key], files[1][key]) for key in common.COLUMNS)


def test_medium_is_reached_when_it_lasts(monkeypatch):
    """A few lucky episodes do not count; the buffer of medium-replay then has the steps until
    there, each with its snapshot."""
    monkeypatch.syspath_prepend(str(ROOT / "results" / "behavior"))
    import choose

    returns = [0.0] * 20 + [5000.0] * 5 + [0.0] * 40 + [1500.0] * 40
    episodes = [(100 * (i + 1), value) for i, value in enumerate(returns)]
    reached = choose.step_of_medium(episodes, 1000.0)
    assert reached == 100 * (65 + 14)  # 14 of the last 20 earn 1500: their mean is 1050
    with pytest.raises(SystemExit):
        choose.step_of_medium(episodes[:60], 1000.0)
    steps = np.arange(1000, 8001, 1000)
    assert choose.replay_buffer(steps, 5700, 2500) == [
        [None, 2500],
        [2, 500],
        [3, 1000],
        [4, 1000],
    ]
