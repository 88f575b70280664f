"""Conservative Q-Learning, CQL(H), with a fixed weight or with the Lagrange multiplier.

Kumar, Zhou, Tucker & Levine, "Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS 2020, arXiv 2006.04779.
Notes: Value Function Regularization › CQL. (They date it 2019 once; their practical objective prints E_{a~D}[Q] inside the
exponential, it belongs outside as in (E4); and "Q_CQL ≤ Q for all s, a" holds only without the data term: with it, as here,
E_π[Q] is a lower bound, while Q at well-covered actions may be too high. tests/test_cql.py shows both by running code.)

SAC offline fails because Q is too large at actions that the data lack. CQL adds a term to the critic's loss that pushes Q
down where its soft maximum over all actions is, and up at the data's actions. What remains is SAC.

  (E1) ã = tanh(u), u = μ(s) + σ(s)·ε,  log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E2) y = r + γ (1 − d) min_k Q̄_k(s′, ã′),  ã′ ~ π(·|s′), without the entropy term
  (E3) soft_max_k(s) = log Σ_j exp( Q_k(s, a_j) − log μ_j(a_j) ),  the a_j: N from U(−1, 1), N from π(·|s), N from π(·|s′)
  (E4) gap_k = E_D[ soft_max_k(s) − Q_k(s, a) ]
  (E5) L_Q = Σ_k ( E_D[ (Q_k(s, a) − y)² ] + w · gap_k )
  (E6) Lagrange: w is learned, L_w = −w · (mean_k gap_k − τ):  it grows while the gap is above τ
  (E7) L_π = E_D[ α log π(ã|s) − min_k Q_k(s, ã) ],  ã ~ π(·|s)
  (E8) L_α = E_D[ −log α · (log π(ã|s) + H̄) ],  H̄ = −dim(A)
  (E9) Q̄ ← Q̄ + rate · (Q − Q̄)

(E3) is importance sampling of log ∫ exp Q(s, a) da, up to log 3N: whatever density μ_j an action was drawn from, dividing by
it makes the sum count each region of actions once. Actions drawn at s′ are also evaluated at s: they are one more proposal.

Shapes: B batch, S observation, A action, K = 2 critics, N samples per proposal. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the paper and its official code (aviralkumar2907/CQL):
  D1 No cloning of the data in the first 40,000 actor steps [the official script does]; other reproductions do without.
  D2 Steps are taken one after the other, Q, π, α, targets, as in sac.py; the official code builds all losses first.
  D3 Weight w = 5 and no Lagrange multiplier by default, which the official README advises for these tasks; its script's
     default is the multiplier with τ = 5. There w and the multiplier both appear, and the latter is clipped at 10⁶; here it
     starts at w and is not clipped.
  D4 Target critics start as copies, not as other random networks; PyTorch's default initialisation.

Run:     python algorithms/cql.py --env hopper-medium
         python algorithms/cql.py --env hopper-medium --lagrange --cql-weight 1
Expect:  hopper-medium (the data score 44): 43.0 after 20,000 updates, seed 0, an hour on one core; so few because 30 actions
         per observation cost 13.5 GFLOP an update, 30 times TD3+BC. Published scores are of 1M updates; results/curves/.
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
    steps: int = 1_000_000  # gradient updates [=]; the official script has 3M
    batch_size: int = 256  # transitions per update [C cql_mujoco_new.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 1e-4  # Adam, for π and α [C cql_mujoco_new.py]; the paper has 3e-5
    critic_lr: float = 3e-4  # Adam, for Q and the multiplier [P][C cql_mujoco_new.py]
    gamma: float = 0.99  # discount γ [C cql_mujoco_new.py]
    target_rate: float = 0.005  # share of the new weights in (E9) [C cql_mujoco_new.py]
    # CQL
    cql_weight: float = 5.0  # w in (E5); with --lagrange its first value [C README] [D3]
    num_samples: int = 10  # N in (E3), so 3N actions per observation [C cql.py]
    lagrange: bool = False  # learn w, so that the gap stays at target_gap [D3]
    target_gap: float = 5.0  # τ in (E6), of use with --lagrange only [C cql_mujoco_new.py]


HIDDEN = (256, 256, 256)  # widths of actor and critics [C cql_mujoco_new.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C cql_mujoco_new.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Tanh-Gaussian π(a|s) on [-1, 1]^A. Its buffers hold the units, so a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of u, the action before tanh: (B, A) each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def to_env(self, action: Tensor) -> Tensor:
        """[-1, 1] to the environment's own action units."""
        return self.action_mid + self.action_half * action

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's actions (B, A), without noise: tanh of the mean."""
        return self.to_env(torch.tanh(self(obs)[0]))


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E1) actions (..., A) drawn with the reparameterisation trick, and their log-densities (...)."""
    # (E1)
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 − tanh²u) without overflow
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
        self.layers = nn.ModuleList(EnsembleLinear(num, i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1).expand(len(self.layers[0].weight), -1, -1)  # (K, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


@torch.no_grad()
def td_target(critic_target: Critic, next_policy: tuple[Tensor, Tensor], batch: Batch, gamma: float) -> Tensor:
    """(E2): the regression target y, (B,). `next_policy` is π(·|s′): mean and log std, (B, A) each."""
    # (E2) official "deterministic backup" means no entropy term; the action is still a sample
    next_action, _ = sample_action(*next_policy)
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


@torch.no_grad()
def propose_actions(policy: tuple[Tensor, Tensor], next_policy: tuple[Tensor, Tensor], num: int) -> tuple[Tensor, Tensor]:
    """(E3): the actions (B, 3N, A) and the log-densities (B, 3N) that they were drawn with."""
    batch_size, action_dim = policy[0].shape
    uniform = 2 * torch.rand(batch_size, num, action_dim, device=policy[0].device) - 1
    actions, log_densities = [uniform], [torch.full_like(uniform[..., 0], -action_dim * math.log(2))]  # density ½ per axis
    for mean, log_std in (policy, next_policy):
        several = (x.unsqueeze(1).expand(-1, num, -1) for x in (mean, log_std))  # (B, N, A)
        action, log_prob = sample_action(*several)
        actions.append(action)
        log_densities.append(log_prob)
    return torch.cat(actions, dim=1), torch.cat(log_densities, dim=1)


def soft_max_q(critic: Critic, obs: Tensor, actions: Tensor, log_density: Tensor) -> Tensor:
    """(E3): (B, S), (B, M, A), (B, M) -> (K, B). All actions are valued at `obs`, wherever they were proposed."""
    batch_size, num, action_dim = actions.shape
    q = critic(obs.repeat_interleave(num, dim=0), actions.reshape(-1, action_dim)).view(-1, batch_size, num)  # (K, B, M)
    assert q.shape[1:] == log_density.shape, "the sum runs over the M actions of one observation, and over nothing else"
    # (E3)
    return torch.logsumexp(q - log_density, dim=-1)


def critic_loss(critic: Critic, batch: Batch, y: Tensor, soft_max: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E5) with (E4); also the gap and the mean Q of the data's actions. `soft_max` is (K, B), with its gradient."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:] and soft_max.shape == q.shape, "broadcasting would train, on something else"
    # (E4)
    gap = (soft_max - q).mean(dim=1)  # (K,)
    # (E5)
    return ((q - y).pow(2).mean(dim=1) + weight * gap).sum(), gap.detach().mean(), q.detach().mean()


def weight_loss(log_weight: Tensor, gap: Tensor, target_gap: float) -> Tensor:
    """(E6): gradient descent on it is ascent on the constraint's multiplier w = exp(log w)."""
    # (E6)
    return -log_weight.exp() * (gap - target_gap)


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E7); also log π (B,), which (E8) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E7)
    return (entropy_coef * log_prob - q.min(dim=0).values).mean(), log_prob.detach(), q.detach().mean()


