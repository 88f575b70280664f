"""BEAR: Bootstrapping Error Accumulation Reduction, in the version behind D4RL's numbers.

Kumar, Fu, Tucker & Levine, "Stabilizing Off-Policy Q-Learning via Bootstrapping Error Reduction",
NeurIPS 2019, arXiv 1906.00949.
Notes: Policy Constraints (软约束) › BEAR. "Subset is enough" holds for few samples with a wide
kernel: their MMD is smallest for a narrow policy at the data's mean. If the data have two modes, no
data are there. With many samples MMD is near zero for equal distributions only.

A target may only ask Q about actions that the data could hold. BEAR compares a few actions of the
policy with a few of a VAE of the data, by the maximum mean discrepancy (MMD), and a Lagrange
multiplier α keeps it below ε. The rest is an actor-critic whose target takes the best of N actions.

          what stands for the data's policy    where it acts
  BCQ     VAE, trained alongside Q             proposes all actions, of target and policy
  BEAR    VAE, trained alongside Q             MMD from its samples, in the policy's loss
  PLAS    VAE, trained first, then fixed       decodes the policy's latent into the action
  BRAC    Gaussian clone, trained first        KL from it, in the policy's loss (-v: target too)

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = m(s, a) + v(s, a)·η,  all η ~ N(0, I),
       KL = 1/L Σ_l [ ½(m_l² + v_l² − 1) − log v_l ]
  (E2) y = r + γ (1 − d) max_n [ λ min_k Q̄_k(s′, ã_n) + (1 − λ) max_k Q̄_k(s′, ã_n) ],
       N actions ã_n = tanh(u_n) of π(·|s′)
  (E3) MMD(s)² = mean_ij κ(u_i, u_j) + mean_ij κ(û_i, û_j) − 2 mean_ij κ(u_i, û_j) + 10⁻⁶,
       u_i = μ(s) + σ(s)·η_i,  û_j = g(s, z_j), z_j = clip(η_j, −½, ½): both before tanh,
       κ(x, y) = exp(−‖x − y‖₂² / 2h), Gaussian, or exp(−‖x − y‖₁ / 2h), Laplacian
  (E4) L_π = E_D[ −min_k Q_k(s, ã_1) + α (MMD(s) − ε) ],  without Q in the first steps
  (E5) L_α = −α (E_D[MMD(s)] − ε),  then log α is clipped to [−5, 10]
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) Q̄ ← Q̄ + rate · (Q − Q̄)
  (E8) acting: the ã_n with the largest Q_1(s, ã_n), of 100

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics, N actions per observation.
d is terminated: a truncated episode bootstraps. g is the VAE's decoder, m and v are its encoder's
mean and standard deviation, μ and σ the policy's. Observations are raw, actions lie in [-1, 1].

Differences from the code behind D4RL's numbers (D4RL-Evaluations, bear, on rlkit); the first
version (aviralkumar2907/BEAR) differs in most settings, and has a target policy in (E2):
  D1 (E8) uses the same 100 draws of η in every state, saved with the policy; the code draws anew.
  D2 Target critics start as copies; PyTorch's default initialisation in place of rlkit's.
  D3 (E4) is differentiated with the Q that its value came from. The code steps Q in between, so its
     gradient mixes new weights with old activations; current PyTorch refuses that.
  D4 The actor's rate is the first version's 1e-3. D4RL's 1e-4 is slower: about half the score after
     12,000 updates on hopper-medium, 4,000 of them warm-up (results/README.md).

Watch: mmd falls below --max-mmd, and multiplier settles. If mmd stays above, multiplier climbs to
its bound e¹⁰ and Q counts in (E8) only: raise --max-mmd. With 4 samples the data's own policy may
have an MMD of 0.1 from itself. kl near 0 is right for data of one policy: nothing to encode.

Run:     python algorithms/bear.py --env hopper-medium
Expect:  slow: the warm-up is long. On hopper's data the multiplier reaches its bound with the
         default ε. Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import (
    Batch,
    Dataset,
    Run,
    check_range,
    fail,
    load_dataset,
    parse_args,
    record_on_cuda,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 500_000  # gradient updates; the script has 3M [P D4RL]
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
    batch_size: int = 256  # transitions per update [C bear_hdf5_d4rl.py]
    vae_lr: float = 3e-4  # Adam [C bear.py]
    actor_lr: float = 1e-3  # Adam [C first version] [D4]
    critic_lr: float = 3e-4  # Adam [C bear_hdf5_d4rl.py]
    multiplier_lr: float = 1e-3  # Adam, for log α [C bear.py]
    gamma: float = 0.99  # discount γ [C bear_hdf5_d4rl.py]
    target_rate: float = 0.005  # share of the new weights in (E7) [C bear_hdf5_d4rl.py]
    # BEAR
    num_samples: int = 10  # N in (E2), actions per next observation [C bear.py]
    min_weight: float = 0.75  # λ in (E2): 1 is the critics' minimum, ½ their mean [C bear.py]
    num_mmd_samples: int = 4  # actions of the policy, and of the VAE, in (E3) [C bear.py]
    kernel: Literal["gaussian", "laplacian"] = "gaussian"  # κ in (E3) [C bear_hdf5_d4rl.py]
    bandwidth: float = 50.0  # h in (E3), not squared [C bear_hdf5_d4rl.py]
    max_mmd: float = 0.05  # ε in (E4), (E5) [C bear_hdf5_d4rl.py]
    warm_up_steps: int = 40_000  # first updates, in which (E4) leaves out Q [C bear.py]


# The author's advice in issue 8 of aviralkumar2907/BEAR; a comment in the code has 50 for walker2d.
TUNED = {
    "hopper-random": {"kernel": "laplacian", "bandwidth": 20.0},
    "hopper-medium": {"kernel": "laplacian", "bandwidth": 20.0},
    "hopper-medium-replay": {"kernel": "laplacian", "bandwidth": 20.0},
    "hopper-medium-expert": {"kernel": "laplacian", "bandwidth": 20.0},
    "hopper-expert": {"kernel": "laplacian", "bandwidth": 20.0},
    "walker2d-random": {"kernel": "laplacian", "bandwidth": 20.0},
    "walker2d-medium": {"kernel": "laplacian", "bandwidth": 20.0},
    "walker2d-medium-replay": {"kernel": "laplacian", "bandwidth": 20.0},
    "walker2d-medium-expert": {"kernel": "laplacian", "bandwidth": 20.0},
    "walker2d-expert": {"kernel": "laplacian", "bandwidth": 20.0},
    "halfcheetah-random": {"kernel": "gaussian", "bandwidth": 20.0},
    "halfcheetah-medium": {"kernel": "gaussian", "bandwidth": 20.0},
    "halfcheetah-medium-replay": {"kernel": "gaussian", "bandwidth": 20.0},
    "halfcheetah-medium-expert": {"kernel": "gaussian", "bandwidth": 20.0},
    "halfcheetah-expert": {"kernel": "gaussian", "bandwidth": 20.0},
}
HIDDEN = (256, 256)  # widths of policy and critics [C bear_hdf5_d4rl.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C policies.py]
VAE_HIDDEN = (750, 750)  # [C policies.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C policies.py]
LATENT_CLIP = 0.5  # in (E3) [C policies.py]
LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX = -5.0, 10.0  # in (E5) [C bear.py]
ACT_SAMPLES = 100  # N in (E8) [C bear_hdf5_d4rl.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """The data's actions given an observation; the latent z has a standard normal prior."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.latent_dim = 2 * action_dim
        self.encoder = mlp(obs_dim + action_dim, *VAE_HIDDEN, 2 * self.latent_dim)
        self.decoder = mlp(obs_dim + self.latent_dim, *VAE_HIDDEN, action_dim)

    def encode(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S), (B, A) -> mean and log standard deviation of z: (B, L) each."""
        mean, log_std = self.encoder(torch.cat([obs, action], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(VAE_LOG_STD_MIN, VAE_LOG_STD_MAX)

    def decode(self, obs: Tensor, z: Tensor) -> Tensor:
        """(..., S), (..., L) -> the action before tanh, (..., A)."""
        return self.decoder(torch.cat([obs, z], dim=-1))


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


class Actor(nn.Module):
    """π(a|s), a Gaussian before tanh, and the Q_1 that chooses among its actions."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.critic = Critic(obs_dim, action_dim)
        self.register_buffer("noise", torch.randn(1, ACT_SAMPLES, action_dim))  # [D1]
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """(B, S), η (B, N, A), or (1, N, A) for all -> N actions before tanh: (B, N, A)."""
        mean, log_std = self.net(obs).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, A) each
        return mean + log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * noise

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        actions = torch.tanh(self(obs, self.noise))  # (B, N, A)
        # (E8) each observation keeps the best of its own N actions
        best = value_actions(self.critic, obs, actions)[0].argmax(dim=1)  # (B,)
        action = actions[torch.arange(obs.shape[0], device=obs.device), best]
        return self.action_mid + self.action_half * action


