"""How far a learned model is off, in episodes that it never saw: results/model_error.json and .png.

    python results/model_error.py --model runs/mopo/hopper-medium/seed0-model-*.pt

Fresh episodes are played by the dataset's own policies, by its body's expert and at random. Left:
the model starts in one of their states, is given their actions, and is compared with what really
happened k steps later, where the episode lasts so long; one of its networks throughout, without
noise. Right: its error after one step against its own uncertainty, on which MOPO and MOReL rely.

Errors are in units of the spread of the data: √ of the mean over coordinates of
((ŝ − s) / std(s))², after one step of ((ŝ′ − s′) / std(s′ − s))². There, guessing the mean change
would give 1.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algorithms"), str(HERE / "behavior")]
import style
from collect import play
from common import Dataset, fail, load_dataset

import matplotlib.pyplot as plt
import numpy as np
import torch
from fqe import spearman
from torch import Tensor

SEED = 5 * 10**9  # of the episodes, apart from those of every dataset
STARTS = 400  # segments of each kind
STEPS = 50  # their length
SNAPSHOTS = 10  # policies of a level at most, evenly spread
COLORS = {
    "the data's policies": style.DATA,
    "expert": style.POLICY,
    "random actions": style.SECOND,
}


def segments(body: str, snapshots: list, data: Dataset) -> tuple[Tensor, Tensor]:
    """N = STARTS pieces of fresh episodes: states (N, STEPS + 1, S), NaN after the end of the
    episode, and actions (N, STEPS, A) in [-1, 1]."""
    rng = np.random.default_rng(0)
    episodes = []
    for i, snapshot in enumerate(snapshots):
        episodes += play((body, snapshot, 4000, SEED + 1000 * i))
    lengths = np.array([len(episode.rewards) for episode in episodes])
    states = np.full((STARTS, STEPS + 1, data.obs_dim), np.nan)
    actions = np.zeros((STARTS, STEPS, data.action_dim))
    # every step is as likely a start
    for row, i in enumerate(rng.choice(len(episodes), STARTS, p=lengths / lengths.sum())):
        first = rng.integers(lengths[i])
        piece = episodes[i].observations[first:first + STEPS + 1]
        given = episodes[i].actions[first:first + STEPS]
        states[row, :len(piece)] = piece
        actions[row, :len(given)] = given
    states = torch.as_tensor(states, dtype=torch.float32)
    actions = torch.as_tensor(actions, dtype=torch.float32)
    return states, (actions - data.action_mid) / data.action_half


def level_snapshots(body: str) -> dict[str, list]:
    """The snapshots of the behaviour policies behind each level, None for uniform actions."""
    with np.load(HERE / "behavior" / f"{body}.npz") as saved:
        levels = json.loads(str(saved["levels"]))
    found = {"random": [None]}
    for level, shares in levels.items():
        snapshots = [snapshot for snapshot, _ in shares]
        found[level] = snapshots[::-(-len(snapshots) // SNAPSHOTS)]
    found["medium-expert"] = found["medium"] + found["expert"]
    return found


def predict(module, dynamics, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each network's mean of y, (M, N, S + 1), and the model's own uncertainty (N,): MOReL's disc,
    or the largest deviation, MOPO's u."""
    if hasattr(module, "disagreement"):
        mean = dynamics(x)
        return mean, module.disagreement(mean)
    mean, log_var = dynamics(x)
    return mean, (0.5 * log_var).exp().norm(dim=-1).amax(dim=0)


