"""What train, Run and the tables of settings pass on: the user's options, the seed, the data's
units, each optimizer's rate, published values. A loss can be right and its file wrong in these."""
import copy
import importlib
import json
import math
from dataclasses import fields

import common

import bc
import cql_discrete
import fqe
import gymnasium as gym
import numpy as np
import plas
import pytest
import torch
import uwac
from conftest import ROOT
from gymnasium import spaces
from helpers import SilentRun, assert_close, make, silent_train, tiny_data
from test_capture import FILES, SMALL, FolderRun, data_of, kinds


def small_train(name, monkeypatch, tmp_path, **settings):
    """One step: (what train asked load_dataset for, the data, the run)."""
    module = importlib.import_module(name)
    kind = kinds(name)[0]
    data = data_of(kind, 1 if hasattr(module, "imagine") else 2)
    if kind == "discrete":
        data.first_action = 7
    for constant, widths in list(vars(module).items()):
        if constant.endswith("HIDDEN"):
            monkeypatch.setattr(module, constant, tuple(8 for _ in widths))
    asked = {}
    monkeypatch.setattr(FolderRun, "folder", tmp_path / "seed0")
    monkeypatch.setattr(module, "Run", FolderRun)
    monkeypatch.setattr(module, "load_dataset", lambda *_, **given: asked.update(given) or data)
    monkeypatch.setattr(module, "evaluate", lambda *_: np.zeros(2), raising=False)
    known = {field.name for field in fields(module.Args)}
    wanted = SMALL | dict(steps=1, holdout=0.125, eval_env="Mine-v0") | settings
    module.train(module.Args(**{key: value for key, value in wanted.items() if key in known}))
    return asked, data, SilentRun.last


# ---- options


@pytest.mark.parametrize("name", [name for name in FILES if name != "fqe"])
def test_train_takes_the_users_share_and_acts_in_the_datas_units(name, monkeypatch, tmp_path):
    asked, data, run = small_train(name, monkeypatch, tmp_path)
    assert (asked["holdout"], asked["eval_env"]) == (0.125, "Mine-v0")
    if data.num_actions:
        assert run.actor.first_action == 7
    else:
        assert torch.equal(run.actor.action_mid, data.action_mid)
        assert torch.equal(run.actor.action_half, data.action_half)


@pytest.mark.parametrize(
    "name, rates",
    [
        ("cql", dict(actor="actor", critic="critic", entropy="actor", weight="critic")),
        ("sac", dict(actor="actor", critic="critic", entropy="actor")),
        ("td3_bc", dict(actor="actor", critic="critic")),
        ("crr", dict(actor="actor", critic="critic")),
    ],
)
def test_each_optimizer_has_its_rate(name, rates, monkeypatch, tmp_path):
    run = small_train(name, monkeypatch, tmp_path, actor_lr=0.01, critic_lr=0.02)[2]
    for part, rate in rates.items():
        got = run.state[f"{part}_optimizer"].param_groups[0]["lr"]
        assert got == {"actor": 0.01, "critic": 0.02}[rate], part


@pytest.mark.parametrize(
    "name, settings, variant",
    [
        ("rem", dict(ensemble=True), "-ensemble"),
        ("rem", {}, ""),
        ("mopo", dict(penalty_weight=0.0), "-no-penalty"),
        ("mopo", {}, ""),
    ],
)
def test_modes_have_folders_of_their_own(name, settings, variant, monkeypatch, tmp_path):
    assert small_train(name, monkeypatch, tmp_path, **settings)[2].variant == variant


def test_uwac_uses_the_kernel_asked_for(monkeypatch):
    seen = []
    real = uwac.mmd
    for name in ("HIDDEN", "VAE_HIDDEN"):
        monkeypatch.setattr(uwac, name, (8, 8))
    monkeypatch.setattr(uwac, "mmd", lambda u, v, *rest: seen.append(rest) or real(u, v, *rest))
    args = uwac.Args(kernel="laplacian", bandwidth=0.7)
    actor, vae = uwac.Actor(3, 2), uwac.VAE(3, 2)
    uwac.actor_loss(actor, vae, torch.tensor(1.0), torch.randn(4, 3), args, True)
    assert seen == [("laplacian", 0.7)]


