"""Advantage-weighted regression (AWR), on a fixed dataset.

Peng, Kumar, Zhang & Levine, "Advantage-Weighted Regression: Simple and Scalable Off-Policy
Reinforcement Learning", 2019, arXiv 1910.00177.
Notes: Policy Constraints (软约束), in their references, and a column of their UWAC table. That
column says little about the method: D4RL ran it on 50,000 rows of each dataset, see D1.

AWR has no Q. The value of an action is the TD(λ) return that followed it: λ = 1 is the episode's
own return (and V where it was cut off), smaller λ uses V's prediction more. The weight is
exponential in the advantage, standardised over all of the data. Two regressions alternate, V on
returns and π on actions; before each, the returns or weights of all rows are computed anew.

One of four siblings that clone the data's actions a, each with a weight w (ã are actions of π):
        advantage Â               unit of Â            weight w            cap  critic
  iql   Q̄(s, a) − V(s)            return range / 1000  exp(β Â)            100  V, then Q from V
  awac  Q(s, a) − Q(s, ã)         reward               softmax over batch  B    Q of π
  crr   Q(s, a) − mean Q(s, ã_j)  reward               exp(Â/β) or 1[Â>0]  20   Q of π, layer norms
  awr   R − V(s)                  its std over data    exp(Â/β)            20   V of the data

  (E1) R_t = r_t + γ ( (1 − λ) V(s_{t+1}) + λ R_{t+1} ) within an episode, and at its last step
       R = r + γ (1 − d) V(s′)
  (E2) L_V = ½ E_D[ ( (1 − γ) (R − V(s)) )² ],  for value_steps updates
  (E3) Â = R − V(s), with the new V in both
  (E4) w = min( exp( (Â − mean Â) / (std Â + 10⁻⁵) / β ), w_max ),  mean and std over all the data
  (E5) L_bound = ½ E_D[ Σ_i max(|μ_i(s)| − 1, 0)² ]
  (E6) L_π = −E_D[ w · log π(a|s) ] + b · L_bound,  π = N(μ(s), σ²), no gradient
       through w, for actor_steps updates; then again (E1)

Shapes: B batch, N transitions of the data, S observation, A action. d is terminated: a truncated
episode bootstraps. Observations have mean 0 and standard deviation 1 over the data, actions lie in
[-1, 1]; the actor converts from and to raw units.

Differences from the paper and its official code (xbpeng/awr), which learns online from a buffer of
its last 50,000 transitions. (E4)'s standardisation is the code's; the paper has a fixed β, raw Â.
  D1 The whole dataset takes that buffer's place; D4RL loaded its data into the buffer.
  D2 Observations are divided by std + 10⁻³, as in td3_bc.py; officially by max(std, 0.01).
  D3 Batches are drawn with replacement; officially from a shuffled list.
  D4 PyTorch's default initialisation, not Xavier's. π's last weights are within ±0.01 [code].
  D5 Acting clips the mean to the action's range, near which (E5) keeps it anyway.

Watch: effective_share stays between 0.2 and 0.6, as (E4) fixes the spread of the exponent. Below
that a few large advantages get most of the weight: raise --beta. At 1 all advantages are equal.

Run:     python algorithms/awr.py --env hopper-medium
Expect:  above a clone after 1M fast updates, far on hopper-medium, where evaluations rise for the
         first 300,000, less on its replay buffer; one seed each. Scores and curves:
         results/README.md.
"""
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check_range, fail, load_dataset, notice, record_on_cuda

import numpy as np
import torch
import tyro
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates, of V and π together [=]
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
    batch_size: int = 256  # transitions per update [C awr_configs.py]
    actor_lr: float = 5e-5  # SGD; online Hopper 1e-4, Walker2d 2.5e-5 [C awr_configs.py]
    value_lr: float = 1e-2  # SGD [C awr_configs.py]
    momentum: float = 0.9  # of both [C awr_configs.py]
    gamma: float = 0.99  # discount γ [C awr_configs.py]
    # AWR
    value_steps: int = 200  # updates of V per round; D4RL's runs had 500 [C awr_configs.py]
    actor_steps: int = 1_000  # updates of π per round [C awr_configs.py]
    td_lambda: float = 0.95  # λ in (E1): 0 uses V after one step, 1 at cuts only [C awr_configs.py]
    beta: float = 1.0  # β in (E4), larger clones more [C awr_configs.py]
    max_weight: float = 20.0  # w_max in (E4) [C awr_configs.py]
    bound_weight: float = 10.0  # b in (E6) [C awr_agent.py]