def errors_of(module, dynamics, data: Dataset, states: Tensor, actions: Tensor) -> dict:
    """Quartiles of the error after k steps, and the error after one step beside the uncertainty."""
    scale = data.obs.std(dim=0)
    change_scale = (data.next_obs - data.obs).std(dim=0)
    networks = getattr(dynamics, "elites", torch.arange(module.NETWORKS))
    network = networks[torch.arange(STARTS) % len(networks)]
    obs = states[:, 0]
    errors = []
    for k in range(STEPS):
        mean, uncertainty = predict(module, dynamics, torch.cat([obs, actions[:, k]], dim=1))
        obs = obs + mean[network, torch.arange(STARTS), :-1]
        errors.append(((obs - states[:, k + 1]) / scale).pow(2).mean(dim=1).sqrt())
        if k == 0:
            one_step = ((obs - states[:, 1]) / change_scale).pow(2).mean(dim=1).sqrt()
            uncertain = uncertainty
    errors = torch.stack(errors, dim=1).numpy()  # (N, STEPS), NaN where the real episode was over
    return {
        "k_step_quartiles": np.nanpercentile(errors, (25, 50, 75), axis=0).round(4).tolist(),
        "segments_left": np.isfinite(errors).sum(0).tolist(),
        "one_step": one_step.numpy().round(4).tolist(),
        "uncertain": uncertain.numpy().round(5).tolist(),
    }


@torch.no_grad()
def judge(path: Path) -> dict:
    """The errors of one model, by kind of episode."""
    mode, env = path.resolve().parts[-3:-1] if path.exists() else ("", "")
    algorithm = mode.split("-")[0]  # mopo-no-penalty is of mopo.py
    if algorithm not in ("mopo", "combo", "morel"):
        fail(f"{path} is no model of mopo.py, combo.py or morel.py")
    module = importlib.import_module(algorithm)
    data = load_dataset(env, "cpu", eval_env="none")
    dynamics = module.Dynamics(data.obs_dim, data.action_dim)
    try:
        dynamics.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged, or of other widths
        fail(f"{path} is no model of {algorithm}.py ({type(error).__name__})")
    body, level = env.split("-", 1)
    snapshots = level_snapshots(body)
    sources = {
        "the data's policies": snapshots[level],
        "expert": snapshots["expert"],
        "random actions": [None],
    }
    found = {}
    for source, policies in sources.items():
        states, actions = segments(body, policies, data)
        found[source] = errors_of(module, dynamics, data, states, actions)
        middle = found[source]["k_step_quartiles"][1]
        print(f"{algorithm} on {env}, {source}: after 1 step "
              f"{np.nanmedian(found[source]['one_step']):.3f} of the change's spread; of the "
              f"states' spread {middle[0]:.3f} after 1, {middle[4]:.3f} after 5, "
              f"{middle[19]:.3f} after 20 steps")
    return {"algorithm": algorithm, "env": env, "model": path.stem, "sources": found}


def draw(results: list[dict]) -> None:
    """A row for each model."""
    size = (11, 3.8 * len(results))
    figure, axes = plt.subplots(len(results), 2, figsize=size, squeeze=False)
    for one, (left, right) in zip(results, axes):
        for source, errors in one["sources"].items():
            color = COLORS[source]
            low, middle, high = np.array(errors["k_step_quartiles"])
            steps = np.arange(1, STEPS + 1)
            left.plot(steps, middle, color=color, label=source)
            left.fill_between(steps, low, high, color=color, alpha=0.2)
            right.scatter(errors["uncertain"], errors["one_step"], s=4, color=color, alpha=0.6,
                          label=source)
        left.set(title=f"{one['algorithm']} on {one['env']}, {one['model'].split('-')[0]}",
                 xlabel="steps k in the model", yscale="log",
                 ylabel="error / spread of the states\n(median, quartiles)")
        parts = one["sources"].values()
        uncertain = np.concatenate([part["uncertain"] for part in parts])
        error = np.concatenate([part["one_step"] for part in parts])
        is_morel = one["algorithm"] == "morel"
        right.set(title=f"rank correlation {spearman(uncertain, error):.2f}",
                  xscale="log", yscale="log", ylabel="error after 1 step / spread of the change",
                  xlabel="disagreement disc(s, a)" if is_morel else "largest ‖σ_m(s, a)‖, MOPO's u")
        right.tick_params(which="minor", labelsize=6)
        left.legend()
        right.legend()
    figure.savefig(HERE / "figures" / "model_error.png", dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True,
                        help="models that runs have fitted")
    results = [judge(path) for path in parser.parse_args().model]
    lines = ",\n".join(json.dumps(result) for result in results)
    (HERE / "model_error.json").write_text(f"[\n{lines}\n]\n")
    draw(results)
