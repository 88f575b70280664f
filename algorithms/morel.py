"""MOReL: SAC in a learned model of the environment that comes to a halt where its networks disagree.

Kidambi, Rajeswaran, Netrapalli & Joachims, "MOReL: Model-Based Offline Reinforcement Learning", NeurIPS 2020, arXiv 2005.05951.
Notes: Model-Based Offline RL › MOReL. (They write r̃ = r − λu, a soft fine like MOPO's; the paper draws a hard line, (E6).)

Where several networks fitted to the same data agree, the data have shown what happens; where they disagree, nobody knows. MOReL
calls pairs (s, a) unknown where the disagreement is over a threshold; there its MDP goes to a state HALT, never left, that pays
−κ per step, so what a policy earns bounds its real return from below. mopo.py fines, morel.py halts, combo.py pushes Q down.

  (E1) f_m(s, a) = μ_y + σ_y · MLP_m( [s, a] standardised ),  of y = [s′ − s, r]
  (E2) L_model = Σ_m mean[ ( (f_m − y) / σ_y )² ],  m = 1…4, of different initial weights and orders of the same rows
  (E3) disc(s, a) = max_{i,j} ‖f_i(s, a) − f_j(s, a)‖₂,  of the next state alone
  (E4) unknown(s, a):  disc(s, a) > mean_D disc + β std_D disc
  (E5) [ŝ′ − s, r̂] = f_m(s, a),  d̂ = 1 where the body falls at ŝ′ by its own rule,  m one network for a whole rollout
  (E6) unknown:  r̃ = V(HALT) = −κ / (1 − γ),  d̂ = 1,  κ = max_D |r|;  else r̃ = r̂
  (E7) ã = tanh(u), u = μ(s) + σ(s)·ε,  log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E8) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − α log π(ã′|s′) ),  ã′ ~ π(·|s′),  over 5% real and 95% imagined steps
  (E9) L_Q = Σ_k E[ (Q_k(s, a) − y)² ]
  (E10) L_π = E[ α log π(ã|s) − min_k Q_k(s, ã) ],  (E11) L_α = E[ −log α · (log π(ã|s) + H̄) ],  ã ~ π(·|s), H̄ = −dim(A)
  (E12) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, M = 4 networks of the model, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the paper and the official code (aravindr93/mjrl, branch v2):
  D1 The planner is SAC [as in unifloral], there natural policy gradient after cloning, γ = 0.999. So rollouts are many, short,
     and from all states of the data, there 400–500 steps from the first ones. 5% of a batch is real.
  D2 HALT pays for ever, as the paper defines it; its experiments stop a path with one reward, the data's least minus 30 to 200,
     and its code adds 0. With κ from the data nothing is worth less than HALT, where one −65 beats most of pendulum's returns.
  D3 An unknown pair itself earns −κ as well [experiments], not r [definition]: its r̂ is as unknown as its ŝ′.
  D4 The reward is learnt; the paper's is known, which is easier [mjrl issue 42].
  D5 β is 5 for all; the paper tries steps of 5 in the real environment, the code has a third of the largest disc.
  D6 25 epochs at 1e-3 [code, hopper-medium], there 300 (halfcheetah 3000) at 5e-4; 512 units for halfcheetah too, there 1024.
  D7 disc is in the observation's units, σ_y a standard deviation [paper]; the code scales speeds by 0.02, by mean deviations.
  D8 Bodies are Gymnasium's; there the speed of the centre of mass is observed too, and hopper's bounds are narrower.

Run:     python algorithms/morel.py --env hopper-medium
Expect:  hopper-medium 2.3 (the data 44, BC 47 and 54) after 100,000 updates in a model of 10 epochs, seed 0, in 37 minutes on a
         core. With this β the pessimism hardly ever speaks: 0.8% of the data's pairs are unknown, 0.5% of π's actions there,
         4.6% of random ones, and none on π's real path. At the start Q promises 149, and π earns 44, discounted.
         halfcheetah-medium-replay 35.8 (the data 20, BC 16): as many updates, 30 epochs, 28 minutes. The threshold is as
         silent, for 0.4% of the data's pairs and 0.1% of random actions, but no robot falls here, and Q promises 169, 306 is
         earned.
         pendulum-medium-replay (the data −1148, a clone the same): −526, −587, −420 after 3,000 updates.
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
from common import Batch, Dataset, Run, check, load_dataset, record_on_cuda, write_atomically


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [=]
    batch_size: int = 256  # transitions per update [=]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-4  # Adam, for π and α [=] [D1]
    critic_lr: float = 3e-4  # Adam [=] [D1]
    gamma: float = 0.99  # discount γ [=] [D1]
    target_rate: float = 0.005  # share of the new weights in (E12) [=]
    # MOReL
    dynamics_epochs: int = 25  # through the data, for (E2) [C d4rl_hopper_medium.txt] [D6]
    beta: float = 5.0  # β in (E4), larger knows more; 0 leaves about half of the data unknown [P App. C.5] [D5]
    rollout_every: int = 1_000  # updates between rollouts [D1]
    rollout_starts: int = 10_000  # states of the data that a rollout starts from [D1]
    horizon: int = 5  # steps that a rollout goes [D1]
    retain: int = 5  # rollouts that the pool has room for, the newest [D1]
    real_share: float = 0.05  # of a batch, rounded down [D1]


HIDDEN = (256, 256)  # widths of actor and critics [=]
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # as in sac.py [=]
NETWORKS, DYNAMICS_HIDDEN = 4, (512, 512)  # of the model [P Table 4]
DYNAMICS_LR, DYNAMICS_BATCH = 1e-3, 256  # Adam; rows of each network [C d4rl_hopper_medium.txt] [D6]
FALLS = {  # (E5) by body: next_obs (B, S) -> whether the episode is over, (B,); exactly the conditions of Gymnasium's v5
    "Hopper-v5": lambda s: ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1)),
    "Walker2d-v5": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2) & (s[:, 1].abs() < 1)),
    **dict.fromkeys(("HalfCheetah-v5", "Pendulum-v1"), lambda s: torch.zeros_like(s[:, 0], dtype=torch.bool)),
}


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
    """M deterministic models of y = [next_obs − obs | reward], given x = [obs | action]; knows the data's units of both."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        widths = (obs_dim + action_dim, *DYNAMICS_HIDDEN, obs_dim + 1)
        self.layers = nn.ModuleList(EnsembleLinear(NETWORKS, i, o) for i, o in zip(widths, widths[1:]))
        for name, dim in (("x_units", widths[0]), ("y_units", widths[-1]), ("disc_units", 1)):  # mean and std, (2, dim)
            self.register_buffer(name, torch.tensor([[0.0], [1.0]]).repeat(1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S + A), or (M, B, S + A) with rows for each network, to y, (M, B, S + 1)."""
        x = ((x - self.x_units[0]) / self.x_units[1]).expand(NETWORKS, -1, -1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        # (E1)
        return self.y_units[0] + self.y_units[1] * self.layers[-1](x)


def dynamics_loss(dynamics: Dynamics, x: Tensor, y: Tensor) -> Tensor:
    """(E2): each network on its own rows, (M, B, S + A) and (M, B, S + 1)."""
    predicted = dynamics(x)
    assert y.shape == predicted.shape, "a target (B, S + 1) would broadcast, and every network learn from the same rows"
    # (E2) a sum over networks, which share nothing
    return ((predicted - y) / dynamics.y_units[1]).pow(2).mean(dim=(1, 2)).sum()


def disagreement(y: Tensor) -> Tensor:
    """(E3): disc, (M, B, S + 1) -> (B,)."""
    i, j = torch.triu_indices(len(y), len(y), 1, device=y.device)  # each pair of networks once
    # (E3) at one point; between points of the data it would be the size of the world, and no pair unknown
    return (y[i, :, :-1] - y[j, :, :-1]).norm(dim=-1).amax(dim=0)


def fit(dynamics: Dynamics, data: Dataset, args: Args, run: Run) -> None:
    """(E2), each network with its own order of the rows, then disc on the data; or what an earlier start left behind."""
    path = run.folder.with_name(f"{run.folder.name}-model-{run.dataset['fingerprint']}-{args.dynamics_epochs}.pt")
    if path.exists():
        dynamics.load_state_dict(torch.load(path, map_location=data.device, weights_only=True))
        return
    rng, rows = torch.Generator(data.device).manual_seed(args.seed), data.columns(data.packed)
    # a D4RL file without next_observations has another episode's start after a termination: the body's rule unmasks it
    known = (~rows.terminated.bool() | FALLS[data.env_id](rows.next_obs)).nonzero()[:, 0]
    x = torch.cat([rows.obs, rows.action], dim=1)[known]
    y = torch.cat([rows.next_obs - rows.obs, rows.reward[:, None]], dim=1)[known]
    for units, values in ((dynamics.x_units, x), (dynamics.y_units, y)):
        std = values.std(dim=0, correction=0)
        units.copy_(torch.stack([values.mean(dim=0), torch.where(std < 1e-12, 1.0, std)]))
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=DYNAMICS_LR, fused=True)
    for epoch in (bar := tqdm(range(1, args.dynamics_epochs + 1), desc="fitting the model", unit=" epochs")):
        order = torch.rand((NETWORKS, len(x)), generator=rng, device=data.device).argsort(dim=1)
        for batch in order.split(DYNAMICS_BATCH, dim=1):
            loss = dynamics_loss(dynamics, x[batch], y[batch])
            descend(loss, optimizer)
            check(not run.stop, "stopped before the model was fitted, so nothing is kept; start again without --resume")
        check(loss.isfinite(), f"the model's loss is {loss.item()} by epoch {epoch}")
        bar.set_postfix_str(f"loss {loss.item():.3g}", refresh=False)
    with torch.no_grad():
        disc = torch.cat([disagreement(dynamics(part)) for part in x.split(10_000)])
    dynamics.disc_units.copy_(torch.stack([disc.mean(), disc.std(correction=0)])[:, None])
    write_atomically(path, lambda part: torch.save(dynamics.state_dict(), part))
    run.since += bar.format_dict["elapsed"]  # updates per second are of updates


@torch.no_grad()
def imagine(args: Args, data: Dataset, dynamics: Dynamics, actor: Actor) -> Tensor:
    """(E4), (E5), (E6): rollouts in the model from states of the data; rows as Dataset packs them, (n, 2S + A + 2)."""
    worst = -data.columns(data.packed).reward.abs().max() / (1 - args.gamma)  # V(HALT)
    obs, rows = data.sample(args.rollout_starts).obs, []
    network = torch.randint(NETWORKS, (len(obs),), device=obs.device)
    for _ in range(args.horizon):
        action, _ = sample_action(*actor(obs))
        y = dynamics(torch.cat([obs, action], dim=1))
        # (E4)
        mean, std = dynamics.disc_units
        unknown = disagreement(y) > mean + args.beta * std
        # (E5)
        y = y[network, torch.arange(len(obs), device=obs.device)]
        next_obs = obs + y[:, :-1]
        # (E6) HALT's value is known, so no network has to learn it; a pair that is unknown and falls is unknown
        reward, terminated = torch.where(unknown, worst, y[:, -1]), FALLS[data.env_id](next_obs) | unknown
        rows.append(torch.cat([obs, action, next_obs, reward[:, None], terminated[:, None]], dim=1))
        obs, network = next_obs[~terminated], network[~terminated]
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
    return {"critic_loss": q_loss.detach(), "q_batch": q_batch, "q_policy": q_policy, "ends": batch.terminated.mean(),
            "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    for name in ("dynamics_epochs", "rollout_every", "rollout_starts", "horizon", "retain"):
        check(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    check(0 <= args.real_share <= 1 and args.gamma < 1, "--real-share must be from 0 to 1, --gamma below 1: HALT has no end")
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
    train(tyro.cli(Args))
