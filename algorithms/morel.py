"""MOReL: SAC in a learned model that halts where its networks disagree.

Kidambi, Rajeswaran, Netrapalli & Joachims, "MOReL: Model-Based Offline Reinforcement Learning",
NeurIPS 2020, arXiv 2005.05951.
Notes: Model-Based Offline RL › MOReL. They print a soft penalty, r̃ = r − λ u(s, a), with disc for
u; the paper has a hard boundary, HALT. Both are here: --penalty soft (E7), --penalty halt (E6).

Where networks fitted to the same data agree, the data have shown what happens; where they disagree,
it is unknown. In MOReL's MDP an unknown pair (s, a) leads to a state HALT, which is never left and
pays −κ per step: what a policy earns there bounds its real return from below. The soft form has no
threshold: a policy may cross what is unknown, at a price.

  siblings  learned              penalty                           acts on
  mopo.py   7 Gaussian networks  λ · largest ‖std. deviations‖₂    reward of an imagined step
  morel.py  4 networks           −κ/(1−γ) where they disagree      reward and end of a rollout
  combo.py  as mopo.py           β · (Q imagined − Q of the data)  loss of Q

  (E1) f_m(s, a) = μ_y + σ_y · MLP_m( [s, a] standardised ),  of y = [s′ − s, r]
  (E2) L_model = Σ_m mean[ ( (f_m − y) / σ_y )² ],  m = 1…4: other initial weights, other row order
  (E3) disc(s, a) = max_{i,j} ‖f_i(s, a) − f_j(s, a)‖₂,  of the next state alone
  (E4) [ŝ′ − s, r̂] = f_m(s, a),  m one network for a whole rollout,  d̂ = 1 where the body falls
  (E5) unknown(s, a):  disc(s, a) > mean_D disc + β std_D disc
  (E6) halt:  where unknown  r̃ = V(HALT) = −κ / (1 − γ),  d̂ = 1,  κ = max_D |r|;  else  r̃ = r̂
  (E7) soft:  r̃ = r̂ − λ disc(s, a)
  (E8) ã = tanh(u), u ~ N(μ(s), σ²(s)),  log π(ã|s) = Σ_i [ log N(u_i; μ, σ²) − log(1 − ã_i²) ]
  (E9) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − α log π(ã′|s′) ),  ã′ ~ π(·|s′)
  (E10) L_Q = Σ_k E[ (Q_k(s, a) − y)² ],  over 5% real and 95% imagined steps
  (E11) L_π = E[ α log π(ã|s) − min_k Q_k(s, ã) ],  ã ~ π(·|s)
  (E12) L_α = E[ −log α · (log π(ã|s) + H̄) ],  H̄ = −dim(A), the target of π's entropy
  (E13) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, M = 4 networks of the model, K = 2 critics. d is
terminated: a truncated episode bootstraps. Observations are raw, actions lie in [-1, 1].

Differences from the paper and the official code (aravindr93/mjrl, branch v2):
  D1 The planner is SAC (unifloral's is SAC-N); there natural policy gradient after cloning, with
     γ = 0.999. Rollouts are short, from all states of the data; there 400–500 steps, from first
     states of episodes. Fewer pairs are unknown in 5 steps: a short horizon weakens pessimism.
  D2 HALT pays for ever [definition], so no discounted return in the data is below V(HALT); there a
     path ends with one reward, the data's least minus 30 to 200 [experiments], or with 0 [code].
  D3 An unknown pair itself earns −κ as well [experiments], not r [definition].
  D4 The reward is learned; the paper's is known, which is easier [mjrl issue 42].
  D5 β is 5 for all; the paper chooses among 0, 5, 10, … by playing in the real environment, the
     code has a third of the largest disc.
  D6 25 epochs at 1e-3 [code]; the paper has 300 to 3000 at 5e-4, and 1024 units for halfcheetah.
  D7 disc is in the observation's units [paper]; the code multiplies speeds by 0.02, and scales what
     the model sees and predicts by mean absolute deviations, not standard ones.
  D8 Bodies are Gymnasium's; there the centre of mass's speed is observed, hopper's bounds narrower.
  D9 λ in (E7) has no published value: compare disc with the rewards.

Watch: `ends`, the share of a batch that ends. Where it stays near 0 while q_policy is far above the
discounted return that is earned, pairs are not found unknown: raise --horizon, or lower --beta.

Run:     python algorithms/morel.py --env hopper-medium [--penalty soft]
Expect:  near 0 on hopper-medium (--horizon 50 --beta 15: 69.5); more on replay, results/README.md.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import (
    Batch,
    Dataset,
    Run,
    check_range,
    fail,
    known_next,
    load_dataset,
    read_fitted,
    record_on_cuda,
    write_atomically,
)

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
    steps: int = 1_000_000  # gradient updates [=]
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
    batch_size: int = 256  # transitions per update [=]
    actor_lr: float = 3e-4  # Adam, for π and α [=] [D1]
    critic_lr: float = 3e-4  # Adam [=] [D1]
    gamma: float = 0.99  # discount γ [=] [D1]
    target_rate: float = 0.005  # share of the new weights in (E13) [=]
    # MOReL
    dynamics_epochs: int = 25  # through the data, for (E2) [C d4rl_hopper_medium.txt] [D6]
    penalty: Literal["halt", "soft"] = "halt"  # (E6) as in the paper, (E7) as in the notes [P]
    beta: float = 5.0  # β in (E5), for halt; larger: fewer pairs are unknown [P App. C.5] [D5]
    penalty_weight: float = 1.0  # λ in (E7), for soft [D9]
    rollout_every: int = 1_000  # updates between rollouts [D1]
    rollout_starts: int = 10_000  # states of the data that rollouts start from [D1]
    horizon: int = 5  # steps of a rollout [D1]
    retain: int = 5  # rollouts that the pool has room for [D1]
    real_share: float = 0.05  # share of real transitions in a batch [D1]


HIDDEN = (256, 256)  # widths of actor and critics [=]
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # as in sac.py [=]
NETWORKS = 4  # of the model [P Table 4]
DYNAMICS_HIDDEN = (512, 512)  # widths of the model [P Table 4]
DYNAMICS_LR = 1e-3  # Adam [C d4rl_hopper_medium.txt] [D6]
DYNAMICS_BATCH = 256  # rows of each network [C d4rl_hopper_medium.txt] [D6]


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
    """(E8) actions (..., A), drawn with the reparameterisation trick, and their log π (...)."""
    # (E8) the second term of log_prob is log(1 − tanh²u), in a form that does not overflow
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
    """M networks for y = [next_obs − obs | reward], given x = [obs | action], in raw units."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        widths = (obs_dim + action_dim, *DYNAMICS_HIDDEN, obs_dim + 1)
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(EnsembleLinear(NETWORKS, inputs, outputs))
        self.register_buffer("x_mean", torch.zeros(widths[0]))
        self.register_buffer("x_std", torch.ones(widths[0]))
        self.register_buffer("y_mean", torch.zeros(widths[-1]))
        self.register_buffer("y_std", torch.ones(widths[-1]))
        self.register_buffer("disc_mean", torch.tensor(0.0))  # over the data, as the next
        self.register_buffer("disc_std", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S + A), or (M, B, S + A) with rows for each network, to y, (M, B, S + 1)."""
        x = ((x - self.x_mean) / self.x_std).expand(NETWORKS, -1, -1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        # (E1)
        return self.y_mean + self.y_std * self.layers[-1](x)


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
    predicted = dynamics(x)
    assert y.shape == predicted.shape, "a target (B, S + 1) would give all networks the same rows"
    # (E2) a sum over networks, which share nothing
    return ((predicted - y) / dynamics.y_std).pow(2).mean(dim=(1, 2)).sum()


def disagreement(y: Tensor) -> Tensor:
    """(E3): disc, (M, B, S + 1) -> (B,)."""
    i, j = torch.triu_indices(len(y), len(y), 1, device=y.device)  # each pair of networks once
    # (E3) at one point; between points of the data it would be the size of the world
    return (y[i, :, :-1] - y[j, :, :-1]).norm(dim=-1).amax(dim=0)


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


def mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the columns of (N, D), (D,) each; a column that never changes gets the deviation 1."""
    std = x.std(dim=0, correction=0)
    return x.mean(dim=0), torch.where(std < 1e-12, 1.0, std)


