"""Critic-Regularised Regression, with exponential or binary weights.

Wang et al., "Critic Regularized Regression", NeurIPS 2020, arXiv 2006.15134.
Notes: Policy Constraints (软约束), in their references. Weighted cloning needs no estimate of π_β, so a wrong one
(their ▼ 问题) can't hurt.

One of four files, iql.py, awac.py, crr.py and awr.py, that all clone the data's actions by weight: read them side by side
for how each estimates the advantage of an action, and how it turns that into a weight. CRR learns Q of its own policy, as AWAC
does, and takes the mean over N of the policy's actions for V(s). The weight is exponential with a cap, or binary: clone what is
better than the policy, drop the rest. Targets are not averages but copies, of Q and of π, renewed at intervals.

  (E1) ã = clip( μ(s) + σ·ε, −1, 1 ),  ε ~ N(0, 1)
  (E2) y = r + γ (1 − d) min_k Q̄_k(s′, ã′),  ã′ ~ π̄(·|s′)
  (E3) Â = min_k Q_k(s, a) − 1/N Σ_j min_k Q_k(s, ã_j),  ã_j ~ π(·|s)
  (E4) w = min( exp(Â/β), w_max ),  or binary: w = 1[Â > 0]
  (E5) L_π = −E_D[ w · log π(a|s) ],  π = N(μ(s), σ²), no gradient through w
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) every target_every updates  Q̄ ← Q,  π̄ ← π

Shapes: B batch, S observation, A action, K = 2 critics, N samples. d is terminated: a truncated episode bootstraps.
Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences. The paper's code (deepmind/acme, TensorFlow) has residual blocks, LSTMs, a mixture of five Gaussians, a critic of
21 atoms on [0, 100], the range of its tasks' returns, and gradients clipped at norm 40. We follow acme's later JAX version,
  D1 but for its critic's loss: it adds rewards (B,) to Q̄ (B, 1), so that each Q learns the batch's mean reward. And no ½.
  D2 a Gaussian around tanh of a mean [d3rlpy], as in iql.py; JAX's tanh of a Gaussian has infinite log π at |a| = 1.
  D3 Batches of 256, as in the paper's code; JAX's example has 64.
  D4 It acts with the policy's mean; JAX with the target policy's mode, the paper's code draws among samples by softmax of Q.
  D5 PyTorch's default initialisation, as in the other files here.
  D6 Two critics, their minimum and layer norms [offbench; there before ReLU, here after, as in rebrac.py]; the
     paper's code has one, with norms, on atoms with a bound. JAX's single plain critic does not hold on
     hopper-medium-replay, where no discounted return of the data exceeds 342: its mean Q was 6,300 after 58,000 updates,
     that of two without norms 1,100 after 30,000.

Run:     python algorithms/crr.py --env hopper-medium
         python algorithms/crr.py --env hopper-medium --weighting binary
Expect:  hopper-medium 90.7 (the data 44, BC 47 and 54), hopper-medium-replay 57.3 (the data 15, BC 18), after 100,000 updates,
         seed 0, in half an hour on a core; on the latter evaluations swing between 24 and 86 once they are above 20.
         pendulum-medium-replay (the data −1148): −420 and −513 after 8,000 updates, otherwise with its end-to-end test's
         settings, −1044 at best without D6.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [=]
    batch_size: int = 256  # transitions per update [C acme/tf/crr] [D3]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-4  # Adam [C jax/crr/config.py]
    critic_lr: float = 3e-4  # Adam [C jax/crr/config.py]
    gamma: float = 0.99  # discount γ [C jax/crr/config.py]
    target_every: int = 100  # updates between the copies of (E7) [C jax/crr/config.py]
    # CRR
    weighting: Literal["exp", "binary"] = "exp"  # which of (E4) [P][C jax/crr/losses.py]
    num_samples: int = 4  # N in (E3) [C jax/crr/losses.py]
    beta: float = 1.0  # β in (E4), larger clones more; used by exp only, like max_weight [C jax/crr/losses.py]
    max_weight: float = 20.0  # w_max in (E4) [C jax/crr/losses.py]


HIDDEN = (256, 256)  # widths of actor and critic [C jax/crr/networks.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # as in iql.py [D2]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian π(a|s) around tanh of a network. Its buffers hold the units, so a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))  # the same in all states
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of the action: (B, A) each."""
        mean = torch.tanh(self.net(obs))
        return mean, self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).expand_as(mean)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's actions (B, A), without noise: the mean."""
        return self.action_mid + self.action_half * self(obs)[0]


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(a; μ, σ²), (B, A) -> (B,). No tanh follows the sample, so no Jacobian: it is finite at |a| = 1, too."""
    z = (action - mean) / log_std.exp()
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def sample_clipped(mean: Tensor, log_std: Tensor) -> Tensor:
    """(E1): actions (..., A) of the policy. Outside of the box no Q has been taught, hence the clip."""
    # (E1)
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


class EnsembleLinear(nn.Module):
    """K linear layers as one batched product: (K, B, in) -> (K, B, out)."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(num, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """K layer norms, each with its own scale and shift: over the features of (K, B, H), not over the batch."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num, 1, dim)), nn.Parameter(torch.zeros(num, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.weight)


