"""MABCQ: offline RL for a team whose members learn alone; BCQ, with transitions weighted as if the others learnt too.

Jiang & Lu, "Offline Decentralized Multi-Agent Reinforcement Learning", arXiv 2108.01832 (its first version names the method
MABCQ), ECAI 2023. On top of BCQ: Fujimoto, Meger & Precup, ICML 2019, arXiv 1812.02900.
Notes: Offline RL的研究热点 and the last reference (Jiang & Lu). They note that offline multi-agent RL gets little attention.

CAUTION. Of the paper we could read the abstract, the beginning and third parties' notes, and found no code. They support that
each agent has data of its own action only, what the two factors are for, and (E6). How the factors enter a loss, what
estimates them, and all settings but BCQ's are our choice (D1 to D3), so no number here speaks about the paper's numbers.

To an agent the others are part of the environment, and its data show them as they acted then: an s′ that only needs them to
act well is rare, its worth averaged away. MABCQ changes the data's P(s′|s, a): value deviation makes good s′ likelier, as the
others will learn too; transition normalisation takes out how often they chose what, which differs between agents' data.

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A_i + ½ KL ],  z = μ(s, a) + σ(s, a)·ε
  (E2) â = tanh g(s, z),  z = clip(ε, −½, ½),  ε ~ N(0, I)
  (E3) ã = clip( â + φ tanh ξ(s, â), −1, 1 )
  (E4) V(s′) = (1 − d) max_n [ λ min_k Q̄_k(s′, ã_n) + (1 − λ) max_k Q̄_k(s′, ã_n) ],  y = r + γ V(s′)
  (E5) L_M = E_D[ (M(s, a) − V(s′))² + 1/S Σ_j ( ½ u_j² + log ς_j ) ],  u = ( (s′ − s) / scale − m(s, a) ) / ς(s, a)
  (E6) λ_vd = 1 + ( V(s′) − M(s, a) ) / |M(s, a)|                          value deviation; a constant added to r changes it
  (E7) λ_tn = 1 / P̂,  P̂ = exp( −½ (A − A_i) / S · Σ_j u_j² )              transition normalisation
  (E8) w = clip(λ_vd, 1/c, c) · clip(λ_tn, 1/c, c), divided by its mean over the batch
  (E9) L_Q = Σ_k E_D[ w (Q_k(s, a) − y)² ]
  (E10) L_ξ = −E_D[ Q_1(s, ã) ],  one ã
  (E11) Q̄ ← Q̄ + rate · (Q − Q̄),  ξ̄ ← ξ̄ + rate · (ξ − ξ̄)
  (E12) acting: each agent by itself, the ã_n with the largest Q_1(s, ã_n), of 100

Without (E5) to (E8) this is BCQ, for each agent and its own action a; one agent alone has weights 1, and is bcq.py bit for bit.
(E6) raises the mean of V from M to M + Var/|M|, (E7) makes all s′ equally likely, also where luck decides, not the others.

Shapes: B batch, S observation, A the team's action, A_i one agent's, L = 2A_i latent, K = 2 critics, N sampled actions. d is
terminated: a truncated episode bootstraps. Observations are raw, actions lie in [-1, 1].

Differences, as far as there is something to differ from; also D1 and D2 of bcq.py:
  D1 M, the data's E[V(s′) | s, a], is regressed, so knows of terminations; the paper, we believe, averages V over a model's s′.
  D2 P̂ is a Gaussian's density over its own largest value, so that (E7) compares outcomes of one (s, a) and not their spreads,
     to the power (A − A_i) / S: the others' actions spread s′ over so many dimensions, of which a Gaussian in S counts all.
  D3 The factors weight the loss, clipped: λ_vd is 0 where the robot fell, and negative where V is far below M. |M| has a floor.
  D4 All agents' data come from one team's runs here, in the paper also from different ones. Each agent draws its own batches.

Run:     python algorithms/mabcq.py --env hopper-medium --agents 3     (--no-reweight: independent BCQ, the baseline)
Expect:  halfcheetah-medium-replay, 2 agents: 28.6, independent 24.9 (the data 20, BC 16); 12,000 updates, about 40 minutes on a
         core. hopper-medium-replay, 3 agents: 9.9, independent 10.2 (the data 15, BC 18, bcq.py 13); 9,000 updates, 24 minutes.
         Seed 0 alone, and evaluations that swing between 10 and 30 on halfcheetah: the weights' worth is not to be seen here.
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
    steps: int = 1_000_000  # gradient updates [C bcq main.py]
    batch_size: int = 100  # transitions per update and agent [C bcq main.py]
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
    model_lr: float = 1e-3  # Adam, for M and the Gaussian in (E5) [D1][D2]
    gamma: float = 0.99  # discount γ [C bcq main.py]
    target_rate: float = 0.005  # share of the new weights in (E11) [C bcq main.py]
    # MABCQ; the first three are BCQ's
    max_perturbation: float = 0.05  # φ in (E3), of half the action range [C bcq main.py]
    num_samples: int = 10  # N in (E4), actions per next observation [C BCQ.py]
    min_weight: float = 0.75  # λ in (E4): 1 is the minimum of the critics, ½ their mean [C bcq main.py]
    agents: int = 3  # the action's dimensions are dealt out to them in equal parts, in order [C MARL-Mujoco, of its Hopper]
    reweight: bool = True  # (E5) to (E8); without, every agent is an independent BCQ [P]
    weight_clip: float = 10.0  # c in (E8) [D3]


HIDDEN = (400, 300)  # widths of perturbation, critics and models [C BCQ.py]
VAE_HIDDEN = (750, 750)  # [C BCQ.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C BCQ.py]
LATENT_CLIP = 0.5  # in (E2): actions far from the middle of the prior are hardly ever proposed [C BCQ.py]
ACT_SAMPLES = 100  # N in (E12) [C BCQ.py]
MODEL_LOG_STD_MIN, MODEL_LOG_STD_MAX = -5.0, 2.0  # of ς in (E5), in shares of the data's spread [=]


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
    """The team; one BCQ each. All see the whole observation, move their own part of the action, hear nothing of the others."""

    def __init__(self, obs_dim: int, action_dim: int, agents: int = 1):
        super().__init__()
        self.obs_dim, self.action_dim, own_dim = obs_dim, action_dim, action_dim // agents
        self.vaes = nn.ModuleList(VAE(obs_dim, own_dim) for _ in range(agents))
        self.perturbations = nn.ModuleList(Perturbation(obs_dim, own_dim) for _ in range(agents))
        self.critics = nn.ModuleList(Critic(obs_dim, own_dim) for _ in range(agents))
        self.register_buffer("latents", sample_latents(self.vaes[0], torch.zeros(agents, obs_dim), ACT_SAMPLES))  # as bcq.py
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def load_state_dict(self, state: dict, *rest, **options):
        """Actor(obs_dim, action_dim) becomes any saved team: how many it is of, its latents (agents, N, L) say."""
        if len(state["latents"]) != len(self.latents):
            self.__init__(self.obs_dim, self.action_dim, len(state["latents"]))
        return super().load_state_dict(state, *rest, **options)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        chosen = []
        for vae, perturbation, critic, z in zip(self.vaes, self.perturbations, self.critics, self.latents):
            actions = propose(vae, perturbation, obs, z.expand(len(obs), -1, -1))
            # (E12)
            best = value_actions(critic, obs, actions)[0].argmax(dim=1)  # (B,)
            chosen.append(actions[torch.arange(len(obs), device=obs.device), best])  # (B, A_i)
        return self.action_mid + self.action_half * torch.cat(chosen, dim=1)


def outcome_model(obs_dim: int, action_dim: int) -> nn.ModuleDict:
    """What one agent's data say of s′ given s and its own action: the mean M of its value, and a Gaussian of its change."""
    return nn.ModuleDict({"value": mlp(obs_dim + action_dim, *HIDDEN, 1),
                          "change": mlp(obs_dim + action_dim, *HIDDEN, 2 * obs_dim)})


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
def td_target(vae: VAE, perturbation_target: Perturbation, critic_target: Critic, batch: Batch,
              args: Args) -> tuple[Tensor, Tensor]:
    """(E4): the value of s′ and the regression target y, (B,) each. The VAE has no target copy, ξ has."""
    z = sample_latents(vae, batch.next_obs, args.num_samples)
    q = value_actions(critic_target, batch.next_obs, propose(vae, perturbation_target, batch.next_obs, z))  # (K, B, N)
    # (E4) first the critics, then the actions: the other order would pair one action's minimum with another's maximum
    next_value = (1 - batch.terminated) * mix_critics(q, args.min_weight).amax(dim=1)
    return next_value, batch.reward + args.gamma * next_value


