"""EDAC and SAC-N: SAC with the minimum of many critics.

An, Moon, Kim & Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified
Q-Ensemble", NeurIPS 2021, arXiv 2110.01548.
Notes: Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN. (They find the critics of an ensemble
too much alike; (E4) is one answer. msg.py is another.)

SAC-N is SAC with N critics in place of two. Where critics disagree, their minimum is below their
mean. But critics that learn the same targets have similar gradients beside the data, so SAC-N needs
up to 500 critics, and their minimum may still be too high. EDAC penalises the cosines between the
gradients, and needs ten to fifty critics.

  (E1) ã = tanh(u), u = μ(s) + σ(s)·ε, ε ~ N(0, I);  log π(ã|s) as in sac.py
  (E2) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − α log π(ã′|s′) ),  ã′ ~ π(·|s′)
  (E3) g_k = ∇_a Q_k(s, a) / ‖∇_a Q_k(s, a)‖, at the data's action
  (E4) similarity = E_D[ Σ_{i≠j} ⟨g_i, g_j⟩ ] / (N − 1)
  (E5) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ] + η · similarity
  (E6) L_π = E_D[ α log π(ã|s) − min_k Q_k(s, ã) ],  ã ~ π(·|s)
  (E7) L_α = E_D[ −log α · (log π(ã|s) + H̄) ],  H̄ = −dim(A)
  (E8) Q̄ ← Q̄ + rate · (Q − Q̄)

(E4) is N where all critics have the same slope, and at least −N / (N − 1). With one action
dimension a slope is up or down, (E4) has no gradient, and EDAC is SAC-N.

Shapes: B batch, S observation, A action, K = N critics. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the
environment's units.

Differences from the official code (snu-mllab/EDAC):
  D1 The steps are taken one after the other, Q, π, α, targets, as in sac.py; the official code
     builds all losses first. Beyond (E3) to (E5), N and K this file differs from sac.py in a third
     hidden layer, in log σ ≥ −5 and in the number of updates.
  D2 (E4) is over all N critics, as in the paper and in one state of the official code; another
     state draws min(N, A) of them.
  D3 Target critics start as copies, not as other random networks; PyTorch's initialisation.
  D4 No backup over ten actions, which only pen-cloned has. N and η of random and expert data are
     medium's: CORL, the source of the others, has no files for these.

Watch: q_policy stays below the largest discounted return of the data; if it grows beyond, N or η is
too small. similarity starts near 0 and should stay far below N; near N the critics act as one.

Run:     python algorithms/edac.py --env hopper-medium
         python algorithms/edac.py --env hopper-medium --diversity-weight 0 --num-critics 500
Expect:  a slow start: the default is 3M updates, and Q and π are far from settled after 20,000.
         Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check_range, load_dataset, parse_args, record_on_cuda

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 3_000_000  # gradient updates [C]
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
    batch_size: int = 256  # transitions per update [C sac.py]
    actor_lr: float = 3e-4  # Adam, for π and α [C sac.py]
    critic_lr: float = 3e-4  # Adam [C sac.py]
    gamma: float = 0.99  # discount γ [C sac.py]
    target_rate: float = 0.005  # share of the new weights in (E8) [C sac.py]
    # EDAC
    num_critics: int = 10  # N; SAC-N's: halfcheetah 10, walker2d 20, hopper 200-500 [C CORL sac_n]
    diversity_weight: float = 1.0  # η in (E5), 0 is SAC-N [C CORL configs/edac]


# N and η that CORL has for single datasets [C CORL configs/edac] [D4]
TUNED = {
    "halfcheetah-random": {"num_critics": 10, "diversity_weight": 1.0},
    "halfcheetah-medium": {"num_critics": 10, "diversity_weight": 1.0},
    "halfcheetah-medium-replay": {"num_critics": 10, "diversity_weight": 1.0},
    "halfcheetah-medium-expert": {"num_critics": 10, "diversity_weight": 5.0},
    "halfcheetah-expert": {"num_critics": 10, "diversity_weight": 1.0},
    "hopper-random": {"num_critics": 50, "diversity_weight": 1.0},
    "hopper-medium": {"num_critics": 50, "diversity_weight": 1.0},
    "hopper-medium-replay": {"num_critics": 50, "diversity_weight": 1.0},
    "hopper-medium-expert": {"num_critics": 50, "diversity_weight": 1.0},
    "hopper-expert": {"num_critics": 50, "diversity_weight": 1.0},
    "walker2d-random": {"num_critics": 10, "diversity_weight": 1.0},
    "walker2d-medium": {"num_critics": 10, "diversity_weight": 1.0},
    "walker2d-medium-replay": {"num_critics": 10, "diversity_weight": 1.0},
    "walker2d-medium-expert": {"num_critics": 10, "diversity_weight": 5.0},
    "walker2d-expert": {"num_critics": 10, "diversity_weight": 1.0},
}

HIDDEN = (256, 256, 256)  # widths of actor and critics [C]
LOG_STD_MIN = -5.0  # [C]
LOG_STD_MAX = 2.0  # [C]


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
    # (E2) the minimum is over all N: the more the critics disagree, the lower the target
    next_action, next_log_prob = sample_action(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    soft_value = next_q - entropy_coef * next_log_prob
    return batch.reward + gamma * (1 - batch.terminated) * soft_value


def gradient_similarity(q: Tensor, action: Tensor) -> Tensor:
    """(E3), (E4), from the (K, B) values of critic k at its own copy of the action, (K, B, A)."""
    # (E3) create_graph: the slopes themselves are to be trained. q_k depends on no other copy
    slope = torch.autograd.grad(q.sum(), action, create_graph=True)[0]  # (K, B, A)
    slope = slope / (slope.norm(dim=-1, keepdim=True) + 1e-10)
    # (E4) all pairs at once: Σ_{i≠j} ⟨g_i, g_j⟩ = ‖Σ_i g_i‖² − Σ_i ‖g_i‖²
    pairs = slope.sum(dim=0).pow(2).sum(dim=-1) - slope.pow(2).sum(dim=(0, 2))  # (B,)
    return pairs.mean() / (len(q) - 1)


def critic_loss(critic: Critic, batch: Batch, y: Tensor, num_critics: int,
                diversity_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(E5); also the mean Q of the data's actions, its spread over critics, and the similarity."""
    # one copy of the action per critic, so that (E3) can tell their slopes apart
    action = batch.action.detach().requires_grad_().expand(num_critics, -1, -1)  # (K, B, A)
    q = critic(batch.obs.expand(num_critics, -1, -1), action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    q_spread = q.detach().std(dim=0, correction=0).mean()
    metrics = {"q_data": q.detach().mean(), "q_spread": q_spread}
    # (E5) a sum over critics: with their mean, η would have to be divided by N
    loss = (q - y).pow(2).mean(dim=1).sum()
    if diversity_weight:
        similarity = gradient_similarity(q, action)
        loss = loss + diversity_weight * similarity
        metrics["similarity"] = similarity.detach()
    return loss, metrics


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor,
               obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E6); also log π (B,), which (E7) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E6)
    loss = (entropy_coef * log_prob - q.min(dim=0).values).mean()
    return loss, log_prob.detach(), q.detach().mean()


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
    """One step of EDAC: Q, π, α, targets."""
    batch = data.sample(args.batch_size)
    entropy_coef = log_entropy_coef.detach().exp()

    y = soft_td_target(actor, critic_target, entropy_coef, batch, args.gamma)
    q_loss, metrics = critic_loss(critic, batch, y, args.num_critics, args.diversity_weight)
    descend(q_loss, critic_optimizer)

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    alpha_loss = entropy_coef_loss(log_entropy_coef, log_prob, -data.action_dim)
    descend(alpha_loss, entropy_optimizer)

    # (E8)
    polyak_update(critic_target, critic, args.target_rate)
    return metrics | {"critic_loss": q_loss.detach(), "q_policy": q_policy,
                      "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check_range(args, "batch_size", 1)
    check_range(args, "num_critics", 2 if args.diversity_weight else 1)  # a pair takes two
    check_range(args, "actor_lr critic_lr diversity_weight", 0)
    check_range(args, "gamma target_rate", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, variant="" if args.diversity_weight else "-sac-n", gflop=6.5)

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
        "entropy_optimizer": adam([log_entropy_coef], lr=args.actor_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(parse_args(Args, TUNED))
