"""Shared by all algorithm files: data, evaluation, the record of a run. Nothing here learns.

  1. Data        load_dataset(name) gives a Dataset of named tensors, data.sample(256) a Batch
  2. Evaluation  evaluate(act, env_spec, episodes, seed) gives the return of each episode
  3. Run record  Run writes events, checkpoint, policy and result
  4. Reading     Minari datasets and D4RL files as people have them, for section 1
  5. Files       load_policy(folder) gives a saved policy's act
  6. Speed       matrix products, threads, CUDA graphs

An episode ends in one of two ways. `terminated`: the task is over (the robot fell), and what would
follow is worth zero. `truncated`: only the recording stops (a time limit), and the last state keeps
its value. Only `terminated` may stop a bootstrap.
"""
import copy
import ctypes
import difflib
import hashlib
import importlib
import io
import json
import logging
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MethodType
from typing import NamedTuple, NoReturn

try:  # By default glibc returns freed memory; asking for it anew costs CQL a quarter of its speed.
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep it
    ctypes.CDLL(None).mallopt(-3, 2**27)  # M_MMAP_THRESHOLD: larger blocks still go back at once
except (AttributeError, OSError, TypeError):  # another C library, or Windows
    pass

# Threads that wait for work sleep instead of spinning: beside another process, spinning threads
# lose four fifths of their speed. Torch reads this when it is loaded, so files import common first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def excepthook(kind, error, trace) -> None:
    """Ctrl-C before the run begins, as while torch is loaded: a line in place of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def thread_excepthook(failure) -> None:
    """A full disk ends TensorBoard's thread, too; Run._log says so in one line."""
    ours = type(failure.thread).__module__.startswith("tensorboard")
    if not (ours and issubclass(failure.exc_type, OSError)):
        threading.__excepthook__(failure)


if sys.excepthook is sys.__excepthook__:  # no debugger has its own
    sys.excepthook = excepthook
    threading.excepthook = thread_excepthook

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from torch import Tensor
from tqdm import tqdm

SUITE = {  # body: environment, and the returns that score 0 and 100
    "hopper": ("Hopper-v5", -20.272305, 3234.3),  # D4RL's, as the next two
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
    "pendulum": ("Pendulum-v1", -1200.0, -150.0),  # ours: a random and a good policy's
    "cartpole": ("CartPole-v1", 22.0, 500.0),
    "acrobot": ("Acrobot-v1", -500.0, -80.0),
}
LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert")
NAMES = [f"{body}-{level}" for body in SUITE for level in LEVELS]
NAMES += ["cartpole-replay", "acrobot-replay"]
NO_RANGE = (math.nan, math.nan)  # where the returns that score 0 and 100 are not known
COLUMNS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
HERE = Path(__file__).resolve().parent


if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks ends no run


def fail(message: str) -> NoReturn:
    """Ends the run: one line that says what is wrong and what to do, and exit code 2."""
    tqdm.write("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def notice(message: str) -> None:
    """One line about what the run does by itself, and what its user should know."""
    tqdm.write("note: " + " ".join(message.split()), file=sys.stderr)


def say(message: str) -> None:
    """One line of output. Training continues where the reader of a pipe, as `| head`, has left."""
    try:
        tqdm.write(message)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_range(args, names: str, low: float, high: float = math.inf) -> None:
    """Each setting in `names` (separated by blanks) must lie in [low, high]; else the run ends."""
    for name in names.split():
        value = getattr(args, name)
        if not low <= value <= high or value == math.inf:
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            fail(f"--{name.replace('_', '-')} must be {bounds}, not {value}")


def parse_args(args_class, tuned: dict[str, dict]):
    """Parses the command line. On a dataset in `tuned` its values replace the defaults.

    They are printed. What the user sets has priority. --help shows the table.
    """
    import tyro

    text = "Values for single datasets, in place of the defaults:"
    for env, values in tuned.items():
        settings = [f"--{name.replace('_', '-')} {value}" for name, value in values.items()]
        text += f"\n\n{env}: " + " ".join(settings)
    values = tuned.get(tyro.cli(args_class, description=text).env, {})
    args = tyro.cli(args_class, default=args_class(**values), description=text)
    for name, value in values.items():
        if getattr(args, name) == value:
            say(f"tuned for {args.env}: --{name.replace('_', '-')} {value}")
    return args


# ---- 1. Data


class Batch(NamedTuple):
    """B transitions drawn from a dataset."""

    obs: Tensor  # (B, S)
    action: Tensor  # (B, A) in [-1, 1], or (B,) integers from 0
    reward: Tensor  # (B,)
    next_obs: Tensor  # (B, S)
    terminated: Tensor  # (B,) 1 where the task is over, else 0


class Dataset:
    """N logged transitions in the order of recording, as tensors on one device.

    obs and next_obs (N, S) float32, or images as bytes; action (N, A) float32 in [-1, 1], or (N,)
    int64 from 0; reward (N,) float32; terminated (N,) float32, 0 or 1; truncated (N,) bool. The
    environment's own action is action_mid + action_half * action, a discrete one is first_action +
    action.
    """

    def __init__(self, name: str, columns: dict[str, Tensor], action_space: spaces.Space,
                 env_spec: str | None = None, score_range: tuple[float, float] = NO_RANGE,
                 device: torch.device | str = "cpu"):
        self.name = name
        self.env_spec = env_spec  # what make_env evaluates in; None: nothing
        self.recorded_env = env_id(env_spec)  # id of the data's environment, if it is known
        self.score_range = score_range  # the returns that score 0 and 100, or NaN
        self.device = torch.device(device)
        self.obs = columns["obs"].to(device)
        self.action = columns["action"].to(device)
        self.reward = columns["reward"].to(device)
        self.next_obs = columns["next_obs"].to(device)
        self.terminated = columns["terminated"].to(device)
        self.truncated = columns["truncated"].to(device)
        self.size = len(self.reward)
        self.obs_shape = tuple(self.obs.shape[1:])  # (S,), or an image's
        self.obs_dim = math.prod(self.obs_shape)
        self.action_space = action_space
        if isinstance(action_space, spaces.Discrete):
            self.num_actions = int(action_space.n)
            self.first_action = int(action_space.start)
            self.action_dim = 1
            low, high = -1, 1
        else:
            self.num_actions = None
            self.first_action = 0
            self.action_dim = self.action.shape[1]
            low, high = action_space.low.ravel(), action_space.high.ravel()
        mid, half = action_units(low, high)
        self.action_mid = torch.as_tensor(mid, device=device)  # (A,)
        self.action_half = torch.as_tensor(half, device=device)  # (A,)

    def draw_rows(self, batch_size: int) -> Tensor:
        """Row numbers (B,), uniform with replacement, drawn on the device: no wait for the host."""
        return torch.randint(self.size, (batch_size,), device=self.device)

    def rows(self, index: Tensor) -> Batch:
        """The transitions with these row numbers (B,)."""
        return Batch(obs=self.obs.index_select(0, index),
                     action=self.action.index_select(0, index),
                     reward=self.reward.index_select(0, index),
                     next_obs=self.next_obs.index_select(0, index),
                     terminated=self.terminated.index_select(0, index))

    def sample(self, batch_size: int) -> Batch:
        """A batch drawn uniformly with replacement."""
        return self.rows(self.draw_rows(batch_size))

    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of each episode, and the row after its last one, (E,) each.

        An unfinished last episode counts.
        """
        ends = self.terminated.bool() | self.truncated
        stops = np.union1d(ends.nonzero().cpu().numpy() + 1, self.size)
        return np.append(0, stops[:-1]), stops

    def returns(self) -> np.ndarray:
        """The undiscounted return of each episode, (E,)."""
        return np.add.reduceat(self.reward.double().cpu().numpy(), self.episodes()[0])

    def finished(self) -> np.ndarray:
        """(E,): True where an episode ends in the data; the return of one cut off is not known.

        All True where no episode ends.
        """
        ends = (self.terminated.bool() | self.truncated).cpu().numpy()[self.episodes()[1] - 1]
        return ends | ~ends.any()

    def keep(self, index: np.ndarray) -> None:
        """Keeps only the rows of this index (M,), in this order.

        Give whole episodes if episodes() or returns() are used afterwards.
        """
        index = torch.as_tensor(index, device=self.device)
        for name in COLUMNS:
            setattr(self, name, getattr(self, name).index_select(0, index))
        self.size = len(index)

    def score(self, returns) -> float | None:
        """D4RL's normalised mean return; None where score_range is not known."""
        low, high = self.score_range
        if not low < high:
            return None
        return 100 * (float(np.mean(returns)) - low) / (high - low)

    def describe(self) -> dict:
        """Name, size, mean return and a fingerprint of the contents, for the run record."""
        digest = hashlib.blake2b(digest_size=8)
        for name in COLUMNS:
            digest.update(getattr(self, name).cpu().contiguous().numpy().ravel())
        returns = self.returns()
        return {"name": self.name, "fingerprint": digest.hexdigest(), "transitions": self.size,
                "episodes": len(returns), "return_mean": float(returns.mean())}


def load_dataset(name: str, device: str = "auto", discrete: bool | None = False,
                 images: bool = False, eval_env: str = "auto", holdout: float = 0.0) -> Dataset:
    """A suite dataset (hopper-medium), a Minari dataset by its id, or a file by its path.

    `device` is "cpu", "cuda", or "auto": CUDA where PyTorch finds it. `discrete` says which actions
    the algorithm takes (None: both), `images` whether its network takes images. `eval_env` is what
    to evaluate in: "auto" the recorded environment, "none" nothing, or a Gymnasium id. `holdout` is
    the share of episodes that are left out. What does not fit ends the run with one line.
    """
    has_cuda = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not has_cuda):
        fail(f"--device {device}: give auto, cpu or, where PyTorch finds one, cuda")
    target = "cuda" if has_cuda and device != "cpu" else "cpu"
    source = read_source(name, eval_env)
    check_source(name, source, discrete, images)
    check_scale(name, source.columns["obs"])
    columns = source.columns
    columns["action"], action_space = scale_actions(name, columns["action"], source.action_space)
    columns["terminated"] = columns["terminated"].astype(np.float32)
    env_spec, score_range = choose_env(name, source, eval_env)
    tensors = {key: torch.as_tensor(column) for key, column in columns.items()}
    data = Dataset(name, tensors, action_space, env_spec, score_range, target)
    if source.env:  # known also where nothing is evaluated
        data.recorded_env = env_id(source.env).rpartition(":")[2]  # without its module
    if holdout != 0:
        split_episodes(data, holdout, held_out=False)
    return data