def test_pixels_and_first_action_of_discrete_cql(monkeypatch):
    data = data_of("images", 2)
    data.reward, data.first_action = 10 * data.reward, 3
    actor = silent_train(monkeypatch, cql_discrete, data, steps=1, batch_size=4).actor
    assert data.reward.abs().max() <= 1 and actor.act(data.obs).min() >= 3


def test_each_stage_of_plas_is_in_the_checkpoint(monkeypatch):
    monkeypatch.setattr(SilentRun, "stop", False, raising=False)
    run = silent_train(monkeypatch, plas, tiny_data(), steps=1, vae_steps=1, batch_size=4)
    saved = run.state["vae_optimizer"].param_groups[0]["params"]
    assert {id(one) for one in saved} == {id(one) for one in run.actor.vae.parameters()}


# ---- seeds, data, evaluation


def test_other_seeds_are_other_runs_and_other_starts(monkeypatch, tmp_path):
    played, weights = [], []

    def evaluate(act, spec, episodes, seed, device):
        played.append(seed)
        return np.zeros(1)

    monkeypatch.setattr(common, "evaluate", evaluate)
    monkeypatch.setattr(common, "export_policy", lambda *_: None)
    data = tiny_data()
    # a copy for each run, which may scale it: the seed is all that differs
    monkeypatch.setattr(bc, "load_dataset", lambda *_, **__: copy.deepcopy(data))
    shared = dict(env="tiny", steps=2, eval_every=2, batch_size=4, device="cpu", out=str(tmp_path))
    for seed in (0, 1):
        bc.train(bc.Args(seed=seed, **shared))
        saved = torch.load(tmp_path / "bc" / "tiny" / f"seed{seed}" / "policy.pt")
        weights.append(saved["actor"]["net.0.weight"])
    assert not torch.equal(*weights)
    assert played == [0, 1000 * 10**6, 10**6, 1001 * 10**6], "apart from those of training"


def test_fqe_plays_from_starts_that_no_training_has_seen(monkeypatch, tmp_path):
    seeds = []
    monkeypatch.setattr(fqe, "evaluate", lambda *given: seeds.append(given[3]) or np.zeros(1))
    for seed in (0, 3):
        fqe.rollout_return(tmp_path / "policy.pt", None, tiny_data(), fqe.Args(seed=seed))
    assert seeds == [1000 * 10**6, 1003 * 10**6]


def test_committed_scores_are_on_the_suites_scale():
    """The returns that score 0 and 100 are as they were when the results were made."""
    seen = set()
    for path in sorted((ROOT / "results" / "scores").glob("*/*/seed*.json")):
        result = json.loads(path.read_text())
        body = result["env"].partition("-")[0]
        _, low, high = common.SUITE[body]
        want = 100 * (np.mean(result["final_returns"]) - low) / (high - low)
        assert abs(result["score"] - want) < 1e-6, path
        seen.add(body)
    assert {"hopper", "walker2d", "halfcheetah", "cartpole", "acrobot"} <= seen
    assert common.SUITE["pendulum"] == ("Pendulum-v1", -1200.0, -150.0)


def test_medium_expert_is_both(monkeypatch):
    def build(body, level):
        return f"local/{body}/{level}-v0"

    monkeypatch.setattr(common, "build_suite_dataset", build)
    monkeypatch.setattr(common, "read_minari", lambda name: name)
    monkeypatch.setattr(common, "join", tuple)
    want = ("local/hopper/medium-v0", "local/hopper/expert-v0")
    assert common.read_source("hopper-medium-expert", "auto") == want


def test_a_memory_starts_anew_in_each_group(monkeypatch):
    started = []

    class Memory:
        def start(self, num):
            started.append(num)

        def __call__(self, obs):
            return torch.zeros(len(obs), 1)

        def record(self, i, reward):
            assert i < started[-1]

    monkeypatch.setattr(common, "MAX_ENVS", 2)
    spec = gym.make("Pendulum-v1", max_episode_steps=2).spec.to_json()
    common.evaluate(Memory(), spec, 5)
    assert started == [2, 2, 1]


