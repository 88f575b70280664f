"""Whole runs that learn: on small datasets and within seconds each algorithm ends clearly above what the data show.

Rates are larger than the defaults and γ is smaller, so that a test can wait for it; the losses are those of the files.
"""
import json

import bear
import decision_transformer
import numpy as np
import plas
import pytest
import sac
import torch
from conftest import ROOT
from helpers import folder, run

MIXED = "pendulum-medium-replay"  # eight policies, most of them bad
FAST = ["--actor-lr", "1e-3", "--critic-lr", "1e-3", "--target-rate", "0.02"]
EAGER = ["--gamma", "0.95", "--batch-size", "64", "--critic-lr", "3e-3", "--actor-lr", "1e-3", "--target-rate", "0.05"]
IMAGINED = ["--rollout-starts", "2000", "--rollout-every", "250", "--gamma", "0.95", "--critic-lr", "3e-3",
            "--target-rate", "0.05"]


def final_return(name: str, out, env: str, *arguments: str) -> tuple[float, float]:
    """(mean return of 20 episodes of the final policy, the data's mean return)."""
    run(name, out, *arguments, "--eval-every", "100000", quick=["--env", env, "--final-episodes", "20", "--device", "cpu"])
    result = json.loads(next(out.glob(f"{name}*/{env}/seed0/result.json")).read_text())  # brac.py's folder is brac-p
    return np.mean(result["final_returns"]), result["dataset"]["return_mean"]


def final_return_of_a_small_one(module, monkeypatch, sizes: dict, out, **settings) -> tuple[float, float]:
    """The same on the mixed data, with smaller networks than the file's constants say."""
    for constant, value in sizes.items():
        monkeypatch.setattr(module, constant, value)
    module.train(module.Args(env=MIXED, eval_every=100_000, device="cpu", final_episodes=20, out=str(out), **settings))
    result = json.loads((folder(module.__name__, out, MIXED) / "result.json").read_text())
    return np.mean(result["final_returns"]), result["dataset"]["return_mean"]


@pytest.fixture(scope="session")
def clone(minari_root, tmp_path_factory):
    """A clone is as good as the mean of the policies behind the data."""
    clone, data = final_return("bc", tmp_path_factory.mktemp("clone"), MIXED, "--steps", "1500")
    assert abs(clone - data) < 300, (clone, data)
    return clone


@pytest.mark.parametrize("name, margin, settings", [
    ("td3_bc", 200, ["--steps", "4000", *FAST]),
    ("rebrac", 200, ["--steps", "2000", "--batch-size", "64", "--target-rate", "0.02"]),
    ("awr", 200, ["--steps", "6000", "--actor-lr", "1e-2", "--td-lambda", "0.9", "--gamma", "0.95"]),
    ("bcq", 150, ["--steps", "3000", "--batch-size", "32", "--num-samples", "3", "--max-perturbation", "0.2", "--gamma", "0.95",
                  "--target-rate", "0.02", "--critic-lr", "2e-3"]),
    ("awac", 150, ["--steps", "8000", *EAGER]),
    ("brac", 150, ["--steps", "4000", *EAGER, "--behavior-steps", "2000", "--behavior-lr", "1e-3",
                   "--warm-start-steps", "200"]),
    ("crr", 150, ["--steps", "6000", "--target-every", "20", *EAGER[:-2]]),
    ("edac", 150, ["--steps", "4000", "--num-critics", "5", "--batch-size", "64", "--critic-lr", "1e-3",
                   "--target-rate", "0.02"]),
])
def test_it_beats_mixed_data_and_its_clone(name, margin, settings, clone, minari_root, tmp_path):
    """Each swings the pendulum up, which most of the data does not show."""
    result, data = final_return(name, tmp_path, MIXED, *settings)
    assert result > data + margin and result > clone + margin, (result, clone, data)


@pytest.mark.parametrize("module, settings", [
    (plas, dict(vae_steps=2000)),
    (bear, dict(warm_up_steps=300, num_samples=3, bandwidth=1.0, max_mmd=0.4, multiplier_lr=1e-2)),
])
def test_with_a_small_vae_it_beats_mixed_data_and_its_clone(module, settings, clone, minari_root, tmp_path, monkeypatch):
    """Two that need many updates before they swing up, and a smaller VAE for a test to wait for that."""
    eager = dict(gamma=0.95, batch_size=64, vae_lr=1e-3, critic_lr=3e-3, actor_lr=1e-3, target_rate=0.05)
    result, data = final_return_of_a_small_one(module, monkeypatch, dict(VAE_HIDDEN=(64, 64)), tmp_path, steps=8000, **eager,
                                               **settings)
    assert result > data + 150 and result > clone + 150, (result, clone, data)