# ---- 2. Evaluation

MAX_ENVS = 20  # environments that evaluation holds at a time


def make_env(env: str) -> gym.Env:
    """From a Gymnasium id, or a recorded specification in JSON; it never renders.

    The id may be module:Name-v0, where importing the module registers the environment. Raises what
    Gymnasium raises where it is unknown or a package is missing.
    """
    if "" not in sys.path:
        sys.path.append("")  # modules of the current folder may have the environment
    if env.startswith("{"):
        spec = EnvSpec.from_json(env)
    else:
        module, _, name = env.rpartition(":")
        if module:
            importlib.import_module(module)
        spec = gym.spec(name)
    if "mujoco" in str(spec.entry_point):
        import mujoco  # its warnings about its own models would fill the terminal and a log file

        if hasattr(mujoco, "set_mju_user_warning"):
            mujoco.set_mju_user_warning(lambda message: None)
    return gym.make(spec, disable_env_checker=True)


def encode_obs(space: spaces.Space, obs) -> np.ndarray:
    """One observation as policies and datasets see it: flat float32 (S,), or an image as it is."""
    if is_image(space):
        return np.asarray(obs)
    if isinstance(space, spaces.Box):
        return np.asarray(obs, np.float32).ravel()
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = [encode_obs(part, value).ravel() for part, value in parts_of(space, obs)]
        return np.concatenate(parts, dtype=np.float32)
    return np.asarray(spaces.flatten(space, obs), np.float32)


def parts_of(space: spaces.Dict | spaces.Tuple, values) -> list[tuple]:
    """The parts of a space with their values; those of a Dict by name, as Minari keeps them."""
    if isinstance(space, spaces.Dict):
        return [(part, values[key]) for key, part in sorted(space.spaces.items())]
    return list(zip(space.spaces, values))


def is_image(space: spaces.Space) -> bool:
    """Bytes in two to four dimensions (a stack of colour images), at least 32 wide and high."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) in (2, 3, 4) and sorted(space.shape)[-2] >= 32


def decode_action(space: spaces.Space, action: np.ndarray):
    """One row of a policy's answer, (A,) or (), as the environment's step takes it."""
    if isinstance(space, spaces.Discrete):
        return int(action)
    if np.issubdtype(space.dtype, np.integer):
        action = np.round(action)
    # clipped first: an integer type would wrap around
    return action.reshape(space.shape).clip(space.low, space.high).astype(space.dtype)


def evaluate(act: Callable, env_spec: str, episodes: int, seed: int = 0, device="cpu",
             record: Callable | None = None) -> np.ndarray:
    """Undiscounted returns (E,) of a policy, act.

    act takes raw observations (E, S) and gives the environment's own actions, (E, A) or (E,).
    Episode i starts from seed + i. Up to MAX_ENVS episodes are played at a time, with one call of
    act for all: a row remains one episode until the last one ends, and act's answer for an ended
    episode is ignored. `record(i, obs, action, reward, next_obs, terminated, truncated)` sees each
    transition of episode i. A policy with a memory has act.start(rows) and, called after each step,
    act.record(row, reward), the row within the group.
    Raises ValueError where a reward or an observation is not finite.
    """
    envs = []
    returns = []
    try:
        for _ in range(min(episodes, MAX_ENVS)):
            envs.append(make_env(env_spec))
        for first in range(0, episodes, MAX_ENVS):
            group = envs[:episodes - first]
            returns += play(act, group, first, seed, device, record)
    finally:
        for env in envs:
            with suppress(Exception):  # an error while closing changes no result
                env.close()
    return np.array(returns)


def play(act: Callable, envs: list[gym.Env], first: int, seed: int, device,
         record: Callable | None) -> list[float]:
    """One group of episodes, as described in evaluate; `first` is the number of its first."""
    obs_space = envs[0].observation_space
    action_space = envs[0].action_space
    # numpy's own random state takes 32 bits of a seed
    resets = [env.reset(seed=(seed + first + i) % 2**32) for i, env in enumerate(envs)]
    obs = np.stack([encode_obs(obs_space, start) for start, _ in resets])  # (E, S)
    if hasattr(act, "start"):
        act.start(len(envs))
    returns = [0.0] * len(envs)
    alive = list(range(len(envs)))
    while alive:
        action = act(torch.as_tensor(obs, device=device)).cpu().numpy()  # (E, A)
        for i in tuple(alive):
            own = decode_action(action_space, action[i])
            next_obs, reward, terminated, truncated, _ = envs[i].step(own)
            next_obs = encode_obs(obs_space, next_obs)
            reward = float(np.asarray(reward).item())  # some environments give an array (1,)
            if not (math.isfinite(reward) and np.isfinite(next_obs).all()):
                raise ValueError(f"a step gave the reward {reward} and the observation {next_obs}")
            terminated = bool(terminated)
            truncated = bool(truncated)
            if record:
                record(first + i, obs[i].copy(), action[i], reward, next_obs.copy(), terminated,
                       truncated)
            if hasattr(act, "record"):
                act.record(i, reward)
            obs[i] = next_obs
            returns[i] += reward
            if terminated or truncated:
                alive.remove(i)
    return returns


# ---- 3. Run record

MAY_CHANGE = (  # settings that may be others when a run resumes: they do not change what it learns,
    # but for --steps in iql.py, whose learning rate falls to 0 at the last step
    "env", "resume", "out", "device", "threads", "steps", "eval_every", "eval_episodes",
    "final_episodes", "eval_env")


def run_folder(args, algorithm: str) -> Path:
    """Where a run is recorded; of a file's path only its name counts."""
    env = Path(args.env).stem if is_file(args.env) else args.env
    env = re.sub(r"[^\w.-]", "_", env)
    return Path(os.path.expanduser(args.out)) / algorithm / env / f"seed{args.seed}"


