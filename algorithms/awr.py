"""Advantage-Weighted Regression, on a fixed dataset.

Peng, Kumar, Zhang & Levine, "Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning", 2019,
arXiv 1910.00177.
Notes: Policy Constraints (软约束), in their references, and a column of their UWAC table (D4RL v0; D4RL ran it on the last
50,000 rows of each dataset, see D1, so that column says little about the method).

One of four files, iql.py, awac.py, crr.py and awr.py, that all clone the data's actions by weight: read them side by side
for how each estimates the advantage of an action, and how it turns that into a weight. AWR has no Q: an action is worth what
came of it in the data, its episode's return, with V's help (λ). The weight is exponential in the advantage, standardised over
the whole dataset. Two regressions take turns, V on returns and π on actions; each begins by labelling all of the data anew.

  (E1) R_t = r_t + γ ( (1 − λ) V(s_{t+1}) + λ R_{t+1} ) within an episode; at its last step R = r + γ (1 − d) V(s′)
  (E2) L_V = ½ E_D[ ( (1 − γ) (R − V(s)) )² ],  for value_steps updates
  (E3) Â = R − V(s), with the new V in both
  (E4) w = min( exp( (Â − mean Â) / (std Â + 10⁻⁵) / β ), w_max ),  mean and std over all of the data
  (E5) B = ½ E_D[ Σ_i max(|μ_i(s)| − 1, 0)² ]
  (E6) L_π = −E_D[ w · log π(a|s) ] + b · B,  π = N(μ(s), σ²), no gradient through w, for actor_steps updates; then again (E1)

Shapes: B batch, N transitions of the data, S observation, A action. d is terminated: a truncated episode bootstraps.
Observations have mean 0 and std 1 over the data, actions lie in [-1, 1]; the actor converts from and to raw units.

Differences from the paper and its official code (xbpeng/awr), which learns online from its last 50,000 transitions:
  D1 The dataset takes that buffer's place, all of it. D4RL loaded its data into the buffer, which kept the last 50,000 rows.
  D2 Observations are divided by std + 10⁻³, as in bc.py and td3_bc.py (the other three of these four take raw
     ones); officially by max(std, 0.01).
  D3 Batches are drawn with replacement; officially from a shuffled list.
  D4 PyTorch's default initialisation, not Xavier's with biases of 0; the last weights of π begin within ±0.01 [code].
  D5 When acting, the mean is clipped to the action's range, which (E5) keeps it near anyway.
  The code's standardisation in (E4) is kept; the paper has a fixed β on raw advantages.

Run:     python algorithms/awr.py --env hopper-medium
Expect:  hopper-medium 74.1 (the data 44, BC 47 and 54), hopper-medium-replay 25.3 (the data 15, BC 18), after 1M updates, seed
         0, in 17 to 24 minutes on a core; evaluations on the former swing between 30 and 93. pendulum-medium-replay (the data
         −1148, a clone the same): −635, −570, −555 after 6,000 updates with its end-to-end test's settings.
"""
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates, of V and π together [=]
    batch_size: int = 256  # transitions per update [C awr_configs.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 5e-5  # SGD; online 1e-4 for Hopper, 2.5e-5 for Walker2d [C awr_configs.py]
    value_lr: float = 1e-2  # SGD [C awr_configs.py]
    momentum: float = 0.9  # of both [C awr_configs.py]
    gamma: float = 0.99  # discount γ [C awr_configs.py]
    # AWR
    value_steps: int = 200  # updates of V per round; D4RL's runs had 500 [C awr_configs.py]
    actor_steps: int = 1_000  # updates of π per round [C awr_configs.py]
    td_lambda: float = 0.95  # λ in (E1): 0 trusts V after one step, 1 the whole episode [C awr_configs.py]
    beta: float = 1.0  # β in (E4), larger clones more [C awr_configs.py]
    max_weight: float = 20.0  # w_max in (E4) [C awr_configs.py]
    bound_weight: float = 10.0  # b in (E6) [C awr_agent.py]