def value_actions(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of N actions for each observation: (B, S), (B, N, A) -> (K, B, N)."""
    batch_size, num, action_dim = actions.shape
    # repeat_interleave, not repeat: row b·N + n of both inputs must belong to observation b
    obs = obs.repeat_interleave(num, dim=0)
    return critic(obs, actions.reshape(-1, action_dim)).view(-1, batch_size, num)


def mix_critics(q: Tensor, min_weight: float) -> Tensor:
    """(E2): (K, ...) -> (...), mostly the smallest critic: a penalty for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)  # not clipped, unlike in (E3)
    # (E1) means, not sums: summed over latents the KL would weigh L times as much
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


@torch.no_grad()
def td_target(actor: Actor, critic_target: Critic, batch: Batch, args: Args) -> Tensor:
    """(E2): the regression target y, (B,). The policy has no target copy."""
    batch_size, action_dim = batch.action.shape
    noise = torch.randn(batch_size, args.num_samples, action_dim, device=batch.obs.device)
    next_actions = torch.tanh(actor(batch.next_obs, noise))
    q = value_actions(critic_target, batch.next_obs, next_actions)  # (K, B, N)
    # (E2) first over critics, then over actions: otherwise the minimum of one action would be
    # mixed with the maximum of another
    next_q = mix_critics(q, args.min_weight).amax(dim=1)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_q