@pytest.mark.parametrize("eval_env", ["none", "Pendulum-v1"])
def test_the_datas_own_environment_stays_known(eval_env, monkeypatch):
    """What is imagined ends as the data's environment has it; scores are of the one played in."""
    columns = dict(
        obs=np.zeros((3, 3), np.float32),
        action=np.zeros((3, 1), np.float32),
        reward=np.zeros(3, np.float32),
        next_obs=np.zeros((3, 3), np.float32),
        terminated=np.zeros(3, bool),
        truncated=np.array([False, False, True]),
    )
    observed, played = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-2, 2, (1,), np.float32)
    source = common.Source(columns, observed, played, "Own-v0", (0.0, 10.0))
    monkeypatch.setattr(common, "read_source", lambda *_: source)
    data = common.load_dataset("x", "cpu", eval_env=eval_env)
    assert data.recorded_env == "Own-v0"
    if eval_env != "none":
        assert common.env_id(data.env_spec) == eval_env
        assert data.score_range == common.SUITE["pendulum"][1:]


# ---- published values

LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert")
PUBLISHED = {  # the rows of TUNED, setting by setting, in the order of LEVELS
    "rebrac": {
        "actor_penalty": {
            "hopper": (0.001, 0.01, 0.05, 0.1, 0.1),
            "halfcheetah": (0.001, 0.001, 0.01, 0.01, 0.01),
            "walker2d": (0.01, 0.05, 0.05, 0.01, 0.01),
        },
        "critic_penalty": {
            "hopper": (0.01, 0.01, 0.5, 0.01, 0.1),
            "halfcheetah": (0.1, 0.01, 0.001, 0.1, 0.01),
            "walker2d": (0.0, 0.1, 0.01, 0.01, 0.5),
        },
    },
    "edac": {
        "num_critics": {"hopper": (50,) * 5, "halfcheetah": (10,) * 5, "walker2d": (10,) * 5},
        "diversity_weight": {
            "hopper": (1.0,) * 5,
            "halfcheetah": (1.0, 1.0, 1.0, 5.0, 1.0),
            "walker2d": (1.0, 1.0, 1.0, 5.0, 1.0),
        },
    },
    "bear": {
        "kernel": {
            "hopper": ("laplacian",) * 5,
            "walker2d": ("laplacian",) * 5,
            "halfcheetah": ("gaussian",) * 5,
        },
        "bandwidth": dict.fromkeys(("hopper", "walker2d", "halfcheetah"), (20.0,) * 5),
    },
    "decision_transformer": {
        "target_return": {
            "hopper": (3600.0,) * 5,
            "walker2d": (5000.0,) * 5,
            "halfcheetah": (12000.0,) * 5,
        },
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tuned_is_the_published_table(name):
    want = {}
    for setting, bodies in PUBLISHED[name].items():
        for body, row in bodies.items():
            for level, value in zip(LEVELS, row, strict=True):
                want.setdefault(f"{body}-{level}", {})[setting] = value
    assert importlib.import_module(name).TUNED == want


DEFAULTS = {  # that committed results may change (test_form.py), or that no result has
    "brac": dict(behavior_steps=1_000_000),
    "plas": dict(vae_steps=500_000),
    "bear": dict(warm_up_steps=40_000),
    "uwac": dict(warm_up_steps=40_000),
    "decision_transformer": dict(warmup_steps=10_000),
    "edac": dict(num_critics=10, diversity_weight=1.0),
    "msg": dict(num_critics=10),
    "mopo": dict(dynamics_epochs=100, horizon=5, penalty_weight=1.0),
    "combo": dict(dynamics_epochs=100, horizon=5, beta=0.5),
    "morel": dict(dynamics_epochs=25),
    "rebrac": dict(actor_penalty=0.01, critic_penalty=0.01),
    "mabcq": dict(agents=3),
    "fqe": dict(batch_size=256, critic_lr=3e-4, weight_decay=1e-5, target_rate=0.005, gamma=0.99),
}
VAE = dict(VAE_HIDDEN=(750, 750), VAE_LOG_STD_MIN=-4.0, VAE_LOG_STD_MAX=15.0)
BCQ = VAE | dict(HIDDEN=(400, 300), LATENT_CLIP=0.5, ACT_SAMPLES=100)
BEAR = VAE | dict(HIDDEN=(256, 256), LOG_STD_MIN=-5.0, LOG_STD_MAX=2.0, LATENT_CLIP=0.5)
BEAR |= dict(LOG_MULTIPLIER_MIN=-5.0, LOG_MULTIPLIER_MAX=10.0, ACT_SAMPLES=100)
MODEL = dict(NETWORKS=7, ELITES=5, DYNAMICS_HIDDEN=(200,) * 4, DYNAMICS_LR=1e-3, DYNAMICS_BATCH=256)
MODEL |= dict(WEIGHT_DECAY=(2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), MAX_HOLDOUT=1000, PATIENCE=5)
WIDE = dict(HIDDEN=(256, 256, 256), LOG_STD_MIN=-5.0, LOG_STD_MAX=2.0)
NARROW = dict(HIDDEN=(256, 256), LOG_STD_MIN=-5.0, LOG_STD_MAX=2.0)
SAC = dict(HIDDEN=(256, 256), LOG_STD_MIN=-20.0, LOG_STD_MAX=2.0)
ATARI = dict(HIDDEN=(120, 84), ADAM_EPS=3.125e-4)
CONSTANTS = {  # which tests make smaller, so that none of them sees the file's own
    "algae_dice": NARROW | dict(MAX_RESIDUAL=1e6, ORTHOGONAL_WEIGHT=1e-4, ADAM_EPS=1e-7),
    "awac": dict(HIDDEN=(256, 256), ACTOR_HIDDEN=(256,) * 4, LOG_STD_MIN=-6.0, LOG_STD_MAX=0.0),
    "awr": dict(HIDDEN=(128, 64), ACTION_STD=0.4),
    "bc": dict(HIDDEN=(256, 256)),
    "bcq": BCQ,
    "bear": BEAR,
    "brac": dict(HIDDEN=(300, 300), ACTOR_HIDDEN=(200, 200), LOG_STD_MIN=-5.0, LOG_STD_MAX=0.0),
    "combo": WIDE | MODEL,
    "cql": WIDE,
    "cql_discrete": ATARI,
    "crr": NARROW,
    "decision_transformer": dict(CONTEXT=20, WIDTH=128, LAYERS=3, HEADS=1, MAX_STEPS=1000),
    "dqn": ATARI,
    "edac": WIDE,
    "fqe": dict(HIDDEN=(256, 256), ADAM_EPS=1e-7),
    "iql": NARROW,
    "mabcq": BCQ,
    "mopo": SAC | MODEL,
    "morel": SAC | dict(NETWORKS=4, DYNAMICS_HIDDEN=(512, 512), DYNAMICS_LR=1e-3,
                        DYNAMICS_BATCH=256),
    "msg": WIDE,
    "plas": VAE | dict(HIDDEN=(400, 300)),
    "rebrac": dict(HIDDEN=(256, 256, 256)),
    "rem": ATARI,
    "sac": SAC,
    "td3_bc": dict(HIDDEN=(256, 256)),
    "uwac": BEAR,
}


@pytest.mark.parametrize("name", FILES)
def test_defaults_and_constants_are_those_of_the_sources(name):
    module = importlib.import_module(name)
    for key, value in DEFAULTS.get(name, {}).items():
        assert getattr(module.Args(), key) == value, key
    for key, value in CONSTANTS[name].items():
        assert getattr(module, key) == value, key


@pytest.mark.parametrize("name", ["combo", "msg"])
def test_log_std_is_bounded(name):
    actor = make(importlib.import_module(name).Actor, 3, 2)
    actor.net[-1].bias.data[2:] = torch.tensor([50.0, -50.0])
    assert_close(actor(torch.randn(4, 3))[1], [[2.0, -5.0]] * 4)


def test_log_std_of_uwac_is_bounded():
    actor = make(uwac.Actor, 3, 2)
    actor.net[-1].bias.data[2:] = torch.tensor([50.0, -50.0])
    actor.net[-1].weight.data.zero_()
    obs = torch.randn(4, 3)
    spread = actor(obs, torch.ones(1, 1, 2)) - actor(obs, torch.zeros(1, 1, 2))
    assert_close(spread, [[[math.exp(2), math.exp(-5)]]] * 4, 1e-5)
