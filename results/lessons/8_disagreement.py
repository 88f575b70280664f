"""Lesson 8: models disagree where there are no data. The claim holds only in part.

Notes: Model-Based Offline RL › ENSEMBLE, MOReL, MOPO.
Claim: models that agree on the data part outside them, which says where a model may be wrong, but
not how wrong; MOPO's penalty first of all measures the noise of the world.
模型在数据外会分歧，能告诉你哪里不可信，却不等于错了多少；MOPO 的惩罚首先度量噪声。
See: left, beyond the data four models leave the truth and each other. Middle, they disagree little
along the data, and MOReL's threshold (blue) lies around them. Right, MOPO's penalty, darker
where it is larger, marks the noisy half of the data, though that half is known as well.
Imprecise in the notes: "models err differently on unseen points" is half true: by seed (0 to 11),
up to 32% of the far pairs count as known. MOPO's u is the noise that a model admits, also unseen.
Read next: algorithms/morel.py, algorithms/mopo.py.
"""
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style

import matplotlib.pyplot as plt
import mopo
import morel
import torch

torch.set_num_threads(1)
STATES, ACTIONS = torch.linspace(-1.5, 1.5, 61), torch.linspace(-1, 1, 41)
PLANE = torch.cartesian_prod(STATES, ACTIONS)
LINE = torch.linspace(-2, 2, 81)[:, None] * torch.tensor([1, -0.8])  # through the data and beyond


def change(x):
    """s′ − s without noise, (N,), of x = [state, action]."""
    return 0.5 * x[:, 1] + 0.3 * torch.sin(3 * x[:, 0])


def collect(num):
    """x and y = [s′ − s, reward], (N, 2) each; the noise is small for s < 0 and large for s > 0."""
    state = 2 * torch.rand(num) - 1
    action = (-0.8 * state + 0.15 * torch.randn(num)).clamp(-1, 1)
    x = torch.stack([state, action], dim=1)
    noise = torch.where(state < 0, 0.01, 0.15) * torch.randn(num)
    return x, torch.stack([change(x) + noise, -state**2], dim=1)


def fit(algorithm, x, y, updates):
    """The ensemble of morel.py or mopo.py; each network has its own weights and its own rows."""
    with patch.object(algorithm, "DYNAMICS_HIDDEN", (32, 32)):  # small networks are enough
        dynamics = algorithm.Dynamics(1, 1)
    dynamics.x_mean, dynamics.x_std = x.mean(dim=0), x.std(dim=0)
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=3e-3)
    for _ in range(updates):
        rows = torch.randint(len(x), (algorithm.NETWORKS, 64))
        algorithm.descend(algorithm.dynamics_loss(dynamics, x[rows], y[rows]), optimizer)
    return dynamics


def experiment(short: bool = False, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    x, y = collect(1500)
    updates = 400 if short else 700
    models, gaussians = fit(morel, x, y, updates), fit(mopo, x, y, updates)
    disc = lambda x: morel.disagreement(models(x)).detach()
    penalty = lambda x: (0.5 * gaussians(x)[1]).exp().norm(dim=-1).amax(dim=0).detach()  # MOPO's u
    threshold = disc(x).mean() + 5 * disc(x).std()
    nearest = torch.cdist(PLANE, x).amin(dim=1)
    on, off = nearest < 0.1, nearest > 0.5
    alarm = lambda score: (score[off, None] > score[on]).float().mean().item()  # ½ is chance
    unknown, quiet = (disc(PLANE) > threshold).float(), x[:, 0] < 0
    return {"alarm": alarm(disc(PLANE)), "penalty_alarm": alarm(penalty(PLANE)),
            "unknown": (unknown[on].mean().item(), unknown[off].mean().item()),
            "penalty_by_half": (penalty(x[quiet]).mean().item(), penalty(x[~quiet]).mean().item()),
            "lines": models(LINE)[..., 0].tolist(), "threshold": threshold.item(),
            "disc": disc(PLANE).tolist(), "penalty": penalty(PLANE).tolist(),
            "x": x[:300].tolist(), "y": y[:300, 0].tolist()}


def check(numbers) -> None:
    (on, off), (quiet, noisy) = numbers["unknown"], numbers["penalty_by_half"]
    assert numbers["alarm"] > 0.9 and on < 0.1 and off > 0.5
    assert noisy > 2 * quiet and numbers["penalty_alarm"] < numbers["alarm"] - 0.1


def draw(numbers, path) -> None:
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 4), width_ratios=(1.5, 1, 1))
    states, actions = zip(*numbers["x"])
    left.plot(states, numbers["y"], ".", color=style.DATA, markersize=4)
    left.plot(LINE[:, 0], change(LINE), color=style.TRUTH, linewidth=3)
    left.plot(LINE[:, 0], torch.tensor(numbers["lines"]).T, color=style.ESTIMATE, linewidth=1.5)
    left.set(xlabel="state", ylabel="next state minus state", title="Four models, and the truth")
    levels = torch.linspace(0, 0.3, 13).tolist()  # the same in both maps; darker is larger
    for axis, name in ((middle, "disc"), (right, "penalty")):
        field = torch.tensor(numbers[name]).view(61, 41).T
        axis.contourf(STATES, ACTIONS, field, levels, cmap="Reds", extend="max")
        axis.plot(states, actions, ".", color="#444444", markersize=2)
        if name == "disc":
            axis.contour(STATES, ACTIONS, field, [numbers["threshold"]], colors=style.POLICY)
        axis.set(xlabel="state", yticks=(-1, 0, 1))
    middle.set(ylabel="action", title="MOReL's alarm")
    right.set(title="MOPO's penalty", yticklabels=[])
    right.text(-1.4, -0.9, "quiet")
    right.text(1.4, 0.84, "noisy", ha="right", color="white")
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print({name: results[name] for name in ("alarm", "penalty_alarm", "unknown")})
