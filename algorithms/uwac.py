"""UWAC, Uncertainty Weighted Actor-Critic: BEAR that trusts Q less where dropout varies it more.

Wu, Zhai, Srivastava, Susskind, Zhang, Salakhutdinov & Goh, "Uncertainty Weighted Actor-Critic for
Offline Reinforcement Learning", ICML 2021, arXiv 2105.08140.
Notes: Uncertainty-Based › UWAC. The notes weight squared residuals by β/Var. The released code
weights by exp(−β Var) unless told otherwise, and multiplies residuals before squaring them: with
either weight, w² in (E8) and w in (E6). So --weighting inverse is not the notes' loss. The notes'
σ², the noise in the data, would be added to V in (E3). The code leaves it out: nothing there
estimates it, and as a constant it would multiply all weights by e^{−βσ²} alike, and tell no action
from another.

Drop a tenth of Q's hidden units at random and ask Q, a few times: the variance of the answers
stands for Q's uncertainty. A target from there should count less, and the policy should follow such
a Q less. Both losses get a weight that falls with this variance. The rest is BEAR: read bear.py
first.

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = m(s, a) + v(s, a)·η,  all η ~ N(0, I),
       KL = 1/L Σ_l [ ½(m_l² + v_l² − 1) − log v_l ]
  (E2) Q_k^t(s, a): Q_k with weights W / ‖W‖₂; a hidden unit is 0 with probability p, else divided
       by 1 − p
  (E3) M_k = 1/T Σ_t Q_k^t,  V = Σ_k 1/(T − 1) Σ_t (Q_k^t − M_k)²,  T passes for each s and a
  (E4) w(V) = exp(−β V), released, or min(1, β / V), the paper's;  no gradient
  (E5) y = r + γ (1 − d) max_n [ λ min_k M̄_k(s′, ã_n) + (1 − λ) max_k M̄_k(s′, ã_n) ],  N actions
       ã_n = tanh(u_n) of π(·|s′);  w = w(max_n V̄(s′, ã_n)), a maximum of its own over n
  (E6) L_π = E_D[ −w(V(s, ã_1)) min_k M_k(s, ã_1) + α (MMD(s) − ε) ],  without Q in the first steps,
       MMD(s)² = mean_ij κ(u_i, u_j) + mean_ij κ(û_i, û_j) − 2 mean_ij κ(u_i, û_j) + 10⁻⁶,
       u_i = μ(s) + σ(s)·η_i,  û_j = g(s, z_j), z_j = clip(η_j, −½, ½): both before tanh,
       κ(x, y) = exp(−‖x − y‖₂² / 2h), Gaussian, or exp(−‖x − y‖₁ / 2h), Laplacian
  (E7) L_α = −α (E_D[MMD(s)] − ε),  then log α is clipped to [−5, 10]
  (E8) L_Q = Σ_k E_D[ ( w · (Q_k^1(s, a) − y) )² ],  one pass
  (E9) Q̄ ← Q̄ + rate · (Q − Q̄)
  (E10) acting: the ã_n with the largest Q_1(s, ã_n), of 100

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics, N actions, T passes. d is
terminated: a truncated episode bootstraps. Observations are raw, actions lie in [-1, 1].

Differences from the official code (apple/ml-uwac, whose script imports a file that it lacks):
  D1 T = 10; there 100, ten times the work. With 10, V is typically off by a third of its size.
  D2 p is rounded to a multiple of 1/256, 0.1 to 26/256 = 0.1016: a random byte for each unit.
  D3 (E10) uses all units, and the same 100 draws of η in every state, saved with the policy.
  D4 ‖W‖₂ is followed by one power iteration per update; there by one per forward pass.
  D5 Target critics start as copies; PyTorch's default initialisation in place of rlkit's.
  D6 (E6) is differentiated with the Q that its value came from. The code steps Q in between, so its
     gradient mixes new weights with old activations; current PyTorch refuses that.

Watch: weight, the mean of w in (E5). V has the square of Q's unit, so weight falls as Q grows. Near
1 UWAC is BEAR, near 0 nothing is learned: scale rewards down, or lower --beta (if inverse, raise
it). ‖W‖₂ ≈ 1 lets Q change by about 1.24 per unit of (s, a), so large returns are fitted slowly,
and differences between actions may not fit at all: Pendulum's rewards times 0.01 do
(tests/test_learning.py). mmd, multiplier: as in bear.py.

Run:     python algorithms/uwac.py --env hopper-medium
Expect:  slow: the committed runs have 5,000 updates, too few to tell it from BEAR, whose ε and
         kernel differ. weight has fallen to 0.24 by then. Scores and curves: results/README.md.
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
    steps: int = 500_000  # gradient updates, as in bear.py; the script has 3M [=]
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
    batch_size: int = 256  # transitions per update [C UWAC_hdf5_d4rl.py]
    vae_lr: float = 3e-4  # Adam [C uwac_dropout.py]
    actor_lr: float = 1e-4  # Adam [C UWAC_hdf5_d4rl.py]
    critic_lr: float = 3e-4  # Adam [C UWAC_hdf5_d4rl.py]
    multiplier_lr: float = 1e-3  # Adam, for log α [C uwac_dropout.py]
    gamma: float = 0.99  # discount γ [C UWAC_hdf5_d4rl.py]
    target_rate: float = 0.005  # share of the new weights in (E9) [C UWAC_hdf5_d4rl.py]
    # BEAR
    num_samples: int = 10  # N in (E5), actions per next observation [C uwac_dropout.py]
    min_weight: float = 0.75  # λ in (E5): 1 is the minimum, ½ the mean [C uwac_dropout.py]
    num_mmd_samples: int = 4  # actions of policy, and of VAE, in (E6) [C uwac_dropout.py]
    kernel: Literal["gaussian", "laplacian"] = "gaussian"  # κ in (E6) [C UWAC_hdf5_d4rl.py]
    bandwidth: float = 20.0  # h in (E6); 50 for walker2d, says a comment [C UWAC_hdf5_d4rl.py]
    max_mmd: float = 0.07  # ε in (E6), (E7) [C UWAC_hdf5_d4rl.py]
    warm_up_steps: int = 40_000  # first updates, in which (E6) leaves out Q [C uwac_dropout.py]
    # UWAC
    dropout_rate: float = 0.1  # p in (E2), rounded to 1/256 [C UWAC_hdf5_d4rl.py] [D2]
    passes: int = 10  # T in (E3); 100 in networks.py [D1]
    weighting: Literal["exponential", "inverse"] = "exponential"  # w in (E4), inverse as in [P] [C]
    beta: float = 0.5  # β in (E4): larger trusts Q less, if inverse more [C UWAC_hdf5_d4rl.py]


HIDDEN = (256, 256)  # widths of policy and critics [C UWAC_hdf5_d4rl.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C policies.py]
VAE_HIDDEN = (750, 750)  # [C policies.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C policies.py]
LATENT_CLIP = 0.5  # in (E6) [C policies.py]
LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX = -5.0, 10.0  # in (E7) [C uwac_dropout.py]
ACT_SAMPLES = 100  # N in (E10) [C UWAC_hdf5_d4rl.py]


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


class SpectralLinear(EnsembleLinear):
    """Each weight W is divided by its largest singular value ‖W‖₂ = vᵀ W u; v and u follow W."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__(num, in_dim, out_dim)
        self.register_buffer("u", torch.randn(num, out_dim, 1))
        self.register_buffer("v", torch.empty(num, in_dim, 1))
        for _ in range(15):  # as torch.nn.utils.parametrizations.spectral_norm
            self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """One power iteration. [D4]"""
        self.v.copy_(F.normalize(self.weight @ self.u, dim=1))
        self.u.copy_(F.normalize(self.weight.mT @ self.v, dim=1))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        # the norm depends on W, so the gradient has no part along W
        norm = self.v.mT @ self.weight @ self.u  # (K, 1, 1)
        weight = self.weight * (scale / norm)
        if weight.shape[2] == 1:  # a matrix times a vector: transposed it takes half the time
            return torch.baddbmm(self.bias, weight.mT, x.mT).mT
        return torch.baddbmm(self.bias, x, weight)


