"""Build a dataset of the suite: play shipped behaviour policies in the real environment, store a Minari dataset.

    python results/behavior/collect.py hopper-medium        (common.load_dataset does so for whatever is absent)
    python results/behavior/collect.py all                  (whatever of the suite is absent and can be built)
    python results/behavior/collect.py pendulum-random 4000 (fewer transitions than the suite has; for tests)

The work is cut into shares with fixed seeds, so the data depend neither on the number of processes nor on their speed.
Everything is written to a hidden folder and renamed at the end: a build that is killed leaves nothing under the
dataset's name, and of two builds at once the first one stays, the other finds it and is content.
"""
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # lets this file find common.py
from common import LEVELS, SUITE, check, evaluate, make_env, read_minari

HERE = Path(__file__).resolve().parent
TRANSITIONS = {  # as D4RL v2 has them; of random, whose episodes are tiny, a fifth
    "hopper": {"random": 200_000, "medium": 1_000_000, "medium-replay": 402_000, "expert": 1_000_000},
    "walker2d": {"random": 200_000, "medium": 1_000_000, "medium-replay": 302_000, "expert": 1_000_000},
    "halfcheetah": {"random": 200_000, "medium": 1_000_000, "medium-replay": 202_000, "expert": 1_000_000},
    "pendulum": {"random": 20_000, "medium": 20_000, "medium-replay": 20_000, "expert": 20_000},
    "cartpole": {"random": 50_000, "medium": 50_000, "medium-replay": 50_000, "expert": 50_000, "replay": 50_000},
    "acrobot": {"random": 50_000, "medium": 50_000, "medium-replay": 50_000, "expert": 50_000, "replay": 50_000},
}
SHARE = 25_000  # transitions at most that one job collects


def behavior_policy(path: Path, body: str, snapshot: int | None, seed: int):
    """A stochastic act(obs): snapshot number `snapshot` of the file as it explored then, or uniform actions for None."""
    generator = torch.Generator().manual_seed(seed)
    space = make_env(SUITE[body][0]).action_space
    if discrete := not space.shape:
        uniform = partial(torch.randint, int(space.n), generator=generator)  # one number per row
    else:
        mid, half = torch.as_tensor((space.high + space.low) / 2), torch.as_tensor((space.high - space.low) / 2)
    if snapshot is None:
        return lambda obs: (uniform((len(obs),)) if discrete
                            else mid + half * (2 * torch.rand(len(obs), len(mid), generator=generator) - 1))
    with np.load(path) as saved:  # weight<i> (P, out, in) and bias<i> (P, out), float16, P snapshots
        layers = [[torch.as_tensor(np.float32(saved[f"{kind}{i}"][snapshot])) for kind in ("weight", "bias")] for i in range(3)]
        epsilon = float(saved["epsilon"][snapshot]) if discrete else None

    def act(obs: Tensor) -> Tensor:
        for weight, bias in layers[:-1]:
            obs = torch.relu(torch.nn.functional.linear(obs, weight, bias))
        out = torch.nn.functional.linear(obs, *layers[-1])
        if discrete:  # the policy of algorithms/dqn.py
            explore = torch.rand(len(obs), generator=generator) < epsilon
            return torch.where(explore, uniform((len(obs),)), out.argmax(dim=1))
        mean, log_std = out.chunk(2, dim=-1)  # the policy of algorithms/sac.py
        noise = torch.randn(mean.shape, generator=generator)
        return mid + half * torch.tanh(mean + log_std.clamp(-20, 2).exp() * noise)

    return act


def play(job: tuple[str, int | None, int, int]) -> list[EpisodeBuffer]:
    """One share: whole episodes, eight in lockstep, until they hold enough transitions."""
    body, snapshot, transitions, seed = job
    torch.set_num_threads(1)
    act, episodes, count = behavior_policy(HERE / f"{body}.npz", body, snapshot, seed), [], 0
    while count < transitions:
        steps = [[] for _ in range(8)]
        evaluate(act, SUITE[body][0], 8, seed + len(episodes), record=lambda i, *step: steps[i].append(step))
        for played in steps:
            if count < transitions:  # in the order of their seeds, so that short episodes are not preferred
                obs, action, reward, next_obs, terminated, truncated = (np.array(column) for column in zip(*played))
                episodes.append(EpisodeBuffer(observations=np.concatenate([obs, next_obs[-1:]]), actions=action,
                                              rewards=np.float32(reward), terminations=terminated, truncations=truncated,
                                              infos={}))
                count += len(reward)
    return episodes


