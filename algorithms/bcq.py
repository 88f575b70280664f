"""Batch-Constrained deep Q-learning, BCQ, for continuous actions.

Fujimoto, Meger & Precup, "Off-Policy Deep Reinforcement Learning without Exploration", ICML 2019, arXiv 1812.02900.
Notes: Policy Constraints (软约束) › BCQ. (Their equation, a max over the actions that the data hold for s′, is the paper's rule
for tables; tests/test_bcq.py shows that (E4) is this rule if the VAE gives back the data's actions, often enough to see each,
and ξ is left out. With continuous states
no s′ ever comes twice, so a generative model has to say which actions could have been in the data.)

A conditional VAE learns to produce actions as the data have them. Wherever Q-learning takes a maximum over actions, BCQ takes
it over a few that the VAE proposes, each moved by at most φ by a small network that Q trains. So actions enter a target only
if they are like the data's, or between two of theirs, and there is no policy beyond "propose, correct, take the best".

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = μ(s, a) + σ(s, a)·ε,
       KL = 1/L Σ_l [ ½(μ_l² + σ_l² − 1) − log σ_l ]
  (E2) â = tanh g(s, z),  z = clip(ε, −½, ½),  ε ~ N(0, I)
  (E3) ã = clip( â + φ tanh ξ(s, â), −1, 1 )
  (E4) y = r + γ (1 − d) max_n [ λ min_k Q̄_k(s′, ã_n) + (1 − λ) max_k Q̄_k(s′, ã_n) ],  N actions ã_n of (E2), (E3) with ξ̄
  (E5) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E6) L_ξ = −E_D[ Q_1(s, ã) ],  one ã
  (E7) Q̄ ← Q̄ + rate · (Q − Q̄),  ξ̄ ← ξ̄ + rate · (ξ − ξ̄)
  (E8) acting: the ã_n with the largest Q_1(s, ã_n), of 100

In (E4) the critics are mixed for each action, and the maximum over actions comes after that. With this weight of KL the VAE
resolves only what is wide: for Gaussian actions z pays where their variance, given s, exceeds ⅛, a standard deviation of 0.35
of half the action range. Below that all proposals are near the mean, and φ is the freedom that is left.

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics, N actions per observation. d is terminated: a truncated
episode bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the official code (sfujim/BCQ, continuous_BCQ), which we follow:
  D1 (E8) uses the same 100 latents in every state, drawn once and saved with the policy; the code draws anew at each step.
     So a saved policy is a function, its score can be repeated, and evaluations leave training's random numbers alone.
  D2 φ and the clip in (E3) are in shares of half the action range of each dimension; the code has one largest action for all.

Run:     python algorithms/bcq.py --env hopper-medium
Expect:  hopper-medium 89.6 (the data 44, BC 47 and 54), after 28,000 updates, seed 0: half an hour on a core. Its evaluations
         swing between 33 and 81 from 6,000 on. hopper-medium-replay 12.7 (the data 15, BC 18), and 9 to 22 on the way.
         pendulum-medium-replay (the data −1148, a clone the same): −679, −720, −834 after 3,000 updates with --batch-size 32
         --num-samples 3 --max-perturbation 0.2 --gamma 0.95 --target-rate 0.02 --critic-lr 2e-3, seeds 0 to 2.
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
    steps: int = 1_000_000  # gradient updates [C main.py]
    batch_size: int = 100  # transitions per update [C main.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    vae_lr: float = 1e-3  # Adam [C BCQ.py]
    actor_lr: float = 1e-3  # Adam, for the perturbation ξ [C BCQ.py]
    critic_lr: float = 1e-3  # Adam [C BCQ.py]
    gamma: float = 0.99  # discount γ [C main.py]
    target_rate: float = 0.005  # share of the new weights in (E7) [C main.py]
    # BCQ
    max_perturbation: float = 0.05  # φ in (E3), of half the action range [C main.py]
    num_samples: int = 10  # N in (E4), actions per next observation [C BCQ.py]
    min_weight: float = 0.75  # λ in (E4): 1 is the minimum of the critics, ½ their mean [C main.py]


HIDDEN = (400, 300)  # widths of perturbation and critics [C BCQ.py]
VAE_HIDDEN = (750, 750)  # [C BCQ.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C BCQ.py]
LATENT_CLIP = 0.5  # in (E2) [C BCQ.py]
ACT_SAMPLES = 100  # N in (E8) [C BCQ.py]


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


class Perturbation(nn.Module):
    """ξ with its bound φ: moves an action (..., A) a little, to where Q is larger."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, *HIDDEN, action_dim)
        self.register_buffer("bound", torch.zeros(()))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        # (E3)
        return (action + self.bound * torch.tanh(self.net(torch.cat([obs, action], dim=-1)))).clamp(-1, 1)


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
    """All that acting needs: the VAE proposes, ξ corrects, Q_1 chooses. Its buffers hold the units and the latents."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.vae = VAE(obs_dim, action_dim)
        self.perturbation = Perturbation(obs_dim, action_dim)
        self.critic = Critic(obs_dim, action_dim)
        self.register_buffer("latents", sample_latents(self.vae, torch.zeros(1, obs_dim), ACT_SAMPLES))  # [D1]
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        actions = propose(self.vae, self.perturbation, obs, self.latents.expand(len(obs), -1, -1))
        # (E8)
        best = value_actions(self.critic, obs, actions)[0].argmax(dim=1)  # (B,)
        return self.action_mid + self.action_half * actions[torch.arange(len(obs), device=obs.device), best]


def sample_latents(vae: VAE, obs: Tensor, num: int) -> Tensor:
    """(E2): N latents for each observation, (B, N, L), near the middle of the prior, where the VAE's actions are likely."""
    # (E2)
    return torch.randn(len(obs), num, vae.latent_dim, device=obs.device).clamp(-LATENT_CLIP, LATENT_CLIP)


