"""What the tests share: slow arithmetic to hold the fast code against, hand-made data, a Run that writes nothing."""
import math
import subprocess
import sys
from collections.abc import Callable

import torch
from conftest import ROOT
from torch import nn

from common import Batch, Dataset

QUICK = ["--env", "pendulum-medium", "--eval-episodes", "2", "--final-episodes", "2", "--device", "cpu"]


def assert_close(got, want, tol: float = 1e-8) -> None:
    """Equal shapes, and equal numbers up to `tol`, relative and absolute."""
    got, want = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, want))
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def slow_dense(x: list, weight: list, bias: list) -> list:
    """One linear layer, one number at a time; a row of `weight` per output."""
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def slow_mlp(net: nn.Sequential, x: torch.Tensor) -> list:
    """A forward pass of one sample through Linear and ReLU layers."""
    x = x.tolist()
    for layer in net:
        linear = isinstance(layer, nn.Linear)
        x = slow_dense(x, layer.weight.tolist(), layer.bias.tolist()) if linear else [max(v, 0) for v in x]
    return x


def slow_critic(critic: nn.Module, k: int, obs: torch.Tensor, action: list) -> float:
    """Q of critic k at one observation and one action."""
    x, layers = obs.tolist() + list(action), list(critic.layers)
    for layer in layers:
        x = slow_dense(x, layer.weight[k].T.tolist(), layer.bias[k, 0].tolist())
        x = x if layer is layers[-1] else [max(v, 0) for v in x]
    return x[0]


def slow_normed_critic(critic: nn.Module, k: int, obs: torch.Tensor, action: list) -> float:
    """The same with layer norms: linear, ReLU, then a norm over the features; none after the last layer."""
    x = obs.tolist() + list(action)
    for layer, norm in zip(list(critic.layers)[:-1], critic.norms, strict=True):
        x = [max(v, 0) for v in slow_dense(x, layer.weight[k].T.tolist(), layer.bias[k, 0].tolist())]
        mean = sum(x) / len(x)
        std = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-6)
        scale, shift = norm.weight[k, 0].tolist(), norm.bias[k, 0].tolist()
        x = [(v - mean) / std * scale[i] + shift[i] for i, v in enumerate(x)]
    return slow_dense(x, critic.layers[-1].weight[k].T.tolist(), critic.layers[-1].bias[k, 0].tolist())[0]


def slow_sample(actor: nn.Module, obs: torch.Tensor, noise: torch.Tensor, log_std_min: float) -> tuple[list, float]:
    """The tanh-Gaussian's action for this noise, and its log-density by change of variables: log N(u) − log da/du."""
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
    """A VAE's cloning error + ½ KL, with means over transitions, action and latents; and these two; −4 ≤ log σ ≤ 15."""
    cloning = kl = 0.0
    n, latents = len(noise), len(noise[0])
    for b in range(n):
        out, z = slow_mlp(vae.encoder, torch.cat([batch.obs[b], batch.action[b]])), []
        for mean, log_std, eps in zip(out[:latents], out[latents:], noise[b].tolist(), strict=True):
            variance = math.exp(min(max(log_std, -4), 15)) ** 2
            kl -= 0.5 * (1 + math.log(variance) - mean**2 - variance) / (n * latents)
            z.append(mean + math.sqrt(variance) * eps)
        action = slow_decode(vae, batch.obs[b], z)
        cloning += sum((a - float(t)) ** 2 for a, t in zip(action, batch.action[b], strict=True)) / (n * len(action))
    return cloning + 0.5 * kl, cloning, kl


def slow_mmd(u: list, v: list, kernel: str, bandwidth: float) -> float:
    """Maximum mean discrepancy of two lists of actions, with BEAR's 1e-6 under the root."""
    def mean_kernel(a, b):
        total = 0.0
        for x in a:
            for y in b:
                distances = [abs(i - j) for i, j in zip(x, y, strict=True)]
                total += math.exp(-sum(d * d if kernel == "gaussian" else d for d in distances) / (2 * bandwidth))
        return total / (len(a) * len(b))

    return math.sqrt(mean_kernel(u, u) + mean_kernel(v, v) - 2 * mean_kernel(u, v) + 1e-6)


def slow_soft_actor_loss(actor, critic, alpha: float, obs, noise, log_std_min: float) -> tuple[float, list, float]:
    """SAC's α log π − min_k Q, its log π for each observation, and the mean Q over both critics."""
    samples = [slow_sample(actor, obs[b], noise[b], log_std_min) for b in range(len(obs))]
    q = [[slow_critic(critic, k, obs[b], samples[b][0]) for b in range(len(obs))] for k in range(2)]
    loss = sum(alpha * samples[b][1] - min(q[0][b], q[1][b]) for b in range(len(obs))) / len(obs)
    return loss, [log_prob for _, log_prob in samples], sum(q[0] + q[1]) / (2 * len(obs))


