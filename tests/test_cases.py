"""Small inputs as people have them, after public questions and bug reports: a test for each, with
its row number.

Not tested here, and why: 7   Adroit door: needs gymnasium-robotics, which is not among the
  requirements; its parts are rows 6, 20 and 48. 81  going on online from an offline policy: not
  built; the behaviour policies' trainer starts anew. 84  data larger than memory: not built, and a
  test would need gigabytes; DESIGN.md asks for D4RL's sizes. Of row 75, filming has its own tests
  (tests/test_play.py); here a saved policy repeats the run's own return. """
import copy
import ctypes
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings

import common

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT
from gymnasium import spaces
from helpers import SMALL, SilentRun, run_of, silent_train
from minari.data_collector import EpisodeBuffer

OBS = {
    "flat": spaces.Box(-1, 1, (3,), np.float32),
    "grid": spaces.Box(-1, 1, (5, 5), np.float32),
    "dict": spaces.Dict(
        {
            "goal": spaces.Box(-1, 1, (2,), np.float64),
            "place": spaces.Box(-1, 1, (2, 2), np.float32),
            "pixels": spaces.Box(0, 255, (40, 40), np.uint8),
            "room": spaces.Discrete(3),
        }
    ),
    "tuple": spaces.Tuple((spaces.Discrete(2, start=1), spaces.Box(-1, 1, (2,), np.float32))),
    "rooms": spaces.Discrete(4),
    "counts": spaces.MultiDiscrete([3, 4]),
    "bytes": spaces.Box(0, 255, (6,), np.uint8),
    "image": spaces.Box(0, 255, (40, 40, 3), np.uint8),
    "ordered": spaces.Dict(
        [
            ("z", spaces.Box(-1, 1, (2,), np.float32)),
            ("a", spaces.Tuple((spaces.Text(5), spaces.MultiBinary(2)))),
        ]
    ),
}
ACTIONS = {
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "lopsided": spaces.Box(np.float32([0, -3]), np.float32([10, 1])),
    "matrix": spaces.Box(-1, 1, (2, 2), np.float64),
    "whole": spaces.Box(0, 10, (2,), np.int64),
    "free": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "vast": spaces.Box(-1e6, 1e6, (2,), np.float32),
    "point": spaces.Box(np.float32([0, 1]), np.float32([0, 3])),
    "three": spaces.Discrete(3),
    "from -1": spaces.Discrete(3, start=-1),
    "from 1": spaces.Discrete(2, start=1),
    "many": spaces.MultiDiscrete([3, 2]),
    "switches": spaces.MultiBinary(2),
}


class World(gym.Env):
    """Random observations; the reward is the gain. It asserts that an action belongs to its
    space."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self, obs="flat", action="box", gain=1.0, ends=0, fails=False, loose=False, render_mode=None
    ):
        self.observation_space, self.action_space = copy.deepcopy(OBS[obs]), ACTIONS[action]
        self.gain = gain
        self.ends = ends
        self.fails = fails
        self.loose = loose
        self.render_mode = render_mode

    def observe(self):
        obs = self.observation_space.sample()
        return obs.tolist() if self.loose else obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observe(), {"pressure": 1.0}

    def step(self, action):
        assert self.loose or self.action_space.contains(action), action
        self.steps += 1
        if self.fails and self.steps == 5:
            raise ConnectionError("the simulator is gone")
        reward, over = self.gain, self.steps == self.ends
        if self.loose:  # as some environments do: a list, an array, numpy's bool
            reward, over = np.array([reward]), np.bool_(over)
        return self.observe(), reward, over, False, {"pressure": 1.0}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


class Monitor(gym.Wrapper):
    """A wrapper as those of other libraries: it does not say with which arguments it was made."""


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch, request):
    """An empty Minari root, an empty folder, and no export of policies, unless a test is about
    it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    if "exports" not in request.fixturenames:
        monkeypatch.setattr(common, "export_policy", lambda *_: None)


@pytest.fixture
def exports():
    """For a test that needs policy.pt2."""


@pytest.fixture
def register():
    """World under an id of its own, forgotten after the test."""
    def register(name, max_episode_steps=6, **kwargs):
        gym.register(name, "test_cases:World", kwargs=kwargs, max_episode_steps=max_episode_steps)
        made.append(name)
        return gym.make(name)

    made = []
    yield register
    for name in made:
        gym.registry.pop(name, None)


