"""ReBRAC: TD3+BC with a cloning term also in the critic's target, layer norm and large batches.

Tarasov, Kurenkov, Nikulin & Kolesnikov, "Revisiting the Minimalist Approach to Offline
Reinforcement Learning", NeurIPS 2023, arXiv 2305.09836.
Notes: Policy Constraints (软约束), and Value Function Regularization, whose "BRAC penalty in the
backup" is (E2). Younger than the notes: it is what became of BRAC.

BRAC penalises leaving the data in two places, in the actor's loss and in the value target, with one
weight. ReBRAC is TD3+BC with a weight for each. Its penalty is (π(s) − a)² in place of a
divergence, so that no model of the behaviour is needed. Much of its gain is engineering: a third
hidden layer, layer norm in the critics, large batches, and both weights tuned per dataset.

  (E1) ã′ = clip( π̄(s′) + clip(ε, −c, c), −1, 1 ),  ε ~ N(0, σ²)
  (E2) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − β₂ ‖ã′ − a′‖² ),  a′ the data's action at s′
  (E3) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E4) λ = 1 / E_D[ |min_k Q_k(s, π(s))| ],  no gradient
  (E5) L_π = E_D[ β₁ ‖π(s) − a‖² − λ min_k Q_k(s, π(s)) ]
  (E6) π̄ ← π̄ + rate · (π − π̄),  then π moves, then Q̄ ← Q̄ + rate · (Q − Q̄)

Without β₂, and with one critic, (E5) is β₁ A times TD3+BC's loss with w = 1 / (β₁ A): squared
errors are summed over action dimensions here, and averaged there.

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode
bootstraps. Observations are raw, actions lie in [-1, 1]; the actor converts them to the
environment's units.

Differences from the official code (tinkoff-ai/ReBRAC), which we follow where paper and code differ:
  D1 β₂ of hopper-medium and hopper-expert is the code's, 0.01 and 0.1; the paper has 0.001 in both.
  D2 A row without a′, because a time limit or the file ends there, is left out, as in the code. For
     D4RL files without next observations the loader has already left out one such row per episode,
     so a second one is lost. A last row that terminates stays; the code leaves it out.
  D3 For data that TUNED does not name both weights are hopper-medium's, 0.01; the code's are 1.

Watch: cloning_error, the squared distance to the data's actions (A times what bc.py shows), should
fall towards a clone's and stay there. While it is far above, Q is asked where it is not known.
q_policy stays near q_data.

Run:     python algorithms/rebrac.py --env hopper-medium
Expect:  a slow start. On hopper-medium-replay near a clone for 40,000 updates, as Q grows slowly;
         with --target-rate 0.02 far above it after 20,000. On hopper-medium, whose β₁ is small,
         still far below a clone after 24,000. Published scores are of 1M updates.
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
    load_dataset,
    parse_args,
    record_on_cuda,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [C rebrac.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [C rebrac.py]
    eval_episodes: int = 10  # per evaluation; 0: none [C rebrac.py]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 1024  # transitions per update; 256 outside locomotion [C rebrac.py]
    actor_lr: float = 1e-3  # Adam [C rebrac.py]
    critic_lr: float = 1e-3  # Adam [C rebrac.py]
    gamma: float = 0.99  # discount γ [C rebrac.py]
    target_rate: float = 0.005  # share of the new weights in (E6) [C rebrac.py]
    # ReBRAC
    policy_noise: float = 0.2  # σ in (E1) [C rebrac.py]
    noise_clip: float = 0.5  # c in (E1) [C rebrac.py]
    policy_delay: int = 2  # critic updates per update of actor and targets [C rebrac.py]
    actor_penalty: float = 0.01  # β₁ in (E5), larger clones more; see TUNED [D3]
    critic_penalty: float = 0.01  # β₂ in (E2); see TUNED [D3]


# chosen by the authors for each dataset, over a grid, by its score [C configs/rebrac] [D1]
TUNED = {
    "halfcheetah-random": {"actor_penalty": 0.001, "critic_penalty": 0.1},
    "halfcheetah-medium": {"actor_penalty": 0.001, "critic_penalty": 0.01},
    "halfcheetah-medium-replay": {"actor_penalty": 0.01, "critic_penalty": 0.001},
    "halfcheetah-medium-expert": {"actor_penalty": 0.01, "critic_penalty": 0.1},
    "halfcheetah-expert": {"actor_penalty": 0.01, "critic_penalty": 0.01},
    "hopper-random": {"actor_penalty": 0.001, "critic_penalty": 0.01},
    "hopper-medium": {"actor_penalty": 0.01, "critic_penalty": 0.01},
    "hopper-medium-replay": {"actor_penalty": 0.05, "critic_penalty": 0.5},
    "hopper-medium-expert": {"actor_penalty": 0.1, "critic_penalty": 0.01},
    "hopper-expert": {"actor_penalty": 0.1, "critic_penalty": 0.1},
    "walker2d-random": {"actor_penalty": 0.01, "critic_penalty": 0.0},
    "walker2d-medium": {"actor_penalty": 0.05, "critic_penalty": 0.1},
    "walker2d-medium-replay": {"actor_penalty": 0.05, "critic_penalty": 0.01},
    "walker2d-medium-expert": {"actor_penalty": 0.01, "critic_penalty": 0.01},
    "walker2d-expert": {"actor_penalty": 0.01, "critic_penalty": 0.5},
}
HIDDEN = (256, 256, 256)  # widths of actor and critics [C rebrac.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def start_small(layers: list[nn.Module], bound: float) -> None:
    """The official initialisation: hidden biases 0.1, last layer within ±bound."""
    for layer in layers[:-1]:
        nn.init.constant_(layer.bias, 0.1)
    for parameter in layers[-1].parameters():
        nn.init.uniform_(parameter, -bound, bound)


class Actor(nn.Module):
    """Deterministic π(s). Its buffers hold the environment's action units."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        start_small(list(self.net[::2]), 1e-3)  # [C networks.py]
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> Tensor:
        """(B, S) to actions (B, A) in [-1, 1]."""
        return torch.tanh(self.net(obs))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        return self.action_mid + self.action_half * self(obs)


