"""BRAC, with policy regularisation (BRAC-p) or with the value penalty too (BRAC-v); the divergence is the KL.

Wu, Tucker & Nachum, "Behavior Regularized Offline Reinforcement Learning", arXiv 1911.11361.
Notes: Policy Constraints (软约束); Value Function Regularization. (There the penalty stands beside γ E[Q(s′, a′)], at no stated
observation. It belongs inside the bracket, as in (E5): D is taken at s′, discounted with Q, and ends with the episode.)

Fit the behaviour first: a Gaussian clone b. Then learn an actor and critics as in SAC, but pay for the distance D(π, b), either
in the actor's loss alone, which keeps the next action near the data's, or also in the value, which then avoids observations
where the policy will have to leave the data later. All rests on b: where the clone is wrong, so is the constraint.

  (E1) ã = tanh(u), u = μ(s) + σ(s)·ε,  log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E2) L_b = E_D[ −log b(clip(a)|s) + α log b(ã|s) ],  ã ~ b(·|s);  clip to ±(1 − 0.001), as tanh⁻¹(1) = ∞
  (E3) L_α = E_D[ −α (log b(ã|s) + H̄) ],  α ≥ 0,  H̄ = −dim(A)
  (E4) D(s) = (1/N) Σ_i [ log π(a_i|s) − log b(clip(a_i)|s) ],  a_1 … a_N ~ π(·|s)
  (E5) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − w D(s′) ),  ã′ ~ π(·|s′);  −w D(s′) in BRAC-v only
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) L_π = E_D[ w D(s) − min_k Q_k(s, ã) ],  ã ~ π(·|s);  during the warm start without Q
  (E8) Q̄ ← Q̄ + rate · (Q − Q̄)

The clone, (E2) and (E3), is finished before the first update, and each update begins with (E8), as in the official code.
(E4) estimates KL(π ‖ b) and may come out negative; its samples are its own.

Shapes: B batch, S observation, A action, K = 2 critics, N samples. d is terminated: a truncated episode bootstraps.
Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Settings are those of D4RL's evaluation (Farama-Foundation/D4RL-Evaluations, brac/), whose scores are the ones quoted; the
authors' own code (google-research) has w = 0.1, a tenfold actor_lr, 300,000 steps of cloning, and the value penalty on.
Differences (D1 and the float64 of D4 from D4RL's code, the rest from both):
  D1 D4RL's loader drops each row that terminates and stops the bootstrap one row before it, bootstraps across time limits into
     the next episode, and keeps the first million rows, so only part of medium-expert. Ours does none of this.
  D2 Target critics start as copies, not as other random networks; PyTorch's default initialisation, not Keras's.
  D3 (E3) takes the sample of (E2), not a new one; α is kept ≥ 0 by a clamp, not by a rectifier with its own gradient.
  D4 The policy's entropy bonus, 0 there, and learning w, off there, are left out. Critics are float32; D4RL's are float64.

Run:     python algorithms/brac.py --env hopper-medium
         python algorithms/brac.py --env hopper-medium --value-penalty
Expect:  BRAC-p on hopper-medium 84.4 (the data 44, BC 47 and 54) after 50,000 updates of the clone and 80,000 more, seed 0, in
         half an hour on a core. Read its curve in results/curves/: once Q has a say, evaluations fall from 33 to 6, and rise
         from 50,000 on. On hopper-medium-replay 7.4 (the data 15, BC 18): evaluations rise to 34 at 40,000, and then fall.
         pendulum-medium-replay (the data −1148): −390, −587, −151 with its end-to-end test's settings.
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
from common import Batch, Dataset, Run, check, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates, after the cloning [C train_brac.py]
    batch_size: int = 256  # transitions per update [C brac/]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 20  # per evaluation [C train_brac.py]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-5  # Adam [C train_brac.py]; 3e-4 in the authors' code
    critic_lr: float = 1e-3  # Adam [C train_brac.py]
    gamma: float = 0.99  # discount γ [C brac/]
    target_rate: float = 0.005  # share of the new weights in (E8) [C brac/]
    # behaviour clone
    behavior_steps: int = 1_000_000  # gradient updates of the clone, before all others [C train_brac.py]
    behavior_lr: float = 5e-4  # Adam, for b and α [C train_brac.py]
    # BRAC
    value_penalty: bool = False  # BRAC-v, the penalty also in (E5); else BRAC-p [C train_brac.py]
    divergence_weight: float = 1.0  # w in (E5), (E7); the paper's α [C train_brac.py]; 0.1 in the authors' code
    num_samples: int = 4  # N in (E4) [C brac_primal_agent.py]
    warm_start_steps: int = 20_000  # first updates, in which the actor only learns to be b [C brac_primal_agent.py]


HIDDEN = (300, 300)  # widths of the critics [C train_brac.py]
ACTOR_HIDDEN = (200, 200)  # widths of actor and clone [C train_brac.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 0.0  # [C networks.py]
CLIP = 1 - 1e-3  # of actions whose u = tanh⁻¹(a) is needed [C divergences.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Tanh-Gaussian π(a|s) on [-1, 1]^A, and the clone b. Buffers hold the units, so a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *ACTOR_HIDDEN, 2 * action_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of u, the action before tanh: (B, A) each."""
        mean, raw = self.net(obs).chunk(2, dim=-1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1)  # a soft bound, unlike SAC's

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's actions (B, A), without noise: tanh of the mean."""
        return self.action_mid + self.action_half * torch.tanh(self(obs)[0])


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E1) actions (..., A) drawn with the reparameterisation trick, and their log-densities (...)."""
    # (E1)
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 − tanh²u) without overflow
    return torch.tanh(u), log_prob.sum(-1)


def log_density(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """The same density at given actions (..., A), clipped: (...). Where the clip bites, no gradient reaches the action."""
    u = torch.atanh(action.clamp(-CLIP, CLIP))
    log_normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


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


def behavior_loss(behavior: Actor, entropy_coef: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(E2): maximum likelihood with an entropy bonus; also log b of a sample (B,), which (E3) needs."""
    policy = behavior(batch.obs)
    _, log_prob = sample_action(*policy)
    # (E2) without the bonus b is sharper than the data, and leaving it costs more than it should
    return (entropy_coef * log_prob - log_density(*policy, batch.action)).mean(), log_prob.detach()


