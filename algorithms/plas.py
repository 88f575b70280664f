"""Policy in the Latent Action Space, PLAS.

Zhou, Bajracharya & Held, "PLAS: Latent Action Space for Offline Reinforcement Learning", CoRL 2020, arXiv 2011.07213.
Notes: Policy Constraints (软约束); Valuable Github Repo lists it.

First a conditional VAE learns to produce actions as the data have them, as in bcq.py; then it is frozen. The policy says which
latent to decode, not which action, and may follow Q as far as it likes: whatever it says, the decoder turns it into an action
like the data's, or between two of theirs. So the constraint sits in what the policy can express, and no term or weight has to
enforce it.

  Stage 1, until the VAE is done:
  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = m(s, a) + σ(s, a)·ε,
       KL = 1/L Σ_l [ ½(m_l² + σ_l² − 1) − log σ_l ]
  Stage 2, g fixed:
  (E2) π(s) = tanh g(s, z),  z = Z tanh h(s)
  (E3) y = r + γ (1 − d) [ λ min_k Q̄_k(s′, π̄(s′)) + (1 − λ) max_k Q̄_k(s′, π̄(s′)) ],  π̄ with h̄
  (E4) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E5) L_h = −E_D[ Q_1(s, π(s)) ],  its gradient goes through g to h
  (E6) Q̄ ← Q̄ + rate · (Q − Q̄),  h̄ ← h̄ + rate · (h − h̄)

BCQ clips the latents that it draws to ±½; here they reach ±Z = ±2, two standard deviations of the prior: further out the
decoder was hardly ever trained, and would do as it likes.

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics. d is terminated: a truncated episode bootstraps.
Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the official code (Wenxuan-Zhou/PLAS), which we follow:
  D1 PLAS alone, as the code's default has it (--phi 0), without PLAS+P's perturbation of the decoded action; bcq.py shows one.
  D2 A run with |mean target Q| above 10⁶ goes on; the code stops there.

Run:     python algorithms/plas.py --env hopper-medium
Expect:  hopper-medium 36.6 (the data 44, BC 47 and 54), after 50,000 updates of the VAE and 80,000 of the policy, a tenth and a
         sixth of the defaults, seed 0. Below BC because the decoder ignores z (KL 0.0003): alone, with z = 0, it is worth 26,
         and h, which drives |z| to 1.8 of 2, moves an action by 0.05 only. By (E1) z is worth its KL where the actions of
         one state have a variance above 1/8; here it is about 0.03. On hopper-medium-replay, whose policies differ more, 24.0
         (the data 15, BC 18).
         pendulum-medium-replay (the data −1148): −182 after 8,000 updates, with a small VAE (tests/test_learning.py).
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 500_000  # gradient updates of stage 2 [C main.py]
    batch_size: int = 100  # transitions per update, in both stages [C main.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [C main.py]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    vae_lr: float = 1e-4  # Adam [C main.py]
    actor_lr: float = 1e-4  # Adam, for h [C main.py]; the class's own default is 1e-3
    critic_lr: float = 1e-3  # Adam [C main.py]
    gamma: float = 0.99  # discount γ [C algos.py]
    target_rate: float = 0.005  # share of the new weights in (E6) [C main.py]
    # PLAS
    vae_steps: int = 500_000  # gradient updates of stage 1 [C main.py]
    max_latent: float = 2.0  # Z in (E2) [C main.py]
    min_weight: float = 0.75  # λ in (E3): 1 is the minimum of the critics, ½ their mean [C algos.py]


HIDDEN = (400, 300)  # widths of h and critics [C algos.py]
VAE_HIDDEN = (750, 750)  # [C algos.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C algos.py]


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


class LatentPolicy(nn.Module):
    """h with its bound Z: which latent (B, L) to decode."""

    def __init__(self, obs_dim: int, latent_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, latent_dim)
        self.register_buffer("bound", torch.zeros(()))

    def forward(self, obs: Tensor) -> Tensor:
        # (E2)
        return self.bound * torch.tanh(self.net(obs))


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
    """All that acting needs: h and the VAE. Its buffers hold the units, so a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.vae = VAE(obs_dim, action_dim)
        self.latent_policy = LatentPolicy(obs_dim, self.vae.latent_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        return self.action_mid + self.action_half * decoded_action(self.vae, self.latent_policy, obs)


def decoded_action(vae: VAE, latent_policy: LatentPolicy, obs: Tensor) -> Tensor:
    """(E2): π(s), (B, A) in [-1, 1]. Not without gradient: the policy learns through the decoder, which itself does not."""
    # (E2)
    return torch.tanh(vae.decode(obs, latent_policy(obs)))


def mix_critics(q: Tensor, min_weight: float) -> Tensor:
    """(E3): (K, ...) -> (...), mostly the smallest of the critics, and so a fine for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)
    # (E1) a sum over latents would weigh L times as much, and the decoder ignore z even where the data vary widely
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


@torch.no_grad()
def td_target(vae: VAE, latent_target: LatentPolicy, critic_target: Critic, batch: Batch, args: Args) -> Tensor:
    """(E3): the regression target y, (B,), without noise on the action."""
    # (E3)
    next_q = mix_critics(critic_target(batch.next_obs, decoded_action(vae, latent_target, batch.next_obs)), args.min_weight)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_q


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E4); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E4)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(vae: VAE, latent_policy: LatentPolicy, critic: Critic, obs: Tensor) -> tuple[Tensor, Tensor]:
    """(E5); also the mean Q of the policy's actions."""
    # (E5)
    q = critic(obs, decoded_action(vae, latent_policy, obs))[0].mean()
    return -q, q.detach()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E6) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update_vae(args: Args, data: Dataset, vae: VAE, vae_optimizer) -> dict[str, Tensor]:
    """One step of stage 1."""
    loss, cloning, kl = vae_loss(vae, data.sample(args.batch_size))
    descend(loss, vae_optimizer)
    return {"cloning_error": cloning, "kl": kl}