def record(
    name: str,
    env: gym.Env,
    episodes: int = 3,
    steps: int = 400,
    act=None,
    infos: bool = False,
    **options,
):
    """A Minari set of random play, as the collector of Minari stores it (which needs jax); cut off
    after `steps`."""
    env.action_space.seed(0)
    buffers = []
    for episode in range(episodes):
        obs, info = [env.reset(seed=episode)[0]], {"pressure": [1.0]}
        rest = []
        while len(rest) < steps and not (rest and (rest[-1][2] or rest[-1][3])):
            action = act() if act else env.action_space.sample()
            new, *step, _ = env.step(action)
            obs.append(new)
            rest.append((action, *step))
            info["pressure"].append(1.0)
        action, reward, terminated, truncated = (np.array(column) for column in zip(*rest))
        buffers.append(
            EpisodeBuffer(
                id=episode,
                observations=stack(env.observation_space, obs),
                actions=action,
                rewards=reward,
                terminations=terminated,
                truncations=truncated,
                infos={"pressure": np.array(info["pressure"])} if infos else {},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari would like an author, a permalink, ...
        return minari.create_dataset_from_buffers(
            name, buffers, env=env, jpeg_encoding=False, **options
        )


def stack(space, values):
    """Observations as Minari keeps them: the parts of a Dict or a Tuple apart."""
    if isinstance(space, spaces.Text):
        return values
    if isinstance(space, spaces.Dict):
        return {
            key: stack(part, [value[key] for value in values]) for key, part in space.spaces.items()
        }
    if isinstance(space, spaces.Tuple):
        return tuple(
            stack(part, [value[i] for value in values]) for i, part in enumerate(space.spaces)
        )
    return np.array(values)


def edit_metadata(name: str, change) -> None:
    """What other programs and versions left in a set's metadata."""
    path = minari.storage.get_dataset_path(name) / "data" / "metadata.json"
    meta = json.loads(path.read_text())
    spec = json.loads(meta["env_spec"])
    change(meta, spec)
    meta["env_spec"] = json.dumps(spec)
    path.write_text(json.dumps(meta))


def columns(n=40, obs=3, action=1, every=10, seed=0) -> dict[str, np.ndarray]:
    """D4RL's columns of a made-up process: next_obs = obs + 0.1 everywhere; `every` rows are an
    episode."""
    rng = np.random.default_rng(seed)
    start = np.repeat(rng.normal(size=(-(-n // every), obs)), every, axis=0)[:n]
    place = (start + 0.1 * (np.arange(n) % every)[:, None]).astype(np.float32)
    return {
        "observations": place,
        "next_observations": place + np.float32(0.1),
        "actions": rng.uniform(-1, 1, (n, action)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(n) % every == every - 1,
    }


def save(path, arrays: dict) -> str:
    """As .npz or HDF5, by the name."""
    if str(path).lower().endswith(".npz"):
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    return str(path)


def without(arrays: dict, *names: str) -> dict:
    return {key: array for key, array in arrays.items() if key not in names}


def load(name, **options) -> common.Dataset:
    return common.load_dataset(str(name), "cpu", **options)


def said(capsys) -> list[str]:
    """The lines on stderr, without progress bars."""
    return [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line
    ]


def notes(capsys) -> list[str]:
    """The lines that a run wrote by itself; nothing else may be on stderr."""
    lines = said(capsys)
    assert all(line.startswith("note: ") for line in lines), lines
    return lines


def refused(capsys, call) -> str:
    """What a wrong input says: one line, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    lines = [line for line in said(capsys) if not line.startswith("note: ")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert "delete" not in lines[0]  # never advice to delete what can't be made again
    return lines[0]


def train(name: str, env, **settings) -> dict:
    """A run of a few updates in this process; its result."""
    module = importlib.import_module(name)
    settings = (
        dict(steps=2, eval_every=2, eval_episodes=1, final_episodes=1, device="cpu", out="runs")
        | settings
    )
    module.train(module.Args(env=str(env), **(SMALL.get(name, {}) | settings)))
    return json.loads((run_of(name, seed=settings.get("seed", 0)) / "result.json").read_text())


# ---- environments


def test_a_log_without_an_environment(capsys):
    """Row 1: own experiment as a Minari set without env."""
    buffer = EpisodeBuffer(
        observations=np.zeros((6, 3), np.float32),
        actions=np.zeros((5, 2), np.float32),
        rewards=np.ones(5),
        terminations=np.zeros(5, bool),
        truncations=np.arange(5) == 4,
        infos={},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "robot/logged-v0",
            [buffer],
            env=None,
            observation_space=OBS["flat"],
            action_space=ACTIONS["box"],
        )
    data = load("robot/logged-v0")
    assert data.env_spec is None and data.action_half.tolist() == [2, 2]
    assert "no environment is known" in notes(capsys)[0]
    result = train("td3_bc", "robot/logged-v0")
    assert (result["score"], result["final_returns"], result["env_id"]) == (None, [], None)
    assert (run_of("td3_bc") / "policy.pt").exists()


def test_a_share_of_the_episodes_is_held_out(capsys):
    """Row 3: both sides are whole episodes, share no row, and are the same at every start."""
    path = save("log.npz", columns(100))
    rest, kept = load(path, holdout=0.3), load(path)
    common.split_episodes(kept, 0.3, held_out=True)
    assert (len(rest.returns()), len(kept.returns())) == (7, 3)
    rows = {tuple(row) for row in rest.obs.tolist()}, {tuple(row) for row in kept.obs.tolist()}
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 100
    assert torch.equal(load(path, holdout=0.3).obs, rest.obs)
    assert "one side empty" in refused(capsys, lambda: load(path, holdout=0.01))
    for share in (-1.0, 1.0, float("nan"), float("inf")):
        assert "one side empty" in refused(capsys, lambda share=share: load(path, holdout=share))


def test_what_a_file_does_not_say_gets_a_note(capsys):
    """Rows that are lost, ends that are not marked, what may be a reset's observation, numbers for
    choices, an action that never changes: each would load silently wrong."""

    def noted(**changed) -> str:
        arrays = {key: array for key, array in (columns() | changed).items() if array is not None}
        load(save("log.npz", arrays), eval_env="none")
        return " ".join(notes(capsys))

    words = ("left out", "only its", "reset", "never changes", "are zero", "next row's", "masks")
    assert not any(word in noted() for word in words)
    assert "4 of 40 rows of log.npz are left out" in noted(next_observations=None)
    one_end = np.arange(40) == 39
    assert "only its 1 terminals end an episode" in noted(
        next_observations=None, timeouts=None, terminals=one_end
    )
    after = np.roll(columns()["observations"], -1, axis=0)
    assert "if a reset lies between" in noted(next_observations=after)
    mixed = {key: array[np.arange(40).reshape(4, 10).T.ravel()] for key, array in columns().items()}
    assert "in 36 rows of log.npz next_observations are not the next row's" in noted(**mixed)
    unused = {key: np.concatenate([array, 0 * array]) for key, array in columns().items()}
    assert "the last 40 rows of log.npz are zero in every column" in noted(**unused)
    assert "98% of the rows of log.npz are terminals" in noted(terminals=np.arange(40) < 39)
    choices = np.eye(2, dtype=np.int64)[np.arange(40) % 2]
    assert "whole numbers as actions (2 of int64)" in noted(actions=choices)
    assert "whole numbers as actions (1 of float32)" in noted(actions=np.float32(choices[:, 0]))
    gauge = np.append(columns()["observations"], np.full((40, 1), 1013.0), axis=1)
    assert "large numbers in the columns [3] of its observations" in noted(
        observations=gauge, next_observations=None
    )
    clock = np.arange(1, 41) % 10 == 0
    ends = dict(timeouts=None, next_observations=None)
    assert "all of one length" in noted(terminals=clock, **ends)
    assert "all of one length" not in noted(terminals=clock | (np.arange(40) == 4), **ends)
    filled = columns()["next_observations"].copy()
    filled[columns()["timeouts"].astype(bool)] = 0
    assert "at every timeout of log.npz next_observations are zero" in noted(
        next_observations=filled
    )
    still = np.stack([columns()["actions"][:, 0], np.full(40, 0.5, np.float32)], axis=1)
    assert "never changes its actions [1]" in noted(actions=still)


def test_an_environment_of_ones_own(register, capsys):
    """Row 4: the recorded specification is enough, though this process never registered it; else it
    names the module."""
    record("my/thing-v0", register("Thing-v0", gain=3.0))
    del gym.registry["Thing-v0"]
    data = load("my/thing-v0")
    assert common.evaluate(lambda obs: torch.zeros(len(obs), 2), data.env_spec, 2).tolist() == [
        18,
        18,
    ]
    assert not notes(capsys)
    edit_metadata("my/thing-v0", lambda meta, spec: spec.update(entry_point="plain_env:Thing"))
    assert load("my/thing-v0").env_spec is None
    assert "No module named 'plain_env'" in notes(capsys)[0]


def test_a_package_that_is_not_installed(register, capsys):
    """Row 6: named in one line, also from the copy of the columns; training goes on."""
    record("D4RL/door-v0", register("Door-v0"))
    edit_metadata(
        "D4RL/door-v0",
        lambda meta, spec: spec.update(entry_point="gymnasium_robotics.envs:DoorEnv"),
    )
    for _ in range(2):
        assert load("D4RL/door-v0").env_spec is None
        (line,) = notes(capsys)
        assert "'gymnasium_robotics'" in line


def test_a_wrapper_that_cannot_be_rebuilt(register, capsys):
    """Row 8: left out with a notice; what only films is left out without."""
    record("my/monitor-v0", register("Monitored-v0"))
    wrappers = [
        {
            "name": "Monitor",
            "entry_point": "stable_baselines3.common.monitor:Monitor",
            "kwargs": None,
        },
        {
            "name": "RecordVideo",
            "entry_point": "gymnasium.wrappers.rendering:RecordVideo",
            "kwargs": {"video_folder": "x"},
        },
    ]
    edit_metadata("my/monitor-v0", lambda meta, spec: spec.update(additional_wrappers=wrappers))
    data = load("my/monitor-v0")
    (line,) = notes(capsys)
    assert "Monitor" in line and common.evaluate(
        lambda obs: torch.zeros(len(obs), 2), data.env_spec, 1
    ) == [6]


def test_a_wrapper_that_counts(register, capsys):
    """NormalizeObservation and NormalizeReward begin without statistics: a line says so."""
    record(
        "my/normal-v0",
        gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(register("Normal-v0"))),
    )
    assert load("my/normal-v0").env_spec
    assert [line.split()[1] for line in notes(capsys)] == [
        "NormalizeObservation",
        "NormalizeReward",
    ]


def test_the_recorded_time_limit(register):
    """Row 9: evaluation lasts as long as the recording."""
    gym.register("Long-v0", "test_cases:World", max_episode_steps=5)
    record("my/long-v0", gym.make("Long-v0", max_episode_steps=12))
    del gym.registry["Long-v0"]
    data = load("my/long-v0")
    assert data.returns().tolist() == [12] * 3
    assert common.evaluate(lambda obs: torch.zeros(len(obs), 2), data.env_spec, 1) == [12]
    assert train("bc", "my/long-v0")["final_returns"] == [12]


def test_a_wrapper_that_changes_rewards(register):
    """Row 11: rewards are evaluated as they were recorded."""
    record("my/clipped-v0", gym.wrappers.ClipReward(register("Clipped-v0", gain=7.0), 0.0, 0.5))
    data = load("my/clipped-v0")
    assert data.returns().tolist() == [3] * 3
    assert common.evaluate(lambda obs: torch.zeros(len(obs), 2), data.env_spec, 1) == [3]


def test_an_evaluation_environment_of_its_own(register):
    """Row 14: it is the one to evaluate in."""
    env = register("Train-v0", gain=1.0)
    record("my/custom-eval-v0", env, eval_env=register("Eval-v0", gain=-1.0))
    data = load("my/custom-eval-v0")
    assert (
        common.env_id(data.env_spec) == "Eval-v0"
        and json.loads(data.env_spec)["kwargs"]["gain"] == -1
    )


def test_a_recorded_render_mode(register):
    """Row 16: a recording may have drawn; evaluation does not."""
    gym.register("Drawn-v0", "test_cases:World", max_episode_steps=6)
    record("my/drawn-v0", gym.make("Drawn-v0", render_mode="rgb_array"))
    del gym.registry["Drawn-v0"]
    env = common.make_env(load("my/drawn-v0").env_spec)
    assert env.render_mode is None


def test_a_set_of_an_older_minari(register):
    """Row 17: its specification has fields that Gymnasium no longer knows."""
    record("old/v041-v0", register("Old-v0"))
    def age(meta, spec):
        rest = dict(spec)
        spec.clear()
        spec.update(autoreset=False, apply_api_compatibility=False, **rest)

    edit_metadata("old/v041-v0", age)
    assert common.env_id(load("old/v041-v0").env_spec) == "Old-v0"


def test_an_environment_with_arguments(register):
    """Row 76: policy.pt holds all that make_env needs."""
    record("my/custom-kw-v0", register("Gain-v0", gain=2.0))
    result = train("bc", "my/custom-kw-v0")
    assert result["env_id"] == "Gain-v0" and result["final_returns"] == [12]
    env_spec = torch.load(run_of("bc") / "policy.pt", weights_only=True)["env_spec"]
    assert common.evaluate(common.load_policy(run_of("bc")), env_spec, 1) == [12]


def test_an_evaluation_that_never_ends(register, capsys):
    """Row 71: it ends after the longest episode of the data, and a line says so."""
    record("my/endless-v0", register("Endless-v0", max_episode_steps=None), episodes=2, steps=9)
    assert train("bc", "my/endless-v0", final_episodes=2)["final_returns"] == [9, 9]
    assert "has no time limit" in capsys.readouterr().err
    # for whoever plays it later
    env_spec = torch.load(run_of("bc") / "policy.pt", weights_only=True)["env_spec"]
    assert common.evaluate(lambda obs: torch.zeros(len(obs), 2), env_spec, 1) == [9]


def test_a_simulator_that_fails(register, capsys):
    """Row 74: the checkpoint is there already, and the run can go on without evaluation."""
    record("my/fails-v0", register("Fails-v0", fails=True), steps=4)
    line = refused(capsys, lambda: train("bc", "my/fails-v0"))
    assert (
        "the simulator is gone" in line
        and "Fails-v0" in line
        and "--eval-episodes 0 --final-episodes 0" in line
    )
    assert torch.load(run_of("bc") / "checkpoint.pt", weights_only=True)["step"] == 2
    again = train("bc", "my/fails-v0", resume=True, eval_episodes=0, final_episodes=0)
    assert again["final_returns"] == [] and [point["step"] for point in again["curve"]] == [2]
    assert again["score"] is None


@pytest.mark.parametrize(
    "trouble, line",
    [(dict(fails=True), "the simulator is gone"), (dict(gain=float("nan")), "the reward nan")],
)
def test_a_simulator_that_fails_with_data_from_a_file(register, capsys, trouble, line):
    """What the message advises works where the environment also says what an action is; a reward of
    NaN is no result."""
    register("Trouble-v0", **trouble)
    path = save("log.npz", columns(action=2))
    assert line in refused(capsys, lambda: train("td3_bc", path, eval_env="Trouble-v0"))
    assert (
        train(
            "td3_bc", path, eval_env="Trouble-v0", resume=True, eval_episodes=0, final_episodes=0
        )["final_returns"]
        == []
    )


def test_a_simulator_that_fails_while_policies_are_judged(register, capsys):
    import fqe
    register("Trouble-v0", fails=True)
    path = save("log.npz", columns(action=2))
    train("bc", path, eval_env="Trouble-v0", eval_episodes=0, final_episodes=0)
    args = fqe.Args(
        env=path,
        policies=(str(run_of("bc")),),
        steps=1,
        device="cpu",
        out="runs",
        eval_env="Trouble-v0",
    )
    for content in ("null", '{"final_returns": [null]}', '{"final_returns": 3}'):  # then it plays
        (run_of("bc") / "result.json").write_text(content)
        line = refused(capsys, lambda: fqe.train(args))
        assert "the simulator is gone" in line and "--eval-env none" in line


def test_another_environment_to_evaluate_in(register, capsys):
    """Rows 1 and 48: --eval-env names one, none means none; what does not fit or exist is
    refused."""
    path = save("myrobot.npz", columns(action=2))
    register("Mine-v0")
    assert common.env_id(load(path, eval_env="Mine-v0").env_spec) == "Mine-v0"
    assert "no finite action bounds" not in "".join(notes(capsys))  # they are the environment's
    assert load(path, eval_env="none").env_spec is None
    assert not any("nothing is evaluated" in line for line in notes(capsys))
    assert "Pendulum-v1 has" in refused(capsys, lambda: load(path, eval_env="Pendulum-v1"))
    assert "Nowhere" in refused(capsys, lambda: load(path, eval_env="Nowhere-v0"))


# ---- spaces


@pytest.mark.parametrize(
    "obs, size",
    [
        ("grid", 25),
        ("dict", 2 + 4 + 1600 + 3),
        ("tuple", 4),
        ("rooms", 4),
        ("counts", 7),
        ("bytes", 6),
        ("ordered", 9),
    ],
)
def test_observations_are_flattened_alike_in_loading_and_in_evaluation(register, obs, size):
    """Rows 20, 22 and 32: Dict, Tuple, matrices, counts; a Dict in the environment's order, which
    Minari forgets. The first observations of the data are seen again in evaluation."""
    record("my/spaces-v0", register("Spaces-v0", obs=obs), act=lambda: np.zeros(2, np.float32))
    data, seen = load("my/spaces-v0"), []
    assert data.obs.shape == (18, size) and data.obs.dtype == torch.float32
    common.evaluate(
        lambda obs: seen.append(obs.clone()) or torch.zeros(len(obs), 2), data.env_spec, 3
    )
    torch.testing.assert_close(torch.stack(seen).transpose(0, 1).reshape(18, size), data.obs)


@pytest.mark.parametrize("obs", ["grid", "dict"])
def test_a_run_with_such_observations(register, obs):
    """Rows 20 and 22: they train and play, with continuous and with discrete actions."""
    record("my/boxes-v0", register("Boxes-v0", obs=obs))
    record("my/numbers-v0", register("Numbers-v0", obs=obs, action="three"))
    assert train("td3_bc", "my/boxes-v0")["final_returns"] == [6]
    assert train("dqn", "my/numbers-v0")["final_returns"] == [6]


def test_an_environment_that_is_careless_about_types(register):
    """Row 32: observations as a list, rewards as an array, numpy's bools."""
    record("my/listobs-v0", register("List-v0"))
    edit_metadata("my/listobs-v0", lambda meta, spec: spec["kwargs"].update(loose=True, ends=4))
    assert train("bc", "my/listobs-v0")["final_returns"] == [4]


def test_images_are_refused_early_where_the_network_cannot_take_them(register, capsys):
    """DESIGN.md, "Spaces": named with the files that take them; in those they stay bytes."""
    record("my/image-v0", register("Image-v0", obs="image", action="three"), steps=2)
    assert "dqn.py and rem.py take images" in refused(
        capsys, lambda: load("my/image-v0", discrete=True)
    )
    data = load("my/image-v0", discrete=True, images=True)
    assert data.obs.shape == (6, 40, 40, 3) and data.obs.dtype == torch.uint8


@pytest.mark.parametrize("first", ["from -1", "from 1"])
def test_discrete_actions_that_do_not_begin_at_0(register, first):
    """Row 25: shifted in loading, and back in playing (the environment asserts it)."""
    record("my/start-v0", register("Start-v0", action=first))
    data = load("my/start-v0", discrete=True)
    assert data.action.min() >= 0 and data.first_action == ACTIONS[first].start
    assert train("dqn", "my/start-v0")["final_returns"] == [6]


@pytest.mark.parametrize("action, word", [("many", "MultiDiscrete"), ("switches", "MultiBinary")])
def test_actions_that_no_file_takes(register, capsys, action, word):
    """Row 26: one line that says what is possible."""
    record("my/multi-v0", register("Multi-v0", action=action))
    line = refused(capsys, lambda: load("my/multi-v0", discrete=None))
    assert f"{word} actions" in line and "one Discrete number" in line


def test_actions_without_bounds(register, capsys):
    """Row 29: the data's smallest and largest take their place."""
    record("my/unbounded-v0", register("Unbounded-v0", action="free"))
    data = load("my/unbounded-v0")
    assert "no finite action bounds" in notes(capsys)[0]
    assert data.action.min() == -1 and data.action.max() == 1
    assert train("td3_bc", "my/unbounded-v0")["final_returns"] == [6]


@pytest.mark.parametrize("action", ["lopsided", "matrix", "whole", "point"])
def test_odd_bounds(register, action):
    """Rows 31 and 32: lopsided ones, equal ones, whole numbers, matrices; the environment asserts
    that what is played fits."""
    record("my/asym-v0", register("Asym-v0", action=action))
    data = load("my/asym-v0")
    assert data.action.abs().max() <= 1 and data.action_dim == np.prod(ACTIONS[action].shape)
    assert train("td3_bc", "my/asym-v0")["final_returns"] == [6]


def test_the_other_kind_of_action_names_the_files_that_take_it(register, capsys):
    """Row 33."""
    record("my/three-v0", register("Three-v0", action="three"))
    line = refused(capsys, lambda: load("my/three-v0"))
    assert "discrete actions" in line
    named = re.findall(r"(\w+)\.py", line)
    assert len(named) >= 4 and all((ROOT / "algorithms" / f"{name}.py").exists() for name in named)
    line = refused(capsys, lambda: load(save("log.npz", columns()), discrete=True))
    assert "continuous actions" in line and "integer" in line


@pytest.mark.parametrize("shift, found", [(1, "found 1 to 2"), (-1, "found -1 to 0")])
def test_labels_that_do_not_fit(capsys, shift, found):
    """Row 34: named, not bent."""
    actions = np.arange(40) % 2 + shift
    path = save("cartpole.hdf5", columns(obs=4) | {"actions": actions})
    assert f"actions must be 0 to 1, {found}" in refused(capsys, lambda: load(path, discrete=True))


def test_one_hot_actions(capsys):
    """Row 36."""
    path = save("cartpole.hdf5", columns(obs=4) | {"actions": np.eye(2)[np.arange(40) % 2]})
    assert "continuous actions" in refused(capsys, lambda: load(path, discrete=True))
    assert "CartPole-v1 has" in refused(capsys, lambda: load(path))


def test_recorded_actions_beyond_the_bounds(capsys):
    """Row 37: clipped, and a line says how many."""
    actions = np.zeros((40, 1), np.float32)
    actions[:10], actions[10:12] = 5.13, -3
    data = load(save("pendulum-sb3.hdf5", columns() | {"actions": actions}))
    assert "12 of 40 recorded actions" in notes(capsys)[0]
    assert data.action[:13, 0].tolist() == [1] * 10 + [-1, -1, 0]


# ---- episode ends


def test_a_file_without_timeouts(capsys):
    """Row 40: cut at the time limit of the environment, and where next_observations break."""
    arrays = columns(1000, every=200)
    # not one of maze2d's timeouts is true
    for missing in ((), ("timeouts",), ("timeouts", "next_observations")):
        data = load(
            save("pendulum.hdf5", without(arrays | {"timeouts": np.zeros(1000, bool)}, *missing))
        )
        assert len(data.returns()) == 5 and "no timeouts" in notes(capsys)[0]
        index = data.episodes()[1] - 1
        # not the next episode's first state
        torch.testing.assert_close(data.next_obs[index], data.obs[index] + 0.1)
    # 10 episodes of a process without a limit
    data = load(save("unknown.npz", without(columns(100), "timeouts")))
    assert len(data.returns()) == 10
    data = load(save("unknown.npz", without(columns(100), "timeouts", "next_observations")))
    assert "counts as one episode" in capsys.readouterr().err and len(data.returns()) == 1


def test_number_types_and_further_columns():
    """Row 46."""
    arrays = columns() | {
        "infos/qpos": np.zeros((40, 2)),
        "infos/goal": np.zeros(40),
        "metadata/algorithm": np.zeros(1),
    }
    plain = load(save("pendulum.hdf5", columns()))
    data = load(save("pendulum.hdf5", arrays | {"terminals": arrays["terminals"].astype(np.uint8),
                                                "timeouts": arrays["timeouts"].astype(np.float64),
                                                "actions": arrays["actions"].astype(np.float16)}))
    assert torch.equal(data.truncated, plain.truncated) and torch.equal(data.obs, plain.obs)
    torch.testing.assert_close(data.action, plain.action, rtol=0, atol=1e-3)


def test_columns_of_shape_n_1():
    """Row 47: flattened, in linear memory (30,000 rows squared would be 900 MB)."""
    for arrays in (
        columns(),
        without(columns(), "next_observations"),
        without(columns(30_000), "next_observations", "timeouts"),
    ):
        flat = load(save("log.npz", arrays))
        tall = {
            key: arrays[key].reshape(-1, 1)
            for key in ("rewards", "terminals", "timeouts")
            if key in arrays
        }
        data = load(save("log.npz", arrays | tall))
        assert all(torch.equal(getattr(data, key), getattr(flat, key)) for key in common.COLUMNS)


def test_an_episode_with_one_observation_too_few(register, capsys):
    """Row 56: left out by name."""
    record("my/short-v0", register("Short-v0"), episodes=4)
    path = minari.storage.get_dataset_path("my/short-v0") / "data" / "main_data.hdf5"
    with h5py.File(path, "a") as file:
        obs = file["episode_2"]["observations"][:-1]
        del file["episode_2"]["observations"]
        file["episode_2"]["observations"] = obs
    data = load("my/short-v0")
    assert "episode 2 of my/short-v0 is left out" in notes(capsys)[0] and data.size == 18


def test_a_collection_that_was_stopped_in_mid_episode(register):
    """Row 57: with infos; its last episode counts."""
    env = register("Stopped-v0")
    record("my/stopped-v0", env, episodes=2, steps=6, infos=True)
    record("my/mid-v0", env, episodes=3, steps=4, infos=True)
    assert [len(load(name).returns()) for name in ("my/stopped-v0", "my/mid-v0")] == [2, 3]


def test_sets_that_were_combined_and_sets_that_grew(register):
    """Row 58: the copy of the columns is read anew; a combined set has no score."""
    gym.register("Parts-v0", "test_cases:World", max_episode_steps=5)
    one = record("my/one-v0", gym.make("Parts-v0"), ref_min_score=0.0, ref_max_score=1.0)
    two = record("my/two-v0", gym.make("Parts-v0", max_episode_steps=3))
    assert load("my/one-v0").size == 15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.combine_datasets([one, two], "my/both-v0")
        data = load("my/both-v0")
        assert data.size == 24 and data.score([1.0]) is None
        one.storage.update_episodes(
            [
                EpisodeBuffer(
                    id=3,
                    observations=np.zeros((3, 3), np.float32),
                    actions=np.zeros((2, 2), np.float32),
                    rewards=np.ones(2),
                    terminations=np.zeros(2, bool),
                    truncations=np.arange(2) == 1,
                    infos={},
                )
            ]
        )
    del gym.registry["Parts-v0"]
    assert load("my/one-v0").size == 17


# ---- files and names


def test_keys_that_a_file_lacks(capsys):
    """Row 44: d3rlpy's dump; the keys that were looked for, and those that are there."""
    path = save(
        "pendulum-d3rlpy2.hdf5", {"observations_0": np.zeros((4, 3)), "actions_0": np.zeros((4, 1))}
    )
    line = refused(capsys, lambda: load(path))
    assert (
        "looked for observations, actions, rewards, terminals" in line and "observations_0" in line
    )


@pytest.mark.parametrize(
    "name",
    ["maze2d-umaze-v1", "antmaze-umaze-v2", "door-human-v1", "myrobot", "antenna", "ant-medium-v2"],
)
def test_names_of_other_bodies(name, capsys):
    """Row 48: without their environment they train, and one line says that nothing is evaluated."""
    data = load(save(f"{name}.hdf5", columns(obs=5)))
    lines = notes(capsys)
    assert data.env_spec is None and "nothing is evaluated" in lines[-1]
    assert ("gymnasium_robotics" in lines[-1]) == name.startswith("door")
    assert (data.score([0.0]) is None) == (name in ("maze2d-umaze-v1", "myrobot", "antenna"))


@pytest.mark.parametrize("name", ["hopper-medium-v2", "Hopper-v5", "hoper-medium", "two words"])
def test_names_that_are_none(name, capsys):
    """Row 49: the nearest ones, without asking a network."""
    line = refused(capsys, lambda: load(name))
    assert line.startswith(f"error: unknown dataset '{name}'; near are ") and (
        name == "two words" or "hopper-" in line
    )


def test_data_from_a_table():
    """Row 51: a CSV's columns, of episodes with a final row each, through plain arrays."""
    table = "episode,place,speed,valve,reward\n" + "".join(
        f"{episode},{0.1 * step},{episode},{step % 2},{step}\n"
        for episode in range(4)
        for step in range(6)
    )
    rows = np.genfromtxt(table.splitlines(), delimiter=",", names=True)
    # the final state, with no action
    last = np.append(rows["episode"][1:] != rows["episode"][:-1], True)
    obs = np.stack([rows["place"], rows["speed"]], axis=1)
    save(
        "table.npz",
        {
            "observations": obs[~last],
            "next_observations": obs[1:][~last[:-1]],
            "actions": rows["valve"][~last].astype(int),
            "rewards": rows["reward"][~last],
            "terminals": np.zeros((~last).sum()),
            "timeouts": np.append(last[1:], True)[~last],
        },
    )
    data = load("table.npz", discrete=True)
    assert data.size == 20 and data.num_actions == 2 and data.returns().tolist() == [10] * 4
    assert silent_dqn_moves(data)


def silent_dqn_moves(data) -> bool:
    import dqn
    with pytest.MonkeyPatch.context() as patch:
        history = silent_train(patch, dqn, data, steps=2).history
    return not torch.equal(history[0]["q_net"], history[-1]["q_net"])


@pytest.mark.parametrize("path", ["my log.hdf5", "Übung.npz", "Pendulum-OK.HDF5", "x.h5", "x.NPZ"])
def test_paths_that_work(path):
    """Row 52."""
    assert load(save(path, columns())).size == 40


def test_paths_that_do_not(tmp_path, capsys):
    """Row 52: a folder, nothing, another kind of file, half a file, text."""
    (tmp_path / "x.hdf5").mkdir()
    assert "is a folder" in refused(capsys, lambda: load(tmp_path / "x.hdf5"))
    assert "there is no file" in refused(capsys, lambda: load("elsewhere/pendulum.hdf5"))
    for name in ("data/log.pkl", "log.csv", "runs/log"):
        (tmp_path / "runs" / "log").mkdir(parents=True, exist_ok=True)
        assert "a file must be .hdf5, .h5 or .npz" in refused(capsys, lambda name=name: load(name))
    whole = open(save("whole.hdf5", columns()), "rb").read()
    for name, content in (
        ("half.hdf5", whole[:3000]),
        ("empty.h5", b""),
        ("text.npz", b"some text"),
    ):
        (tmp_path / name).write_bytes(content)
        assert "can't read" in refused(capsys, lambda name=name: load(name))


def test_a_minari_id_needs_no_namespace(register):
    """Row 53."""
    record("pendulum-mine-v0", register("Mine-v1"))
    assert load("pendulum-mine-v0").size == 18


def test_a_remote_set_that_cannot_be_had(capsys, monkeypatch):
    """Row 55."""
    def download(name, force_download):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(minari, "download_dataset", download)
    line = refused(capsys, lambda: load("mujoco/hopper/expertt-v0"))
    assert (
        "could not be downloaded (ConnectionError: Name or service not known)" in line
        and "hopper-expert" in line
    )
    assert "can't read" in refused(capsys, lambda: load(300 * "a" + "-v0"))  # too long for a disk


def test_a_download_that_was_interrupted(register, capsys, monkeypatch, tmp_path):
    """Ctrl-C is one line, and the next start fetches all of it: Minari takes a folder as whole."""
    record("mine/whole-v0", register("Mine-v1"))
    folder = tmp_path / "minari" / "mine" / "part-v0"
    calls = []

    def download(name, force_download):
        calls.append(force_download)
        if len(calls) == 1:
            (folder / "data").mkdir(parents=True)
            raise KeyboardInterrupt
        shutil.copytree(folder.parent / "whole-v0", folder, dirs_exist_ok=True)

    monkeypatch.setattr(minari, "download_dataset", download)
    assert "stopped while mine/part-v0 was loaded" in refused(capsys, lambda: load("mine/part-v0"))
    assert load("mine/part-v0").size == 18
    assert load("mine/part-v0").size == 18
    assert calls == [False, True]


def test_actions_of_whole_numbers_keep_their_bounds():
    """Played, a number beyond them does not wrap around; infinite ones are seen as infinite."""
    space = spaces.Box(0, 255, (3,), np.uint8)
    assert common.decode_action(space, np.float32([-1, 127.6, 300])).tolist() == [0, 128, 255]
    space = spaces.Box(-np.inf, np.inf, (1,), np.int64)
    action, space = common.scale_actions("log", np.array([[-3], [0], [3]]), space)
    assert action.tolist() == [[-1], [0], [1]] and space.high.tolist() == [3]


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (1,)])
def test_episodes_of_length_1(lengths):
    """Row 59: and one single transition."""
    n = len(lengths)
    data = load(save("short.npz", columns(n, every=1)), eval_env="none")
    assert len(data.returns()) == n
    assert train("td3_bc", "short.npz", eval_env="none")["dataset"]["episodes"] == n


def test_huge_numbers(capsys):
    """Row 60: what float32 can hold is trained on; what it can't is named, without a warning of
    numpy's."""
    arrays = columns()
    arrays["observations"][:, 0] = 1.7e9
    assert load(save("clock.npz", arrays)).obs[0, 0] == 1.7e9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size, key in ((1e40, "rewards"), (np.nan, "observations")):
            arrays = columns()
            arrays[key] = arrays[key].astype(np.float64)
            arrays[key][7] = size
            assert "the first are [7]" in refused(
                capsys, lambda arrays=arrays: load(save("huge.npz", arrays))
            )
    result = train(
        "td3_bc", save("large.npz", columns() | {"rewards": np.full(40, 1e12)}), eval_env="none"
    )
    assert np.isfinite(result["curve"][0]["metrics"]["critic_loss"])
    save("large.npz", columns() | {"rewards": np.full(40, 1e30)})
    assert "critic_loss is inf by step 2; --resume would end the same way" in refused(
        capsys, lambda: train("td3_bc", "large.npz", eval_env="none"))


CONTINUOUS = [path.stem for path in sorted((ROOT / "algorithms").glob("*.py")) if path.stem not in (
    "dqn", "rem", "cql_discrete", "fqe", "decision_transformer", "mopo", "morel", "combo")]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_actions_at_the_bounds_and_columns_that_never_change(name, monkeypatch):
    """Rows 39, 62 and 63: no atanh of 1, no division by a standard deviation of 0. (The model-based
    files and the Decision Transformer are in their own tests.)"""
    module = importlib.import_module(name)
    for actions in (2.0, 0.0):
        arrays = columns() | {
            "observations": np.ones((40, 3)),
            "next_observations": np.ones((40, 3)),
            "rewards": np.ones(40),
            "actions": np.full((40, 1), actions),
        }
        arrays["actions"][::2] *= -1
        data = load(save("pendulum-constant.hdf5", arrays))
        settings = {
            key: value for key, value in SMALL.get(name, {}).items() if not key.endswith("steps")
        }
        stages = {key: 1 for key in SMALL.get(name, {}) if key.endswith("steps")}
        monkeypatch.setattr(SilentRun, "stop", False, raising=False)
        last = silent_train(monkeypatch, module, data, steps=3, **settings, **stages)
        for part in last.state.values():
            if isinstance(part, torch.nn.Module):
                assert all(bool(p.isfinite().all()) for p in part.parameters())


# ---- kinds beyond the table


@pytest.mark.parametrize(
    "key, values, line",
    [
        ("rewards", np.array(["1"] * 40), "must be an array of real numbers"),
        ("terminals", np.array([b"False"] * 40), "must be an array of real numbers"),
        ("actions", np.array([np.zeros(3), None], object), "must be an array of real numbers"),
        ("rewards", np.float32(1), "differ in length"),
        ("terminals", np.full(40, np.nan), "terminals must be 0 or 1, found [nan]"),
        ("timeouts", np.array([-1, 1] * 20), "must be 0 or 1"),
        (
            "next_observations",
            np.zeros((40, 2)),
            "observations have shape (40, 3), next_observations (40, 2)",
        ),
        (
            "actions",
            np.append(np.zeros(39), 1e300),
            "in action that are not finite in float32, in 1 transitions, the first are [39]",
        ),
    ],
)
def test_columns_that_are_something_else(capsys, key, values, line):
    """The text "False" is true, NaN is true, one number is every row's, 1e300 is infinite: all
    would train."""
    assert line in refused(
        capsys, lambda: load(save("log.npz", columns() | {key: values}), discrete=None)
    )


def test_actions_that_never_occur_are_named(capsys):
    """Ids with gaps would give a policy actions that do not exist."""
    load(save("log.npz", columns() | {"actions": np.array([0, 7, 200, 7] * 10)}), discrete=None)
    assert any("of the actions 0 to 200 only 3 occur" in line for line in notes(capsys))


def test_an_environment_in_the_current_folder(tmp_path, capsys, monkeypatch):
    """module:Name-v0 is found there; an unknown name says so."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "own_world.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Here-v0', 'gymnasium.envs.classic_control:PendulumEnv', "
        "max_episode_steps=3)\n"
    )
    log = save("log.npz", columns(obs=3))
    assert train("bc", log, eval_env="own_world:Here-v0")["final_returns"]
    assert "module:Name-v0" in refused(capsys, lambda: load(log, eval_env="Nowhere-v0"))
    gym.registry.pop("Here-v0")


@pytest.mark.parametrize(
    "change, line",
    [
        (dict(actions=np.zeros((40, 0))), "actions has shape (40, 0), so it holds no numbers"),
        (dict(actions=np.arange(40) % 3 - 1), "has the action -1; discrete actions are counted"),
        (dict(actions=np.full(40, 10**9)), "has the action 1000000000; actions are numbers from 0"),
        (
            dict(observations=np.zeros((40, 3), np.uint8)),
            "observations are uint8, next_observations float32",
        ),
    ],
)
def test_numbers_that_are_not_meant(capsys, change, line):
    """No action at all; ids of items in place of numbers from 0; bytes beside fractions of 255."""
    assert line in refused(capsys, lambda: load(save("log.npz", columns() | change), discrete=None))


def test_a_file_of_a_minari_set_and_keys_without_end(register, capsys):
    record("my/set-v0", register("Set-v0"))
    path = minari.storage.get_dataset_path("my/set-v0") / "data" / "main_data.hdf5"
    assert "a part of a Minari dataset" in refused(capsys, lambda: load(path))
    line = refused(
        capsys, lambda: load(save("log.npz", {f"key{i}": np.zeros(1) for i in range(99)}))
    )
    assert line.endswith("and others") and len(line) < 400


def test_a_minari_set_whose_columns_cannot_be_kept(register, capsys):
    """A full disk, or one for reading only, costs time and not the run."""
    record("my/full-v0", register("Full-v0"))
    (minari.storage.get_dataset_path("my/full-v0") / "columns.npz").mkdir()
    assert load("my/full-v0").size == 18
    assert "could not write" in notes(capsys)[-1]


def test_a_minari_set_without_a_space(register, capsys):
    record("my/bare-v0", register("Bare-v0"))
    path = minari.storage.get_dataset_path("my/bare-v0") / "data" / "metadata.json"
    meta = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {key: value for key, value in meta.items() if key not in ("env_spec", "action_space")}
        )
    )
    assert "my/bare-v0 has no observation_space or no action_space" in refused(
        capsys, lambda: load("my/bare-v0")
    )


def test_files_that_are_something_else(capsys):
    """Parts in a group; a pickle, and an HDF5 file, under another name: not the advice to allow
    pickles."""
    arrays = columns()
    path = save(
        "dict.h5", without(arrays, "observations") | {"observations/place": arrays["observations"]}
    )
    assert "observations must be an array of real numbers" in refused(capsys, lambda: load(path))
    os.rename(save("log.h5", arrays), "log.npz")
    line = refused(capsys, lambda: load("log.npz"))
    assert "not a zip file" in line and "pickle" not in line
    assert "found nothing" in refused(capsys, lambda: load(save("none.npz", {})))


@pytest.mark.parametrize("dtype", [bool, np.uint16, ">f8"])
def test_further_number_types(dtype):
    """Observations as switches and as counts; switches as actions are numbered ones."""
    arrays = columns()
    obs = {key: (10 * arrays[key]).astype(dtype) for key in ("observations", "next_observations")}
    data = load(save("log.npz", arrays | obs | {"actions": np.arange(40) % 2 == 0}), discrete=True)
    assert data.num_actions == 2 and data.obs.dtype == torch.float32
    np.testing.assert_allclose(data.obs, obs["observations"].astype(np.float32))


def test_a_dump_of_d3rlpy_1():
    """episode_terminals marks every end, terminals those of the task."""
    arrays = without(columns(), "timeouts", "next_observations") | {
        "episode_terminals": np.arange(40) % 10 == 9,
        "version": "1.0",
    }
    arrays["terminals"] = np.arange(40) == 19
    data = load(save("d3rlpy.h5", arrays))
    assert (
        len(data.returns()) == 4
        and data.truncated.sum() == 3
        and data.terminated.nonzero().tolist() == [[18]]
    )


def test_terminals_that_mark_the_clock(capsys):
    """`done` of older programs, with and without timeouts: a line, as Q would learn that nothing
    follows. Else there is none."""
    arrays = columns(400, every=200)
    clock = arrays["timeouts"].copy()
    for given in (
        arrays | {"terminals": clock},
        without(arrays, "timeouts") | {"terminals": clock},
    ):
        load(save("pendulum.npz", given))
        assert "every timeout of pendulum.npz is a terminal too" in notes(capsys)[-1]
    for given in (
        arrays,
        arrays | {"terminals": np.arange(400) == 20},
        without(arrays, "timeouts"),
    ):
        load(save("pendulum.npz", given))
        assert not any("every timeout" in line for line in notes(capsys))


def test_bounds_that_are_the_largest_number(register, capsys, monkeypatch):
    """They are none: half their distance is infinite in float32."""
    most = np.finfo(np.float32).max
    monkeypatch.setitem(ACTIONS, "most", spaces.Box(-most, most, (2,), np.float32))
    register("Most-v0", action="most")
    data = load(save("log.npz", columns(action=2)), eval_env="Most-v0")
    assert (
        "no finite action bounds" in notes(capsys)[0]
        and data.action.min() == -1
        and data.action.max() == 1
    )


def test_an_environment_with_other_bounds_than_the_data(register, capsys):
    """Actions are played as recorded; normalised ones would be too small, so a line says what
    either has."""
    record("my/wide-v0", register("Wide-v0"))
    register("Narrow-v0", action="lopsided")
    assert load("my/wide-v0").env_spec and not notes(capsys)
    load("my/wide-v0", eval_env="Narrow-v0")
    (line,) = notes(capsys)
    assert (
        "my/wide-v0 has actions Box(-2.0, 2.0" in line and "Narrow-v0 takes Box([ 0. -3.]" in line
    )


def test_episodes_without_a_step_and_with_other_actions(register, capsys):
    """A recording stopped right after a reset has nothing; an action too many is named."""
    record("my/odd-v0", register("Odd-v0"), episodes=4)
    with h5py.File(
        minari.storage.get_dataset_path("my/odd-v0") / "data" / "main_data.hdf5", "a"
    ) as file:
        for key, array in {
            key: file["episode_3"][key][:0]
            for key in ("actions", "rewards", "terminations", "truncations")
        }.items():
            del file["episode_3"][key]
            file["episode_3"][key] = array
        del file["episode_1"]["actions"]
        file["episode_1"]["actions"] = np.zeros((7, 2))
    assert load("my/odd-v0").size == 12
    (line,) = notes(capsys)
    assert (
        "episode 1 of my/odd-v0 is left out: it has 7 observations and 7 actions for 6 steps"
        in line
    )


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("terminations", np.nan, "must be 0 or 1"),
        ("truncations", 2.0, "must be 0 or 1"),
        ("rewards", 1 + 2j, "must be real numbers"),
    ],
)
def test_columns_of_a_minari_set_that_are_something_else(register, capsys, key, value, line):
    """As in a file. NaN would count as an end, and of a complex reward half would be dropped, in
    silence."""
    record("my/strange-v0", register("Strange-v0"))
    with h5py.File(
        minari.storage.get_dataset_path("my/strange-v0") / "data" / "main_data.hdf5", "a"
    ) as file:
        del file["episode_1"][key]
        file["episode_1"][key] = np.full(6, value)
    assert f"episode 1 of my/strange-v0: {key} {line}" in refused(
        capsys, lambda: load("my/strange-v0")
    )


def test_rewards_that_were_changed_after_a_first_run(register):
    """In the file itself, which no metadata tell: the kept columns are old then."""
    record("my/relabelled-v0", register("Relabelled-v0"))
    assert load("my/relabelled-v0").returns().tolist() == [6, 6, 6]
    with h5py.File(
        minari.storage.get_dataset_path("my/relabelled-v0") / "data" / "main_data.hdf5", "a"
    ) as file:
        for episode in file.values():
            episode["rewards"][:] = 2
    assert load("my/relabelled-v0").returns().tolist() == [12, 12, 12]


@pytest.mark.parametrize(
    "low, high", [(None, None), (None, 1.0), (1.0, 1.0), ("unknown", 1.0), ([0], 1.0)]
)
def test_reference_scores_that_give_no_scale(register, low, high):
    """null, equal, or no numbers: the run has no score."""
    record("my/scores-v0", register("Scores-v0"))
    edit_metadata(
        "my/scores-v0", lambda meta, spec: meta.update(ref_min_score=low, ref_max_score=high)
    )
    assert load("my/scores-v0").score([1.0]) is None


@pytest.mark.parametrize("spec", ["{half", "{}"])
def test_a_specification_that_is_damaged(register, capsys, spec):
    """As one that can't be rebuilt: it trains, and a line says that nothing is evaluated."""
    record("my/spec-v0", register("Spec-v0"))
    path = minari.storage.get_dataset_path("my/spec-v0") / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_spec": spec}))
    assert load("my/spec-v0").env_spec is None and "nothing is evaluated" in notes(capsys)[0]


def test_a_folder_for_datasets_that_cannot_be(capsys, monkeypatch, tmp_path):
    """Minari makes it at the first look: no HOME, a read-only disk, a file in its place."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file"))
    for name in ("my/thing-v0", "pendulum-random"):
        assert "MINARI_DATASETS_PATH names another" in refused(capsys, lambda name=name: load(name))


def test_an_id_without_a_version(capsys):
    """Not a riddle of Minari's about int()."""
    assert "a Minari id ends in its version" in refused(
        capsys, lambda: load("mujoco/hopper/expert")
    )


def test_an_environment_registered_as_a_class(capsys):
    """JSON can't hold a class, but its name."""
    gym.register("Class-v0", World, max_episode_steps=6)
    try:
        data = load(save("log.npz", columns(action=2)), eval_env="Class-v0")
    finally:
        del gym.registry["Class-v0"]
    assert common.evaluate(lambda obs: torch.zeros(len(obs), 2), data.env_spec, 1) == [6]


def test_an_environment_that_seeds_numpy(register, monkeypatch):
    """numpy's own random state takes 32 bits; an evaluation's seed is 10⁶ times the run's."""
    reset = World.reset
    monkeypatch.setattr(
        World,
        "reset",
        lambda env, *, seed=None, options=None: np.random.seed(seed) or reset(env, seed=seed),
    )
    register("Seeded-v0")
    assert train("bc", save("log.npz", columns(action=2)), eval_env="Seeded-v0", seed=5000)[
        "final_returns"
    ] == [6]


@pytest.mark.parametrize("name", ["mopo", "morel", "combo"])
def test_a_body_that_may_lie_on_the_floor(name, capsys):
    """The files with a model end its episodes by the body's own rule; data of another rule are
    refused."""
    record(
        "my/floor-v0",
        gym.make("Hopper-v5", max_episode_steps=60, terminate_when_unhealthy=False),
        episodes=1,
    )
    data = load("my/floor-v0")
    assert "terminate_when_unhealthy" in refused(
        capsys, lambda: importlib.import_module(name).model_rows(data)
    )
    record("my/falls-v0", gym.make("Hopper-v5"), episodes=1)
    assert (
        len(importlib.import_module(name).model_rows(load("my/falls-v0"))[0])
        == load("my/falls-v0").size
    )


def test_a_terminal_without_the_sign(monkeypatch):
    """± in ASCII: a question mark, not the end of the run."""
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    spec = importlib.util.spec_from_file_location("common_again", ROOT / "common.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    print("±", flush=True)
    assert out.buffer.getvalue() == b"?\n"


def test_a_reader_of_the_output_who_leaves(monkeypatch):
    """| head, or a pager that was closed: what is said then is lost, and the run goes on."""
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    common.say("one")
    assert os.read(reading, 10) == b"one\n"
    os.close(reading)
    common.say("two")
    print("three", flush=True)


def test_a_folder_with_a_bc_of_its_own(tmp_path):
    """load_policy takes this repository's file, and runs no other."""
    train("bc", save("log.npz", columns()))
    (tmp_path / "bc.py").write_text("raise SystemExit(3)")
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import common; "
        f"common.load_policy({str(run_of('bc'))!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- runs


def test_judging_twice_and_beside_a_damaged_result(capsys):
    """fqe.py keeps its earlier results, also of the same second, and shares its folder with no
    other process."""
    import fqe
    path = save("pendulum-log.npz", columns())
    train("bc", path)
    (run_of("bc") / "result.json").write_text("{half")
    args = fqe.Args(
        env=path, policies=(str(run_of("bc")),), steps=1, final_episodes=1, device="cpu", out="runs"
    )
    for _ in range(3):
        fqe.train(args)
    assert len(list(run_of("fqe").parent.glob("seed0*/result.json"))) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "lock_file", lambda path: None)
        assert "another process is writing" in refused(capsys, lambda: fqe.train(args))
    args.seed = 10**20
    assert "--seed must be between" in refused(capsys, lambda: fqe.train(args))


@pytest.fixture
def log():
    """A small log without an environment, to train on."""
    return save("log.npz", columns())


def test_two_processes_never_write_one_folder(log, capsys):
    """Row 64: the second is refused; one after the other is fine, and the older is renamed."""
    train("bc", log)
    folder = run_of("bc")
    first = (folder / "result.json").read_text()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, folder.parent / ".seed0.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        assert "another process is writing" in refused(
            capsys, lambda: train("bc", log, actor_lr=1e-4)
        )
        other.stdin.close()
    assert (folder / "result.json").read_text() == first and len(
        list(folder.parent.glob("seed0*"))
    ) == 1
    train("bc", log, actor_lr=1e-4)
    train("bc", log, actor_lr=1e-5)
    assert len(list(folder.parent.glob("seed0*"))) == 3  # two renamed in one second
    (renamed,) = [
        path
        for path in folder.parent.glob("seed0.*")
        if (path / "result.json").read_text() == first
    ]


def test_one_curve_after_a_resume(log, register):
    """Row 65: also where the process ended between a checkpoint and its evaluation."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    register("Mine-v0", action="box")
    path = save("log2.npz", columns(action=2))
    settings = dict(eval_every=20, eval_env="Mine-v0")
    train("bc", path, steps=40, **settings)
    checkpoint = run_of("bc") / "checkpoint.pt"
    # evaluated after this was written
    assert torch.load(checkpoint, weights_only=True)["due"][0] == 40
    result = train("bc", path, steps=60, resume=True, **settings)
    events = EventAccumulator(str(run_of("bc")))
    events.Reload()
    for tag in ("eval/return", "train/cloning_error"):
        assert [event.step for event in events.Scalars(tag)] == [20, 40, 60]
    assert [point["step"] for point in result["curve"]] == [20, 40, 60]


def test_resuming_after_the_end(log, capsys):
    """Row 66: equal and more steps, other evaluation settings; fewer steps and other settings are
    refused."""
    train("bc", log, steps=4)
    assert train("bc", log, steps=4, resume=True)["steps"] == 4
    result = train("bc", log, steps=6, eval_every=3, eval_episodes=3, resume=True)
    assert [point["step"] for point in result["curve"]] == [2, 4, 6]
    assert "was saved at step 6, more than --steps 5" in refused(
        capsys, lambda: train("bc", log, steps=5, resume=True)
    )
    line = refused(capsys, lambda: train("bc", log, steps=8, actor_lr=1e-5, resume=True))
    assert "actor_lr was 0.0003" in line
    os.rename("log.npz", "moved.npz")
    os.mkdir("disk")
    os.rename("moved.npz", "disk/log.npz")
    # the data count, not where they lie
    assert train("bc", "disk/log.npz", steps=7, resume=True)["steps"] == 7
    save("log.npz", columns(50))
    assert "the data are not those of" in refused(
        capsys, lambda: train("bc", log, steps=8, resume=True)
    )


def test_a_checkpoint_that_is_damaged_or_of_another_run(log, capsys):
    """Row 67."""
    assert "there is no" in refused(capsys, lambda: train("bc", log, resume=True))
    train("bc", log)
    path = run_of("bc") / "checkpoint.pt"
    whole = path.read_bytes()
    for content in (whole[:5000], b"", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        assert "is damaged" in refused(capsys, lambda: train("bc", log, resume=True))
    torch.save({"step": 2}, path)
    assert "is damaged" in refused(capsys, lambda: train("bc", log, resume=True))
    train("td3_bc", log)
    path.write_bytes((run_of("td3_bc") / "checkpoint.pt").read_bytes())
    assert "algorithm was td3_bc" in refused(capsys, lambda: train("bc", log, resume=True))
    saved = torch.load(run_of("td3_bc") / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"learned": {}}, run_of("td3_bc") / "checkpoint.pt")
    assert "another program" in refused(capsys, lambda: train("td3_bc", log, resume=True))


def test_a_cluster_sends_sigterm(log, capsys, monkeypatch):
    """Row 69: as Ctrl-C, after the update under way; what --resume ends with is the uninterrupted
    run, bit for bit. Slurm and the parents of a process send it several times."""
    settings = dict(steps=9, eval_every=5)
    whole = train("bc", log, **settings)
    weights = torch.load(run_of("bc") / "policy.pt", weights_only=True)["actor"]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    step = common.Run.step

    def interrupted(run, number, metrics):
        if number == 7:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
        step(run, number, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "step", interrupted)
        assert "stopped after step 7; the same command with --resume" in refused(
            capsys, lambda: train("bc", log, **settings)
        )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = train("bc", log, resume=True, **settings)
    resumed = torch.load(run_of("bc") / "policy.pt", weights_only=True)["actor"]
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert again["curve"] == whole["curve"]


@pytest.mark.parametrize("label", ["step 2", "final"])
def test_a_stop_during_an_evaluation(log, register, capsys, monkeypatch, label):
    """Row 69: everything is saved, so it ends at once, and --resume evaluates what is due."""
    register("Mine-v0")
    path = save("log2.npz", columns(action=2))
    evaluate, before = common.Run._evaluate, signal.getsignal(signal.SIGINT)

    def stopped(run, name, *rest):
        if name == label:
            signal.raise_signal(signal.SIGINT)
        return evaluate(run, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "_evaluate", stopped)
        line = refused(capsys, lambda: train("bc", path, steps=4, eval_env="Mine-v0"))
    assert "--resume continues" in line and not (run_of("bc", env="log2") / "result.json").exists()
    assert signal.getsignal(signal.SIGINT) is before
    result = train("bc", path, steps=4, eval_env="Mine-v0", resume=True)
    assert [point["returns"] for point in result["curve"]] == [[6.0], [6.0]] and result[
        "final_returns"
    ] == [6]


@pytest.mark.parametrize("seed", [-1, 99999999999999999999])
def test_seeds(log, capsys, seed):
    """Row 70: refused at the start; the same seed gives the same numbers."""
    assert "--seed must be between 0 and" in refused(capsys, lambda: train("bc", log, seed=seed))
    if seed == -1:
        first, second = train("bc", log, seed=7), train("bc", log, seed=7)
        assert first["curve"] == second["curve"]


def test_a_saved_policy_repeats_the_runs_own_return():
    """Row 75: load_policy and the recorded environment are enough."""
    path = save("pendulum-log.npz", columns())
    result = train("td3_bc", path, final_episodes=2)
    saved = torch.load(run_of("td3_bc", env="pendulum-log") / "policy.pt", weights_only=True)
    act = common.load_policy(run_of("td3_bc", env="pendulum-log"))
    returns = common.evaluate(act, saved["env_spec"], 2, 10**6 * 1000)
    assert returns.tolist() == result["final_returns"]
    assert all(value.device.type == "cpu" for value in saved["actor"].values())


@pytest.mark.parametrize("name", ["bc", "decision_transformer", "dqn"])
def test_a_saved_policy_takes_what_a_simulator_gives(name):
    """Row 75: numpy's float64, which torch would not multiply with float32."""
    obs = np.random.default_rng(0).normal(size=(2, 3))
    actions = {"actions": np.arange(40) % 2} if name == "dqn" else {}
    train(name, save("log.npz", columns() | actions))
    act = common.load_policy(run_of(name))
    given = []
    for form in (torch.tensor(obs, dtype=torch.float32), torch.tensor(obs), obs):
        if hasattr(act, "start"):
            act.start(2)
        given.append(act(form))
    assert torch.equal(given[0], given[1]) and torch.equal(given[0], given[2])
    if not hasattr(act, "start"):
        # other bytes, a view backwards
        for form in (obs.astype(">f8"), np.ascontiguousarray(obs[:, ::-1])[:, ::-1]):
            assert torch.equal(given[0], act(form))


def test_a_policy_that_cannot_be_loaded(tmp_path, capsys):
    """Row 75: one line."""
    assert "can't load the policy" in refused(
        capsys, lambda: common.load_policy(tmp_path / "policy.pt")
    )
    torch.save({"module": "td3_bc", "class": "Nobody"}, tmp_path / "policy.pt")
    assert "can't load the policy" in refused(capsys, lambda: common.load_policy(tmp_path))


@pytest.mark.parametrize("name, obs", [("td3_bc", 3), ("bc", 3), ("dqn", 4)])
def test_an_exported_policy_is_the_policy(name, obs, tmp_path, capfd, exports):
    """Row 79: one program for every batch size, and torch says nothing on the terminal."""
    module = importlib.import_module(name)
    init = ([obs], 2) if name == "dqn" else (obs, 1)
    actor = getattr(module, "QNetwork", None) or module.Actor
    actor = actor(*init)
    with torch.no_grad():
        for buffer in actor.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.5)
    common.export_policy(actor, torch.zeros(2, obs), tmp_path / "policy.pt2")
    program = torch.export.load(tmp_path / "policy.pt2").module()
    for rows in (1, 2, 5):
        raw = torch.randn(rows, obs)
        torch.testing.assert_close(program(raw), actor.act(raw))
    assert capfd.readouterr() == ("", "")


def test_a_policy_that_cannot_be_exported(tmp_path, capsys, caplog, exports):
    """Row 79: left out with a notice."""
    class Odd(torch.nn.Module):
        def act(self, obs):
            return obs if obs.sum() > 0 else -obs

    common.export_policy(Odd(), torch.zeros(2, 3), tmp_path / "policy.pt2")
    assert "policy.pt2 is left out" in notes(capsys)[0] and not list(tmp_path.glob("*.pt2"))
    # torch has handlers of its own
    assert not [line for line in caplog.records if line.levelname != "DEBUG"]


def test_windows(monkeypatch, tmp_path):
    """Row 80: no C library by that name, no fcntl, no uname; a path of its own makes a folder
    inside --out."""
    def no_library(name):
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.delattr(os, "uname")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("common_on_windows", ROOT / "common.py")
    windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(windows)
    save("log.npz", columns())
    data = windows.load_dataset("log.npz", "cpu", eval_env="none")
    import bc
    args = bc.Args(env="C:\\data\\log.npz", steps=2, eval_every=2, out="runs", device="cpu")
    record = windows.Run(args, data)
    assert tmp_path / "runs" in (tmp_path / record.folder).resolve().parents and "\\" not in str(
        record.folder
    )
    monkeypatch.setattr(windows, "export_policy", lambda *_: None)
    actor = bc.Actor(3, 1)
    record.begin({"actor": actor}, actor)
    record.step(1, {})
    record.step(2, {})
    record.finish()
    assert (record.folder / "result.json").exists()


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_devices(log, capsys, device):
    """Row 82."""
    assert f"--device {device}: give auto, cpu or" in refused(
        capsys, lambda: train("bc", log, device=device)
    )


@pytest.mark.parametrize(
    "settings, line",
    [
        (dict(actor_lr=-1.0), "--actor-lr must be at least 0, not -1"),
        (dict(gamma=1.5), "--gamma must be between 0 and 1"),
        (dict(batch_size=0), "--batch-size must be at least 1"),
        (dict(steps=0), "--steps must be at least 1"),
        (dict(threads=-1), "--threads must be between 0 and 1024"),
        (dict(critic_lr=float("nan")), "--critic-lr must be at least 0"),
    ],
)
def test_settings_out_of_range(log, capsys, settings, line):
    """Row 83."""
    assert line in refused(capsys, lambda: train("td3_bc", log, **settings))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "algorithms").glob("*.py")))
