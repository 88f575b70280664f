"""Lesson 4: KL or support. The notes' claim holds only in part.

Notes: Policy Constraints (软约束), "左KL(BRAC), 右MMD(BEAR); MMD是subset即可".
Claim: with four samples and a wide kernel, as in BEAR, MMD prefers a narrow policy at the data's
mean. If the data have one mode, that is a subset of them; if they have two, it is the empty gap.
四个样本、宽核的 MMD 偏爱落在数据均值处的窄策略：单峰时在支撑内，双峰时正落在没有数据的空隙里。
See: the data in grey, and the Gaussian policy that is nearest to them by each of four distances.
With two modes the policy of MMD of 4 stands where there are no data.
Imprecise in the notes: "subset is enough" holds for few samples only, since each sample is also
compared with itself, which rewards narrowness; MMD of 100 samples wants mean and spread.
KL(π‖data), BRAC's direction, covers one mode only, a subset; the wide curve that the notes draw for
KL is KL(data‖π).
Read next: algorithms/bear.py, then algorithms/brac.py.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "algorithms", "results")]  # finds what follows
import style

import bear
import matplotlib.pyplot as plt
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

torch.set_num_threads(1)
CENTRES = {"one mode": torch.linspace(-1.1, 1.1, 12), "two modes": torch.tensor([-1.0, 1.0])}
SHARES = {"one mode": torch.ones(12), "two modes": torch.tensor([0.7, 0.3])}
DATA = {mode: MixtureSameFamily(Categorical(SHARES[mode]), Normal(CENTRES[mode], 0.15))
        for mode in CENTRES}  # of u, the action before tanh
DISTANCES = ("KL(data‖π)", "KL(π‖data)", "MMD of 100", "MMD of 4")


def mmd(policy, data, num):
    """BEAR's distance with its wide kernel, averaged over sets of `num` fresh samples of each."""
    shape = (4000 // num, num, 1)
    u = policy.rsample(shape) if policy.has_rsample else policy.sample(shape)
    return bear.mmd(u, data.sample(shape), "gaussian", 20.0).mean()


def distance(name, policy, data):
    if name == "KL(data‖π)":
        return -policy.log_prob(data.sample((1000,))).mean()  # less a constant, the data's entropy
    if name == "KL(π‖data)":
        u = policy.rsample((1000,))
        return (policy.log_prob(u) - data.log_prob(u)).mean()
    return mmd(policy, data, int(name.split()[-1]))


def fit(name, data, steps):
    """Mean and standard deviation of the nearest Gaussian policy."""
    mean, log_std = torch.tensor(-0.2, requires_grad=True), torch.tensor(-0.7, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        distance(name, Normal(mean, log_std.exp()), data).backward()
        optimizer.step()
    return mean.item(), log_std.exp().item()


def experiment(short: bool = False, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    steps = 150 if short else 400
    numbers = {}
    for mode, data in DATA.items():
        itself = mmd(data, data, 4)
        numbers[mode] = {name: fit(name, data, steps) for name in DISTANCES}
        for u in (-1.0, -0.4, 0.0, 0.8):
            numbers[mode][u] = (mmd(Normal(u, 0.1), data, 4) / itself).item()
    return numbers


def check(numbers) -> None:
    one, two = numbers["one mode"], numbers["two modes"]
    for mode, centre in ((one, 0.0), (two, -0.4)):
        mean, std = mode["MMD of 4"]
        assert abs(mean - centre) < 0.2 and std < 0.15, "narrow, at the data's mean"
        assert mode["MMD of 100"][1] > 0.5 and mode["KL(data‖π)"][1] > 0.5, "wide"
    assert abs(two["KL(π‖data)"][0] + 1) < 0.1 and two["KL(π‖data)"][1] < 0.25, "one of two modes"
    # narrow policies by place, relative to the data themselves: near is the mean, also in the gap
    assert one[0.0] < 0.9 and one[0.8] > 1.5 and two[-0.4] < 0.9 and two[-1.0] > 1.05


def draw(numbers, path) -> None:
    _, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    u = torch.linspace(-2.6, 2.6, 400)
    colors = (style.CLONE, style.POLICY, style.SECOND, style.SECOND)
    places = {"one mode": ((-2.5, 0.62), (0.75, 0.62), (-2.5, 0.5), (0.1, 1.06)),
              "two modes": ((0.5, 0.85), (-2.3, 1.06), (0.5, 0.73), (-0.5, 1.06))}
    for axis, (mode, data) in zip(axes, DATA.items()):
        density = data.log_prob(u).exp()
        axis.fill_between(u, density / density.max(), color=style.DATA, alpha=0.4, linewidth=0)
        for name, place, color in zip(DISTANCES, places[mode], colors):
            mean, std = numbers[mode][name]
            line = "--" if name == "MMD of 100" else "-"
            axis.plot(u, torch.exp(-((u - mean) / std) ** 2 / 2), line, color=color, linewidth=3)
            axis.text(*place, name, color=style.words(color), weight="bold")
        axis.set(title=f"Data (grey) with {mode}", xlabel="u, the action before tanh", yticks=[],
                 ylim=(0, 1.2))
    plt.savefig(path)


if __name__ == "__main__":
    results = experiment()
    check(results)
    draw(results, Path(__file__).with_suffix(".png"))
    print({mode: values["MMD of 4"] for mode, values in results.items()}, "mean, std by MMD of 4")