def entropy_coef_loss(log_entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E8): α grows while the policy's entropy is below its target."""
    # (E8)
    return -(log_entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E9) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic, log_entropy_coef: Tensor,
           log_weight: Tensor, actor_optimizer, critic_optimizer, entropy_optimizer, weight_optimizer) -> dict[str, Tensor]:
    """One step of CQL: Q (and w), π, α, targets."""
    batch = data.sample(args.batch_size)
    entropy_coef, weight = log_entropy_coef.detach().exp(), log_weight.detach().exp()

    with torch.no_grad():
        policy, next_policy = actor(batch.obs), actor(batch.next_obs)
    y = td_target(critic_target, next_policy, batch, args.gamma)
    soft_max = soft_max_q(critic, batch.obs, *propose_actions(policy, next_policy, args.num_samples))
    q_loss, gap, q_data = critic_loss(critic, batch, y, soft_max, weight)
    descend(q_loss, critic_optimizer)
    if args.lagrange:
        descend(weight_loss(log_weight, gap, args.target_gap), weight_optimizer)  # the critic's step used the old w

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    descend(entropy_coef_loss(log_entropy_coef, log_prob, -data.action_dim), entropy_optimizer)

    # (E9)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "gap": gap, "cql_weight": weight,
            "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check(args.cql_weight > 0 and args.num_samples > 0, "--cql-weight and --num-samples must be above 0")
    data = load_dataset(args.env, args.device)
    run = Run(args, data, variant="-lagrange" if args.lagrange else "")
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    critic_target = copy.deepcopy(critic)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    log_weight = torch.full((), math.log(args.cql_weight), device=data.device, requires_grad=True)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    entropy_optimizer = adam([log_entropy_coef], lr=args.actor_lr)
    weight_optimizer = adam([log_weight], lr=args.critic_lr)
    start = run.resume(actor=actor, critic=critic, critic_target=critic_target, log_entropy_coef=log_entropy_coef,
                       log_weight=log_weight, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
                       entropy_optimizer=entropy_optimizer, weight_optimizer=weight_optimizer)
    one_update = record_on_cuda(partial(update, args, data, actor, critic, critic_target, log_entropy_coef, log_weight,
                                        actor_optimizer, critic_optimizer, entropy_optimizer, weight_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
