"""PLAS: Policy in the Latent Action Space.

Zhou, Bajracharya & Held, "PLAS: Latent Action Space for Offline Reinforcement Learning", CoRL 2020,
arXiv 2011.07213.
Notes: Policy Constraints (软约束); Valuable Github Repo lists it.

A conditional VAE (encoder m, σ; decoder g) first learns to reproduce the data's actions, as in
bcq.py; then it is fixed. The policy's network h chooses a latent z, and the decoder turns it into
an action like the data's, or one between them. So the constraint lies in what the policy can
express; no penalty and no weight is needed.

          what stands for the data's policy    where it acts
  BCQ     VAE, trained alongside Q             proposes all actions, of target and policy
  BEAR    VAE, trained alongside Q             MMD from its samples, in the policy's loss
  PLAS    VAE, trained first, then fixed       decodes the policy's latent into the action
  BRAC    Gaussian clone, trained first        KL from it, in the policy's loss (-v: target too)

  Stage 1, the VAE:
  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A + ½ KL ],  z = m(s, a) + σ(s, a)·ε,  ε ~ N(0, I),
       KL = 1/L Σ_l [ ½(m_l² + σ_l² − 1) − log σ_l ]
  Stage 2, with g fixed:
  (E2) π(s) = tanh g(s, z),  z = Z tanh h(s)
  (E3) y = r + γ (1 − d) [ λ min_k Q̄_k(s′, π̄(s′)) + (1 − λ) max_k Q̄_k(s′, π̄(s′)) ],  π̄ with h̄
  (E4) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E5) L_h = −E_D[ Q_1(s, π(s)) ],  its gradient passes through g to h
  (E6) Q̄ ← Q̄ + rate · (Q − Q̄),  h̄ ← h̄ + rate · (h − h̄)

BCQ clips the latents that it draws to ±½. Here they reach ±Z = ±2, two standard deviations of the
prior; farther out the decoder has seen almost no training.

Shapes: B batch, S observation, A action, L = 2A latent, K = 2 critics. d is terminated: a truncated
episode bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the
environment's units.

Differences from the official code (Wenxuan-Zhou/PLAS), which we follow:
  D1 PLAS alone, as by default there (--phi 0), without PLAS+P's perturbation; bcq.py shows one.
  D2 A run with |mean target Q| above 10⁶ continues; the code stops there.
  D3 The VAE's rate is 1e-3. With the code's 1e-4, 20,000 steps of stage 1 led to less than half
     the score on hopper-medium (results/README.md).

Watch: cloning_error and kl, printed at the end of stage 1. A high cloning_error means that the VAE
needs more --vae-steps or a larger --vae-lr; no policy can repair it. kl near 0 means that g ignores
z, so that h can change little. That is right for data of one policy, where there is nothing to
encode; data of many policies leave h more to choose from. In stage 2 q_policy stays near q_data;
both may be too high all the same, as after 80,000 steps on hopper-medium-replay.

Run:     python algorithms/plas.py --env hopper-medium
Expect:  about a clone's score on hopper-medium, far above one on its replay buffer, after 80,000
         updates and a VAE's fit of 50,000; below a clone where that fit is short.
         Scores and curves: results/README.md.
"""
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check_range, fail, load_dataset, record_on_cuda

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 500_000  # gradient updates of stage 2 [C main.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [=]
    eval_episodes: int = 10  # per evaluation; 0: none [C main.py]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 100  # transitions per update, in both stages [C main.py]
    vae_lr: float = 1e-3  # Adam; the official code has 1e-4 [D3]
    actor_lr: float = 1e-4  # Adam, for h; the class's own default is 1e-3 [C main.py]
    critic_lr: float = 1e-3  # Adam [C main.py]
    gamma: float = 0.99  # discount γ [C algos.py]
    target_rate: float = 0.005  # share of the new weights in (E6) [C main.py]
    # PLAS
    vae_steps: int = 500_000  # gradient updates of stage 1 [C main.py]
    max_latent: float = 2.0  # Z in (E2) [C main.py]
    min_weight: float = 0.75  # λ in (E3): 1 is the critics' minimum, ½ their mean [C algos.py]


HIDDEN = (400, 300)  # widths of h and critics [C algos.py]
VAE_HIDDEN = (750, 750)  # [C algos.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C algos.py]
FIT_SAVE_EVERY = 20_000  # updates of the fit before step 1 between two checkpoints [=]


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


