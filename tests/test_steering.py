"""Whole runs that learn in seconds, for the algorithms that need minutes on the suite
(test_learning.py: make test-long).

A point lies in a square and is moved by the action; a step costs its distance from a goal. Half of
the data's episodes move at random, half drift away from the goal. Networks are narrow and the
horizon is short; the losses are those of the files. """
import importlib
import json

import common

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import run_of

WIDTH = 64
STEPS = 10  # of an episode


class Steering(gym.Env):
    """A point in a square: the action moves it, and a step costs the distance from (0.5, −0.5)."""

    def __init__(self, discrete: bool = False):
        self.observation_space = spaces.Box(-1, 1, (2,))
        self.action_space = spaces.Discrete(5) if discrete else spaces.Box(-1, 1, (2,))
        self.moves = np.float32([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]) if discrete else None

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action):
        move = np.asarray(action, np.float32) if self.moves is None else self.moves[action]
        self.place = np.clip(self.place + 0.3 * move, -1, 1)
        cost = np.linalg.norm(self.place - np.float32([0.5, -0.5]))
        return self.place.copy(), -float(cost), False, False, {}


gym.register("Steering-v0", "test_steering:Steering", max_episode_steps=STEPS)
gym.register(
    "DiscreteSteering-v0",
    "test_steering:Steering",
    max_episode_steps=STEPS,
    kwargs={"discrete": True},
)


def log(path, discrete: bool) -> None:
    """200 episodes as a file of plain arrays."""
    rng = np.random.default_rng(0)
    env = gym.make("DiscreteSteering-v0" if discrete else "Steering-v0")
    rows = {key: [] for key in common.KEYS}
    for episode in range(200):
        obs, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            if discrete:
                action = rng.integers(5)
            else:
                drift = [-0.5, 0.5] if episode % 2 else [0.0, 0.0]
                action = np.clip(rng.normal(drift, 0.6, 2), -1, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for key, value in zip(rows, (obs, action, reward, terminated, truncated, next_obs)):
                rows[key].append(value)
            obs = next_obs
    np.savez(path, **{key: np.array(column) for key, column in rows.items()})


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    for discrete in (False, True):
        log(folder / f"steering-{discrete}.npz", discrete)
    return folder


def learn(name: str, logs, out, discrete: bool, constants=(), **settings) -> tuple[float, float]:
    """(mean return of 20 episodes of the final policy, the data's mean return)."""
    module = importlib.import_module(name)
    path = str(logs / f"steering-{discrete}.npz")
    env = "test_steering:DiscreteSteering-v0" if discrete else "test_steering:Steering-v0"
    with pytest.MonkeyPatch.context() as patch:
        for constant, widths in vars(module).copy().items():
            if constant.endswith("HIDDEN"):
                patch.setattr(module, constant, (WIDTH,) * len(widths))
        if hasattr(module, "FALLS"):
            own = env.partition(":")[2]  # without the module that registers it
            patch.setitem(module.FALLS, own, lambda obs: torch.zeros(len(obs), dtype=torch.bool))
        for constant, value in dict(constants).items():
            patch.setattr(module, constant, value)
        patch.setattr(common, "export_policy", lambda *_: None)
        module.train(
            module.Args(
                env=path,
                eval_env=env,
                device="cpu",
                eval_every=10**6,
                eval_episodes=1,
                final_episodes=20,
                out=str(out),
                **settings,
            )
        )
    result = json.loads((run_of(name, out) / "result.json").read_text())
    return float(np.mean(result["final_returns"])), result["dataset"]["return_mean"]


SHORT = {
    "gamma": 0.8,
    "batch_size": 64,
    "critic_lr": 3e-3,
    "actor_lr": 3e-3,
    "target_rate": 0.05,
    "steps": 600,
}
VAE = SHORT | {"vae_lr": 3e-3}
MODEL = SHORT | {"dynamics_epochs": 3, "rollout_starts": 500, "rollout_every": 200}
DQN = {"gamma": 0.8, "batch_size": 64, "learning_rate": 1e-3, "target_every": 50, "steps": 600}


@pytest.mark.parametrize(
    "name, settings",
    [
        ("bcq", VAE),
        ("bear", VAE | {"warm_up_steps": 100}),
        (
            "brac",
            SHORT
            | {
                "behavior_steps": 300,
                "behavior_lr": 3e-3,
                "warm_start_steps": 100,
                "divergence_weight": 0.1,
            },
        ),
        ("plas", VAE | {"vae_steps": 500}),
        ("uwac", VAE | {"warm_up_steps": 100, "max_mmd": 0.3, "multiplier_lr": 1e-2, "passes": 4}),
        ("cql", SHORT | {"cql_weight": 0.5, "num_samples": 3}),
        ("edac", SHORT | {"num_critics": 4}),
        ("algae_dice", SHORT | {"policy_delay": 1, "steps": 1500}),
        ("mopo", MODEL | {"dynamics_epochs": 5, "steps": 900}),
        ("morel", MODEL),
        ("combo", MODEL),
        ("mabcq", VAE | {"agents": 2}),
        (
            "decision_transformer",
            {
                "steps": 600,
                "batch_size": 64,
                "actor_lr": 3e-3,
                "warmup_steps": 50,
                "dropout": 0.0,
                "return_scale": 5.0,
                "constants": {"CONTEXT": 3, "WIDTH": 32, "LAYERS": 1},
            },
        ),
        ("dqn", DQN),
        ("rem", DQN),
    ],
)
def test_it_steers_better_than_the_data(name, settings, logs, tmp_path):
    """A clone of these data is 1 better than their mean return; standing on the goal at once would
    be about 11 better."""
    result, data = learn(name, logs, tmp_path, name in ("dqn", "rem"), **settings)
    assert result > data + 3, (result, data)
