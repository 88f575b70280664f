"""Behaviour cloning (BC), and cloning of the best episodes only (10%-BC).

Folklore. As a baseline of offline RL: Fu et al., "D4RL", arXiv 2004.07219. Cloning the best part
of the data: Chen et al., "Decision Transformer", NeurIPS 2021, arXiv 2106.01345.
Notes: Offline RL vs. IL(模仿学习).

BC predicts the data's action from the observation; rewards play no part. A clone is therefore
about as good as the policy behind the data, if that has one mode, and it can't stitch: it never
learns that the first half of one episode can be followed by the second half of another. 10%-BC
uses the rewards once, to keep only the best episodes.

  (E1) D_top = the ⌊f·n⌋ of n episodes with the largest Σ_t r_t, at least one
  (E2) L_π = E_{D_top}[ ‖π(s) − a‖² / A ]   where actions are continuous
  (E3) L_π = E_{D_top}[ −log softmax(π(s))_a ]   where actions are discrete; act with argmax π(s)

Shapes: B batch, S observation, A action; discrete: π(s) has one logit for each of the actions.
Observations have mean 0 and standard deviation 1 over D_top, continuous actions lie in [-1, 1];
the actor converts from and to raw units.

Differences: papers give no loss. The choices are CORL's (any_percent_bc.py), except for
  D1 (E1) finds the ends of episodes by their flags. CORL cuts after 1000 rows, of arrays without
     each time limit's last row, and so mixes neighbouring episodes where none terminates.
  D2 f counts episodes [CORL]; Decision Transformer's %BC counts time steps. Good episodes are long,
     so 10% of the episodes can be far more than 10% of the steps.
  D3 (E3) is the plain likelihood. CORL has continuous actions only; d3rlpy's discrete BC adds half
     the mean squared logit.
  D4 Returns are not discounted, as in CORL's settings of 10%-BC (the file's default: 0.99); an
     unfinished last episode is left out, as in CORL.

Watch: cloning_error, which is (E2) or (E3), falls fast and then stays level. How low it gets is a
property of the data: noise in their actions is left over. A clone that does not look at the
observation has (E3) at the entropy of the action frequencies, at most the logarithm of the number
of actions. From random data, as cartpole-random, nothing better can be learned.

Run:     python algorithms/bc.py --env hopper-medium
         python algorithms/bc.py --env hopper-medium-replay --top-fraction 0.1
         python algorithms/bc.py --env cartpole-replay
Expect:  near the data's own score or above it, but below it where policies that disagree are
         averaged, as on halfcheetah-medium-replay. With discrete actions argmax leaves out rare
         ones: the clone can be far above its data, as on cartpole-replay, or far below, as on
         acrobot-replay. Every other method has to beat it; 10%-BC, say papers, is harder to beat.
         Scores and curves: results/README.md.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, Run, check_range, fail, load_dataset, record_on_cuda

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 1_000_000  # gradient updates [C any_percent_bc.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between evaluations and checkpoints [C any_percent_bc.py]
    eval_episodes: int = 10  # per evaluation; 0: none [C any_percent_bc.py]
    final_episodes: int = 100  # of the final evaluation, which gives the score [=]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 256  # transitions per update [C any_percent_bc.py]
    actor_lr: float = 3e-4  # Adam [C any_percent_bc.py]
    # BC
    top_fraction: float = 1.0  # f in (E1): 1 is BC, 0.1 is 10%-BC [C configs]


HIDDEN = (256, 256)  # widths of the actor [C any_percent_bc.py]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Deterministic π(s). Its buffers hold the data's units: it takes raw observations."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, action_dim)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))

    def forward(self, obs: Tensor) -> Tensor:
        """Standardised observations (B, S) to actions (B, A) in [-1, 1]."""
        return torch.tanh(self.net(obs))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B, A)."""
        return self.action_mid + self.action_half * self((obs - self.obs_mean) / self.obs_std)


