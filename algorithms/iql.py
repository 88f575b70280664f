"""Implicit Q-learning (IQL): no action outside the data is ever evaluated.

Kostrikov, Nair & Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022,
arXiv 2110.06169.
Notes: Policy Constraints (软约束). Beyond the notes: their BCQ backs up the best action in the
data; IQL does so without a model of the data's policy.

IQL learns V(s) as an expectile of Q over the data's actions: τ = ½ gives their mean, and τ → 1 the
value of the best of them. Q bootstraps from V, so the policy takes no part in learning values. The
policy clones the data's actions, weighted by their advantage.

One of four siblings that clone the data's actions a, each with a weight w (ã are actions of π):
        advantage Â               unit of Â            weight w            cap  critic
  iql   Q̄(s, a) − V(s)            return range / 1000  exp(β Â)            100  V, then Q from V
  awac  Q(s, a) − Q(s, ã)         reward               softmax over batch  B    Q of π
  crr   Q(s, a) − mean Q(s, ã_j)  reward               exp(Â/β) or 1[Â>0]  20   Q of π, layer norms
  awr   R − V(s)                  its std over data    exp(Â/β)            20   V of the data

  (E1) r ← 1000 r / (largest − smallest return of the data's episodes), once
  (E2) q = min_k Q̄_k(s, a)
  (E3) L_V = E_D[ |τ − 1[q ≤ V(s)]| · (q − V(s))² ]
  (E4) Â = q − V(s), with the new V
  (E5) w = min( exp(β Â), w_max )
  (E6) L_π = −E_D[ w · log π(a|s) ],  π = N(μ(s), σ²), no gradient through w
  (E7) y = r + γ (1 − d) V(s′), with the new V
  (E8) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E9) Q̄ ← Q̄ + rate · (Q − Q̄)
  (E10) the actor's learning rate in update t = 0 … T − 1 of all T:  ½ (1 + cos(π t / T)) · actor_lr
       (π is 3.14 here)

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them.

Differences from the paper and its official code (ikostrikov/implicit_q_learning):
  D1 PyTorch's default initialisation; officially orthogonal, times √2.
  D2 (E1) holds for every dataset; officially for locomotion (AntMaze: 1 is subtracted from r).
  D3 The data's actions are not clipped to ±(1 − 10⁻⁵): nothing here takes their arctanh.

Watch: effective_share, of one batch, falls from 1 to about 0.1 and then varies, on hopper-medium
between 0.03 and 0.3. Where it stays near 1 the policy is a clone, as with β = 0: raise --beta.
Where it stays near 1/B one action gets all the weight: lower --beta. q_data levels off.

Run:     python algorithms/iql.py --env hopper-medium
Expect:  above a clone after 100,000 updates, most clearly on mixed data. Evaluations rise there
         within 40,000 updates; one seed of three fell at the end, although its learning rate was
         small by then. Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check_range, fail, load_dataset, notice, record_on_cuda

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates; (E10) is stretched over them [C train_offline.py]
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
    batch_size: int = 256  # transitions per update [C train_offline.py]
    actor_lr: float = 3e-4  # Adam; falls to 0 by (E10) [C learner.py]
    critic_lr: float = 3e-4  # Adam, for Q and V, constant [C learner.py]
    gamma: float = 0.99  # discount γ [C learner.py]
    target_rate: float = 0.005  # share of the new weights in (E9) [C learner.py]
    # IQL
    expectile: float = 0.7  # τ in (E3): 0.5 mean, towards 1 best of the data [C mujoco_config.py]
    beta: float = 3.0  # β in (E5): multiplies Â; awac, crr and awr divide [C mujoco_config.py]
    max_weight: float = 100.0  # w_max in (E5) [C actor.py]


HIDDEN = (256, 256)  # widths of actor, critics and V [C learner.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C learner.py, policy.py]


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


class Value(nn.Module):
    """V(s), (B, S) -> (B,)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