@pytest.mark.parametrize("name, margin, settings", [
    ("mopo", 200, [*IMAGINED, "--batch-size", "64", "--steps", "3000", "--dynamics-epochs", "15", "--actor-lr", "3e-3"]),
    ("combo", 400, [*IMAGINED, "--batch-size", "64", "--steps", "2000", "--dynamics-epochs", "15", "--actor-lr", "3e-3",
                    "--num-samples", "1"]),
    ("morel", 200, [*IMAGINED, "--batch-size", "128", "--steps", "3000", "--dynamics-epochs", "3", "--actor-lr", "1e-3"]),
])
def test_it_learns_in_a_model(name, margin, settings, minari_root, tmp_path):
    """The same, mostly from steps that it has imagined. (The clone is as good as the data.)"""
    result, data = final_return(name, tmp_path, MIXED, *settings)
    assert result > data + margin, (result, data)


@pytest.mark.parametrize("name, settings", [
    ("algae_dice", ["--steps", "2000", "--batch-size", "64", "--gamma", "0.95", "--target-rate", "0.05",
                    "--policy-delay", "1"]),
    ("iql", ["--steps", "4500", *EAGER, "--expectile", "0.9"]),
])
def test_it_learns_from_random_actions(name, settings, minari_root, tmp_path):
    """pendulum-random holds every action everywhere: AlgaeDICE, without a constraint, needs that. IQL's policy can end in
    spinning at full speed when it has learnt from the mixed data (its docstring); from these it swings the pendulum up."""
    result, data = final_return(name, tmp_path, "pendulum-random", *settings)
    assert result > data + 300, (result, data)


def test_cql_beats_the_data(minari_root, tmp_path):
    """pendulum-medium, with smaller batches than the default's, for speed."""
    small = ["--num-samples", "3", "--batch-size", "64"]
    cql, data = final_return("cql", tmp_path, "pendulum-medium", "--steps", "2000", *small, *FAST)
    assert cql > data + 50, (cql, data)


@pytest.mark.parametrize("name", ["dqn", "rem"])
def test_it_learns_from_a_replayed_run(name, minari_root, tmp_path):
    """cartpole-replay holds everything from falling at once to balancing; the policy learnt from it balances far longer."""
    fast = ["--learning-rate", "2.5e-4", "--batch-size", "128", "--target-every", "500"]
    result, data = final_return(name, tmp_path, "cartpole-replay", "--steps", "15000", *fast)
    assert result > data + 50, (result, data)


def test_a_decision_transformer_gets_more_than_it_has_seen_on_average(minari_root, tmp_path, monkeypatch):
    """A small one, asked for the best return in the data."""
    small = dict(CONTEXT=5, WIDTH=64, LAYERS=2)
    result, data = final_return_of_a_small_one(decision_transformer, monkeypatch, small, tmp_path, steps=2500, batch_size=32,
                                               actor_lr=1e-3, warmup_steps=100, dropout=0.0)
    assert result > data + 150, (result, data)


def test_fqe_ranks_policies_it_has_not_run(minari_root, tmp_path):
    """Six snapshots of the online run behind the pendulum's data, from bad to expert, judged on mixed data."""
    with np.load(ROOT / "results" / "behavior" / "pendulum.npz") as saved:
        for i in range(3, 9):
            actor = sac.Actor(3, 1)
            for number, layer in enumerate(actor.net[::2]):
                layer.weight.data = torch.tensor(np.float32(saved[f"weight{number}"][i]))
                layer.bias.data = torch.tensor(np.float32(saved[f"bias{number}"][i]))
            actor.action_half.fill_(2.0)
            (tmp_path / str(i)).mkdir()
            torch.save(dict(algorithm="sac-online", env_id="Pendulum-v1", obs_dim=3, action_dim=1, actor=actor.state_dict()),
                       tmp_path / str(i) / "policy.pt")
    run("fqe", tmp_path, "--steps", "1000", "--eval-every", "250", "--critic-lr", "1e-3", "--target-rate", "0.1", "--gamma",
        "0.95", "--batch-size", "128", "--final-episodes", "20", "--policies", str(tmp_path),
        quick=["--env", MIXED, "--device", "cpu"])
    result = json.loads((folder("fqe", tmp_path, MIXED) / "result.json").read_text())
    assert len(result["policies"]) == 6 and result["spearman"] > 0.8, result["policies"]