HIDDEN = (128, 64)  # widths of actor and V [C awr_configs.py]
ACTION_STD = 0.4  # σ in (E6), fixed; D4RL's runs had 0.2 [C awr_configs.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian π(a|s) of fixed σ. Its buffers hold the data's units: it takes raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        self.net[-1].weight.data.uniform_(-0.01, 0.01)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised observations (B, S) -> mean and log std of the action: (B, A) each."""
        mean = self.net(obs)
        return mean, torch.full_like(mean, math.log(ACTION_STD))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A): the mean."""
        mean, _ = self((obs - self.obs_mean) / self.obs_std)
        return self.action_mid + self.action_half * mean.clamp(-1, 1)


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(a; μ, σ²), (B, A) -> (B,).

    The sample is not squashed by tanh, so there is no Jacobian, and |a| = 1 has a finite density.
    """
    z = (action - mean) / log_std.exp()
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class Value(nn.Module):
    """(1 − γ) V(s), (B, S) -> (B,): of the size of a reward. `state_values` gives V itself."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


@torch.no_grad()
def state_values(value: Value, obs: Tensor, gamma: float) -> Tensor:
    """V of all observations (N, S) -> (N,), in pieces that fit into memory."""
    return torch.cat([value(part) for part in obs.split(2**16)]) / (1 - gamma)


@torch.no_grad()
def td_lambda_returns(value: Value, data: Dataset, gamma: float,
                      td_lambda: float) -> tuple[Tensor, Tensor]:
    """(E1) of all the data, and V of its observations, (N,) each.

    All episodes are walked through together, from their last steps backwards.
    """
    starts, stops = data.episodes()
    lengths = stops - starts
    longest_first = np.argsort(-lengths)
    last = torch.as_tensor(stops[longest_first] - 1, device=data.device)  # last rows, (E,)
    v = state_values(value, data.obs, gamma)
    # (E1) only a termination stops the bootstrap; an episode that was cut off ends on V(s′)
    next_v = v.roll(-1)  # s_{t+1} is the next row, except at a last step
    next_v[last] = (1 - data.terminated[last]) * state_values(value, data.next_obs[last], gamma)
    returns = data.reward + gamma * next_v
    for k in range(1, lengths.max()):
        long_enough = (lengths > k).sum()
        rows = last[:long_enough] - k  # k steps before the last
        mixed = (1 - td_lambda) * next_v[rows] + td_lambda * returns[rows + 1]
        returns[rows] = data.reward[rows] + gamma * mixed
    return returns, v


def value_loss(value: Value, batch: Batch, returns: Tensor, gamma: float) -> Tensor:
    """(E2): regression of V on the returns."""
    v = value(batch.obs)
    assert returns.shape == v.shape, "a target (B, 1) would broadcast to (B, B), and train"
    # (E2) (1 − γ) brings returns to the size of rewards, for which the learning rate is chosen
    return 0.5 * ((1 - gamma) * returns - v).pow(2).mean()


@torch.no_grad()
def advantage(value: Value, data: Dataset, gamma: float, td_lambda: float) -> Tensor:
    """(E3): how much more the data's action returned than V expected, (N,)."""
    # (E3) V has moved since its own targets were computed, so returns are computed again
    returns, v = td_lambda_returns(value, data, gamma, td_lambda)
    return returns - v


def weights(adv: Tensor, beta: float, max_weight: float) -> Tensor:
    """(E4): advantages (N,) to the weights (N,) of their actions."""
    # (E4) standardised, so that β means the same for rewards of any size
    standard = (adv - adv.mean()) / (adv.std(correction=0) + 1e-5)
    return (standard / beta).exp().clamp(max=max_weight)