def test_a_setting_that_is_not_a_number(name, monkeypatch, capsys):
    """NaN is refused for every setting, before any data are read; --holdout is checked with the
    data."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: pytest.fail("the data were read"))
    monkeypatch.setattr(module, "find_policies", lambda given: [], raising=False)
    for field in dataclasses.fields(module.Args):
        if field.type in (float, float | None) and field.name != "holdout":
            line = refused(
                capsys, lambda field=field: module.train(module.Args(**{field.name: float("nan")}))
            )
            assert f"--{field.name.replace('_', '-')}" in line


def test_the_command_line(capsys):
    """Row 83: tyro's own refusals; underscores are dashes."""
    import td3_bc
    assert tyro.cli(td3_bc.Args, args=["--batch_size", "64"]).batch_size == 64
    for wrong in (["--resume", "True"], ["--steps", "1e3"]):
        with pytest.raises(SystemExit) as stop:
            tyro.cli(td3_bc.Args, args=wrong)
        assert stop.value.code == 2


def test_values_for_single_datasets(capsys, monkeypatch):
    """parse_args: applied where the user said nothing, printed, and shown by --help."""
    import td3_bc
    tuned = {"hopper-medium": {"q_weight": 1.5, "policy_delay": 3}}

    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["td3_bc.py", *arguments])
        return common.parse_args(td3_bc.Args, tuned)

    args = parsed("--env", "hopper-medium", "--policy-delay", "4")
    assert (args.q_weight, args.policy_delay) == (1.5, 4)
    assert capsys.readouterr().out.strip() == "tuned for hopper-medium: --q-weight 1.5"
    assert parsed("--env", "walker2d-medium").q_weight == 2.5 and not capsys.readouterr().out
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "hopper-medium: --q-weight 1.5 --policy-delay 3" in " ".join(
        capsys.readouterr().out.split()
    )