def drop_units(x: Tensor, rate: float) -> Tensor:
    """Sets each unit to 0 with probability round(256 rate) / 256. [D2]

    One random number of 64 bits decides about eight units, a byte each. A number for each unit, as
    F.dropout draws it, would take more time than all of the update's matrix products.
    """
    dropped = round(256 * rate)  # so many of the 256 values of a byte
    if dropped == 0:
        return x
    numbers = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    numbers.random_(-(2**63), None)  # uniform over all 64 bits
    kept = numbers.view(torch.uint8)[:x.numel()].ge_(dropped)  # 1 or 0
    return x * kept.view(x.shape)


class Critic(nn.Module):
    """K independent Q networks with dropout in the hidden layers, (B, S), (B, A) -> (K, B)."""

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(SpectralLinear(num, inputs, outputs))

    def forward(self, obs: Tensor, action: Tensor, dropout_rate: float = 0.0) -> Tensor:
        return self.passes(obs, action, dropout_rate, 1).squeeze(-1)

    def passes(self, obs: Tensor, action: Tensor, dropout_rate: float, num_passes: int) -> Tensor:
        """(B, S), (B, A) -> (K, B, T), dropout anew in each pass."""
        num = len(self.layers[0].weight)
        x = torch.cat([obs, action], dim=-1).expand(num, -1, -1)  # (K, B, S + A)
        # the inputs are never dropped, so the first hidden layer is the same in all passes
        x = F.relu(self.layers[0](x)).unsqueeze(2).expand(-1, -1, num_passes, -1)  # (K, B, T, H)
        # (E2) on throughout training, in the target critics too. The next layer's weights take the
        # division by 1 − p: there are fewer of them than units
        scale = 256 / (256 - round(256 * dropout_rate))
        x = drop_units(x, dropout_rate).flatten(1, 2)  # (K, B·T, H)
        for layer in self.layers[1:-1]:
            x = drop_units(F.relu_(layer(x, scale)), dropout_rate)
        return self.layers[-1](x, scale).view(num, -1, num_passes)