class DiscreteActor(nn.Module):
    """π(s) where actions are discrete: one logit for each."""

    def __init__(self, obs_dim: int, num_actions: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, num_actions)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("first_action", torch.zeros((), dtype=torch.long))

    def forward(self, obs: Tensor) -> Tensor:
        """Standardised observations (B, S) to logits (B, number of actions)."""
        return self.net(obs)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the environment's own actions (B,): the most likely ones."""
        return self.first_action + self((obs - self.obs_mean) / self.obs_std).argmax(dim=1)


def best_episodes(data: Dataset, fraction: float) -> np.ndarray:
    """(E1): the row numbers of the best episodes, in the order of the data."""
    starts, stops = data.episodes()
    count = max(1, int(fraction * len(starts) + 1e-9))  # 0.29 · 100 is 28.999… in floats
    # (E1) the sort is stable: of episodes with equal returns the earlier ones are kept
    returns = np.where(data.finished(), data.returns(), -np.inf)
    best = np.argsort(-returns, kind="stable")[:count]
    return np.concatenate([np.arange(starts[i], stops[i]) for i in np.sort(best)])


def actor_loss(actor: Actor, batch: Batch) -> Tensor:
    """(E2): the mean over transitions and action dimensions."""
    prediction = actor(batch.obs)  # (B, A)
    assert prediction.shape == batch.action.shape
    # (E2)
    return (prediction - batch.action).pow(2).mean()


def discrete_actor_loss(actor: DiscreteActor, batch: Batch) -> Tensor:
    """(E3): the mean over transitions."""
    logits = actor(batch.obs)  # (B, number of actions)
    assert batch.action.shape == logits.shape[:1]
    # (E3) how unlikely the data's actions are under the policy
    return F.cross_entropy(logits, batch.action)


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Brings the data's observations to mean 0 and standard deviation 1, in place.

    Returns the mean and the deviation + eps that were used, (S,) each.
    """
    mean = data.obs.mean(dim=0)
    std = data.obs.std(dim=0, correction=0) + eps  # eps: for what hardly moves [C]
    data.obs = (data.obs - mean) / std
    data.next_obs = (data.next_obs - mean) / std
    return mean, std


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def update(args: Args, data: Dataset, actor: Actor | DiscreteActor,
           actor_optimizer) -> dict[str, Tensor]:
    """One step of BC."""
    batch = data.sample(args.batch_size)
    if data.num_actions:
        loss = discrete_actor_loss(actor, batch)
    else:
        loss = actor_loss(actor, batch)
    descend(loss, actor_optimizer)
    return {"cloning_error": loss.detach()}


def train(args: Args) -> None:
    check_range(args, "batch_size", 1)
    check_range(args, "actor_lr", 0)
    if not 0 < args.top_fraction <= 1:
        fail(f"--top-fraction must be above 0 and at most 1, not {args.top_fraction}")
    data = load_dataset(args.env, args.device, discrete=None, eval_env=args.eval_env,
                        holdout=args.holdout)
    variant = f"-top{100 * args.top_fraction:g}" if args.top_fraction < 1 else ""
    run = Run(args, data, variant=variant, gflop=0.105)
    data.keep(best_episodes(data, args.top_fraction))

    if data.num_actions:
        actor = DiscreteActor(data.obs_dim, data.num_actions).to(data.device)
        actor.first_action.fill_(data.first_action)
    else:
        actor = Actor(data.obs_dim, data.action_dim).to(data.device)
        actor.action_mid, actor.action_half = data.action_mid, data.action_half
    actor.obs_mean, actor.obs_std = standardize_obs(data)
    adam = partial(torch.optim.Adam, fused=True, capturable=data.device.type == "cuda")
    learned = {"actor": actor, "actor_optimizer": adam(actor.parameters(), lr=args.actor_lr)}
    start = run.begin(learned, actor)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update())
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
