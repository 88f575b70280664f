"""BRAC: Behavior Regularized Actor Critic, with the KL divergence; BRAC-p and BRAC-v.

Wu, Tucker & Nachum, "Behavior Regularized Offline Reinforcement Learning", 2019, arXiv 1911.11361.
Notes: Policy Constraints (软约束); Value Function Regularization. They print the value penalty
beside γ E[Q(s′, a′)], at no stated observation. It belongs inside the bracket, as in (E5): D is
taken at s′, discounted with Q, and ends with the episode. Their sketch shows KL(data ‖ b), the
clone's fit; BRAC's KL(π ‖ b) stays finite where π covers only a part of b.

A Gaussian clone b of the data's policy is fitted first. Then actor and critics learn as in SAC,
with a penalty on D(π, b) in the actor's loss (BRAC-p), or also in the target (BRAC-v), so that Q
avoids states where the policy must leave the data. The constraint is as good as b: one Gaussian
lies between two modes of the data. If all rewards are 0, the penalty costs nothing and only makes b
preferred; it costs return where the data hold better actions.

          what stands for the data's policy    where it acts
  BCQ     VAE, trained alongside Q             proposes all actions, of target and policy
  BEAR    VAE, trained alongside Q             MMD from its samples, in the policy's loss
  PLAS    VAE, trained first, then fixed       decodes the policy's latent into the action
  BRAC    Gaussian clone, trained first        KL from it, in the policy's loss (-v: target too)

  (E1) ã = tanh(u), u = μ(s) + σ(s)·ε,  ε ~ N(0, I),
       log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i²) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E2) L_b = E_D[ −log b(clip(a)|s) + α log b(ã|s) ],  ã ~ b(·|s);  clip to ±(1 − 0.001)
  (E3) L_α = E_D[ −α (log b(ã|s) + H̄) ],  α ≥ 0,  H̄ = −dim(A)
  (E4) D(s) = (1/N) Σ_i [ log π(a_i|s) − log b(clip(a_i)|s) ],  a_1 … a_N ~ π(·|s)
  (E5) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − w D(s′) ),  ã′ ~ π(·|s′);  −w D(s′) in BRAC-v only
  (E6) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E7) L_π = E_D[ w D(s) − min_k Q_k(s, ã) ],  ã ~ π(·|s);  during the warm start without Q
  (E8) Q̄ ← Q̄ + rate · (Q − Q̄),  at the beginning of each update

Shapes: B batch, S observation, A action, K = 2 critics, N samples. d is terminated: a truncated
episode bootstraps. E_D is a mean over the data, D(s) the divergence. Observations are raw, actions
lie in [-1, 1].

Settings are those of D4RL's evaluation (D4RL-Evaluations, brac); the authors' code has others, and
the value penalty on. Differences, D1 from D4RL's code, the rest from both:
  D1 D4RL's loader drops rows that terminate, stops the bootstrap one row early, bootstraps across
     time limits, and keeps the first million rows of a dataset; ours does none of this.
  D2 Target critics start as copies; PyTorch's default initialisation; float32, not D4RL's float64.
  D3 (E3) takes the sample of (E2), not a new one; α is clamped to ≥ 0.
  D4 The policy's entropy bonus, 0 there, and learning w, off there, are left out.
  D5 Q enters (E7) one update earlier than in the code, whose count of steps starts at 0.
  D6 Adam's ε is 10⁻⁸; Keras's is 10⁻⁷, and is added before the bias correction.

Watch: divergence falls to about 1 or below and stays there. If it rises with q_data, the policy is
leaving b: raise --divergence-weight. At the end of the cloning behavior_entropy should be above
−dim(A): a narrower b makes every other action expensive.

Run:     python algorithms/brac.py --env hopper-medium     (BRAC-v: --value-penalty)
Expect:  the score rises when Q enters, after 20,000 updates: on hopper-medium far above a clone's,
         with evaluations that fluctuate, on its replay buffer more slowly, one seed each.
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
    steps: int = 1_000_000  # gradient updates, after the cloning [C train_brac.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [=]
    eval_episodes: int = 20  # per evaluation; 0: none [C train_brac.py]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 256  # transitions per update [C brac/]
    actor_lr: float = 3e-5  # Adam; 3e-4 in the official code [C train_brac.py]
    critic_lr: float = 1e-3  # Adam [C train_brac.py]
    gamma: float = 0.99  # discount γ [C brac/]
    target_rate: float = 0.005  # share of the new weights in (E8) [C brac/]
    # BRAC; the clone first
    behavior_steps: int = 1_000_000  # updates of the clone, before all others [C train_brac.py]
    behavior_lr: float = 5e-4  # Adam, for b and α [C train_brac.py]
    value_penalty: bool = False  # BRAC-v, the penalty also in (E5); else BRAC-p [C train_brac.py]
    divergence_weight: float = 1.0  # w in (E5), (E7); 0.1 in the official code [C train_brac.py]
    num_samples: int = 4  # N in (E4) [C brac_primal_agent.py]
    warm_start_steps: int = 20_000  # first updates, (E7) without Q [C brac_primal_agent.py]


HIDDEN = (300, 300)  # widths of the critics [C train_brac.py]
ACTOR_HIDDEN = (200, 200)  # widths of actor and clone [C train_brac.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 0.0  # [C networks.py]
CLIP = 1 - 1e-3  # of actions whose u = tanh⁻¹(a) is needed [C divergences.py]
FIT_SAVE_EVERY = 20_000  # updates of the fit before step 1 between two checkpoints [=]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Tanh-Gaussian π(a|s) on [-1, 1]^A; the clone b is another. It takes raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *ACTOR_HIDDEN, 2 * action_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of u, the action before tanh: (B, A) each."""
        mean, raw = self.net(obs).chunk(2, dim=-1)
        share = 0.5 * (torch.tanh(raw) + 1)  # between the bounds, softly: SAC's policy clips
        return mean, LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * share

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A): tanh of the mean."""
        return self.action_mid + self.action_half * torch.tanh(self(obs)[0])


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E1) actions (..., A) by the reparameterisation trick, and their log-densities (...)."""
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    # (E1) log(1 − tanh²u), written so that it does not overflow
    log_prob = log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))
    return torch.tanh(u), log_prob.sum(-1)


