"""What the tests share: slow arithmetic to hold the fast code against, hand-made data, a Run that
writes nothing."""
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from common import Batch, Dataset

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from gymnasium import spaces
from torch import nn

QUICK = [
    "--env",
    "pendulum-medium",
    "--eval-episodes",
    "2",
    "--final-episodes",
    "2",
    "--device",
    "cpu",
]


def assert_close(got, want, tol: float = 1e-8) -> None:
    """Equal shapes, and equal numbers up to `tol`, relative and absolute."""
    got, want = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, want))
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def slow_dense(x: list, weight: list, bias: list) -> list:
    """One linear layer, one number at a time; a row of `weight` per output."""
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


def slow_mlp(net: nn.Sequential, x: torch.Tensor) -> list:
    """A forward pass of one sample through Linear and ReLU layers."""
    x = x.tolist()
    for layer in net:
        linear = isinstance(layer, nn.Linear)
        x = (
            slow_dense(x, layer.weight.tolist(), layer.bias.tolist())
            if linear
            else [max(v, 0) for v in x]
        )
    return x


def slow_critic(critic: nn.Module, k: int, obs: torch.Tensor, action: list) -> float:
    """Q of critic k at one observation and one action."""
    x, layers = obs.tolist() + list(action), list(critic.layers)
    for layer in layers:
        x = slow_dense(x, layer.weight[k].T.tolist(), layer.bias[k, 0].tolist())
        x = x if layer is layers[-1] else [max(v, 0) for v in x]
    return x[0]


def slow_normed_critic(critic: nn.Module, k: int, obs: torch.Tensor, action: list) -> float:
    """The same with layer norms: linear, ReLU, then a norm over the features; none after the last
    layer."""
    x = obs.tolist() + list(action)
    for layer, norm in zip(list(critic.layers)[:-1], critic.norms, strict=True):
        x = [
            max(v, 0) for v in slow_dense(x, layer.weight[k].T.tolist(), layer.bias[k, 0].tolist())
        ]
        mean = sum(x) / len(x)
        std = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-6)
        scale, shift = norm.weight[k, 0].tolist(), norm.bias[k, 0].tolist()
        x = [(v - mean) / std * scale[i] + shift[i] for i, v in enumerate(x)]
    return slow_dense(
        x, critic.layers[-1].weight[k].T.tolist(), critic.layers[-1].bias[k, 0].tolist()
    )[0]