def take_folder(folder: Path, resume: bool = False):
    """Locks a run's folder against other processes, and gives the open lock file.

    A fresh run renames an earlier one. Where another process has the lock, the run ends.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder.parent / f".{folder.name}.lock")
        if lock is None:
            fail(f"another process is writing {folder}; wait for its end, or give another --seed "
                 "or --out")
        if folder.exists() and not resume:
            earlier = folder.rename(f"{folder}.{datetime.now():%Y%m%d-%H%M%S-%f}")
            notice(f"the earlier run in {folder} is now {earlier}")
        for part in folder.glob(".[0-9]*"):  # what a killed process left half written
            part.unlink()
    except OSError as error:
        fail(f"could not write {folder}: {error}")
    return lock


class Run:
    """The record of one run in <out>/<algorithm>/<env>/seed<k>/.

    It writes TensorBoard's events, settings.json, checkpoint.pt, policy.pt, policy.pt2 and
    result.json. The checkpoint holds all that training changes, the random state and the curve,
    and is written before an evaluation starts: a resumed run ends with the same numbers, bit for
    bit, on the same machine.
    """

    def __init__(self, args, data: Dataset, variant: str = "", gflop: float = 0.5):
        """Seeds torch, so make it before the networks.

        `variant` names a mode: -top10 makes bc-top10 beside bc. `gflop` is the work of one update
        (make bench prints it); it decides how many threads help.
        """
        check_range(args, "steps eval_every", 1)
        check_range(args, "eval_episodes final_episodes", 0)
        check_range(args, "seed", 0, 2**31 - 1)
        check_range(args, "threads", 0, 1024)
        if hasattr(args, "batch_size"):
            check_range(args, "batch_size", 1, 2**20)  # more would only fill the memory
        use_threads(args.threads, gflop)
        torch.manual_seed(args.seed)
        self.args = args
        self.data = data
        self.dataset = data.describe()
        program = Path(sys.modules[type(args).__module__].__file__)
        self.module = program.stem
        self.code = hashlib.blake2b(program.read_bytes(), digest_size=8).hexdigest()
        self.algorithm = self.module + variant
        self.folder = run_folder(args, self.algorithm)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.curve = []
        self.seconds = 0.0  # of training
        self.metrics = {}  # the newest of each name: not every step updates the actor
        self.due = None  # (step, metrics) of a checkpoint whose evaluation is still to come
        self.unsaved = False  # something was learned since the last checkpoint
        self.stop = False  # Ctrl-C or SIGTERM came

    def begin(self, learned: dict, actor: torch.nn.Module) -> int:
        """Takes all that training changes (modules, optimizers, tensors); actor.act is evaluated.

        Returns the last step taken, 0 in a fresh run.
        """
        self.learned = learned
        self.actor = actor
        self.settings = asdict(self.args)
        self.settings |= {"algorithm": self.algorithm, "data": self.dataset["fingerprint"]}
        self.lock = take_folder(self.folder, self.args.resume)
        step = self._load_checkpoint() if self.args.resume else 0
        write_json(self.folder / "settings.json", self.settings)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so after the checks

        # events after the checkpoint will be written again, those of a due evaluation as well
        try:
            self.writer = SummaryWriter(self.folder, purge_step=step if self.due else step + 1)
        except OSError as error:
            fail(f"could not write {self.folder}: {error}")
        say(f"{self.algorithm} on {self.data.name} ({self.data.size:,} transitions), "
            f"writes {self.folder}")
        self.bar = tqdm(total=self.args.steps, initial=step, unit=" updates", leave=False,
                        mininterval=0.2 if sys.stderr.isatty() else 30)
        self.handlers = {}
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            numbers.append(signal.SIGHUP)  # the terminal was closed; nohup ignores it
        for number in numbers:
            with suppress(ValueError):  # only the main thread may take signals
                self.handlers[number] = signal.signal(number, self._on_signal)
        if self.due:  # the last process ended between a checkpoint and its evaluation
            self._evaluate_due()
        self.unsaved = step < self.args.steps  # else only the final evaluation is left
        self.since = time.time()
        return step

    def step(self, step: int, metrics: dict[str, Tensor]) -> None:
        """After each update. Every 100 it logs, every --eval-every it saves and evaluates.

        `metrics` are tensors of one number, without gradient. After Ctrl-C it saves and ends.
        """
        if self.bar.n == self.bar.initial:
            self.bar.unpause()  # its clock starts here: what was fitted before does not count
        self.bar.update()
        self.metrics.update(metrics)
        self.unsaved = True
        due = step % self.args.eval_every == 0 or step == self.args.steps
        if step % 100 != 0 and not due and not self.stop:
            return
        values = {name: float(value) for name, value in self.metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                kept = f"; {self.checkpoint} is from before" if self.checkpoint.exists() else ""
                self._fail(f"{name} is {value} by step {step:,}{kept}; --resume would end the same "
                           "way, start again with a smaller learning rate")
        shown = " ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.bar.set_postfix_str(shown, refresh=False)
        if due:
            self.due = (step, values)
        else:
            self._log(step, values)
        if due or self.stop:
            self.save(step)
        if self.stop:
            self._fail(f"stopped after step {step:,}; {self._last_state()}")
        if due:
            self._evaluate_due()
            self.since = time.time()  # evaluations do not count in updates per second

    def save(self, step: int) -> None:
        """Writes checkpoint.pt as the state after this step."""
        now = time.time()
        self.seconds += now - self.since
        self.since = now
        learned = {}
        for name, part in self.learned.items():
            learned[name] = part if isinstance(part, Tensor) else part.state_dict()
        saved = {"step": step, "learned": learned, "settings": self.settings, "curve": self.curve,
                 "metrics": self.metrics, "due": self.due, "seconds": self.seconds,
                 "rng": torch.get_rng_state(), "code": self.code}
        if self.data.device.type == "cuda":
            saved["cuda_rng"] = torch.cuda.get_rng_state()
        write_atomically(self.checkpoint, lambda part: torch.save(saved, part))
        self.unsaved = False

    def finish(self) -> None:
        """Saves the final policy, evaluates it over --final-episodes, and writes result.json."""
        args = self.args
        data = self.data
        self.bar.close()
        save_policy(self.folder, self.module, self.algorithm, self.actor, data)
        returns, score = self._evaluate("final", args.final_episodes, args.seed + 1000)
        chip = torch.cuda.get_device_name() if data.device.type == "cuda" else platform.machine()
        versions = {}
        for package in ("torch", "numpy", "gymnasium", "mujoco", "minari"):
            with suppress(PackageNotFoundError):
                versions[package] = version(package)
        result = {"algorithm": self.algorithm, "env": args.env, "seed": args.seed,
                  "steps": args.steps, "args": asdict(args), "dataset": self.dataset,
                  "env_id": env_id(data.env_spec), "versions": versions,
                  "hardware": f"{chip}, {torch.get_num_threads()} threads",
                  "matrix_products": PRODUCTS, "curve": self.curve, "final_returns": returns,
                  "score": score, "seconds": self.seconds,
                  "updates_per_second": args.steps / self.seconds}
        write_json(self.folder / "result.json", result)
        self.close()

    def close(self) -> None:
        """Gives back what begin took: signals, bar, events, folder."""
        self._restore_signals()
        self.bar.close()
        with suppress(OSError):  # a full disk; what it must hold was written before
            self.writer.close()
        self.lock.close()

    def _fail(self, message: str) -> NoReturn:
        self.close()
        fail(message)

    def _restore_signals(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        """Ctrl-C, SIGTERM or a closed terminal: the update under way is the last, and is saved.

        It ends at once where everything is saved already, and at the second Ctrl-C. A second
        SIGTERM changes nothing: Slurm sends one to each process of a job, and parents forward it.
        """
        if self.unsaved and (not self.stop or number != signal.SIGINT):
            self.stop = True
            return
        self._restore_signals()
        self.stop = True
        self.bar.close()  # not the writer: the signal may have come in the midst of its work
        fail(f"stopped; {self._last_state()}")

    def _last_state(self) -> str:
        if self.checkpoint.exists():
            return f"the same command with --resume continues from {self.checkpoint}"
        return "nothing was saved yet"

    def _load_checkpoint(self) -> int:
        """Brings back the state that the checkpoint holds, and returns its step."""
        path = self.checkpoint
        if not path.exists():
            fail(f"--resume, but there is no {path}; start without --resume")
        try:
            saved = torch.load(path, map_location=self.data.device, weights_only=True)
            step = saved["step"]
            if saved["settings"]["data"] != self.settings["data"]:
                fail(f"--resume, but the data are not those of {path}: another dataset, or other "
                     "action bounds, which --eval-env may give; use the same (--eval-episodes 0 "
                     "--final-episodes 0 plays nothing) or start without --resume")
            other = [f"{key} was {value}" for key, value in saved["settings"].items()
                     if key not in MAY_CHANGE and self.settings.get(key) != value]
            if other:
                fail(f"--resume with other settings: {', '.join(other)}; "
                     "use the same or start without --resume")
            if step > self.args.steps:
                fail(f"--resume, but {path} was saved at step {step:,}, more than --steps "
                     f"{self.args.steps:,}")
            if saved.get("code", self.code) != self.code:
                notice(f"{self.module}.py has changed since {path} was saved")
            for name, part in self.learned.items():
                if isinstance(part, Tensor):
                    part.data.copy_(saved["learned"][name])
                else:
                    part.load_state_dict(saved["learned"][name])
                if isinstance(part, torch.optim.Optimizer):
                    for group in part.param_groups:  # a run on a CPU may continue on CUDA
                        group["capturable"] = self.data.device.type == "cuda"
            self.curve = saved["curve"]
            self.seconds = saved["seconds"]
            self.metrics = saved.get("metrics", {})  # older checkpoints lack it
            self.due = saved["due"]
            torch.set_rng_state(saved["rng"].cpu())
            if self.data.device.type == "cuda" and "cuda_rng" in saved:
                torch.cuda.set_rng_state(saved["cuda_rng"].cpu())
        except Exception as error:
            fail(f"--resume, but {path} is damaged or from another program "
                 f"({type(error).__name__}); start without --resume")
        return step

    def _log(self, step: int, values: dict[str, float], group: str = "train") -> None:
        try:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
            self.writer.flush()  # a kill must not cost events that come before a checkpoint
        except OSError as error:
            self._fail(f"could not write {self.folder}: {error}")

    def _evaluate_due(self) -> None:
        """The evaluation that belongs to the last checkpoint."""
        step, values = self.due
        returns, score = self._evaluate(f"step {step:,}", self.args.eval_episodes, self.args.seed)
        self._log(step, values)
        if returns:
            self._log(step, {"return": float(np.mean(returns))}, "eval")
        self.curve.append({"step": step, "returns": returns, "score": score, "metrics": values})
        self.due = None

    def _evaluate(self, label: str, episodes: int, seed: int) -> tuple[list[float], float | None]:
        """Returns and score, empty without an environment. Training's random state stays."""
        data = self.data
        if data.env_spec is None:
            shown = " ".join(f"{key} {float(value):.3g}" for key, value in self.metrics.items())
            say(f"{label:<15} not played; {shown}")
            return [], None
        if episodes == 0:
            return [], None
        cuda = [torch.cuda.current_device()] if data.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(cuda):
                torch.manual_seed(seed)
                returns = evaluate(self.actor.act, data.env_spec, episodes, 10**6 * seed,
                                   data.device)
        except (Exception, SystemExit) as error:  # whatever an environment may raise
            if self.stop:  # the run was stopped: the environment did not fail
                raise
            self._fail(f"the evaluation in {env_id(data.env_spec)} failed ("
                       f"{type(error).__name__}: {error}); training is saved in {self.checkpoint}, "
                       "and --resume --eval-episodes 0 --final-episodes 0 continues without "
                       "evaluation")
        score = data.score(returns)
        shown = "none" if score is None else f"{score:.1f}"
        say(f"{label:<15} return {returns.mean():8.1f} ± {returns.std():6.1f}   "
            f"score {shown:>6}")
        return returns.tolist(), score


