"""TD3+BC: TD3 with a behaviour-cloning term in the actor's loss.

Fujimoto & Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021,
arXiv 2106.06860.
Notes: Policy Constraints (软约束). Beyond the notes: the shortest method that works.

A policy trained offline must stay near the data, because Q is only right there. TD3+BC does this in
the plainest way: it adds the cloning error (π(s) − a)² to TD3's actor loss. Q is divided by its own
mean size, so that one weight serves tasks whose rewards differ by orders of magnitude.

  (E1) ã′ = clip( π̄(s′) + clip(ε, −c, c), −1, 1 ),  ε ~ N(0, σ²)
  (E2) y = r + γ (1 − d) min_k Q̄_k(s′, ã′)
  (E3) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E4) λ = w / E_D[ |Q_1(s, π(s))| ],  no gradient
  (E5) L_π = E_D[ −λ Q_1(s, π(s)) + ‖π(s) − a‖² / A ]
  (E6) Q̄ ← Q̄ + rate · (Q − Q̄),  π̄ ← π̄ + rate · (π − π̄)

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations have mean 0 and standard deviation 1 over the data, actions lie in
[-1, 1]; the actor converts from and to raw units.

Differences from the paper; none known from the official code (sfujim/TD3_BC):
  D1 (E4) averages |Q| over the policy's actions [code]; the paper's formula has the data's.
  D2 (E5) averages the squared error over action dimensions [code]; the paper's formula sums.

Watch: q_policy stays near q_data, a little above it. If it grows without bound, the policy has
left the data: lower --q-weight. cloning_error stays near that of bc.py on the same data.

Run:     python algorithms/td3_bc.py --env hopper-medium
Expect:  clearly above a clone on mixed data after 100,000 updates; evaluations fluctuate.
         Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check_range, load_dataset, record_on_cuda

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [C main.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [C main.py]
    eval_episodes: int = 10  # per evaluation; 0: none [C main.py]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 256  # transitions per update [C main.py]
    actor_lr: float = 3e-4  # Adam [C TD3_BC.py]
    critic_lr: float = 3e-4  # Adam [C TD3_BC.py]
    gamma: float = 0.99  # discount γ [C main.py]
    target_rate: float = 0.005  # share of the new weights in (E6) [C main.py]
    # TD3+BC
    policy_noise: float = 0.2  # σ in (E1) [C main.py]
    noise_clip: float = 0.5  # c in (E1) [C main.py]
    policy_delay: int = 2  # critic updates per update of actor and targets [C main.py]
    q_weight: float = 2.5  # w in (E4), larger trusts Q more; the paper's α [P][C main.py]


HIDDEN = (256, 256)  # widths of actor and critics [C TD3_BC.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Deterministic π(s). Its buffers hold the data's units: it takes raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> Tensor:
        """Standardised observations (B, S) to actions (B, A) in [-1, 1]."""
        return torch.tanh(self.net(obs))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        return self.action_mid + self.action_half * self((obs - self.obs_mean) / self.obs_std)


class EnsembleLinear(nn.Module):
    """K linear layers as one batched product: (K, B, in) -> (K, B, out)."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(num, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Critic(nn.Module):
    """K independent Q networks, (B, S), (B, A) -> (K, B)."""

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(EnsembleLinear(num, inputs, outputs))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        num = len(self.layers[0].weight)
        x = torch.cat([obs, action], dim=-1).expand(num, -1, -1)  # (K, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


@torch.no_grad()
def td_target(actor_target: Actor, critic_target: Critic, batch: Batch, args: Args) -> Tensor:
    """(E1), (E2): the regression target y, (B,)."""
    # (E1) the noise is drawn per transition and per action dimension
    noise = torch.randn_like(batch.action) * args.policy_noise
    noise = noise.clamp(-args.noise_clip, args.noise_clip)
    next_action = (actor_target(batch.next_obs) + noise).clamp(-1, 1)
    # (E2) the minimum over critics is per transition; only a termination stops the bootstrap
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + args.gamma * (1 - batch.terminated) * next_q


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E3); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E3)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, batch: Batch, q_weight: float) -> tuple[Tensor, ...]:
    """(E4), (E5); also the cloning error and the mean Q of the policy's actions."""
    action = actor(batch.obs)
    q = critic(batch.obs, action)[0]  # (B,) of the first critic alone, as in TD3
    # (E4) detached: otherwise the actor could lower its loss by changing the scale of Q
    lam = q_weight / q.abs().mean().detach()
    # (E5)
    cloning = (action - batch.action).pow(2).mean()
    return -lam * q.mean() + cloning, cloning.detach(), q.detach().mean()


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Brings the data's observations to mean 0 and standard deviation 1, in place.

    Returns the mean and the deviation + eps that were used, (S,) each.
    """
    mean = data.obs.mean(dim=0)
    std = data.obs.std(dim=0, correction=0) + eps  # eps: for what hardly moves
    data.obs = (data.obs - mean) / std
    data.next_obs = (data.next_obs - mean) / std
    return mean, std


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E6) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, actor_target: Actor, critic: Critic,
           critic_target: Critic, actor_optimizer, critic_optimizer,
           update_actor: bool) -> dict[str, Tensor]:
    """One step of TD3+BC. The actor and the targets move in every policy_delay-th step."""
    batch = data.sample(args.batch_size)

    y = td_target(actor_target, critic_target, batch, args)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)
    if not update_actor:
        return {"critic_loss": q_loss.detach(), "q_data": q_data}

    pi_loss, cloning_error, q_policy = actor_loss(actor, critic, batch, args.q_weight)
    descend(pi_loss, actor_optimizer)

    # (E6)
    polyak_update(critic_target, critic, args.target_rate)
    polyak_update(actor_target, actor, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy,
            "cloning_error": cloning_error}


def train(args: Args) -> None:
    check_range(args, "batch_size policy_delay", 1)
    check_range(args, "actor_lr critic_lr policy_noise noise_clip q_weight", 0)
    check_range(args, "gamma target_rate", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=0.44)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.obs_mean, actor.obs_std = standardize_obs(data)
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
        run.step(step, one_update(update_actor=step % args.policy_delay == 0))
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
