"""BCQ: Batch-Constrained deep Q-learning, for continuous actions.

Fujimoto, Meger & Precup, "Off-Policy Deep Reinforcement Learning without Exploration", ICML 2019,
arXiv 1812.02900.
Notes: Policy Constraints (软约束) › BCQ. They print the rule for tables: a maximum over the actions
that the data hold for s′. With continuous states no s′ comes twice, so a generative model stands
in. With a perfect model, enough actions, one critic, no ξ and no clip of z, (E4) is the notes'
rule.

Q is only right near the data, so a maximum of Q over all actions would pick its errors. BCQ takes
the maximum over a few actions that are likely under the data: a conditional VAE proposes them, and
a small network ξ, trained on Q, moves each by at most φ. There is no other policy: to act, propose
actions, move them, and take the one with the largest Q.

          what stands for the data's policy    where it acts
  BCQ     VAE, trained alongside Q             proposes all actions, of target and policy
  BEAR    VAE, trained alongside Q             MMD from its samples, in the policy's loss
  PLAS    VAE, trained first, then fixed       decodes the policy's latent into the action
  BRAC    Gaussian clone, trained first        KL from it, in the policy's loss (-v: target too)

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = μ(s, a) + σ(s, a)·ε,
       KL = 1/L Σ_l [ ½(μ_l² + σ_l² − 1) − log σ_l ]
  (E2) â = tanh g(s, z),  z = clip(ε, −½, ½),  ε ~ N(0, I)
  (E3) ã = clip( â + φ tanh ξ(s, â), −1, 1 )
  (E4) y = r + γ (1 − d) max_n [ λ min_k Q̄_k(s′, ã_n) + (1 − λ) max_k Q̄_k(s′, ã_n) ],
       N actions ã_n of (E2), (E3) with ξ̄
  (E5) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E6) L_ξ = −E_D[ Q_1(s, ã) ],  one ã
  (E7) Q̄ ← Q̄ + rate · (Q − Q̄),  ξ̄ ← ξ̄ + rate · (ξ − ξ̄)
  (E8) acting: the ã_n with the largest Q_1(s, ã_n), of 100

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics, N actions per observation.
d is terminated: a truncated episode bootstraps. g is the VAE's decoder, μ and σ are its encoder's
mean and standard deviation. Observations are raw, actions lie in [-1, 1]; the actor converts them
to the environment's units.

Differences from the official code (sfujim/BCQ, continuous_BCQ), which we follow:
  D1 (E8) uses the same 100 latents in every state, drawn once and saved with the policy; the code
     draws new ones at each step. So a saved policy is a function, and its score can be repeated.
  D2 φ is a share of each dimension's half range; the code has one largest action for all.

Watch: q_policy stays near q_data. If it grows without bound, the moved actions have left the data:
lower --max-perturbation. kl near 0 means that the VAE ignores z, and only φ leaves a choice. That
is right for data of one policy, where there is nothing to encode: z pays for its KL only where the
actions of one state have a variance above ⅛.

Run:     python algorithms/bcq.py --env hopper-medium
Expect:  a slow start: about a clone's score on hopper-medium and on its replay buffer when the runs
         of 24,000 and 28,000 updates end, one seed each. Scores and curves: results/README.md.
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
    steps: int = 1_000_000  # gradient updates [C main.py]
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
    batch_size: int = 100  # transitions per update [C main.py]
    vae_lr: float = 1e-3  # Adam [C BCQ.py]
    actor_lr: float = 1e-3  # Adam, for the perturbation ξ [C BCQ.py]
    critic_lr: float = 1e-3  # Adam [C BCQ.py]
    gamma: float = 0.99  # discount γ [C main.py]
    target_rate: float = 0.005  # share of the new weights in (E7) [C main.py]
    # BCQ
    max_perturbation: float = 0.05  # φ in (E3), of half the action range [C main.py]
    num_samples: int = 10  # N in (E4), actions per next observation [C BCQ.py]
    min_weight: float = 0.75  # λ in (E4): 1 is the critics' minimum, ½ their mean [C main.py]


HIDDEN = (400, 300)  # widths of perturbation and critics [C BCQ.py]
VAE_HIDDEN = (750, 750)  # [C BCQ.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C BCQ.py]
LATENT_CLIP = 0.5  # in (E2) [C BCQ.py]
ACT_SAMPLES = 100  # N in (E8) [C BCQ.py]


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


class Perturbation(nn.Module):
    """ξ with its bound φ: moves an action (..., A) a little, to where Q is larger."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, *HIDDEN, action_dim)
        self.register_buffer("bound", torch.zeros(()))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        shift = self.bound * torch.tanh(self.net(torch.cat([obs, action], dim=-1)))
        # (E3) bounded twice: at most φ away from the proposal, and within the action range
        return (action + shift).clamp(-1, 1)


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
    """All that acting needs: the VAE proposes, ξ moves, Q_1 chooses. It takes raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.vae = VAE(obs_dim, action_dim)
        self.perturbation = Perturbation(obs_dim, action_dim)
        self.critic = Critic(obs_dim, action_dim)
        latents = sample_latents(self.vae, torch.zeros(1, obs_dim), ACT_SAMPLES)
        self.register_buffer("latents", latents)  # (1, N, L) [D1]
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        z = self.latents.expand(obs.shape[0], -1, -1)
        actions = propose(self.vae, self.perturbation, obs, z)  # (B, N, A)
        # (E8) each observation keeps the best of its own N actions
        best = value_actions(self.critic, obs, actions)[0].argmax(dim=1)  # (B,)
        action = actions[torch.arange(obs.shape[0], device=obs.device), best]
        return self.action_mid + self.action_half * action


def sample_latents(vae: VAE, obs: Tensor, num: int) -> Tensor:
    """(E2): N latents for each observation, (B, N, L)."""
    z = torch.randn(len(obs), num, vae.latent_dim, device=obs.device)
    # (E2) clipped to the middle of the prior, where the VAE's actions are likely under the data
    return z.clamp(-LATENT_CLIP, LATENT_CLIP)


def propose(vae: VAE, perturbation: Perturbation, obs: Tensor, z: Tensor) -> Tensor:
    """(E2), (E3): for latents (B, N, L) the actions (B, N, A). Only ξ gets a gradient."""
    obs = obs.unsqueeze(1).expand(-1, z.shape[1], -1)  # (B, N, S)
    with torch.no_grad():
        action = torch.tanh(vae.decode(obs, z))
    return perturbation(obs, action)


def value_actions(critic: Critic, obs: Tensor, actions: Tensor) -> Tensor:
    """Q of N actions for each observation: (B, S), (B, N, A) -> (K, B, N)."""
    batch_size, num, action_dim = actions.shape
    # repeat_interleave, not repeat: row b·N + n of both inputs must belong to observation b
    obs = obs.repeat_interleave(num, dim=0)
    return critic(obs, actions.reshape(-1, action_dim)).view(-1, batch_size, num)


def mix_critics(q: Tensor, min_weight: float) -> Tensor:
    """(E4): (K, ...) -> (...), mostly the smallest critic: a penalty for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)  # not clipped: (E2) is for proposals
    # (E1) means, not sums: summed over latents the KL would weigh L times as much
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


