"""Lesson 14: agents that learn alone may not fit together; MABCQ's weights repair it, at a price.

Notes: Offline RL的研究热点, and the last reference (Jiang & Lu).
Claim: agents that learn alone, each from what the other did in the data, can choose actions that do
not fit together. MABCQ weights the data as if the other learned, too. This repairs the team here,
but it mistakes luck for a partner.
各自独立学习的智能体按别人过去的行为作选择，可能互不匹配；加权可以修正，但会把运气误当作队友。
See: left, the game. Grey dots are the data; the blue cross, what the two choose alone, pays 0; the
orange disc, what they choose with weights, pays 6. Middle, why: each agent's Q of its own actions.
Right, luck in the place of a partner: with weights a gamble that is worth less looks better.
Imprecise in the notes: they only name the topic. A weighted Q is no value: it ranks actions, and
here it promises more than 4 for every action. How the factors enter the loss is our reading of the
paper. tests/test_mabcq.py plays the game with continuous actions and networks.
Read next: algorithms/mabcq.py, and algorithms/bcq.py before it.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import mabcq
import matplotlib.pyplot as plt
import numpy as np
import torch

torch.set_num_threads(1)
GAME = torch.tensor([[5.0, 0.0], [0.0, 6.0]])  # A and A pay 5, B and B pay 6
CHANCE_OF_B = torch.tensor([0.35, 0.65])  # of the two agents, in the data
COLOURS = {"alone": style.POLICY, "weighted": style.SECOND}


def learn(own, other, value, method):
    """Q of one agent's own actions 0 and 1, (2,), where MABCQ's critic loss is least.

    It sees its own action (B,) and the state that follows, which shows what the other did (B,) and
    is worth `value` (B,). Both models that MABCQ fits are counts here.
    """
    alike = own.unsqueeze(1) == own  # (B, B): plays with the same action of its own
    mean_value = (alike * value).sum(dim=1) / alike.sum(dim=1)
    chance = (alike & (other.unsqueeze(1) == other)).sum(dim=1) / alike.sum(dim=1)
    error = (-2 * chance.log()).sqrt().unsqueeze(1)  # of exp(−error²/2) = chance
    weight = torch.ones_like(value)
    if method == "weighted":
        weight = mabcq.transition_weights(value, mean_value, error, other_dims=1, weight_clip=10.0)
    batch = Batch(None, own, None, None, None)
    loss = lambda q: mabcq.critic_loss(lambda _, a: q[a].unsqueeze(0), batch, value, weight)[0]
    # the loss is quadratic, so its slope is linear in q: one solve finds where it is 0
    slope = torch.func.grad(loss)
    zero = torch.zeros(2)
    return -torch.linalg.solve(torch.func.jacrev(slope)(zero), slope(zero))


def experiment(short: bool = False, seed: int = 0) -> dict:
    """Plays, Q of both agents and of a gamble, and what the team earns; one entry per seed."""
    numbers = {"plays": [], "data": [], "alone": [], "weighted": []}
    gamble = torch.arange(2).repeat_interleave(100)  # a sure 2, or 5 with chance 0.2, else 1
    luck = torch.tensor([0] * 100 + [1] * 20 + [0] * 80)
    prize = torch.tensor([2.0] * 100 + [5.0] * 20 + [1.0] * 80)
    for one in range(seed, seed + (1 if short else 3)):
        torch.manual_seed(one)
        plays = (torch.rand(400, 2) < CHANCE_OF_B).long()
        earned = GAME[plays[:, 0], plays[:, 1]]
        numbers["plays"].append(plays.numpy())
        numbers["data"].append(float(earned.mean()))
        for method in COLOURS:
            q = torch.stack([learn(plays[:, i], plays[:, 1 - i], earned, method) for i in (0, 1)])
            choice = q.argmax(dim=1).tolist()
            found = {"q": q.flatten().tolist(), "choice": choice, "earns": float(GAME[*choice])}
            found["gamble"] = learn(gamble, luck, prize, method).tolist()
            numbers[method].append(found)
    return numbers


def check(numbers: dict) -> None:
    for alone, weighted, data in zip(numbers["alone"], numbers["weighted"], numbers["data"]):
        assert alone["earns"] < data - 1 and weighted["earns"] == 6, "alone worse than the data"
        assert max(alone["gamble"]) == alone["gamble"][0], "alone, the sure 2 is right"
        assert weighted["gamble"][1] > weighted["gamble"][0] + 1, "weights take luck for a partner"


def draw(numbers: dict, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 4), width_ratios=(1.5, 1.4, 1))
    plays = numbers["plays"][0]
    jitter = np.random.default_rng(0).normal(scale=0.09, size=plays.shape)
    left.plot(*(plays + jitter).T, ".", color=style.DATA, ms=3)
    for a, b in np.ndindex(2, 2):
        left.text(a, b + 0.3, f"pays {GAME[a, b]:.0f}", ha="center")
    for method, marker, shift in (("alone", "X", -0.2), ("weighted", "o", 0.2)):
        found, colour = numbers[method][0], COLOURS[method]
        left.plot(*found["choice"], marker, color=colour, ms=16)
        left.text(found["choice"][0], found["choice"][1] - 0.35, method, ha="center",
                  color=style.words(colour))
        middle.bar(np.arange(4) + shift, found["q"], 0.38, color=colour)
        right.bar(np.arange(2) + shift, found["gamble"], 0.38, color=colour)
    left.set(title="The game, and what they choose", xlabel="agent 1", ylabel="agent 2",
             xticks=[0, 1], xticklabels="AB", xlim=(-0.5, 1.5),
             yticks=[0, 1], yticklabels="AB", ylim=(-0.5, 1.5))
    middle.set(title="Q of their own actions", xlabel="agent and action", ylabel="Q")
    middle.set_xticks(range(4), ("1: A", "1: B", "2: A", "2: B"))
    right.set(title="Luck, no partner", ylabel="Q")
    right.set_xticks([0, 1], ["sure 2", "gamble,\nworth 1.8"])
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    print({method: [one["earns"] for one in found[method]] for method in COLOURS}, "is earned")
