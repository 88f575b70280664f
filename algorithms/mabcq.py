"""MABCQ: offline RL for a team whose members learn alone; BCQ on reweighted transitions.

Jiang & Lu, "Offline Decentralized Multi-Agent Reinforcement Learning", ECAI 2023, arXiv 2108.01832;
its first version names the method MABCQ. It builds on BCQ (bcq.py).
Notes: Offline RL的研究热点 and the last reference (Jiang & Lu): offline multi-agent RL gets little
attention.

CAUTION. We could read the paper's abstract and beginning, and third parties' notes; there is no
public code. They support that each agent's data hold its own action only, what the two factors are
for, and (E6). How the factors enter a loss, what estimates them, and all settings but BCQ's are our
choice (D1 to D3). No number here can be compared with the paper's.

To an agent the others are part of the environment, and its data show them as they acted then. An s′
that needs them to act well is rare in the data, although they will learn to act well. MABCQ changes
the data's P(s′|s, a): value deviation makes good s′ likelier, and transition normalisation removes
the frequencies with which the other agents chose their actions.

  (E1) L_VAE = E_D[ ‖tanh g(s, z) − a‖² / A_i + ½ KL ],  z = μ(s, a) + σ(s, a)·ε,
       KL = 1/L Σ_l [ ½(μ_l² + σ_l² − 1) − log σ_l ]
  (E2) â = tanh g(s, z),  z = clip(ε, −½, ½),  ε ~ N(0, I)
  (E3) ã = clip( â + φ tanh ξ(s, â), −1, 1 )
  (E4) V(s′) = (1 − d) max_n [ λ min_k Q̄_k(s′, ã_n) + (1 − λ) max_k Q̄_k(s′, ã_n) ],
       y = r + γ V(s′),  N actions ã_n of (E2), (E3) with ξ̄
  (E5) L_M = E_D[ (M(s, a) − V(s′))² + 1/S Σ_j ( ½ u_j² + log ς_j ) ],
       u = ( (s′ − s) / scale − m(s, a) ) / ς(s, a)
  (E6) λ_vd = 1 + ( V(s′) − M(s, a) ) / |M(s, a)|,  value deviation
  (E7) λ_tn = 1 / P̂,  P̂ = exp( −½ (A − A_i) / S · Σ_j u_j² ),  transition normalisation
  (E8) w = clip(λ_vd, 1/c, c) · clip(λ_tn, 1/c, c), divided by its mean over the batch
  (E9) L_Q = Σ_k E_D[ w (Q_k(s, a) − y)² ]
  (E10) L_ξ = −E_D[ Q_1(s, ã) ],  one ã
  (E11) Q̄ ← Q̄ + rate · (Q − Q̄),  ξ̄ ← ξ̄ + rate · (ξ − ξ̄)
  (E12) acting: each agent by itself, the ã_n with the largest Q_1(s, ã_n), of 100

Shapes: B batch, S observation, A the team's action, A_i one agent's, L = 2A_i latent, K = 2
critics, N sampled actions; a is the agent's own action. In (E5) m and ς are mean and standard
deviation of a Gaussian, and scale is the data's standard deviation of s′ − s. d is terminated: a
truncated episode bootstraps. Observations are raw, actions lie in [-1, 1].

Differences, as far as the paper is known; also D1 and D2 of bcq.py:
  D1 M, the data's E[V(s′) | s, a], is regressed; the paper, we think, averages V over a model's s′.
  D2 P̂ is a Gaussian's density over its maximum, so that (E7) compares outcomes of one (s, a) only;
     the power (A − A_i) / S, as the others' actions spread s′ over so many of its S dimensions.
  D3 The factors weight the loss, clipped: λ_vd is negative where V is far below M. |M| has a floor.
  D4 All agents' data come from the same runs, in batches of their own; in the paper also from
     different runs.

Watch: weight_std stays below 1. If it grows, few transitions decide a batch: lower --weight-clip.
At 0, as with --no-reweight or one agent, this is independent BCQ. q_policy and kl as in bcq.py.

Run:     python algorithms/mabcq.py --env hopper-medium --agents 3     (baseline: --no-reweight)
Expect:  in short runs near independent BCQ on one medium-replay set and below it on another, one
         seed each, too few to rank them; games where it is right: tests/test_mabcq.py and
         results/lessons, 14. Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    steps: int = 1_000_000  # gradient updates [C bcq main.py]
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
    batch_size: int = 100  # transitions per update and agent [C bcq main.py]
    vae_lr: float = 1e-3  # Adam [C BCQ.py]
    actor_lr: float = 1e-3  # Adam, for the perturbation ξ [C BCQ.py]
    critic_lr: float = 1e-3  # Adam [C BCQ.py]
    model_lr: float = 1e-3  # Adam, for M and the Gaussian in (E5) [D1] [D2]
    gamma: float = 0.99  # discount γ [C bcq main.py]
    target_rate: float = 0.005  # share of the new weights in (E11) [C bcq main.py]
    # MABCQ; the first three are BCQ's
    max_perturbation: float = 0.05  # φ in (E3), of half the action range [C bcq main.py]
    num_samples: int = 10  # N in (E4), actions per next observation [C BCQ.py]
    min_weight: float = 0.75  # λ in (E4): 1 is the critics' minimum, ½ their mean [C bcq main.py]
    agents: int = 3  # each moves an equal part of the action, in order [C MARL-Mujoco, Hopper]
    reweight: bool = True  # (E5) to (E8); without, every agent is an independent BCQ [P]
    weight_clip: float = 10.0  # c in (E8) [D3]


HIDDEN = (400, 300)  # widths of perturbation, critics and models [C BCQ.py]
VAE_HIDDEN = (750, 750)  # [C BCQ.py]
VAE_LOG_STD_MIN, VAE_LOG_STD_MAX = -4.0, 15.0  # [C BCQ.py]
LATENT_CLIP = 0.5  # in (E2) [C BCQ.py]
ACT_SAMPLES = 100  # N in (E12) [C BCQ.py]
MODEL_LOG_STD_MIN, MODEL_LOG_STD_MAX = -5.0, 2.0  # of ς in (E5), in shares of the data's spread [=]


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
    """The team, one BCQ for each agent. All see the whole observation, and move their own part of
    the action; none sees what the others do."""

    def __init__(self, obs_dim: int, action_dim: int, agents: int = 1):
        super().__init__()
        self.init = [obs_dim, action_dim, agents]  # what load_policy rebuilds it from
        own_dim = action_dim // agents
        self.vaes = nn.ModuleList(VAE(obs_dim, own_dim) for _ in range(agents))
        self.perturbations = nn.ModuleList(Perturbation(obs_dim, own_dim) for _ in range(agents))
        self.critics = nn.ModuleList(Critic(obs_dim, own_dim) for _ in range(agents))
        latents = sample_latents(self.vaes[0], torch.zeros(agents, obs_dim), ACT_SAMPLES)
        self.register_buffer("latents", latents)  # (agents, N, L), as bcq.py
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        chosen = []
        for i, critic in enumerate(self.critics):
            z = self.latents[i].expand(obs.shape[0], -1, -1)
            actions = propose(self.vaes[i], self.perturbations[i], obs, z)  # (B, N, A_i)
            # (E12) each agent keeps the best of its own N actions
            best = value_actions(critic, obs, actions)[0].argmax(dim=1)  # (B,)
            chosen.append(actions[torch.arange(obs.shape[0], device=obs.device), best])  # (B, A_i)
        return self.action_mid + self.action_half * torch.cat(chosen, dim=1)


def outcome_model(obs_dim: int, action_dim: int) -> nn.ModuleDict:
    """What one agent's data say of s′: the mean M of its value, and a Gaussian of its change."""
    return nn.ModuleDict({
        "value": mlp(obs_dim + action_dim, *HIDDEN, 1),
        "change": mlp(obs_dim + action_dim, *HIDDEN, 2 * obs_dim),
    })


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
    z = mean + log_std.exp() * torch.randn_like(mean)
    # (E1) means, not sums: summed over latents the KL would weigh L times as much
    cloning = (torch.tanh(vae.decode(batch.obs, z)) - batch.action).pow(2).mean()
    kl = (0.5 * (mean.pow(2) + (2 * log_std).exp() - 1) - log_std).mean()
    return cloning + 0.5 * kl, cloning.detach(), kl.detach()