def assert_gradient(parameter: nn.Parameter, slow_loss: Callable[[], float], eps: float = 1e-5) -> None:
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
    """A network with weights large enough that its outputs differ from sample to sample and clips have work to do."""
    net = module_class(*dims)
    for parameter in net.parameters():
        parameter.data.mul_(scale)
    return net


def tiny_batch(terminated=(0, 1, 0, 0), obs_dim: int = 3, action_dim: int = 2) -> Batch:
    """A few random transitions, of which the second is the last of its episode."""
    n = len(terminated)
    return Batch(torch.randn(n, obs_dim), 2 * torch.rand(n, action_dim) - 1, torch.randn(n), torch.randn(n, obs_dim),
                 torch.tensor(terminated, dtype=torch.get_default_dtype()))


def tiny_data(n: int = 12, action_dim: int = 2) -> Dataset:
    """n random transitions in three episodes. Pendulum lends its three observations, and must bear a second action."""
    data = Dataset("tiny", "Pendulum-v1", n, "cpu", (0.0, 1.0))
    data.action_dim = action_dim
    data.action_mid, data.action_half = torch.full((action_dim,), 0.5), torch.arange(1.0, action_dim + 1)
    batch = tiny_batch([float(i == 3) for i in range(n)], action_dim=action_dim)
    scalars = torch.stack([batch.reward, batch.terminated], dim=1)
    data.packed = torch.cat([batch.obs, batch.action, batch.next_obs, scalars], dim=1)
    data.truncated[7::4] = True
    data.size.fill_(n)
    return data


def tiny_discrete_data(n: int = 12, obs_dim: int = 3, num_actions: int = 3) -> Dataset:
    """As tiny_data, with numbered actions; Acrobot lends its three."""
    data = Dataset("tiny", "Acrobot-v1", n, "cpu", (0.0, 1.0))
    data.obs_dim, data.num_actions = obs_dim, num_actions
    batch = tiny_batch([float(i == 3) for i in range(n)], obs_dim=obs_dim)
    scalars = torch.stack([batch.reward, batch.terminated], dim=1)
    data.packed = torch.cat([batch.obs, torch.randint(num_actions, (n, 1)), batch.next_obs, scalars], dim=1)
    data.truncated[7::4] = True
    data.size.fill_(n)
    return data


def flat(net: nn.Module) -> torch.Tensor:
    """All parameters of a network in one vector, copied."""
    return torch.cat([torch.empty(0), *(parameter.detach().flatten() for parameter in net.parameters())])


def flat_grad(net: nn.Module) -> torch.Tensor:
    """The gradients of all parameters in one vector, copied."""
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def step_by_hand(loss: torch.Tensor, parts: list, lr: float) -> torch.Tensor:
    """Plain gradient descent, on these parameters and on nothing else; returns the gradient as one vector."""
    grads = torch.autograd.grad(loss, parts)
    for part, grad in zip(parts, grads):
        part.data -= lr * grad
    return torch.cat([grad.flatten() for grad in grads])


class SilentRun:
    """Stands in for common.Run while a test calls train: keeps the state after each step, writes nothing."""
    last = None

    def __init__(self, args, data, variant=""):
        SilentRun.last, self.variant, self.history = self, variant, []

    def snapshot(self):
        self.history.append({name: flat(part) if isinstance(part, nn.Module) else part.detach().clone()
                             for name, part in self.state.items() if not isinstance(part, torch.optim.Optimizer)})

    def resume(self, **state):
        self.state = state
        self.snapshot()
        return 0

    def step(self, step, metrics, act):
        self.snapshot()

    def finish(self, actor):
        self.actor = actor

    def steps_that_moved(self, name) -> list[int]:
        """The steps, from 1, at which this part of the state changed."""
        pairs = enumerate(zip(self.history, self.history[1:]), 1)
        return [step for step, (before, after) in pairs if not torch.equal(before[name], after[name])]


def silent_train(monkeypatch, algorithm, data, **args) -> SilentRun:
    """`train` of an algorithm's file on this dataset, without a folder."""
    monkeypatch.setattr(algorithm, "Run", SilentRun)
    monkeypatch.setattr(algorithm, "load_dataset", lambda *_, **__: data)
    algorithm.train(algorithm.Args(**args))
    return SilentRun.last


def command(name: str, out, *arguments: str, quick=QUICK) -> list[str]:
    return [sys.executable, str(ROOT / "algorithms" / f"{name}.py"), *quick, "--out", str(out), *arguments]


def run(name: str, out, *arguments: str, code: int = 0, **options) -> subprocess.CompletedProcess:
    """Runs from an unrelated working directory: nothing may depend on it."""
    done = subprocess.run(command(name, out, *arguments, **options), capture_output=True, text=True, cwd=out, timeout=600)
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done


def folder(name: str, out, env: str = "pendulum-medium"):
    return out / name / env / "seed0"
