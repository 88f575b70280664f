"""Lesson 5: BCQ's rule in a table.

Notes: Policy Constraints › BCQ.
Claim: a maximum over all actions believes whatever untried pairs happen to be worth; a maximum over
the data's actions believes only what was seen.
对所有动作取最大会相信没试过的状态动作对；只在数据里的动作上取最大则不会。
See: the red arrows leave the grey bars, run into walls and lead nowhere; the blue arrows follow the
bars to the goal, and what they promise is what they earn.
Imprecise in the notes: they print the rule without what it protects from. In a table that is just
the first value of untried pairs, here 0. If it is −20, below all true values, a maximum over all
actions is right as well; with networks nobody chooses this value (lesson 2). And the rule needs a
seen action at each next state: with continuous states BCQ's generative model stands in for that.
Read next: algorithms/bcq.py.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import dqn
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

torch.set_num_threads(1)
ARGS, GOAL = dqn.Args(gamma=0.95), 24  # 5 × 5 rooms, numbered row by row; the last is the goal
SWAMP = torch.tensor([6, 7, 8, 11, 16, 18])  # to enter such a room costs 5, any other 1
DOWN, RIGHT = torch.tensor([0, 1, 0, -1]), torch.tensor([1, 0, -1, 0])  # of the four moves
ROW, COLUMN = torch.arange(25)[:, None] // 5, torch.arange(25)[:, None] % 5
NEXT = 5 * (ROW + DOWN).clamp(0, 4) + (COLUMN + RIGHT).clamp(0, 4)  # (25, 4); walls stop a move
REWARD = torch.where(torch.isin(NEXT, SWAMP), -5.0, -1.0)


def collect():
    """Which pairs the data hold: the moves right and down, and one in ten of the others."""
    seen = torch.rand(25, 4) < 0.1
    seen[:, :2] = NEXT[:, :2] != torch.arange(25)[:, None]
    seen[GOAL] = False
    return seen


def q_learning(seen, first_value, data_only):
    """300 sweeps over the data; `data_only` keeps unseen pairs from being the maximum."""
    room, action = seen.nonzero(as_tuple=True)
    next_room = NEXT[room, action]
    batch = Batch(room, action, REWARD[room, action], next_room, (next_room == GOAL).float())
    table = torch.full((25, 4), first_value)
    for _ in range(300):
        if data_only:
            table[:GOAL] = table[:GOAL].masked_fill(~seen[:GOAL], -torch.inf)
        look_up = lambda room: table[room]
        table[room, action] = dqn.td_target(look_up, look_up, batch, ARGS)
    return table


def describe(table):
    """The greedy moves, what they promise at the start, and what they earn."""
    greedy, value = table.argmax(dim=1, keepdim=True), torch.zeros(25)
    for _ in range(400):
        value = (REWARD + ARGS.gamma * value[NEXT]).gather(1, greedy)[:, 0]
        value[GOAL] = 0
    return {"greedy": greedy[:GOAL, 0].tolist(), "promises": table[0].max().item(),
            "earns": value[0].item()}


def experiment(short: bool = False, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    seen = collect()
    return {"seen": seen.tolist(), "all actions": describe(q_learning(seen, 0.0, False)),
            "the data's actions": describe(q_learning(seen, 0.0, data_only=True)),
            "all actions, from −20": describe(q_learning(seen, -20.0, data_only=False)),
            "best": describe(q_learning(torch.ones(25, 4) > 0, 0.0, data_only=False))}


def check(numbers) -> None:
    best = numbers["best"]["earns"]
    believer = numbers["all actions"]
    assert believer["promises"] > best + 5 and believer["earns"] < best - 5
    for name in ("the data's actions", "all actions, from −20"):
        assert max(abs(numbers[name][key] - best) for key in ("promises", "earns")) < 0.01


def draw(numbers, path) -> None:
    rooms = torch.zeros(25).index_fill(0, SWAMP, 1).index_fill(0, torch.tensor(GOAL), 2).view(5, 5)
    _, axes = plt.subplots(1, 2, figsize=(9, 5.3))
    colors = {"all actions": style.ESTIMATE, "the data's actions": style.POLICY}
    for axis, (name, color) in zip(axes, colors.items()):
        axis.pcolormesh(rooms, cmap=ListedColormap(["white", "#e2d5c8", "#ffe98a"]), ec="0.7")
        for room, action in torch.tensor(numbers["seen"]).nonzero():
            x, y = COLUMN[room] + 0.5, ROW[room] + 0.5
            axis.plot([x, x + 0.4 * RIGHT[action]], [y, y + 0.4 * DOWN[action]], style.DATA, lw=5)
        plan, x, y = numbers[name], COLUMN[:GOAL] + 0.5, ROW[:GOAL] + 0.5
        axis.quiver(x, y, RIGHT[plan["greedy"]], -DOWN[plan["greedy"]], color=color, scale=11,
                    width=0.012, zorder=3)
        axis.set_title(f"maximum over {name}:\npromises {plan['promises']:.1f}, "
                       f"earns {plan['earns']:.1f}", color=color)
        axis.text(0.55, 0.95, "start")
        axis.text(4.5, 4.6, "goal", ha="center")
        axis.set(xlim=(0, 5), ylim=(5, 0), aspect="equal", xticks=[], yticks=[])
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print({name: plan["promises"] for name, plan in results.items() if name != "seen"}, "promised")
