"""Lesson 11: REM removes most of Ensemble-DQN's optimism, and so does a plain mean of the heads.

Notes: Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN; REM.
Claim: it holds only in part. Mixing the heads before the maximum removes most of what they promise
for untried actions. A fixed mean does this as well as REM's random weights. What the random weights
add is that the heads grow together.
先混合多头再取最大值，可以消去大部分乐观估计；固定取均值也能做到，随机权重的作用是把各头拉到一起。
See: left, red promises twice what orange does, and the dashed mean no more than orange. Middle, the
mean leaves the heads as different as they were at the start. Right, a hundred heads in place of ten
help REM, not the ensemble. (A corridor where all is worth 0. The data know two of eight actions.)
Imprecise in the notes: 直接取多头Q的均值，不够准确, that the mean is not accurate enough, does not
show. What REM gains over Ensemble-DQN is Jensen's inequality: the maximum of a mean is at most the
mean of the maxima. Noise in the data remains, as all heads share it. REM is of ICML 2020.
Read next: algorithms/rem.py, and algorithms/dqn.py before it.
"""
import copy
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import matplotlib.pyplot as plt
import numpy as np
import rem
import torch

torch.set_num_threads(1)
CELLS, ACTIONS, ROWS = 6, 8, 200
COLOURS = {"Ensemble-DQN": style.ESTIMATE, "REM": style.SECOND, "mean": style.SECOND}


def head_weights(method, num_heads):
    """(C, K): the mixtures of heads that have to be consistent."""
    if method == "mean":  # always the same one
        return torch.full((1, num_heads), 1 / num_heads)
    return rem.head_weights(num_heads, method == "Ensemble-DQN", torch.device("cpu"))


@patch.object(rem, "HIDDEN", (32,))  # a small network for a small problem
def learn(method, num_heads):
    """400 updates; each 50: mean Q of the data's actions, and the spread of the heads there."""
    cell, action = torch.randint(CELLS, (ROWS,)), torch.randint(2, (ROWS,))  # left or right
    obs, next_obs = (torch.eye(CELLS)[x.clamp(0, CELLS - 1)] for x in (cell, cell + 2 * action - 1))
    q_net = rem.QNetwork((CELLS,), ACTIONS, num_heads)
    q_target = copy.deepcopy(q_net)
    optimizer = torch.optim.Adam(q_net.parameters(), lr=2e-3)
    record = []
    for step in range(401):
        if step % 50 == 0:
            rem.copy_weights(q_target, q_net)
            q = q_net(torch.eye(CELLS)).detach()[:, :, :2]  # (K, cells, known actions)
            record.append([q.mean().item(), q.std(dim=0, correction=0).mean().item()])
        rows = torch.randint(ROWS, (32,))
        batch = Batch(obs[rows], action[rows], torch.zeros(32), next_obs[rows], torch.zeros(32))
        weights = head_weights(method, num_heads)
        y = rem.td_target(q_target, weights, batch, gamma=0.9)
        rem.descend(rem.critic_loss(q_net, weights, batch, y)[0], optimizer)
    return record


def experiment(short: bool = False, seed: int = 0) -> dict:
    """By method and number of heads: (seeds, moments, promise and spread)."""
    variants = [("REM", 1), ("REM", 100), ("Ensemble-DQN", 100)]  # one head is DQN
    numbers = {variant: [] for variant in [(method, 10) for method in COLOURS] + variants}
    for variant, runs in numbers.items():
        for one in range(seed, seed + (1 if short else 3)):
            torch.manual_seed(one)
            runs.append(learn(*variant))
    return {variant: np.array(runs) for variant, runs in numbers.items()}


def check(numbers: dict) -> None:
    promise, spread = ({key: runs[:, -1, i] for key, runs in numbers.items()} for i in (0, 1))
    assert (promise["REM", 10] < 0.7 * promise["Ensemble-DQN", 10]).all(), "less optimism"
    assert (promise["mean", 10] < 0.7 * promise["Ensemble-DQN", 10]).all(), "by the mean, too"
    assert (spread["REM", 10] < 0.85 * spread["mean", 10]).all(), "REM draws its heads together"
    assert (promise["REM", 100] < 0.07).all(), "more heads help REM"
    assert (promise["Ensemble-DQN", 100] > 0.15).all(), "they do not help the ensemble"


def draw(numbers: dict, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 4), width_ratios=(1.5, 1, 1))
    for method, colour in COLOURS.items():
        line = "--" if method == "mean" else "-"
        left.plot(range(0, 401, 50), numbers[method, 10][..., 0].T, line, color=colour, lw=1.5)
        middle.plot(range(0, 401, 50), numbers[method, 10][..., 1].T, line, color=colour, lw=1.5)
    for method in ("Ensemble-DQN", "REM"):
        ends = [numbers[key][:, -1, 0] for key in (("REM", 1), (method, 10), (method, 100))]
        right.plot(["1", "10", "100"], ends, "o-", color=COLOURS[method], lw=1.5, ms=4)
    left.axhline(0, color=style.TRUTH)
    right.axhline(0, color=style.TRUTH)
    left.text(410, 0.275, "Ensemble-DQN", color=style.ESTIMATE, ha="right")
    left.text(410, 0.115, "REM and the mean (dashed)", color=style.words(style.SECOND), ha="right")
    left.text(410, 0.008, "truth", ha="right")
    middle.text(400, 0.177, "the mean (dashed)", color=style.words(style.SECOND), ha="right")
    left.set(title="All is worth 0", xlabel="updates", ylabel="mean Q", ylim=(None, 0.3))
    middle.set(title="Spread of the heads", xlabel="updates", ylabel="standard deviation",
               ylim=(0, 0.19))
    right.set(title="More heads", xlabel="number of heads", ylabel="mean Q")
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    print({variant: float(runs[:, -1, 0].mean().round(3)) for variant, runs in found.items()})