def fit(dynamics: Dynamics, data: Dataset, args: Args, run: Run) -> None:
    """(E2), each network in its own order of rows, then disc; or reads what was fitted earlier."""
    key = f"{run.dataset['fingerprint']}-{args.dynamics_epochs}"
    path = run.folder.with_name(f"{run.folder.name}-model-{key}.pt")
    if read_fitted(path, dynamics):
        return
    x, y = model_rows(data)
    dynamics.x_mean, dynamics.x_std = mean_and_std(x)
    dynamics.y_mean, dynamics.y_std = mean_and_std(y)
    rng = torch.Generator(data.device).manual_seed(args.seed)  # leaves torch's own draws alone
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=DYNAMICS_LR, fused=True)
    bar = tqdm(range(1, args.dynamics_epochs + 1), desc="fitting the model", unit=" epochs")
    for epoch in bar:
        order = torch.rand((NETWORKS, len(x)), generator=rng, device=data.device).argsort(dim=1)
        for index in order.split(DYNAMICS_BATCH, dim=1):
            loss = dynamics_loss(dynamics, x[index], y[index])
            descend(loss, optimizer)
            if run.stop:
                fail("stopped before the model was fitted; start again with the same command")
        if not loss.isfinite():
            fail(f"the model's loss is {loss.item()} by epoch {epoch}")
        bar.set_postfix_str(f"loss {loss.item():.3g}", refresh=False)
    with torch.no_grad():
        disc = torch.cat([disagreement(dynamics(part)) for part in x.split(10_000)])
    dynamics.disc_mean = disc.mean()
    dynamics.disc_std = disc.std(correction=0)
    write_atomically(path, lambda part: torch.save(dynamics.state_dict(), part))
    run.since += bar.format_dict["elapsed"]  # the fit's time does not count in updates per second


