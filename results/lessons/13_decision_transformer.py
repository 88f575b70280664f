"""Lesson 13: a Decision Transformer delivers the return it is asked for, as far as the data went.

Notes: Step By Step: SOTA1 — DT Decision Transformer.
Claim: asked for a return that the data contain, it delivers it. Beyond the best return a request is
a guess. Where luck pays, a request for luck buys lottery tickets.
要求的回报在数据范围内时，它能照办；超出数据最好回报时只是猜测；回报靠运气时，它会去“买彩票”。
See: left, the curves follow the diagonal up to the best return of the data. Beyond it, the same
policies do well or badly, as the world has it. Right, asked for 4 they buy a ticket, which is worth
less than the sure thing. (A walk whose steps pay their length, and a lottery.)
Imprecise in the notes: "striking" holds for requests inside the data. The transformer does not
stitch (lesson 1), knows nothing of what lies beyond, and takes luck for skill.
Read next: algorithms/decision_transformer.py.
"""
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style

import decision_transformer as dt
import matplotlib.pyplot as plt
import numpy as np
import torch

torch.set_num_threads(1)
ASKED = np.linspace(-1, 9, 21)  # of a walk of 8 steps; the data's are at most 0.6 long
TICKETS = np.linspace(0, 5, 11)  # of a lottery: a sure 2, or 4 with chance 0.3
WORLDS = {"goes on": lambda a: a, "cliff": lambda a: min(a, 3.1 - 4 * a)}  # equal up to a = 0.62


def fit(obs, action, reward, updates):
    """A transformer that learns from all windows of the episodes, (E, T) each."""
    to_go = reward.flip(1).cumsum(1).flip(1)
    step = torch.arange(action.shape[1]).expand_as(action)
    size = min(dt.CONTEXT, action.shape[1])
    windows = [x.unfold(1, size, 1).flatten(0, 1) for x in (obs, action, to_go, step)]
    actor = dt.Actor(1, 1)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(updates):
        rows = torch.randint(len(windows[0]), (64,))
        obs, action, to_go, step = (x[rows] for x in windows)  # (64, K) each
        window = dt.Window(obs[..., None], action[..., None], to_go, step, step >= 0)
        dt.descend_clipped(dt.action_loss(actor, window, dropout=0.0), optimizer, clip_norm=0.25)
    return actor


def play(actor, asked, worth, steps):
    """What the episodes earn, and their last action; each asks for another return."""
    player, place = actor.act, torch.zeros(len(asked), 1)
    player.start(len(asked))
    player.still_asked = asked.copy()
    for _ in range(steps):
        action = player(place)
        place = place + action
        for i, length in enumerate(action.flatten().tolist()):
            player.record(i, worth(length))
    return asked - player.still_asked, action.flatten().numpy()


@patch.multiple(dt, WIDTH=16, LAYERS=1, CONTEXT=4)  # a small transformer for small problems
def experiment(short: bool = False, seed: int = 0) -> dict:
    """Returns delivered by world (seeds, requests), actions of the lottery (seeds, requests)."""
    numbers = {"goes on": [], "cliff": [], "lottery": [], "data": []}
    for one in range(seed, seed + (1 if short else 3)):
        torch.manual_seed(one)
        length = (0.8 * torch.rand(200, 1) - 0.2 + 0.03 * torch.randn(200, 8)).clamp(max=0.6)
        place = length.cumsum(1) - length
        actor = fit(place, length, length, 600)
        numbers["data"].append(length.sum(1).numpy())
        for name, worth in WORLDS.items():
            numbers[name].append(play(actor, ASKED, worth, steps=8)[0])
        ticket = torch.arange(300)[:, None] % 2
        prize = torch.where(ticket == 1, 4.0 * (torch.rand(300, 1) < 0.3), 2.0)
        actor = fit(torch.zeros(300, 1), 1.6 * ticket - 0.8, prize, 300)
        numbers["lottery"].append(play(actor, TICKETS, WORLDS["goes on"], steps=1)[1])
    return {name: np.array(values) for name, values in numbers.items()}


def check(numbers: dict) -> None:
    ahead = numbers["goes on"]
    cliff = numbers["cliff"]
    lottery = numbers["lottery"]
    error = np.maximum(abs(ahead - ASKED), abs(cliff - ASKED))
    assert (error[:, ASKED <= 4.5] < 0.4).all(), "as asked, inside the data"
    assert ((cliff + 2 < ahead) & (ahead < 7))[:, ASKED == 8].all(), "beyond, the world decides"
    assert (lottery[:, 4] < -0.5).all() and (lottery[:, 8] > 0.5).all(), "4 buys a ticket"


def draw(numbers: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(1.7, 1))
    left.hist(numbers["data"][0], 20, color=style.DATA, weights=[0.1] * 200, bottom=-3.9)
    left.axvline(numbers["data"].max(), color=style.DATA, lw=1)
    left.plot(ASKED, ASKED, "--", color=style.TRUTH, lw=1)
    left.plot(ASKED, numbers["cliff"].T, color=style.SECOND, lw=1.5)
    left.plot(ASKED, numbers["goes on"].T, color=style.POLICY, lw=1.5)
    left.text(7.7, 8.6, "as asked", ha="right")
    left.text(-1.3, -2.4, "returns in the data", color=style.words(style.DATA))
    left.text(7.4, 4.7, "it goes on", color=style.POLICY)
    left.text(6, 0.4, "it has a cliff", color=style.words(style.SECOND))
    left.set(title="Same policies, two worlds", xlabel="return asked for", ylabel="delivered")
    right.plot(TICKETS, numbers["lottery"].T, "o-", color=style.POLICY, lw=1.5, ms=4)
    right.set(title="A sure 2, or 4 with chance 0.3", xlabel="return asked for",
              yticks=[-0.8, 0.8], yticklabels=["sure\n(2)", "ticket\n(1.2)"])
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    print("asked for 8:", {name: found[name][:, 18].round(1).tolist() for name in WORLDS})
