"""What the algorithm files share, and nothing they learn with: datasets, evaluation, the run record.

Two words for two ends of an episode: `terminated`, the task is over (the robot fell), what follows is worth zero; `truncated`,
the clock ran out, what follows is worth as much as before. Only `terminated` may stop a bootstrap.
"""
import ctypes
import difflib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert")
SUITE = {  # body: environment, and the returns that score 0 and 100: D4RL's; else ours, a random and a good policy's
    "hopper": ("Hopper-v5", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
    "pendulum": ("Pendulum-v1", -1200.0, -150.0),
    "cartpole": ("CartPole-v1", 22.0, 500.0),
    "acrobot": ("Acrobot-v1", -500.0, -80.0),
}
NAMES = [f"{body}-{level}" for body in SUITE for level in LEVELS] + ["cartpole-replay", "acrobot-replay"]
KEYS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: keep freed memory; asking the kernel anew costs CQL a quarter
    libc.mallopt(-1, 2**31 - 1), libc.mallopt(-3, 2**30)  # of its speed; M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
COLLECT = Path(__file__).resolve().parent / "results" / "behavior" / "collect.py"  # builds the suite's datasets


def check(ok, message: str) -> None:
    """For whatever a user can cause: one line that says what is wrong and what to do, and exit code 2."""
    if not ok:
        print("error:", " ".join(message.split()), file=sys.stderr)
        raise SystemExit(2)


@cache
def make_env(env: str, key=0) -> gym.Env:
    """gym.make of an id (or a spec in JSON), once per key: 0, 1, ... are for evaluation, "training" for an online run."""
    if env.startswith(("Hopper", "Walker", "HalfCheetah")):
        import mujoco  # its notices about its own models would fill the terminal and a log file
        getattr(mujoco, "set_mju_user_warning", lambda handler: None)(lambda message: None)
    return gym.make(gym.envs.registration.EnvSpec.from_json(env) if env[0] == "{" else env, disable_env_checker=True)


def evaluate(act: Callable, env_id: str, episodes: int, seed: int = 0, device="cpu", record=None) -> np.ndarray:
    """Undiscounted returns (E,) of a policy act(raw observations (E, S)) -> the environment's own actions (E, A), called once
    per time step for all episodes: row i stays episode i until the last one ends, what it says for an ended one is ignored.
    `record(i, obs, action, reward, next_obs, terminated, truncated)` sees each transition."""
    envs, returns, alive = [make_env(env_id, i) for i in range(episodes)], np.zeros(episodes), list(range(episodes))
    obs = np.stack([np.float32(env.reset(seed=seed + i)[0]) for i, env in enumerate(envs)])
    while alive:
        action = act(torch.as_tensor(obs, device=device)).cpu().numpy()
        for i in tuple(alive):
            next_obs, reward, terminated, truncated, _ = envs[i].step(action[i])
            if record:
                record(i, obs[i].copy(), action[i], reward, np.float32(next_obs), terminated, truncated)
            obs[i], returns[i] = next_obs, returns[i] + reward
            if terminated or truncated:
                alive.remove(i)
    return returns


Batch = namedtuple("Batch", "obs action reward next_obs terminated")  # (B, S), (B, A) or (B,) integers, (B,), (B, S), (B,)


class Dataset:
    """Room for N transitions, which load_dataset or an online run fills: one packed tensor, so a batch is one gather."""

    def __init__(self, name: str, env_id: str, capacity: int, device: str, refs: tuple[float, float]):
        self.device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        check(device in ("auto", self.device.type), f"--device {device}: give auto, cpu or, where PyTorch finds one, cuda")
        env = make_env(env_id)
        discrete = isinstance(env.action_space, gym.spaces.Discrete)
        low, high = np.float32([[-1], [1]]) if discrete else (env.action_space.low, env.action_space.high)
        self.name, self.env_id, self.refs = name, env_id, refs  # refs: the returns that score 0 and 100, or NaN
        self.num_actions, self.kind = (int(env.action_space.n), "discrete") if discrete else (None, "continuous")
        self.obs_dim, self.action_dim = int(np.prod(env.observation_space.shape)), len(low)
        self.action_mid = torch.as_tensor((low + high) / 2, device=self.device)  # (A,) the environment's action is
        self.action_half = torch.as_tensor((high - low) / 2, device=self.device)  # mid + half * action
        self.packed = torch.zeros(capacity, 2 * self.obs_dim + self.action_dim + 2, device=self.device)  # see columns
        self.truncated = torch.zeros(capacity, dtype=torch.bool, device=self.device)  # (N,)
        self.size = torch.tensor(0, device=self.device)  # rows in use: N, or fewer while an online run fills them

    def columns(self, rows: torch.Tensor) -> Batch:
        """A row is [obs | action | next_obs | reward | terminated]; all but a discrete action are views of it."""
        obs, action, next_obs, tail = rows.split([self.obs_dim, self.action_dim, self.obs_dim, 2], dim=1)
        return Batch(obs, action[:, 0].long() if self.num_actions else action, tail[:, 0], next_obs, tail[:, 1])

    def sample(self, batch_size: int) -> Batch:
        """Uniform with replacement. The indices are drawn on the device, so that nothing waits for the host."""
        return self.columns(self.packed[(torch.rand(batch_size, device=self.device) * self.size).long()])

    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of each episode and the row after its last, (E,) each; a last fragment, cut off by the file, counts."""
        ends = self.columns(self.packed).terminated.bool() | self.truncated
        stops = np.union1d(ends.nonzero().cpu().numpy() + 1, len(ends))
        return np.append(0, stops[:-1]), stops

    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (E,)."""
        return np.add.reduceat(self.columns(self.packed).reward.double().cpu().numpy(), self.episodes()[0])

    def score(self, returns) -> float | None:
        """D4RL's normalised mean return; None without reference returns."""
        low, high = self.refs
        return None if np.isnan(low + high) else 100 * (float(np.mean(returns)) - low) / (high - low)


def read_minari(dataset_id: str) -> dict:
    """A Minari dataset as flat arrays, through a cache beside it: one HDF5 group per episode is slow to read."""
    import minari
    folder = minari.storage.get_dataset_path(dataset_id)
    if not folder.exists() and dataset_id.startswith("local/"):
        check(COLLECT.exists(), f"{dataset_id} is not built, and only the repository holds what builds it: {COLLECT}")
        check(not subprocess.run([sys.executable, COLLECT, dataset_id]).returncode, f"{dataset_id} was not built")
    elif not folder.exists():
        minari.download_dataset(dataset_id)
    cache_file, stamp = folder / "flat.npz", str((folder / "data" / "metadata.json").stat().st_mtime_ns)
    if cache_file.exists() and str((flat := dict(np.load(cache_file)))["stamp"]) == stamp:
        return flat
    dataset = minari.load_dataset(dataset_id)
    meta, spec = dataset.storage.metadata, make_env(dataset.env_spec.to_json()).spec
    episodes = [(e.observations[:-1], e.actions, e.rewards, e.observations[1:], e.terminations, e.truncations)
                for e in tqdm(dataset, desc=f"reading {dataset_id}", unit=" episodes")]  # T + 1 observations each
    flat = {key: np.concatenate(values) for key, values in zip(KEYS, zip(*episodes))}
    flat |= dict(env=spec.to_json() if spec.kwargs else spec.id, stamp=stamp,
                 refs=[meta.get("ref_min_score", np.nan), meta.get("ref_max_score", np.nan)])
    if os.access(folder, os.W_OK):
        write_atomically(cache_file, lambda part: np.savez(open(part, "wb"), **flat))
    return flat


def read_d4rl(path: Path) -> dict:
    """D4RL's flat file. Where it has no `next_observations`, the state after a time limit is unknown: left out."""
    import h5py
    body = next((body for body in SUITE if path.stem.lower().startswith(body)), None)
    check(path.exists(), f"there is no file {path}")
    check(body, f"{path.name}: the name must start with the body it is from, one of {', '.join(SUITE)}")
    with h5py.File(path) as file:
        obs, action, reward, terminated = (file[k][:] for k in ("observations", "actions", "rewards", "terminals"))
        truncated = file["timeouts"][:].astype(bool) if "timeouts" in file else np.zeros(len(obs), bool)
        next_obs = file["next_observations"][:] if "next_observations" in file else None
    check(len(obs) == len(action) == len(reward) == len(terminated) == len(truncated), f"{path}: columns differ in length")
    keep, terminated = np.ones(len(obs), bool), terminated.astype(bool)
    if next_obs is None and len(obs):
        next_obs = np.append(obs[1:], obs[-1:], axis=0)  # wrong after a termination, and never looked at there
        keep = terminated | ~truncated
        keep[-1] = terminated[-1]
        truncated[:-1] |= truncated[1:] & ~keep[1:] & ~terminated[:-1]  # such an episode now ends one row earlier
    flat = (x[keep] for x in (obs, action, reward, next_obs, terminated, truncated))
    return dict(zip(KEYS, flat), env=SUITE[body][0], refs=SUITE[body][1:])


def load_dataset(name: str, device: str = "auto", discrete: bool = False) -> Dataset:
    """A suite name (hopper-medium; built when absent), a Minari id (has a slash) or the path of a D4RL .hdf5 file."""
    near = ", ".join(difflib.get_close_matches(name, NAMES, 3, 0))
    check(name in NAMES or "/" in name or name.endswith(".hdf5"), f"unknown dataset '{name}'; near are {near}")
    body, _, level = name.partition("-")
    levels = ("medium", "expert") if level == "medium-expert" else (level,)
    ids = [f"local/{body}/{level}-v0" for level in levels] if name in NAMES else [name]
    try:
        parts = [read_d4rl(Path(i).expanduser()) if i.endswith(".hdf5") else read_minari(i) for i in ids]
    except Exception as error:  # whatever a network, a damaged file, exotic spaces or a lacking environment may have
        check(False, f"can't read {name}: {type(error).__name__}, {error}; delete what is damaged to have it made anew")
    flat = [torch.as_tensor(np.concatenate([np.float32(part[key]) for part in parts])) for key in KEYS]
    obs, action, reward, next_obs, terminated, truncated = (x.reshape(len(x), x[:1].numel()) for x in flat)  # all (N, ·)
    data = Dataset(name, str(parts[0]["env"]), len(obs), device, tuple(map(float, parts[0]["refs"])))
    check(discrete == bool(data.num_actions), f"{name} has {data.kind} actions, and this algorithm needs the other kind")
    damaged = (~torch.cat([obs, action, reward, next_obs], dim=1).isfinite()).any(dim=1).nonzero()[:, 0].tolist()
    check(len(obs) and not damaged, f"{name} is empty or damaged: not finite are the numbers of transitions {damaged[:3]}")
    check((obs.shape[1], action.shape[1]) == (data.obs_dim, data.action_dim), f"{name} has {obs.shape[1]} observed numbers and "
          f"{action.shape[1]} actions, {data.env_id} has {data.obs_dim} and {data.action_dim}")
    action = (action - data.action_mid.cpu()) / data.action_half.cpu()
    check(discrete or action.abs().max() < 1.001, f"{name} has actions outside the bounds of {data.env_id}")
    data.packed.copy_(torch.cat([obs, action, next_obs, reward, terminated], dim=1))
    data.truncated.copy_(truncated[:, 0])
    data.size.fill_(len(obs))
    return data


def write_atomically(path: Path, write: Callable) -> None:
    """`write` a neighbour and rename it: a kill or a full disk leaves the old file whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save calls a full disk a RuntimeError
        part.exists() and part.unlink()
        check(False, f"could not write {path}: {error}")


def record_on_cuda(update: Callable, device: torch.device) -> Callable:
    """On CUDA, replay `update` as a CUDA graph, one per value of its arguments; `update` may wait for no tensor's value."""
    graphs, calls = {}, Counter()

    def replay(*variant):
        calls[variant] += 1
        if calls[variant] <= 3:  # warm-up
            return update(*variant)
        if variant not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, runs nothing
                graphs[variant] = graph, update(*variant)
        graphs[variant][0].replay()
        return graphs[variant][1]
    return replay if device.type == "cuda" else update


class Run:
    """The record of one run in <out>/<algorithm>/<env>/seed<k>/: events, checkpoint.pt, policy.pt, result.json."""

    def __init__(self, args, data: Dataset, variant: str = ""):
        """Seeds torch, so make it before the networks. `variant` names a mode: -top10 makes bc-top10 beside bc."""
        for name in ("steps", "batch_size", "eval_every", "eval_episodes", "final_episodes", "policy_delay", "target_every",
                     "snapshot_every", "num_samples"):
            value = getattr(args, name, 1)
            check(value > 0, f"--{name.replace('_', '-')} must be at least 1, not {value}")
        self.args, self.data, self.curve, self.seconds, self.stop = args, data, [], 0.0, False
        self.algorithm = Path(sys.modules[type(args).__module__].__file__).stem + variant
        self.folder = Path(args.out) / self.algorithm / args.env.removesuffix(".hdf5").replace("/", "_") / f"seed{args.seed}"
        used, returns = int(data.size), data.returns()
        content = data.packed[:used].cpu().numpy().tobytes() + data.truncated[:used].cpu().numpy().tobytes()
        self.dataset = dict(name=data.name, fingerprint=hashlib.blake2b(content, digest_size=8).hexdigest(),
                            transitions=used, episodes=len(returns), return_mean=returns.mean())
        torch.manual_seed(args.seed)

    def resume(self, **state) -> int:
        """Hand over all that training changes: modules, optimizers, tensors. Returns the last step taken, 0 when fresh."""
        self.state, self.checkpoint, step = state, self.folder / "checkpoint.pt", 0
        self.settings = asdict(self.args) | {"data": self.dataset["fingerprint"]}
        if self.args.resume:
            check(self.checkpoint.exists(), f"--resume, but there is no {self.checkpoint}; start without --resume")
            saved = torch.load(self.checkpoint, map_location=self.data.device, weights_only=True)
            step, self.curve, self.seconds, rngs = (saved[key] for key in ("step", "curve", "seconds", "rngs"))
            other = [f"{key} was {value}" for key, value in saved["settings"].items() if self.settings[key] != value
                     and key not in ("resume", "out", "device", "steps")] + ["more --steps"] * (step > self.args.steps)
            check(not other, f"--resume with other settings: {', '.join(other)}; use the same or start without --resume")
            for name, part in state.items():
                if isinstance(part, torch.Tensor):  # an online run's memory may have more room now than it had
                    part.data.view(-1)[:saved[name].numel()].copy_(saved[name].view(-1))
                else:
                    part.load_state_dict(saved[name])
            for set_state, rng in zip((torch.set_rng_state, torch.cuda.set_rng_state), rngs):
                set_state(rng.cpu())
        elif self.folder.exists():  # an earlier run of this name is kept
            self.folder.rename(f"{self.folder}.{time.strftime('%Y%m%d-%H%M%S')}")
        write_atomically(self.folder / "settings.json", lambda part: part.write_text(json.dumps(self.settings, indent=1)))
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, so after the checks
        self.writer = SummaryWriter(self.folder, purge_step=step + 1)
        print(f"{self.algorithm} on {self.data.name} ({int(self.data.size):,} transitions), writes {self.folder}", flush=True)
        self.handler = signal.signal(signal.SIGINT, lambda *_: setattr(self, "stop", True))  # seen after the update under way
        self.bar = tqdm(total=self.args.steps, initial=step, unit=" updates", leave=False,
                        mininterval=0.2 if sys.stderr.isatty() else 30)
        self.since = time.time()
        return step

    def step(self, step: int, metrics: dict[str, torch.Tensor], act: Callable) -> None:
        """After each update. Logs every 100; every --eval-every evaluates and checkpoints; after Ctrl-C leaves, saved."""
        if self.bar.n == self.bar.initial:
            self.bar.unpause()  # its clock starts here: what was fitted before the first update does not count
        self.bar.update()
        due = step % self.args.eval_every == 0 or step == self.args.steps
        if step % 100 and not due and not self.stop:
            return
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            check(np.isfinite(value), f"{name} is {value} by step {step:,}; the last good state, if any, is {self.checkpoint}")
            self.writer.add_scalar(f"train/{name}", value, step)
        self.bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in values.items()), refresh=False)
        if due or self.stop:
            self.seconds += time.time() - self.since
            if due:
                returns, score = self._evaluate(act, f"step {step:,}", self.args.eval_episodes, self.args.seed)
                self.writer.add_scalar("eval/return", np.mean(returns), step)
                self.curve.append(dict(step=step, returns=returns, score=score, metrics=values))
            saved = {name: part if isinstance(part, torch.Tensor) else part.state_dict() for name, part in self.state.items()}
            rngs = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.data.device.type == "cuda" else [])]
            saved |= dict(step=step, curve=self.curve, seconds=self.seconds, rngs=rngs, settings=self.settings)
            write_atomically(self.checkpoint, lambda part: torch.save(saved, part))
            check(not self.stop, f"stopped after step {step:,}; the same command with --resume goes on from there")
            self.since = time.time()  # evaluations do not count in updates per second

    def _evaluate(self, act: Callable, label: str, episodes: int, seed: int) -> tuple[list[float], float | None]:
        record = getattr(act, "record", None)  # a policy with a memory has one, to see rewards
        returns = evaluate(act, self.data.env_id, episodes, 10**6 * seed, self.data.device, record)
        score = self.data.score(returns)
        shown = "none" if score is None else f"{score:.1f}"
        self.bar.write(f"{label:<15} return {returns.mean():8.1f} ± {returns.std():6.1f}   score {shown:>6}")
        return returns.tolist(), score

    def finish(self, actor: torch.nn.Module) -> None:
        """Evaluates the final policy over --final-episodes; writes policy.pt and result.json."""
        self.bar.close()
        self.writer.close()
        signal.signal(signal.SIGINT, self.handler)
        data, args = self.data, self.args
        returns, score = self._evaluate(actor.act, "final", args.final_episodes, args.seed + 1000)
        chip = torch.cuda.get_device_name() if data.device.type == "cuda" else os.uname().machine
        result = dict(algorithm=self.algorithm, env=args.env, seed=args.seed, steps=args.steps, args=asdict(args),
                      dataset=self.dataset, env_id=data.env_id, hardware=f"{chip}, {torch.get_num_threads()} threads",
                      versions=dict(torch=torch.__version__, numpy=np.__version__, gymnasium=gym.__version__), curve=self.curve,
                      seconds=self.seconds, updates_per_second=args.steps / self.seconds, final_returns=returns, score=score)
        policy = dict(algorithm=self.algorithm, env_id=data.env_id, obs_dim=data.obs_dim,
                      action_dim=data.num_actions or data.action_dim)
        write_atomically(self.folder / "policy.pt", lambda part: torch.save(policy | dict(actor=actor.state_dict()), part))
        write_atomically(self.folder / "result.json", lambda part: part.write_text(json.dumps(result, indent=1)))
