"""Behaviour cloning, and of the best episodes only: BC and 10%-BC.

Folklore. BC as a baseline of offline RL: Fu et al., "D4RL", arXiv 2004.07219; cloning the best part of
the data: Chen et al., "Decision Transformer", NeurIPS 2021, arXiv 2106.01345.
Notes: Offline RL vs. IL(模仿学习).

Regress the data's action on the observation; rewards play no part. So a clone is about as good as what it imitates, and
it can't stitch: it never learns that the first half of one episode goes well with the second half of another. 10%-BC looks
at the reward once, to throw away all but the best episodes. Every method here has to beat the first on mixed data, and
the second is harder to beat than it looks.

  (E1) D_top = the ⌊f·n⌋ of n episodes with the largest Σ_t r_t, at least one
  (E2) L_π = E_{D_top}[ ‖π(s) − a‖² / A ]

Shapes: B batch, S observation, A action. Observations have mean 0 and std 1 over D_top, actions lie in [-1, 1]; the actor
converts from and to raw units.

Differences: papers give no loss; the choices are CORL's (any_percent_bc.py), but for
  D1 (E1) finds an episode's end by its flags; CORL cuts after 1000 rows of arrays that lack each time limit's last row, and so
     mixes neighbouring episodes where none terminates.
  D2 f counts episodes [CORL]; Decision Transformer's %BC counts time steps. Good episodes are long: 10% of the episodes of
     hopper-medium-replay are far more than 10% of its steps.

Run:     python algorithms/bc.py --env hopper-medium
         python algorithms/bc.py --env hopper-medium-replay --top-fraction 0.1
Expect:  hopper-medium (the data score 44): 47.2 and 54.4 after 100,000 updates, seeds 0 and 1, 2 minutes on 2 cores. Curve:
         results/curves/.
"""
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
    steps: int = 1_000_000  # gradient updates [C any_percent_bc.py]
    batch_size: int = 256  # transitions per update [C any_percent_bc.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [C any_percent_bc.py]
    eval_episodes: int = 10  # per evaluation [C any_percent_bc.py]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 3e-4  # Adam [C any_percent_bc.py]
    # BC
    top_fraction: float = 1.0  # f in (E1): 1 is BC, 0.1 is 10%-BC [C any_percent_bc.py]


HIDDEN = (256, 256)  # widths of the actor [C any_percent_bc.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Deterministic π(s). Its buffers hold the data's units, so that a saved policy eats raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        for name, dim in (("obs_mean", obs_dim), ("action_mid", action_dim)):
            self.register_buffer(name, torch.zeros(dim))
        for name, dim in (("obs_std", obs_dim), ("action_half", action_dim)):
            self.register_buffer(name, torch.ones(dim))

    def forward(self, obs: Tensor) -> Tensor:
        """Standardised observations (B, S) to actions (B, A) in [-1, 1]."""
        return torch.tanh(self.net(obs))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        return self.action_mid + self.action_half * self((obs - self.obs_mean) / self.obs_std)


def best_episodes(data: Dataset, fraction: float) -> Tensor:
    """(E1) the rows of the best episodes, in their order in the data."""
    starts, stops = data.episodes()
    # (E1)
    keep = np.argsort(-data.returns(), kind="stable")[: max(1, int(fraction * len(starts)))]
    return torch.as_tensor(np.concatenate([np.arange(starts[i], stops[i]) for i in sorted(keep)]), device=data.device)


def actor_loss(actor: Actor, batch: Batch) -> Tensor:
    """(E2) the mean over transitions and action dimensions."""
    prediction = actor(batch.obs)  # (B, A)
    assert prediction.shape == batch.action.shape
    # (E2)
    return (prediction - batch.action).pow(2).mean()


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


def update(args: Args, data: Dataset, actor: Actor, optimizer) -> dict[str, Tensor]:
    """One step of BC."""
    batch = data.sample(args.batch_size)
    loss = actor_loss(actor, batch)
    descend(loss, optimizer)
    return {"cloning_error": loss.detach()}


def train(args: Args) -> None:
    check(0 < args.top_fraction <= 1, f"--top-fraction must be above 0 and at most 1, not {args.top_fraction}")
    data = load_dataset(args.env, args.device)
    run = Run(args, data, variant=f"-top{100 * args.top_fraction:g}" if args.top_fraction < 1 else "")
    rows = best_episodes(data, args.top_fraction)
    data.packed, data.truncated = data.packed[rows], data.truncated[rows]
    data.size.fill_(len(rows))
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.obs_mean, actor.obs_std = standardize_obs(data)
    actor.action_mid, actor.action_half = data.action_mid, data.action_half

    optimizer = torch.optim.Adam(actor.parameters(), lr=args.actor_lr, fused=True, capturable=data.device.type == "cuda")
    start = run.resume(actor=actor, optimizer=optimizer)
    one_update = record_on_cuda(partial(update, args, data, actor, optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)


if __name__ == "__main__":
    train(tyro.cli(Args))
