"""Lesson 12: dropout's variance follows the size of Q's activity, not the distance from the data.

Notes: Uncertainty-Based › UWAC (通过Monte Carlo Dropout去做不确定性估计).
Claim: the variance of Q under dropout is larger off the data if the data lie in the middle. It is
smallest in a hole between data, and it says nothing once a constant is added to all rewards.
数据在中间时，Dropout 方差越往外越大；数据中间有空洞时，空洞里反而最小；奖励都加一个常数后就失效。
See: left, a valley over the data. Middle, the valley lies over the hole, where ten critics disagree
most. Right, the ratio falls to 1. (One action between -1 and 1; its reward is its size.)
Imprecise in the notes: dropout does not measure novelty. For one hidden layer the variance is
p / (1 - p) Σ (u h)², the size of what the output adds up. The notes' formula has the noise σ² and
the weight β / Var; the released code has no σ², and the weight exp(-β Var) by default.
Read next: algorithms/uwac.py.
"""
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import edac
import matplotlib.pyplot as plt
import numpy as np
import torch
import uwac

torch.set_num_threads(1)
GRID = torch.linspace(-1, 1, 81)[:, None]
SIZE = GRID[:, 0].abs().numpy()
MIDDLE = torch.linspace(-0.2, 0.2, 64)[:, None]
ENDS = torch.cat([torch.linspace(-1, -0.6, 32), torch.linspace(0.6, 1, 32)])[:, None]
CONSTANTS = [0.0, 1.0, 2.0, 4.0]


@patch.object(edac, "HIDDEN", (32, 32))  # small networks for a small problem
@patch.object(uwac, "HIDDEN", (32, 32))
def variance_of_q(action, constant=0.0, dropout=True):
    """Learns the reward |a| + constant; the variance over passes or critics at all of GRID."""
    critic = uwac.Critic(1, 1) if dropout else edac.Critic(1, 1, num=10)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    batch = Batch(torch.zeros(64, 1), action, action[:, 0].abs() + constant, None, None)
    for _ in range(800 if constant > 1 else 400):
        if dropout:
            for layer in critic.layers:
                layer.follow()
            loss, _ = uwac.critic_loss(critic, batch, batch.reward, torch.ones(64), 0.1)
        else:
            loss, _ = edac.critic_loss(critic, batch, batch.reward, 10, 0.0)
        uwac.descend(loss, optimizer)
    if not dropout:
        return critic(torch.zeros(81, 1), GRID).var(dim=0).detach().numpy()
    args = uwac.Args(passes=400, dropout_rate=0.1)
    _, variance = uwac.mean_and_variance(critic, torch.zeros(1, 1), GRID[None], args)
    return variance[0].detach().numpy()


def experiment(short: bool = False, seed: int = 0) -> dict:
    """Variances (seeds, 81 actions); with the data in the middle (seeds, constants, 81)."""
    numbers = {"middle": [], "ends": [], "ten critics": []}
    for one in range(seed, seed + (1 if short else 3)):
        torch.manual_seed(one)
        some = CONSTANTS[::3 if short else 1]
        numbers["middle"].append([variance_of_q(MIDDLE, constant) for constant in some])
        numbers["ends"].append(variance_of_q(ENDS))
        numbers["ten critics"].append(variance_of_q(ENDS, dropout=False))
    return {name: np.array(values) for name, values in numbers.items()}


def ratio(variance, these, those):
    return variance[..., these].mean(axis=-1) / variance[..., those].mean(axis=-1)


def check(numbers: dict) -> None:
    off_on = ratio(numbers["middle"], SIZE > 0.78, SIZE < 0.21)  # (seeds, constants)
    assert (off_on[:, 0] > 5).all(), "data in the middle: larger off the data"
    assert (ratio(numbers["ends"], SIZE < 0.21, SIZE > 0.59) < 0.8).all(), "a hole: smallest there"
    assert (ratio(numbers["ten critics"], SIZE < 0.21, SIZE > 0.59) > 5).all(), "unlike ten critics"
    assert (abs(np.log(off_on[:, -1])) < 0.2).all(), "rewards plus 4: the same on and off the data"


def draw(numbers: dict, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 4), width_ratios=(1.1, 1.1, 1))
    left.plot(GRID, 1000 * numbers["middle"][:, 0].T, color=style.ESTIMATE, lw=1.5)
    middle.plot(GRID, 1000 * numbers["ends"].T, color=style.ESTIMATE, lw=1.5)
    middle.plot(GRID, 1000 * numbers["ten critics"].T, color=style.SECOND, lw=1.5)
    for ax, low, high in ((left, -0.2, 0.2), (middle, -1, -0.6), (middle, 0.6, 1)):
        ax.axvspan(low, high, color=style.DATA, alpha=0.4, lw=0)
    off_on = ratio(numbers["middle"], SIZE > 0.78, SIZE < 0.21)
    right.plot(CONSTANTS, off_on.T, "o-", color=style.ESTIMATE, lw=1.5, ms=4)
    right.axhline(1, color=style.TRUTH, ls="--")
    left.text(-0.16, 40, "data")
    left.text(-0.72, 32, "dropout", color=style.ESTIMATE)
    middle.text(-0.3, 2.7, "ten critics", color=style.words(style.SECOND))
    right.text(4, 0.75, "1: tells nothing", ha="right")
    left.set(title="Data in the middle", xlabel="action", ylabel="1000 · variance of Q")
    middle.set(title="Data at both ends", xlabel="action", ylim=(0, None))
    right.set(title="Variance off / on the data", xlabel="constant added to rewards", yscale="log",
              ylim=(0.6, None))
    right.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    print("off / on the data:", ratio(found["middle"], SIZE > 0.78, SIZE < 0.21).round(1).tolist())
