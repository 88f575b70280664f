"""Advantage-weighted actor-critic (AWAC), its offline stage.

Nair, Gupta, Dalal & Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline
Datasets", 2020, arXiv 2006.09359.
Notes: Policy Constraints (软约束). Beyond the notes: AWAC solves their max E[Q] s.t. D(π, π_β) ≤ ε
for D = KL in closed form, π ∝ π_β · exp(Â/β), and needs no estimate of π_β, the policy behind the
data. (The β of exp(Â/β) is a number.)

AWAC learns Q of its own policy, as SAC does, and fits the policy by weighted cloning. One action ã
of the policy stands for V(s). The weight is a softmax over the batch: its actions compete with each
other, so only differences of advantages count.

One of four siblings that clone the data's actions a, each with a weight w (ã are actions of π):
        advantage Â               unit of Â            weight w            cap  critic
  iql   Q̄(s, a) − V(s)            return range / 1000  exp(β Â)            100  V, then Q from V
  awac  Q(s, a) − Q(s, ã)         reward               softmax over batch  B    Q of π
  crr   Q(s, a) − mean Q(s, ã_j)  reward               exp(Â/β) or 1[Â>0]  20   Q of π, layer norms
  awr   R − V(s)                  its std over data    exp(Â/β)            20   V of the data

  (E1) ã = clip( μ(s) + σ·ε, −1, 1 ),  ε ~ N(0, I)
  (E2) y = r + γ (1 − d) min_k Q̄_k(s′, ã′),  ã′ ~ π(·|s′)
  (E3) Â = min_k Q_k(s, a) − min_k Q_k(s, ã),  ã ~ π(·|s)
  (E4) w_i = B · exp(Â_i/β) / Σ_j exp(Â_j/β),  the sum over the batch
  (E5) L_π = −E_D[ w · log π(a|s) ],  π = N(μ(s), σ²), no gradient through w
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them.

Differences from the official code (rail-berkeley/rlkit, awac_trainer.py):
  D1 PyTorch's default initialisation; target critics start as copies, not as other networks.
  D2 (E1) clips, as other reproductions do: a Gaussian around a bounded mean may leave the range.
  D3 1M offline updates, as other offline methods have; officially 50,000, then it acts online.
  D4 Batches of 128, as in its offline stage; those of 1024 are its online stage's.
  D5 β = 10. The official MuJoCo script, which has no hopper, has 2: on hopper-medium the policy
     then stays far below a clone while q_data keeps rising (results/README.md, Settings). The
     trainer's default, jaxrl and d3rlpy have 1, the official hand script 0.5. CORL's "AWAC" is
     another algorithm: min(exp(Â/β), 100), β = ⅓.

Watch: q_data, a mean, levels off below the largest discounted return from any row of the data. If
it rises beyond that, the policy has left the data: raise --beta. The score warns earlier: with
β = 2 on hopper-medium it was low from the first evaluation on, and q_data rose to the end.
effective_share need not warn: it was still at 0.3 then. Near 1/B one action gets all the weight.

Run:     python algorithms/awac.py --env hopper-medium
Expect:  far above a clone on hopper-medium-replay; on hopper-medium about a clone's score,
         sometimes above, sometimes below: evaluations fluctuate.
         Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    steps: int = 1_000_000  # gradient updates [D3]
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
    batch_size: int = 128  # transitions per update, compared in (E4) [C awac_trainer.py] [D4]
    actor_lr: float = 3e-4  # Adam [C awac1.py]
    critic_lr: float = 3e-4  # Adam [C awac1.py]
    weight_decay: float = 1e-4  # L2, of the actor only [C awac1.py]
    gamma: float = 0.99  # discount γ [C awac1.py]
    target_rate: float = 0.005  # share of the new weights in (E7) [C awac1.py]
    # AWAC
    beta: float = 10.0  # β in (E4), larger clones more [D5]


HIDDEN = (256, 256)  # widths of the critics [C awac1.py]
ACTOR_HIDDEN = (256, 256, 256, 256)  # [C awac1.py]
LOG_STD_MIN, LOG_STD_MAX = -6.0, 0.0  # [C awac1.py]


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
        self.net = mlp(obs_dim, *ACTOR_HIDDEN, action_dim)
        self.std_logit = nn.Parameter(torch.zeros(action_dim))  # for all states; at first σ = e⁻³
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of the action: (B, A) each."""
        mean = torch.tanh(self.net(obs))
        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * torch.sigmoid(self.std_logit)
        return mean, log_std.expand_as(mean)

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
def td_target(policy: Actor, critic_target: Critic, batch: Batch, gamma: float) -> Tensor:
    """(E2): the regression target y, (B,)."""
    # (E2) at an action of the policy; only a termination stops the bootstrap
    next_action = sample_clipped(*policy(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


@torch.no_grad()
def advantage(actor: Actor, critic: Critic, batch: Batch) -> Tensor:
    """(E3): how much better the data's action is than one of the policy's, (B,)."""
    # (E3) from the online critics; each action has its own minimum
    q_data = critic(batch.obs, batch.action).min(dim=0).values
    q_policy = critic(batch.obs, sample_clipped(*actor(batch.obs))).min(dim=0).values
    return q_data - q_policy


def weights(adv: Tensor, beta: float) -> Tensor:
    """(E4): advantages (B,) to the weights (B,) of their actions."""
    # (E4) their mean is 1, whatever the scale of Q
    return len(adv) * torch.softmax(adv / beta, dim=0)


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
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E7) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic,
           actor_optimizer, critic_optimizer) -> dict[str, Tensor]:
    """One step of AWAC: the actor, Q, the target. Neither loss sees the other's step."""
    batch = data.sample(args.batch_size)

    y = td_target(actor, critic_target, batch, args.gamma)  # before the actor moves

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
    check_range(args, "batch_size", 1)
    check_range(args, "actor_lr critic_lr weight_decay", 0)
    check_range(args, "gamma target_rate", 0, 1)
    if not args.beta > 0:
        fail(f"--beta must be above 0, not {args.beta}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=0.467)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr,
                                weight_decay=args.weight_decay),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