def mean_kernel(u: Tensor, v: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """κ of all pairs, averaged: (B, N, A), (B, M, A) -> (B,). Within one set i = j counts too."""
    difference = u.unsqueeze(2) - v.unsqueeze(1)  # (B, N, M, A)
    if kernel == "gaussian":
        distance = difference.pow(2).sum(dim=-1)
    else:
        distance = difference.abs().sum(dim=-1)
    return torch.exp(-distance / (2 * bandwidth)).mean(dim=(1, 2))


def mmd(u: Tensor, v: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """(E3): the distance of two sets of actions before tanh, (B, N, A), (B, M, A) -> (B,)."""
    within_u = mean_kernel(u, u, kernel, bandwidth)
    within_v = mean_kernel(v, v, kernel, bandwidth)
    between = mean_kernel(u, v, kernel, bandwidth)
    # (E3) without 10⁻⁶ the gradient of two equal sets would be infinite
    return (within_u + within_v - 2 * between + 1e-6).sqrt()


def actor_loss(actor: Actor, vae: VAE, multiplier: Tensor, obs: Tensor, args: Args,
               warm_up: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(E4); also the mean MMD, which (E5) needs, and the mean Q of the policy's actions.

    In the warm-up Q does not enter, and its mean is given as 0.
    """
    num = args.num_mmd_samples
    z = torch.randn(len(obs), num, vae.latent_dim, device=obs.device)
    with torch.no_grad():
        repeated = obs.unsqueeze(1).expand(-1, num, -1)  # (B, N, S)
        behavior = vae.decode(repeated, z.clamp(-LATENT_CLIP, LATENT_CLIP))  # (B, N, A)
    u = actor(obs, torch.randn_like(behavior))  # (B, N, A)
    distance = mmd(u, behavior, args.kernel, args.bandwidth).mean()
    if warm_up:
        q = torch.zeros_like(distance)
    else:
        q = actor.critic(obs, torch.tanh(u[:, 0])).amin(dim=0).mean()
    # (E4) Q sees the first of the N actions, the MMD all of them
    return -q + multiplier * (distance - args.max_mmd), distance.detach(), q.detach()


def multiplier_loss(log_multiplier: Tensor, distance: Tensor, max_mmd: float) -> Tensor:
    """(E5): gradient descent on it is ascent on the constraint's multiplier α = exp(log α)."""
    # (E5) α grows while the MMD is above ε
    return -log_multiplier.exp() * (distance - max_mmd)


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


def update(args: Args, data: Dataset, vae: VAE, actor: Actor, critic_target: Critic,
           log_multiplier: Tensor, vae_optimizer, actor_optimizer, critic_optimizer,
           multiplier_optimizer, warm_up: bool) -> dict[str, Tensor]:
    """One step of BEAR: VAE, π, α, Q, targets. In the warm-up π learns without Q."""
    batch = data.sample(args.batch_size)
    multiplier = log_multiplier.detach().exp()

    behavior_loss, cloning, kl = vae_loss(vae, batch)
    descend(behavior_loss, vae_optimizer)

    # y from the old policy, π's step on the old Q: the code computes all losses before any step
    y = td_target(actor, critic_target, batch, args)
    pi_loss, distance, q_policy = actor_loss(actor, vae, multiplier, batch.obs, args, warm_up)
    descend(pi_loss, actor_optimizer)

    descend(multiplier_loss(log_multiplier, distance, args.max_mmd), multiplier_optimizer)
    log_multiplier.detach().clamp_(LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX)

    q_loss, q_data = critic_loss(actor.critic, batch, y)
    descend(q_loss, critic_optimizer)

    # (E7)
    polyak_update(critic_target, actor.critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy,
            "mmd": distance, "multiplier": multiplier, "cloning_error": cloning, "kl": kl}


def train(args: Args) -> None:
    check_range(args, "batch_size num_samples num_mmd_samples", 1)
    check_range(args, "vae_lr actor_lr critic_lr multiplier_lr max_mmd warm_up_steps", 0)
    check_range(args, "gamma target_rate min_weight", 0, 1)
    if not args.bandwidth > 0:
        fail(f"--bandwidth must be above 0, not {args.bandwidth}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=4.16)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    vae = VAE(data.obs_dim, data.action_dim).to(data.device)
    log_multiplier = torch.zeros((), device=data.device, requires_grad=True)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "vae": vae,
        "actor": actor,
        "critic_target": copy.deepcopy(actor.critic),
        "log_multiplier": log_multiplier,
        "vae_optimizer": adam(vae.parameters(), lr=args.vae_lr),
        "actor_optimizer": adam(actor.net.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(actor.critic.parameters(), lr=args.critic_lr),
        "multiplier_optimizer": adam([log_multiplier], lr=args.multiplier_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update(warm_up=step <= args.warm_up_steps))
    run.finish()


if __name__ == "__main__":
    train(parse_args(Args, TUNED))