def outcome_loss(outcome: nn.ModuleDict, batch: Batch, next_value: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E5), changes in shares of their spread in the data, `scale` (S,); also M (B,) and u (B, S), which the weights need."""
    x = torch.cat([batch.obs, batch.action], dim=-1)
    mean_value = outcome["value"](x).squeeze(-1)
    assert next_value.shape == mean_value.shape
    mean, log_std = outcome["change"](x).chunk(2, dim=-1)  # (B, S) each
    log_std = log_std.clamp(MODEL_LOG_STD_MIN, MODEL_LOG_STD_MAX)
    # (E5)
    u = ((batch.next_obs - batch.obs) / scale - mean) / log_std.exp()
    loss = (mean_value - next_value).pow(2).mean() + (0.5 * u.pow(2) + log_std).mean()
    return loss, mean_value.detach(), u.detach()


def transition_weights(value: Tensor, mean_value: Tensor, u: Tensor, other_dims: int, weight_clip: float) -> Tensor:
    """(E6) to (E8), (B,). Only the ratios of weights within one (s, a) change what Q fits, so their mean may as well be 1."""
    # (E6) near M = 0, as at an episode's end, it would be noise: |M| is at least a tenth of its mean over the batch [D3]
    size = mean_value.abs()
    deviation = 1 + (value - mean_value) / torch.maximum(size, 0.1 * size.mean() + 1e-6)
    # (E7)
    normalization = torch.exp(0.5 * other_dims * u.pow(2).mean(dim=-1))
    # (E8)
    weight = deviation.clamp(1 / weight_clip, weight_clip) * normalization.clamp(1 / weight_clip, weight_clip)
    return weight / weight.mean()


def critic_loss(critic: Critic, batch: Batch, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(E9): weights of the squares reweight the probabilities under which Q is the mean of y. Also the mean Q of the data."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == weight.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E9)
    return (weight * (q - y).pow(2)).mean(dim=1).sum(), q.detach().mean()


def perturbation_loss(vae: VAE, perturbation: Perturbation, critic: Critic, obs: Tensor) -> tuple[Tensor, Tensor]:
    """(E10); also the mean Q of the proposed actions."""
    action = propose(vae, perturbation, obs, sample_latents(vae, obs, 1))[:, 0]  # (B, A)
    # (E10)
    q = critic(obs, action)[0].mean()
    return -q, q.detach()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E11) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, perturbation_targets: nn.ModuleList, critic_targets: nn.ModuleList,
           outcomes: nn.ModuleList, scale: Tensor, optimizers: dict[str, list]) -> dict[str, Tensor]:
    """One step of each agent, by itself, on a batch of its own: VAE, weights (if there are `outcomes`), Q, ξ, targets."""
    metrics = []
    for i, (vae, perturbation, critic) in enumerate(zip(actor.vaes, actor.perturbations, actor.critics)):
        batch = data.sample(args.batch_size)
        batch = batch._replace(action=batch.action.chunk(len(actor.vaes), dim=1)[i])  # (B, A_i), all it may see of (B, A)

        behavior_loss, cloning, kl = vae_loss(vae, batch)
        descend(behavior_loss, optimizers["vae"][i])

        next_value, y = td_target(vae, perturbation_targets[i], critic_targets[i], batch, args)
        weight = torch.ones_like(y)
        if outcomes:
            model_loss, mean_value, u = outcome_loss(outcomes[i], batch, next_value, scale)
            descend(model_loss, optimizers["outcome"][i])
            weight = transition_weights(next_value, mean_value, u, data.action_dim - batch.action.shape[1], args.weight_clip)
        q_loss, q_data = critic_loss(critic, batch, y, weight)
        descend(q_loss, optimizers["critic"][i])

        xi_loss, q_policy = perturbation_loss(vae, perturbation, critic, batch.obs)
        descend(xi_loss, optimizers["perturbation"][i])

        # (E11)
        polyak_update(critic_targets[i], critic, args.target_rate)
        polyak_update(perturbation_targets[i], perturbation, args.target_rate)
        metrics.append({"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "cloning_error": cloning,
                        "kl": kl, "weight_std": weight.std(correction=0)})
    return {name: torch.stack([one[name] for one in metrics]).mean() for name in metrics[0]}


def train(args: Args) -> None:
    check(args.num_samples > 0, f"--num-samples must be at least 1, not {args.num_samples}")
    check(args.max_perturbation >= 0, f"--max-perturbation must be at least 0, not {args.max_perturbation}")
    check(args.weight_clip >= 1, f"--weight-clip must be at least 1, not {args.weight_clip}")
    data = load_dataset(args.env, args.device)
    check(args.agents > 0 and data.action_dim % args.agents == 0,
          f"--agents {args.agents}: {data.name} has {data.action_dim} action dimensions, give a divisor of that")
    run = Run(args, data, variant="" if args.reweight else "-independent")
    actor = Actor(data.obs_dim, data.action_dim, args.agents).to(data.device)
    for perturbation in actor.perturbations:
        perturbation.bound.fill_(args.max_perturbation)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    perturbation_targets, critic_targets = copy.deepcopy(actor.perturbations), copy.deepcopy(actor.critics)
    models = args.agents if args.reweight and args.agents > 1 else 0  # alone there is nobody whose learning to expect
    outcomes = nn.ModuleList(outcome_model(data.obs_dim, data.action_dim // args.agents) for _ in range(models)).to(data.device)
    seen = data.columns(data.packed)
    scale = (seen.next_obs - seen.obs).std(dim=0, correction=0).clamp(min=1e-6)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    nets = {"vae": (actor.vaes, args.vae_lr), "critic": (actor.critics, args.critic_lr),
            "perturbation": (actor.perturbations, args.actor_lr), "outcome": (outcomes, args.model_lr)}
    optimizers = {name: [adam(net.parameters(), lr=lr) for net in team] for name, (team, lr) in nets.items()}
    start = run.resume(actor=actor, perturbation_targets=perturbation_targets, critic_targets=critic_targets, outcomes=outcomes,
                       **{f"{name}_optimizer{i}": one for name, team in optimizers.items() for i, one in enumerate(team)})
    one_update = record_on_cuda(partial(update, args, data, actor, perturbation_targets, critic_targets, outcomes, scale,
                                        optimizers), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
