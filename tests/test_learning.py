"""Whole runs that learn: each algorithm ends clearly above what a small dataset shows.

Those in LONG take minutes each; `make test-long` runs them, `make test` shows them as skipped.

Networks are narrower than the files' and rates larger, so that a test can wait for it; the losses
are those of the files. """
import importlib
import json
import os
from pathlib import Path

import common

import fqe
import numpy as np
import pytest
import sac
import torch
from conftest import ROOT
from helpers import build, folder, run_of

MIXED = "pendulum-medium-replay"  # eight policies, most of them bad
RANDOM = "pendulum-random"  # every action everywhere
WIDTH = 64  # of every hidden layer, but for WIDE
EAGER = {"gamma": 0.95, "batch_size": 64, "critic_lr": 3e-3, "actor_lr": 3e-3, "target_rate": 0.05}
CALM = EAGER | {"actor_lr": 1e-3}
IMAGINED = CALM | {"rollout_starts": 2000, "rollout_every": 250}
SUPPORTED = CALM | {  # of BEAR and UWAC
    "vae_lr": 1e-3,
    "warm_up_steps": 300,
    "num_samples": 3,
    "bandwidth": 1.0,
    "max_mmd": 0.4,
    "multiplier_lr": 1e-2,
    "constants": {"HIDDEN": (256, 256)},
}
# as wide as in the file
WIDE = ("algae_dice", "bcq", "brac", "combo", "cql", "edac", "mopo", "morel", "dqn", "rem")
LONG = (
    "algae_dice",
    "bcq",
    "bear",
    "brac",
    "combo",
    "cql",
    "decision_transformer",
    "dqn",
    "edac",
    "mopo",
    "morel",
    "plas",
    "rem",
    "uwac",
)


@pytest.fixture(scope="module", autouse=True)
def suite(minari_root):
    """The datasets of this file, built in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for body, level in (
            ("pendulum", "medium-replay"),
            ("pendulum", "medium"),
            ("pendulum", "random"),
            ("cartpole", "replay"),
        ):
            if not (minari_root / "local" / body / f"{level}-v0").exists():
                build(patch, body, level, None)


def make_small(patch, module) -> None:
    """Narrow hidden layers for every network of this file, and no policy.pt2, which takes longer
    than some runs."""
    for name, widths in list(vars(module).items()):
        if name.endswith("HIDDEN") and module.__name__ not in WIDE:
            patch.setattr(module, name, (WIDTH,) * len(widths))
    patch.setattr(common, "export_policy", lambda *_: None)


def final_return(
    name: str, out, env: str = MIXED, constants=(), seed: int = 0, **settings
) -> tuple[float, float]:
    """A run in this process: (mean return of 20 episodes of the final policy, the data's mean
    return)."""
    if name in LONG and "LONG_TESTS" not in os.environ:
        pytest.skip(f"{name} learns for minutes: make test-long")
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, module)
        for constant, value in dict(constants).items():
            patch.setattr(module, constant, value)
        module.train(
            module.Args(
                env=env,
                seed=seed,
                device="cpu",
                eval_every=10**6,
                eval_episodes=1,
                final_episodes=20,
                out=str(out),
                **settings,
            )
        )
    result = json.loads((run_of(name, out, Path(env).stem, seed) / "result.json").read_text())
    return float(np.mean(result["final_returns"])), result["dataset"]["return_mean"]


@pytest.fixture(scope="module")
def clone(suite, tmp_path_factory):
    """A clone is as good as the mean of the policies behind the data."""
    clone, data = final_return(
        "bc", tmp_path_factory.mktemp("clone"), steps=1000, batch_size=64, actor_lr=3e-3
    )
    assert abs(clone - data) < 300, (clone, data)
    return clone


@pytest.mark.parametrize(
    "name, margin, settings",
    [
        ("bc", 200, {"steps": 1000, "batch_size": 64, "actor_lr": 3e-3, "top_fraction": 0.1}),
        ("td3_bc", 200, EAGER | {"steps": 2000, "policy_delay": 1}),
        ("rebrac", 200, CALM | {"steps": 2000}),
        (
            "awr",
            200,
            {
                "steps": 3000,
                "value_steps": 100,
                "actor_steps": 500,
                "actor_lr": 1e-2,
                "td_lambda": 0.9,
                "gamma": 0.95,
                "constants": {"HIDDEN": (128, 64)},
            },
        ),
        (
            "bcq",
            150,
            {
                "steps": 3000,
                "batch_size": 32,
                "num_samples": 3,
                "max_perturbation": 0.2,
                "gamma": 0.95,
                "target_rate": 0.02,
                "critic_lr": 2e-3,
            },
        ),
        ("awac", 150, CALM | {"steps": 2000, "beta": 10.0}),
        (
            "brac",
            150,
            CALM
            | {"steps": 4000, "behavior_steps": 2000, "behavior_lr": 1e-3, "warm_start_steps": 200},
        ),
        (
            "crr",
            150,
            {
                "steps": 4000,
                "target_every": 20,
                "gamma": 0.95,
                "batch_size": 64,
                "critic_lr": 3e-3,
                "actor_lr": 1e-3,
            },
        ),
        (
            "edac",
            150,
            {
                "steps": 4000,
                "num_critics": 5,
                "batch_size": 64,
                "critic_lr": 1e-3,
                "target_rate": 0.02,
            },
        ),
        (
            "plas",
            150,
            CALM
            | {
                "steps": 8000,
                "vae_lr": 1e-3,
                "vae_steps": 2000,
                "constants": {"HIDDEN": (400, 300)},
            },
        ),
    ],
)
def test_it_beats_mixed_data_and_its_clone(name, margin, settings, clone, tmp_path):
    """Each swings the pendulum up, which most of the data does not show."""
    result, data = final_return(name, tmp_path, **settings)
    assert result > data + margin and result > clone + margin, (result, clone, data)


@pytest.mark.parametrize(
    "name, margin, settings",
    [
        ("mopo", 200, IMAGINED | {"steps": 3000, "dynamics_epochs": 15, "actor_lr": 3e-3}),
        (
            "combo",
            400,
            IMAGINED | {"steps": 2000, "dynamics_epochs": 15, "actor_lr": 3e-3, "num_samples": 1},
        ),
        ("morel", 200, IMAGINED | {"steps": 3000, "dynamics_epochs": 3, "batch_size": 128}),
    ],
)
def test_it_learns_in_a_model(name, margin, settings, tmp_path):
    """The same, mostly from steps that it has imagined. (The clone is as good as the data.)"""
    result, data = final_return(name, tmp_path, **settings)
    assert result > data + margin, (result, data)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("sac", CALM | {"steps": 1500}),
        ("msg", CALM | {"steps": 2500, "num_critics": 4}),
        ("iql", EAGER | {"steps": 2000, "expectile": 0.9}),
        (
            "algae_dice",
            {
                "steps": 2000,
                "batch_size": 64,
                "gamma": 0.95,
                "target_rate": 0.05,
                "policy_delay": 1,
            },
        ),
        ("bear", SUPPORTED | {"steps": 3000}),
    ],
)
def test_it_learns_from_random_actions(name, settings, tmp_path):
    """These hold every action everywhere: SAC and AlgaeDICE, without a constraint, need that. IQL's
    and BEAR's policies can end in spinning at full speed when they have learnt from the mixed data;
    from these they swing the pendulum up."""
    result, data = final_return(name, tmp_path, RANDOM, **settings)
    assert result > data + 300, (result, data)


def test_uwac_learns_from_small_rewards(suite, tmp_path):
    """The same random actions with a hundredth of the reward: the spectral norm bounds the slope of
    Q, and with larger rewards (a twentieth, a tenth) this run ends no better than the data."""
    data = common.load_dataset(RANDOM, "cpu")
    scale = 0.01
    np.savez(
        tmp_path / "small.npz",
        observations=data.obs,
        actions=data.action_mid + data.action_half * data.action,
        rewards=scale * data.reward,
        next_observations=data.next_obs,
        terminals=data.terminated,
        timeouts=data.truncated,
    )
    settings = SUPPORTED | {"steps": 4000, "gamma": 0.9, "eval_env": "Pendulum-v1"}
    result, mean = final_return("uwac", tmp_path, str(tmp_path / "small.npz"), **settings)
    assert result > mean / scale + 300, (result, mean / scale)


def test_cql_beats_the_data(tmp_path):
    """One policy's episodes, which take longer to swing up than they need."""
    result, data = final_return(
        "cql", tmp_path, "pendulum-medium", steps=2000, num_samples=3, **CALM
    )
    assert result > data + 100, (result, data)