def update(args: Args, data: Dataset, actor: Actor, latent_target: LatentPolicy, critic: Critic, critic_target: Critic,
           actor_optimizer, critic_optimizer) -> dict[str, Tensor]:
    """One step of stage 2: Q, h, targets. The VAE is in none of the optimizers."""
    batch = data.sample(args.batch_size)

    y = td_target(actor.vae, latent_target, critic_target, batch, args)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    pi_loss, q_policy = actor_loss(actor.vae, actor.latent_policy, critic, batch.obs)
    descend(pi_loss, actor_optimizer)

    # (E6)
    polyak_update(critic_target, critic, args.target_rate)
    polyak_update(latent_target, actor.latent_policy, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy}


def train(args: Args) -> None:
    check(args.vae_steps > 0, f"--vae-steps must be at least 1, not {args.vae_steps}")
    check(args.max_latent > 0, f"--max-latent must be above 0, not {args.max_latent}")
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.latent_policy.bound.fill_(args.max_latent)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    latent_target, critic_target = copy.deepcopy(actor.latent_policy), copy.deepcopy(critic)
    fitted = torch.zeros((), dtype=torch.long, device=data.device)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    vae_optimizer = adam(actor.vae.parameters(), lr=args.vae_lr)
    actor_optimizer = adam(actor.latent_policy.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    start = run.resume(actor=actor, latent_target=latent_target, critic=critic, critic_target=critic_target, fitted=fitted,
                       vae_optimizer=vae_optimizer, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    if fitted < args.vae_steps:
        one_fit = record_on_cuda(partial(update_vae, args, data, actor.vae, vae_optimizer), data.device)
        for _ in tqdm(range(int(fitted), args.vae_steps), desc="VAE", unit=" updates", leave=False,
                      mininterval=0.2 if sys.stderr.isatty() else 30):
            metrics = one_fit()
            fitted += 1
            if run.stop:
                break
        run.curve = []  # where a stop came before the VAE was ready, it has left an entry
        run.step(0, metrics, actor.act)  # a checkpoint, so that --resume fits no more; the policy is still random
    one_update = record_on_cuda(partial(update, args, data, actor, latent_target, critic, critic_target,
                                        actor_optimizer, critic_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
