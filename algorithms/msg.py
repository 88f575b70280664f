"""MSG: critics with targets of their own, and a policy that follows their lower confidence bound.

Ghasemipour, Gu & Nachum, "Why So Pessimistic? Estimating Uncertainties for Offline RL through
Ensembles, and Why Their Independence Matters", NeurIPS 2022, arXiv 2205.13703. MSG stands for model
standard-deviation gradients.
Notes: Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN: "train each Q independently".

SAC-N (edac.py) gives all critics one target, the minimum over the ensemble: each update replaces
the members' different values of s′ by one number, and their disagreement about it is lost. The
paper shows that such shared targets can even make Q too optimistic. In MSG each member has a target
network of its own. Disagreement at s′ is then carried back to s, and the spread over members covers
all that is unknown on the way. Pessimism enters in the policy's loss alone.

  (E1) ã = tanh(u), u = μ(s) + σ(s)·ε, ε ~ N(0, I);  log π(ã|s) as in sac.py
  (E2) y_k = r + γ (1 − d) Q̄_k(s′, ã′_k),  ã′_k ~ π(·|s′) drawn for each k, without entropy term
  (E3) gap_k = E_D[ Q_k(s, ã_k) − Q_k(s, a) ],  ã_k ~ π(·|s) drawn for each k
  (E4) L_Q = Σ_k ( ½ E_D[ (Q_k(s, a) − y_k)² ] + w · gap_k )
  (E5) LCB(s, ã) = mean_k Q_k(s, ã) + β std_k Q_k(s, ã),  β < 0
  (E6) L_π = E_D[ α log π(ã|s) − LCB(s, ã) ],  ã ~ π(·|s)
  (E7) L_α = E_D[ −log α · (log π(ã|s) + H̄) ],  H̄ = 0, the target of π's entropy
  (E8) Q̄ ← Q̄ + rate · (Q − Q̄)

(E3) is the term of cql.py's form cql-h, with a small weight. For comparison, the minimum of N equal
Gaussians is at mean − 0.56 std for N = 2 and at mean − 1.54 std for N = 10.

Shapes: B batch, S observation, A action, K = N members. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the
environment's units.

Differences from the official code (google-research/google-research, jrl/agents/msg):
  D1 N = 10, so that a CPU suffices, as in edac.py for halfcheetah and walker2d; the official
     commands have 64.
  D2 β = −8, w = 0.1 and 2.2M updates are the official command's for antmaze. We could not verify
     the values of hopper, walker2d and halfcheetah; the code gives none, and we have not tuned.
  D3 No cloning of the data in the actor's first 50,000 steps.
  D4 No random weights, U(0, 2), on the squared errors; the code says that they do not matter.
  D5 One network per member. For these bodies the official members are pairs with a minimum, which
     its README calls not noticeably different.
  D6 The steps are taken one after the other, Q, π, α, targets, as in sac.py; the official π has its
     gradient from Q before its step.
  D7 (E7) multiplies log α, as in sac.py; the official code multiplies α: the same fixed point.
  D8 Networks as in edac.py: PyTorch's initialisation in place of Glorot's, and −5 ≤ log σ ≤ 2.

Watch: q_spread_policy, the members' std at the policy's actions, against q_spread at the data's.
A healthy policy keeps both alike. If the former grows without bound, the policy has left the data:
make β more negative or w larger.

Run:     python algorithms/msg.py --env hopper-medium
Expect:  a slow start, as with edac.py. Scores and curves: results/README.md.
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
    steps: int = 2_200_000  # gradient updates [C README, antmaze] [D2]
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
    batch_size: int = 256  # transitions per update [C README]
    actor_lr: float = 3e-5  # Adam [C README]
    entropy_lr: float = 3e-4  # Adam, for log α [C learning.py]
    critic_lr: float = 3e-4  # Adam [C README]
    gamma: float = 0.99  # discount γ [C learning.py]
    target_rate: float = 0.005  # share of the new weights in (E8) [C learning.py]
    # MSG
    num_critics: int = 10  # N [D1]
    beta: float = -8.0  # β in (E5): more negative is more pessimistic [C README] [D2]
    cql_weight: float = 0.1  # w in (E4), 0 leaves the ensemble alone [C README] [D2]
    target_entropy: float = 0.0  # H̄ in (E7) [C config.py]


HIDDEN = (256, 256, 256)  # widths of actor and critics [C README]
LOG_STD_MIN = -5.0  # as in edac.py [D8]
LOG_STD_MAX = 2.0  # as in edac.py [D8]


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
def actions_per_member(actor: Actor, obs: Tensor, num: int) -> Tensor:
    """(B, S) -> (K, B, A): for each of K members actions of the policy, drawn for it alone."""
    mean, log_std = actor(obs)
    action, _ = sample_action(mean.expand(num, -1, -1), log_std.expand(num, -1, -1))
    return action


@torch.no_grad()
def independent_targets(critic_target: Critic, batch: Batch, next_action: Tensor,
                        gamma: float) -> Tensor:
    """(E2): a regression target for each member, (K, B). `next_action` is (K, B, A)."""
    next_obs = batch.next_obs.expand(len(next_action), -1, -1)
    # (E2) no minimum and no mean over members: row k of y knows target network k alone
    next_q = critic_target(next_obs, next_action)  # (K, B)
    return batch.reward + gamma * (1 - batch.terminated) * next_q


def critic_loss(critic: Critic, batch: Batch, y: Tensor, policy_action: Tensor,
                cql_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(E3), (E4); also gap, mean and spread of Q at the data. `policy_action` is (K, B, A)."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape, "each member has a target of its own"
    q_policy = critic(batch.obs.expand(len(policy_action), -1, -1), policy_action)  # (K, B)
    # (E3)
    gap = (q_policy - q).mean(dim=1)  # (K,)
    # (E4)
    loss = (0.5 * (q - y).pow(2).mean(dim=1) + cql_weight * gap).sum()
    q = q.detach()
    return loss, {"q_data": q.mean(), "q_spread": q.std(dim=0, correction=0).mean(),
                  "gap": gap.detach().mean()}


def lower_bound(q: Tensor, beta: float) -> Tensor:
    """(E5): (K, B) -> (B,)."""
    # (E5) the gradient of the standard deviation leads the policy to where the members agree
    return q.mean(dim=0) + beta * q.std(dim=0, correction=0)


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor, obs: Tensor,
               beta: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(E6); also log π (B,), which (E7) needs, and mean and spread of Q at the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E6)
    loss = (entropy_coef * log_prob - lower_bound(q, beta)).mean()
    q = q.detach()
    q_spread = q.std(dim=0, correction=0).mean()
    return loss, log_prob.detach(), {"q_policy": q.mean(), "q_spread_policy": q_spread}


def entropy_coef_loss(log_entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E7): the loss of the entropy coefficient α; log_prob carries no gradient."""
    # (E7) α grows while the policy's entropy, E[−log π], is below its target
    return -(log_entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E8) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic,
           log_entropy_coef: Tensor, actor_optimizer, critic_optimizer,
           entropy_optimizer) -> dict[str, Tensor]:
    """One step of MSG: Q, π, α, targets."""
    batch = data.sample(args.batch_size)
    entropy_coef = log_entropy_coef.detach().exp()

    next_action = actions_per_member(actor, batch.next_obs, args.num_critics)
    y = independent_targets(critic_target, batch, next_action, args.gamma)
    policy_action = actions_per_member(actor, batch.obs, args.num_critics)
    q_loss, at_data = critic_loss(critic, batch, y, policy_action, args.cql_weight)
    descend(q_loss, critic_optimizer)

    pi_loss, log_prob, at_policy = actor_loss(actor, critic, entropy_coef, batch.obs, args.beta)
    descend(pi_loss, actor_optimizer)

    alpha_loss = entropy_coef_loss(log_entropy_coef, log_prob, args.target_entropy)
    descend(alpha_loss, entropy_optimizer)

    # (E8)
    polyak_update(critic_target, critic, args.target_rate)
    return at_data | at_policy | {"critic_loss": q_loss.detach(), "entropy": -log_prob.mean(),
                                  "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check_range(args, "batch_size num_critics", 1)
    check_range(args, "actor_lr entropy_lr critic_lr cql_weight", 0)
    check_range(args, "gamma target_rate", 0, 1)
    check_range(args, "beta", -math.inf, 0)
    check_range(args, "target_entropy", -math.inf)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=6.5)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim, args.num_critics).to(data.device)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "log_entropy_coef": log_entropy_coef,
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
        "entropy_optimizer": adam([log_entropy_coef], lr=args.entropy_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