def entropy_coef_loss(entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E3): α grows while the clone's entropy is below its target. Here it is α that is learned, in SAC its logarithm."""
    # (E3)
    return -(entropy_coef * (log_prob + target_entropy)).mean()


def divergence(policy: tuple[Tensor, Tensor], behavior: tuple[Tensor, Tensor], num: int) -> Tensor:
    """(E4): (B,), with its gradient to the policy through the actions. Both are mean and log std, (B, A) each."""
    action, log_prob = sample_action(*(x.unsqueeze(1).expand(-1, num, -1) for x in policy))  # (B, N, A), (B, N)
    # (E4) only b sees the clipped action: π's density is exact however near ±1 its own sample is
    return (log_prob - log_density(*(x.unsqueeze(1) for x in behavior), action)).mean(dim=1)


@torch.no_grad()
def td_target(actor: Actor, behavior: Actor, critic_target: Critic, batch: Batch, args: Args) -> Tensor:
    """(E5): the regression target y, (B,)."""
    next_policy = actor(batch.next_obs)
    next_action, _ = sample_action(*next_policy)
    # (E5)
    next_value = critic_target(batch.next_obs, next_action).min(dim=0).values
    # (E5) the one line by which BRAC-v differs from BRAC-p
    if args.value_penalty:
        next_value = next_value - args.divergence_weight * divergence(next_policy, behavior(batch.next_obs), args.num_samples)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_value


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E6); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E6)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, behavior: Actor, critic: Critic, obs: Tensor, args: Args, with_q: bool) -> tuple[Tensor, Tensor]:
    """(E7); also the mean divergence. `with_q` says that the warm start is over."""
    policy = actor(obs)
    with torch.no_grad():
        clone = behavior(obs)
    distance = divergence(policy, clone, args.num_samples)  # (B,)
    # (E7)
    loss = args.divergence_weight * distance.mean()
    if with_q:
        action, _ = sample_action(*policy)
        loss = loss - critic(obs, action).min(dim=0).values.mean()
    return loss, distance.detach().mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E8) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update_behavior(args: Args, data: Dataset, behavior: Actor, entropy_coef: Tensor, behavior_optimizer,
                    entropy_optimizer) -> dict[str, Tensor]:
    """One step of the clone: b, α."""
    batch = data.sample(args.batch_size)
    loss, log_prob = behavior_loss(behavior, entropy_coef.detach(), batch)
    descend(loss, behavior_optimizer)
    descend(entropy_coef_loss(entropy_coef, log_prob, -data.action_dim), entropy_optimizer)
    entropy_coef.data.clamp_(min=0)
    return {"behavior_loss": loss.detach(), "behavior_entropy": -log_prob.mean(), "entropy_coef": entropy_coef.detach()}