def slow_sample(
    actor: nn.Module, obs: torch.Tensor, noise: torch.Tensor, log_std_min: float
) -> tuple[list, float]:
    """The tanh-Gaussian's action for this noise, and its log-density by change of variables: log
    N(u) − log da/du."""
    out, action, log_prob = slow_mlp(actor.net, obs), [], 0.0
    for i, eps in enumerate(noise.tolist()):
        mean, std = out[i], math.exp(min(max(out[len(out) // 2 + i], log_std_min), 2.0))
        u = mean + std * eps
        log_prob -= 0.5 * ((u - mean) / std) ** 2 + math.log(std * math.sqrt(2 * math.pi))
        log_prob -= math.log(1 - math.tanh(u) ** 2)
        action.append(math.tanh(u))
    return action, log_prob


def slow_raw(actor: nn.Module, obs: torch.Tensor, noise: torch.Tensor) -> list:
    """A Gaussian policy's action before tanh, for one draw of noise; −5 ≤ log σ ≤ 2."""
    out, eps = slow_mlp(actor.net, obs), noise.tolist()
    return [out[i] + math.exp(min(max(out[len(eps) + i], -5), 2)) * eps[i] for i in range(len(eps))]


def slow_decode(vae: nn.Module, obs: torch.Tensor, z: list) -> list:
    """A VAE's action for one latent."""
    return [math.tanh(u) for u in slow_mlp(vae.decoder, torch.tensor(obs.tolist() + z))]


def slow_vae_loss(vae: nn.Module, batch: Batch, noise: torch.Tensor) -> tuple[float, float, float]:
    """A VAE's cloning error + ½ KL, with means over transitions, action and latents; and these two;
    −4 ≤ log σ ≤ 15."""
    cloning = kl = 0.0
    n, latents = len(noise), len(noise[0])
    for b in range(n):
        out, z = slow_mlp(vae.encoder, torch.cat([batch.obs[b], batch.action[b]])), []
        for mean, log_std, eps in zip(out[:latents], out[latents:], noise[b].tolist(), strict=True):
            variance = math.exp(min(max(log_std, -4), 15)) ** 2
            kl -= 0.5 * (1 + math.log(variance) - mean**2 - variance) / (n * latents)
            z.append(mean + math.sqrt(variance) * eps)
        action = slow_decode(vae, batch.obs[b], z)
        cloning += sum(
            (a - float(t)) ** 2 for a, t in zip(action, batch.action[b], strict=True)
        ) / (n * len(action))
    return cloning + 0.5 * kl, cloning, kl


def slow_mmd(u: list, v: list, kernel: str, bandwidth: float) -> float:
    """Maximum mean discrepancy of two lists of actions, with BEAR's 1e-6 under the root."""
    def mean_kernel(a, b):
        total = 0.0
        for x in a:
            for y in b:
                distances = [abs(i - j) for i, j in zip(x, y, strict=True)]
                total += math.exp(
                    -sum(d * d if kernel == "gaussian" else d for d in distances) / (2 * bandwidth)
                )
        return total / (len(a) * len(b))

    return math.sqrt(mean_kernel(u, u) + mean_kernel(v, v) - 2 * mean_kernel(u, v) + 1e-6)


def slow_soft_actor_loss(
    actor, critic, alpha: float, obs, noise, log_std_min: float
) -> tuple[float, list, float]:
    """SAC's α log π − min_k Q, its log π for each observation, and the mean Q over both critics."""
    samples = [slow_sample(actor, obs[b], noise[b], log_std_min) for b in range(len(obs))]
    q = [[slow_critic(critic, k, obs[b], samples[b][0]) for b in range(len(obs))] for k in range(2)]
    loss = sum(alpha * samples[b][1] - min(q[0][b], q[1][b]) for b in range(len(obs))) / len(obs)
    return loss, [log_prob for _, log_prob in samples], sum(q[0] + q[1]) / (2 * len(obs))


def assert_gradient(
    parameter: nn.Parameter, slow_loss: Callable[[], float], eps: float = 1e-5
) -> None:
    """A vector's .grad is what a finite difference of the slow loss says."""
    expected = []
    for i in range(len(parameter)):
        values = []
        for shift in (eps, -2 * eps):
            parameter.data[i] += shift
            values.append(slow_loss())
        parameter.data[i] += eps
        expected.append((values[0] - values[1]) / (2 * eps))
    assert_close(parameter.grad, expected, 1e-6)


def record_draws(monkeypatch, name: str) -> list:
    """Keeps what torch.<name> draws from here on, so that a slow loop can use the same noise."""
    draws, draw = [], getattr(torch, name)

    def recorded(*args, **kwargs):
        draws.append(draw(*args, **kwargs))
        return draws[-1].clone()

    monkeypatch.setattr(torch, name, recorded)
    return draws


def make(module_class, *dims: int, scale: float = 2.0) -> nn.Module:
    """A network with weights large enough that its outputs differ from sample to sample and clips
    have work to do."""
    net = module_class(*dims)
    for parameter in net.parameters():
        parameter.data.mul_(scale)
    return net


def tiny_batch(terminated=(0, 1, 0, 0), obs_dim: int = 3, action_dim: int = 2) -> Batch:
    """A few random transitions, of which the second is the last of its episode."""
    n = len(terminated)
    return Batch(
        torch.randn(n, obs_dim),
        2 * torch.rand(n, action_dim) - 1,
        torch.randn(n),
        torch.randn(n, obs_dim),
        torch.tensor(terminated, dtype=torch.get_default_dtype()),
    )


def tiny_data(n: int = 12, action_dim: int = 2) -> Dataset:
    """n random transitions with three observations, in three episodes; actions in units of their
    own."""
    batch = tiny_batch([float(i == 3) for i in range(n)], action_dim=action_dim)
    data = Dataset(
        "tiny",
        batch._asdict() | {"truncated": ends_every_four(n)},
        spaces.Box(-1, 1, (action_dim,)),
        gym.spec("Pendulum-v1").to_json(),
        (0.0, 1.0),
    )
    data.action_mid = torch.full((action_dim,), 0.5)
    data.action_half = torch.arange(1.0, action_dim + 1)
    return data


def tiny_discrete_data(n: int = 12, obs_dim: int = 3, num_actions: int = 3) -> Dataset:
    """As tiny_data, with numbered actions."""
    batch = tiny_batch([float(i == 3) for i in range(n)], obs_dim=obs_dim)
    batch = batch._replace(action=torch.randint(num_actions, (n,)))
    return Dataset(
        "tiny",
        batch._asdict() | {"truncated": ends_every_four(n)},
        spaces.Discrete(num_actions),
        gym.spec("Acrobot-v1").to_json(),
        (0.0, 1.0),
    )


def ends_every_four(n: int) -> torch.Tensor:
    """Truncated after rows 7, 11, ..."""
    truncated = torch.zeros(n, dtype=torch.bool)
    truncated[7::4] = True
    return truncated


def flat(net: nn.Module) -> torch.Tensor:
    """All parameters of a network in one vector, copied."""
    return torch.cat(
        [torch.empty(0), *(parameter.detach().flatten() for parameter in net.parameters())]
    )


def flat_grad(net: nn.Module) -> torch.Tensor:
    """The gradients of all parameters in one vector, copied."""
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def step_by_hand(loss: torch.Tensor, parts: list, lr: float) -> torch.Tensor:
    """Plain gradient descent, on these parameters and on nothing else; returns the gradient as one
    vector."""
    grads = torch.autograd.grad(loss, parts)
    for part, grad in zip(parts, grads):
        part.data -= lr * grad
    return torch.cat([grad.flatten() for grad in grads])


class SilentRun:
    """Stands in for common.Run while a test calls train: keeps the state after each step, writes
    nothing."""
    last = None
    since = 0.0  # the clock of the updates; a fit before them moves it

    def __init__(self, args, data, variant="", gflop=0.0):
        SilentRun.last, self.variant, self.history = self, variant, []

    def snapshot(self):
        self.history.append(
            {
                name: flat(part) if isinstance(part, nn.Module) else part.detach().clone()
                for name, part in self.state.items()
                if not isinstance(part, torch.optim.Optimizer)
            }
        )

    def begin(self, parts, actor):
        self.state, self.actor = parts, actor
        self.snapshot()
        return 0

    def step(self, step, metrics):
        self.snapshot()

    def save(self, step):
        pass

    def finish(self):
        pass

    def steps_that_moved(self, name) -> list[int]:
        """The steps, from 1, at which this part of the state changed."""
        pairs = enumerate(zip(self.history, self.history[1:]), 1)
        return [
            step for step, (before, after) in pairs if not torch.equal(before[name], after[name])
        ]


def silent_train(monkeypatch, algorithm, data, **args) -> SilentRun:
    """`train` of an algorithm's file on this dataset, without a folder."""
    monkeypatch.setattr(algorithm, "Run", SilentRun)
    monkeypatch.setattr(algorithm, "load_dataset", lambda *_, **__: data)
    algorithm.train(algorithm.Args(**args))
    return SilentRun.last


def command(name: str, out, *arguments: str, quick=QUICK) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "algorithms" / f"{name}.py"),
        *quick,
        "--out",
        str(out),
        *arguments,
    ]


def run(name: str, out, *arguments: str, code: int = 0, **options) -> subprocess.CompletedProcess:
    """Runs from an unrelated working directory: nothing may depend on it."""
    done = subprocess.run(
        command(name, out, *arguments, **options),
        capture_output=True,
        text=True,
        cwd=out,
        timeout=600,
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done


def folder(name: str, out, env: str = "pendulum-medium"):
    return out / name / env / "seed0"


class Pixels(gym.Env):
    """A game on the screen, as Atari's: the left or the right half is bright; press that side (3 or
    4), five times."""

    def __init__(self, shape=(4, 84, 84)):
        self.observation_space = spaces.Box(0, 255, tuple(shape), np.uint8)
        self.action_space = spaces.Discrete(2, start=3)

    def screen(self):
        shape = self.observation_space.shape
        screen = np.zeros(shape, np.uint8)
        # the last axis is the width
        wide = screen if shape[0] < 36 or len(shape) == 2 else np.moveaxis(screen, 1, -1)
        middle = wide.shape[-1] // 2
        wide[..., slice(middle, None) if self.right else slice(middle)] = 255
        return screen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.right = 5, int(self.np_random.integers(2))
        return self.screen(), {}

    def step(self, action):
        reward = 10.0 * (action - 3 == self.right)
        self.left, self.right = self.left - 1, int(self.np_random.integers(2))
        return self.screen(), reward, self.left == 0, False, {}


def build_pixels(monkeypatch, root, shape) -> tuple[str, list]:
    """A Minari dataset of 20 random episodes of Pixels; its id, and the episodes."""
    import minari  # slow to import, and needed here alone
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    if "Pixels-v0" not in gym.registry:
        gym.register("Pixels-v0", "helpers:Pixels", max_episode_steps=50)
    env, rng, episodes = gym.make("Pixels-v0", shape=list(shape)), np.random.default_rng(0), []
    for seed in range(20):
        obs, action, reward = [env.reset(seed=seed)[0]], 3 + rng.integers(2, size=5), []
        for a in action:
            step = env.step(a)
            obs.append(step[0])
            reward.append(step[1])
        ends = np.arange(5) == 4
        episodes.append(
            EpisodeBuffer(
                observations=np.array(obs),
                actions=action,
                rewards=np.array(reward),
                terminations=ends,
                truncations=ends & False,
                infos={},
            )
        )
    name = "test/pixels" + "x".join(map(str, shape)) + "-v0"
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(name, episodes, env=env)
    return name, episodes


def one_state_data(n: int, action_dim: int = 1) -> Dataset:
    """One state, for ever: observations, actions, rewards and terminations are 0, for a test to
    fill in."""
    data = tiny_data(n, action_dim)
    for column in (data.obs, data.action, data.reward, data.next_obs, data.terminated):
        column.zero_()
    return data


MODEL = dict(batch_size=64, dynamics_epochs=1, rollout_starts=100, rollout_every=15)
SMALL = {  # settings with which 50 updates take a test's time and get to every part of a file
    "awac": dict(batch_size=64),
    "awr": dict(value_steps=10, actor_steps=15),
    "bcq": dict(batch_size=16, num_samples=2),
    "bear": dict(batch_size=16, num_samples=2),
    "brac": dict(behavior_steps=20, warm_start_steps=15),
    "combo": MODEL | dict(num_samples=2),
    "cql": dict(batch_size=32, num_samples=2),
    "decision_transformer": dict(batch_size=8, warmup_steps=10),
    "edac": dict(batch_size=64, num_critics=3),
    "mabcq": dict(agents=1, batch_size=16, num_samples=2),
    "mopo": MODEL,
    "morel": MODEL,
    "msg": dict(batch_size=32, num_critics=3),
    "plas": dict(vae_steps=20),
    "rebrac": dict(batch_size=64),
    "uwac": dict(batch_size=16, num_samples=2, passes=2, warm_up_steps=25),
}


def run_of(name: str, out="runs", env: str = "*", seed: int = 0):
    """The folder of the run of this file, whose variant may be in the name."""
    found = Path(out).glob(f"{name}*/{env}/seed{seed}")
    (found,) = [path for path in found if path.parent.parent.name.split("-")[0] == name]
    return found


class SerialPool:
    """Stands in for a pool of processes, each of which would load torch."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    imap = staticmethod(map)


def build(monkeypatch, body: str, level: str, count: int) -> None:
    """A dataset of the suite with fewer transitions, in this process."""
    monkeypatch.syspath_prepend(ROOT / "results" / "behavior")
    import collect

    monkeypatch.setattr(
        collect.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=SerialPool)
    )
    collect.build(body, level, count)