def log_density(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """The same density of given actions (..., A), (...). A clipped action gets no gradient."""
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
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(EnsembleLinear(num, inputs, outputs))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        num = len(self.layers[0].weight)
        x = torch.cat([obs, action], dim=-1).expand(num, -1, -1)  # (K, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


def behavior_loss(behavior: Actor, entropy_coef: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(E2): maximum likelihood with an entropy bonus; also log b of a sample (B,), for (E3)."""
    mean, log_std = behavior(batch.obs)
    _, log_prob = sample_action(mean, log_std)
    # (E2) the bonus acts while b's entropy is below −dim(A); elsewhere (E3) lets α fall to 0
    loss = entropy_coef * log_prob - log_density(mean, log_std, batch.action)
    return loss.mean(), log_prob.detach()


def entropy_coef_loss(entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E3): here α itself is learned, in SAC its logarithm."""
    # (E3) α grows while the clone's entropy is below its target
    return -(entropy_coef * (log_prob + target_entropy)).mean()


def divergence(policy: tuple[Tensor, Tensor], behavior: tuple[Tensor, Tensor], num: int) -> Tensor:
    """(E4): (B,), differentiable in the policy. Both are mean and log std, (B, A) each."""
    mean, log_std = (part.unsqueeze(1).expand(-1, num, -1) for part in policy)  # (B, N, A) each
    behavior_mean, behavior_log_std = (part.unsqueeze(1) for part in behavior)  # (B, 1, A) each
    action, log_prob = sample_action(mean, log_std)
    behavior_log_prob = log_density(behavior_mean, behavior_log_std, action)  # (B, N)
    # (E4) only b sees a clipped action: π's density is exact, however near ±1 its own sample is.
    # An estimate from few samples may be negative.
    return (log_prob - behavior_log_prob).mean(dim=1)


@torch.no_grad()
def td_target(actor: Actor, behavior: Actor, critic_target: Critic, batch: Batch,
              args: Args) -> Tensor:
    """(E5): the regression target y, (B,)."""
    next_policy = actor(batch.next_obs)
    next_action, _ = sample_action(*next_policy)
    next_value = critic_target(batch.next_obs, next_action).min(dim=0).values
    # (E5) the only difference between BRAC-v and BRAC-p
    if args.value_penalty:
        distance = divergence(next_policy, behavior(batch.next_obs), args.num_samples)
        next_value = next_value - args.divergence_weight * distance
    return batch.reward + args.gamma * (1 - batch.terminated) * next_value


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E6); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E6)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, behavior: Actor, critic: Critic, obs: Tensor, args: Args,
               with_q: bool) -> tuple[Tensor, Tensor]:
    """(E7); also the mean divergence. During the warm start with_q is False."""
    policy = actor(obs)
    with torch.no_grad():
        clone = behavior(obs)
    distance = divergence(policy, clone, args.num_samples).mean()
    # (E7) Q is asked about an action of its own, not about those in D
    loss = args.divergence_weight * distance
    if with_q:
        action, _ = sample_action(*policy)
        loss = loss - critic(obs, action).min(dim=0).values.mean()
    return loss, distance.detach()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E8) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update_behavior(args: Args, data: Dataset, behavior: Actor, entropy_coef: Tensor,
                    behavior_optimizer, entropy_optimizer) -> dict[str, Tensor]:
    """One step of the clone: b, α."""
    batch = data.sample(args.batch_size)
    loss, log_prob = behavior_loss(behavior, entropy_coef.detach(), batch)
    descend(loss, behavior_optimizer)
    descend(entropy_coef_loss(entropy_coef, log_prob, -data.action_dim), entropy_optimizer)
    entropy_coef.data.clamp_(min=0)
    return {"behavior_loss": loss.detach(), "behavior_entropy": -log_prob.mean(),
            "entropy_coef": entropy_coef.detach()}