class EnsembleLinear(nn.Module):
    """K linear layers as one batched product: (K, B, in) -> (K, B, out)."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(num, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """K layer norms over the features of (K, B, H), each with its own scale and shift."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num, 1, dim))
        self.bias = nn.Parameter(torch.zeros(num, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.weight)


class Critic(nn.Module):
    """K independent Q networks, (B, S), (B, A) -> (K, B).

    A norm after each ReLU bounds how far Q can grow beyond the data.
    """

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(EnsembleLinear(num, inputs, outputs))
        self.norms = nn.ModuleList()
        for width in HIDDEN:
            self.norms.append(EnsembleLayerNorm(num, width))
        start_small(list(self.layers), 3e-3)  # [C networks.py]

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        num = len(self.layers[0].weight)
        x = torch.cat([obs, action], dim=-1).expand(num, -1, -1)  # (K, B, S + A)
        for layer, norm in zip(self.layers, self.norms):
            x = norm(F.relu(layer(x)))
        return self.layers[-1](x).squeeze(-1)


@torch.no_grad()
def td_target(actor_target: Actor, critic_target: Critic, batch: Batch, next_data_action: Tensor,
              args: Args) -> Tensor:
    """(E1), (E2): the regression target y, (B,)."""
    # (E1) the noise is drawn per transition and per action dimension
    noise = torch.randn_like(batch.action) * args.policy_noise
    noise = noise.clamp(-args.noise_clip, args.noise_clip)
    next_action = (actor_target(batch.next_obs) + noise).clamp(-1, 1)
    # (E2) the penalty is the noisy action's, and it ends with the episode: a termination has no a′
    penalty = (next_action - next_data_action).pow(2).sum(dim=-1)
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    next_value = next_q - args.critic_penalty * penalty
    return batch.reward + args.gamma * (1 - batch.terminated) * next_value


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E3); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E3)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, batch: Batch,
               actor_penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """(E4), (E5); also the cloning error and the mean of min_k Q_k at the policy's actions."""
    action = actor(batch.obs)
    q = critic(batch.obs, action).min(dim=0).values  # (B,) of both critics; TD3+BC has the first
    # (E4) detached: otherwise the actor could lower its loss by changing the scale of Q
    lam = 1 / q.abs().mean().detach()
    # (E5)
    cloning = (action - batch.action).pow(2).sum(dim=-1).mean()
    return actor_penalty * cloning - lam * q.mean(), cloning.detach(), q.detach().mean()


def take_next_actions(data: Dataset) -> Tensor:
    """The action of the row after each row, (N, A). Rows that lack one leave the data.

    Across a time limit the next row is another episode's. A termination needs no next action.
    """
    next_action = data.action.roll(-1, dims=0)
    has_next = ~data.truncated
    has_next[-1] = False
    index = (has_next | data.terminated.bool()).nonzero().squeeze(1)
    if not len(index):
        fail(f"no row of {data.name} has a next one in its episode; ReBRAC needs the action there")
    data.keep(index)
    return next_action[index]


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E6) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, next_action: Tensor, actor: Actor, actor_target: Actor,
           critic: Critic, critic_target: Critic, actor_optimizer, critic_optimizer,
           update_actor: bool) -> dict[str, Tensor]:
    """One step of ReBRAC. The actor and the targets move in every policy_delay-th step."""
    index = data.draw_rows(args.batch_size)
    batch = data.rows(index)
    next_data_action = next_action.index_select(0, index)

    y = td_target(actor_target, critic_target, batch, next_data_action, args)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)
    if not update_actor:
        return {"critic_loss": q_loss.detach(), "q_data": q_data}

    pi_loss, cloning_error, q_policy = actor_loss(actor, critic, batch, args.actor_penalty)
    # (E6) the code's order: π̄ follows π from before this step, Q̄ follows Q from after it
    polyak_update(actor_target, actor, args.target_rate)
    descend(pi_loss, actor_optimizer)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy,
            "cloning_error": cloning_error}


def train(args: Args) -> None:
    check_range(args, "batch_size policy_delay", 1)
    check_range(args, "actor_lr critic_lr policy_noise noise_clip actor_penalty critic_penalty", 0)
    check_range(args, "gamma target_rate", 0, 1)
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=3.4)
    next_action = take_next_actions(data)

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {
        "actor": actor,
        "actor_target": copy.deepcopy(actor),
        "critic": critic,
        "critic_target": copy.deepcopy(critic),
        "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr),
        "critic_optimizer": adam(critic.parameters(), lr=args.critic_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, next_action, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        update_actor = (step - 1) % args.policy_delay == 0  # in the first step, too, as in the code
        run.step(step, one_update(update_actor=update_actor))
    run.finish()


if __name__ == "__main__":
    train(parse_args(Args, TUNED))
