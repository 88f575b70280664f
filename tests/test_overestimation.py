"""results/overestimation.py and ranking.py: promises and earnings with known answers."""
import sys
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "results"))
import falls
import overestimation
import ranking


class Constant(torch.nn.Module):
    """Always pushes with 1; knows standardised observations and scaled actions."""
    action_mid, action_half = torch.tensor([0.5]), torch.tensor([2.0])
    obs_mean, obs_std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])

    def act(self, obs):
        return torch.ones(len(obs), 1)


def test_promise_and_earnings(monkeypatch):
    """The promise is the mean over the critics, of what it knows, in the reward's own unit; the
    rest is discounted."""
    monkeypatch.setattr(overestimation, "EPISODES", 2)
    spec = gym.make("Pendulum-v1").spec.to_json()
    # (K, B); the scaled action is 1/4
    critic = lambda obs, action: torch.stack([4 * action[:, 0], 8 * action[:, 0] + obs.sum(dim=1)])
    promised, earned = overestimation.compare(
        {"actor": Constant(), "critic": critic}, 3.0, 0.5, spec
    )
    want_promise = want = 0.0
    for i in range(2):
        env = gym.make("Pendulum-v1")
        obs, _ = env.reset(seed=overestimation.SEED + i)
        standardised = (obs - [0.1, 0.2, 0.3]) / [1.0, 2.0, 4.0]
        want_promise += 3.0 * (4 * 0.25 + 8 * 0.25 + standardised.sum()) / 4
        want += sum(0.5**step * env.step([1.0])[1] for step in range(200)) / 2
    assert promised == pytest.approx(want_promise, abs=1e-5)
    assert earned == pytest.approx(want, abs=1e-5)


def test_the_share_of_rollouts_that_are_over(monkeypatch):
    """Of four, one ends in the first step, two of the other three in the second, none in the third;
    after the last has ended there are no rows."""
    monkeypatch.setattr(falls, "STARTS", 4)
    monkeypatch.setattr(falls, "STEPS", 3)
    rows = [0, 0, 1, 0] + [1, 0, 1] + [0]
    assert falls.shares_over(torch.tensor(rows)) == [0.25, 0.75, 0.75]
    assert falls.shares_over(torch.ones(4)) == [1, 1, 1]


def test_the_discounted_return_and_its_ranks(monkeypatch):
    """Σ γᵗ r_t of the episodes that start from SEED on; the estimates' order against it."""
    monkeypatch.setattr(ranking, "EPISODES", 2)
    spec = gym.make("Pendulum-v1").spec.to_json()
    want = 0.0
    for i in range(2):
        env = gym.make("Pendulum-v1")
        env.reset(seed=ranking.SEED + i)
        want += sum(0.5**step * env.step([1.0])[1] for step in range(200)) / 2
    assert ranking.discounted_return(Constant().act, spec, 0.5) == pytest.approx(want, abs=1e-5)

    earned = {"a": 3.0, "b": 1.0, "c": 2.0}
    monkeypatch.setattr(ranking, "load_policy", lambda path: path)
    monkeypatch.setattr(ranking, "discounted_return", lambda act, *_: earned[act])
    monkeypatch.setattr(ranking, "load_dataset", lambda *_: SimpleNamespace(env_spec=spec))
    result = {"args": {"gamma": 0.5}, "env": "d", "policies": [{"policy": name} for name in "abc"],
              "curve": [{"estimates": [30, 10, 20]}, {"estimates": [10, 30, 20]}]}
    ranking.measure(result)
    assert [one["discounted_mean"] for one in result["policies"]] == [3, 1, 2]
    assert [point["spearman_discounted"] for point in result["curve"]] == pytest.approx([1, -1])