@pytest.mark.parametrize("name, settings", [
    ("cql_discrete", {"steps": 4000, "learning_rate": 1e-3, "batch_size": 64, "target_every": 200}),
    ("dqn", {"steps": 15000, "learning_rate": 2.5e-4, "batch_size": 128, "target_every": 500}),
    ("rem", {"steps": 15000, "learning_rate": 2.5e-4, "batch_size": 128, "target_every": 500}),
])
def test_it_learns_from_a_replayed_run(name, settings, tmp_path):
    """cartpole-replay holds everything from falling at once to balancing; the policy learnt from it
    balances far longer."""
    result, data = final_return(name, tmp_path, "cartpole-replay", **settings)
    assert result > data + 50, (result, data)


def test_a_decision_transformer_gets_more_than_it_has_seen_on_average(tmp_path):
    """A small one, asked for the best return in the data."""
    result, data = final_return(
        "decision_transformer",
        tmp_path,
        steps=2500,
        batch_size=32,
        actor_lr=1e-3,
        warmup_steps=100,
        dropout=0.0,
        constants={"CONTEXT": 5, "WIDTH": 64, "LAYERS": 2},
    )
    assert result > data + 150, (result, data)


def test_fqe_ranks_policies_it_has_not_run(tmp_path, monkeypatch):
    """Six snapshots of the online run behind the pendulum's data, from bad to expert, judged on
    mixed data."""
    data = common.load_dataset(MIXED, "cpu")
    make_small(monkeypatch, fqe)
    with np.load(ROOT / "results" / "behavior" / "pendulum.npz") as saved:
        for i in range(3, 9):
            actor = sac.Actor(3, 1)
            for number, layer in enumerate(actor.net[::2]):
                layer.weight.data = torch.tensor(np.float32(saved[f"weight{number}"][i]))
                layer.bias.data = torch.tensor(np.float32(saved[f"bias{number}"][i]))
            actor.action_half = data.action_half
            common.save_policy(tmp_path / str(i), "sac", "sac", actor, data)
    fqe.train(
        fqe.Args(
            env=MIXED,
            device="cpu",
            steps=1000,
            eval_every=250,
            critic_lr=1e-3,
            target_rate=0.1,
            gamma=0.95,
            batch_size=128,
            final_episodes=20,
            policies=(str(tmp_path),),
            out=str(tmp_path),
        )
    )
    result = json.loads((folder("fqe", tmp_path, MIXED) / "result.json").read_text())
    assert len(result["policies"]) == 6 and result["spearman"] > 0.8, result["policies"]
