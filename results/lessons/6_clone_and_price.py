"""Lesson 6: a constraint is as good as its model of the data; and what a constraint costs.

Notes: Policy Constraints (软约束) › 问题.
Claim: a wrong model of the behaviour breaks the constraint. And where the data cover all actions,
the constraint only costs.
约束好坏取决于行为策略估计得准不准；数据已覆盖所有动作时，约束只有代价。
See: left, a Gaussian clone of two modes lies between them, where nothing is earned, and BRAC with
it; a VAE finds both. Right, the penalty saves the policy from a cliff, or costs most of the reward.
Imprecise in the notes: where "all actions have reward 0" every policy earns 0, so nothing is lost;
a constraint costs something only where the data hold better actions. And a wrong model need not
mean few data (left).
Read next: algorithms/brac.py; beside it algorithms/bcq.py, whose VAE is used here.
"""
import copy
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import bcq
import brac
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
WEIGHTS = (0.001, 0.1, 1, 10)
BRAC = [f"BRAC, weight {weight}" for weight in WEIGHTS]
STATES = torch.eye(3)  # three states, each for ever: two modes, narrow data, data of all actions


def reward(action):
    """Of actions (3, N): a peak at each mode; a cliff beyond 0.3; the more the better."""
    peaks = (1 - 4 * (action[0].abs() - 0.7).abs()).clamp(min=0)
    return torch.stack([peaks, torch.minimum(action[1], 0.9 - 2 * action[1]), action[2]])


def train_brac(batch, clone, weight, updates):
    critic = brac.Critic(3, 1)
    actor, critic_target = copy.deepcopy(clone), copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=5e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    args = brac.Args(gamma=0.9, divergence_weight=weight)
    for _ in range(updates):
        y = brac.td_target(actor, clone, critic_target, batch, args)
        brac.descend(brac.critic_loss(critic, batch, y)[0], critic_optimizer)
        pi_loss, _ = brac.actor_loss(actor, clone, critic, batch.obs, args, with_q=True)
        brac.descend(pi_loss, actor_optimizer)
        brac.polyak_update(critic_target, critic, 0.1)
    return actor


@patch.multiple(brac, HIDDEN=(64, 64), ACTOR_HIDDEN=(64, 64))  # small networks are enough
@patch.object(bcq, "VAE_HIDDEN", (64, 64))
def experiment(short: bool = False, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    updates = 200 if short else 300
    modes = 0.7 * (1 - 2 * (torch.arange(128) % 2)) + 0.04 * torch.randn(128)  # at −0.7 and 0.7
    everywhere = torch.tanh(0.8 * torch.randn(128) - 0.5)
    data = torch.stack([modes, 0.4 * torch.rand(128) - 0.2, everywhere])  # (3, 128), by state
    obs = STATES.repeat_interleave(128, dim=0)
    batch = Batch(obs, data.view(-1, 1), reward(data).flatten(), obs, torch.zeros(3 * 128))
    clone, vae = brac.Actor(3, 1), bcq.VAE(3, 1)
    optimizer = torch.optim.Adam([*clone.parameters(), *vae.parameters()], lr=5e-3)
    for _ in range(2 * updates):
        loss, _ = brac.behavior_loss(clone, torch.tensor(0.0), batch)
        brac.descend(loss + bcq.vae_loss(vae, batch)[0], optimizer)
    act = lambda actor: brac.sample_action(*(x.expand(3, 2000) for x in actor(STATES)))[0].detach()
    z = bcq.sample_latents(vae, STATES, 2000)
    proposals = torch.tanh(vae.decode(STATES[:, None].expand(-1, 2000, -1), z))[..., 0].detach()
    actions = {"data": data, "VAE": proposals, "Gaussian clone": act(clone)}
    actions |= {name: act(train_brac(batch, clone, w, updates)) for name, w in zip(BRAC, WEIGHTS)}
    return {"actions": {name: a[0].tolist() for name, a in actions.items()},
            "earned": {name: reward(a).mean(dim=1).tolist() for name, a in actions.items()}}


def check(numbers) -> None:
    earned = numbers["earned"]  # by state: two modes, narrow data, data of all actions
    data = earned["data"]
    tiny, _, middle, large = (earned[name] for name in BRAC)
    assert all(earned[name][0] < 0.5 * data[0] for name in BRAC), "between the modes"
    assert earned["VAE"][0] > 1.6 * earned["Gaussian clone"][0]
    assert tiny[1] < -0.2 and middle[1] > -0.1, "the cliff, and the policy kept from it"
    assert tiny[2] > 0.9 and middle[2] < 0.2 and abs(large[2] - data[2]) < 0.2, "the cost"


def draw(numbers, path) -> None:
    actions, earned = numbers["actions"], numbers["earned"]
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=(1.2, 1))
    colors = (style.DATA, style.SECOND, style.CLONE, style.POLICY)
    for row, (name, color) in enumerate(zip(("data", "VAE", "Gaussian clone", BRAC[-1]), colors)):
        kind = "stepfilled" if name == "data" else "step"
        left.hist(actions[name], 40, density=True, range=(-1, 1), color=color, histtype=kind, lw=2)
        left.text(0.5, 0.92 - 0.08 * row, f"{name}: {earned[name][0]:.2f}",
                  color=style.words(color), transform=left.transAxes, weight="bold", ha="center")
    left.set(xlabel="action", xticks=(-1, -0.5, 0, 0.5, 1), yticks=[], ylabel="how often",
             title="Two modes: who acts where, earns what")
    right.plot(WEIGHTS, [earned[name][1:] for name in BRAC], "o-", color=style.POLICY)
    right.text(10, 0.92, "data of all actions", color=style.POLICY, ha="right")
    right.text(0.012, -0.75, "narrow data,\na cliff beyond", color=style.POLICY)
    right.set(xscale="log", xlabel="weight of BRAC's penalty", ylabel="reward per step",
              title="What a penalty costs")
    right.set_xticks(WEIGHTS, WEIGHTS)
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print(results["earned"])
