"""Train a behaviour policy online and keep snapshots of it, from which the suite's data are made.

    python results/behavior/train.py hopper
    python results/behavior/train.py hopper --steps 1500000 --resume
    python results/behavior/train.py cartpole

This is not offline RL; it is where the data come from. SAC (for cartpole and acrobot DQN) learns in
the real environment, with the losses and the update of algorithms/sac.py and dqn.py. SAC's actor is
small, so that a snapshot takes 10 KB and a file of hundreds of them can be committed; the critics
have their usual width, which is what learning depends on.

Writes runs/behavior/<body>/seed<k>/: snapshots in checkpoint.pt, which choose.py reads, together
with the replay buffer and all that --resume needs.
"""
import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "algorithms")]  # finds common.py and the algorithms
from common import SUITE, Batch, fail, make_env, write_atomically

import dqn
import numpy as np
import sac
import torch
from torch import Tensor

ACTOR_HIDDEN = (64, 64)  # of SAC
DQN_RATE = 2.5e-4  # learning rate and target period of DQN: CleanRL's for classic control, since
DQN_TARGET_EVERY = 500  # dqn.py's own, made for millions of steps, are too slow for 50,000
FINAL_EPSILON = 0.05  # ε of DQN in the end
EPSILON_STEPS = 10_000  # steps after the random ones, until then
DEFAULTS = {
    "sac": {"steps": 1_000_000, "batch_size": 256, "random_steps": 5_000, "snapshot_every": 1_000},
    "dqn": {"steps": 50_000, "batch_size": 128, "random_steps": 500, "snapshot_every": 500},
}


class ReplayBuffer:
    """Everything lived so far. An update asks a dataset for `sample` and `action_dim`."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int | None):
        self.action_dim = action_dim  # None: actions are numbers
        self.size = 0
        self.columns = {
            "obs": torch.zeros(capacity, obs_dim),
            "action": torch.zeros(capacity, action_dim or 1),
            "reward": torch.zeros(capacity),
            "next_obs": torch.zeros(capacity, obs_dim),
            "terminated": torch.zeros(capacity),
        }
        if action_dim is None:
            self.columns["action"] = torch.zeros(capacity, dtype=torch.long)

    def add(self, **transition) -> None:
        for name, value in transition.items():
            self.columns[name][self.size] = torch.as_tensor(value)
        self.size += 1

    def rows(self, index: Tensor) -> Batch:
        columns = self.columns.items()
        return Batch(**{name: column.index_select(0, index) for name, column in columns})

    def sample(self, batch_size: int) -> Batch:
        return self.rows(torch.randint(self.size, (batch_size,)))

    def saved(self) -> dict[str, Tensor]:
        return {name: column[:self.size] for name, column in self.columns.items()}

    def load(self, saved: dict[str, Tensor]) -> None:
        self.size = len(saved["reward"])
        for name, column in saved.items():
            self.columns[name][:self.size] = column


class SmallActor(sac.Actor):
    """SAC's policy with fewer units; act and the squashing are those of algorithms/sac.py."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__(obs_dim, action_dim)
        self.net = sac.mlp(obs_dim, *ACTOR_HIDDEN, 2 * action_dim)


class SacLearner:
    """SAC; the first steps are uniform actions. `learned` is all that training changes."""

    def __init__(self, env, batch_size: int, random_steps: int):
        self.obs_dim, self.action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.random_steps = random_steps
        self.args = SimpleNamespace(batch_size=batch_size, gamma=sac.Args.gamma,
                                    target_rate=sac.Args.target_rate)
        low, high = torch.as_tensor(env.action_space.low), torch.as_tensor(env.action_space.high)
        self.actor = SmallActor(self.obs_dim, self.action_dim)
        self.actor.action_mid, self.actor.action_half = (low + high) / 2, (high - low) / 2
        critic = sac.Critic(self.obs_dim, self.action_dim)
        log_entropy_coef = torch.zeros((), requires_grad=True)
        adam = partial(torch.optim.Adam, lr=sac.Args.actor_lr, fused=True)
        self.learned = {
            "actor": self.actor,
            "critic": critic,
            "critic_target": copy.deepcopy(critic),
            "log_entropy_coef": log_entropy_coef,
            "actor_optimizer": adam(self.actor.parameters()),
            "critic_optimizer": adam(critic.parameters()),
            "entropy_optimizer": adam([log_entropy_coef]),
        }

    @torch.no_grad()
    def act(self, obs: Tensor, step: int) -> tuple[Tensor, np.ndarray]:
        """The action to store, (A,), and the environment's own."""
        if step <= self.random_steps:
            action = 2 * torch.rand(1, self.action_dim) - 1
        else:
            action, _ = sac.sample_action(*self.actor(obs[None]))
        return action[0], (self.actor.action_mid + self.actor.action_half * action)[0].numpy()

    def update(self, buffer: ReplayBuffer, step: int) -> None:
        sac.update(self.args, buffer, **self.learned)

    def snapshot(self, step: int) -> dict:
        return {name: value.half() for name, value in self.actor.net.state_dict().items()}