def follow(parent: int) -> None:
    """In a worker: Ctrl-C is the parent's business, and when the parent is gone, leave."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def collect(body: str, level: str, total: int) -> list[EpisodeBuffer]:
    """At least `total` transitions in whole episodes, in a fixed random order."""
    snapshots = [None]
    if level != "random":
        check((HERE / f"{body}.npz").exists(), f"{body}-{level} needs the behaviour policies {HERE / body}.npz; "
              f"train them first: make behavior ENV={body}")
        with np.load(HERE / f"{body}.npz") as saved:
            snapshots = json.loads(str(saved["levels"]))[level]
    quota = total / len(snapshots)  # transitions, not episodes, per policy: as time passes in a replay buffer
    shares = int(np.ceil(max(2, quota / SHARE)))
    seed = 10**9 + (*LEVELS, "replay").index(level) * 10**8
    jobs = [(body, snapshot, int(np.ceil(quota / shares)), seed + (i * shares + j) * 10**5)
            for i, snapshot in enumerate(snapshots) for j in range(shares)]
    episodes, workers = [], min(os.cpu_count() or 1, len(jobs))
    with (multiprocessing.get_context("spawn").Pool(workers, follow, (os.getpid(),)) as pool,
          tqdm(total=total, desc=f"building {body}-{level}", unit=" steps", unit_scale=True) as bar):
        for share in pool.imap(play, jobs):
            episodes += share
            bar.update(sum(len(episode.rewards) for episode in share))
    episodes = [episodes[i] for i in np.random.default_rng(0).permutation(len(episodes))]
    enough = int(np.searchsorted(np.cumsum([len(episode.rewards) for episode in episodes]), total))
    return episodes[:enough + 1]  # each share went over its quota by part of an episode


def build(body: str, level: str, total: int | None = None) -> None:
    """Collect and store local/<body>/<level>-v0; `total` asks for fewer transitions than the suite has, for tests."""
    root = get_dataset_path()
    staging, dataset_id = root / f".building-{os.getpid()}", f"local/{body}/{level}-v0"
    for stale in root.glob(".building-*"):  # of a build that was killed while it wrote, which takes a minute
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    began, (env_id, low, high) = time.time(), SUITE[body]
    episodes = collect(body, level, total or TRANSITIONS[body][level])
    try:
        with patch.dict(os.environ, MINARI_DATASETS_PATH=str(staging)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari would like an author, a permalink, ...
            algorithm = "SAC" if make_env(env_id).action_space.shape else "DQN"
            minari.create_dataset_from_buffers(dataset_id, episodes, env=make_env(env_id), algorithm_name=algorithm,
                                               ref_min_score=low, ref_max_score=high)
            read_minari(dataset_id)  # leaves its flat cache beside it
        (staging / dataset_id / "build_seconds").write_text(f"{time.time() - began:.0f}")
        for folder in ("local", f"local/{body}"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(staging / folder / "namespace_metadata.json", root / folder)
        (staging / dataset_id).rename(root / dataset_id)
    except OSError as error:
        check((root / dataset_id / "flat.npz").exists(), f"could not write {root / dataset_id}: {error}")
        # else another process was first, with the same data
    finally:
        shutil.rmtree(staging, ignore_errors=True)


if __name__ == "__main__":
    names = [f"{body}-{level}" for body, levels in TRANSITIONS.items() for level in levels]
    name, total = (*sys.argv[1:], "", None)[:2]
    name = name.removeprefix("local/").removesuffix("-v0").replace("/", "-")
    check(name in (*names, "all"), f"usage: collect.py NAME, of {', '.join(names)} or all; or NAME TRANSITIONS")
    absent = [n for n in names if (HERE / f"{n.split('-')[0]}.npz").exists()
              and not get_dataset_path("local/{}/{}-v0".format(*n.split("-", 1))).exists()]
    try:
        for each in absent if name == "all" else [name]:
            build(*each.split("-", 1), total=total and int(total))
    except KeyboardInterrupt:
        check(False, "stopped; nothing was written")
