"""Build a dataset of the suite: play behaviour policies in the real environment.

    python results/behavior/collect.py hopper-medium    (load_dataset does so for what is absent)
    python results/behavior/collect.py all              (everything that is absent or out of date)
    python results/behavior/collect.py pendulum-random 4000          (fewer transitions; for tests)

The result is a Minari dataset, local/<body>/<level>-v0. A level is a list of snapshots of a
training run, each with its share of the transitions. `medium` and `expert` are one snapshot each.
`medium-replay` is what the replay buffer held until the policy reached medium: every snapshot plays
the share of transitions that it contributed, with its own exploration, in the order of training;
the first share are the uniform actions of the first steps.

The work is cut into jobs with fixed seeds, so the data depend neither on the number of processes
nor on their speed. Everything is written to a hidden folder and renamed at the end: a build that is
killed leaves nothing under the dataset's name. Of two builds at once the first one stays.
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
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # finds common.py
from common import (
    LEVELS,
    SUITE,
    behavior_digest,
    built_from,
    evaluate,
    fail,
    make_env,
    notice,
    read_minari,
)

import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TRANSITIONS = {  # as D4RL v2 has them; of random, whose episodes are tiny, a fifth
    "hopper": {"random": 200_000, "medium": 1_000_000, "medium-replay": 402_000,
               "expert": 1_000_000},
    "walker2d": {"random": 200_000, "medium": 1_000_000, "medium-replay": 302_000,
                 "expert": 1_000_000},
    "halfcheetah": {"random": 200_000, "medium": 1_000_000, "medium-replay": 202_000,
                    "expert": 1_000_000},
    "pendulum": dict.fromkeys(("random", "medium", "medium-replay", "expert"), 20_000),
    "cartpole": dict.fromkeys(("random", "medium", "medium-replay", "expert", "replay"), 50_000),
    "acrobot": dict.fromkeys(("random", "medium", "medium-replay", "expert", "replay"), 50_000),
}
JOB = 25_000  # transitions at most that one job collects


def uniform_policy(space, generator: torch.Generator):
    """act(obs) that draws from the whole action space."""
    if not space.shape:
        return lambda obs: torch.randint(int(space.n), (len(obs),), generator=generator)
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    return lambda obs: low + (high - low) * torch.rand(len(obs), len(low), generator=generator)


def behavior_policy(path: Path, body: str, snapshot: int | None, seed: int):
    """act(obs) of one snapshot of the file as it explored then, or uniform actions for None."""
    generator = torch.Generator().manual_seed(seed)
    space = make_env(SUITE[body][0]).action_space
    uniform = uniform_policy(space, generator)
    if snapshot is None:
        return uniform
    layers = []
    with np.load(path) as saved:  # weight<i> (P, out, in), bias<i> (P, out), float16, P snapshots
        for i in range(3):
            weight, bias = saved[f"weight{i}"][snapshot], saved[f"bias{i}"][snapshot]
            layers.append((torch.as_tensor(np.float32(weight)), torch.as_tensor(np.float32(bias))))
        epsilon = float(saved["epsilon"][snapshot]) if "epsilon" in saved else 0.0

    def network(obs: Tensor) -> Tensor:
        for weight, bias in layers[:-1]:
            obs = torch.relu(torch.nn.functional.linear(obs, weight, bias))
        return torch.nn.functional.linear(obs, *layers[-1])

    def act_greedily(obs: Tensor) -> Tensor:  # the policy of algorithms/dqn.py
        explore = torch.rand(len(obs), generator=generator) < epsilon
        return torch.where(explore, uniform(obs), network(obs).argmax(dim=1))

    def act_stochastically(obs: Tensor) -> Tensor:  # the policy of algorithms/sac.py
        mean, log_std = network(obs).chunk(2, dim=-1)
        noise = torch.randn(mean.shape, generator=generator)
        action = torch.tanh(mean + log_std.clamp(-20, 2).exp() * noise)
        low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
        return (low + high) / 2 + (high - low) / 2 * action

    return act_stochastically if space.shape else act_greedily


def play(job: tuple[str, int | None, int, int]) -> list[EpisodeBuffer]:
    """One job: whole episodes, eight in lockstep, until they hold enough transitions."""
    body, snapshot, transitions, seed = job
    torch.set_num_threads(1)
    act = behavior_policy(HERE / f"{body}.npz", body, snapshot, seed)
    episodes, count = [], 0
    while count < transitions:
        steps = [[] for _ in range(8)]
        evaluate(act, SUITE[body][0], 8, seed + len(episodes),
                 record=lambda i, *step: steps[i].append(step))
        for played in steps:
            if count >= transitions:
                break  # in the order of their seeds, so that short episodes are not preferred
            obs, action, reward, next_obs, terminated, truncated = map(np.array, zip(*played))
            episodes.append(EpisodeBuffer(
                observations=np.concatenate([obs, next_obs[-1:]]), actions=action,
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


def plan(body: str, level: str, total: int) -> list[tuple[int | None, float]]:
    """Snapshots of a level, each with the transitions that it has to contribute."""
    if level == "random":
        return [(None, total)]
    path = HERE / f"{body}.npz"
    if not path.exists():
        fail(f"{body}-{level} needs the behaviour policies {path}; "
             f"train them first: make behavior ENV={body}")
    with np.load(path) as saved:
        chosen = json.loads(str(saved["levels"]))[level]
    shares = sum(share for _, share in chosen)
    return [(snapshot, total * share / shares) for snapshot, share in chosen]


def collect(body: str, level: str, total: int) -> list[EpisodeBuffer]:
    """At least `total` transitions in whole episodes: a replay in the order of training, other
    levels in a fixed random order."""
    seed = 10**9 + (*LEVELS, "replay").index(level) * 10**8
    quotas = plan(body, level, total)
    jobs, owners = [], []
    for i, (snapshot, quota) in enumerate(quotas):
        parts = int(np.ceil(max(2, quota / JOB))) if len(quotas) < 10 else 1
        for j in range(parts):
            number = i * parts + j
            jobs.append((body, snapshot, int(np.ceil(quota / parts)), seed + number * 10**5))
            owners.append(i)
    played = [[] for _ in quotas]
    workers = min(os.cpu_count() or 1, len(jobs))
    pools = multiprocessing.get_context("spawn")
    with (pools.Pool(workers, follow, (os.getpid(),)) as pool,
          tqdm(total=sum(asked for _, _, asked, _ in jobs), desc=f"building {body}-{level}",
               unit=" steps", unit_scale=True) as bar):
        for owner, (_, _, asked, _), episodes in zip(owners, jobs, pool.imap(play, jobs)):
            played[owner] += episodes
            bar.update(asked)  # not what it played: whole episodes go over it
    kept, count, due = [], 0, 0.0
    for episodes, (_, quota) in zip(played, quotas):
        due += quota
        for episode in episodes:
            if count >= due:
                break  # a job went over its quota by part of an episode
            kept.append(episode)
            count += len(episode.rewards)
    if "replay" not in level:
        kept = [kept[i] for i in np.random.default_rng(0).permutation(len(kept))]
    return kept


def build(body: str, level: str, total: int | None = None) -> None:
    """Collects and stores local/<body>/<level>-v0; `total` asks for fewer transitions."""
    root = get_dataset_path()
    dataset_id = f"local/{body}/{level}-v0"
    staging = root / f".building-{os.getpid()}"
    for stale in root.glob(".building-*"):  # of a build that was killed while it wrote
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    began = time.time()
    env_id, low, high = SUITE[body]
    episodes = collect(body, level, total or TRANSITIONS[body][level])
    try:
        with (patch.dict(os.environ, MINARI_DATASETS_PATH=str(staging)),
              warnings.catch_warnings()):
            warnings.simplefilter("ignore")  # Minari would like an author, a permalink, ...
            env = make_env(env_id)
            minari.create_dataset_from_buffers(
                dataset_id, episodes, env=env, ref_min_score=low, ref_max_score=high,
                algorithm_name="SAC" if env.action_space.shape else "DQN")
            read_minari(dataset_id)  # leaves its flat copy beside it
        (staging / dataset_id / "build_seconds").write_text(f"{time.time() - began:.0f}")
        (staging / dataset_id / "behavior").write_text(behavior_digest(body, level))
        publish(staging, root, dataset_id, body, level)
    except OSError as error:
        if not (root / dataset_id / "behavior").exists():
            fail(f"could not write {root / dataset_id}: {error}")
        # else another process was first, with the same data
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, root: Path, dataset_id: str, body: str, level: str) -> None:
    """Moves a finished dataset to its name, in place of one that earlier policies made."""
    for folder in ("local", f"local/{body}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(staging / folder / "namespace_metadata.json", root / folder)
    target = root / dataset_id
    if target.exists() and built_from(target) != behavior_digest(body, level):
        target.rename(staging / "replaced")  # and removed with the staging folder
    (staging / dataset_id).rename(target)


def is_current(body: str, level: str) -> bool:
    folder = get_dataset_path(f"local/{body}/{level}-v0")
    return folder.exists() and built_from(folder) == behavior_digest(body, level)


if __name__ == "__main__":
    names = [f"{body}-{level}" for body, levels in TRANSITIONS.items() for level in levels]
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    name = name.removeprefix("local/").removesuffix("-v0").replace("/", "-")
    if name not in (*names, "all"):
        fail(f"usage: collect.py NAME, of {', '.join(names)} or all; or NAME TRANSITIONS")
    wanted = names if name == "all" else [name]
    given = sys.argv[2] if len(sys.argv) > 2 else None
    if given is not None and not (given.isdecimal() and int(given) > 0):
        fail(f"TRANSITIONS must be a whole number above 0, not {given}")
    count = int(given) if given else None
    try:
        for each in wanted:
            body, _, level = each.partition("-")
            if not is_current(body, level):
                build(body, level, count)
            elif name != "all":
                folder = get_dataset_path(f"local/{body}/{level}-v0")
                notice(f"{each} is there already; to build it anew, move {folder} away")
    except KeyboardInterrupt:
        fail("stopped; nothing was written")
