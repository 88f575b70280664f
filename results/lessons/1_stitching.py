"""Lesson 1: imitation copies, offline RL stitches.

Notes: Offline RL vs. IL(模仿学习).
Claim: a Decision Transformer asked for a return does what some episode of the data did, a clone
averages them; a method that learns values joins the good half of one to the good half of another.
模仿至多重复数据中的某一条轨迹，或把几条平均掉；学习价值的方法能把两条轨迹各自好的一半接起来。
See: each path of the data takes one box, IQL takes both. The transformer gets the 2 it is asked
for, and 2 again when asked for 3. The clone averages two modes and takes no box.
Imprecise in the notes: they do not say which methods can't stitch; the transformer is one here.
Read next: algorithms/iql.py; beside it algorithms/bc.py and algorithms/decision_transformer.py.
"""
import copy
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import bc
import decision_transformer as dt
import iql
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
ARCHES = (0.7, 1.0, 0.7, 0.0, -0.7, -1.0, -0.7, 0.0)  # heights: one arch up, then one down
BOXES = {1: 1.0, 5: 2.0}  # the reward for being above 0.6 after the second and the sixth step


@torch.no_grad()
def play(act, num=1):
    """E episodes of act(step k, obs (E, 9, 2), action (E, 8), reward (E, 8)); zeros from k on."""
    obs = torch.zeros(num, 9, 2)
    action = torch.zeros(num, 8)
    reward = torch.zeros(num, 8)
    obs[:, :, 0] = torch.arange(9) / 4 - 1  # an observation is the step, scaled, and the height
    for k in range(8):
        action[:, k] = act(k, obs, action, reward).clamp(-1, 1)
        limit = 0.2 if k == 3 else 1.1  # the fourth step leads through a door
        obs[:, k + 1, 1] = (obs[:, k, 1] + 0.75 * action[:, k]).clamp(-limit, limit)
        reward[:, k] = BOXES.get(k, 0.0) * (obs[:, k + 1, 1] > 0.6)
    return obs, action, reward


def experiment(short: bool = False, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    mode = 1 - 2 * (torch.arange(100) % 2)  # half the episodes: up, then down; half: down, then up
    obs, action, reward = play(lambda k, obs, *_: (
        (mode * ARCHES[k] - obs[:, k, 1]) / 0.75 + 0.1 * torch.randn(100)), 100)
    def window(obs, action, to_go):  # what a transformer reads: return still to come, obs, action
        step = torch.arange(8).expand(len(obs), -1)
        return dt.Window(obs[:, :-1], action[..., None], to_go, step, step >= 0)
    # the transformer reads eight episodes; with all 100 it earns the same
    sentences = window(obs[:8], action[:8], reward[:8].flip(1).cumsum(1).flip(1))
    with patch.object(iql, "HIDDEN", (64, 64)), patch.multiple(dt, WIDTH=32, LAYERS=2):  # small
        clone, transformer = bc.Actor(2, 1), dt.Actor(2, 1)
        actor, critic, value = iql.Actor(2, 1), iql.Critic(2, 1), iql.Value(2)
    critic_target = copy.deepcopy(critic)
    networks = torch.nn.ModuleList([clone, transformer, actor, critic, value])
    optimizer = torch.optim.Adam(networks.parameters(), lr=2e-3)  # each loss has its own networks
    for _ in range(400 if short else 600):
        i = torch.randint(100, (64,))  # episodes
        k = torch.randint(8, (64,))  # steps
        batch = Batch(obs[i, k], action[i, k, None], reward[i, k], obs[i, k + 1], (k == 7).float())
        q = iql.min_q(critic_target, batch)
        weight = iql.weights(iql.advantage(value, batch, q), beta=5.0, max_weight=100.0)
        loss = bc.actor_loss(clone, batch) + dt.action_loss(transformer, sentences, 0.0)
        loss += iql.value_loss(value, batch, q, 0.9) + iql.actor_loss(actor, batch, weight)
        loss += iql.critic_loss(critic, batch, iql.td_target(value, batch, gamma=1.0))[0]
        iql.descend(loss, optimizer)
        iql.polyak_update(critic_target, critic, 0.02)
    ask = lambda target: play(lambda k, obs, action, reward: transformer(
        window(obs, action, target - reward.cumsum(1) + reward))[:, k, 0])  # less what is earned
    runs = {"clone": play(lambda k, obs, *_: clone(obs[:, k])[:, 0]),
            "DT asked for 2": ask(2.0), "DT asked for 3 (dots)": ask(3.0),
            "IQL": play(lambda k, obs, *_: actor(obs[:, k])[0][:, 0])}
    return {"paths": {name: run[0][0, :, 1].tolist() for name, run in runs.items()},
            "returns": {name: run[2].sum().item() for name, run in runs.items()},
            "data": obs[:24, :, 1].tolist(), "best": reward.sum(1).max().item(),
            "value": value(obs[:1, 0]).item()}


def check(numbers) -> None:
    returns = numbers["returns"]
    assert returns["IQL"] == 3.0 > numbers["best"] == 2.0 and abs(numbers["value"] - 3) < 0.5
    assert returns["DT asked for 2"] == 2.0 >= returns["DT asked for 3 (dots)"]
    assert returns["clone"] < 1.5


def draw(numbers, path) -> None:
    _, axis = plt.subplots(figsize=(9, 4.2))
    axis.plot(list(zip(*numbers["data"])), color=style.DATA, linewidth=0.6)
    boxes = axis.bar([2, 6], 0.5, width=0.6, bottom=0.6, color="#ffe98a")
    axis.bar_label(boxes, ["+1", "+2"], padding=3, weight="bold")
    axis.vlines([4, 4], [-1.4, 0.2], [-0.2, 1.4], color="#444444", linewidth=6)
    labels = {"clone": (style.CLONE, "-", 1.2, -0.2), "IQL": (style.POLICY, "-", 0.1, 1.1),
              "DT asked for 2": (style.SECOND, "-", 0.8, -1.28),
              "DT asked for 3 (dots)": (style.SECOND, ":", 0.8, -1.5)}
    for name, (color, line, x, y) in labels.items():
        axis.plot(numbers["paths"][name], line, color=color, linewidth=4)
        axis.text(x, y, f"{name}: earns {numbers['returns'][name]:.0f}", weight="bold",
                  color=style.words(color))
    axis.set(xlabel="step", ylabel="height", ylim=(-1.6, 1.5),
             title="Each episode of the data (grey) takes one box; IQL takes both")
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print(results["returns"], "IQL's V(start):", results["value"])
