"""Uncertainty Weighted Actor-Critic, UWAC: BEAR that trusts Q less where dropout makes it vary more.

Wu, Zhai, Srivastava, Susskind, Zhang, Salakhutdinov & Goh, ICML 2021, arXiv 2105.08140.
Notes: Uncertainty-Based › UWAC. (They weigh squared residuals by β/Var. The released code weighs by exp(−β Var) unless told
otherwise, and multiplies residuals before squaring them: w² in (E8), w in (E6). Nor has it the σ² of the notes' variance.)

Drop a tenth of Q's hidden units at random, a few times over: where the answers differ, Q is guessing. Such a guess should
neither be learned from, as a target, nor followed, by the policy: both losses get a weight that falls with the variance of
these answers. All the rest is BEAR: read bear.py first, then the difference of the two files.

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = m(s, a) + v(s, a)·η,  all η ~ N(0, I)
       KL = 1/L Σ_l [ ½(m_l² + v_l² − 1) − log v_l ]
  (E2) Q_k^t(s, a): Q_k on weights W / ‖W‖₂, where each hidden unit is 0 with probability p, or else divided by 1 − p
  (E3) M_k = 1/T Σ_t Q_k^t,  V = Σ_k 1/(T − 1) Σ_t (Q_k^t − M_k)²,  over T passes for each s and a
  (E4) w(V) = exp(−β V), released, or min(1, β / V), the paper's;  no gradient
  (E5) y = r + γ (1 − d) max_n [ λ min_k M̄_k(s′, ã_n) + (1 − λ) max_k M̄_k(s′, ã_n) ],  N actions ã_n = tanh(u_n) of π(·|s′),
       w = w(max_n V̄(s′, ã_n)), of another n perhaps
  (E6) L_π = E_D[ −w(V(s, ã_1)) min_k M_k(s, ã_1) + α (MMD(s) − ε) ],  in the first steps without Q
       MMD(s)² = mean_ij k(u_i, u_j) + mean_ij k(û_i, û_j) − 2 mean_ij k(u_i, û_j) + 10⁻⁶,
       u_i = μ(s) + σ(s)·η_i of the policy,  û_j = g(s, z_j), z_j = clip(η_j, −½, ½), of the VAE: both before tanh,
       k(u, v) = exp(−‖u − v‖₂² / 2h), Gaussian, or exp(−‖u − v‖₁ / 2h), Laplacian
  (E7) L_α = −α (E_D[MMD(s)] − ε),  then log α is clipped to [−5, 10]: α grows while the MMD is above ε
  (E8) L_Q = Σ_k E_D[ ( w · (Q_k^1(s, a) − y) )² ],  of one pass
  (E9) Q̄ ← Q̄ + rate · (Q − Q̄)
  (E10) acting: the ã_n with the largest Q_1(s, ã_n), of 100

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics, N actions per observation, T passes. d is terminated: a
truncated episode bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Mind the reward's scale. V is in its square, so that β = ½ leaves next to no weight where Q is in the hundreds; and ‖W‖₂ = 1
lets Q change by 1.24 per unit of (s, a) at most. In 1200 updates on pendulum-random (returns of −1200, one seed), the mean
weight fell to 0.18, ‖W‖₂ alone made squared TD errors 13 times BEAR's, and the policy got no better than its data; BEAR's did.

Differences from the official code (apple/ml-uwac, whose script imports a file that it lacks), which we follow:
  D1 T = 10, not 100: such an update needs as many operations as one of CQL, 12 GFLOP, and 90 with 100, which a CPU does in
     seconds. With 10, V is typically off by half its size. `--passes 100` is the released one.
  D2 (E10) uses all units, which comes close to the mean of 100 passes, and the same 100 draws of η in every state, saved with
     the policy. So a saved policy is a function of the observation, and a hundred times faster.
  D3 ‖W‖₂ is followed by one power iteration per update, not by one per forward pass, which would then have a memory.
  D4 Target critics start as copies; PyTorch's default initialisation in place of rlkit's.

Run:     python algorithms/uwac.py --env hopper-medium
Expect:  hopper-medium 13.8 (the data 44, BC 47 and 54), hopper-medium-replay 22.1 (the data 15, BC 18), after 5,000 updates,
         1,000 of them without Q, a hundredth of the default, seed 0, in half an hour on a core. What it knows so far is BEAR's
         constraint: on hopper-medium V is 1.97 at the data's actions and 1.99 at random ones, so that both have the weight
         0.39; nor does Q tell them apart, 39.93 and 39.89. The VAE's decoder alone, with z = 0, is worth 46 in 10 episodes.
         On pendulum's datasets runs of 1,200 to 4,000 updates ended below the data: −1239 on medium-replay (−1148), −1242 on
         random (−1218); the bound on Q's slope, above, is one reason.
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
from common import Batch, Dataset, Run, check, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 500_000  # gradient updates, as bear.py's [=]; the script has 3M
    batch_size: int = 256  # transitions per update [C UWAC_hdf5_d4rl.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    vae_lr: float = 3e-4  # Adam [C uwac_dropout.py]
    actor_lr: float = 1e-4  # Adam [C UWAC_hdf5_d4rl.py]
    critic_lr: float = 3e-4  # Adam [C UWAC_hdf5_d4rl.py]
    multiplier_lr: float = 1e-3  # Adam, for log α [C uwac_dropout.py]
    gamma: float = 0.99  # discount γ [C UWAC_hdf5_d4rl.py]
    target_rate: float = 0.005  # share of the new weights in (E9) [C UWAC_hdf5_d4rl.py]
    # BEAR
    num_samples: int = 10  # N in (E5), actions per next observation [C uwac_dropout.py]
    min_weight: float = 0.75  # λ in (E5): 1 is the minimum of the critics, ½ their mean [C uwac_dropout.py]
    num_mmd_samples: int = 4  # actions of the policy, and of the VAE, in (E6) [C uwac_dropout.py]
    kernel: Literal["gaussian", "laplacian"] = "gaussian"  # k in (E6) [C UWAC_hdf5_d4rl.py]
    bandwidth: float = 20.0  # h in (E6), not squared [C UWAC_hdf5_d4rl.py]; 50 for walker2d, says a comment there
    max_mmd: float = 0.07  # ε in (E6), (E7) [C UWAC_hdf5_d4rl.py]
    warm_up_steps: int = 40_000  # first updates, with (E6) without Q [C uwac_dropout.py]
    # UWAC
    dropout_rate: float = 0.1  # p in (E2) [C UWAC_hdf5_d4rl.py]
    passes: int = 10  # T in (E3) [D1]; 100 [C networks.py]
    weighting: Literal["exponential", "inverse"] = "exponential"  # w in (E4) [C UWAC_hdf5_d4rl.py]; inverse [P]
    beta: float = 0.5  # β in (E4): larger trusts Q less if exponential, more if inverse [C UWAC_hdf5_d4rl.py]


HIDDEN = (256, 256)  # widths of policy and critics [C UWAC_hdf5_d4rl.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C policies.py]
VAE_HIDDEN = (750, 750)  # [C policies.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C policies.py]
LATENT_CLIP = 0.5  # in (E6) [C policies.py]
LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX = -5.0, 10.0  # in (E7) [C uwac_dropout.py]
ACT_SAMPLES = 100  # N in (E10) [C UWAC_hdf5_d4rl.py]


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


class SpectralLinear(EnsembleLinear):
    """With each weight W divided by its largest singular value ‖W‖₂ = vᵀ W u; the vectors v, u follow W."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__(num, in_dim, out_dim)
        self.register_buffer("u", torch.randn(num, out_dim, 1))
        self.register_buffer("v", torch.empty(num, in_dim, 1))
        for _ in range(15):  # as torch.nn.utils.parametrizations.spectral_norm
            self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """One power iteration. [D3]"""
        self.v.copy_(F.normalize(self.weight @ self.u, dim=1))
        self.u.copy_(F.normalize(self.weight.mT @ self.v, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        # (E2) the gradient knows that ‖W‖₂ is W's own
        return torch.baddbmm(self.bias, x, self.weight / (self.v.mT @ self.weight @ self.u))


class Critic(nn.Module):
    """K independent Q networks with dropout in the hidden layers, (B, S), (B, A) -> (K, B)."""

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList(SpectralLinear(num, i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, obs: Tensor, action: Tensor, dropout_rate: float = 0.0) -> Tensor:
        x = torch.cat([obs, action], dim=-1).expand(len(self.layers[0].weight), -1, -1)  # (K, B, S + A)
        for layer in self.layers[:-1]:
            # (E2) on as long as training lasts, in the target critics too; never in the inputs
            x = F.dropout(F.relu(layer(x)), dropout_rate)
        return self.layers[-1](x).squeeze(-1)


class Actor(nn.Module):
    """π(a|s), a Gaussian before tanh, and the Q_1 that chooses among its actions. Its buffers hold the units and the noise."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.critic = Critic(obs_dim, action_dim)
        self.register_buffer("noise", torch.randn(1, ACT_SAMPLES, action_dim))  # [D2]
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
        # (E10)
        best = value_actions(self.critic, obs, actions)[0].argmax(dim=1)  # (B,)
        return self.action_mid + self.action_half * actions[torch.arange(len(obs), device=obs.device), best]


def value_actions(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of N actions for each observation: (B, S), (B, N, A) -> (K, B, N)."""
    batch_size, num, action_dim = actions.shape
    # repeat_interleave, not repeat: row b·N + n of both inputs must belong to observation b
    return critic(obs.repeat_interleave(num, dim=0), actions.reshape(-1, action_dim)).view(-1, batch_size, num)


def mix_critics(q: Tensor, min_weight: float) -> Tensor:
    """(E5): (K, ...) -> (...), mostly the smallest of the critics, and so a fine for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence. Here z is not clipped: that is for sampling."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)
    # (E1) a sum over latents would weigh L times as much, and the decoder ignore z even where the data vary widely
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


def mean_and_variance(critic: Critic, obs: Tensor, actions: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """(E3): M (K, B, N) and V (B, N) of N actions for each observation, over T passes with dropout."""
    repeated = actions.repeat_interleave(args.passes, dim=1)  # (B, N·T, A), each of them with units dropped of its own
    q = value_actions(partial(critic, dropout_rate=args.dropout_rate), obs, repeated).unflatten(2, (-1, args.passes))
    # (E3)
    return q.mean(dim=3), q.var(dim=3).sum(dim=0)


def uncertainty_weight(variance: Tensor, args: Args) -> Tensor:
    """(E4): 1 where the passes agree, towards 0 where they don't."""
    variance = variance.detach()  # else Q and π could lower their losses by looking uncertain
    # (E4)
    return torch.exp(-args.beta * variance) if args.weighting == "exponential" else (args.beta / variance).clamp(max=1)


@torch.no_grad()
def td_target(actor: Actor, critic_target: Critic, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """(E5): the regression target y and its weight, (B,) each. The weight is of s′, also where the episode ends. [C]"""
    noise = torch.randn(len(batch.obs), args.num_samples, batch.action.shape[1], device=batch.obs.device)
    q, variance = mean_and_variance(critic_target, batch.next_obs, torch.tanh(actor(batch.next_obs, noise)), args)
    # (E5) first the critics, then the actions: the other order would pair one action's minimum with another's maximum
    next_q = mix_critics(q, args.min_weight).amax(dim=1)
    y = batch.reward + args.gamma * (1 - batch.terminated) * next_q
    return y, uncertainty_weight(variance.amax(dim=1), args)


def mmd(u: Tensor, v: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """(E6): the distance of two sets of actions before tanh, for each observation: (B, N, A), (B, M, A) -> (B,)."""
    def k(u: Tensor, v: Tensor) -> Tensor:
        difference = u.unsqueeze(2) - v.unsqueeze(1)  # (B, N, M, A)
        distance = (difference.pow(2) if kernel == "gaussian" else difference.abs()).sum(dim=-1)
        return torch.exp(-distance / (2 * bandwidth)).mean(dim=(1, 2))  # over all pairs, i = j among them
    # (E6) without 10⁻⁶ the gradient of two equal sets would be infinite
    return (k(u, u) + k(v, v) - 2 * k(u, v) + 1e-6).sqrt()


def actor_loss(actor: Actor, vae: VAE, multiplier: Tensor, obs: Tensor, args: Args,
               warm_up: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(E6); also the mean MMD, which (E7) needs, and the mean w · Q of the policy's actions, 0 while Q has no say."""
    z = torch.randn(len(obs), args.num_mmd_samples, vae.latent_dim, device=obs.device).clamp(-LATENT_CLIP, LATENT_CLIP)
    with torch.no_grad():
        behavior = vae.decode(obs.unsqueeze(1).expand(-1, args.num_mmd_samples, -1), z)  # (B, N, A)
    u = actor(obs, torch.randn_like(behavior))  # (B, N, A)
    distance = mmd(u, behavior, args.kernel, args.bandwidth).mean()
    q = torch.zeros_like(distance)
    if not warm_up:
        value, variance = mean_and_variance(actor.critic, obs, torch.tanh(u[:, :1]), args)  # (K, B, 1), (B, 1)
        q = (uncertainty_weight(variance, args) * value.amin(dim=0)).mean()
    # (E6)
    return -q + multiplier * (distance - args.max_mmd), distance.detach(), q.detach()


def multiplier_loss(log_multiplier: Tensor, distance: Tensor, max_mmd: float) -> Tensor:
    """(E7): gradient descent on it is ascent on the constraint's multiplier α = exp(log α)."""
    # (E7)
    return -log_multiplier.exp() * (distance - max_mmd)


def critic_loss(critic: Critic, batch: Batch, y: Tensor, weight: Tensor, dropout_rate: float) -> tuple[Tensor, Tensor]:
    """(E8); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action, dropout_rate)  # (K, B)
    assert y.shape == weight.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E8) the weight is squared with the residual, and not divided by its mean
    return (weight * (q - y)).pow(2).mean(dim=1).sum(), q.detach().mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E9) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, vae: VAE, actor: Actor, critic_target: Critic, log_multiplier: Tensor,
           vae_optimizer, actor_optimizer, critic_optimizer, multiplier_optimizer, warm_up: bool) -> dict[str, Tensor]:
    """One step of UWAC: VAE, π, α, Q, targets. `warm_up` says whether π is yet without Q."""
    batch = data.sample(args.batch_size)
    multiplier = log_multiplier.detach().exp()
    for layer in (*actor.critic.layers, *critic_target.layers):
        layer.follow()

    behavior_loss, cloning, kl = vae_loss(vae, batch)
    descend(behavior_loss, vae_optimizer)

    # y from the old policy, the policy's step on the old Q: the code computes all losses first, and then takes all steps
    y, weight = td_target(actor, critic_target, batch, args)
    pi_loss, distance, q_policy = actor_loss(actor, vae, multiplier, batch.obs, args, warm_up)
    descend(pi_loss, actor_optimizer)

    descend(multiplier_loss(log_multiplier, distance, args.max_mmd), multiplier_optimizer)
    log_multiplier.detach().clamp_(LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX)

    q_loss, q_data = critic_loss(actor.critic, batch, y, weight, args.dropout_rate)
    descend(q_loss, critic_optimizer)

    # (E9)
    polyak_update(critic_target, actor.critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "mmd": distance, "multiplier": multiplier,
            "weight": weight.mean(), "cloning_error": cloning, "kl": kl}


def train(args: Args) -> None:
    for name in ("num_samples", "num_mmd_samples", "bandwidth", "beta"):
        check(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    check(0 <= args.dropout_rate < 1 and args.passes > 1, "--dropout-rate must be in [0, 1) and --passes at least 2")
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
    train(tyro.cli(Args))