class Actor(nn.Module):
    """π(a|s), a Gaussian before tanh, and the Q_1 that chooses among its actions."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.critic = Critic(obs_dim, action_dim)
        self.register_buffer("noise", torch.randn(1, ACT_SAMPLES, action_dim))  # [D3]
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
        # (E10) each observation keeps the best of its own N actions
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
    """(E5): (K, ...) -> (...), mostly the smallest critic: a penalty for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)  # not clipped, unlike in (E6)
    # (E1) means, not sums: summed over latents the KL would weigh L times as much
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


def mean_and_variance(critic: Critic, obs: Tensor, actions: Tensor,
                      args: Args) -> tuple[Tensor, Tensor]:
    """(E3): M (K, B, N) and V (B, N) of N actions for each observation."""
    batch_size, num, action_dim = actions.shape
    obs = obs.repeat_interleave(num, dim=0)  # row b·N + n belongs to observation b
    q = critic.passes(obs, actions.reshape(-1, action_dim), args.dropout_rate, args.passes)
    q = q.unflatten(1, (batch_size, num))  # (K, B, N, T)
    # (E3) the variance with 1/(T − 1), summed over critics
    return q.mean(dim=3), q.var(dim=3).sum(dim=0)


def uncertainty_weight(variance: Tensor, args: Args) -> Tensor:
    """(E4): 1 where the passes agree, towards 0 where they do not."""
    variance = variance.detach()  # otherwise Q and π could lower their losses by a larger variance
    # (E4)
    if args.weighting == "exponential":
        return torch.exp(-args.beta * variance)
    return (args.beta / variance).clamp(max=1)


@torch.no_grad()
def td_target(actor: Actor, critic_target: Critic, batch: Batch,
              args: Args) -> tuple[Tensor, Tensor]:
    """(E5): the regression target y and its weight, (B,) each."""
    batch_size, action_dim = batch.action.shape
    noise = torch.randn(batch_size, args.num_samples, action_dim, device=batch.obs.device)
    next_actions = torch.tanh(actor(batch.next_obs, noise))
    q, variance = mean_and_variance(critic_target, batch.next_obs, next_actions, args)
    # (E5) first over critics, then over actions, as in BEAR; the weight is that of s′ also where
    # the episode terminates [C]
    next_q = mix_critics(q, args.min_weight).amax(dim=1)
    y = batch.reward + args.gamma * (1 - batch.terminated) * next_q
    return y, uncertainty_weight(variance.amax(dim=1), args)


