"""How far a learned model is off, in episodes that it never saw: results/model_error.json, results/model_error.png.

    python results/model_error.py --model runs/mopo/hopper-medium/seed0-model-*.pt runs/morel/hopper-medium/seed0-model-*.pt

Fresh episodes are played by the dataset's own policies, by its body's expert and at random. Left: the model starts in one of
their states, is told their actions, and is compared with what really happened k steps later, where the episode lasts so long;
one of its networks throughout, without noise. Right: its error after one step against how uncertain it says that it is, which
MOPO and MOReL live on. Errors are in units of the spread of the data: √ of the mean over coordinates of ((ŝ − s) / std(s))²,
after one step of ((ŝ′ − s′) / std(s′ − s))², where 1 is what guessing the mean change would give.
"""
import argparse
import importlib
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "algorithms"), str(HERE / "behavior")]
from fqe import spearman

from collect import play
from common import check, load_dataset

SEED = 5 * 10**9  # of the episodes, apart from those of every dataset
STARTS, STEPS = 400, 50  # segments of each kind, and their length


def segments(body: str, snapshots: list, data) -> tuple[torch.Tensor, torch.Tensor]:
    """N = STARTS pieces of fresh episodes: states (N, STEPS + 1, S), NaN after the end; actions (N, STEPS, A) in [-1, 1]."""
    rng, states, actions = np.random.default_rng(0), [], []
    episodes = [episode for i, snapshot in enumerate(snapshots) for episode in play((body, snapshot, 4000, SEED + 1000 * i))]
    lengths = np.array([len(episode.rewards) for episode in episodes])
    for i in rng.choice(len(episodes), STARTS, p=lengths / lengths.sum()):  # every step is as likely a start
        first = rng.integers(lengths[i])
        states.append(np.full((STEPS + 1, data.obs_dim), np.nan))
        actions.append(np.zeros((STEPS, data.action_dim)))
        piece, told = episodes[i].observations[first:first + STEPS + 1], episodes[i].actions[first:first + STEPS]
        states[-1][:len(piece)], actions[-1][:len(told)] = piece, told
    states, actions = (torch.as_tensor(np.array(x), dtype=torch.float32) for x in (states, actions))
    return states, (actions - data.action_mid) / data.action_half


@torch.no_grad()
def judge(path: Path) -> dict:
    """The errors of one model: by kind of episode, after k steps, and after one step beside its own uncertainty."""
    mode, env = path.resolve().parts[-3:-1] if path.exists() else ("", "")
    algorithm = mode.split("-")[0]  # mopo-no-penalty is of mopo.py
    check(algorithm in ("mopo", "combo", "morel"), f"{path} is no model of mopo.py, combo.py or morel.py")
    module, data = importlib.import_module(algorithm), load_dataset(env, "cpu")
    dynamics = module.Dynamics(data.obs_dim, data.action_dim)
    dynamics.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    networks = dynamics.elites if algorithm != "morel" else torch.arange(module.NETWORKS)
    rows, body = data.columns(data.packed), env.split("-")[0]
    scale, change_scale = rows.obs.std(dim=0), (rows.next_obs - rows.obs).std(dim=0)
    with np.load(HERE / "behavior" / f"{body}.npz") as saved:
        levels = json.loads(str(saved["levels"])) | {"random": [None]}
    levels["medium-expert"] = levels["medium"] + levels["expert"]
    sources = {"the data's policies": levels[env.split("-", 1)[1]], "expert": levels["expert"], "random actions": [None]}
    found = {}
    for source, snapshots in sources.items():
        states, actions = segments(body, snapshots, data)
        network = networks[torch.arange(STARTS) % len(networks)]
        obs, errors = states[:, 0], []
        for k in range(STEPS):
            x = torch.cat([obs, actions[:, k]], dim=1)
            mean = dynamics(x) if algorithm == "morel" else dynamics(x)[0]  # (M, N, S + 1)
            change = mean[network, torch.arange(STARTS), :-1]
            if k == 0:
                uncertain = (module.disagreement(mean) if algorithm == "morel" else
                             (0.5 * dynamics(x)[1]).exp().norm(dim=-1).amax(dim=0))  # the paper's disc, or u
                one_step = ((obs + change - states[:, 1]) / change_scale).pow(2).mean(dim=1).sqrt()
            obs = obs + change
            errors.append(((obs - states[:, k + 1]) / scale).pow(2).mean(dim=1).sqrt())
        errors = torch.stack(errors, dim=1).numpy()  # (N, STEPS), NaN where the real episode was over
        quartiles = np.nanpercentile(errors, (25, 50, 75), axis=0)
        found[source] = dict(k_step_quartiles=quartiles.round(4).tolist(), segments_left=np.isfinite(errors).sum(0).tolist(),
                             one_step=one_step.numpy().round(4).tolist(), uncertain=uncertain.numpy().round(5).tolist())
        print(f"{algorithm} on {env}, {source}: after 1 step {one_step.median():.3f} of the change's spread; of the states' "
              f"spread {quartiles[1, 0]:.3f} after 1, {quartiles[1, 4]:.3f} after 5, {quartiles[1, 19]:.3f} after 20 steps")
    return dict(algorithm=algorithm, env=env, model=path.stem, sources=found)


def draw(results: list[dict]) -> None:
    """A row for each model."""
    figure, axes = plt.subplots(len(results), 2, figsize=(11, 3.8 * len(results)), squeeze=False)
    for one, (left, right) in zip(results, axes):
        for (source, errors), color in zip(one["sources"].items(), ("tab:green", "tab:red", "tab:gray")):
            low, middle, high = np.array(errors["k_step_quartiles"])
            steps = np.arange(1, STEPS + 1)
            left.plot(steps, middle, color=color, label=source)
            left.fill_between(steps, low, high, color=color, alpha=0.2)
            right.scatter(errors["uncertain"], errors["one_step"], s=4, color=color, alpha=0.6, label=source)
        left.set(title=f"{one['algorithm']} on {one['env']}, {one['model'].split('-')[0]}", xlabel="steps k in the model",
                 yscale="log", ylabel="error / spread of the states\n(median, quartiles)")
        known, off = (np.concatenate([part[key] for part in one["sources"].values()]) for key in ("uncertain", "one_step"))
        right.set(title=f"does it know? rank correlation {spearman(known, off):.2f}", xscale="log", yscale="log",
                  ylabel="error after 1 step / spread of the change",
                  xlabel="disagreement disc(s, a)" if one["algorithm"] == "morel" else "largest ‖σ_m(s, a)‖, MOPO's u")
        right.tick_params(which="minor", labelsize=6)
        left.legend(fontsize=8)
        right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "model_error.png", dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="models that runs have fitted")
    results = [judge(path) for path in parser.parse_args().model]
    (HERE / "model_error.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
    draw(results)
