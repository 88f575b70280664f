"""ReBRAC: TD3+BC with a cloning term also in the critic's target, and the engineering that makes it count.

Tarasov, Kurenkov, Nikulin & Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2023,
arXiv 2305.09836.
Notes: Policy Constraints (软约束), and Value Function Regularization, whose "BRAC penalty in the backup" is (E2). Younger than
the notes: this is what became of BRAC.

BRAC punishes leaving the data in two places, in the actor's loss and in the value target, with one weight. ReBRAC is TD3+BC
with a weight for each, (π(s) − a)² in place of a divergence, so that no model of the behaviour is needed, and four pieces of
engineering: a third hidden layer, layer norm in the critics, large batches, and both weights tuned per dataset.

  (E1) ã′ = clip( π̄(s′) + clip(ε, −c, c), −1, 1 ),  ε ~ N(0, σ²)
  (E2) y = r + γ (1 − d) ( min_k Q̄_k(s′, ã′) − β₂ ‖ã′ − a′‖² ),  a′ the data's action at s′
  (E3) L_Q = Σ_k E_D[ (Q_k(s, a) − y)² ]
  (E4) λ = 1 / E_D[ |min_k Q_k(s, π(s))| ],  no gradient
  (E5) L_π = E_D[ β₁ ‖π(s) − a‖² − λ min_k Q_k(s, π(s)) ]
  (E6) π̄ ← π̄ + rate · (π − π̄),  then π moves, then Q̄ ← Q̄ + rate · (Q − Q̄)

Without β₂, and with one critic, (E5) is TD3+BC's with w = 1 / (β₁ A), as squared errors are summed here and averaged there.

Shapes: B batch, S observation, A action, K = 2 critics. d is terminated: a truncated episode bootstraps.
Observations are raw, actions lie in [-1, 1]; the actor converts them to the environment's units.

Differences from the official code (tinkoff-ai/ReBRAC), which we follow where paper and code differ:
  D1 β₂ of hopper-medium and hopper-expert is the code's, 0.01 and 0.1; the paper's table has 0.001 for both.
  D2 A row that has no a′, because a time limit or the file ends there, is left out, as in the code; but of D4RL files without
     next observations, where the loader has already left out such rows, this costs one row more per episode.
  D3 For data that TUNED does not name both weights are hopper-medium's, 0.01; the code's default is 1.

Run:     python algorithms/rebrac.py --env hopper-medium
Expect:  hopper-medium 3.6 (the data 44, BC 47 and 54), after 24,000 updates, a 40th of the default, seed 0; the paper has 102
         after all of them, and no evaluation here was above 5. Below BC because π is still far from the data: its squared
         distance is 0.52, a clone's 0.11, which at β₁ = 0.01 is paid for by a Q that is 1% larger. Whether it comes back, only
         a longer run can tell. hopper-medium-replay 14.3 (the data 15, BC 18), rising slowly.
         pendulum-medium-replay (the data −1148, a clone the same): −671, −330, −601 after 2,000 updates with
         --batch-size 64 --target-rate 0.02, seeds 0 to 2.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [C rebrac.py]
    batch_size: int = 1024  # transitions per update [C rebrac.py]; 256 outside locomotion
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [C rebrac.py]
    eval_episodes: int = 10  # per evaluation [C rebrac.py]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 1e-3  # Adam [C rebrac.py]
    critic_lr: float = 1e-3  # Adam [C rebrac.py]
    gamma: float = 0.99  # discount γ [C rebrac.py]
    target_rate: float = 0.005  # share of the new weights in (E6) [C rebrac.py]
    # TD3
    policy_noise: float = 0.2  # σ in (E1) [C rebrac.py]
    noise_clip: float = 0.5  # c in (E1) [C rebrac.py]
    policy_delay: int = 2  # critic updates per update of actor and targets [C rebrac.py]
    # ReBRAC
    actor_penalty: float = 0.01  # β₁ in (E5), larger clones more; suite datasets have their own in TUNED [D3]
    critic_penalty: float = 0.01  # β₂ in (E2); suite datasets have their own in TUNED [D3]


TUNED = {  # chosen by the authors for each dataset, over a grid, by its score [C configs/rebrac] [D1]
    "halfcheetah-random": dict(actor_penalty=0.001, critic_penalty=0.1),
    "halfcheetah-medium": dict(actor_penalty=0.001, critic_penalty=0.01),
    "halfcheetah-medium-replay": dict(actor_penalty=0.01, critic_penalty=0.001),
    "halfcheetah-medium-expert": dict(actor_penalty=0.01, critic_penalty=0.1),
    "halfcheetah-expert": dict(actor_penalty=0.01, critic_penalty=0.01),
    "hopper-random": dict(actor_penalty=0.001, critic_penalty=0.01),
    "hopper-medium": dict(actor_penalty=0.01, critic_penalty=0.01),
    "hopper-medium-replay": dict(actor_penalty=0.05, critic_penalty=0.5),
    "hopper-medium-expert": dict(actor_penalty=0.1, critic_penalty=0.01),
    "hopper-expert": dict(actor_penalty=0.1, critic_penalty=0.1),
    "walker2d-random": dict(actor_penalty=0.01, critic_penalty=0.0),
    "walker2d-medium": dict(actor_penalty=0.05, critic_penalty=0.1),
    "walker2d-medium-replay": dict(actor_penalty=0.05, critic_penalty=0.01),
    "walker2d-medium-expert": dict(actor_penalty=0.01, critic_penalty=0.01),
    "walker2d-expert": dict(actor_penalty=0.01, critic_penalty=0.5),
}
HIDDEN = (256, 256, 256)  # widths of actor and critics [C rebrac.py]


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


def start_small(layers: list[nn.Module], bound: float) -> None:
    """The official initialisation: hidden weights as PyTorch's, their biases 0.1, the last layer in ±bound. [C networks.py]"""
    for layer in layers[:-1]:
        nn.init.constant_(layer.bias, 0.1)
    for parameter in layers[-1].parameters():
        nn.init.uniform_(parameter, -bound, bound)


