"""Lesson 3: double estimates and target networks do not cure it.

Notes: Offline RL的主要问题 ⇒ Distributional Shift.
Claim: slow target networks, Double DQN, the smaller of two critics and more data of the same kind
leave the overestimate as large as it is. Data of the other actions remove it.
目标网络、双估计、更多同类数据都治不好高估；覆盖其他动作的数据才行。
See: a red dot is what a method believes of its own action, a black bar what that is worth. The red
lines are long without and with the usual cures, shorter with fifty critics; with data of all
actions the belief is below the worth.
Imprecise in the notes: Double DQN helps online, against the bias of a noisy maximum. Offline the
error is a missing answer. Fifty critics help here; in lesson 10 even a hundred do not.
Read next: algorithms/dqn.py with --double, algorithms/edac.py.
"""
import copy
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import dqn
import matplotlib.pyplot as plt
import sac
import torch

torch.set_num_threads(1)
GAMMA = 0.9
OBS = torch.ones(64, 3)  # one state for ever
CASES = {"one critic,\nno target": dict(critics=1, target_rate=1.0),
         "slow\ntarget": dict(critics=1), "two critics,\nthe smaller": dict(),
         "16 times\nthe data": dict(rows=4096), "DQN": dict(double=False),
         "Double\nDQN": dict(double=True), "fifty\ncritics": dict(critics=50),
         "data of all\nactions": dict(width=1.0)}
reward = lambda action: torch.minimum(action, 0.9 - 2 * action)  # at most 0.3: no value is over 3


@patch.object(sac, "HIDDEN", (32, 32))  # small networks are enough
def train_sac(seed, updates, critics=2, target_rate=0.05, rows=256, width=0.2, entropy_coef=0.007):
    """SAC on actions within ±width: what it believes of its own action, and what that is worth."""
    torch.manual_seed(seed)
    action = width * (2 * torch.rand(rows, 1) - 1)
    actor, critic = sac.Actor(3, 1), sac.Critic(3, 1, critics)
    critic_target = copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=5e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    for _ in range(updates):
        tried = action[torch.randint(rows, (64,))]
        batch = Batch(OBS, tried, reward(tried)[:, 0], OBS, torch.zeros(64))
        y = sac.soft_td_target(actor, critic_target, entropy_coef, batch, GAMMA)
        sac.descend(sac.critic_loss(critic, batch, y)[0], critic_optimizer)
        sac.descend(sac.actor_loss(actor, critic, entropy_coef, OBS)[0], actor_optimizer)
        sac.polyak_update(critic_target, critic, target_rate)
    own = sac.sample_action(*actor(OBS))[0].detach()
    return critic(OBS, own).amin(dim=0).mean().item(), reward(own).mean().item() / (1 - GAMMA)


def train_dqn(seed, updates, double):
    """21 numbered actions, data of the middle five. Each reward is 1 less: no value is over −7."""
    torch.manual_seed(seed)
    rewards = reward(torch.linspace(-1, 1, 21)) - 1
    q_net = dqn.QNetwork((3,), 21)
    optimizer = torch.optim.Adam(q_net.parameters(), lr=1e-3)
    for step in range(2 * updates):
        if step % 50 == 0:
            q_target = copy.deepcopy(q_net)
        action = torch.randint(8, 13, (64,))
        batch = Batch(OBS, action, rewards[action], OBS, torch.zeros(64))
        y = dqn.td_target(q_net, q_target, batch, dqn.Args(gamma=GAMMA, double=double))
        dqn.descend(dqn.critic_loss(q_net, batch, y)[0], optimizer)
    belief, own = q_net(OBS)[0].max(dim=0)
    return belief.item(), rewards[own].item() / (1 - GAMMA)


def experiment(short: bool = False, seed: int = 0) -> dict:
    updates = 250 if short else 400
    return {name: (train_dqn if "double" in case else train_sac)(seed, updates, **case)
            for name, case in CASES.items()}


def check(numbers) -> None:
    for name in ("one critic,\nno target", "slow\ntarget", "two critics,\nthe smaller",
                 "16 times\nthe data"):
        belief, worth = numbers[name]
        assert belief > 3 and belief - worth > 12, name
    single, _ = numbers["DQN"]
    double, worth = numbers["Double\nDQN"]
    assert abs(single - double) < 0.1 and double - worth > 5
    belief, worth = numbers["fifty\ncritics"]
    assert belief < 3 and belief - worth < 10
    belief, worth = numbers["data of all\nactions"]
    assert belief < worth + 0.5


def draw(numbers, path) -> None:
    _, axis = plt.subplots(figsize=(9, 4.4))
    belief, worth = zip(*numbers.values())
    axis.vlines(range(8), worth, belief, color=style.ESTIMATE, alpha=0.5)
    axis.plot(belief, "o", color=style.ESTIMATE, markersize=10)
    axis.plot(worth, "_", color=style.TRUTH, markersize=22, markeredgewidth=4)
    axis.axvspan(-0.5, 5.5, color=style.ESTIMATE, alpha=0.08, linewidth=0)
    axis.axvspan(6.5, 7.5, color=style.POLICY, alpha=0.08, linewidth=0)
    axis.text(2.5, 11, "without and with the usual cures", color=style.ESTIMATE, weight="bold",
              ha="center")
    axis.text(7, 11, "coverage", color=style.POLICY, weight="bold", ha="center")
    axis.hlines([3, -7, 3], [-0.5, 3.5, 5.5], [3.5, 5.5, 7.5], color=style.TRUTH, ls=":", lw=1)
    axis.text(3.1, 3.5, "best possible")
    axis.set(xlim=(-0.5, 7.5), ylim=(-15, 13), ylabel="value",
             xticks=range(8), xticklabels=list(numbers),
             title="Value of its own action: believed (red), and true (black)")
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print({name.replace("\n", " "): pair for name, pair in results.items()})