@torch.no_grad()
def td_target(vae: VAE, perturbation_target: Perturbation, critic_target: Critic, batch: Batch,
              args: Args) -> Tensor:
    """(E4): the regression target y, (B,). The VAE has no target copy, ξ has one."""
    z = sample_latents(vae, batch.next_obs, args.num_samples)
    next_actions = propose(vae, perturbation_target, batch.next_obs, z)
    q = value_actions(critic_target, batch.next_obs, next_actions)  # (K, B, N)
    # (E4) first over critics, then over actions: otherwise the minimum of one action would be
    # mixed with the maximum of another
    next_q = mix_critics(q, args.min_weight).amax(dim=1)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_q


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E5); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E5)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def perturbation_loss(vae: VAE, perturbation: Perturbation, critic: Critic,
                      obs: Tensor) -> tuple[Tensor, Tensor]:
    """(E6); also the mean Q of the proposed actions."""
    action = propose(vae, perturbation, obs, sample_latents(vae, obs, 1))[:, 0]  # (B, A)
    # (E6) of the first critic alone
    q = critic(obs, action)[0].mean()
    return -q, q.detach()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E7) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, perturbation_target: Perturbation,
           critic_target: Critic, vae_optimizer, critic_optimizer,
           perturbation_optimizer) -> dict[str, Tensor]:
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
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy,
            "cloning_error": cloning, "kl": kl}


def train(args: Args) -> None:
    check_range(args, "batch_size num_samples", 1)
    check_range(args, "vae_lr actor_lr critic_lr max_perturbation", 0)
    check_range(args, "gamma target_rate min_weight", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=3.05)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.perturbation.bound.fill_(args.max_perturbation)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "perturbation_target": copy.deepcopy(actor.perturbation),
        "critic_target": copy.deepcopy(actor.critic),
        "vae_optimizer": adam(actor.vae.parameters(), lr=args.vae_lr),
        "critic_optimizer": adam(actor.critic.parameters(), lr=args.critic_lr),
        "perturbation_optimizer": adam(actor.perturbation.parameters(), lr=args.actor_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
