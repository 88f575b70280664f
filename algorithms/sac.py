"""Soft Actor-Critic, offline ("SAC-off") and online.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905 (first: ICML 2018, arXiv 1801.01290).
Notes: Offline RL的主要问题 ⇒ Distributional Shift.

SAC learns Q of a policy that maximises reward plus entropy, and moves the policy towards actions that Q likes. Online,
acting on a wrong Q corrects it. Offline (`--env hopper-medium`) nothing does: the target asks Q about the policy's own
actions, which the data never tried, an error there is chosen because it looks good, and bootstrapping feeds it back.
That is the notes' distributional shift; watch `q_policy` run away, drag `q_data` with it, and the return collapse.

  (E1) ã = tanh(u), u = μ(s) + σ(s)·ε,  log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E2) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − α log π(ã′|s′) ),  ã′ ~ π(·|s′)
  (E3) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E4) L_π = E_D[ α log π(ã|s) − min_k Q_k(s, ã) ],  ã ~ π(·|s)
  (E5) L_α = E_D[ −log α · (log π(ã|s) + H̄) ],  H̄ = −dim(A)
  (E6) Q̄ ← Q̄ + rate · (Q − Q̄)

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode bootstraps.
Observations are raw, as in the papers; actions lie in [-1, 1] and the actor converts them to the environment's units.

Differences from the papers and from rlkit, the code family that made D4RL's data:
  D1 Steps are taken one after the other, Q, π, α, targets, as OfflineRL-Kit does; rlkit builds all losses first.
  D2 Target critics start as copies; rlkit's start as other random networks, which 1000 updates forget.
  D3 PyTorch's default initialisation in place of rlkit's, as CleanRL does.
  D4 (E5) multiplies log α [rlkit], not α [CleanRL, d3rlpy]: the same fixed point, another speed.

Run:     python algorithms/sac.py --env hopper-medium
         python algorithms/sac.py --online --env hopper
Expect:  offline, hopper-medium (the data score 44): 0.6 after 100,000 updates, seed 0, and a mean Q of 1.6e8 at the policy's
         actions, where no return in the data exceeds 2,900: it fails as it should. 9 minutes on 2 cores; results/curves/.
"""
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import SUITE, Batch, Dataset, Run, check, load_dataset, make_env, record_on_cuda, write_atomically


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file; with --online a body: hopper
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates; online also steps in the environment [=]
    batch_size: int = 256  # transitions per update [C rlkit]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-4  # Adam, for π and α [C rlkit]
    critic_lr: float = 3e-4  # Adam [C rlkit]
    gamma: float = 0.99  # discount γ [C rlkit]
    target_rate: float = 0.005  # share of the new weights in (E6) [C rlkit]
    # SAC, online
    online: bool = False  # act in the real environment, learn from what was lived so far
    random_steps: int = 5_000  # first steps, with uniform actions and no update [C CleanRL]
    snapshot_every: int = 10_000  # steps between saved policies, the makings of behaviour data [=]


HIDDEN = (256, 256)  # widths of actor and critics [C rlkit]
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # [C rlkit]


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

    def to_env(self, action: Tensor) -> Tensor:
        """[-1, 1] to the environment's own action units."""
        return self.action_mid + self.action_half * action

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's actions (B, A), without noise: tanh of the mean."""
        return self.to_env(torch.tanh(self(obs)[0]))


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E1) actions (..., A) drawn with the reparameterisation trick, and their log-densities (...)."""
    # (E1)
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


@torch.no_grad()
def soft_td_target(actor: Actor, critic_target: Critic, entropy_coef: Tensor, batch: Batch, gamma: float) -> Tensor:
    """(E2): the regression target y, (B,)."""
    # (E2) offline, this is where it goes wrong: next_action need not resemble anything in the data
    next_action, next_log_prob = sample_action(*actor(batch.next_obs))
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + gamma * (1 - batch.terminated) * (next_q - entropy_coef * next_log_prob)


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E3); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E3)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, entropy_coef: Tensor, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E4); also log π (B,), which (E5) needs, and the mean Q of the policy's actions."""
    action, log_prob = sample_action(*actor(obs))
    q = critic(obs, action)  # (K, B)
    # (E4)
    return (entropy_coef * log_prob - q.min(dim=0).values).mean(), log_prob.detach(), q.detach().mean()


