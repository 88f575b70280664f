"""AlgaeDICE: off-policy RL by Fenchel duality, as released and as derived.

Nachum, Dai, Kostrikov, Chow, Li & Schuurmans, "AlgaeDICE: Policy Gradient from Arbitrary
Experience", arXiv 1912.02074.
Notes: references, Nachum & Dai, "Reinforcement Learning via Fenchel-Rockafellar Duality", arXiv
2001.01866.

RL maximises the mean reward over d^π, the distribution of what π would visit. Offline there are
samples of d^D only, the distribution of the data. So penalise their difference, with a weight λ:
max_π E_{d^π}[r] − λ E_D[(d^π/d^D)^q]/q. By Fenchel duality this is max_π min_Q of means over D and
over first observations alone: (E4) up to a factor, with 1/p + 1/q = 1 and w = λ^{p−1}. At the
minimum f′(e) = w d^π/d^D: f′ of Q's residual is the importance weight, up to w, and the gradient of
π is the on-policy one, although no ratio of densities has been estimated.

  (E1) ã = tanh(u), u = μ(s) + σ(s)·ε,  ε ~ N(0, I),
       log π(ã|s) = Σ_i [ log N(u_i; μ_i, σ_i²) − 2(log 2 − u_i − softplus(−2u_i)) ]
  (E2) Q̃_k(s, a) = κ Q_k(s, a) + (1 − κ) min_j Q̄_j(s, a)
  (E3) e_k = r + γ (1 − d) ( Q̃_k(s′, ã′) − α log π(ã′|s′) ) − Q_k(s, a),  ã′ ~ π(·|s′)
  (E4) L_Q = Σ_k ( E_D[f(e_k)] + w (1 − γ) E[Q_k(s₀, ã₀)] ),  f(x) = |x|^p / p,
       s₀ first of an episode,  ã₀ ~ π(·|s₀)
  (E5) L_⊥ = Σ_W Σ_{i≠j} ( W_i · W_j )²,  W_i the weights of unit i in a layer of π
  (E6) L_π = −½ Σ_k ( E_D[f′(e_k) e_k] + w (1 − γ) E[Q_k(s₀, ã₀)] ) + 10⁻⁴ L_⊥,
       f′(x) = clip(x, 0, 10⁶)^{p−1}, no gradient
  (E7) L_α = −E_D[ α (log π(ã′|s′) + H̄) ],  H̄ = −dim(A)
  (E8) Q̄ ← Q̄ + rate · (Q − Q̄)

By default, as in the official code, this is not the objective above. With κ = 0.05 nearly all of
the backup is a constant for the gradient of Q, as in Q-learning. Where that gradient is zero,
f′(e) d^D is w (1 − γ) Σ_t (κγ)^t p_t, with p_t what π visits after t steps. The factors (κγ)^t add
up to 1.05, not to 1 / (1 − γ): the first step counts for nearly all. `--online-share 1` is the
objective, except for the entropy, L_⊥ and the clip of f′. Its cost: duality asks for f of the mean
e over s′ and ã′; f(e) of a single sample is larger on average, so the estimate is right only where
transitions and policy are deterministic.

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1].

Differences from the official code (google-research/algae_dice):
  D1 It learns online, and takes s₀ from resets; ours takes it from the data's episodes.
  D2 PyTorch's default initialisation in place of orthogonal matrices; its Adam, which adds ε after
     the bias correction, Keras's before.
  D3 γ < 1 only; the code has another (E4) for γ = 1.
D4RL's "aDICE" runs this code with `terminals` where 1 − d belongs: it bootstraps only where an
episode is over. Its scores near 0 measure that, and not the algorithm.

Watch: q_initial against the discounted return that the policy earns. The returns that a run prints
are not discounted; results/overestimation.py measures the discounted ones. Nothing keeps π at the
data, so Q is easily far too large. weight, the mean of f′(e) / w, would be 1 if it were a density
ratio.

Run:     python algorithms/algae_dice.py --env hopper-medium
         python algorithms/algae_dice.py --env hopper-medium --online-share 1
Expect:  as SAC offline: near 0 on hopper-medium, about a clone's score on its replay buffer; it
         learns from data that hold every action everywhere, such as pendulum-random.
         Scores and curves: results/README.md.
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
    steps: int = 500_000  # gradient updates [C train_eval.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [C train_eval.py]
    eval_episodes: int = 10  # per evaluation; 0: none [C algae.py]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 256  # transitions, and first observations, per update [C train_eval.py]
    actor_lr: float = 1e-3  # Adam [C train_eval.py]
    critic_lr: float = 1e-3  # Adam [C train_eval.py]
    entropy_lr: float = 1e-3  # Adam, for log α [C algae.py]
    gamma: float = 0.99  # discount γ, below 1 [C train_eval.py] [D3]
    target_rate: float = 0.005  # share of the new weights in (E8) [C train_eval.py]
    policy_delay: int = 2  # critic updates per update of actor, α and targets [C train_eval.py]
    # AlgaeDICE
    exponent: float = 1.5  # p in (E4), (E6), above 1 [C train_eval.py]
    initial_weight: float = 0.01  # w in (E4), (E6): 0 would be policy evaluation [C train_eval.py]
    online_share: float = 0.05  # κ in (E2): 1 is the paper's objective [C algae.py]


HIDDEN = (256, 256)  # widths of actor and critics [C algae.py]
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # [C algae.py]
MAX_RESIDUAL = 1e6  # in (E6) [C algae.py]
ORTHOGONAL_WEIGHT = 1e-4  # of L_⊥ in (E6) [C keras_utils.py]
ADAM_EPS = 1e-7  # Keras' default [C algae.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Tanh-Gaussian π(a|s) on [-1, 1]^A. Its buffers hold the units: it takes raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 2 * action_dim)
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> mean and log standard deviation of u, the action before tanh: (B, A) each."""
        mean, raw = self.net(obs).chunk(2, dim=-1)
        share = 0.5 * (torch.tanh(raw) + 1)  # a soft bound, unlike SAC's clip
        return mean, LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * share

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A): tanh of the mean."""
        return self.action_mid + self.action_half * torch.tanh(self(obs)[0])


def sample_action(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """(E1) actions (..., A), drawn with the reparameterisation trick, and their log π (...)."""
    # (E1) the second term of log_prob is log(1 − tanh²u), in a form that does not overflow
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


def mix_with_target(critic: Critic, critic_target: Critic, obs: Tensor, action: Tensor,
                    online_share: float) -> Tensor:
    """(E2): (K, B)."""
    frozen = critic_target(obs, action).min(dim=0).values  # (B,)
    # (E2) Q̄'s weights get no gradient, but in the actor's step all of Q̃ has one to the action
    return online_share * critic(obs, action) + (1 - online_share) * frozen


def bellman_residual(critic: Critic, critic_target: Critic, entropy_coef: Tensor, batch: Batch,
                     next_action: Tensor, next_log_prob: Tensor, args: Args) -> Tensor:
    """(E3): (K, B). Unlike a regression's error, its gradient to Q comes from both of its ends."""
    next_q = mix_with_target(critic, critic_target, batch.next_obs, next_action, args.online_share)
    q = critic(batch.obs, batch.action)
    assert batch.reward.shape == next_log_prob.shape == q.shape[1:], "broadcasting would train"
    # (E3) 1 − d, not d: the one is this algorithm, the other is what D4RL ran
    soft_q = next_q - entropy_coef * next_log_prob
    y = batch.reward + args.gamma * (1 - batch.terminated) * soft_q
    return y - q


