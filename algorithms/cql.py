"""Conservative Q-Learning (CQL) in the three forms that the notes print.

Kumar, Zhou, Tucker & Levine, "Conservative Q-Learning for Offline Reinforcement Learning",
NeurIPS 2020, arXiv 2006.04779.
Notes: Value Function Regularization › CQL. (In the practical form the mean over the data's actions
is under π̂_β; the notes print π̂_θ. That it stands inside the exponential changes no number.)

SAC fails offline because Q is too large at actions that the data lack. CQL adds a term to the
critic's loss that pushes Q down at such actions and, in two of three forms, up at the data's. What
remains is SAC, without the entropy term in its target.

  (E1) ã = tanh(u),  u ~ N(m(s), σ(s)²);  log π(ã|s) as in sac.py
  (E2) y = r + γ (1 − d) min_k Q̄_k(s′, ã′),  ã′ ~ π(·|s′), without the entropy term
  (E3) push_k(s) = log Σ_j exp( Q_k(s, a_j) − log p_j(a_j) ),  the a_j: N from U(−1, 1),
       N from π(·|s), N from π(·|s′), each drawn with its own density p_j    --form logsumexp
  (E4) push_k(s) = mean_j Q_k(s, a_j),  the a_j: N from μ = π(·|s)          --form cql-h, plain
  (E5) gap_k = E_D[ push_k(s) − c · Q_k(s, a) ],  c = 0 for plain, else 1
  (E6) L_Q = Σ_k ( E_D[ (Q_k(s, a) − y)² ] + w · gap_k )
  (E7) --lagrange: w is learned, L_w = −w · (mean_k gap_k − τ), so it grows while the gap is above τ
  (E8) L_π = E_D[ α log π(ã|s) − min_k Q_k(s, ã) ],  ã ~ π(·|s)
  (E9) L_α = E_D[ −log α · (log π(ã|s) + H̄) ],  H̄ = −dim(A)
  (E10) Q̄ ← Q̄ + rate · (Q − Q̄)

(E4) is the notes' E_μ[Q], with the current policy as μ. (E3) is the largest value that
E_μ[Q] + H(μ) has for any μ, with the entropy H: it is log ∫ exp Q(s, a) da, estimated by importance
sampling, plus the constant log 3N. With exact expectations the following are at most the true
values (tests/test_cql.py shows each):
  plain      every Q(s, a): the notes' "Q_CQL ≤ Q for all s, a".
  cql-h      V(s) = E_π[Q(s, ·)]. Q itself may be too high at actions that the data take more often
             than π does.
  logsumexp  V(s) of policies near softmax(Q). For a policy that keeps to the data's most frequent
             actions V may be too high. This form is the one used in practice.
The notes and the paper have ½ before the Bellman error; (E6) has not, as in the official code. So
w is twice their α: w = 5 is α = 2.5.

Shapes: B batch, S observation, A action, K = 2 critics, M actions per observation (3N or N). d is
terminated: a truncated episode bootstraps. Observations are raw; actions lie in [-1, 1].

Differences from the paper and its official code (aviralkumar2907/CQL):
  D1 No cloning of the data in the first 40,000 actor steps; other reproductions have none either.
  D2 Order: Q, w, π, α, targets; π's loss has the α from before this step, as in sac.py. Officially
     α, w, Q, π: π's loss has the new α, and Q from before its step.
  D3 w = 5 and no multiplier by default, as the official README advises; its script has one, τ = 5,
     beside a fixed w and clipped at 10⁶. Here the multiplier is w itself, starts at --cql-weight.
  D4 Target critics start as copies, not as other random networks; PyTorch's initialisation.
  D5 Forms cql-h and plain are the paper's equations; the official code has neither.

Watch: q_policy stays below the largest discounted return of the data. If it grows without bound,
raise w. If q_data sinks far below all returns, lower w; plain lowers Q by w / 2 in every backup by
its nature.

Run:     python algorithms/cql.py --env hopper-medium --form logsumexp
Expect:  above a clone on hopper-medium-replay after 30,000 updates, and rising; on hopper-medium
         far above it and far below it in turn near 10,000. Published scores are of 1M. Slow, as an
         update values 30 actions per observation. Scores and curves: results/README.md.
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
    steps: int = 1_000_000  # gradient updates; the official script has 3M [=]
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
    batch_size: int = 256  # transitions per update [C cql_mujoco_new.py]
    actor_lr: float = 1e-4  # Adam, for π and α; the paper has 3e-5 [C cql_mujoco_new.py]
    critic_lr: float = 3e-4  # Adam, for Q and the multiplier [P][C cql_mujoco_new.py]
    gamma: float = 0.99  # discount γ [C cql_mujoco_new.py]
    target_rate: float = 0.005  # share of the new weights in (E10) [C cql_mujoco_new.py]
    # CQL
    form: Literal["logsumexp", "cql-h", "plain"] = "logsumexp"  # (E3), or (E4) with c = 1, 0 [D5]
    cql_weight: float = 5.0  # w in (E6); with --lagrange its first value [C README] [D3]
    num_samples: int = 10  # N in (E3) and (E4) [C cql.py]
    lagrange: bool = False  # learn w, so that the gap stays at target_gap [D3]
    target_gap: float = 5.0  # τ in (E7), of use with --lagrange only [C cql_mujoco_new.py]


HIDDEN = (256, 256, 256)  # widths of actor and critics [C cql_mujoco_new.py]
LOG_STD_MIN = -5.0  # [C cql_mujoco_new.py]
LOG_STD_MAX = 2.0  # [C cql_mujoco_new.py]


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
def td_target(critic_target: Critic, next_policy: tuple[Tensor, Tensor], batch: Batch,
              gamma: float) -> Tensor:
    """(E2): the regression target y, (B,). `next_policy` is π(·|s′): mean, log std, (B, A) each."""
    # (E2) official "deterministic backup" means no entropy term; the action is still a sample
    next_action, _ = sample_action(*next_policy)
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


@torch.no_grad()
def several_actions(policy: tuple[Tensor, Tensor], num: int) -> tuple[Tensor, Tensor]:
    """N actions of the policy for each observation, (B, N, A), and their log π, (B, N)."""
    mean, log_std = policy  # (B, A) each
    mean = mean.unsqueeze(1).expand(-1, num, -1)
    log_std = log_std.unsqueeze(1).expand(-1, num, -1)
    return sample_action(mean, log_std)


@torch.no_grad()
def propose_actions(policy: tuple[Tensor, Tensor], next_policy: tuple[Tensor, Tensor],
                    num: int) -> tuple[Tensor, Tensor]:
    """For (E3): actions (B, 3N, A) and the log-densities (B, 3N) that they were drawn with."""
    batch_size, action_dim = policy[0].shape
    uniform = 2 * torch.rand(batch_size, num, action_dim, device=policy[0].device) - 1
    log_uniform = torch.full_like(uniform[..., 0], -action_dim * math.log(2))  # ½ per dimension
    current, log_current = several_actions(policy, num)
    following, log_following = several_actions(next_policy, num)
    actions = torch.cat([uniform, current, following], dim=1)
    return actions, torch.cat([log_uniform, log_current, log_following], dim=1)


def value_actions(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of N actions for each observation: (B, S), (B, N, A) -> (K, B, N)."""
    batch_size, num, action_dim = actions.shape
    # repeat_interleave, not repeat: row b·N + n of both inputs must belong to observation b
    obs = obs.repeat_interleave(num, dim=0)
    return critic(obs, actions.reshape(-1, action_dim)).view(-1, batch_size, num)


