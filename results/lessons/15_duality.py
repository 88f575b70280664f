"""Lesson 15: by duality the residual of Q is a ratio of densities, but not if steps are random.

Notes: references, Nachum & Dai (Fenchel-Rockafellar duality).
Claim: where the dual objective is least, the Bellman residual of Q is the ratio of the policy's
visits to the data's. If steps are random, and each shows one sampled next state, it is not.
对偶目标取到最小时，Q 的贝尔曼残差就是策略与数据访问频率之比；若转移随机而只采样一次，则不成立。
See: left, the red dots, learnt by networks, lie on the black line, the exact ratio. The residual of
the official code (orange) is right in the first cell only. Right, in a slippery corridor one
sampled next cell is not enough. (The policy goes right from cell 0; the data are mostly in the
middle.)
Imprecise in the notes: they only name the reference. That nobody has to estimate a ratio is true of
the objective, not of its estimate from single samples. algae_dice.py does as that code by default.
Read next: algorithms/algae_dice.py.
"""
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import algae_dice
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
CELL = torch.eye(8)  # observations are one-hot
RIGHT = CELL[[1, 2, 3, 4, 5, 6, 7, 7]]  # where the policy goes; it stays in the last cell
REWARD = torch.tensor([0.0, 1, 0, -1, 0, 0, 0, 2])
ROWS = torch.tensor([5, 8, 14, 20, 14, 9, 6, 4])  # of the data, by cell
SLIPS = [0.0, 0.1, 0.2, 0.3]  # chances to slip back to the first cell


def true_ratio(slip):
    """The policy's discounted share of time in each cell, divided by the data's."""
    step = slip * CELL[0] + (1 - slip) * RIGHT
    return 0.2 * torch.linalg.inv(CELL - 0.8 * step)[0] * ROWS.sum() / ROWS


def learn(slip=0.0, average=False, online_share=1.0, hidden=(), rate=0.05):
    """Residual / w and reward of the data's rows; without `hidden` layers Q is a table."""
    rows = ROWS if slip == 0 else 10 * ROWS
    cell = torch.arange(8).repeat_interleave(rows)
    slipped = torch.cat([torch.arange(num) < slip * num - 0.01 for num in rows]).float()[:, None]
    if average:  # a table's value of the mean next observation is the mean of its values
        slipped = torch.full_like(slipped, slip)
    next_obs = slipped * CELL[0] + (1 - slipped) * RIGHT[cell]
    zeros = torch.zeros(len(cell))  # there is one action and no end
    batch = Batch(CELL[cell], zeros.unsqueeze(1), REWARD[cell], next_obs, zeros)
    policy = lambda obs: (torch.zeros(len(obs), 1), torch.full((len(obs), 1), -20.0))
    with patch.object(algae_dice, "HIDDEN", hidden):
        critic = algae_dice.Critic(8, 1)
    nets = critic, lambda obs, action: critic(obs, action).detach(), torch.tensor(0.0)
    args = algae_dice.Args(gamma=0.8, exponent=2.0, initial_weight=0.2, online_share=online_share)
    optimizer = torch.optim.Adam(critic.parameters(), lr=rate)
    for k in range(600):
        optimizer.param_groups[0]["lr"] = rate * (1 - k / 600)
        loss, _ = algae_dice.critic_loss(policy, *nets, batch, CELL[:1], args)
        algae_dice.descend(loss, optimizer)
    action, log_prob = algae_dice.sample_action(*policy(next_obs))
    residual = algae_dice.bellman_residual(*nets, batch, action, log_prob, args)
    return residual.mean(dim=0).detach() / 0.2, batch.reward


def experiment(short: bool = False, seed: int = 0) -> dict:
    """Ratios by cell, (8,) and (seeds, 8); mean rewards by the chance to slip."""
    torch.manual_seed(seed)
    first = ROWS.cumsum(dim=0) - ROWS  # a row of each cell
    nets = [learn(hidden=(32, 32), rate=2e-3)[0][first].tolist() for _ in range(1 if short else 3)]
    mixture, _ = learn(online_share=0.05)
    numbers = {"exact": true_ratio(0.0), "learnt": nets, "mixture": mixture[first]}
    slips = SLIPS[:2 if short else 4]
    numbers["truth"] = [(true_ratio(slip) * ROWS / 80) @ REWARD for slip in slips]
    for name in ("one sample", "average"):
        found = [learn(slip, average=name == "average") for slip in slips]
        numbers[name] = [(weight * reward).mean() for weight, reward in found]
    return {name: torch.as_tensor(values).numpy() for name, values in numbers.items()}


def check(numbers: dict) -> None:
    exact, learnt, mixture = (numbers[name] for name in ("exact", "learnt", "mixture"))
    truth, sample, average = (numbers[name] for name in ("truth", "one sample", "average"))
    assert (abs(learnt - exact) < 0.3).all() and exact[-1] > 4, "the residual is the ratio"
    assert (abs(mixture[1:]) < 0.3).all(), "the mixture's is not"
    assert (abs(average - truth) < 0.03).all() and sample[1] > truth[1] + 0.4, "random steps"


def draw(numbers: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(1.3, 1))
    left.plot(numbers["exact"], color=style.TRUTH)
    left.plot(numbers["mixture"], "o-", color=style.SECOND, lw=1.5)
    left.plot(numbers["learnt"].T, "o", color=style.ESTIMATE)
    left.text(1, 2.6, "exact")
    left.text(1, 2.2, "residual of Q, learnt", color=style.ESTIMATE)
    left.text(1.5, 0.15, "residual in the official code", color=style.words(style.SECOND))
    left.set(title="Policy's share of time / data's", xlabel="cell of the corridor", ylabel="ratio")
    right.plot(SLIPS, numbers["truth"], color=style.TRUTH)
    right.plot(SLIPS, numbers["one sample"], "o-", color=style.ESTIMATE)
    right.plot(SLIPS, numbers["average"], "o", color=style.SECOND)
    right.text(0.3, 0.85, "one sampled next cell", color=style.ESTIMATE, ha="right")
    right.text(0.3, 0.1, "truth; dots: mean over next cells", ha="right")
    right.set(title="If steps are random: mean reward", xlabel="chance to slip", ylim=(0, 1.1))
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    print("a slip of 0.1:", *(f"{k} {found[k][1]:.2f}" for k in ("truth", "one sample", "average")))
