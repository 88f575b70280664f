"""Lesson 16: FQE judges policies well near the data, and guesses far from them.

Notes: references, Levine et al. (the survey has a part on off-policy evaluation).
Claim: the data of one policy tell what others are worth, to a few hundredths, if they stay near the
data. Far from the data the estimate is a guess, and the largest estimate tends to be such a guess.
FQE 对接近数据的策略判断很准，对远离数据的策略只是猜测；选估值最大的策略，往往选中的是猜测。
See: left, red follows black in the grey band, and rises on where black turns down. Dotted: from the
largest estimate to the worth of its policy. Right, the error grows a thousandfold with distance.
(A point on a line. Larger actions pay more, but only about as far as the data go.)
Imprecise in the notes: "off-policy evaluation" sounds like a substitute for rollouts. It is that
near the data. One rank correlation over all policies hides this.
Read next: algorithms/fqe.py.
"""
import copy
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import fqe
import matplotlib.pyplot as plt
import numpy as np
import torch

torch.set_num_threads(1)
OFFSETS = torch.linspace(-0.4, 0.9, 14)  # what each policy adds to the mean action of the data
act = lambda obs: (-0.4 * obs + OFFSETS[:, None, None]).clamp(-1, 1)  # all policies', (P, B, 1)


def step(obs, action):
    """The next observation and the reward, which falls where the action is larger than 0.55."""
    reward = action - 8 * (action.abs() - 0.55).clamp(min=0) - obs.pow(2) / 2
    return 0.8 * obs + 0.3 * action, reward.squeeze(-1)


@patch.object(fqe, "HIDDEN", (32, 32))  # small networks for a small problem
def estimate(data):
    """FQE's values of the policies after 1500 updates, (P,)."""
    scale = data.reward.pow(2).mean().sqrt()
    data = data._replace(reward=data.reward / scale)
    bounds = torch.stack([data.reward.min(), data.reward.max()])  # of both signs
    critic = fqe.PolicyCritic(1, 1, num=14)
    critic_target = copy.deepcopy(critic)
    optimizer = fqe.make_optimizer(critic, fqe.Args(critic_lr=3e-3, gamma=0.9))
    for _ in range(1500):
        rows = torch.randint(1000, (64,))
        batch = Batch(*(column[rows] for column in data))
        y = fqe.td_target(critic_target, batch, act(batch.next_obs), bounds, 0.9)
        fqe.descend(fqe.critic_loss(critic, batch, y), optimizer)
        fqe.polyak_update(critic_target, critic, 0.05)
    return fqe.estimate_values(critic_target, data.obs, act(data.obs), scale, 0.9)


def experiment(short: bool = False, seed: int = 0) -> dict:
    """Distances from the data, true values and estimates of the policies, (seeds, 14) each."""
    numbers = {"distance": [], "truth": [], "estimate": []}
    for one in range(seed, seed + (1 if short else 3)):
        torch.manual_seed(one)
        obs = torch.rand(1000, 1) - 0.5
        action = (-0.4 * obs + 0.15 * torch.randn(1000, 1)).clamp(-1, 1)
        next_obs, reward = step(obs, action)
        data = Batch(obs, action, reward, next_obs, torch.zeros(1000))
        numbers["distance"].append((act(obs) - action).square().mean(dim=(1, 2)).sqrt())
        value = torch.zeros(14)
        for k in range(200):
            obs, reward = step(obs, act(obs))
            value += 0.9**k * reward.mean(dim=1)
        numbers["truth"].append(value.numpy())
        numbers["estimate"].append(estimate(data).numpy())
    return {name: np.array(values) for name, values in numbers.items()}


def check(numbers: dict) -> None:
    for distance, truth, guess in zip(*numbers.values()):
        near, far, chosen = distance < 0.31, distance > 0.6, guess.argmax()
        assert abs(guess - truth)[near].max() < 0.2, "near the data the error is small"
        assert fqe.spearman(truth[near], guess[near]) > 0.9, "and the order is right"
        assert abs(guess - truth)[far].mean() > 1.5, "far from the data it is a guess"
        assert far[chosen] and guess[chosen] > truth[chosen] + 0.8, "and so is the largest"


def draw(numbers: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(1.4, 1))
    left.axvspan(-0.3, 0.3, color=style.DATA, alpha=0.3, lw=0)
    left.plot(OFFSETS, numbers["estimate"].T, color=style.ESTIMATE, lw=1.5)
    left.plot(OFFSETS, numbers["truth"][0], color=style.TRUTH)
    for truth, guess in zip(numbers["truth"], numbers["estimate"]):
        best = guess.argmax()
        left.plot([OFFSETS[best]] * 2, [truth[best], guess[best]], "o:", color=style.POLICY, lw=1.5)
    left.text(-0.27, 5.5, "near the data", color=style.words(style.DATA))
    left.text(0.31, 4.5, "estimates", color=style.ESTIMATE)
    left.text(0.45, -0.5, "truth")
    left.text(0.72, 5.5, "chosen", color=style.POLICY)
    left.set(title="Fourteen policies, judged", xlabel="offset of the action", ylabel="value",
             ylim=(None, 6.2))
    errors = abs(numbers["estimate"] - numbers["truth"])
    right.plot(numbers["distance"].T, errors.T, "o", color=style.ESTIMATE, ms=4)
    right.set(title="Error of the estimate", xlabel="distance from the data", yscale="log")
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    print("mean errors:", abs(found["estimate"] - found["truth"]).mean(axis=0).round(2))