def soft_max_q(critic: Critic, obs: Tensor, actions: Tensor, log_density: Tensor) -> Tensor:
    """(E3): (B, S), (B, M, A), (B, M) -> (K, B)."""
    q = value_actions(critic, obs, actions)  # (K, B, M)
    assert q.shape[1:] == log_density.shape, "the sum runs over the M actions of one observation"
    # (E3) dividing by the density makes the sum count each region of actions once, wherever its
    # actions come from; those drawn at s′ are one more proposal for s, and valued at s
    return torch.logsumexp(q - log_density, dim=-1)


def mean_q(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """(E4): (B, S), (B, M, A) -> (K, B)."""
    # (E4) the actions come from μ, so their plain mean is E_μ[Q]
    return value_actions(critic, obs, actions).mean(dim=-1)


def critic_loss(critic: Critic, batch: Batch, y: Tensor, push: Tensor, weight: Tensor,
                data_weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(E6) with (E5); also the gap and the mean Q of the data's actions. `data_weight` is c."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    assert push.shape == q.shape, "one value per critic and observation"
    # (E5) minimising it pushes Q down where push looks, and up at the data's actions
    gap = (push - data_weight * q).mean(dim=1)  # (K,)
    # (E6)
    loss = ((q - y).pow(2).mean(dim=1) + weight * gap).sum()
    return loss, gap.detach().mean(), q.detach().mean()


def weight_loss(log_weight: Tensor, gap: Tensor, target_gap: float) -> Tensor:
    """(E7), with w = exp(log w)."""
    # (E7) w is a constraint's multiplier: descent on this loss is ascent on the constraint
    return -log_weight.exp() * (gap - target_gap)


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor,
               obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E8); also log π (B,), which (E9) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E8)
    loss = (entropy_coef * log_prob - q.min(dim=0).values).mean()
    return loss, log_prob.detach(), q.detach().mean()