def exploration(step: int, random_steps: int, epsilon_steps: int = EPSILON_STEPS,
                final_epsilon: float = FINAL_EPSILON) -> float:
    """ε of DQN: 1 in the random steps, then down a line, then constant."""
    share = max(0, step - random_steps) / epsilon_steps
    return max(final_epsilon, 1 + share * (final_epsilon - 1))


class DqnLearner:
    """DQN; with probability ε a uniform action, else the best. `learned` as above."""

    def __init__(self, env, batch_size: int, random_steps: int):
        self.obs_dim, self.action_dim = env.observation_space.shape[0], None
        self.num_actions = int(env.action_space.n)
        self.random_steps = random_steps
        self.args = dqn.Args(batch_size=batch_size)
        self.q_net = dqn.QNetwork((self.obs_dim,), self.num_actions)
        self.learned = {
            "q_net": self.q_net,
            "q_target": copy.deepcopy(self.q_net),
            "optimizer": torch.optim.Adam(self.q_net.parameters(), lr=DQN_RATE, eps=dqn.ADAM_EPS,
                                          fused=True),
        }

    def act(self, obs: Tensor, step: int) -> tuple[int, int]:
        """The action's number, to store and for the environment."""
        action = int(torch.randint(self.num_actions, ()))
        if torch.rand(()) >= exploration(step, self.random_steps):
            action = int(self.q_net.act(obs[None])[0])
        return action, action

    def update(self, buffer: ReplayBuffer, step: int) -> None:
        copy_target = step % DQN_TARGET_EVERY == 0
        dqn.update(self.args, buffer, **self.learned, copy_target=copy_target)

    def snapshot(self, step: int) -> dict:
        """The weights, and the ε with which choose.py and collect.py let them play."""
        weights = {name: value.half() for name, value in self.q_net.net.state_dict().items()}
        return weights | {"epsilon": exploration(step, self.random_steps)}


def interact(env, learner, buffer: ReplayBuffer, seed: int, start: int):
    """Each next() takes one step in the environment and stores it; gives the return of an episode
    that ended there, else None. A resumed run begins a new episode."""
    obs, _ = env.reset(seed=seed + start)
    episode_return, step = 0.0, start
    while True:
        step += 1
        action, own = learner.act(torch.as_tensor(obs, dtype=torch.float32), step)
        next_obs, reward, terminated, truncated, _ = env.step(own)
        # `truncated` is not stored: a time limit is not the end of the task
        buffer.add(obs=obs, action=action, reward=reward, next_obs=next_obs, terminated=terminated)
        obs = next_obs
        episode_return += float(reward)
        if terminated or truncated:
            yield episode_return
            obs, _ = env.reset()
            episode_return = 0.0
        else:
            yield None


def train(body: str, seed: int, steps: int, batch_size: int, random_steps: int, snapshot_every: int,
          resume: bool, root: Path = ROOT / "runs") -> None:
    folder = root / "behavior" / body / f"seed{seed}"
    torch.manual_seed(seed)
    env = make_env(SUITE[body][0])
    learner = (SacLearner if env.action_space.shape else DqnLearner)(env, batch_size, random_steps)
    buffer = ReplayBuffer(steps, learner.obs_dim, learner.action_dim)
    snapshots, episodes = [], []  # networks' weights; (last step, return) of training episodes
    start = 0
    if resume:
        if not (folder / "checkpoint.pt").exists():
            fail(f"--resume, but there is no {folder / 'checkpoint.pt'}")
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        for name, part in learner.learned.items():
            if isinstance(part, Tensor):
                part.data.copy_(saved[name])
            else:
                part.load_state_dict(saved[name])
        buffer.load(saved["buffer"])
        start, snapshots, episodes = saved["step"], saved["snapshots"], saved["episodes"]
        torch.set_rng_state(saved["rng"])

    def save(step: int) -> None:
        checkpoint = {name: part.detach() if isinstance(part, Tensor) else part.state_dict()
                      for name, part in learner.learned.items()}
        checkpoint |= {"buffer": buffer.saved(), "step": step, "random_steps": random_steps,
                       "snapshots": snapshots, "episodes": episodes, "rng": torch.get_rng_state()}
        write_atomically(folder / "checkpoint.pt", lambda part: torch.save(checkpoint, part))

    environment = interact(env, learner, buffer, seed, start)
    began = time.time()
    for step in range(start + 1, steps + 1):
        episode_return = next(environment)
        if episode_return is not None:
            episodes.append((step, episode_return))
        if step > random_steps:
            learner.update(buffer, step)
        if step % snapshot_every == 0:
            snapshots.append({"step": step} | learner.snapshot(step))
        if step % 5000 == 0:
            recent = [value for _, value in episodes[-20:]]
            print(f"step {step:>9,}   {len(episodes):>6,} episodes, "
                  f"the last 20 return {np.mean(recent):8.1f}"
                  f"   {(step - start) / (time.time() - began):6.1f} steps/s", flush=True)
        if step % 25_000 == 0 or step == steps:
            save(step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("body", choices=list(SUITE))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--random-steps", type=int)
    parser.add_argument("--snapshot-every", type=int)
    parser.add_argument("--resume", action="store_true")
    body = parser.parse_known_args()[0].body
    parser.set_defaults(**DEFAULTS["dqn" if body in ("cartpole", "acrobot") else "sac"])
    torch.set_num_threads(1)
    train(**vars(parser.parse_args()))