# ---- speed


def test_products_are_float32():
    """What common.py chose, in this process: bf16 would have an error of 3e-3."""
    assert common.product_error() < 1e-5


@pytest.mark.parametrize("error, chosen", [(6e-7, "oneDNN, float32"), (3e-3, "PyTorch's default")])
def test_both_outcomes_of_the_choice_of_products(monkeypatch, error, chosen):
    """Where the chip rounds to bf16, the setting is taken back."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(common, "product_error", lambda: error)
    try:
        matmul.fp32_precision = "none"
        assert common.use_fast_products() == chosen
        assert matmul.fp32_precision == ("bf16" if chosen.startswith("oneDNN") else "none")
    finally:
        matmul.fp32_precision = before
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert common.use_fast_products() == "PyTorch's default" and matmul.fp32_precision == before


@pytest.mark.parametrize(
    "threads, gflop, cores, user, expected",
    [
        (0, 0.4, 2, None, 1),
        (0, 4.0, 2, None, 2),
        (0, 4.0, 64, None, 4),
        (3, 0.4, 2, None, 3),
        (0, 4.0, 2, "1", None),
    ],
)
def test_one_rule_for_threads(monkeypatch, threads, gflop, cores, user, expected):
    """One for light updates, up to four for heavy ones; the user's own number stands."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if user:
        monkeypatch.setenv("OMP_NUM_THREADS", user)
    common.use_threads(threads, gflop)
    assert chosen == ([] if expected is None else [expected])


