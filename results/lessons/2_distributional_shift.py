"""Lesson 2: distributional shift.

Notes: Offline RL的主要问题 ⇒ Distributional Shift.
Claim: offline, Q is asked about actions that nobody tried; it answers too high, the policy goes
there, and no new data correct it. The Bellman error on the batch shows nothing of it.
离线时没人试过的动作被高估，策略就往那里去，又没有新数据来纠正；而数据上的贝尔曼误差几乎为零。
See: left, Q rises over all actions, far above what any policy can earn; right, belief and truth
part offline, and meet where the same program may try its actions and store what it got.
Imprecise in the notes: Q is too high at the data's own actions as well, bootstrapping pulls them
along; what stays small is the Bellman error on the batch. (The rewards of these data rise towards
one edge, which makes the effect strong; data whose rewards are only noise show it more weakly.)
Read next: algorithms/sac.py.
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
import sac
import torch

torch.set_num_threads(1)
GAMMA = 0.9
OBS = torch.zeros(64, 3)  # one state for ever
ALL_ACTIONS = torch.linspace(-1, 1, 64)[:, None]
reward = lambda action: torch.minimum(action, 0.9 - 2 * action)  # at most 0.3: no value is over 3


@patch.object(sac, "HIDDEN", (32, 32))  # small networks are enough
def train(updates, online):
    """SAC on 256 actions within ±0.2; `online` adds one action of the policy after each update."""
    action = 0.4 * torch.rand(256, 1) - 0.2
    actor, critic = sac.Actor(3, 1), sac.Critic(3, 1)
    critic_target = copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    entropy_coef = torch.tensor(0.007)
    history = []
    for step in range(updates + 1):
        rows = torch.randint(len(action), (64,))
        batch = Batch(OBS, action[rows], reward(action[rows])[:, 0], OBS, torch.zeros(64))
        y = sac.soft_td_target(actor, critic_target, entropy_coef, batch, GAMMA)
        q_loss, _ = sac.critic_loss(critic, batch, y)
        own = sac.sample_action(*actor(OBS))[0].detach()  # what the policy would do
        if step % 20 == 0:
            belief = critic(OBS, own).amin(dim=0).mean()
            q = critic(OBS, ALL_ACTIONS).amin(dim=0)
            history.append({"step": step, "belief": belief.item(), "q": q.tolist(),
                            "truth": reward(own).mean().item() / (1 - GAMMA),
                            "bellman_error": q_loss.item() / 2})  # two critics, summed
        sac.descend(q_loss, critic_optimizer)
        sac.descend(sac.actor_loss(actor, critic, entropy_coef, OBS)[0], actor_optimizer)
        sac.polyak_update(critic_target, critic, 0.05)
        if online:
            action = torch.cat([action, own[:1]])
    return history


def experiment(short: bool = False, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return {name: train(450 if short else 600, name == "online") for name in ("offline", "online")}


def check(numbers) -> None:
    offline, online = numbers["offline"][-1], numbers["online"][-1]
    assert offline["belief"] > 3.5 and offline["belief"] - offline["truth"] > 12
    assert offline["bellman_error"] < 0.02
    assert abs(online["belief"] - online["truth"]) < 2


def draw(numbers, path) -> None:
    offline = numbers["offline"]
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=(1.2, 1), sharey=True)
    left.axvspan(-0.2, 0.2, color=style.DATA, alpha=0.3, linewidth=0)
    error = f"data: Bellman\nerror {offline[-1]['bellman_error']:.4f}"
    left.text(0, -6.5, error, color="#555555", ha="center")
    for row, alpha in ((offline[10], 0.35), (offline[20], 0.6), (offline[-1], 1.0)):
        left.plot(ALL_ACTIONS, row["q"], color=style.ESTIMATE, alpha=alpha)
        left.text(-1, row["q"][20] + 0.3, f"{row['step']} updates", color=style.ESTIMATE)
    left.plot(ALL_ACTIONS, reward(ALL_ACTIONS) + GAMMA * offline[-1]["truth"], color=style.TRUTH)
    left.text(-1, -9.3, "true Q")
    left.plot(1, offline[-1]["q"][-1], "o", color=style.POLICY, markersize=11)
    left.text(0.95, offline[-1]["q"][-1] + 1, "SAC acts here", color=style.POLICY, ha="right")
    left.set(xlabel="action", ylabel="Q", title="Offline, Q rises everywhere", ylim=(-12, 11),
             xticks=(-1, -0.5, 0, 0.5, 1))
    for name, line in (("offline", "-"), ("online", "--")):
        for key, color in (("belief", style.ESTIMATE), ("truth", style.TRUTH)):
            values = [row[key] for row in numbers[name]]
            right.plot([row["step"] for row in numbers[name]], values, line, color=color)
    for y, text in ((0, "online: both"), (9.3, "offline: believed"), (-10.2, "offline: true")):
        right.text(600, y, text, ha="right")
    right.axhline(3, color=style.TRUTH, linestyle=":", linewidth=1)
    right.set(xlabel="updates", title="Value of SAC's own action (at most 3)")
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print({k: (rows[-1]["belief"], rows[-1]["truth"]) for k, rows in results.items()})