# ---- 4. Reading: data as people have them

COLLECT = HERE / "results" / "behavior" / "collect.py"  # builds the suite's datasets
OTHER_BODIES = {  # D4RL's further bodies, as in SUITE; None: no environment of today has its data
    "antmaze": (None, 0.0, 1.0),
    "ant": ("Ant-v5", -325.6, 3879.7),
    "pen": ("gymnasium_robotics:AdroitHandPen-v1", 96.262799, 3076.8331017826877),
    "hammer": ("gymnasium_robotics:AdroitHandHammer-v1", -274.856578, 12794.134825156867),
    "door": ("gymnasium_robotics:AdroitHandDoor-v1", -56.512833, 2880.5693087298737),
    "relocate": ("gymnasium_robotics:AdroitHandRelocate-v1", -6.425911, 4233.877797728884),
}
COLUMNS_VERSION = 1  # of the columns that are kept beside a Minari dataset; a change reads it anew
MOST_ACTIONS = 10_000  # of a file whose environment is not known
RENDER_WRAPPERS = ("RecordVideo", "HumanRendering", "RenderCollection")  # they film or show
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


class Source(NamedTuple):
    """What was read: numpy columns of N rows, their actions in the units of the recording."""

    columns: dict[str, np.ndarray]
    obs_space: spaces.Space
    action_space: spaces.Space
    env: str | None  # a recorded specification, or an id
    score_range: tuple[float, float]


def is_file(name: str) -> bool:
    return name.lower().endswith((".hdf5", ".h5", ".npz"))


def env_id(env: str | None) -> str | None:
    """The id in a recorded specification; an id or None is returned unchanged."""
    try:
        return json.loads(env)["id"]
    except (KeyError, TypeError, ValueError):
        return env


def read_source(name: str, eval_env: str) -> Source:
    """What stands behind a name. A dataset of the suite is built, another one downloaded first."""
    try:
        with np.errstate(over="ignore"):  # check_source names what float32 can't hold
            if is_file(name):
                return read_file(Path(name).expanduser(), eval_env)
            if name not in NAMES:
                find_minari(name)
                return read_minari(name)
            body, _, level = name.partition("-")
            levels = ("medium", "expert") if level == "medium-expert" else (level,)
            return join([read_minari(build_suite_dataset(body, each)) for each in levels])
    except KeyboardInterrupt:
        fail(f"stopped while {name} was loaded; no run was started")
    except Exception as error:  # a damaged file, an unknown layout
        fail(f"can't read {name}: {type(error).__name__}, {error}")


def join(sources: list[Source]) -> Source:
    """One dataset after the other; no episode continues in the next dataset."""
    for source in sources[:-1]:
        source.columns["truncated"][-1] |= not source.columns["terminated"][-1]
    columns = {key: np.concatenate([source.columns[key] for source in sources]) for key in COLUMNS}
    return sources[0]._replace(columns=columns)


def build_suite_dataset(body: str, level: str) -> str:
    """The dataset's id. collect.py builds it where it is absent or of earlier policies."""
    dataset_id = f"local/{body}/{level}-v0"
    folder = minari_folder(dataset_id)
    if folder.exists():
        if not COLLECT.exists() or built_from(folder) == behavior_digest(body, level):
            return dataset_id
        notice(f"{body}-{level} on this disk is of earlier behaviour policies; it is built anew")
    if not COLLECT.exists():
        fail(f"{dataset_id} is not built, and only the repository can build it: run a file there "
             "once")
    builder = subprocess.Popen([sys.executable, COLLECT, dataset_id])
    before = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # only the main thread may take signals
        signal.signal(signal.SIGTERM, lambda *_: builder.terminate())
    try:
        failed = builder.wait() != 0
    except KeyboardInterrupt:  # it got the Ctrl-C, too
        failed = True
    with suppress(ValueError):
        signal.signal(signal.SIGTERM, before)
    if failed:
        fail(f"{dataset_id} was not built")
    return dataset_id


def behavior_digest(body: str, level: str) -> str:
    """Tells the policies of one level from others; results/behavior/choose.py wrote it."""
    path = COLLECT.parent / f"{body}.npz"
    if level == "random" or not path.exists():
        return level
    with np.load(path) as saved:
        return json.loads(str(saved["digests"])).get(level, level)


def built_from(folder: Path) -> str:
    """The digest of the policies that a built dataset comes from."""
    path = folder / "behavior"
    return path.read_text() if path.exists() else "unknown"


def minari_folder(dataset_id: str) -> Path:
    """Where Minari keeps a dataset."""
    from minari.storage import get_dataset_path

    try:
        return get_dataset_path(dataset_id)
    except OSError as error:
        fail(f"Minari's folder for datasets can't be used ({error}); MINARI_DATASETS_PATH names "
             "another one")


def find_minari(name: str) -> None:
    """Downloads a Minari dataset that is absent. Ends the run where the name can't be one."""
    import minari

    if re.fullmatch(r"[\w./-]+", name):
        if (minari_folder(name) / "data" / "metadata.json").exists():
            return
    near = ", ".join(difflib.get_close_matches(name, NAMES, 3, 0))
    if not re.fullmatch(r"[\w-]+(/[\w-]+)+-v\d+", name) or Path(name).exists():
        fail(f"unknown dataset '{name}'; near are {near}; a Minari id ends in its version, as -v0, "
             "and a file must be .hdf5, .h5 or .npz")
    try:
        # a download that was interrupted left its folder, and Minari would take it as complete
        minari.download_dataset(name, force_download=minari_folder(name).exists())
    except Exception as error:  # whatever a network or a store may have
        fail(f"{name} is not on this disk and could not be downloaded ({type(error).__name__}: "
             f"{error}); datasets that are built here have names like {near}")