def effective_share(weight: Tensor) -> Tensor:
    """(Σw)² / (B Σw²): 1 where all actions count alike, as in cloning; 1/B where one does."""
    return weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-8)


def bound_loss(mean: Tensor) -> Tensor:
    """(E5): the penalty for means (B, A) outside [-1, 1]."""
    # (E5) it is needed because no tanh bounds the mean
    return 0.5 * (mean.abs() - 1).clamp(min=0).pow(2).sum(-1).mean()


def actor_loss(actor: Actor, batch: Batch, weight: Tensor, bound_weight: float) -> Tensor:
    """(E6): cloning of the data's actions, each with its weight."""
    mean, log_std = actor(batch.obs)
    log_prob = gaussian_log_prob(mean, log_std, batch.action)
    assert weight.shape == log_prob.shape, "a weight (B, 1) would broadcast to (B, B), and train"
    # (E6)
    return -(weight * log_prob).mean() + bound_weight * bound_loss(mean)


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Brings the data's observations to mean 0 and standard deviation 1, in place.

    Returns the mean and the deviation + eps that were used, (S,) each.
    """
    mean = data.obs.mean(dim=0)
    std = data.obs.std(dim=0, correction=0) + eps  # eps: for what hardly moves [D2]
    data.obs = (data.obs - mean) / std
    data.next_obs = (data.next_obs - mean) / std
    return mean, std


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def update(args: Args, data: Dataset, actor: Actor, value: Value, returns: Tensor, weight: Tensor,
           actor_optimizer, value_optimizer, update_actor: bool) -> dict[str, Tensor]:
    """One step of AWR: of the actor, or else of V.

    `returns` and `weight`, (N,), are the labels of the data's rows; `train` renews them.
    """
    index = data.draw_rows(args.batch_size)
    batch = data.rows(index)

    if not update_actor:
        v_loss = value_loss(value, batch, returns[index], args.gamma)
        descend(v_loss, value_optimizer)
        return {"value_loss": v_loss.detach()}

    pi_loss = actor_loss(actor, batch, weight[index], args.bound_weight)
    descend(pi_loss, actor_optimizer)
    return {"actor_loss": pi_loss.detach(), "effective_share": effective_share(weight[index])}


def train(args: Args) -> None:
    check_range(args, "batch_size value_steps actor_steps", 1)
    check_range(args, "actor_lr value_lr max_weight bound_weight", 0)
    check_range(args, "momentum td_lambda", 0, 1)
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must be at least 0 and below 1, not {args.gamma}")
    if not args.beta > 0:
        fail(f"--beta must be above 0, not {args.beta}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=0.014)
    starts, stops = data.episodes()
    longest = max(stops - starts)
    if longest > 20_000:
        notice(f"{data.name} has an episode of {longest:,} steps; (E1) goes through it step by "
               "step, twice a round, and takes most of the time")

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.obs_mean, actor.obs_std = standardize_obs(data)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    value = Value(data.obs_dim).to(data.device)
    sgd = partial(torch.optim.SGD, momentum=args.momentum, fused=True)
    learned = {
        "actor": actor,
        "value": value,
        "returns": torch.zeros(data.size, device=data.device),
        "weight": torch.zeros(data.size, device=data.device),
        "actor_optimizer": sgd(actor.parameters(), lr=args.actor_lr),
        "value_optimizer": sgd(value.parameters(), lr=args.value_lr),
    }
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        turn = (step - 1) % (args.value_steps + args.actor_steps)  # within a round
        if turn == 0:
            returns, _ = td_lambda_returns(value, data, args.gamma, args.td_lambda)
            learned["returns"].copy_(returns)
        if turn == args.value_steps:
            adv = advantage(value, data, args.gamma, args.td_lambda)
            learned["weight"].copy_(weights(adv, args.beta, args.max_weight))
        run.step(step, one_update(update_actor=turn >= args.value_steps))
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
