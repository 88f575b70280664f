"""Implicit Q-Learning: never ask about an action that the data lack.

Kostrikov, Nair & Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022, arXiv 2110.06169.
Notes: Policy Constraints (软约束); beyond the notes' own list. Their BCQ backs up the best action seen in the data; IQL does
so without a model of what was seen.

One of four files, iql.py, awac.py, crr.py and awr.py, that all clone the data's actions by weight: read them side by side
for how each estimates the advantage of an action, and how it turns that into a weight. IQL learns a V that leans towards
the better of the data's actions: an expectile of Q, between the mean (τ = ½) and the maximum (τ → 1). Q bootstraps from that
V, so no policy takes part in learning values, and no Q is asked about an action from elsewhere.

  (E1) r ← 1000 r / (largest − smallest return of the data's episodes), once
  (E2) q = min_k Q̄_k(s, a)
  (E3) L_V = E_D[ |τ − 1[q ≤ V(s)]| · (q − V(s))² ]
  (E4) Â = q − V(s), with the new V
  (E5) w = min( exp(β Â), w_max )
  (E6) L_π = −E_D[ w · log π(a|s) ],  π = N(μ(s), σ²), no gradient through w
  (E7) y = r + γ (1 − d) V(s′), with the new V
  (E8) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E9) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode bootstraps.
Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the paper and its official code (ikostrikov/implicit_q_learning):
  D1 PyTorch's default initialisation in place of orthogonal matrices times √2, as in the other files here.
  D2 (E1) holds for every dataset; officially for locomotion, and in AntMaze 1 is subtracted from each reward instead.
  D3 The data's actions are not clipped to ±(1 − 10⁻⁵): nothing here takes their arctanh.

Run:     python algorithms/iql.py --env hopper-medium
Expect:  hopper-medium 66.6 (the data 44, BC 47 and 54), hopper-medium-replay 39.3 (the data 15, BC 18), after 100,000 updates,
         seed 0; its paper has 66 and 95 after 1M. Evaluations on hopper-medium swing between 20 and 83: results/curves/.
         pendulum-random (the data −1218): −163 and −214 after 6,000 updates, seeds 0 and 2, otherwise as its test.
         pendulum-medium-replay (the data −1148): from −503 to −1409, by seed and setting: no reliable gain. Seed 2's policy
         spins the pendulum at full speed for ever; 743 of these 20,000 rows are that fast, 2,105 of pendulum-random's.
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
from common import Batch, Dataset, Run, check, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [C train_offline.py]
    batch_size: int = 256  # transitions per update [C train_offline.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-4  # Adam; falls to 0 along half a cosine over all steps [C learner.py]
    critic_lr: float = 3e-4  # Adam, for Q and V, constant [C learner.py]
    gamma: float = 0.99  # discount γ [C learner.py]
    target_rate: float = 0.005  # share of the new weights in (E9) [C learner.py]
    # IQL
    expectile: float = 0.7  # τ in (E3): 0.5 values the data's behaviour, towards 1 its best [C mujoco_config.py]
    beta: float = 3.0  # β in (E5) multiplies Â here (in the other three files it divides); 0 clones [C mujoco_config.py]
    max_weight: float = 100.0  # w_max in (E5) [C actor.py]


HIDDEN = (256, 256)  # widths of actor, critics and V [C learner.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C policy.py]


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


class Value(nn.Module):
    """V(s), (B, S) -> (B,)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


def scale_rewards(data: Dataset) -> None:
    """(E1) in place."""
    returns = data.returns()
    check(returns.max() > returns.min(), f"all episodes of {data.name} have the same return, so its rewards have no scale")
    # (E1)
    data.columns(data.packed).reward.mul_(1000 / (returns.max() - returns.min()))


@torch.no_grad()
def min_q(critic_target: Critic, batch: Batch) -> Tensor:
    """(E2): the target critics' smaller value of the data's own action, (B,)."""
    # (E2)
    return critic_target(batch.obs, batch.action).min(dim=0).values


def value_loss(value: Value, batch: Batch, q: Tensor, expectile: float) -> Tensor:
    """(E3): with τ > ½ it costs more to lie below q than above it, so V settles near the better actions."""
    v = value(batch.obs)
    assert q.shape == v.shape, "a target (B, 1) would broadcast to (B, B), and train"
    # (E3)
    return ((expectile - (q <= v).to(v.dtype)).abs() * (q - v).pow(2)).mean()


@torch.no_grad()
def advantage(value: Value, batch: Batch, q: Tensor) -> Tensor:
    """(E4): how much better the data's action is than V, (B,)."""
    # (E4)
    return q - value(batch.obs)


def weights(advantage: Tensor, beta: float, max_weight: float) -> Tensor:
    """(E5): advantages (B,) to the weights (B,) of their actions."""
    # (E5)
    return (beta * advantage).exp().clamp(max=max_weight)


def effective_share(weight: Tensor) -> Tensor:
    """(Σw)² / (B Σw²): 1 where all actions count alike, as in cloning; 1/B where a single one does."""
    return weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-8)


def actor_loss(actor: Actor, batch: Batch, weight: Tensor) -> Tensor:
    """(E6): cloning, of each action as much as it is worth."""
    log_prob = gaussian_log_prob(*actor(batch.obs), batch.action)
    assert weight.shape == log_prob.shape, "a weight (B, 1) would broadcast to (B, B), and train"
    # (E6)
    return -(weight * log_prob).mean()


@torch.no_grad()
def td_target(value: Value, batch: Batch, gamma: float) -> Tensor:
    """(E7): the regression target y, (B,)."""
    # (E7) no action at s′ at all; only a termination stops the bootstrap
    return batch.reward + gamma * (1 - batch.terminated) * value(batch.next_obs)


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E8); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E8)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E9) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic, value: Value,
           actor_optimizer, critic_optimizer, value_optimizer) -> dict[str, Tensor]:
    """One step of IQL: V, then with the new V π and Q, targets."""
    batch = data.sample(args.batch_size)

    q = min_q(critic_target, batch)
    v_loss = value_loss(value, batch, q, args.expectile)
    descend(v_loss, value_optimizer)

    weight = weights(advantage(value, batch, q), args.beta, args.max_weight)
    pi_loss = actor_loss(actor, batch, weight)
    descend(pi_loss, actor_optimizer)

    y = td_target(value, batch, args.gamma)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    # (E9)
    polyak_update(critic_target, critic, args.target_rate)
    return {"value_loss": v_loss.detach(), "actor_loss": pi_loss.detach(), "critic_loss": q_loss.detach(), "q_data": q_data,
            "effective_share": effective_share(weight)}


def train(args: Args) -> None:
    check(0 < args.expectile < 1, f"--expectile must be between 0 and 1, not {args.expectile}")
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    scale_rewards(data)
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    critic_target = copy.deepcopy(critic)
    value = Value(data.obs_dim).to(data.device)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=torch.tensor(args.actor_lr, device=data.device))  # a tensor: it changes
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    value_optimizer = adam(value.parameters(), lr=args.critic_lr)
    start = run.resume(actor=actor, critic=critic, critic_target=critic_target, value=value, actor_optimizer=actor_optimizer,
                       critic_optimizer=critic_optimizer, value_optimizer=value_optimizer)
    one_update = record_on_cuda(partial(update, args, data, actor, critic, critic_target, value,
                                        actor_optimizer, critic_optimizer, value_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        actor_optimizer.param_groups[0]["lr"].fill_(args.actor_lr * (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2)
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
