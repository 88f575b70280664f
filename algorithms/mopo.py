"""MOPO: SAC in a learned model of the environment, whose rewards are lowered where the model is uncertain.

Yu, Thomas, Yu, Ermon, Zou, Levine, Finn & Ma, "MOPO: Model-based Offline Policy Optimization", NeurIPS 2020, arXiv 2005.13239.
Notes: Model-Based Offline RL › MOPO. (Their u = max_j ‖Σ_j‖_F is the paper's; in the code Σ is of standard deviations: (E6).)

A model can be asked about actions that the data lack, but there its answers are guesses. MOPO imagines a few steps from states
of the data and fines each by the standard deviation that the model admits to: where the fine bounds the model's error, the
imagined return is a lower bound of the real one. Side by side: mopo.py fines, morel.py halts, combo.py pushes Q down.

  (E1) log σ²_m = L + softplus( U − softplus(U − l_m) − L ),  μ_m and l_m network m's outputs at (s, a), L and U learned
  (E2) L_model = Σ_m mean[ (μ_m − y)² / σ²_m + log σ²_m ] + Σ_i c_i ‖W_i‖² / 2 + 0.01 Σ(U − L),  y = [s′ − s, r]
  (E3) keep m's weights whenever its holdout error (μ_m − y)² has fallen by over 1%; the best 5 of 7 networks are the elites
  (E4) [ŝ′ − s, r̂] ~ N(μ_e, σ²_e), a ~ π(·|s), e a new elite each step;  (E5) d̂ = 1 where the body falls at ŝ′: the rollout ends
  (E6) r̃ = r̂ − λ u(s, a),  u = max_m ‖σ_m(s, a)‖₂
  (E7) ã = tanh(u), u = μ(s) + σ(s)·ε,  log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E8) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − α log π(ã′|s′) ),  ã′ ~ π(·|s′),  over 5% real and 95% imagined steps
  (E9) L_Q = Σ_k E[ (Q_k(s, a) − y)² ]
  (E10) L_π = E[ α log π(ã|s) − min_k Q_k(s, ã) ],  (E11) L_α = E[ −log α · (log π(ã|s) + H̄) ],  ã ~ π(·|s), H̄ = −dim(A)
  (E12) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, M = 7 networks of the model, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the paper and the official code (tianheyu927/mopo):
  D1 10,000 starts per rollout; the code's 50,000 would take a third of a CPU's time, to draw each row once, not 5 times.
  D2 H̄ = −dim(A) [OfflineRL-Kit], not −3 for every body; no spectral norm, which the paper tells of and the code lacks.
  D3 The model has dynamics_epochs at most; the code waits for (E3) alone, which takes hours with a million transitions.
  D4 A termination's next state is the real one; the code's loader has the next episode's first there, and fits the jump.
  D5 Hopper's |s′| < 100 holds on both sides; in the code a misplaced parenthesis leaves the upper one.
  D6 Q, π, α, targets one after the other; targets start as copies; PyTorch's initialisation, and no ½ in (E9), as in sac.py.

Run:     python algorithms/mopo.py --env hopper-medium
Expect:  hopper-medium 15.2 (the data 44, BC 47 and 54), without the fine 6.6; 100,000 updates, a tenth of the default, in a
         model of 10 epochs, seed 0, in 35 minutes on a core. Bad, but one sees what the fine does. At the start of an episode Q
         promises 177 and π earns 193, discounted; without the fine 1,456 and 118. Where π takes the real robot, u is 0.17 and
         the model's error 0.09 (of the spread of s′ − s); without the fine 0.82 and 0.26.
         halfcheetah-medium-replay 48.1 (the data 20, BC 16), without the fine 44.0; as many updates, 30 epochs, 28 minutes.
         Here no robot falls, u is 2.9 at the data's actions and at random ones, and the fine decides little: along π's way u is
         2.1 and the error 0.07, without it 3.2 and 0.08. Q, still growing, promises 92, 472 is earned; without it 307 and 432.
         pendulum-medium-replay (the data −1148, a clone the same): −486, −430, −275 after 3,000 updates in a model of 15
         epochs, seeds 0 to 2; with 7 epochs −1170 and −1573.
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
from common import LEVELS, Batch, Dataset, Run, check, load_dataset, record_on_cuda, write_atomically


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [C d4rl/base.py]
    batch_size: int = 256  # transitions per update [C d4rl/base.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [P]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-4  # Adam, for π and α [C d4rl/base.py]
    critic_lr: float = 3e-4  # Adam [C d4rl/base.py]
    gamma: float = 0.99  # discount γ [C d4rl/base.py]
    target_rate: float = 0.005  # share of the new weights in (E12) [C d4rl/base.py]
    # MOPO
    dynamics_epochs: int = 100  # at most, through the data, for (E2); mostly (E3) stops earlier [D3]
    rollout_every: int = 1_000  # updates between rollouts [C d4rl/base_mopo.py]
    rollout_starts: int = 10_000  # states of the data that a rollout starts from [D1]
    horizon: int = 5  # steps that a rollout goes; suite datasets have their own in TUNED [P Table 6]
    penalty_weight: float = 1.0  # λ in (E6); suite datasets have their own in TUNED [P Table 6]
    retain: int = 5  # rollouts that the pool has room for, the newest [C d4rl/base_mopo.py]
    real_share: float = 0.05  # of a batch, rounded down [P App. G.2][C d4rl/base_mopo.py]


TUNED = {f"{body}-{level}": dict(horizon=horizon, penalty_weight=weight) for body, best in {  # for v0's data [P Table 6]
    "halfcheetah": ((5, 0.5), (1, 1.0), (5, 1.0), (5, 1.0)),  # random, medium, medium-replay, medium-expert (code: λ 5)
    "hopper": ((5, 1.0), (5, 5.0), (5, 1.0), (5, 1.0)),
    "walker2d": ((1, 1.0), (5, 5.0), (1, 1.0), (1, 2.0)),
}.items() for level, (horizon, weight) in zip(LEVELS, best)}
HIDDEN = (256, 256)  # widths of actor and critics [C d4rl/base.py]
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # [C]
NETWORKS, ELITES, DYNAMICS_HIDDEN = 7, 5, (200, 200, 200, 200)  # of the model [P App. G.2][C constructor.py]
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # c_i in (E2), of layer i [C constructor.py]
DYNAMICS_LR, DYNAMICS_BATCH = 1e-3, 256  # Adam; rows of each network [C bnn.py]
MAX_HOLDOUT, PATIENCE = 1_000, 5  # rows, or a fifth of the data; epochs that may pass without (E3) [P App. G.2][C bnn.py]
FALLS = {  # (E5) by body: next_obs (B, S) -> whether the episode is over, (B,); exactly the conditions of Gymnasium's v5
    "Hopper-v5": lambda s: ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1)),
    "Walker2d-v5": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2) & (s[:, 1].abs() < 1)),
    **dict.fromkeys(("HalfCheetah-v5", "Pendulum-v1"), lambda s: torch.zeros_like(s[:, 0], dtype=torch.bool)),
}


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


class Actor(nn.Module):
    """Tanh-Gaussian π(a|s) on [-1, 1]^A. Its buffers hold the units, so a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of u, the action before tanh: (B, A) each."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's actions (B, A), without noise: tanh of the mean."""
        return self.action_mid + self.action_half * torch.tanh(self(obs)[0])


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E7) actions (..., A) drawn with the reparameterisation trick, and their log-densities (...)."""
    # (E7)
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 − tanh²u) without overflow
    return torch.tanh(u), log_prob.sum(-1)


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


class Dynamics(nn.Module):
    """M Gaussians over y = [next_obs − obs | reward], given x = [obs | action], which it standardises itself."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        widths = (obs_dim + action_dim, *DYNAMICS_HIDDEN, 2 * (obs_dim + 1))
        self.layers = nn.ModuleList(EnsembleLinear(NETWORKS, i, o) for i, o in zip(widths, widths[1:]))
        for layer in self.layers:  # weights within 2 standard deviations of ½ / √inputs
            nn.init.trunc_normal_(layer.weight).data.mul_(0.5 / math.sqrt(layer.weight.shape[1])), nn.init.zeros_(layer.bias)
        self.bounds = nn.Parameter(torch.tensor([[-10.0], [0.5]]).repeat(1, obs_dim + 1))  # L and U, common to all networks
        self.register_buffer("units", torch.tensor([[0.0], [1.0]]).repeat(1, widths[0]))  # mean and std of x
        self.register_buffer("elites", torch.arange(ELITES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S + A), or (M, B, S + A) with rows for each network, to mean and log variance of y, (M, B, S + 1) each."""
        x = ((x - self.units[0]) / self.units[1]).expand(NETWORKS, -1, -1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        (mean, log_var), (low, high) = self.layers[-1](x).chunk(2, dim=-1), self.bounds
        # (E1) soft: also beyond a bound there is a gradient back
        return mean, low + F.softplus(high - F.softplus(high - log_var) - low)


def dynamics_loss(dynamics: Dynamics, x: Tensor, y: Tensor) -> Tensor:
    """(E2): each network on its own rows, (M, B, S + A) and (M, B, S + 1)."""
    mean, log_var = dynamics(x)
    assert y.shape == mean.shape, "a target (B, S + 1) would broadcast, and every network learn from the same rows"
    # (E2) a sum over networks, which share nothing but U and L; biases do not decay
    likelihood = ((mean - y).pow(2) * torch.exp(-log_var) + log_var).mean(dim=(1, 2)).sum()
    decay = sum(c * layer.weight.pow(2).sum() / 2 for c, layer in zip(WEIGHT_DECAY, dynamics.layers))
    return likelihood + decay + 0.01 * dynamics.bounds.diff(dim=0).sum()


def fit(dynamics: Dynamics, data: Dataset, args: Args, run: Run) -> None:
    """(E2) with (E3), each network on its own bootstrap of the data; or what an earlier start left beside its run's folder."""
    path = run.folder.with_name(f"{run.folder.name}-model-{run.dataset['fingerprint']}-{args.dynamics_epochs}.pt")
    if path.exists():
        dynamics.load_state_dict(torch.load(path, map_location=data.device, weights_only=True))
        return
    rng, rows = torch.Generator(data.device).manual_seed(args.seed), data.columns(data.packed)  # torch's own draws stay
    x, y = torch.cat([rows.obs, rows.action], dim=1), torch.cat([rows.next_obs - rows.obs, rows.reward[:, None]], dim=1)
    # a D4RL file without next_observations has another episode's start after a termination: the body's rule unmasks it
    known = (~rows.terminated.bool() | FALLS[data.env_id](rows.next_obs)).nonzero()[:, 0]
    order = known[torch.randperm(len(known), generator=rng, device=data.device)]
    holdout, rest = order.tensor_split([min(len(order) // 5, MAX_HOLDOUT)])
    std = x[rest].std(dim=0, correction=0)
    dynamics.units.copy_(torch.stack([x[rest].mean(dim=0), torch.where(std < 1e-12, 1.0, std)]))
    own = rest[torch.randint(len(rest), (NETWORKS, len(rest)), generator=rng, device=data.device)]  # (M, N), the bootstraps
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=DYNAMICS_LR, fused=True)
    best, stale, kept = torch.full((NETWORKS,), 1e10, device=data.device), 0, copy.deepcopy(dynamics.layers)
    for epoch in (bar := tqdm(range(1, args.dynamics_epochs + 1), desc="fitting the model", unit=" epochs")):
        for batch in own.split(DYNAMICS_BATCH, dim=1):
            descend(dynamics_loss(dynamics, x[batch], y[batch]), optimizer)
            check(not run.stop, "stopped before the model was fitted, so nothing is kept; start again without --resume")
        own = own.gather(1, torch.rand(own.shape, generator=rng, device=data.device).argsort(dim=1))  # shuffled, not redrawn
        error = (dynamics(x[holdout])[0].detach() - y[holdout]).pow(2).mean(dim=(1, 2))  # (M,), variances aside
        check(error.isfinite().all(), f"the model's holdout error is {error.tolist()} by epoch {epoch}")
        # (E3)
        better = (best - error) / best > 0.01
        best, stale = torch.where(better, error, best), 0 if better.any() else stale + 1
        for old, new in zip(kept.parameters(), dynamics.layers.parameters()):
            old.data[better] = new.data[better]
        bar.set_postfix_str(f"holdout error {best.mean():.3g}", refresh=False)
        if stale > PATIENCE:
            break
    dynamics.layers = kept  # L and U remain what they are in the end
    dynamics.elites.copy_(best.argsort()[:ELITES])
    write_atomically(path, lambda part: torch.save(dynamics.state_dict(), part))
    run.since += bar.format_dict["elapsed"]  # updates per second are of updates


@torch.no_grad()
def imagine(args: Args, data: Dataset, dynamics: Dynamics, actor: Actor) -> Tensor:
    """(E4), (E5), (E6): rollouts in the model from states of the data; rows as Dataset packs them, (n, 2S + A + 2)."""
    obs, rows = data.sample(args.rollout_starts).obs, []
    for _ in range(args.horizon):
        action, _ = sample_action(*actor(obs))
        mean, log_var = dynamics(torch.cat([obs, action], dim=1))
        # (E4)
        elite = dynamics.elites[torch.randint(ELITES, (len(obs),), device=obs.device)]
        std = (0.5 * log_var).exp()
        y = (mean + std * torch.randn_like(mean[0]))[elite, torch.arange(len(obs), device=obs.device)]
        next_obs = obs + y[:, :-1]
        # (E5) without it, fallen robots would go on earning
        terminated = FALLS[data.env_id](next_obs)
        # (E6) over all networks, not the elites alone, and with the deviation of the reward
        reward = y[:, -1] - args.penalty_weight * std.norm(dim=-1).amax(dim=0)
        rows.append(torch.cat([obs, action, next_obs, reward[:, None], terminated[:, None]], dim=1))
        obs = next_obs[~terminated]
    return torch.cat(rows)


@torch.no_grad()
def soft_td_target(actor: Actor, critic_target: Critic, entropy_coef: Tensor, batch: Batch, gamma: float) -> Tensor:
    """(E8): the regression target y, (B,)."""
    # (E8) sac.py asks Q about actions that nobody tried; here the model has tried them
    next_action, next_log_prob = sample_action(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * (next_q - entropy_coef * next_log_prob)


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E9); also the mean Q of the batch's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E9)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E10); also log π (B,), which (E11) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E10)
    return (entropy_coef * log_prob - q.min(dim=0).values).mean(), log_prob.detach(), q.detach().mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E12) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, pool: Dataset, actor: Actor, critic: Critic, critic_target: Critic,
           log_entropy_coef: Tensor, actor_optimizer, critic_optimizer, entropy_optimizer) -> dict[str, Tensor]:
    """One step of SAC, on a few real rows and many imagined ones: Q, π, α, targets."""
    num_real = int(args.real_share * args.batch_size)
    batch = Batch(*map(torch.cat, zip(data.sample(num_real), pool.sample(args.batch_size - num_real))))
    entropy_coef = log_entropy_coef.detach().exp()

    y = soft_td_target(actor, critic_target, entropy_coef, batch, args.gamma)
    q_loss, q_batch = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    # (E11) α grows while the policy's entropy is below its target, −dim(A)
    descend(-(log_entropy_coef * (log_prob - data.action_dim)).mean(), entropy_optimizer)

    # (E12)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_batch": q_batch, "q_policy": q_policy, "reward": batch.reward.mean(),
            "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    for name in ("dynamics_epochs", "rollout_every", "rollout_starts", "horizon", "retain"):
        check(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    check(0 <= args.real_share <= 1, f"--real-share must be between 0 and 1, not {args.real_share}")
    data = load_dataset(args.env, args.device)
    check(data.env_id in FALLS, f"{data.name} is of {data.env_id}; how episodes end is known of {', '.join(FALLS)} only")
    run = Run(args, data, variant="" if args.penalty_weight else "-no-penalty")
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    dynamics = Dynamics(data.obs_dim, data.action_dim).to(data.device)
    pool = Dataset("imagined", data.env_id, args.retain * args.horizon * args.rollout_starts, data.device.type, data.refs)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    state = dict(actor=actor, critic=critic, critic_target=copy.deepcopy(critic), log_entropy_coef=log_entropy_coef,
                 actor_optimizer=adam(actor.parameters(), lr=args.actor_lr),
                 critic_optimizer=adam(critic.parameters(), lr=args.critic_lr),
                 entropy_optimizer=adam([log_entropy_coef], lr=args.actor_lr))
    start = run.resume(**state, pool=pool.packed, pool_size=pool.size)
    fit(dynamics, data, args, run)
    one_update = record_on_cuda(partial(update, args, data, pool, **state), data.device)
    for step in range(start + 1, args.steps + 1):
        if (step - 1) % args.rollout_every == 0:
            rows = torch.cat([pool.packed[:pool.size], imagine(args, data, dynamics, actor)])[-len(pool.packed):]  # the newest
            pool.packed[:len(rows)] = rows
            pool.size.fill_(len(rows))
        run.step(step, one_update(), actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(parse_args())