# ---- own data, from a numpy log to a policy on a robot


def test_own_data_from_a_numpy_log_to_a_policy_that_needs_torch_alone(tmp_path, exports):
    """The walk-through: no simulator anywhere. A tank's level is to be held at 0; the valve's log
    was noisy and lazy."""
    rng = np.random.default_rng(0)
    logs = {key: [] for key in common.KEYS}
    for _ in range(40):
        level, inflow = rng.normal(size=2)
        for step in range(25):
            valve = np.clip(-0.5 * level + rng.normal(scale=0.5), -1, 1)
            new = level + 0.3 * valve + 0.02 * inflow
            for key, value in zip(
                logs, ([level, inflow], [valve], -(new**2), False, step == 24, [new, inflow])
            ):
                logs[key].append(value)
            level = new
    np.savez("tank.npz", **logs)

    result = train(
        "td3_bc",
        "tank.npz",
        steps=300,
        eval_every=300,
        batch_size=64,
        gamma=0.9,
        actor_lr=1e-3,
        critic_lr=1e-3,
        holdout=0.25,
    )
    run = run_of("td3_bc", tmp_path / "runs", "tank")
    assert result["score"] is None and result["dataset"]["episodes"] == 30
    act, states, discounted = common.load_policy(run), torch.randn(500, 2), torch.zeros(500)
    for step in range(60):  # what nobody can try who has only the log
        states[:, 0] += 0.3 * act(states)[:, 0] + 0.02 * states[:, 1]
        discounted -= 0.9**step * states[:, 0] ** 2
    estimate, true = judge(run), float(discounted.mean())
    assert abs(estimate - true) < 0.5 * abs(true), (estimate, true)
    program = ("import sys, torch\nact = torch.export.load(sys.argv[1]).module()\n"
               "print(act(torch.tensor([[2.0, 0.0], [-2.0, 0.0]])).flatten().tolist())\n"
               "assert not {'common', 'td3_bc', 'gymnasium', 'minari'} & set(sys.modules)")
    done = subprocess.run(
        [sys.executable, "-c", program, str(run / "policy.pt2")],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    high, low = json.loads(done.stdout)
    # lets out where it is too full, and fills where it is too empty
    assert -1 <= high < 0 < low <= 1


def judge(run) -> float:
    """Off-policy evaluation of the saved policy, on the episodes that training did not see: FQE's
    estimate."""
    import fqe

    fqe.train(
        fqe.Args(
            env="tank.npz",
            policies=(str(run),),
            steps=300,
            eval_every=300,
            batch_size=64,
            gamma=0.9,
            critic_lr=1e-3,
            target_rate=0.05,
            device="cpu",
            out="runs",
            holdout=0.25,
        )
    )
    (path,) = run.parents[2].glob("fqe*/tank/seed0/result.json")
    result = json.loads(path.read_text())
    assert result["dataset"]["episodes"] == 10
    return result["policies"][0]["estimate"]


# ---- what a second try to break it found


def test_bounds_that_are_placeholders(register, capsys):
    """±1e6 around actions of ±1: a policy in shares of such bounds would play thousands."""
    record("my/vast-v0", register("Vast-v0", action="vast"), act=lambda: np.float32([0.5, -1]))
    assert load("my/vast-v0").action_half.max() > 1e5, "one action throughout tells no scale"
    rng = np.random.default_rng(0)
    act = lambda: rng.uniform(-1, 1, 2).astype(np.float32)
    record("my/vast-v1", register("Vast-v1", action="vast"), act=act)
    capsys.readouterr()
    assert load("my/vast-v1").action_half.max() < 1.1
    assert any("far too wide" in line for line in notes(capsys))


def test_a_number_that_fills_a_gap(capsys):
    """netCDF's, which float32 holds: its square would make the column's deviation infinite."""
    arrays = columns()
    arrays["observations"][5, 0] = arrays["next_observations"][4, 0] = 9.96921e36
    assert "numbers as large as 9.97e+36 in obs" in refused(
        capsys, lambda: load(save("log.npz", arrays))
    )


def test_an_episode_that_was_cut_off_is_no_best_one():
    """Where every step costs, the shortest return is that of the last, unfinished episode."""
    import bc
    import iql

    arrays = columns(34) | {"rewards": np.full(34, -1.0)}
    arrays["rewards"][:10] = -2
    data = load(save("log.npz", arrays))
    assert data.returns().tolist() == [-20, -10, -10, -4]
    assert data.finished().tolist() == [True, True, True, False]
    assert bc.best_episodes(data, 0.3).tolist() == list(range(10, 20))
    iql.scale_rewards(data)
    assert data.reward[-1] == pytest.approx(-1000 / 10)
    assert load(save("log.npz", columns(8))).finished().tolist() == [True], "the only one"


def test_places_in_degrees(capsys):
    """A step moves by 1e-5, an episode starts elsewhere by 1e-3: both far below the values."""
    rng = np.random.default_rng(0)
    start = np.array([48.137, 11.575]) + rng.uniform(-0.002, 0.002, (10, 1, 2))
    place = start + 1e-5 * rng.normal(size=(10, 31, 2)).cumsum(axis=1)
    arrays = without(columns(300), "timeouts") | {
        "observations": place[:, :-1].reshape(-1, 2),
        "next_observations": place[:, 1:].reshape(-1, 2),
    }
    assert len(load(save("gps.npz", arrays)).returns()) == 10


def test_a_set_that_was_replaced_with_its_old_time(register):
    """cp -p and rsync keep the time of a file, which is then older than its neighbours."""
    record("my/thing-v0", register("Thing-v0"))
    file = minari.storage.get_dataset_path("my/thing-v0") / "data" / "main_data.hdf5"
    before = load("my/thing-v0").reward.sum()
    written = file.stat().st_mtime_ns
    with h5py.File(file, "a") as episodes:
        for episode in episodes.values():
            episode["rewards"][...] = 100
    os.utime(file, ns=(written - 10**9, written - 10**9))
    assert load("my/thing-v0").reward.sum() > before


def test_an_environment_made_by_a_function(capsys):
    gym.register("Made-v0", make_world, max_episode_steps=6)
    try:
        data = load(save("log.npz", columns(obs=3, action=2)), eval_env="Made-v0")
        assert common.make_env(data.env_spec).spec.id == "Made-v0"
    finally:
        gym.registry.pop("Made-v0")


def make_world():
    return World()


def test_a_specification_without_a_time_limit(register, capsys):
    record("my/thing-v0", register("Thing-v0", ends=5))
    edit_metadata("my/thing-v0", lambda meta, spec: spec.pop("max_episode_steps"))
    assert json.loads(load("my/thing-v0").env_spec)["max_episode_steps"] == 5


def test_a_module_in_front_of_an_id_is_no_part_of_the_environments_name(log, monkeypatch):
    source = common.read_source(log, "none")._replace(env="somewhere:Thing-v0")
    monkeypatch.setattr(common, "read_source", lambda *_: source)
    assert load(log, eval_env="none").recorded_env == "Thing-v0"


def test_rewards_that_are_objects(capsys):
    arrays = columns() | {"rewards": np.array({"a": 1}, object)}
    assert "rewards must be an array of real numbers" in refused(
        capsys, lambda: load(save("log.npz", arrays))
    )


@pytest.mark.parametrize("size", [10**13, 10**20])
def test_a_batch_that_no_memory_holds(log, capsys, size):
    assert "--batch-size must be between 1 and" in refused(
        capsys, lambda: train("bc", log, batch_size=size)
    )


def test_a_run_in_a_thread(log):
    """As tuners start them: only the main thread may take signals."""
    import threading

    results = []
    thread = threading.Thread(target=lambda: results.append(train("bc", log)))
    thread.start()
    thread.join()
    assert results[0]["steps"] == 2


def test_a_signal_while_the_policy_is_exported_says_so(log, capsys, monkeypatch, exports):
    """The export hides what torch writes; not the one line about the end."""
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: common.fail("stopped; said"))
    assert refused(capsys, lambda: train("bc", log)) == "error: stopped; said"


def test_estimates_that_are_not_finite(log, capsys):
    import fqe

    train("bc", log)
    arrays = columns()
    arrays["rewards"] = arrays["rewards"] * 1e30
    save("log.npz", arrays)
    args = fqe.Args(env="log.npz", policies=("runs/bc",), steps=1, device="cpu", out="runs")
    assert "by step 1 the loss is" in refused(capsys, lambda: fqe.train(args))