def read_minari(dataset_id: str) -> Source:
    """A Minari dataset. Its columns are kept beside it: one group per episode is slow to read."""
    from minari.dataset.minari_storage import MinariStorage

    folder = minari_folder(dataset_id)
    try:
        storage = MinariStorage.read(folder / "data")
    except AssertionError:
        fail(f"{dataset_id} has no observation_space or no action_space in its metadata")
    check_action_space(dataset_id, storage.action_space)
    kept = folder / "columns.npz"
    parts = sorted((folder / "data").rglob("*"))  # each one: cp -p and rsync keep old times
    stamp = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in parts]
    stamp = f"{COLUMNS_VERSION} {stamp}"
    columns = read_kept_columns(kept, stamp)
    if columns is None:
        columns = flatten_episodes(dataset_id, storage)
        # a disk that is full or not ours costs time at the next start, not the run
        write_atomically(kept, lambda part: np.savez(part, stamp=stamp, **columns), notice)
    meta = storage.metadata
    score_range = NO_RANGE
    with suppress(TypeError, ValueError):  # null, or some text
        score_range = (float(meta.get("ref_min_score")), float(meta.get("ref_max_score")))
    return Source(columns, storage.observation_space, storage.action_space,
                  meta.get("eval_env_spec") or meta.get("env_spec"), score_range)


def read_kept_columns(path: Path, stamp: str) -> dict[str, np.ndarray] | None:
    """None where they are absent, damaged, or of an earlier state of the dataset."""
    try:
        with np.load(path) as file:
            return {key: file[key] for key in COLUMNS} if str(file["stamp"]) == stamp else None
    except Exception:
        return None


def flatten_episodes(dataset_id: str, storage) -> dict[str, np.ndarray]:
    """The columns of all episodes. A Minari episode has T + 1 observations for T actions."""
    parts = {key: [] for key in COLUMNS}
    total = storage.total_episodes
    bar = tqdm(storage.get_episodes(range(total)), f"reading {dataset_id}", total, leave=False,
               disable=None)
    for number, episode in enumerate(bar):
        steps = len(episode["rewards"])
        if steps == 0:  # the recording stopped right after a reset
            continue
        obs = flatten_obs(storage.observation_space, episode["observations"])
        action = np.asarray(episode["actions"])
        if len(obs) != steps + 1 or len(action) != steps:
            notice(f"episode {number} of {dataset_id} is left out: it has {len(obs)} observations "
                   f"and {len(action)} actions for {steps} steps, not {steps + 1} and {steps}")
            continue
        for key in ("rewards", "terminations", "truncations"):
            check_numbers(f"episode {number} of {dataset_id}: {key}", np.asarray(episode[key]),
                          flags=key != "rewards")
        terminated = np.array(episode["terminations"], bool).reshape(steps)
        truncated = np.array(episode["truncations"], bool).reshape(steps)
        if number < total - 1:
            truncated[-1] |= not terminated[-1]  # the next episode does not continue this one
        parts["obs"].append(obs[:-1])
        parts["action"].append(action.reshape(steps, -1))
        parts["reward"].append(np.asarray(episode["rewards"], np.float32).reshape(steps))
        parts["next_obs"].append(obs[1:])
        parts["terminated"].append(terminated)
        parts["truncated"].append(truncated)
    if not parts["obs"]:
        fail(f"{dataset_id} has no complete episode")
    return {key: np.concatenate(columns) for key, columns in parts.items()}


def flatten_obs(space: spaces.Space, values) -> np.ndarray:
    """T observations as encode_obs makes them: (T, S), or images as they are."""
    if is_image(space):
        return np.asarray(values)
    if isinstance(space, spaces.Box):
        return np.asarray(values, np.float32).reshape(len(values), -1)
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = [flatten_obs(part, column) for part, column in parts_of(space, values)]
        parts = [part.reshape(len(part), -1) for part in parts]
        return np.concatenate(parts, axis=1, dtype=np.float32)
    return np.stack([np.asarray(spaces.flatten(space, value), np.float32) for value in values])