def propose(vae: VAE, perturbation: Perturbation, obs: Tensor, z: Tensor) -> Tensor:
    """(E2), (E3): for latents (B, N, L) the actions (B, N, A). Only ξ gets gradient."""
    obs = obs.unsqueeze(1).expand(-1, z.shape[1], -1)  # (B, N, S)
    with torch.no_grad():
        action = torch.tanh(vae.decode(obs, z))
    return perturbation(obs, action)


def value_actions(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of N actions for each observation: (B, S), (B, N, A) -> (K, B, N)."""
    batch_size, num, action_dim = actions.shape
    # repeat_interleave, not repeat: row b·N + n of both inputs must belong to observation b
    return critic(obs.repeat_interleave(num, dim=0), actions.reshape(-1, action_dim)).view(-1, batch_size, num)


def mix_critics(q: Tensor, min_weight: float) -> Tensor:
    """(E4): (K, ...) -> (...), mostly the smallest of the critics, and so a fine for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence. Here z is not clipped: that is for acting only."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)
    # (E1) a sum over latents would weigh L times as much, and the decoder ignore z even where the data vary widely
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


@torch.no_grad()
def td_target(vae: VAE, perturbation_target: Perturbation, critic_target: Critic, batch: Batch, args: Args) -> Tensor:
    """(E4): the regression target y, (B,). The VAE has no target copy, ξ has."""
    z = sample_latents(vae, batch.next_obs, args.num_samples)
    q = value_actions(critic_target, batch.next_obs, propose(vae, perturbation_target, batch.next_obs, z))  # (K, B, N)
    # (E4) first the critics, then the actions: the other order would pair one action's minimum with another's maximum
    next_q = mix_critics(q, args.min_weight).amax(dim=1)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_q


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E5); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E5)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def perturbation_loss(vae: VAE, perturbation: Perturbation, critic: Critic, obs: Tensor) -> tuple[Tensor, Tensor]:
    """(E6); also the mean Q of the proposed actions."""
    action = propose(vae, perturbation, obs, sample_latents(vae, obs, 1))[:, 0]  # (B, A)
    # (E6)
    q = critic(obs, action)[0].mean()
    return -q, q.detach()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E7) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, perturbation_target: Perturbation, critic_target: Critic,
           vae_optimizer, critic_optimizer, perturbation_optimizer) -> dict[str, Tensor]:
    """One step of BCQ: VAE, Q, ξ, targets."""
    batch = data.sample(args.batch_size)

    behavior_loss, cloning, kl = vae_loss(actor.vae, batch)
    descend(behavior_loss, vae_optimizer)

    y = td_target(actor.vae, perturbation_target, critic_target, batch, args)
    q_loss, q_data = critic_loss(actor.critic, batch, y)
    descend(q_loss, critic_optimizer)

    xi_loss, q_policy = perturbation_loss(actor.vae, actor.perturbation, actor.critic, batch.obs)
    descend(xi_loss, perturbation_optimizer)

    # (E7)
    polyak_update(critic_target, actor.critic, args.target_rate)
    polyak_update(perturbation_target, actor.perturbation, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "cloning_error": cloning, "kl": kl}


def train(args: Args) -> None:
    check(args.num_samples > 0, f"--num-samples must be at least 1, not {args.num_samples}")
    check(args.max_perturbation >= 0, f"--max-perturbation must be at least 0, not {args.max_perturbation}")
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.perturbation.bound.fill_(args.max_perturbation)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    perturbation_target, critic_target = copy.deepcopy(actor.perturbation), copy.deepcopy(actor.critic)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    vae_optimizer = adam(actor.vae.parameters(), lr=args.vae_lr)
    critic_optimizer = adam(actor.critic.parameters(), lr=args.critic_lr)
    perturbation_optimizer = adam(actor.perturbation.parameters(), lr=args.actor_lr)
    start = run.resume(actor=actor, perturbation_target=perturbation_target, critic_target=critic_target,
                       vae_optimizer=vae_optimizer, critic_optimizer=critic_optimizer,
                       perturbation_optimizer=perturbation_optimizer)
    one_update = record_on_cuda(partial(update, args, data, actor, perturbation_target, critic_target,
                                        vae_optimizer, critic_optimizer, perturbation_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