def entropy_coef_loss(log_entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E9): the loss of the entropy coefficient α; log_prob carries no gradient."""
    # (E9) α grows while the policy's entropy, E[−log π], is below its target
    return -(log_entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E10) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic,
           log_entropy_coef: Tensor, log_weight: Tensor, actor_optimizer, critic_optimizer,
           entropy_optimizer, weight_optimizer) -> dict[str, Tensor]:
    """One step of CQL: Q (and w), π, α, targets."""
    batch = data.sample(args.batch_size)
    entropy_coef = log_entropy_coef.detach().exp()
    weight = log_weight.detach().exp()

    with torch.no_grad():
        policy = actor(batch.obs)
        next_policy = actor(batch.next_obs)
    y = td_target(critic_target, next_policy, batch, args.gamma)
    if args.form == "logsumexp":
        actions, log_density = propose_actions(policy, next_policy, args.num_samples)
        push = soft_max_q(critic, batch.obs, actions, log_density)
    else:
        actions, _ = several_actions(policy, args.num_samples)
        push = mean_q(critic, batch.obs, actions)
    data_weight = 0.0 if args.form == "plain" else 1.0
    q_loss, gap, q_data = critic_loss(critic, batch, y, push, weight, data_weight)
    descend(q_loss, critic_optimizer)
    if args.lagrange:  # the critic's step above had the old w
        descend(weight_loss(log_weight, gap, args.target_gap), weight_optimizer)

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    alpha_loss = entropy_coef_loss(log_entropy_coef, log_prob, -data.action_dim)
    descend(alpha_loss, entropy_optimizer)

    # (E10)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "gap": gap,
            "cql_weight": weight, "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check_range(args, "batch_size num_samples", 1)
    check_range(args, "actor_lr critic_lr", 0)
    check_range(args, "gamma target_rate", 0, 1)
    check_range(args, "target_gap", -math.inf)
    if not 0 < args.cql_weight < math.inf:
        fail(f"--cql-weight must be above 0, not {args.cql_weight}; sac.py has no such term")
    if args.lagrange and args.form == "plain":
        fail("--lagrange needs the data's Q in the gap, which --form plain leaves out")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    variant = {"logsumexp": "", "cql-h": "-h", "plain": "-plain"}[args.form]
    variant += "-lagrange" if args.lagrange else ""
    run = Run(args, data, variant, gflop=13.5)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    log_weight = torch.tensor(math.log(args.cql_weight), device=data.device, requires_grad=True)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "log_entropy_coef": log_entropy_coef,
        "log_weight": log_weight,
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
        "entropy_optimizer": adam([log_entropy_coef], lr=args.actor_lr),
        "weight_optimizer": adam([log_weight], lr=args.critic_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
