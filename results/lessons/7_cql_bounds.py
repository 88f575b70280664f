"""Lesson 7: what the three printed forms of CQL bound from below.

Notes: Value Function Regularization › CQL.
Claim: pushing down alone bounds every Q from below. Pulling the data up as well bounds only V. The
log-sum-exp used in practice bounds V of policies near softmax(Q), not of one close to the data.
只压低：每个 Q 都是下界；再抬高数据：只有 V 是下界；log-sum-exp 只对接近 softmax(Q) 的策略成立。
See: estimate minus truth for a policy that goes left in 98% of its steps; the data do in 80%. First
panel: all is too low. Second: some Q (red) are too high, no V (blue). Third: every V is too high.
Imprecise in the notes: they deduce V̂ ≤ V from Q̂ ≤ Q for CQL-H; the first holds, the second fails.
In the practical form their mean is under π̂_θ, the learned policy; it must be π̂_β, the data's.
Read next: algorithms/cql.py and its --form.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import cql
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
GAMMA, WEIGHT = 0.9, torch.tensor(0.3)
STATE = torch.arange(5).repeat_interleave(20)[:, None]  # 20 rows in each of 5 states of a chain:
ACTION = (torch.arange(100) % 5 == 4).long()[:, None]  # 80% go left (0), 20% go right (1)
FORMS = {"push down only": 0.0, "and pull the data up": 1.0, "log-sum-exp": 1.0}  # data_weight
POLICIES = {"unlike the data": 0.3, "the data's mode": 0.98}  # share of steps to the left


def backup(reward, value):
    """r + γ V(s′), (5, 2). Beyond either end of the chain the episode is over."""
    beyond = torch.cat([torch.zeros(1), value, torch.zeros(1)])
    return reward + GAMMA * torch.stack([beyond[:-2], beyond[2:]], dim=1)


def estimate(form, reward, share_left, steps):
    """CQL's Q (5, 2) and the policy (5, 2); share_left None stands for softmax(Q)."""
    table = torch.zeros(5, 2, requires_grad=True)
    optimizer = torch.optim.SGD([table], lr=2.0)
    critic = lambda obs, action: table[obs[:, 0], action[:, 0]][None]
    for _ in range(steps):
        policy = table.detach().softmax(dim=1)
        if share_left is not None:
            policy = torch.tensor([share_left, 1 - share_left]).expand(5, 2)
        if form == "log-sum-exp":
            both = torch.arange(2).expand(100, 2)[..., None]
            push = cql.soft_max_q(critic, STATE, both, torch.zeros(100, 2))
        else:  # 50 actions in the policy's proportions
            actions = (torch.arange(50) >= 50 * share_left).long().expand(100, 50)[..., None]
            push = cql.mean_q(critic, STATE, actions)
        y = backup(reward, (policy * table.detach()).sum(dim=1))[STATE[:, 0], ACTION[:, 0]]
        batch = Batch(STATE, ACTION, None, None, None)  # y is exact, so nothing else is needed
        cql.descend(cql.critic_loss(critic, batch, y, push, WEIGHT, FORMS[form])[0], optimizer)
    return table.detach(), policy


def experiment(short: bool = False, seed: int = 0) -> dict:
    """Estimate minus truth, of Q and of V, for each policy and form."""
    torch.manual_seed(seed)
    reward = 0.1 * torch.rand(5, 2)
    reward[0, 0] += 0.2  # the way out on the left
    reward[4, 1] += 1.0  # the way out on the right
    numbers = {}
    for name, share_left in (POLICIES | {"softmax(Q)": None}).items():
        for form in list(FORMS)[2:] if share_left is None else FORMS:
            q, policy = estimate(form, reward, share_left, 400 if short else 1000)
            truth = torch.zeros(5, 2)
            for _ in range(300):
                truth = backup(reward, (policy * truth).sum(dim=1))
            error = q - truth
            numbers[name, form] = error.tolist(), (policy * error).sum(dim=1).tolist()
    return numbers


def check(numbers) -> None:
    for (name, form), (q_error, v_error) in numbers.items():
        highest_q = max(map(max, q_error))
        if form == "push down only":
            assert highest_q < 0 and max(v_error) < 0
        elif form == "and pull the data up":
            assert highest_q > 0.05 and max(v_error) < 0
        else:
            assert min(v_error) > 0.02 if name == "the data's mode" else max(v_error) < 0


def draw(numbers, path) -> None:
    _, axes = plt.subplots(1, 3, figsize=(9, 4), sharey=True)
    for axis, form in zip(axes, FORMS):
        q_error, v_error = numbers["the data's mode", form]
        axis.axhspan(0, 0.3, color=style.ESTIMATE, alpha=0.1)
        for action, marker in enumerate("<>"):
            axis.plot(torch.arange(5) + 0.4 * action - 0.2, [q[action] for q in q_error], marker,
                      color=style.ESTIMATE, markersize=8)
        axis.plot(v_error, "o-", color=style.POLICY, markersize=8)
        axis.set(title=form, xlabel="state", xticks=range(5), ylim=(-0.8, 0.3))
    axes[0].text(0, 0.2, "too high", color=style.ESTIMATE)
    axes[1].text(0.9, 0.14, "Q(right)", color=style.ESTIMATE)
    axes[1].text(0.3, -0.25, "V, and Q(left)", color=style.POLICY)
    axes[0].set_ylabel("estimate minus truth")
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print({key: (max(map(max, q)), max(v)) for key, (q, v) in results.items()}, "largest errors")
