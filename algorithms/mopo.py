"""MOPO: SAC in a learned model, with a penalty on the reward where the model is uncertain.

Yu, Thomas, Yu, Ermon, Zou, Levine, Finn & Ma, "MOPO: Model-based Offline Policy Optimization",
NeurIPS 2020, arXiv 2005.13239.
Notes: Model-Based Offline RL › MOPO. Their u = max_j ‖Σ_j‖_F is the paper's formula; in its code,
and in (E6), Σ is the vector of standard deviations, not the matrix of variances.

A model can be asked about actions that the data lack, but there its answers are guesses. MOPO
imagines a few steps from states of the data, and lowers each reward by λ times the largest error
that a network predicts for itself. Where this penalty bounds the model's error, the imagined return
is a lower bound of the real one.

  siblings  learned              penalty                           acts on
  mopo.py   7 Gaussian networks  λ · largest ‖std. deviations‖₂    reward of an imagined step
  morel.py  4 networks           −κ/(1−γ) where they disagree      reward and end of a rollout
  combo.py  as mopo.py           β · (Q imagined − Q of the data)  loss of Q

  (E1) log σ²_m = L + softplus( U − softplus(U − l_m) − L ),  networks give μ_m, l_m; L, U learned
  (E2) L_model = Σ_m mean[ (μ_m − y)² / σ²_m + log σ²_m ] + Σ_i c_i ‖W_i‖² / 2 + 0.01 Σ(U − L)
  (E3) keep network m whenever its holdout error (μ_m − y)² fell by over 1%; the best 5 are elites
  (E4) [ŝ′ − s, r̂] ~ N(μ_e, σ²_e)(s, a),  a ~ π(·|s),  e an elite drawn for each row
  (E5) d̂ = 1 where the body has fallen at ŝ′: the rollout ends
  (E6) r̃ = r̂ − λ max_m ‖σ_m(s, a)‖₂
  (E7) ã = tanh(u), u ~ N(μ(s), σ²(s)),  log π(ã|s) = Σ_i [ log N(u_i; μ, σ²) − log(1 − ã_i²) ]
  (E8) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − α log π(ã′|s′) ),  ã′ ~ π(·|s′)
  (E9) L_Q = Σ_k E[ (Q_k(s, a) − y)² ],  over 5% real and 95% imagined steps
  (E10) L_π = E[ α log π(ã|s) − min_k Q_k(s, ã) ],  ã ~ π(·|s)
  (E11) L_α = E[ −log α · (log π(ã|s) + H̄) ],  H̄ = −dim(A), the target of π's entropy
  (E12) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, M = 7 networks of the model, K = 2 critics. The model's
y is [s′ − s, r]. d is terminated: a truncated episode bootstraps.

Differences from the paper and the official code (tianheyu927/mopo):
  D1 10,000 starts per rollout; the code's 50,000 would take a third of a CPU's time.
  D2 H̄ = −dim(A) [OfflineRL-Kit], the code's is −3. No spectral norm: only the paper has it.
  D3 The model trains for at most dynamics_epochs; the code waits for (E3) alone, which takes hours.
  D4 A termination's next state is the real one; the code fits the jump into the next episode.
  D5 Hopper's |s′| < 100 holds on both sides; the code has the upper bound alone, by a slip.
  D6 Q, π, α, targets one after the other, and no ½ in (E9): both as in sac.py.
  D7 All rows count; the code's pool keeps the last million, so half of a medium-expert set.
  D8 TUNED has 25 steps for hopper-medium. With the paper's 5 the policy falls soon here, and mostly
     after the end of its rollouts, where training does not see it (results/README.md, Settings).

Watch: q_policy. Where it grows above the largest discounted return of the data, the policy
exploits the model's errors: raise --penalty-weight. `reward`, a batch's mean after the penalty, may
lie far below the data's mean reward; only if evaluations do not rise either does the penalty
outweigh the task. Where q_policy is as high as the data's returns and evaluations stay low, the
policy may fail after the end of its rollouts: raise --horizon.

Run:     python algorithms/mopo.py --env hopper-medium
Expect:  on hopper-medium seeds far apart, and rising, after 50,000 updates in a model of 10 epochs;
         far above a clone on both medium-replay sets that were tried after 100,000.
         Scores and curves: results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import (
    Batch,
    Dataset,
    Run,
    check_range,
    fail,
    known_next,
    load_dataset,
    parse_args,
    read_fitted,
    record_on_cuda,
    write_atomically,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [C d4rl/base.py, rl_algorithm.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [=]
    eval_episodes: int = 10  # per evaluation; 0: none [P]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 256  # transitions per update [C development/base.py]
    actor_lr: float = 3e-4  # Adam, for π and α [C development/base.py]
    critic_lr: float = 3e-4  # Adam [C development/base.py]
    gamma: float = 0.99  # discount γ [C d4rl/base.py]
    target_rate: float = 0.005  # share of the new weights in (E12) [C d4rl/base.py]
    # MOPO
    dynamics_epochs: int = 100  # at most, for (E2); (E3) often stops earlier [D3]
    rollout_every: int = 1_000  # updates between rollouts [C d4rl/base.py]
    rollout_starts: int = 10_000  # states of the data that rollouts start from [D1]
    horizon: int = 5  # steps of a rollout; see TUNED [P Table 6]
    penalty_weight: float = 1.0  # λ in (E6); see TUNED [P Table 6]
    retain: int = 5  # rollouts that the pool has room for [C d4rl/base.py]
    real_share: float = 0.05  # share of real transitions in a batch [P App. G.2][C d4rl/base.py]


# for D4RL's v0 data [P Table 6] [D8]; the code has λ = 5 for halfcheetah-medium-expert
TUNED = {
    "halfcheetah-random": {"horizon": 5, "penalty_weight": 0.5},
    "halfcheetah-medium": {"horizon": 1, "penalty_weight": 1.0},
    "halfcheetah-medium-replay": {"horizon": 5, "penalty_weight": 1.0},
    "halfcheetah-medium-expert": {"horizon": 5, "penalty_weight": 1.0},
    "hopper-random": {"horizon": 5, "penalty_weight": 1.0},
    "hopper-medium": {"horizon": 25, "penalty_weight": 5.0},
    "hopper-medium-replay": {"horizon": 5, "penalty_weight": 1.0},
    "hopper-medium-expert": {"horizon": 5, "penalty_weight": 1.0},
    "walker2d-random": {"horizon": 1, "penalty_weight": 1.0},
    "walker2d-medium": {"horizon": 5, "penalty_weight": 5.0},
    "walker2d-medium-replay": {"horizon": 1, "penalty_weight": 1.0},
    "walker2d-medium-expert": {"horizon": 1, "penalty_weight": 2.0},
}
HIDDEN = (256, 256)  # widths of actor and critics [C development/base.py]
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # [C]
NETWORKS, ELITES = 7, 5  # of the model [P App. G.2][C constructor.py]
DYNAMICS_HIDDEN = 4 * (200,)  # widths of the model [P App. G.2][C constructor.py]
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # c_i in (E2), of layer i [C constructor.py]
DYNAMICS_LR, DYNAMICS_BATCH = 1e-3, 256  # Adam; rows of each network [C constructor.py, mopo.py]
MAX_HOLDOUT, PATIENCE = 1_000, 5  # rows; epochs in a row without (E3) [P App. G.2][C bnn.py]


def hopper_falls(s: Tensor) -> Tensor:
    """(B, S) -> whether the episode is over, (B,)."""
    return ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1))


def walker2d_falls(s: Tensor) -> Tensor:
    return ~((s[:, 0] > 0.8) & (s[:, 0] < 2) & (s[:, 1].abs() < 1))


def never_falls(s: Tensor) -> Tensor:
    return torch.zeros_like(s[:, 0], dtype=torch.bool)


FALLS = {  # as in Gymnasium
    "Hopper-v5": hopper_falls,
    "Walker2d-v5": walker2d_falls,
    "HalfCheetah-v5": never_falls,
    "Pendulum-v1": never_falls,
}


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Tanh-Gaussian π(a|s) on [-1, 1]^A. Its buffers hold the environment's action units."""

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
        """Raw observations (B, S) to the environment's own actions (B, A): tanh of the mean."""
        mean, _ = self(obs)
        return self.action_mid + self.action_half * torch.tanh(mean)


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E7) actions (..., A), drawn with the reparameterisation trick, and their log π (...)."""
    # (E7) the second term of log_prob is log(1 − tanh²u), in a form that does not overflow
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))
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
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(EnsembleLinear(num, inputs, outputs))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        num = len(self.layers[0].weight)
        x = torch.cat([obs, action], dim=-1).expand(num, -1, -1)  # (K, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


class Dynamics(nn.Module):
    """M Gaussians of y = [next_obs − obs | reward], given x = [obs | action], in raw units."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        widths = (obs_dim + action_dim, *DYNAMICS_HIDDEN, 2 * (obs_dim + 1))
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            layer = EnsembleLinear(NETWORKS, inputs, outputs)
            nn.init.trunc_normal_(layer.weight).data.mul_(0.5 / math.sqrt(inputs))
            nn.init.zeros_(layer.bias)
            self.layers.append(layer)
        self.bounds = nn.Parameter(torch.tensor([[-10.0], [0.5]]).repeat(1, obs_dim + 1))  # L, U
        self.register_buffer("x_mean", torch.zeros(widths[0]))
        self.register_buffer("x_std", torch.ones(widths[0]))
        self.register_buffer("elites", torch.arange(ELITES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S + A) or (M, B, S + A) to mean and log variance of y, (M, B, S + 1) each."""
        x = ((x - self.x_mean) / self.x_std).expand(NETWORKS, -1, -1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        mean, log_var = self.layers[-1](x).chunk(2, dim=-1)
        # (E1) a clamp would have no gradient beyond a bound
        low, high = self.bounds
        log_var = high - F.softplus(high - log_var)
        return mean, low + F.softplus(log_var - low)


class Pool(nn.Module):
    """The newest imagined transitions. A module, so that checkpoints hold its tensors."""

    def __init__(self, capacity: int, data: Dataset):
        super().__init__()
        for name in Batch._fields:  # obs, action, reward, next_obs, terminated
            column = getattr(data, name)
            self.register_buffer(name, column.new_zeros(capacity, *column.shape[1:]))
        self.register_buffer("size", torch.tensor(0, device=data.device))  # rows in use

    def add(self, new: Batch) -> None:
        """Appends transitions; the oldest leave where there is no room."""
        size = int(self.size)
        for name, column in new._asdict().items():
            stored = getattr(self, name)
            newest = torch.cat([stored[:size], column])[-len(stored):]
            stored[:len(newest)] = newest
        self.size.fill_(len(newest))

    def sample(self, batch_size: int) -> Batch:
        index = (torch.rand(batch_size, device=self.size.device) * self.size).long()
        return Batch(*(getattr(self, name).index_select(0, index) for name in Batch._fields))


def join(*batches: Batch) -> Batch:
    """One batch from several, column by column."""
    return Batch(*(torch.cat(columns) for columns in zip(*batches)))


def dynamics_loss(dynamics: Dynamics, x: Tensor, y: Tensor) -> Tensor:
    """(E2): each network on its own rows, (M, B, S + A) and (M, B, S + 1)."""
    mean, log_var = dynamics(x)
    assert y.shape == mean.shape, "a target (B, S + 1) would give all networks the same rows"
    # (E2) a sum over networks, which share only U and L; biases do not decay
    loss = ((mean - y).pow(2) * torch.exp(-log_var) + log_var).mean(dim=(1, 2)).sum()
    for c, layer in zip(WEIGHT_DECAY, dynamics.layers):
        loss = loss + c * layer.weight.pow(2).sum() / 2
    return loss + 0.01 * dynamics.bounds.diff(dim=0).sum()


def model_rows(data: Dataset) -> tuple[Tensor, Tensor]:
    """x (N, S + A) and y (N, S + 1) of transitions with a known next state."""
    env = data.recorded_env or "no known environment"
    if env not in FALLS:
        fail(f"{data.name} is of {env}; episode ends are known of {', '.join(FALLS)} only")
    known = known_next(data, FALLS[env](data.next_obs))
    if known.sum() < 10:
        fail(f"{data.name} has fewer than 10 transitions that continue or end in a fall")
    x = torch.cat([data.obs, data.action], dim=1)
    y = torch.cat([data.next_obs - data.obs, data.reward[:, None]], dim=1)
    return x[known], y[known]


def fit(dynamics: Dynamics, data: Dataset, args: Args, run: Run) -> None:
    """(E2), (E3), each network on its own bootstrap; or reads what an earlier start fitted."""
    key = f"{run.dataset['fingerprint']}-{args.dynamics_epochs}"
    path = run.folder.with_name(f"{run.folder.name}-model-{key}.pt")
    if read_fitted(path, dynamics):
        return
    x, y = model_rows(data)
    rng = torch.Generator(data.device).manual_seed(args.seed)
    order = torch.randperm(len(x), generator=rng, device=data.device)
    holdout, rest = order.tensor_split([min(len(x) // 5, MAX_HOLDOUT)])
    std = x[rest].std(dim=0, correction=0)
    dynamics.x_std = torch.where(std < 1e-12, 1.0, std)
    dynamics.x_mean = x[rest].mean(dim=0)
    draws = torch.randint(len(rest), (NETWORKS, len(rest)), generator=rng, device=data.device)
    rows = rest[draws]
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=DYNAMICS_LR, fused=True)
    best = torch.full((NETWORKS,), 1e10, device=data.device)
    kept = copy.deepcopy(dynamics.layers)
    stale = 0
    bar = tqdm(range(args.dynamics_epochs), desc="fitting the model", unit=" epochs")
    for _ in bar:
        for index in rows.split(DYNAMICS_BATCH, dim=1):
            descend(dynamics_loss(dynamics, x[index], y[index]), optimizer)
            if run.stop:
                fail("stopped before the model was fitted; start again with the same command")
        shuffle = torch.rand(rows.shape, generator=rng, device=data.device).argsort(dim=1)
        rows = rows.gather(1, shuffle)
        error = (dynamics(x[holdout])[0].detach() - y[holdout]).pow(2).mean(dim=(1, 2))
        if not error.isfinite().all():
            fail(f"the model's holdout error is {error.tolist()}")
        # (E3) each network by itself
        improved = (best - error) / best > 0.01
        best = torch.where(improved, error, best)
        for old, new in zip(kept.parameters(), dynamics.layers.parameters()):
            old.data[improved] = new.data[improved]
        stale = 0 if improved.any() else stale + 1
        if stale > PATIENCE:
            break
    dynamics.layers = kept  # U and L stay as they are
    dynamics.elites.copy_(best.argsort()[:ELITES])
    write_atomically(path, lambda part: torch.save(dynamics.state_dict(), part))
    run.since += bar.format_dict["elapsed"]  # the fit's time does not count in updates per second


@torch.no_grad()
def imagine(args: Args, data: Dataset, dynamics: Dynamics, actor: Actor) -> Batch:
    """(E4), (E5), (E6): rollouts in the model from states of the data."""
    obs = data.sample(args.rollout_starts).obs
    steps = []
    for _ in range(args.horizon):
        action, _ = sample_action(*actor(obs))
        mean, log_var = dynamics(torch.cat([obs, action], dim=1))  # (M, B, S + 1)
        std = (0.5 * log_var).exp()
        # (E4) every row has an elite of its own
        elite = dynamics.elites[torch.randint(ELITES, (len(obs),), device=obs.device)]
        row = torch.arange(len(obs), device=obs.device)
        y = mean[elite, row] + std[elite, row] * torch.randn_like(mean[0])
        next_obs = obs + y[:, :-1]
        # (E5) otherwise a rollout would go on to collect rewards after the fall
        terminated = FALLS[data.recorded_env](next_obs)
        # (E6) over all networks, not the elites alone, and with the deviation of the reward
        reward = y[:, -1] - args.penalty_weight * std.norm(dim=-1).amax(dim=0)
        steps.append(Batch(obs, action, reward, next_obs, terminated.to(obs.dtype)))
        obs = next_obs[~terminated]
    return join(*steps)


@torch.no_grad()
def soft_td_target(actor: Actor, critic_target: Critic, entropy_coef: Tensor, batch: Batch,
                   gamma: float) -> Tensor:
    """(E8): the regression target y, (B,)."""
    # (E8) unlike in sac.py, imagined steps have tried actions such as next_action
    next_action, next_log_prob = sample_action(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    soft_value = next_q - entropy_coef * next_log_prob
    return batch.reward + gamma * (1 - batch.terminated) * soft_value


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E9); also the mean Q of the batch's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E9)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor,
               obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E10); also log π (B,), which (E11) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E10)
    loss = (entropy_coef * log_prob - q.min(dim=0).values).mean()
    return loss, log_prob.detach(), q.detach().mean()


def entropy_coef_loss(log_entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E11): the loss of the entropy coefficient α."""
    # (E11) α grows while the policy's entropy, E[−log π], is below its target
    return -(log_entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E12) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, pool: Pool, actor: Actor, critic: Critic,
           critic_target: Critic, log_entropy_coef: Tensor, actor_optimizer, critic_optimizer,
           entropy_optimizer) -> dict[str, Tensor]:
    """One step of SAC, on a few real rows and many imagined ones: Q, π, α, targets."""
    num_real = int(args.real_share * args.batch_size)
    batch = join(data.sample(num_real), pool.sample(args.batch_size - num_real))
    entropy_coef = log_entropy_coef.detach().exp()

    y = soft_td_target(actor, critic_target, entropy_coef, batch, args.gamma)
    q_loss, q_batch = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    alpha_loss = entropy_coef_loss(log_entropy_coef, log_prob, -data.action_dim)
    descend(alpha_loss, entropy_optimizer)

    # (E12)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_batch": q_batch, "q_policy": q_policy,
            "reward": batch.reward.mean(), "entropy": -log_prob.mean(),
            "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check_range(args, "batch_size dynamics_epochs rollout_every rollout_starts horizon retain", 1)
    check_range(args, "actor_lr critic_lr penalty_weight", 0)
    check_range(args, "gamma target_rate real_share", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    model_rows(data)  # may refuse them
    run = Run(args, data, variant="" if args.penalty_weight else "-no-penalty", gflop=0.66)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    dynamics = Dynamics(data.obs_dim, data.action_dim).to(data.device)
    pool = Pool(args.retain * args.horizon * args.rollout_starts, data)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "pool": pool,
        "actor": actor,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "log_entropy_coef": log_entropy_coef,
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
        "entropy_optimizer": adam([log_entropy_coef], lr=args.actor_lr),
    }
    start = run.begin(learned, actor)
    fit(dynamics, data, args, run)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        if (step - 1) % args.rollout_every == 0:
            pool.add(imagine(args, data, dynamics, actor))
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(parse_args(Args, TUNED))
