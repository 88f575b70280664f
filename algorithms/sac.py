"""Soft Actor-Critic (SAC), run on a fixed dataset ("SAC-off").

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905; first at
ICML 2018, arXiv 1801.01290. Offline as in D4RL's paper, arXiv 2004.07219.
Notes: Offline RL的主要问题 ⇒ Distributional Shift.

SAC learns Q of a policy that maximises reward plus entropy, and moves the policy towards actions
whose Q is large. Online, acting on a wrong Q corrects it. Offline nothing does: the target asks for
Q at the policy's own actions, which the data lack; the policy selects the actions whose error is
positive, and bootstrapping feeds the error back into Q. This is the distributional shift of the
notes.

  (E1) ã = tanh(u),  u = μ(s) + σ(s)·ε,  ε ~ N(0, I),
       log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i²) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E2) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − α log π(ã′|s′) ),  ã′ ~ π(·|s′)
  (E3) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E4) L_π = E_D[ α log π(ã|s) − min_k Q_k(s, ã) ],  ã ~ π(·|s)
  (E5) L_α = E_D[ −log α · (log π(ã|s) + H̄) ],  H̄ = −dim(A), the target of π's entropy
  (E6) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations are raw, as in the papers; actions lie in [-1, 1] and the actor converts
them to the environment's units.

Differences from the papers and from rlkit, the code family that made D4RL's data:
  D1 The steps are taken one after the other, Q, π, α, targets, as in OfflineRL-Kit; rlkit builds
     all losses first.
  D2 Target critics start as copies. rlkit's start as other random networks, which no longer matters
     after 1000 updates.
  D3 PyTorch's default initialisation in place of rlkit's, as in CleanRL.
  D4 (E5) multiplies log α [rlkit], not α [CleanRL, d3rlpy]: the same fixed point, another speed.

Watch: q_policy. A healthy run would keep it below the largest discounted return of the data, as
td3_bc.py does. Here it grows without bound, q_data follows, and the policy is of no use.

Run:     python algorithms/sac.py --env hopper-medium
Expect:  on hopper-medium a score near 0 while q_policy passes any possible return; on its replay
         buffer about a clone's score, and a Q far above what is earned. This is the failure that
         the other files are about. Scores and curves: results/README.md.
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
    batch_size: int = 256  # transitions per update [C rlkit]
    actor_lr: float = 3e-4  # Adam, for π and α [C rlkit]
    critic_lr: float = 3e-4  # Adam [C rlkit]
    gamma: float = 0.99  # discount γ [C rlkit]
    target_rate: float = 0.005  # share of the new weights in (E6) [C rlkit]


HIDDEN = (256, 256)  # widths of actor and critics [C rlkit]
LOG_STD_MIN = -20.0  # [C rlkit]
LOG_STD_MAX = 2.0  # [C rlkit]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Tanh-Gaussian π(a|s) on [-1, 1]^A. Its buffers hold the environment's action units."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of u, the action before tanh: (B, A) each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A): tanh of the mean."""
        mean, _ = self(obs)
        return self.action_mid + self.action_half * torch.tanh(mean)


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E1) actions (..., A), drawn with the reparameterisation trick, and their log π (...)."""
    # (E1) the second term of log_prob is log(1 − tanh²u), in a form that does not overflow
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))
    return torch.tanh(u), log_prob.sum(-1)


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
def soft_td_target(actor: Actor, critic_target: Critic, entropy_coef: Tensor, batch: Batch,
                   gamma: float) -> Tensor:
    """(E2): the regression target y, (B,)."""
    # (E2) offline the error enters here: next_action need not resemble any action in the data
    next_action, next_log_prob = sample_action(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    soft_value = next_q - entropy_coef * next_log_prob
    return batch.reward + gamma * (1 - batch.terminated) * soft_value


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E3); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E3)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor,
               obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E4); also log π (B,), which (E5) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E4)
    loss = (entropy_coef * log_prob - q.min(dim=0).values).mean()
    return loss, log_prob.detach(), q.detach().mean()


def entropy_coef_loss(log_entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E5): the loss of the entropy coefficient α; log_prob carries no gradient."""
    # (E5) α grows while the policy's entropy, E[−log π], is below its target
    return -(log_entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E6) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic,
           log_entropy_coef: Tensor, actor_optimizer, critic_optimizer,
           entropy_optimizer) -> dict[str, Tensor]:
    """One step of SAC: Q, π, α, targets."""
    batch = data.sample(args.batch_size)
    entropy_coef = log_entropy_coef.detach().exp()

    y = soft_td_target(actor, critic_target, entropy_coef, batch, args.gamma)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    alpha_loss = entropy_coef_loss(log_entropy_coef, log_prob, -data.action_dim)
    descend(alpha_loss, entropy_optimizer)

    # (E6)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy,
            "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check_range(args, "batch_size", 1)
    check_range(args, "actor_lr critic_lr", 0)
    check_range(args, "gamma target_rate", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=0.56)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "log_entropy_coef": log_entropy_coef,
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
        "entropy_optimizer": adam([log_entropy_coef], lr=args.actor_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