def critic_loss(actor: Actor, critic: Critic, critic_target: Critic, entropy_coef: Tensor,
                batch: Batch, initial_obs: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """(E4); also the mean residual."""
    with torch.no_grad():
        next_action, next_log_prob = sample_action(*actor(batch.next_obs))
        initial_action, _ = sample_action(*actor(initial_obs))
    residual = bellman_residual(critic, critic_target, entropy_coef, batch, next_action,
                                next_log_prob, args)
    initial_q = critic(initial_obs, initial_action).mean(dim=1)  # (K,)
    # (E4) f has two sides here; without the second term Q would be a plain value, with e = 0
    f = (residual.abs().pow(args.exponent) / args.exponent).mean(dim=1)  # (K,)
    loss = (f + args.initial_weight * (1 - args.gamma) * initial_q).sum()
    return loss, residual.detach().mean()


def orthogonal_penalty(net: nn.Sequential) -> Tensor:
    """(E5): over the rows of each layer's weights, (out, in)."""
    penalty = 0.0
    for layer in net:
        if isinstance(layer, nn.Linear):
            product = layer.weight @ layer.weight.T
            # (E5) the diagonal, of each row with itself, is left out
            penalty = penalty + (product - product.diag().diag()).pow(2).sum()
    return penalty


def actor_loss(actor: Actor, critic: Critic, critic_target: Critic, entropy_coef: Tensor,
               batch: Batch, initial_obs: Tensor,
               args: Args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(E6); also log π at s′ (B,), the mean weight f′(e) / w, and the mean Q at the start."""
    next_action, next_log_prob = sample_action(*actor(batch.next_obs))
    initial_action, _ = sample_action(*actor(initial_obs))
    residual = bellman_residual(critic, critic_target, entropy_coef, batch, next_action,
                                next_log_prob, args)
    initial_q = critic(initial_obs, initial_action)  # (K, B)
    # (E6) detached: otherwise e would be differentiated twice. Negative e have no weight
    weight = residual.detach().clamp(0, MAX_RESIDUAL).pow(args.exponent - 1)
    loss = -(weight * residual).mean()
    loss = loss - args.initial_weight * (1 - args.gamma) * initial_q.mean()
    loss = loss + ORTHOGONAL_WEIGHT * orthogonal_penalty(actor.net)
    return (loss, next_log_prob.detach(), weight.mean() / args.initial_weight,
            initial_q.detach().mean())


def entropy_coef_loss(entropy_coef: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """(E7): α grows while the policy's entropy is below its target."""
    # (E7)
    return -(entropy_coef * (log_prob + target_entropy)).mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E8) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def first_obs(data: Dataset) -> Tensor:
    """The first observation of each episode, (E, S): s₀. Another s is another objective. [D1]"""
    starts, _ = data.episodes()
    return data.obs[torch.as_tensor(starts, device=data.device)]


def update(args: Args, data: Dataset, first: Tensor, actor: Actor, critic: Critic,
           critic_target: Critic, log_entropy_coef: Tensor, actor_optimizer, critic_optimizer,
           entropy_optimizer, update_actor: bool) -> dict[str, Tensor]:
    """One step of AlgaeDICE. Actor, α and targets move in every policy_delay-th step."""
    batch = data.sample(args.batch_size)
    drawn = torch.randint(len(first), (args.batch_size,), device=data.device)
    initial_obs = first[drawn]  # (B, S)
    entropy_coef = log_entropy_coef.detach().exp()

    q_loss, residual = critic_loss(actor, critic, critic_target, entropy_coef, batch, initial_obs,
                                   args)
    descend(q_loss, critic_optimizer)
    if not update_actor:
        return {"critic_loss": q_loss.detach(), "residual": residual}

    pi_loss, log_prob, weight, q_initial = actor_loss(actor, critic, critic_target, entropy_coef,
                                                      batch, initial_obs, args)
    descend(pi_loss, actor_optimizer)

    alpha_loss = entropy_coef_loss(log_entropy_coef.exp(), log_prob, -data.action_dim)
    descend(alpha_loss, entropy_optimizer)

    # (E8)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "residual": residual, "weight": weight,
            "q_initial": q_initial, "entropy": -log_prob.mean(), "entropy_coef": entropy_coef}


def train(args: Args) -> None:
    check_range(args, "batch_size policy_delay", 1)
    check_range(args, "actor_lr critic_lr entropy_lr", 0)
    check_range(args, "target_rate online_share", 0, 1)
    if not args.exponent > 1:
        fail(f"--exponent must be above 1, not {args.exponent}")
    if not args.initial_weight > 0:
        fail(f"--initial-weight must be above 0, not {args.initial_weight}")
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must be at least 0 and below 1, not {args.gamma}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=1.18)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    log_entropy_coef = torch.zeros((), device=data.device, requires_grad=True)
    adam = partial(torch.optim.Adam, eps=ADAM_EPS, fused=True,
                   capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "log_entropy_coef": log_entropy_coef,
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
        "entropy_optimizer": adam([log_entropy_coef], lr=args.entropy_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, first_obs(data), **learned),
                                data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update(update_actor=step % args.policy_delay == 0))
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