def read_file(path: Path, eval_env: str) -> Source:
    """Flat arrays with D4RL's keys. A known body in the name tells environment and scores."""
    arrays = read_arrays(path)
    count = len(arrays["rewards"])
    obs = arrays["observations"]
    obs_space = spaces.Box(-np.inf, np.inf, obs.shape[1:])
    if obs.dtype == np.uint8:  # perhaps images
        obs_space = spaces.Box(0, 255, obs.shape[1:], np.uint8)
    columns = {"obs": flatten_obs(obs_space, obs), "action": arrays["actions"],
               "reward": arrays["rewards"].astype(np.float32).reshape(count),
               "next_obs": None, "terminated": arrays["terminals"].astype(bool).reshape(count)}
    if "next_observations" in arrays:
        columns["next_obs"] = flatten_obs(obs_space, arrays["next_observations"])
    check_finite(path.name, columns)  # before ends are looked for
    env_name, *score_range = known_body(path)
    if eval_env not in ("auto", "none"):
        env_name = eval_env
    env = env_with_such_obs(env_name, columns["obs"])
    if env is None and eval_env == "none":
        env_name = None  # the body is another one than the file's name says
    timeouts = arrays.get("timeouts", np.zeros(count))
    if timeouts.any():  # some files have the key, and nothing in it
        columns["truncated"] = timeouts.astype(bool).reshape(count)
    elif "episode_terminals" in arrays:  # d3rlpy 1 marks every end so
        ends = arrays["episode_terminals"].astype(bool).reshape(count)
        columns["truncated"] = ends & ~columns["terminated"]
    else:
        columns["truncated"] = find_ends(path.name, columns, env)
    if "next_observations" in arrays:
        check_cuts(path.name, columns)
    else:
        columns = infer_next_obs(columns)
        left_out = count - len(columns["reward"])
        if left_out:
            notice(f"{left_out} of {count} rows of {path.name} are left out, with their rewards, "
                   "since the observation that followed is not known; next_observations give it")
    action_space = file_action_space(path.name, arrays["actions"], env)
    return Source(columns, obs_space, action_space, env_name, tuple(score_range))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that have D4RL's keys: at least the first four, all of one length."""
    if not path.is_file():
        fail(f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
    if path.suffix.lower() == ".npz":
        opened = np.lib.npyio.NpzFile(path)  # np.load would take other files for pickles
    else:
        import h5py

        opened = h5py.File(path)
    with opened as file:
        found = list(file)
        wanted = [key for key in (*KEYS, "episode_terminals") if key in found]
        arrays = {key: read_array(file, key) for key in wanted}
    missing = [key for key in KEYS[:4] if key not in found]
    if missing:
        if "episode_0" in found:
            fail(f"{path} is a part of a Minari dataset; give the dataset's id")
        shown = ", ".join(found[:10]) + (" and others" if len(found) > 10 else "")
        fail(f"{path} lacks {', '.join(missing)}; looked for {', '.join(KEYS)}, of which the last "
             f"two may be absent; found {shown or 'nothing'}")
    count = len(arrays["rewards"])
    if count == 0:
        fail(f"{path} is empty")
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            fail(f"{path}: {key} must be an array of real numbers with a row for each step, of all "
                 f"episodes one after the other; its type is {array.dtype}")
    for key, array in arrays.items():
        if len(array) != count:
            fail(f"{path}: its columns differ in length: {count} rewards, {len(array)} {key}")
        if array.size == 0:
            fail(f"{path}: {key} has shape {array.shape}, so it holds no numbers")
        if key.endswith(("observations", "actions")):
            continue
        if array.size != count:
            fail(f"{path}: {key} must be one number per row, its shape is {array.shape}")
        check_numbers(f"{path}: {key}", array, flags=key != "rewards")
    obs = arrays["observations"]
    next_obs = arrays.get("next_observations", obs)
    if next_obs.shape != obs.shape:
        fail(f"{path}: observations have shape {obs.shape}, next_observations {next_obs.shape}")
    if (next_obs.dtype == np.uint8) != (obs.dtype == np.uint8):
        fail(f"{path}: observations are {obs.dtype}, next_observations {next_obs.dtype}; give both "
             "as bytes, or both as floats")
    over = arrays["terminals"].mean()
    if 0.5 < over < 1:
        notice(f"{over:.0%} of the rows of {path} are terminals; if they are masks, 1 - done, "
               "invert them")
    used = [array.reshape(count, -1).any(axis=1) for array in arrays.values()]
    empty = count - 1 - np.flatnonzero(np.any(used, axis=0)).max(initial=-1)
    if empty > 1:
        notice(f"the last {empty} rows of {path} are zero in every column; if a buffer was not "
               "full, cut them off")
    return arrays


def check_numbers(what: str, values: np.ndarray, flags: bool) -> None:
    """Ends the run where rewards are no real numbers, or flags something else than 0 and 1."""
    if values.dtype.kind not in "biuf":
        fail(f"{what} must be real numbers, their type is {values.dtype}")
    if flags and not np.isin(values, (0, 1)).all():
        fail(f"{what} must be 0 or 1, found {np.unique(values)[:3]}")


def read_array(file, key: str) -> np.ndarray:
    """The array of this key; one without a number where something else has the key."""
    try:
        return np.atleast_1d(file[key][()])
    except (TypeError, ValueError):  # a group of arrays, or pickled objects
        return np.array([None])


def known_body(path: Path) -> tuple[str | None, float, float]:
    """Environment and scores of the body that a file's name begins with; antenna is no ant."""
    for body, entry in (SUITE | OTHER_BODIES).items():
        if re.match(rf"{body}(?![a-z])", path.stem.lower()):
            return entry
    return (None, *NO_RANGE)


def env_with_such_obs(env_name: str | None, obs: np.ndarray) -> gym.Env | None:
    """The environment of this name, where it can be made and observes as the data do."""
    if env_name is None:
        return None
    try:
        env = make_env(env_name)
    except Exception:  # choose_env says what is wrong
        return None
    return env if encoded_shape(env.observation_space) == obs.shape[1:] else None


def find_ends(name: str, columns: dict[str, np.ndarray], env: gym.Env | None) -> np.ndarray:
    """`truncated` of a file without timeouts: where next_obs breaks, and at the time limit."""
    terminated = columns["terminated"]
    truncated = np.zeros(len(terminated), bool)
    if columns["next_obs"] is not None:
        truncated[:-1] = ~follows(columns)
    truncated &= ~terminated
    limit = env.spec.max_episode_steps if env else None
    if limit:
        truncated |= steps_in_episode(terminated | truncated) % limit == limit - 1
    if truncated.any():
        notice(f"{name} has no timeouts; {truncated.sum()} episode ends were found where "
               f"next_observations break and at the time limit ({limit or 'none known'})")
    elif not terminated.any():
        notice(f"{name} has no timeouts and no terminals, so all of it counts as one episode")
    else:
        lengths = np.diff(np.flatnonzero(terminated), prepend=-1)
        clock = ""
        if len(lengths) > 1 and len(set(lengths)) == 1:
            clock = ", all of one length; if they mark a clock, give them as timeouts"
        notice(f"{name} has no timeouts; only its {terminated.sum()} terminals end an episode"
               f"{clock}")
    return truncated


def follows(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Whether next_obs is the next row's obs, up to rounding, (N - 1,)."""
    next_obs, obs = columns["next_obs"][:-1], columns["obs"][1:]
    if next_obs.dtype.kind in "biu":
        same = next_obs == obs
    else:  # in shares of a column's spread: degrees of latitude move by 1e-5
        with np.errstate(invalid="ignore", over="ignore"):  # check_source names such numbers
            allowed = 1e-4 * columns["obs"].std(axis=0, dtype=np.float64) + 1e-6 * np.abs(obs)
            same = np.abs(next_obs - obs) <= allowed
    return same.all(axis=tuple(range(1, same.ndim)))


def check_cuts(name: str, columns: dict[str, np.ndarray]) -> None:
    """Says so where next_obs is not the next row's obs within an episode, and where next_obs at
    every timeout may be what a reset gave, not what followed."""
    within = ~(columns["truncated"] | columns["terminated"])[:-1]
    breaks = int((within & ~follows(columns)).sum())
    if breaks:
        notice(f"in {breaks} rows of {name} next_observations are not the next row's observations, "
               "and no end is marked there; put one episode after the other, and mark each end")
    cuts = np.flatnonzero(columns["truncated"][:-1] & ~columns["terminated"][:-1])
    if len(cuts) and not columns["next_obs"][cuts].any():
        notice(f"at every timeout of {name} next_observations are zero; if they only fill a gap, "
               "leave next_observations out")
    elif len(cuts) and np.array_equal(columns["next_obs"][cuts], columns["obs"][cuts + 1]):
        notice(f"at every timeout of {name} next_observations are the next row's observations; if "
               "a reset lies between them, leave next_observations out")


def steps_in_episode(ends: np.ndarray) -> np.ndarray:
    """The number of each row in its episode, from 0; `ends` marks the last rows."""
    starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)
    lengths = np.diff(np.append(starts, len(ends)))
    return np.arange(len(ends)) - np.repeat(starts, lengths)


def infer_next_obs(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """next_obs is the next row's obs. After a truncation it is unknown: the row is left out."""
    obs = columns["obs"]
    terminated = columns["terminated"]
    truncated = columns["truncated"].copy()
    next_obs = np.append(obs[1:], obs[-1:], axis=0)
    # after a termination it is unknown, and no target counts it: not another episode's first state
    next_obs[terminated] = obs[terminated]
    keep = terminated | ~truncated
    keep[-1] = terminated[-1]
    # an episode whose last row is left out ends one row earlier
    truncated[:-1] |= truncated[1:] & ~keep[1:] & ~terminated[:-1]
    columns = columns | {"next_obs": next_obs, "truncated": truncated}
    return {key: column[keep] for key, column in columns.items()}


def file_action_space(name: str, action: np.ndarray, env: gym.Env | None) -> spaces.Space:
    """The environment's action space, where the actions have its shape, else what they show."""
    numbers = action.size // len(action)  # per row
    whole = numbers == 1 and (action == np.round(action)).all()
    space = env.action_space if env else None
    if isinstance(space, spaces.Discrete) and whole:
        return space
    if isinstance(space, spaces.Box) and math.prod(space.shape) == numbers:
        return space
    if whole and action.dtype.kind in "biu":
        if action.min() < 0:
            fail(f"{name} has the action {action.min()}; discrete actions are counted from 0")
        if action.max() >= MOST_ACTIONS:
            fail(f"{name} has the action {action.max()}; actions are numbers from 0, and more than "
                 f"{MOST_ACTIONS:,} are not supported; number those that occur 0, 1, 2 …")
        num = int(action.max()) + 1
        occur = len(np.unique(action))
        if occur < num:
            notice(f"{name}: of the actions 0 to {num - 1} only {occur} occur; a policy may take "
                   f"the others, too; if they do not exist, number those that occur 0, 1, 2 …")
        return spaces.Discrete(num)
    if (action == np.round(action)).all():
        notice(f"{name} has whole numbers as actions ({numbers} of {action.dtype}), taken as "
               "continuous; if they are choices, give one integer per row: 0, 1, 2 …")
    return spaces.Box(-np.inf, np.inf, (numbers,), np.float32)


def check_source(name: str, source: Source, discrete: bool | None, images: bool) -> None:
    """Ends the run where there are no rows, numbers that are not finite, or unsuited spaces."""
    if not len(source.columns["reward"]):
        fail(f"{name} has no transition whose next observation is known")
    check_finite(name, source.columns)
    for key in ("obs", "next_obs"):
        column = source.columns[key]
        largest = np.abs(column).max() if column.dtype.kind == "f" else 0
        if largest > 1e18:  # one such number, squared, makes its column's deviation infinite
            fail(f"{name} has numbers as large as {largest:.3g} in {key}; if they fill gaps, "
                 "put in what a policy can see, as the last known value")
    timeouts = source.columns["truncated"]
    if timeouts.any() and source.columns["terminated"][timeouts].all():
        notice(f"every timeout of {name} is a terminal too; a clock that runs out ends a recording "
               "and no task, so if these terminals mark the clock, set them to 0")
    if is_image(source.obs_space) and not images:
        fail(f"{name} has images of shape {source.obs_space.shape} as observations; "
             "cql_discrete.py, dqn.py and rem.py take images")
    is_discrete = isinstance(source.action_space, spaces.Discrete)
    if discrete is False and is_discrete:
        fail(f"{name} has discrete actions, this algorithm needs continuous ones; for discrete "
             "ones there are bc.py, cql_discrete.py, dqn.py and rem.py")
    if discrete is True and not is_discrete:
        fail(f"{name} has continuous actions, this algorithm needs discrete ones (an integer per "
             "transition); for continuous ones there is td3_bc.py")


def check_finite(name: str, columns: dict[str, np.ndarray | None]) -> None:
    """Ends the run where a number is NaN, infinite, or too large for float32."""
    for key, column in columns.items():
        if column is None or not np.issubdtype(column.dtype, np.floating):
            continue
        with np.errstate(over="ignore"):  # actions may still be float64
            finite = np.isfinite(column.astype(np.float32, copy=False))
        if finite.all():
            continue
        finite = finite.reshape(len(column), -1)
        rows = np.flatnonzero(~finite.all(axis=1))
        where = ""
        if finite.shape[1] > 1:
            where = f" of the columns {np.flatnonzero(~finite.all(axis=0))[:3].tolist()}"
        fail(f"{name} has numbers in {key}{where} that are not finite in float32, in {len(rows)} "
             f"transitions, the first are {rows[:3].tolist()}")


def check_scale(name: str, obs: np.ndarray) -> None:
    """Says so where observations are much larger than what networks learn from."""
    if obs.ndim != 2:
        return
    size = np.abs(obs).mean(axis=0, dtype=np.float64)
    large = np.flatnonzero(size > 100)
    if len(large):
        notice(f"{name} has large numbers in the columns {large[:5].tolist()} of its observations, "
               f"up to {size.max():.4g} on average; most algorithms take them as they are and "
               "learn little from them: bring each column to mean 0 and deviation 1 (bc, td3_bc, "
               "awr and decision_transformer do it themselves)")


def known_next(data: Dataset, falls: Tensor) -> Tensor:
    """True where next_obs is what followed, (N,): a model is fitted to these rows alone.

    `falls` says where the environment ends an episode, (N,).
    """
    goes_on = ~data.terminated.bool()
    if (falls & goes_on).float().mean() > 0.01:
        fail(f"{data.name} goes on where {data.recorded_env} ends an episode; was it recorded with "
             "other arguments, as terminate_when_unhealthy=False?")
    # in some D4RL files another episode's start follows a termination: that is no fall
    return goes_on | falls


def read_fitted(path: Path, model: torch.nn.Module) -> bool:
    """Whether `path` has the model that an earlier start fitted; then `model` gets its weights."""
    if not path.exists():
        return False
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged, or of other widths
        fail(f"{path} does not fit this file ({type(error).__name__}); delete it to fit anew")
    notice(f"the model is read from {path}; delete it to fit anew, as after a change in its code")
    return True


def check_action_space(name: str, space: spaces.Space) -> None:
    """Ends the run where actions are neither continuous nor single choices."""
    if not isinstance(space, (spaces.Box, spaces.Discrete)):
        fail(f"{name} has {type(space).__name__} actions; only Box and Discrete ones can be used. "
             "A MultiDiscrete or MultiBinary action can be recorded as one Discrete number, one "
             "for each combination")


def scale_actions(name: str, action: np.ndarray,
                  space: spaces.Space) -> tuple[np.ndarray, spaces.Space]:
    """Actions in the algorithms' units, [-1, 1] or integers from 0; the space, with its bounds."""
    action = action.reshape(len(action), -1)
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        last = first + int(space.n) - 1
        if action.shape[1] != 1 or (action != np.round(action)).any():
            fail(f"{name}: a discrete action must be one whole number; shape {action.shape}")
        action = action[:, 0].astype(np.int64)
        if action.min() < first or action.max() > last:
            fail(f"{name}: actions must be {first} to {last}, "
                 f"found {action.min()} to {action.max()}")
        return action - first, space
    low = space.low.ravel().astype(np.float64)  # high - low of int64 bounds may overflow
    high = space.high.ravel().astype(np.float64)
    if action.shape[1:] != low.shape:
        fail(f"{name} has actions of shape {action.shape[1:]}, its action space {low.shape}")
    action = action.astype(np.float32)
    with np.errstate(over="ignore"):  # some write the largest number for infinity
        unbounded = ~np.isfinite(np.float32(high) - np.float32(low))
        span = action.max(axis=0) - action.min(axis=0)
        unbounded |= (span > 0) & (high - low > 1000 * span)  # placeholders, such as ±1e6
    if unbounded.any():
        low = np.where(unbounded, action.min(axis=0), low)
        high = np.where(unbounded, action.max(axis=0), high)
        notice(f"{name} has no finite action bounds, or far too wide ones; its smallest and "
               f"largest actions are taken, from {low.min():.4g} to {high.max():.4g}")
        still = np.flatnonzero(unbounded & (low == high)).tolist()
        if still:
            notice(f"{name} never changes its actions {still}; a policy may change them by up to 1")
    mid, half = action_units(low, high)
    scaled = (action - mid) / half
    outside = int((np.abs(scaled) > 1.001).any(axis=1).sum())
    if outside:
        notice(f"{outside} of {len(action)} recorded actions of {name} lie outside the bounds and "
               "are clipped to them")
    return scaled.clip(-1, 1), spaces.Box(np.float32(low), np.float32(high))


def action_units(low, high) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half width of the action bounds, (A,) each; where they are equal, half is 1."""
    low = np.atleast_1d(np.float32(low))
    high = np.atleast_1d(np.float32(high))
    half = (high - low) / 2
    return (low + high) / 2, np.where(half == 0, np.float32(1), half)


def split_episodes(data: Dataset, holdout: float, held_out: bool) -> None:
    """Keeps the episodes for training, or those held out. Data and share alone decide which."""
    starts, stops = data.episodes()
    count = round(holdout * len(starts)) if 0 < holdout < 1 else 0
    if not 0 < count < len(starts):
        fail(f"--holdout {holdout} of {data.name}'s {len(starts)} episodes leaves one side empty")
    order = np.random.default_rng(0).permutation(len(starts))
    chosen = np.sort(order[:count] if held_out else order[count:])
    data.keep(np.concatenate([np.arange(starts[i], stops[i]) for i in chosen]))


def choose_env(name: str, source: Source,
               eval_env: str) -> tuple[str | None, tuple[float, float]]:
    """The specification to evaluate in, None for nothing, and the returns that score 0 and 100."""
    recorded = source.env
    score_range = source.score_range
    if eval_env == "none":
        return None, score_range
    if eval_env != "auto":
        recorded = eval_env
        ranges = {env: (low, high) for env, low, high in SUITE.values()}
        score_range = ranges.get(eval_env, NO_RANGE)
    if recorded is None:
        notice(f"no environment is known for {name}; nothing is evaluated; --eval-env gives one")
        return None, score_range
    try:
        env_spec = clean_spec(recorded)
        env = make_env(env_spec)
        wanted = encoded_shape(env.observation_space)
        with suppress(Exception):
            env.close()
    except Exception as error:
        message = (f"the environment {env_id(recorded)} can't be made here "
                   f"({type(error).__name__}: {error})")
        if isinstance(error, gym.error.UnregisteredEnv):
            message += ("; an environment of your own is named module:Name-v0, with the module in "
                        "the current folder or in PYTHONPATH")
        if eval_env != "auto":
            fail(message)
        notice(f"{message}; nothing is evaluated")
        return None, score_range
    shape = source.columns["obs"].shape[1:]
    if wanted == shape and can_play(env.action_space, source.action_space):
        check_bounds(name, source.action_space, env)
        return limit_time(env_spec, source.columns), score_range
    message = (f"{name} has observations of shape {shape} and actions {source.action_space}, "
               f"{env_id(env_spec)} has {wanted} and {env.action_space}")
    if eval_env == "auto" and recorded in [entry[0] for entry in OTHER_BODIES.values()]:
        notice(f"{message}; nothing is evaluated")
        return None, score_range
    if is_file(name) and eval_env == "auto":
        message += " (its name begins with this body)"
    fail(f"{message}; --eval-env gives another environment, --eval-env none trains without one")


def encoded_shape(space: spaces.Space) -> tuple[int, ...]:
    """The shape of what encode_obs gives."""
    return space.shape if is_image(space) else (spaces.flatdim(space),)


def can_play(space: spaces.Space, recorded: spaces.Space) -> bool:
    """Whether actions of the recorded space can be played in the other."""
    if isinstance(space, spaces.Box) and isinstance(recorded, spaces.Box):
        return math.prod(space.shape) == math.prod(recorded.shape)
    return space == recorded


def check_bounds(name: str, recorded: spaces.Space, env: gym.Env) -> None:
    """Says so where the environment takes other actions than the data have."""
    own = env.action_space
    if not isinstance(own, spaces.Box):
        return
    same_low = np.allclose(recorded.low.ravel(), own.low.ravel())
    same_high = np.allclose(recorded.high.ravel(), own.high.ravel())
    if not (same_low and same_high):
        notice(f"{name} has actions {recorded}, {env.spec.id} takes {own}; they are played as they "
               "are, and clipped")


def limit_time(env_spec: str, columns: dict[str, np.ndarray]) -> str:
    """Where an environment has no time limit, an episode ends after the longest of the data."""
    spec = json.loads(env_spec)
    if spec.get("max_episode_steps") is None:
        ends = columns["terminated"].astype(bool) | columns["truncated"]
        spec["max_episode_steps"] = int(steps_in_episode(ends).max()) + 1
        notice(f"{spec['id']} has no time limit; evaluation ends an episode after "
               f"{spec['max_episode_steps']} steps, the longest of the data")
    return json.dumps(spec)


def clean_spec(env: str) -> str:
    """A specification in JSON, without what can't or needn't be rebuilt here."""
    if not env.startswith("{"):
        spec = make_env(env).spec
        if callable(spec.entry_point):  # a class or a function, which JSON can't hold
            spec.entry_point = f"{spec.entry_point.__module__}:{spec.entry_point.__qualname__}"
        return spec.to_json()
    known = set(EnvSpec.__dataclass_fields__) - {"namespace", "name", "version"}
    spec = {key: value for key, value in json.loads(env).items() if key in known}
    spec["kwargs"] = dict(spec.get("kwargs") or {})
    spec["kwargs"].pop("render_mode", None)
    wrappers = []
    for wrapper in spec.get("additional_wrappers") or []:
        if wrapper["kwargs"] is None:
            notice(f"the wrapper {wrapper['name']} of the recording can't be rebuilt; left out")
            continue
        if wrapper["name"].startswith("Normalize"):
            notice(f"{wrapper['name']} starts its statistics again in evaluation, so its numbers "
                   "there are not on the scale of the recording")
        if wrapper["name"] not in RENDER_WRAPPERS:
            wrappers.append(wrapper)
    spec["additional_wrappers"] = wrappers
    return json.dumps(spec)


# ---- 5. Files


def write_atomically(path: Path, write: Callable, report: Callable = fail) -> None:
    """`write` a neighbour and rename it: a kill or a full disk leaves the old file whole.

    What can't be written is reported: by `fail`, which ends the run, or by `notice`.
    """
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save calls a full disk a RuntimeError
        report(f"could not write {path}; is the disk full? {error}")
    finally:
        with suppress(OSError):
            part.unlink()


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda part: part.write_text(json.dumps(content, indent=1)))


def lock_file(path: Path):
    """Opens a file that one process at a time may hold; None where another process holds it.

    The lock ends with its process, also with a killed one. The empty file stays.
    """
    file = open(path, "w")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # another process holds it
        file.close()
        return None
    except (ImportError, OSError):  # Windows and some network disks have no such locks
        pass
    return file


def save_policy(folder: Path, module: str, algorithm: str, actor: torch.nn.Module,
                data: Dataset) -> None:
    """Writes policy.pt for load_policy, and policy.pt2 where the policy has no memory."""
    actor = copy.deepcopy(actor).cpu()
    init = getattr(actor, "init", [data.obs_dim, data.num_actions or data.action_dim])
    saved = {"module": module, "class": type(actor).__name__, "algorithm": algorithm,
             "env_spec": data.env_spec, "init": init, "actor": actor.state_dict()}
    write_atomically(folder / "policy.pt", lambda part: torch.save(saved, part))
    if not hasattr(actor.act, "start"):
        export_policy(actor, data.obs[[0, 0]].cpu(), folder / "policy.pt2")


def load_policy(path: str | Path, device="cpu") -> Callable:
    """act of a saved policy (policy.pt or the run's folder): raw observations (B, S) to actions.

    The file that trained it must lie in algorithms/ or beside this file. Where act has a memory
    (Decision Transformer), call act.start(B) before the first step of B new episodes, and after
    each step act.record(row, reward) for each of them. What can't be loaded ends the program.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "policy.pt"
    # both come first: a user's folder may have a bc.py of its own
    sys.path[:0] = [str(HERE / "algorithms"), str(HERE)]
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        actor = getattr(importlib.import_module(saved["module"]), saved["class"])(*saved["init"])
        actor.load_state_dict(saved["actor"])
    except Exception as error:
        fail(f"can't load the policy {path}: {type(error).__name__}, {error}; where the actor's "
             "__init__ takes other arguments than (obs_dim, action_dim), set self.init to them")
    act = actor.to(device).act
    return act if hasattr(act, "start") else MethodType(act_on, actor)


def act_on(actor: torch.nn.Module, obs) -> Tensor:
    """actor.act of numpy's arrays and float64 too, as simulators give them."""
    weight = next(actor.parameters())
    if isinstance(obs, np.ndarray):  # one that torch takes: native bytes, no negative strides
        obs = obs.astype(obs.dtype.newbyteorder("="))
    obs = torch.as_tensor(obs, device=weight.device)
    return actor.act(obs.to(weight.dtype) if obs.is_floating_point() else obs)


def export_policy(actor: torch.nn.Module, obs: Tensor, path: Path) -> None:
    """Writes act as a program that needs torch alone: torch.export.load(path).module()(obs)."""

    class Act(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.actor = actor

        def forward(self, obs: Tensor) -> Tensor:
            return self.actor.act(obs)

    buffer = io.BytesIO()
    batch = {"obs": {0: torch.export.Dim("batch")}}
    logging.disable(logging.CRITICAL)  # torch.export would tell the terminal how it fails
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            torch.export.save(torch.export.export(Act(), (obs,), dynamic_shapes=batch), buffer)
    except SystemExit:  # a signal; its line was caught too
        print(said.getvalue()[said.getvalue().rfind("error: "):], end="", file=sys.stderr)
        raise
    except Exception as error:
        reason = str(error).partition(".")[0]
        notice(f"{path.name} is left out, torch.export can't follow this policy: {reason}")
        return
    finally:
        logging.disable(logging.NOTSET)
    write_atomically(path, lambda part: part.write_bytes(buffer.getvalue()))


# ---- 6. Speed


def use_fast_products() -> str:
    """Lets float32 matrix products run on oneDNN's AVX-512 kernels; returns what computes them.

    PyTorch sends float32 products to MKL, which takes its slower AVX2 kernels on AMD's AVX-512
    processors; oneDNN gets them only where bf16 is permitted. Permitted is not used: oneDNN
    computes in float32 all the same. Chips that do round to bf16 exist, so one product is checked.
    """
    default = "PyTorch's default"
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return default
    if not torch.backends.mkldnn.is_available() or not hasattr(matmul, "fp32_precision"):
        return default
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if product_error() < 1e-5:  # float32 has 6e-7, bf16 has 3e-3
        return "oneDNN, float32"
    matmul.fp32_precision = before
    return default


def product_error() -> float:
    """The largest error of a float32 product against float64, relative to the largest entry."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 256, generator=generator)
    right = torch.randn(256, 256, generator=generator)
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).abs().max() / exact.abs().max())


PRODUCTS = use_fast_products()


def use_threads(threads: int, gflop: float) -> None:
    """Sets the CPU threads: the user's number (--threads, OMP_NUM_THREADS), else by the work.

    For an update below 1 GFLOP a second thread gains a third at best, and on some processors it
    costs as much; beside other work it costs more. Above, up to four help.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))  # what this process may use
        torch.set_num_threads(1 if gflop < 1 else min(4, cores))


def record_on_cuda(update: Callable, device: torch.device) -> Callable:
    """On CUDA, `update` is recorded as a CUDA graph and replayed, one per value of its arguments.

    The first three calls run eagerly, and all do where recording fails. `update` takes keywords,
    may wait for no tensor's value, and its metrics are overwritten by the next replay.
    """
    if device.type != "cuda":
        return update
    graphs = {}
    calls = Counter()

    def replay(**variant):
        key = tuple(variant.items())
        calls[key] += 1
        if calls[key] == 4 and None not in graphs.values():  # the calls before warm up
            graphs[key] = record_graph(update, variant)
        if graphs.get(key) is None:
            return update(**variant)
        graph, metrics = graphs[key]
        graph.replay()
        return metrics

    return replay


def record_graph(update: Callable, variant: dict):
    """(graph, the metrics that it writes), or None where recording fails. Nothing runs yet."""
    stream = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            metrics = update(**variant)
    except RuntimeError as error:
        # PyTorch leaves both as if the recording were under way; the next random draw would fail
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(random_state)
        reason = str(error).partition("\n")[0]
        notice(f"the update can't be recorded as a CUDA graph and runs eagerly: {reason}")
        return None
    return graph, metrics