def scale_rewards(data: Dataset) -> None:
    """(E1), in place."""
    returns = data.returns()[data.finished()]
    spread = returns.max() - returns.min()
    if spread <= 1e-6 * abs(returns).max():  # equal but for rounding
        notice(f"all episodes of {data.name} have the same return; its rewards are not scaled")
        return
    # (E1) any unit of reward gives the same data, so β means the same for all
    data.reward = data.reward * (1000 / spread)


@torch.no_grad()
def min_q(critic_target: Critic, batch: Batch) -> Tensor:
    """(E2): the smaller of the target critics' values of the data's action, (B,)."""
    # (E2)
    return critic_target(batch.obs, batch.action).min(dim=0).values


def value_loss(value: Value, batch: Batch, q: Tensor, expectile: float) -> Tensor:
    """(E3): squared errors, with weight τ where V is below q and 1 − τ where it is above."""
    v = value(batch.obs)
    assert q.shape == v.shape, "a target (B, 1) would broadcast to (B, B), and train"
    # (E3) with τ > ½ a V below q costs more, so V settles near the better actions
    return ((expectile - (q <= v).to(v.dtype)).abs() * (q - v).pow(2)).mean()


@torch.no_grad()
def advantage(value: Value, batch: Batch, q: Tensor) -> Tensor:
    """(E4): how much better the data's action is than V, (B,)."""
    # (E4)
    return q - value(batch.obs)


def weights(adv: Tensor, beta: float, max_weight: float) -> Tensor:
    """(E5): advantages (B,) to the weights (B,) of their actions."""
    # (E5)
    return (beta * adv).exp().clamp(max=max_weight)


def effective_share(weight: Tensor) -> Tensor:
    """(Σw)² / (B Σw²): 1 where all actions count alike, as in cloning; 1/B where one does."""
    return weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-8)


def actor_loss(actor: Actor, batch: Batch, weight: Tensor) -> Tensor:
    """(E6): cloning of the data's actions, each with its weight."""
    log_prob = gaussian_log_prob(*actor(batch.obs), batch.action)
    assert weight.shape == log_prob.shape, "a weight (B, 1) would broadcast to (B, B), and train"
    # (E6)
    return -(weight * log_prob).mean()


@torch.no_grad()
def td_target(value: Value, batch: Batch, gamma: float) -> Tensor:
    """(E7): the regression target y, (B,)."""
    # (E7) there is no action at s′ at all; only a termination stops the bootstrap
    return batch.reward + gamma * (1 - batch.terminated) * value(batch.next_obs)


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E8); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E8)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E9) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic,
           value: Value, actor_optimizer, critic_optimizer, value_optimizer) -> dict[str, Tensor]:
    """One step of IQL: V; then, with the new V, the actor and Q; then the target."""
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
    return {"value_loss": v_loss.detach(), "actor_loss": pi_loss.detach(),
            "critic_loss": q_loss.detach(), "q_data": q_data,
            "effective_share": effective_share(weight)}


def actor_rate(args: Args, step: int) -> float:
    """(E10): the actor's learning rate in update `step`, counted from 1."""
    # (E10) warning: the cosine ends at --steps, so 100,000 updates are not the start of a million
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / args.steps)) * args.actor_lr


def train(args: Args) -> None:
    check_range(args, "batch_size", 1)
    check_range(args, "actor_lr critic_lr beta max_weight", 0)
    check_range(args, "gamma target_rate", 0, 1)
    if not 0 < args.expectile < 1:
        fail(f"--expectile must be between 0 and 1, not {args.expectile}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=0.559)
    scale_rewards(data)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    value = Value(data.obs_dim).to(data.device)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    # a tensor: a CUDA graph would freeze a number
    changing_lr = torch.tensor(args.actor_lr, device=data.device)
    learned = {
        "actor": actor,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "value": value,
        "actor_optimizer": adam(actor.parameters(), lr=changing_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
        "value_optimizer": adam(value.parameters(), lr=args.critic_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        learned["actor_optimizer"].param_groups[0]["lr"].fill_(actor_rate(args, step))
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
