"""COMBO: CQL on real and imagined steps, which pushes Q down where the model leads and up where the data are.

Yu, Kumar et al., "COMBO: Conservative Offline Model-Based Policy Optimization", NeurIPS 2021, arXiv 2102.08363.
Notes: Value Function Regularization › COMBO; Model-Based Offline RL › ENSEMBLE. (75.5 in their table is of walker2d-medium.)

MOPO's fine is as good as the model's own idea of its error, which is often poor. COMBO does without: it believes the imagined
steps, and distrusts Q there, by CQL's term. That term spares what is imagined and real alike, so it is less cautious than CQL,
which pushes Q down at all actions in states of the data. Side by side: mopo.py fines, morel.py halts, combo.py pushes Q down.

  (E1) log σ²_m = L + softplus( U − softplus(U − l_m) − L ),  μ_m and l_m network m's outputs at (s, a), L and U learned
  (E2) L_model = Σ_m mean[ (μ_m − y)² / σ²_m + log σ²_m ] + Σ_i c_i ‖W_i‖² / 2 + 0.01 Σ(U − L),  y = [s′ − s, r]
  (E3) keep m's weights whenever its holdout error (μ_m − y)² has fallen by over 1%; the best 5 of 7 networks are the elites
  (E4) [ŝ′ − s, r̂] ~ N(μ_e, σ²_e), a ~ π(·|s), e a new elite each step;  (E5) d̂ = 1 where the body falls at ŝ′: the rollout ends
  (E6) ã = tanh(u), u = μ(s) + σ(s)·ε,  log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E7) y = r + γ (1 − d) min_k Q̄_k(s′, ã′),  ã′ ~ π(·|s′),  over d_f: a share f of real and 1 − f of imagined steps
  (E8) soft_max_k(s) = log Σ_j exp( Q_k(s, a_j) − log μ_j(a_j) ),  the a_j: N from U(−1, 1), N from π(·|s), N from π(·|s′)
  (E9) L_Q = Σ_k ( E_{d_f}[ (Q_k(s, a) − y)² ] + β gap_k ),  gap_k = E_{imagined}[ soft_max_k(s) ] − E_{real}[ Q_k(s, a) ]
  (E10) L_π = E[ α log π(ã|s) − min_k Q_k(s, ã) ],  (E11) L_α = E[ −log α · (log π(ã|s) + H̄) ],  ã ~ π(·|s), H̄ = −dim(A)
  (E12) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, M = 7 networks of the model, K = 2 critics, N samples per proposal. d is terminated: a
truncated episode bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences: no official code exists; where the paper leaves a choice we follow OfflineRL-Kit, but for
  D1 (E8) is a sum over all 3N actions; there, a reshape without effect leaves the mean of N log-sums over 3.
  D2 (E9) pushes down in imagined states alone, as the paper's ρ does; there by default in the whole batch's.
  D3 Q, π, α, targets in this order, as in cql.py; there π and α come first, and the actor's learning rate decays to 0.
  D4 Falls are Gymnasium's; the model has dynamics_epochs at most. No ½ in (E9) [OfflineRL-Kit]: with it, β would be half.

Run:     python algorithms/combo.py --env hopper-medium
Expect:  hopper-medium 26.4, 12 at most before update 7,500, halfcheetah-medium-replay 3.4: 8,000 updates, seed 0, half an hour.
         pendulum-medium-replay (the data −1148): −147, −148, −173; 2,000 updates in a model of 15 epochs, seeds 0 to 2.
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
    steps: int = 1_000_000  # gradient updates [C OfflineRL-Kit]
    batch_size: int = 256  # transitions per update [C OfflineRL-Kit]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 1e-4  # Adam, for π and α [C OfflineRL-Kit] [D3]
    critic_lr: float = 3e-4  # Adam [C OfflineRL-Kit]
    gamma: float = 0.99  # discount γ [=]
    target_rate: float = 0.005  # share of the new weights in (E12) [=]
    # COMBO
    dynamics_epochs: int = 100  # at most, through the data, for (E2); mostly (E3) stops earlier [D4]
    rollout_every: int = 1_000  # updates between rollouts [C OfflineRL-Kit]
    rollout_starts: int = 50_000  # states of the data that a rollout starts from [C OfflineRL-Kit]
    horizon: int = 5  # steps that a rollout goes; suite datasets have their own in TUNED [C OfflineRL-Kit]
    retain: int = 5  # rollouts that the pool has room for, the newest [C OfflineRL-Kit]
    real_share: float = 0.5  # f in (E7), rounded down to rows of a batch [C OfflineRL-Kit]
    beta: float = 0.5  # β in (E9), larger trusts the model less; suite datasets have their own in TUNED [C OfflineRL-Kit]
    num_samples: int = 10  # N in (E8), so 3N actions per imagined state [C OfflineRL-Kit]


TUNED = {f"{body}-{level}": dict(horizon=horizon, beta=beta) for body, best in {  # for D4RL's v2 data [C OfflineRL-Kit]
    "halfcheetah": ((5, 0.5), (5, 0.5), (5, 5.0)),  # medium, medium-replay, medium-expert
    "hopper": ((5, 5.0), (5, 0.5), (5, 5.0)),
    "walker2d": ((1, 5.0), (1, 0.5), (1, 5.0)),
}.items() for level, (horizon, beta) in zip(LEVELS[1:], best)}
HIDDEN = (256, 256, 256)  # widths of actor and critics [C OfflineRL-Kit]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # as in cql.py [=]
NETWORKS, ELITES, DYNAMICS_HIDDEN = 7, 5, (200, 200, 200, 200)  # of the model [C OfflineRL-Kit]
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # c_i in (E2), of layer i [C OfflineRL-Kit]
DYNAMICS_LR, DYNAMICS_BATCH = 1e-3, 256  # Adam; rows of each network [C OfflineRL-Kit]
MAX_HOLDOUT, PATIENCE = 1_000, 5  # rows, or a fifth of the data; epochs that may pass without (E3) [C mopo bnn.py]
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
    """(E6) actions (..., A) drawn with the reparameterisation trick, and their log-densities (...)."""
    # (E6)
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
    """(E4), (E5): rollouts in the model from states of the data; rows as Dataset packs them, (n, 2S + A + 2)."""
    obs, rows = data.sample(args.rollout_starts).obs, []
    for _ in range(args.horizon):
        action, _ = sample_action(*actor(obs))
        mean, log_var = dynamics(torch.cat([obs, action], dim=1))
        # (E4)
        elite = dynamics.elites[torch.randint(ELITES, (len(obs),), device=obs.device)]
        y = (mean + (0.5 * log_var).exp() * torch.randn_like(mean[0]))[elite, torch.arange(len(obs), device=obs.device)]
        next_obs = obs + y[:, :-1]
        # (E5) without it, fallen robots would go on earning
        terminated = FALLS[data.env_id](next_obs)
        rows.append(torch.cat([obs, action, next_obs, y[:, -1:], terminated[:, None]], dim=1))
        obs = next_obs[~terminated]
    return torch.cat(rows)


@torch.no_grad()
def td_target(critic_target: Critic, next_policy: tuple[Tensor, Tensor], batch: Batch, gamma: float) -> Tensor:
    """(E7): the regression target y, (B,). `next_policy` is π(·|s′): mean and log std, (B, A) each."""
    # (E7) without the entropy term, as in cql.py
    next_action, _ = sample_action(*next_policy)
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


def soft_max_q(actor: Actor, critic: Critic, obs: Tensor, next_obs: Tensor, num: int) -> Tensor:
    """(E8): (B, S), (B, S) -> (K, B). All actions are valued at `obs`, wherever they were proposed."""
    with torch.no_grad():
        several = [x.unsqueeze(1).expand(-1, num, -1) for x in (*actor(obs), *actor(next_obs))]  # (B, N, A) each
        uniform = 2 * torch.rand(several[0].shape, device=obs.device) - 1
        proposals = [(uniform, torch.full_like(uniform[..., 0], -uniform.shape[2] * math.log(2))),  # density ½ per axis
                     sample_action(*several[:2]), sample_action(*several[2:])]
        action, log_density = (torch.cat(parts, dim=1) for parts in zip(*proposals))  # (B, 3N, A), (B, 3N)
    q = critic(obs.repeat_interleave(3 * num, dim=0), action.flatten(0, 1)).view(-1, *log_density.shape)  # (K, B, 3N)
    # (E8)
    return torch.logsumexp(q - log_density, dim=-1)


def critic_loss(critic: Critic, batch: Batch, num_real: int, y: Tensor, soft_max: Tensor, beta: float) -> tuple[Tensor, ...]:
    """(E9); also the gap and the mean Q of real actions. Rows from `num_real` on are imagined; `soft_max` is theirs, (K, ·)."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:] and soft_max.ndim == 2 and len(soft_max) == len(q), "broadcasting would train, wrongly"
    # (E9) pushing up imagined actions as well would undo the push down
    q_data = q[:, :num_real].mean(dim=1)
    gap = soft_max.mean(dim=1) - q_data  # (K,)
    return ((q - y).pow(2).mean(dim=1) + beta * gap).sum(), gap.detach().mean(), q_data.detach().mean()


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
    """One step of COMBO: Q, π, α, targets."""
    num_real = int(args.real_share * args.batch_size)
    batch = Batch(*map(torch.cat, zip(data.sample(num_real), pool.sample(args.batch_size - num_real))))
    entropy_coef = log_entropy_coef.detach().exp()

    y = td_target(critic_target, actor(batch.next_obs), batch, args.gamma)
    soft_max = soft_max_q(actor, critic, batch.obs[num_real:], batch.next_obs[num_real:], args.num_samples)
    q_loss, gap, q_data = critic_loss(critic, batch, num_real, y, soft_max, args.beta)
    descend(q_loss, critic_optimizer)

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    # (E11) α grows while the policy's entropy is below its target, −dim(A)
    descend(-(log_entropy_coef * (log_prob - data.action_dim)).mean(), entropy_optimizer)

    # (E12)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "gap": gap,
            "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    for name in ("dynamics_epochs", "rollout_every", "rollout_starts", "horizon", "retain"):
        check(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    check(args.num_samples > 0 and args.beta >= 0, "--num-samples must be at least 1, and --beta at least 0")
    check(0 < int(args.real_share * args.batch_size) < args.batch_size, "--real-share must leave rows of both kinds")
    data = load_dataset(args.env, args.device)
    check(data.env_id in FALLS, f"{data.name} is of {data.env_id}; how episodes end is known of {', '.join(FALLS)} only")
    run = Run(args, data)
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
