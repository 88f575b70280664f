"""results/overestimation.py: what Q promises and what is earned, with known answers."""
import sys

import gymnasium as gym
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "results"))
import overestimation


class Constant(torch.nn.Module):
    """Always pushes with 1, half of what the pendulum takes."""
    action_mid, action_half = torch.zeros(1), torch.tensor([2.0])

    def act(self, obs):
        return torch.ones(len(obs), 1)


def test_promise_and_earnings(monkeypatch):
    """The promise is the mean over the critics, of the scaled action, in the reward's own unit; the
    rest is discounted."""
    monkeypatch.setattr(overestimation, "EPISODES", 2)
    spec = gym.make("Pendulum-v1").spec.to_json()
    # (K, B); the scaled action is 1/2
    critic = lambda obs, action: torch.stack([4 * action[:, 0], 8 * action[:, 0]])
    promised, earned = overestimation.compare(
        {"actor": Constant(), "critic": critic}, 3.0, 0.5, spec
    )
    want = 0.0
    for i in range(2):
        env = gym.make("Pendulum-v1")
        env.reset(seed=overestimation.SEED + i)
        want += sum(0.5**step * env.step([1.0])[1] for step in range(200)) / 2
    assert promised == pytest.approx(9.0)
    assert earned == pytest.approx(want, abs=1e-5)