def mean_kernel(u: Tensor, v: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """κ of all pairs, averaged: (B, N, A), (B, M, A) -> (B,). Within one set i = j counts too."""
    difference = u.unsqueeze(2) - v.unsqueeze(1)  # (B, N, M, A)
    if kernel == "gaussian":
        distance = difference.pow(2).sum(dim=-1)
    else:
        distance = difference.abs().sum(dim=-1)
    return torch.exp(-distance / (2 * bandwidth)).mean(dim=(1, 2))


def mmd(u: Tensor, v: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """The distance of two sets of actions before tanh, (B, N, A), (B, M, A) -> (B,)."""
    within_u = mean_kernel(u, u, kernel, bandwidth)
    within_v = mean_kernel(v, v, kernel, bandwidth)
    between = mean_kernel(u, v, kernel, bandwidth)
    # without 10⁻⁶ the gradient of two equal sets would be infinite
    return (within_u + within_v - 2 * between + 1e-6).sqrt()


def actor_loss(actor: Actor, vae: VAE, multiplier: Tensor, obs: Tensor, args: Args,
               warm_up: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(E6); also the mean MMD, which (E7) needs, and the mean Q of the policy's actions.

    In the warm-up Q does not enter, and its mean is given as 0.
    """
    num = args.num_mmd_samples
    z = torch.randn(len(obs), num, vae.latent_dim, device=obs.device)
    with torch.no_grad():
        repeated = obs.unsqueeze(1).expand(-1, num, -1)  # (B, N, S)
        behavior = vae.decode(repeated, z.clamp(-LATENT_CLIP, LATENT_CLIP))  # (B, N, A)
    u = actor(obs, torch.randn_like(behavior))  # (B, N, A)
    distance = mmd(u, behavior, args.kernel, args.bandwidth).mean()
    q = weighted_q = torch.zeros_like(distance)
    if not warm_up:
        first_action = torch.tanh(u[:, :1])  # (B, 1, A)
        value, variance = mean_and_variance(actor.critic, obs, first_action, args)
        q = value.amin(dim=0)
        weighted_q = uncertainty_weight(variance, args) * q
    # (E6) here the weight is not squared
    loss = -weighted_q.mean() + multiplier * (distance - args.max_mmd)
    return loss, distance.detach(), q.detach().mean()


def multiplier_loss(log_multiplier: Tensor, distance: Tensor, max_mmd: float) -> Tensor:
    """(E7): gradient descent on it is ascent on the constraint's multiplier α = exp(log α)."""
    # (E7) α grows while the MMD is above ε
    return -log_multiplier.exp() * (distance - max_mmd)


def critic_loss(critic: Critic, batch: Batch, y: Tensor, weight: Tensor,
                dropout_rate: float) -> tuple[Tensor, Tensor]:
    """(E8); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action, dropout_rate)  # (K, B)
    assert y.shape == weight.shape == q.shape[1:], "other shapes would broadcast, and train"
    # (E8) the weight is squared with the residual, and not divided by its mean
    return (weight * (q - y)).pow(2).mean(dim=1).sum(), q.detach().mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E9) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, vae: VAE, actor: Actor, critic_target: Critic,
           log_multiplier: Tensor, vae_optimizer, actor_optimizer, critic_optimizer,
           multiplier_optimizer, warm_up: bool) -> dict[str, Tensor]:
    """One step of UWAC: VAE, π, α, Q, targets. In the warm-up π learns without Q."""
    batch = data.sample(args.batch_size)
    multiplier = log_multiplier.detach().exp()
    for layer in (*actor.critic.layers, *critic_target.layers):
        layer.follow()

    behavior_loss, cloning, kl = vae_loss(vae, batch)
    descend(behavior_loss, vae_optimizer)

    # y from the old policy, π's step on the old Q: the code computes all losses before any step
    y, weight = td_target(actor, critic_target, batch, args)
    pi_loss, distance, q_policy = actor_loss(actor, vae, multiplier, batch.obs, args, warm_up)
    descend(pi_loss, actor_optimizer)

    descend(multiplier_loss(log_multiplier, distance, args.max_mmd), multiplier_optimizer)
    log_multiplier.detach().clamp_(LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX)

    q_loss, q_data = critic_loss(actor.critic, batch, y, weight, args.dropout_rate)
    descend(q_loss, critic_optimizer)

    # (E9)
    polyak_update(critic_target, actor.critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy,
            "mmd": distance, "multiplier": multiplier, "weight": weight.mean(),
            "cloning_error": cloning, "kl": kl}


def train(args: Args) -> None:
    check_range(args, "batch_size num_samples num_mmd_samples", 1)
    check_range(args, "vae_lr actor_lr critic_lr multiplier_lr max_mmd warm_up_steps", 0)
    check_range(args, "gamma target_rate min_weight", 0, 1)
    check_range(args, "passes", 2)
    check_range(args, "dropout_rate", 0, 0.99)
    if args.dropout_rate > 0 and round(256 * args.dropout_rate) == 0:
        fail(f"--dropout-rate {args.dropout_rate} is rounded to 0; give 0, or at least 0.002")
    for name in ("bandwidth", "beta"):
        if not getattr(args, name) > 0:
            fail(f"--{name} must be above 0, not {getattr(args, name)}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=11.8)

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
    train(tyro.cli(Args))
