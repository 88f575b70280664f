"""Lesson 10: critics trained alike err alike; EDAC makes them disagree where there are no data.

Notes: Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN.
Claim: ten critics that were trained independently agree even where all of them are wrong. EDAC's
diversity term makes them differ there. The error on the data becomes 2 to 7 times as large.
独立训练的多个 Q 会一起犯同样的错；EDAC 让它们在数据之外产生分歧，代价是数据上的误差变为 2 到 7 倍。
See: left, a flat bundle of critics above the black hill. Middle, a fan, whose lower edge lies below
the hill. Right, the spread as a share of the error; a hundred critics (dotted) do no better. (One
state and two action dimensions. The data are a strip, which is seen here across.)
Imprecise in the notes: "bootstrap" is neither the cause nor the cure. Members that learn from their
own resamples agree almost as much. EDAC is a cure here, where the data leave a slope open; with one
action dimension it does nothing; where the data fill a square its minimum stays far too high.
Read next: algorithms/edac.py.
"""
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style
from common import Batch

import edac
import matplotlib.pyplot as plt
import torch

torch.set_num_threads(1)
ACROSS = torch.linspace(-0.8, 0.8, 65)  # actions across the strip of data
GRID = torch.cartesian_prod(ACROSS, torch.linspace(-0.5, 0.5, 21)).flip(1)  # (65 · 21, 2)


def true_reward(action):
    return -4 * action.pow(2).sum(dim=-1)


def by_distance(values):
    """Values of the grid, (65 · 21,), by their distance from the strip's middle, (33,)."""
    across = values.view(65, 21).mean(dim=1)  # the mean along the strip
    return (across + across.flip(0))[32:] / 2


@patch.object(edac, "HIDDEN", (32, 32))  # small networks for a small problem
def fit(num: int, diversity_weight: float) -> dict:
    """Critics learn the rewards of 512 actions in the strip, and are asked for all of the grid."""
    action = (2 * torch.rand(512, 2) - 1) * torch.tensor([0.5, 0.03])
    reward = true_reward(action) + 0.05 * torch.randn(512)
    critic = edac.Critic(1, 2, num)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(600):
        rows = torch.randint(512, (64,))
        batch = Batch(torch.zeros(64, 1), action[rows], reward[rows], None, None)
        loss, _ = edac.critic_loss(critic, batch, batch.reward, num, diversity_weight)
        edac.descend(loss, optimizer)
    with torch.no_grad():
        q = critic(torch.zeros(len(GRID), 1), GRID)  # (K, 65 · 21)
    error = q - true_reward(GRID)  # (K, 65 · 21)
    spread = by_distance(q.std(dim=0, correction=0))
    wrong = by_distance(error.pow(2).mean(dim=0).sqrt())
    lowest = by_distance(error.amin(dim=0))
    return {"q": q.view(num, 65, 21).mean(dim=2).numpy(), "minimum - truth": float(lowest[-1]),
            "spread / error": (spread / wrong).numpy(), "error on the data": float(wrong[0])}


def experiment(short: bool = False, seed: int = 0) -> dict:
    """What was found with each variant, seed by seed."""
    numbers = {name: [] for name in ("ten", "hundred", "EDAC")}
    for one in range(seed, seed + (1 if short else 3)):
        torch.manual_seed(one)
        numbers["ten"].append(fit(10, 0.0))
        numbers["EDAC"].append(fit(10, 0.01))
    if not short:
        numbers["hundred"].append(fit(100, 0.0))
    return numbers


def check(numbers: dict) -> None:
    for found in numbers["ten"] + numbers["hundred"]:
        assert found["spread / error"][-1] < 0.15, "far from the data all critics err alike"
        assert found["minimum - truth"] > 1, "so even the smallest of them is too high"
    for found, plain in zip(numbers["EDAC"], numbers["ten"]):
        assert 1.5 < found["error on the data"] / plain["error on the data"] < 8, "the price"
        assert found["spread / error"][-1] > 0.5, "pushed apart, they differ where they err"
        assert found["minimum - truth"] < -0.2, "and the smallest of them is below the truth"


def draw(numbers: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 4), width_ratios=(1.1, 1.1, 1))
    for ax, name, title in zip(axes, ("ten", "EDAC"), ("Ten critics", "Ten, pushed apart (EDAC)")):
        q = numbers[name][0]["q"]
        ax.axvspan(-0.03, 0.03, color=style.DATA, alpha=0.5, lw=0)
        ax.plot(ACROSS, true_reward(GRID).view(65, 21).mean(dim=1), color=style.TRUTH)
        ax.plot(ACROSS, q.T, color=style.ESTIMATE, lw=1)
        ax.plot(ACROSS, q.min(axis=0), color=style.ESTIMATE, lw=3)
        ax.text(0.06, -4.8, "data", color=style.words(style.DATA))
        ax.set(title=title, xlabel="action across the strip", ylabel="Q", ylim=(-5, 1.2))
    axes[0].text(-0.75, 0, "critics", color=style.ESTIMATE)
    axes[0].text(0.07, 0, "smallest: thick", color=style.ESTIMATE)
    axes[0].text(-0.5, -3, "truth")
    axes[1].text(0.05, -3.6, "smallest", color=style.ESTIMATE)
    for name, line in {"ten": "-", "hundred": ":", "EDAC": "-"}.items():
        colour = style.SECOND if name == "EDAC" else style.ESTIMATE
        for one in numbers[name]:
            axes[2].plot(ACROSS[32:], one["spread / error"], line, color=colour, lw=1.5)
    axes[2].text(0.3, 0.7, "EDAC", color=style.words(style.SECOND))
    axes[2].text(0.22, 0.14, "ten critics, or\na hundred (dotted)", color=style.ESTIMATE)
    axes[2].set(title="Spread / error", xlabel="distance from the strip", ylim=(0, 1.02),
                ylabel="share")
    figure.savefig(path)


if __name__ == "__main__":
    found = experiment()
    check(found)
    draw(found, Path(__file__).with_suffix(".png"))
    for name, fits in found.items():
        print(name, [round(fit["minimum - truth"], 2) for fit in fits], "smallest Q less the truth")