@torch.no_grad()
def td_target(vae: VAE, perturbation_target: Perturbation, critic_target: Critic, batch: Batch,
              args: Args) -> tuple[Tensor, Tensor]:
    """(E4): the value of s′ and the regression target y, (B,) each."""
    z = sample_latents(vae, batch.next_obs, args.num_samples)
    next_actions = propose(vae, perturbation_target, batch.next_obs, z)
    q = value_actions(critic_target, batch.next_obs, next_actions)  # (K, B, N)
    # (E4) first over critics, then over actions, as in bcq.py
    next_value = (1 - batch.terminated) * mix_critics(q, args.min_weight).amax(dim=1)
    return next_value, batch.reward + args.gamma * next_value


def outcome_loss(outcome: nn.ModuleDict, batch: Batch, next_value: Tensor,
                 scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E5); also M (B,) and u (B, S), which the weights need.

    Changes are in shares of their spread in the data, `scale` (S,).
    """
    x = torch.cat([batch.obs, batch.action], dim=-1)
    mean_value = outcome["value"](x).squeeze(-1)
    assert next_value.shape == mean_value.shape
    mean, log_std = outcome["change"](x).chunk(2, dim=-1)  # (B, S) each
    log_std = log_std.clamp(MODEL_LOG_STD_MIN, MODEL_LOG_STD_MAX)
    # a file without next observations does not hold what follows a termination: s itself stands
    # there, which must not count as rare, so P̂ = 1
    unknown = batch.terminated.bool() & (batch.next_obs == batch.obs).all(dim=-1)  # (B,)
    u = ((batch.next_obs - batch.obs) / scale - mean) / log_std.exp()
    u = u.masked_fill(unknown.unsqueeze(-1), 0)
    # (E5) a regression and a Gaussian's likelihood; they share no weights
    likelihood = (0.5 * u.pow(2) + log_std).masked_fill(unknown.unsqueeze(-1), 0)
    loss = (mean_value - next_value).pow(2).mean() + likelihood.mean()
    return loss, mean_value.detach(), u.detach()


def transition_weights(value: Tensor, mean_value: Tensor, u: Tensor, other_dims: int,
                       weight_clip: float) -> Tensor:
    """(E6) to (E8), (B,). Only ratios within one (s, a) matter to Q, so the mean may be 1."""
    # (E6) raises the mean of V from M to M + Var/|M|. Near M = 0, as at an episode's end, it would
    # be noise: |M| counts as at least a tenth of its mean over the batch [D3]
    size = mean_value.abs()
    deviation = 1 + (value - mean_value) / torch.maximum(size, 0.1 * size.mean() + 1e-6)
    # (E7) makes all s′ equally likely, also where luck decides and not the others
    normalization = torch.exp(0.5 * other_dims * u.pow(2).mean(dim=-1))
    # (E8)
    deviation = deviation.clamp(1 / weight_clip, weight_clip)
    weight = deviation * normalization.clamp(1 / weight_clip, weight_clip)
    return weight / weight.mean()


def critic_loss(critic: Critic, batch: Batch, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(E9); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == weight.shape == q.shape[1:], "a target (B, 1) would broadcast, and train"
    # (E9) a weight on a square acts like a weight on the transition's probability
    return (weight * (q - y).pow(2)).mean(dim=1).sum(), q.detach().mean()


def perturbation_loss(vae: VAE, perturbation: Perturbation, critic: Critic,
                      obs: Tensor) -> tuple[Tensor, Tensor]:
    """(E10); also the mean Q of the proposed actions."""
    action = propose(vae, perturbation, obs, sample_latents(vae, obs, 1))[:, 0]  # (B, A)
    # (E10) of the first critic alone
    q = critic(obs, action)[0].mean()
    return -q, q.detach()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E11) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update_agent(args: Args, data: Dataset, i: int, actor: Actor,
                 perturbation_targets: nn.ModuleList, critic_targets: nn.ModuleList,
                 outcomes: nn.ModuleList, scale: Tensor, optimizers: dict) -> dict[str, Tensor]:
    """One step of agent i by itself: VAE, weights (if there are models), Q, ξ, targets."""
    vae, perturbation, critic = actor.vaes[i], actor.perturbations[i], actor.critics[i]
    batch = data.sample(args.batch_size)
    # of the team's action (B, A) it sees its own part (B, A_i) only
    batch = batch._replace(action=batch.action.chunk(len(actor.vaes), dim=1)[i])

    behavior_loss, cloning, kl = vae_loss(vae, batch)
    descend(behavior_loss, optimizers[f"vae_optimizer{i}"])

    next_value, y = td_target(vae, perturbation_targets[i], critic_targets[i], batch, args)
    weight = torch.ones_like(y)
    if outcomes:
        model_loss, mean_value, u = outcome_loss(outcomes[i], batch, next_value, scale)
        descend(model_loss, optimizers[f"outcome_optimizer{i}"])
        other_dims = data.action_dim - batch.action.shape[1]
        weight = transition_weights(next_value, mean_value, u, other_dims, args.weight_clip)
    q_loss, q_data = critic_loss(critic, batch, y, weight)
    descend(q_loss, optimizers[f"critic_optimizer{i}"])

    xi_loss, q_policy = perturbation_loss(vae, perturbation, critic, batch.obs)
    descend(xi_loss, optimizers[f"perturbation_optimizer{i}"])

    # (E11)
    polyak_update(critic_targets[i], critic, args.target_rate)
    polyak_update(perturbation_targets[i], perturbation, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy,
            "cloning_error": cloning, "kl": kl, "weight_std": weight.std(correction=0)}


def update(args: Args, data: Dataset, actor: Actor, perturbation_targets: nn.ModuleList,
           critic_targets: nn.ModuleList, outcomes: nn.ModuleList, scale: Tensor,
           optimizers: dict) -> dict[str, Tensor]:
    """One step of each agent, on a batch of its own; the metrics are means over the agents."""
    metrics = []
    for i in range(len(actor.vaes)):
        metrics.append(update_agent(args, data, i, actor, perturbation_targets, critic_targets,
                                    outcomes, scale, optimizers))
    return {name: torch.stack([one[name] for one in metrics]).mean() for name in metrics[0]}


def train(args: Args) -> None:
    check_range(args, "batch_size num_samples weight_clip", 1)
    check_range(args, "vae_lr actor_lr critic_lr model_lr max_perturbation", 0)
    check_range(args, "gamma target_rate min_weight", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    if args.agents < 1 or data.action_dim % args.agents:
        fail(f"--agents {args.agents}: {data.name} has {data.action_dim} action dimensions; "
             "give a divisor of that")
    run = Run(args, data, variant="" if args.reweight else "-independent", gflop=9.52)

    actor = Actor(data.obs_dim, data.action_dim, args.agents).to(data.device)
    for perturbation in actor.perturbations:
        perturbation.bound.fill_(args.max_perturbation)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    outcomes = nn.ModuleList()
    if args.reweight and args.agents > 1:  # an agent alone has no others to reweight for
        for _ in range(args.agents):
            outcomes.append(outcome_model(data.obs_dim, data.action_dim // args.agents))
    outcomes.to(data.device)
    scale = (data.next_obs - data.obs).std(dim=0, correction=0).clamp(min=1e-6)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    optimizers = {}
    for name, networks, rate in (
        ("vae_optimizer", actor.vaes, args.vae_lr),
        ("critic_optimizer", actor.critics, args.critic_lr),
        ("perturbation_optimizer", actor.perturbations, args.actor_lr),
        ("outcome_optimizer", outcomes, args.model_lr),
    ):
        for i, network in enumerate(networks):
            optimizers[f"{name}{i}"] = adam(network.parameters(), lr=rate)
    learned = {
        "actor": actor,
        "perturbation_targets": copy.deepcopy(actor.perturbations),
        "critic_targets": copy.deepcopy(actor.critics),
        "outcomes": outcomes,
    }
    start = run.begin(learned | optimizers, actor)
    one_update = partial(update, args, data, **learned, scale=scale, optimizers=optimizers)
    one_update = record_on_cuda(one_update, data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
