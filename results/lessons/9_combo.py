"""Lesson 9: COMBO is less cautious than CQL, as long as its model invents no rewards.

Notes: Value Function Regularization › COMBO.
Claim: it holds only in part. At the same weight, COMBO's value of a policy lies above CQL's and
below the truth. A model that promises too much lifts it above the truth.
同样的权重下，COMBO 的估值高于 CQL、低于真值；但若模型虚报奖励，这个下界就不再成立。
See: left, black above orange above red. Right, orange climbs through black. (A corridor whose last
cell pays 1 per step; the data go left, the policy that is judged goes right.)
Imprecise in the notes: the bound is on the value at the start, not on every Q, and needs enough
weight. "Less conservative" depends on the weight, too: CQL with half of it (dotted) has about the
same value at the start. The difference is where the caution falls: COMBO does not push Q down in
cells that the policy leaves behind.
Read next: algorithms/combo.py, and algorithms/cql.py beside it.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import combo
import cql
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
CELLS = 9
START = 3
GAMMA = 0.9
ROWS = 600  # transitions
CELL = torch.eye(CELLS, dtype=torch.float64)
POLICY = torch.tensor([0.1, 0.9], dtype=torch.float64)  # chances of left and right
STEPS = torch.stack([CELL[[0, *range(CELLS - 1)]], CELL[[*range(1, CELLS), CELLS - 1]]], dim=1)
WORLD = 0.9 * STEPS + 0.1 * STEPS.flip(1)  # chances (S, A, S'): one step in ten goes the other way
INVENTED = [0.0, 0.1, 0.2, 0.3, 0.4]  # what a dishonest model adds to each reward


def visits(chances):
    """Entry (s, t): how often the policy is in t after a start in s, discounted."""
    return torch.linalg.inv(CELL - GAMMA * torch.einsum("a,sat->st", POLICY, chances))


def judge(method, weight, pair, model, invented=0.0):
    """The policy's value in each cell, where learning with the method's own loss ends."""
    if method == "COMBO":  # as many imagined pairs (s, a), from where the policy goes in the model
        share = visits(model)[START].outer(POLICY).flatten()
        pair = torch.cat([pair, torch.multinomial(share, ROWS, replacement=True)])
    batch = Batch(pair // 2, pair % 2, None, None, None)
    def loss(table, y):
        critic = lambda cell, action: table[cell, action].unsqueeze(0)  # (1, B)
        mean_q = (table @ POLICY)[batch.obs].unsqueeze(0)  # takes the place of the soft maximum
        if method == "COMBO":
            return combo.critic_loss(critic, batch, ROWS, y, mean_q[:, ROWS:], weight)[0]
        return cql.critic_loss(critic, batch, y, mean_q, weight)[0]
    def slope(table):
        backup = CELL[-1][:, None] + GAMMA * model @ (table @ POLICY)
        y = backup.flatten()[pair] + invented * (torch.arange(len(pair)) >= ROWS)
        return torch.func.grad(loss)(table, y)  # without a gradient through the target
    # the loss is quadratic, so its slope is linear in the table: one solve finds where it is 0
    zero = torch.zeros(CELLS, 2, dtype=torch.float64)
    table = -torch.linalg.tensorsolve(torch.func.jacrev(slope)(zero), slope(zero))
    return (table @ POLICY).tolist()


def experiment(short: bool = False, seed: int = 0) -> dict:
    """Values of the policy (seeds, cells), and COMBO's at the start (seeds, invented rewards)."""
    numbers = {name: [] for name in ("truth", "half", "COMBO", "CQL", "invented")}
    for one in range(seed, seed + (2 if short else 10)):
        torch.manual_seed(one)
        pair = 2 * torch.randint(CELLS, (ROWS,)) + (torch.rand(ROWS) < 0.3)  # s and a as one number
        next_cell = torch.multinomial(WORLD.flatten(0, 1)[pair], 1)[:, 0]
        counts = torch.eye(2 * CELLS, dtype=torch.float64)[:, pair] @ CELL[next_cell]
        model = (counts / counts.sum(dim=1, keepdim=True)).view_as(WORLD)
        numbers["truth"].append((visits(WORLD) @ CELL[-1]).tolist())
        numbers["half"].append(judge("CQL", 0.1, pair, model))
        numbers["COMBO"].append(judge("COMBO", 0.2, pair, model))
        numbers["CQL"].append(judge("CQL", 0.2, pair, model))
        lied_to = [judge("COMBO", 0.2, pair, model, invented)[START] for invented in INVENTED]
        numbers["invented"].append(lied_to)
    return {name: torch.tensor(values).numpy() for name, values in numbers.items()}


def check(numbers: dict) -> None:
    by_seed = {name: numbers[name][:, START] for name in ("truth", "half", "COMBO", "CQL")}
    truth, half, ours, cautious = by_seed.values()
    assert (cautious + 0.3 < ours).all() and (ours < truth - 0.3).all(), "CQL, COMBO, truth"
    assert (abs(half - ours) < 0.4).all(), "CQL with half the weight is as cautious as COMBO"
    assert (numbers["invented"][:, -1] > truth + 0.7).all(), "invented rewards break the bound"


def draw(numbers: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(1.5, 1))
    curves = {"truth": ("truth", style.TRUTH, 8.1),
              "half": ("CQL, half weight", style.ESTIMATE, 7.3),
              "COMBO": ("COMBO", style.SECOND, 6.7),
              "CQL": ("CQL", style.ESTIMATE, 6.1)}
    for name, (label, colour, height) in curves.items():
        left.plot(numbers[name].mean(0), ":" if name == "half" else "o-", color=colour)
        left.text(CELLS - 0.8, height, label, color=style.words(colour), va="center")
    left.axvline(START, color=style.DATA, lw=1)
    left.text(START - 0.1, 8, "start", color=style.words(style.DATA), ha="right")
    left.set(title="CQL < COMBO < truth", xlabel="cell", ylabel="value (mean of ten data sets)")
    right.plot(INVENTED, numbers["invented"].T, color=style.SECOND, lw=1)
    right.axhline(numbers["truth"][0, START], color=style.TRUTH)
    right.text(0.4, 3.5, "truth", ha="right")
    right.text(0, 5, "COMBO's value\nat the start,\nten data sets", color=style.words(style.SECOND))
    right.set(title="A model that lies", xlabel="reward that it invents",
              ylabel="value at the start")
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    print(*(f"{name} {values[..., START].mean(0):.2f}" for name, values in found.items()))