HIDDEN = (128, 64)  # widths of actor and V [C awr_configs.py]
ACTION_STD = 0.4  # σ in (E6), fixed; D4RL's runs had 0.2 [C awr_configs.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Gaussian π(a|s) of fixed width. Its buffers hold the data's units, so that a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        self.net[-1].weight.data.uniform_(-0.01, 0.01)
        for name, dim in (("obs_mean", obs_dim), ("action_mid", action_dim)):
            self.register_buffer(name, torch.zeros(dim))
        for name, dim in (("obs_std", obs_dim), ("action_half", action_dim)):
            self.register_buffer(name, torch.ones(dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised observations (B, S) -> mean and log standard deviation of the action: (B, A) each."""
        mean = self.net(obs)
        return mean, torch.full_like(mean, math.log(ACTION_STD))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's actions (B, A), without noise: the mean."""
        return self.action_mid + self.action_half * self((obs - self.obs_mean) / self.obs_std)[0].clamp(-1, 1)


def gaussian_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log N(a; μ, σ²), (B, A) -> (B,). No tanh follows the sample, so no Jacobian: it is finite at |a| = 1, too."""
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
def td_lambda_returns(value: Value, data: Dataset, gamma: float, td_lambda: float) -> tuple[Tensor, Tensor]:
    """(E1) of all the data, and V of its observations, (N,) each: all episodes at once, from their last steps backwards."""
    batch = data.columns(data.packed)
    starts, stops = data.episodes()
    lengths = stops - starts
    last = torch.as_tensor(stops[np.argsort(-lengths)] - 1, device=data.device)  # (E,) the longest episode's first
    v = state_values(value, batch.obs, gamma)
    # (E1) only a termination stops the bootstrap: an episode that the clock or the file cut off ends on V
    next_v = v.roll(-1)  # s_{t+1} is the next row, but at the last step
    next_v[last] = (1 - batch.terminated[last]) * state_values(value, batch.next_obs[last], gamma)
    returns = batch.reward + gamma * next_v
    for k in range(1, lengths.max()):
        rows = last[:(lengths > k).sum()] - k  # k steps before the last, of the episodes that are long enough
        returns[rows] = batch.reward[rows] + gamma * ((1 - td_lambda) * next_v[rows] + td_lambda * returns[rows + 1])
    return returns, v


def value_loss(value: Value, batch: Batch, returns: Tensor, gamma: float) -> Tensor:
    """(E2): the factor (1 − γ) brings returns to the size of rewards, for which the learning rate is meant."""
    v = value(batch.obs)
    assert returns.shape == v.shape, "a target (B, 1) would broadcast to (B, B), and train"
    # (E2)
    return 0.5 * ((1 - gamma) * returns - v).pow(2).mean()


@torch.no_grad()
def advantage(value: Value, data: Dataset, gamma: float, td_lambda: float) -> Tensor:
    """(E3): how much more came of the data's action than V expected, (N,)."""
    # (E3) V has moved since its own targets were made, so the returns are made again
    returns, v = td_lambda_returns(value, data, gamma, td_lambda)
    return returns - v


def weights(advantage: Tensor, beta: float, max_weight: float) -> Tensor:
    """(E4): advantages (N,) to the weights (N,) of their actions."""
    # (E4) standardised, so that β means the same for rewards of any size
    standard = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
    return (standard / beta).exp().clamp(max=max_weight)


def effective_share(weight: Tensor) -> Tensor:
    """(Σw)² / (B Σw²): 1 where all actions count alike, as in cloning; 1/B where a single one does."""
    return weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-8)


def bound_loss(mean: Tensor) -> Tensor:
    """(E5): no tanh bounds the mean (B, A), so leaving the box has a price."""
    # (E5)
    return 0.5 * (mean.abs() - 1).clamp(min=0).pow(2).sum(-1).mean()


def actor_loss(actor: Actor, batch: Batch, weight: Tensor, bound_weight: float) -> Tensor:
    """(E6): cloning, of each action as much as it is worth."""
    mean, log_std = actor(batch.obs)
    log_prob = gaussian_log_prob(mean, log_std, batch.action)
    assert weight.shape == log_prob.shape, "a weight (B, 1) would broadcast to (B, B), and train"
    # (E6)
    return -(weight * log_prob).mean() + bound_weight * bound_loss(mean)


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Bring the data's observations to mean 0 and std 1, in place; returns the mean and std + eps used, (S,) each."""
    obs, _, _, next_obs, _ = data.columns(data.packed)
    mean, std = obs.mean(dim=0), obs.std(dim=0, correction=0) + eps  # eps, for what hardly moves [C]
    for part in (obs, next_obs):
        part.sub_(mean).div_(std)
    return mean, std


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def update(args: Args, data: Dataset, actor: Actor, value: Value, returns: Tensor, weight: Tensor,
           actor_optimizer, value_optimizer, actors_turn: bool) -> dict[str, Tensor]:
    """One step of AWR, of V or of π. `returns` and `weight`, (N,), label the data's rows; `train` renews them."""
    rows = (torch.rand(args.batch_size, device=data.device) * data.size).long()
    batch = data.columns(data.packed[rows])

    if not actors_turn:
        v_loss = value_loss(value, batch, returns[rows], args.gamma)
        descend(v_loss, value_optimizer)
        return {"value_loss": v_loss.detach()}

    pi_loss = actor_loss(actor, batch, weight[rows], args.bound_weight)
    descend(pi_loss, actor_optimizer)
    return {"actor_loss": pi_loss.detach(), "effective_share": effective_share(weight[rows])}


def train(args: Args) -> None:
    check(args.value_steps > 0 and args.actor_steps > 0, "--value-steps and --actor-steps must be at least 1")
    check(0 <= args.gamma < 1, f"--gamma must be at least 0 and below 1, not {args.gamma}")
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.obs_mean, actor.obs_std = standardize_obs(data)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    value = Value(data.obs_dim).to(data.device)
    returns, weight = torch.zeros(2, len(data.packed), device=data.device)

    sgd = partial(torch.optim.SGD, momentum=args.momentum, fused=True)
    actor_optimizer = sgd(actor.parameters(), lr=args.actor_lr)
    value_optimizer = sgd(value.parameters(), lr=args.value_lr)
    start = run.resume(actor=actor, value=value, returns=returns, weight=weight,
                       actor_optimizer=actor_optimizer, value_optimizer=value_optimizer)
    one_update = record_on_cuda(partial(update, args, data, actor, value, returns, weight,
                                        actor_optimizer, value_optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        turn = (step - 1) % (args.value_steps + args.actor_steps)  # within a round
        if turn == 0:
            returns.copy_(td_lambda_returns(value, data, args.gamma, args.td_lambda)[0])
        elif turn == args.value_steps:
            weight.copy_(weights(advantage(value, data, args.gamma, args.td_lambda), args.beta, args.max_weight))
        metrics = one_update(turn >= args.value_steps)
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