def update(args: Args, data: Dataset, actor: Actor, behavior: Actor, critic: Critic,
           critic_target: Critic, actor_optimizer, critic_optimizer,
           with_q: bool) -> dict[str, Tensor]:
    """One step of BRAC: targets, Q, π. As in the code, the targets follow the step before."""
    batch = data.sample(args.batch_size)
    # (E8)
    polyak_update(critic_target, critic, args.target_rate)

    y = td_target(actor, behavior, critic_target, batch, args)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)

    pi_loss, distance = actor_loss(actor, behavior, critic, batch.obs, args, with_q)
    descend(pi_loss, actor_optimizer)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "divergence": distance}


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
    check_range(args, "batch_size behavior_steps num_samples", 1)
    check_range(args, "actor_lr critic_lr behavior_lr divergence_weight warm_start_steps", 0)
    check_range(args, "gamma target_rate", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, variant="-v" if args.value_penalty else "-p", gflop=0.69)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    behavior = Actor(data.obs_dim, data.action_dim).to(data.device)
    for policy in (actor, behavior):
        policy.action_mid, policy.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    entropy_coef = torch.ones((), device=data.device, requires_grad=True)
    cloned = torch.zeros((), dtype=torch.long)  # updates of the clone so far
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    clone = {
        "behavior": behavior,
        "entropy_coef": entropy_coef,
        "behavior_optimizer": adam(behavior.parameters(), lr=args.behavior_lr),
        "entropy_optimizer": adam([entropy_coef], lr=args.behavior_lr),
    }
    learned = {
        "actor": actor,
        "behavior": behavior,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
    }
    start = run.begin(learned | clone | {"cloned": cloned}, actor)
    if cloned < args.behavior_steps:
        one_clone = record_on_cuda(partial(update_behavior, args, data, **clone), data.device)
        fit_first("behaviour clone", one_clone, cloned, args.behavior_steps, run)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update(with_q=step > args.warm_start_steps))
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
