"""Critic-regularised regression (CRR), with exponential or binary weights.

Wang et al., "Critic Regularized Regression", NeurIPS 2020, arXiv 2006.15134.
Notes: Policy Constraints (软约束), in their references. Weighted cloning needs no estimate of π_β,
so it does not suffer from a wrong one (their ▼ 问题).

CRR learns Q of its own policy, as AWAC does, and takes the mean over N of the policy's actions for
V(s). The weight is exponential with a cap; or binary: clone what is better than the policy, drop
the rest. The targets are copies of Q and of π, renewed at intervals.

One of four siblings that clone the data's actions a, each with a weight w (ã are actions of π):
        advantage Â               unit of Â            weight w            cap  critic
  iql   Q̄(s, a) − V(s)            return range / 1000  exp(β Â)            100  V, then Q from V
  awac  Q(s, a) − Q(s, ã)         reward               softmax over batch  B    Q of π
  crr   Q(s, a) − mean Q(s, ã_j)  reward               exp(Â/β) or 1[Â>0]  20   Q of π, layer norms
  awr   R − V(s)                  its std over data    exp(Â/β)            20   V of the data

  (E1) ã = clip( μ(s) + σ·ε, −1, 1 ),  ε ~ N(0, I)
  (E2) y = r + γ (1 − d) min_k Q̄_k(s′, ã′),  ã′ ~ π̄(·|s′)
  (E3) Â = min_k Q_k(s, a) − 1/N Σ_j min_k Q_k(s, ã_j),  ã_j ~ π(·|s)
  (E4) w = min( exp(Â/β), w_max ),  or binary: w = 1[Â > 0]
  (E5) L_π = −E_D[ w · log π(a|s) ],  π = N(μ(s), σ²), no gradient through w
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) every target_every updates  Q̄ ← Q,  π̄ ← π

Shapes: B batch, S observation, A action, K = 2 critics, N samples. d is terminated: a truncated
episode bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them.

Differences. The paper's code (deepmind/acme, TensorFlow) has residual blocks, LSTMs, a mixture of
Gaussians, a critic of 21 atoms on [0, 100], and clipped gradients. This file follows acme's later
JAX version, except for
  D1 its critic's loss, which adds rewards (B,) to Q̄ (B, 1): each Q learns the batch's mean. The
     factor ½ is left out.
  D2 A Gaussian around tanh of a mean [d3rlpy], with one σ for all states, as in awac.py; the code
     of the paper and JAX have σ(s). JAX applies tanh to the sample, and takes the mean density of
     the tail for what lies beyond ±0.999.
  D3 Batches of 256, as in the paper's code; JAX's example has 64.
  D4 It acts with the policy's mean; JAX with the target policy's mode, the paper's code with
     samples drawn by softmax of Q.
  D5 PyTorch's default initialisation.
  D6 Two critics, their minimum, and layer norms [sail-sg/offbench; there before ReLU, here
     after]. The paper's critic has norms and a bound. JAX's one plain critic diverges on
     hopper-medium-replay.

Watch: q_data levels off below the data's largest discounted returns; if it keeps rising, Q
diverges. effective_share stays above 0.1; near 1/B one action gets all the weight: raise --beta.

Run:     python algorithms/crr.py --env hopper-medium
         python algorithms/crr.py --env hopper-medium --weighting binary
Expect:  clearly above a clone after 100,000 updates, with evaluations that fluctuate on mixed data.
         Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check_range, fail, load_dataset, record_on_cuda

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [=]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [=]
    eval_episodes: int = 10  # per evaluation; 0: none [=]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 256  # transitions per update [C acme/tf/crr] [D3]
    actor_lr: float = 3e-4  # Adam [C jax/crr/config.py]
    critic_lr: float = 3e-4  # Adam [C jax/crr/config.py]
    gamma: float = 0.99  # discount γ [C jax/crr/config.py]
    target_every: int = 100  # updates between copies (E7) [C jax/crr/config.py]
    # CRR
    weighting: Literal["exp", "binary"] = "exp"  # which of (E4) [P][C jax/crr/losses.py]
    num_samples: int = 4  # N in (E3) [C jax/crr/losses.py]
    beta: float = 1.0  # β in (E4), for exp only; larger clones more [C jax/crr/losses.py]
    max_weight: float = 20.0  # w_max in (E4), for exp only [C jax/crr/losses.py]


HIDDEN = (256, 256)  # widths of actor and critic [C jax/crr/networks.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # as in iql.py [D2]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian π(a|s) around tanh of a network. Its buffers hold the action's units."""

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
        """Raw observations (B, S) to the environment's own actions (B, A): the mean."""
        mean, _ = self(obs)
        return self.action_mid + self.action_half * mean


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(a; μ, σ²), (B, A) -> (B,).

    The sample is not squashed by tanh, so there is no Jacobian, and |a| = 1 has a finite density.
    """
    z = (action - mean) / log_std.exp()
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def sample_clipped(mean: Tensor, log_std: Tensor) -> Tensor:
    """(E1): actions (..., A) of the policy."""
    # (E1) the clip keeps samples in the range of the data's actions, where Q is trained
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
    """K layer norms over the features of (K, B, H), each with its own scale and shift."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num, 1, dim))
        self.bias = nn.Parameter(torch.zeros(num, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.weight)


class Critic(nn.Module):
    """K independent Q networks, (B, S), (B, A) -> (K, B).

    The norm after each ReLU bounds how far Q can extrapolate beyond the data.
    """

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(EnsembleLinear(num, inputs, outputs))
        self.norms = nn.ModuleList()
        for width in HIDDEN:
            self.norms.append(EnsembleLayerNorm(num, width))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        num = len(self.layers[0].weight)
        x = torch.cat([obs, action], dim=-1).expand(num, -1, -1)  # (K, B, S + A)
        for layer, norm in zip(self.layers, self.norms):
            x = norm(F.relu(layer(x)))
        return self.layers[-1](x).squeeze(-1)


@torch.no_grad()
def td_target(policy: Actor, critic_target: Critic, batch: Batch, gamma: float) -> Tensor:
    """(E2): the regression target y, (B,)."""
    # (E2) at an action of the target policy; only a termination stops the bootstrap
    next_action = sample_clipped(*policy(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


def value_actions(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of N actions for each observation: (B, S), (B, N, A) -> (K, B, N)."""
    batch_size, num, action_dim = actions.shape
    # repeat_interleave, not repeat: row b·N + n of both inputs must belong to observation b
    obs = obs.repeat_interleave(num, dim=0)
    return critic(obs, actions.reshape(-1, action_dim)).view(-1, batch_size, num)


@torch.no_grad()
def advantage(actor: Actor, critic: Critic, batch: Batch, num_samples: int) -> Tensor:
    """(E3): how much better the data's action is than the policy's are on average, (B,)."""
    mean, log_std = actor(batch.obs)  # (B, A)
    mean = mean.unsqueeze(1).expand(-1, num_samples, -1)  # (B, N, A)
    log_std = log_std.unsqueeze(1).expand(-1, num_samples, -1)
    samples = sample_clipped(mean, log_std)
    # (E3) from online critics and online policy; each action has its own minimum
    q_data = critic(batch.obs, batch.action).min(dim=0).values  # (B,)
    q_policy = value_actions(critic, batch.obs, samples).min(dim=0).values  # (B, N)
    return q_data - q_policy.mean(dim=1)


def weights(adv: Tensor, args: Args) -> Tensor:
    """(E4): advantages (B,) to the weights (B,) of their actions."""
    # (E4) binary: Â = 0 gets weight 0
    if args.weighting == "binary":
        return (adv > 0).to(adv.dtype)
    return (adv / args.beta).exp().clamp(max=args.max_weight)


def effective_share(weight: Tensor) -> Tensor:
    """(Σw)² / (B Σw²): 1 where all actions count alike, as in cloning; 1/B where one does."""
    return weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-8)


def actor_loss(actor: Actor, batch: Batch, weight: Tensor) -> Tensor:
    """(E5): cloning of the data's actions, each with its weight."""
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
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def copy_weights(target: nn.Module, online: nn.Module) -> None:
    """(E7) target ← online, for all parameters at once."""
    torch._foreach_copy_(list(target.parameters()), list(online.parameters()))


def update(args: Args, data: Dataset, actor: Actor, actor_target: Actor, critic: Critic,
           critic_target: Critic, actor_optimizer, critic_optimizer,
           copy_targets: bool) -> dict[str, Tensor]:
    """One step of CRR: the actor, Q and, at intervals, the targets. Neither loss sees the other's
    step."""
    batch = data.sample(args.batch_size)

    y = td_target(actor_target, critic_target, batch, args.gamma)

    weight = weights(advantage(actor, critic, batch, args.num_samples), args)
    pi_loss = actor_loss(actor, batch, weight)
    descend(pi_loss, actor_optimizer)

    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    if copy_targets:
        # (E7)
        copy_weights(critic_target, critic)
        copy_weights(actor_target, actor)
    return {"actor_loss": pi_loss.detach(), "critic_loss": q_loss.detach(), "q_data": q_data,
            "effective_share": effective_share(weight)}


def train(args: Args) -> None:
    check_range(args, "batch_size target_every num_samples", 1)
    check_range(args, "actor_lr critic_lr max_weight", 0)
    check_range(args, "gamma", 0, 1)
    if not args.beta > 0:
        fail(f"--beta must be above 0, not {args.beta}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, variant="-binary" if args.weighting == "binary" else "", gflop=0.811)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "actor_target": copy.deepcopy(actor),
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update(copy_targets=step % args.target_every == 0))
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