class Critic(nn.Module):
    """K independent Q networks, (B, S), (B, A) -> (K, B). A norm after each ReLU bounds how far Q reaches beyond the data."""

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList(EnsembleLinear(num, i, o) for i, o in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(EnsembleLayerNorm(num, width) for width in HIDDEN)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1).expand(len(self.layers[0].weight), -1, -1)  # (K, B, S + A)
        for layer, norm in zip(self.layers, self.norms):
            x = norm(F.relu(layer(x)))
        return self.layers[-1](x).squeeze(-1)


@torch.no_grad()
def td_target(actor: Actor, critic_target: Critic, batch: Batch, gamma: float) -> Tensor:
    """(E2): the regression target y, (B,)."""
    # (E2) an action of the policy's own; only a termination stops the bootstrap
    next_action = sample_clipped(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


@torch.no_grad()
def advantage(actor: Actor, critic: Critic, batch: Batch, num_samples: int) -> Tensor:
    """(E3): how much better the data's action is than the policy's are on average, (B,)."""
    several = (x.unsqueeze(1).expand(-1, num_samples, -1) for x in actor(batch.obs))
    actions = sample_clipped(*several)  # (B, N, A)
    q = critic(batch.obs.repeat_interleave(num_samples, dim=0), actions.flatten(0, 1)).min(dim=0).values  # (B N,)
    # (E3) online critics and online policy, the target's are for (E2); the minimum is of each action on its own
    return critic(batch.obs, batch.action).min(dim=0).values - q.view(-1, num_samples).mean(dim=1)


def weights(advantage: Tensor, args: Args) -> Tensor:
    """(E4): advantages (B,) to the weights (B,) of their actions."""
    # (E4) a tie counts as not better
    if args.weighting == "binary":
        return (advantage > 0).to(advantage.dtype)
    return (advantage / args.beta).exp().clamp(max=args.max_weight)


def effective_share(weight: Tensor) -> Tensor:
    """(Σw)² / (B Σw²): 1 where all actions count alike, as in cloning; 1/B where a single one does."""
    return weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-8)


def actor_loss(actor: Actor, batch: Batch, weight: Tensor) -> Tensor:
    """(E5): cloning, of each action as much as it is worth."""
    log_prob = gaussian_log_prob(*actor(batch.obs), batch.action)
    assert weight.shape == log_prob.shape, "a weight (B, 1) would broadcast to (B, B), and train"
    # (E5)
    return -(weight * log_prob).mean()


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E6); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E6)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E7) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, actor_target: Actor, critic: Critic, critic_target: Critic,
           actor_optimizer, critic_optimizer, renew_targets: bool) -> dict[str, Tensor]:
    """One step of CRR: π, Q and, where it is their turn, the targets. Neither loss sees the other's step."""
    batch = data.sample(args.batch_size)

    y = td_target(actor_target, critic_target, batch, args.gamma)

    weight = weights(advantage(actor, critic, batch, args.num_samples), args)
    pi_loss = actor_loss(actor, batch, weight)
    descend(pi_loss, actor_optimizer)

    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    if renew_targets:
        # (E7) at rate 1 an average is a copy
        polyak_update(critic_target, critic, 1.0)
        polyak_update(actor_target, actor, 1.0)
    return {"actor_loss": pi_loss.detach(), "critic_loss": q_loss.detach(), "q_data": q_data,
            "effective_share": effective_share(weight)}


def train(args: Args) -> None:
    data = load_dataset(args.env, args.device)
    run = Run(args, data, variant="-binary" if args.weighting == "binary" else "")
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    actor_target, critic_target = copy.deepcopy(actor), copy.deepcopy(critic)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    start = run.resume(actor=actor, actor_target=actor_target, critic=critic, critic_target=critic_target,
                       actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    one_update = record_on_cuda(partial(update, args, data, actor, actor_target, critic, critic_target,
                                        actor_optimizer, critic_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update(step % args.target_every == 0)
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
