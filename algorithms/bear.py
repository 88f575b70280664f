"""Bootstrapping Error Accumulation Reduction, BEAR, in the version behind D4RL's numbers.

Kumar, Fu, Tucker & Levine, "Stabilizing Off-Policy Q-Learning via Bootstrapping Error Reduction", arXiv 1906.00949.
Notes: Policy Constraints (软约束) › BEAR. ("Subset is enough" is true of MMD with a few samples, as in (E3); with
infinitely many it is zero for equal distributions only. tests/test_bear.py shows both by running code.)

A target may only ask Q about actions that the data could hold, but their density there should not matter: a good action
may be rare. So BEAR compares a few actions of the policy with a few of a VAE of the data, by the maximum mean discrepancy, MMD,
and a Lagrange multiplier α keeps it below ε. What remains is an actor-critic whose target takes the best of a few actions.

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = m(s, a) + v(s, a)·η,  all η ~ N(0, I)
       KL = 1/L Σ_l [ ½(m_l² + v_l² − 1) − log v_l ]
  (E2) y = r + γ (1 − d) max_n [ λ min_k Q̄_k(s′, ã_n) + (1 − λ) max_k Q̄_k(s′, ã_n) ],  N actions ã_n = tanh(u_n) of π(·|s′)
  (E3) MMD(s)² = mean_ij k(u_i, u_j) + mean_ij k(û_i, û_j) − 2 mean_ij k(u_i, û_j) + 10⁻⁶,
       u_i = μ(s) + σ(s)·η_i of the policy,  û_j = g(s, z_j), z_j = clip(η_j, −½, ½), of the VAE: both before tanh,
       k(u, v) = exp(−‖u − v‖₂² / 2h), Gaussian, or exp(−‖u − v‖₁ / 2h), Laplacian
  (E4) L_π = E_D[ −min_k Q_k(s, ã_1) + α (MMD(s) − ε) ],  in the first steps without Q
  (E5) L_α = −α (E_D[MMD(s)] − ε),  then log α is clipped to [−5, 10]: α grows while the MMD is above ε
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) Q̄ ← Q̄ + rate · (Q − Q̄)
  (E8) acting: the ã_n with the largest Q_1(s, ã_n), of 100

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics, N actions per observation. d is terminated: a truncated
episode bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the code behind D4RL's numbers (D4RL-Evaluations, bear, on rlkit), which we follow:
  D1 (E8) uses the same 100 draws of η in every state, saved with the policy; the code draws anew at each step.
     So a saved policy is a function, its score can be repeated, and evaluations leave training's random numbers alone.
  D2 Target critics start as copies; PyTorch's default initialisation in place of rlkit's.
The first version (aviralkumar2907/BEAR) has a target policy in (E2); in (E4) Q averaged over all of the MMD's actions, which
are 5, from noise clipped to ±½; h = 10 (Laplacian) or 20 (Gaussian); no bounds of log σ; widths 400 and 300; batches of 100;
10⁻³ for every learning rate; log α from a random start, or, by its script's default, α = 100, fixed.

Run:     python algorithms/bear.py --env hopper-medium
Expect:  hopper-medium 13.7 (the data 44, BC 47 and 54), after 20,000 updates, 4,000 of them without Q: a 25th of the
         default, and a tenth of its warm-up; seed 0. Far below BC because π is not yet where the VAE is. The decoder alone,
         with z = 0, is worth 57 in 20 episodes; the mean of π is still 0.12 away from it before tanh (σ is 0.08), the MMD is
         0.11, above ε, and so α has been at its upper bound e¹⁰ since about update 6,000: there Q matters in (E8) only.
         On hopper-medium-replay 14.3 (the data 15, BC 18).
         pendulum-medium-replay (the data −1148): −187 after 8,000 updates, with a small VAE (tests/test_learning.py).
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import LEVELS, Batch, Dataset, Run, check, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 500_000  # gradient updates [P D4RL]; the script has 3M
    batch_size: int = 256  # transitions per update [C bear_hdf5_d4rl.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    vae_lr: float = 3e-4  # Adam [C bear.py]
    actor_lr: float = 1e-4  # Adam [C bear_hdf5_d4rl.py]
    critic_lr: float = 3e-4  # Adam [C bear_hdf5_d4rl.py]
    multiplier_lr: float = 1e-3  # Adam, for log α [C bear.py]
    gamma: float = 0.99  # discount γ [C bear_hdf5_d4rl.py]
    target_rate: float = 0.005  # share of the new weights in (E7) [C bear_hdf5_d4rl.py]
    # BEAR
    num_samples: int = 10  # N in (E2), actions per next observation [C bear.py]
    min_weight: float = 0.75  # λ in (E2): 1 is the minimum of the critics, ½ their mean [C bear.py]
    num_mmd_samples: int = 4  # actions of the policy, and of the VAE, in (E3) [C bear.py]
    kernel: Literal["gaussian", "laplacian"] = "gaussian"  # k in (E3); TUNED has others [C bear_hdf5_d4rl.py]
    bandwidth: float = 50.0  # h in (E3), not squared; TUNED has others [C bear_hdf5_d4rl.py]
    max_mmd: float = 0.05  # ε in (E4), (E5) [C bear_hdf5_d4rl.py]
    warm_up_steps: int = 40_000  # first updates, with (E4) without Q [C bear.py]


TUNED = {f"{body}-{level}": dict(kernel=kernel, bandwidth=20.0) for level in LEVELS for body, kernel in (  # [C, D4RL's runs]
    ("hopper", "laplacian"), ("walker2d", "laplacian"), ("halfcheetah", "gaussian"))}
HIDDEN = (256, 256)  # widths of policy and critics [C bear_hdf5_d4rl.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C policies.py]
VAE_HIDDEN = (750, 750)  # [C policies.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C policies.py]
LATENT_CLIP = 0.5  # in (E3) [C policies.py]
LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX = -5.0, 10.0  # in (E5) [C bear.py]
ACT_SAMPLES = 100  # N in (E8) [C bear_hdf5_d4rl.py]


def parse_args() -> Args:
    """The command line; what it leaves open is TUNED's for this dataset, said aloud, or else the default of Args."""
    tuned = TUNED.get(tyro.cli(Args).env, {})
    args = tyro.cli(Args, default=Args(**tuned))  # a tuned value is but another default: what the user sets stands
    for name, value in tuned.items():
        if getattr(args, name) == value:
            print(f"tuned for {args.env}: --{name.replace('_', '-')} {value}")
    return args


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """The data's actions given an observation, by way of a latent z with a standard normal prior."""

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
        self.layers = nn.ModuleList(EnsembleLinear(num, i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1).expand(len(self.layers[0].weight), -1, -1)  # (K, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


class Actor(nn.Module):
    """π(a|s), a Gaussian before tanh, and the Q_1 that chooses among its actions. Its buffers hold the units and the noise."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.critic = Critic(obs_dim, action_dim)
        self.register_buffer("noise", torch.randn(1, ACT_SAMPLES, action_dim))  # [D1]
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """(B, S), η (B, N, A) or, for all observations, (1, N, A) -> N actions before tanh: (B, N, A)."""
        mean, log_std = self.net(obs).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, A) each
        return mean + log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * noise

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        actions = torch.tanh(self(obs, self.noise))
        # (E8)
        best = value_actions(self.critic, obs, actions)[0].argmax(dim=1)  # (B,)
        return self.action_mid + self.action_half * actions[torch.arange(len(obs), device=obs.device), best]


def value_actions(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of N actions for each observation: (B, S), (B, N, A) -> (K, B, N)."""
    batch_size, num, action_dim = actions.shape
    # repeat_interleave, not repeat: row b·N + n of both inputs must belong to observation b
    return critic(obs.repeat_interleave(num, dim=0), actions.reshape(-1, action_dim)).view(-1, batch_size, num)


def mix_critics(q: Tensor, min_weight: float) -> Tensor:
    """(E2): (K, ...) -> (...), mostly the smallest of the critics, and so a fine for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence. Here z is not clipped: that is for sampling."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)
    # (E1) a sum over latents would weigh L times as much, and the decoder ignore z even where the data vary widely
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


@torch.no_grad()
def td_target(actor: Actor, critic_target: Critic, batch: Batch, args: Args) -> Tensor:
    """(E2): the regression target y, (B,), from the policy as it is now: it has no target copy."""
    noise = torch.randn(len(batch.obs), args.num_samples, batch.action.shape[1], device=batch.obs.device)
    q = value_actions(critic_target, batch.next_obs, torch.tanh(actor(batch.next_obs, noise)))  # (K, B, N)
    # (E2) first the critics, then the actions: the other order would pair one action's minimum with another's maximum
    next_q = mix_critics(q, args.min_weight).amax(dim=1)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_q


def mmd(u: Tensor, v: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """(E3): the distance of two sets of actions before tanh, for each observation: (B, N, A), (B, M, A) -> (B,)."""
    def k(u: Tensor, v: Tensor) -> Tensor:
        difference = u.unsqueeze(2) - v.unsqueeze(1)  # (B, N, M, A)
        distance = (difference.pow(2) if kernel == "gaussian" else difference.abs()).sum(dim=-1)
        return torch.exp(-distance / (2 * bandwidth)).mean(dim=(1, 2))  # over all pairs, i = j among them
    # (E3) without 10⁻⁶ the gradient of two equal sets would be infinite
    return (k(u, u) + k(v, v) - 2 * k(u, v) + 1e-6).sqrt()


def actor_loss(actor: Actor, vae: VAE, multiplier: Tensor, obs: Tensor, args: Args,
               warm_up: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(E4); also the mean MMD, which (E5) needs, and the mean Q of the policy's actions, 0 while Q has no say."""
    z = torch.randn(len(obs), args.num_mmd_samples, vae.latent_dim, device=obs.device).clamp(-LATENT_CLIP, LATENT_CLIP)
    with torch.no_grad():
        behavior = vae.decode(obs.unsqueeze(1).expand(-1, args.num_mmd_samples, -1), z)  # (B, N, A)
    u = actor(obs, torch.randn_like(behavior))  # (B, N, A)
    distance = mmd(u, behavior, args.kernel, args.bandwidth).mean()
    q = torch.zeros_like(distance) if warm_up else actor.critic(obs, torch.tanh(u[:, 0])).amin(dim=0).mean()
    # (E4)
    return -q + multiplier * (distance - args.max_mmd), distance.detach(), q.detach()


def multiplier_loss(log_multiplier: Tensor, distance: Tensor, max_mmd: float) -> Tensor:
    """(E5): gradient descent on it is ascent on the constraint's multiplier α = exp(log α)."""
    # (E5)
    return -log_multiplier.exp() * (distance - max_mmd)


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


def update(args: Args, data: Dataset, vae: VAE, actor: Actor, critic_target: Critic, log_multiplier: Tensor,
           vae_optimizer, actor_optimizer, critic_optimizer, multiplier_optimizer, warm_up: bool) -> dict[str, Tensor]:
    """One step of BEAR: VAE, π, α, Q, targets. `warm_up` says whether π is yet without Q."""
    batch = data.sample(args.batch_size)
    multiplier = log_multiplier.detach().exp()

    behavior_loss, cloning, kl = vae_loss(vae, batch)
    descend(behavior_loss, vae_optimizer)

    # y from the old policy, the policy's step on the old Q: the code computes all losses first, and then takes all steps
    y = td_target(actor, critic_target, batch, args)
    pi_loss, distance, q_policy = actor_loss(actor, vae, multiplier, batch.obs, args, warm_up)
    descend(pi_loss, actor_optimizer)

    descend(multiplier_loss(log_multiplier, distance, args.max_mmd), multiplier_optimizer)
    log_multiplier.detach().clamp_(LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX)

    q_loss, q_data = critic_loss(actor.critic, batch, y)
    descend(q_loss, critic_optimizer)

    # (E7)
    polyak_update(critic_target, actor.critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "mmd": distance, "multiplier": multiplier,
            "cloning_error": cloning, "kl": kl}


def train(args: Args) -> None:
    for name in ("num_samples", "num_mmd_samples", "bandwidth"):
        check(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    vae = VAE(data.obs_dim, data.action_dim).to(data.device)
    critic_target = copy.deepcopy(actor.critic)
    log_multiplier = torch.zeros((), device=data.device, requires_grad=True)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    vae_optimizer = adam(vae.parameters(), lr=args.vae_lr)
    actor_optimizer = adam(actor.net.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(actor.critic.parameters(), lr=args.critic_lr)
    multiplier_optimizer = adam([log_multiplier], lr=args.multiplier_lr)
    start = run.resume(actor=actor, vae=vae, critic_target=critic_target, log_multiplier=log_multiplier,
                       vae_optimizer=vae_optimizer, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
                       multiplier_optimizer=multiplier_optimizer)
    one_update = record_on_cuda(partial(update, args, data, vae, actor, critic_target, log_multiplier, vae_optimizer,
                                        actor_optimizer, critic_optimizer, multiplier_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update(step <= args.warm_up_steps)
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(parse_args())