def update(args: Args, data: Dataset, actor: Actor, behavior: Actor, critic: Critic, critic_target: Critic,
           actor_optimizer, critic_optimizer, with_q: bool) -> dict[str, Tensor]:
    """One step of BRAC: targets, Q, π. The official order: the targets follow first, from the step before."""
    batch = data.sample(args.batch_size)
    # (E8)
    polyak_update(critic_target, critic, args.target_rate)

    y = td_target(actor, behavior, critic_target, batch, args)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    pi_loss, distance = actor_loss(actor, behavior, critic, batch.obs, args, with_q)
    descend(pi_loss, actor_optimizer)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "divergence": distance}


def train(args: Args) -> None:
    check(args.behavior_steps > 0 and args.num_samples > 0, "--behavior-steps and --num-samples must be at least 1")
    data = load_dataset(args.env, args.device)
    run = Run(args, data, variant="-v" if args.value_penalty else "-p")
    actor, behavior = (Actor(data.obs_dim, data.action_dim).to(data.device) for _ in range(2))
    for policy in (actor, behavior):
        policy.action_mid, policy.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    critic_target = copy.deepcopy(critic)
    entropy_coef = torch.ones((), device=data.device, requires_grad=True)
    cloned = torch.tensor(0)  # updates of the clone so far

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    behavior_optimizer = adam(behavior.parameters(), lr=args.behavior_lr)
    entropy_optimizer = adam([entropy_coef], lr=args.behavior_lr)
    start = run.resume(actor=actor, behavior=behavior, critic=critic, critic_target=critic_target, entropy_coef=entropy_coef,
                       cloned=cloned, actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer,
                       behavior_optimizer=behavior_optimizer, entropy_optimizer=entropy_optimizer)
    if cloned < args.behavior_steps:
        one_clone = record_on_cuda(partial(update_behavior, args, data, behavior, entropy_coef, behavior_optimizer,
                                           entropy_optimizer), data.device)
        for _ in tqdm(range(int(cloned), args.behavior_steps), desc="behaviour clone", unit=" updates", leave=False,
                      mininterval=0.2 if sys.stderr.isatty() else 30):
            metrics = one_clone()
            cloned += 1
            if run.stop:
                break
        run.curve = []  # where a stop came before the clone was ready, it has left an entry
        run.step(0, metrics, behavior.act)  # evaluates the clone and saves it
    one_update = record_on_cuda(partial(update, args, data, actor, behavior, critic, critic_target, actor_optimizer,
                                        critic_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update(step > args.warm_start_steps)
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