def halt(args: Args, data: Dataset, dynamics: Dynamics, disc: Tensor, reward: Tensor,
         fell: Tensor) -> tuple[Tensor, Tensor]:
    """(E5), (E6): reward and end of each imagined step, (B,) each, in the pessimistic MDP."""
    # (E5)
    unknown = disc > dynamics.disc_mean + args.beta * dynamics.disc_std
    # (E6) HALT's value is known, so that no network has to learn it
    halt_value = -data.reward.abs().max() / (1 - args.gamma)
    return torch.where(unknown, halt_value, reward), fell | unknown


def soft_penalty(reward: Tensor, disc: Tensor, weight: float) -> Tensor:
    """(E7): the penalised reward of each imagined step, (B,)."""
    # (E7) at every pair, known or not; the rollout continues
    return reward - weight * disc


@torch.no_grad()
def imagine(args: Args, data: Dataset, dynamics: Dynamics, actor: Actor) -> Batch:
    """(E3) to (E7): rollouts in the model from states of the data."""
    obs = data.sample(args.rollout_starts).obs
    network = torch.randint(NETWORKS, (len(obs),), device=obs.device)
    steps = []
    for _ in range(args.horizon):
        action, _ = sample_action(*actor(obs))
        predicted = dynamics(torch.cat([obs, action], dim=1))  # (M, B, S + 1)
        disc = disagreement(predicted)
        # (E4) without the fall, fallen robots would continue to earn
        y = predicted[network, torch.arange(len(obs), device=obs.device)]
        next_obs = obs + y[:, :-1]
        reward = y[:, -1]
        terminated = FALLS[data.recorded_env](next_obs)
        if args.penalty == "halt":
            reward, terminated = halt(args, data, dynamics, disc, reward, terminated)
        else:
            reward = soft_penalty(reward, disc, args.penalty_weight)
        steps.append(Batch(obs, action, reward, next_obs, terminated.to(obs.dtype)))
        obs = next_obs[~terminated]
        network = network[~terminated]
    return join(*steps)


@torch.no_grad()
def soft_td_target(actor: Actor, critic_target: Critic, entropy_coef: Tensor, batch: Batch,
                   gamma: float) -> Tensor:
    """(E9): the regression target y, (B,)."""
    # (E9) unlike in sac.py, imagined steps have tried actions such as next_action
    next_action, next_log_prob = sample_action(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    soft_value = next_q - entropy_coef * next_log_prob
    return batch.reward + gamma * (1 - batch.terminated) * soft_value


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E10); also the mean Q of the batch's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E10)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor,
               obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E11); also log π (B,), which (E12) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E11)
    loss = (entropy_coef * log_prob - q.min(dim=0).values).mean()
    return loss, log_prob.detach(), q.detach().mean()


def entropy_coef_loss(log_entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E12): the loss of the entropy coefficient α."""
    # (E12) α grows while the policy's entropy, E[−log π], is below its target
    return -(log_entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E13) target ← target + rate · (online − target), for all parameters at once."""
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

    # (E13)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_batch": q_batch, "q_policy": q_policy,
            "ends": batch.terminated.mean(), "entropy": -log_prob.mean(),
            "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check_range(args, "batch_size dynamics_epochs rollout_every rollout_starts horizon retain", 1)
    check_range(args, "actor_lr critic_lr beta penalty_weight", 0)
    check_range(args, "gamma target_rate real_share", 0, 1)
    if args.penalty == "halt" and args.gamma == 1:
        fail("--gamma must be below 1: HALT pays for ever")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    model_rows(data)  # may refuse them
    run = Run(args, data, variant="-soft" if args.penalty == "soft" else "", gflop=0.68)

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
    train(tyro.cli(Args))