class Actor(nn.Module):
    """Deterministic π(s). Its buffers hold the units, so a saved policy gives the environment's own actions."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        start_small(list(self.net[::2]), 1e-3)
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
    """K layer norms, each with its own scale and shift: over the features of (K, B, H), not over the batch."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num, 1, dim)), nn.Parameter(torch.zeros(num, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.weight)  # flax's eps [C networks.py]


class Critic(nn.Module):
    """K independent Q networks, (B, S), (B, A) -> (K, B). A norm after each ReLU bounds how far Q reaches beyond the data."""

    def __init__(self, obs_dim: int, action_dim: int, num: int = 2):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList(EnsembleLinear(num, i, o) for i, o in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(EnsembleLayerNorm(num, width) for width in HIDDEN)
        start_small(list(self.layers), 3e-3)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1).expand(len(self.layers[0].weight), -1, -1)  # (K, B, S + A)
        for layer, norm in zip(self.layers, self.norms):
            x = norm(F.relu(layer(x)))
        return self.layers[-1](x).squeeze(-1)


@torch.no_grad()
def td_target(actor_target: Actor, critic_target: Critic, batch: Batch, next_data_action: Tensor, args: Args) -> Tensor:
    """(E1), (E2): the regression target y, (B,)."""
    # (E1) the noise is drawn per transition and per action dimension
    noise = (torch.randn_like(batch.action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
    next_action = (actor_target(batch.next_obs) + noise).clamp(-1, 1)
    # (E2) the penalty is the noisy action's, and it ends with the episode: a termination has no a′
    penalty = (next_action - next_data_action).pow(2).sum(dim=-1)
    next_q = critic_target(batch.next_obs, next_action).min(dim=0).values
    return batch.reward + args.gamma * (1 - batch.terminated) * (next_q - args.critic_penalty * penalty)


def critic_loss(critic: Critic, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
    """(E3); also the mean Q of the data's actions."""
    q = critic(batch.obs, batch.action)  # (K, B)
    assert y.shape == q.shape[1:], "a target (B, 1) would broadcast to (K, B, B), and train"
    # (E3)
    return (q - y).pow(2).mean(dim=1).sum(), q.detach().mean()


def actor_loss(actor: Actor, critic: Critic, batch: Batch, actor_penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """(E4), (E5); also the cloning error and the mean, over the policy's actions, of the smaller Q."""
    action = actor(batch.obs)
    q = critic(batch.obs, action).min(dim=0).values  # (B,) of both critics; TD3+BC has the first alone
    # (E4) detached: otherwise the actor could lower its loss by changing the scale of Q
    lam = 1 / q.abs().mean().detach()
    # (E5)
    cloning = (action - batch.action).pow(2).sum(dim=-1).mean()
    return actor_penalty * cloning - lam * q.mean(), cloning.detach(), q.detach().mean()


def append_next_actions(data: Dataset) -> Tensor:
    """The data's rows, each with the action of the row after it as A more columns; rows without a next action are left out."""
    seen = data.columns(data.packed)
    keep = seen.terminated.bool() | ~data.truncated  # across a time limit the next row is another episode's
    keep[-1] = seen.terminated[-1]
    return torch.cat([data.packed, seen.action.roll(-1, dims=0)], dim=1)[keep]  # (N, 2S + 2A + 2)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E6) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, rows: Tensor, actor: Actor, actor_target: Actor, critic: Critic, critic_target: Critic,
           actor_optimizer, critic_optimizer, delayed: bool) -> dict[str, Tensor]:
    """One step of ReBRAC. `delayed` says whether the actor and the targets have their turn."""
    drawn = rows[(torch.rand(args.batch_size, device=rows.device) * len(rows)).long()]  # as Dataset.sample, with a′
    batch, next_data_action = data.columns(drawn[:, :-data.action_dim]), drawn[:, -data.action_dim:]

    y = td_target(actor_target, critic_target, batch, next_data_action, args)
    q_loss, q_data = critic_loss(critic, batch, y)
    descend(q_loss, critic_optimizer)
    if not delayed:
        return {"critic_loss": q_loss.detach(), "q_data": q_data}

    pi_loss, cloning, q_policy = actor_loss(actor, critic, batch, args.actor_penalty)
    # (E6) the code's order: π̄ follows the actor from before this step, Q̄ the critic from after it
    polyak_update(actor_target, actor, args.target_rate)
    descend(pi_loss, actor_optimizer)
    polyak_update(critic_target, critic, args.target_rate)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy, "cloning_error": cloning}


def train(args: Args) -> None:
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    rows = append_next_actions(data)
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    critic = Critic(data.obs_dim, data.action_dim).to(data.device)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    actor_target, critic_target = copy.deepcopy(actor), copy.deepcopy(critic)

    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    actor_optimizer = adam(actor.parameters(), lr=args.actor_lr)
    critic_optimizer = adam(critic.parameters(), lr=args.critic_lr)
    start = run.resume(actor=actor, actor_target=actor_target, critic=critic, critic_target=critic_target,
                       actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    one_update = record_on_cuda(partial(update, args, data, rows, actor, actor_target, critic, critic_target,
                                        actor_optimizer, critic_optimizer), data.device)
    metrics = {}  # keeps the actor's from its last turn
    for step in range(start + 1, args.steps + 1):
        metrics |= one_update((step - 1) % args.policy_delay == 0)  # the first update moves all, as in the code
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(parse_args())