def entropy_coef_loss(log_entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E5): α grows while the policy's entropy is below its target."""
    # (E5)
    return -(log_entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E6) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, actor: Actor, critic: Critic, critic_target: Critic, log_entropy_coef: Tensor,
           actor_optimizer, critic_optimizer, entropy_optimizer) -> dict[str, Tensor]:
    """One step of SAC: Q, π, α, targets."""
    batch = data.sample(args.batch_size)
    entropy_coef = log_entropy_coef.detach().exp()

    y = soft_td_target(actor, critic_target, entropy_coef, batch, args.gamma)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    pi_loss, log_prob, q_policy = actor_loss(actor, critic, entropy_coef, batch.obs)
    descend(pi_loss, actor_optimizer)

    descend(entropy_coef_loss(log_entropy_coef, log_prob, -data.action_dim), entropy_optimizer)

    # (E6)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "entropy": -log_prob.mean(),
            "entropy_coef": entropy_coef}


def interact(args: Args, data: Dataset, actor: Actor, start: int):
    """Online only: each next() takes one step in the environment and stores it. A resumed run begins a new episode."""
    env = make_env(data.env_id, "training")
    obs, _ = env.reset(seed=args.seed + start)
    while True:
        with torch.no_grad():
            action = 2 * torch.rand(1, data.action_dim, device=data.device) - 1
            if data.size >= args.random_steps:
                action, _ = sample_action(*actor(torch.as_tensor(obs[None], dtype=torch.float32, device=data.device)))
            next_obs, reward, terminated, truncated, _ = env.step(actor.to_env(action)[0].cpu().numpy())
        # `truncated` is not stored: a time limit is not the end of the task
        row = np.concatenate([obs, action[0].cpu().numpy(), next_obs, [reward, terminated]])
        data.packed[int(data.size)] = torch.as_tensor(row)
        data.size += 1
        obs = env.reset()[0] if terminated or truncated else next_obs
        yield


def train(args: Args) -> None:
    if args.online:
        check(args.env in SUITE, f"--online takes a body, one of {', '.join(SUITE)}, not '{args.env}'")
        data = Dataset(args.env, SUITE[args.env][0], args.steps, args.device, SUITE[args.env][1:])
        check(not data.num_actions, f"{args.env} has discrete actions, this algorithm needs the other kind; try dqn.py")
    else:
        data = load_dataset(args.env, args.device)
    run = Run(args, data, variant="-online" if args.online else "")
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    critic_target = copy.deepcopy(critic)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    entropy_optimizer = adam([log_entropy_coef], lr=args.actor_lr)

    memory = {"packed": data.packed, "size": data.size} if args.online else {}
    start = run.resume(actor=actor, critic=critic, critic_target=critic_target, log_entropy_coef=log_entropy_coef,
                       actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
                       entropy_optimizer=entropy_optimizer, **memory)
    one_update = record_on_cuda(partial(update, args, data, actor, critic, critic_target, log_entropy_coef,
                                        actor_optimizer, critic_optimizer, entropy_optimizer), data.device)
    environment = interact(args, data, actor, start) if args.online else None
    for step in range(start + 1, args.steps + 1):
        if args.online:
            next(environment)
            if step % args.snapshot_every == 0:
                write_atomically(run.folder / "snapshots" / f"{step:07d}.pt", lambda path: torch.save(actor.state_dict(), path))
        metrics = one_update() if not args.online or step > args.random_steps else {}
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
