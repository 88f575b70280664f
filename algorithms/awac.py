"""Advantage-Weighted Actor-Critic, its offline stage.

Nair, Gupta, Dalal & Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets", 2020, arXiv 2006.09359.
Notes: Policy Constraints (软约束); beyond the notes' own list. It solves their "max E[Q] s.t. D(π, π_β) ≤ ε" for D = KL in
closed form, π ∝ π_β · exp(Â/β), and fits its policy to that by weighted cloning: π_β itself is never estimated.

One of four files, iql.py, awac.py, crr.py and awr.py, that all clone the data's actions by weight: read them side by side
for how each estimates the advantage of an action, and how it turns that into a weight. AWAC learns Q of its own policy, whose
samples are asked for in the backup and, once per observation, stand for V(s). The weight is a softmax over the batch: the
actions of a batch compete with each other, so only differences of advantages count. The paper then goes on online; here is
what it does before.

  (E1) ã = clip( μ(s) + σ·ε, −1, 1 ),  ε ~ N(0, 1)
  (E2) y = r + γ (1 − d) min_k Q̄_k(s′, ã′),  ã′ ~ π(·|s′)
  (E3) Â = min_k Q_k(s, a) − min_k Q_k(s, ã),  ã ~ π(·|s)
  (E4) w_i = B · exp(Â_i/β) / Σ_j exp(Â_j/β),  the sum over the batch
  (E5) L_π = −E_D[ w · log π(a|s) ],  π = N(μ(s), σ²), no gradient through w
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode bootstraps.
Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the official code (rail-berkeley/rlkit, awac_trainer.py):
  D1 PyTorch's default initialisation; target critics start as copies, not as other random networks.
  D2 (E1) clips, as other reproductions do: a Gaussian around a bounded mean may leave the box.
  D3 The offline stage goes on for 1M updates, as other offline methods; the official script has 50,000, then acts online.
  D4 Batches of 128, as its offline stage draws them; the 1024 of other offline versions are its online stage's. (E4) with 1024
     gave 16.3 on hopper-medium-replay after 36,000 updates, where a clone has 18.
Another algorithm has the same name: CORL's weight is min(exp(Â/β), 100), with β = ⅓, and its scores are far from rlkit's.

Run:     python algorithms/awac.py --env hopper-medium
Expect:  hopper-medium 3.8 (the data 44, BC 47 and 54), hopper-medium-replay 23.7 (the data 15, BC 18), after 100,000 updates,
         seed 0, in a quarter of an hour on a core. The former is 33 after 10,000 updates, falls while Q climbs to 770, thrice
         too high, and stays low although Q comes back: in the end its mean is 256, the data's discounted returns' 263. There
         advantages from −14 to 10 leave all of (E4)'s weight to 5% of a batch, or 0.3% of 20,000 transitions, and the policy's
         squared distance from the data's actions is half as large again as a clone's (0.045, 0.031): more than hopper forgives.
         pendulum-medium-replay (the data −1148): −386 and −237 after 8,000 updates with its end-to-end test's settings,
         larger rates; before 4,000 often worse than the data.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    steps: int = 1_000_000  # gradient updates [D3]
    batch_size: int = 128  # transitions per update, whose actions (E4) compares [C awac_trainer.py] [D4]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-4  # Adam [C awac1.py]
    critic_lr: float = 3e-4  # Adam [C awac1.py]
    weight_decay: float = 1e-4  # L2, of the actor only [C awac1.py]
    gamma: float = 0.99  # discount γ [C awac1.py]
    target_rate: float = 0.005  # share of the new weights in (E7) [C awac1.py]
    # AWAC
    beta: float = 2.0  # β in (E4), larger clones more [C awac1.py]


HIDDEN = (256, 256)  # widths of the critics [C awac1.py]
ACTOR_HIDDEN = (256, 256, 256, 256)  # [C awac1.py]
LOG_STD_MIN, LOG_STD_MAX = -6.0, 0.0  # [C awac1.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian π(a|s) around tanh of a network. Its buffers hold the units, so a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *ACTOR_HIDDEN, action_dim)
        self.std_logit = nn.Parameter(torch.zeros(action_dim))  # the same in all states; at first σ = e⁻³
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of the action: (B, A) each."""
        mean = torch.tanh(self.net(obs))
        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * torch.sigmoid(self.std_logit)
        return mean, log_std.expand_as(mean)

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


class Critic(nn.Module):
    """K independent Q networks, (B, S), (B, A) -> (K, B)."""

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList(EnsembleLinear(num, i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1).expand(len(self.layers[0].weight), -1, -1)  # (K, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


@torch.no_grad()
def td_target(actor: Actor, critic_target: Critic, batch: Batch, gamma: float) -> Tensor:
    """(E2): the regression target y, (B,)."""
    # (E2) an action of the policy's own; only a termination stops the bootstrap
    next_action = sample_clipped(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


@torch.no_grad()
def advantage(actor: Actor, critic: Critic, batch: Batch) -> Tensor:
    """(E3): how much better the data's action is than one of the policy's, (B,)."""
    # (E3) the online critics; the minimum is of each action on its own
    v = critic(batch.obs, sample_clipped(*actor(batch.obs))).min(dim=0).values
    return critic(batch.obs, batch.action).min(dim=0).values - v


def weights(advantage: Tensor, beta: float) -> Tensor:
    """(E4): advantages (B,) to the weights (B,) of their actions; their mean is 1, whatever the scale of Q."""
    # (E4)
    return len(advantage) * torch.softmax(advantage / beta, dim=0)


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


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic,
           actor_optimizer, critic_optimizer) -> dict[str, Tensor]:
    """One step of AWAC: both losses from the networks as they are, then the steps of π and Q, then the targets."""
    batch = data.sample(args.batch_size)

    y = td_target(actor, critic_target, batch, args.gamma)  # before the actor's step, as its action is the old policy's

    weight = weights(advantage(actor, critic, batch), args.beta)
    pi_loss = actor_loss(actor, batch, weight)
    descend(pi_loss, actor_optimizer)

    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    # (E7)
    polyak_update(critic_target, critic, args.target_rate)
    return {"actor_loss": pi_loss.detach(), "critic_loss": q_loss.detach(), "q_data": q_data,
            "effective_share": effective_share(weight)}


def train(args: Args) -> None:
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    critic_target = copy.deepcopy(critic)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr, weight_decay=args.weight_decay)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    start = run.resume(actor=actor, critic=critic, critic_target=critic_target,
                       actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    one_update = record_on_cuda(partial(update, args, data, actor, critic, critic_target,
                                        actor_optimizer, critic_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