class LatentPolicy(nn.Module):
    """h with its bound Z: which latent (B, L) to decode."""

    def __init__(self, obs_dim: int, latent_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, latent_dim)
        self.register_buffer("bound", torch.zeros(()))

    def forward(self, obs: Tensor) -> Tensor:
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
    """All that acting needs: h and the VAE. It takes raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.vae = VAE(obs_dim, action_dim)
        self.latent_policy = LatentPolicy(obs_dim, self.vae.latent_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        action = decoded_action(self.vae, self.latent_policy, obs)
        return self.action_mid + self.action_half * action


def decoded_action(vae: VAE, latent_policy: LatentPolicy, obs: Tensor) -> Tensor:
    """(E2): π(s), (B, A) in [-1, 1]."""
    # (E2) not under no_grad: the policy learns through the decoder, which itself stays fixed
    return torch.tanh(vae.decode(obs, latent_policy(obs)))


def mix_critics(q: Tensor, min_weight: float) -> Tensor:
    """(E3): (K, ...) -> (...), mostly the smallest critic: a penalty for their disagreement."""
    return min_weight * q.amin(dim=0) + (1 - min_weight) * q.amax(dim=0)


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(E1); also its two parts, the cloning error and the KL divergence."""
    mean, log_std = vae.encode(batch.obs, batch.action)
    z = mean + log_std.exp() * torch.randn_like(mean)
    # (E1) means, not sums: summed over latents the KL would weigh L times as much
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


@torch.no_grad()
def td_target(vae: VAE, latent_target: LatentPolicy, critic_target: Critic, batch: Batch,
              args: Args) -> Tensor:
    """(E3): the regression target y, (B,)."""
    next_action = decoded_action(vae, latent_target, batch.next_obs)
    # (E3) one action per observation: no noise, no maximum over candidates
    next_q = mix_critics(critic_target(batch.next_obs, next_action), args.min_weight)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_q


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E4); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E4)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(vae: VAE, latent_policy: LatentPolicy, critic: Critic,
               obs: Tensor) -> tuple[Tensor, Tensor]:
    """(E5); also the mean Q of the policy's actions."""
    # (E5) of the first critic alone
    q = critic(obs, decoded_action(vae, latent_policy, obs))[0].mean()
    return -q, q.detach()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
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


def update(args: Args, data: Dataset, actor: Actor, latent_target: LatentPolicy, critic: Critic,
           critic_target: Critic, actor_optimizer, critic_optimizer) -> dict[str, Tensor]:
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


def fit_first(what: str, one_update: Callable, count: Tensor, steps: int, run: Run) -> None:
    """The fit before step 1. It starts at update `count`, which is above 0 in a resumed run."""
    run.unsaved = True  # Ctrl-C waits until it is saved
    pause = 0.2 if sys.stderr.isatty() else 30  # seconds between two states of the bar
    bar = tqdm(range(int(count), steps), desc=what, unit=" updates", leave=False,
               mininterval=pause)
    for _ in bar:
        metrics = one_update()
        count += 1
        if not run.stop and int(count) % FIT_SAVE_EVERY and int(count) < steps:
            continue
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                run.close()
                fail(f"{name} of the {what} is {value} by update {int(count):,}")
        run.since = time.time()  # the fit's time does not count in updates per second
        run.save(0)
        run.unsaved = True  # what follows
        if run.stop:
            break
    tqdm.write(f"{what}: " + " ".join(f"{name} {value:.3g}" for name, value in values.items()))
    if run.stop:
        run.close()
        fail(f"stopped after update {int(count):,} of the {what}; --resume continues from there")


def train(args: Args) -> None:
    check_range(args, "batch_size vae_steps", 1)
    check_range(args, "vae_lr actor_lr critic_lr", 0)
    check_range(args, "gamma target_rate min_weight", 0, 1)
    if not args.max_latent > 0:
        fail(f"--max-latent must be above 0, not {args.max_latent}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=0.75)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.latent_policy.bound.fill_(args.max_latent)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    vae_optimizer = adam(actor.vae.parameters(), lr=args.vae_lr)  # of stage 1
    fitted = torch.zeros((), dtype=torch.long)  # updates of stage 1 so far
    learned = {
        "actor": actor,
        "latent_target": copy.deepcopy(actor.latent_policy),
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "actor_optimizer": adam(actor.latent_policy.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
    }
    start = run.begin(learned | {"vae_optimizer": vae_optimizer, "fitted": fitted}, actor)
    if fitted < args.vae_steps:
        one_fit = partial(update_vae, args, data, actor.vae, vae_optimizer)
        fit_first("VAE", record_on_cuda(one_fit, data.device), fitted, args.vae_steps, run)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
