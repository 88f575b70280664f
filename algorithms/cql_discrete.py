"""Conservative Q-Learning (CQL) for discrete actions: DQN plus a term that pushes unseen Q down.

Kumar, Zhou, Tucker & Levine, "Conservative Q-Learning for Offline Reinforcement Learning",
NeurIPS 2020, arXiv 2006.04779.
Notes: Value Function Regularization › CQL, "CQL in practice", whose Σ_a stands here as printed.
(In the paper the mean over the data's actions is under π̂_β; the notes print π̂_θ.)

DQN fails offline because its maximum selects actions whose Q is too large, and the data lack them.
CQL pushes the soft maximum of Q over actions down and the Q of the data's actions up: an action
that the data never take is worth less than one that they take. What remains is DQN (dqn.py). With
few actions the sum is exact; cql.py, for continuous actions, has to estimate it from samples.

  (E1) y = r + γ (1 − d) max_a′ Q̄(s′, a′)
  (E2) ℓ_TD = E_D[ ℓ( Q(s, a) − y ) ],  ℓ(x) = x²/2 where |x| ≤ 1, |x| − 1/2 elsewhere (Huber)
  (E3) gap = E_D[ log Σ_a′ exp Q(s, a′) − Q(s, a) ]
  (E4) L = ℓ_TD + w · gap
  (E5) Q̄ ← Q, every target_every updates

(E3) is the negative log-likelihood of the data's actions under π = softmax(Q): without ℓ_TD this is
behaviour cloning. Here w is the paper's α, as ℓ has the ½; in cql.py w is twice the α. Since |ℓ′|
is at most 1, a w far above 1 can outweigh any Bellman error.

Shapes: B batch, S observation, A the number of actions. d is terminated: a truncated episode
bootstraps. Vectors enter as they are. Images, (H, W), (H, W, C) or (C, H, W) of bytes and at least
36 pixels wide and high, are divided by 255, get the convolutions of the Nature paper, and their
rewards are clipped to ±1.

Differences from the paper and its official code (aviralkumar2907/CQL, atari/):
  D1 The official code is QR-DQN: Q is the mean of 200 quantiles, and ℓ_TD their quantile Huber
     loss. Here Q is one number, as in the notes, so that dqn.py differs in (E3) alone.
  D2 Networks and settings are dqn.py's, so that both compare; see its D1 to D5.
  D3 w = 1, which the official code has for 10% of Atari's data; it has 4 for 1%.

Watch: q_policy, the mean of max_a Q, stays below the largest discounted return; dqn.py's exceeds it
on cartpole-medium. gap falls from log A towards a clone's cross-entropy (bc.py's cloning_error):
the nearer it comes, the more the policy is a clone. q_data does not show this, it moves as in
dqn.py. Where a clone is poor, as on acrobot-replay, lower w.

Run:     python algorithms/cql_discrete.py --env cartpole-replay
Expect:  good policies after 10,000 updates on cartpole-replay, long before dqn.py's; on
         acrobot-replay little more than a clone with w = 1, and as good as dqn.py with w = 0.01.
         Scores and curves: results/README.md.
"""
import copy
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
    env: str = "cartpole-replay"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 100_000  # gradient updates [=]
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
    batch_size: int = 32  # transitions per update [C fixed_replay/configs]
    learning_rate: float = 5e-5  # Adam [C fixed_replay/configs] [D2]
    gamma: float = 0.99  # discount γ [C fixed_replay/configs]
    target_every: int = 2_000  # updates between copies (E5) [C fixed_replay/configs] [D2]
    # CQL
    cql_weight: float = 1.0  # w in (E4), 0 is DQN [C README] [D3]


HIDDEN = (120, 84)  # widths for vectors [C CleanRL dqn.py]
MIN_PIXELS = 36  # the smallest height and width of which three convolutions leave one pixel
ADAM_EPS = 3.125e-4  # [C fixed_replay/configs]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, H, W) of images recorded as (H, W), (H, W, C) or (C, H, W). Refuses other shapes."""
    if len(shape) == 2:
        ordered = (1, *shape)
    elif shape[-1] < shape[0]:
        ordered = (shape[-1], *shape[:-1])
    else:
        ordered = tuple(shape)
    if len(ordered) != 3 or not ordered[0] < MIN_PIXELS <= min(ordered[1:]):
        fail(f"images of shape {tuple(shape)} do not fit this network; it takes (H, W), (H, W, C) "
             f"and (C, H, W) with H and W of at least {MIN_PIXELS} and fewer channels C")
    return ordered


class Frames(nn.Module):
    """Images as recorded, (B, H, W), (B, H, W, C) or (B, C, H, W), to (B, C, H, W) in [0, 1]."""

    def forward(self, obs: Tensor) -> Tensor:
        if obs.dim() == 3:
            obs = obs.unsqueeze(1)
        elif obs.shape[3] < obs.shape[1]:
            obs = obs.movedim(3, 1)
        return obs / 255


def image_network(shape: tuple[int, ...], num_outputs: int) -> nn.Sequential:
    """The Nature network: three convolutions and two linear layers."""
    channels, height, width = channels_first(shape)
    convolutions = nn.Sequential(
        nn.Conv2d(channels, 32, 8, stride=4), nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten())
    features = convolutions(torch.zeros(1, channels, height, width)).shape[1]  # of 84 × 84: 3136
    return nn.Sequential(Frames(), *convolutions, *mlp(features, 512, num_outputs))


class QNetwork(nn.Module):
    """Q of every action at once, (B, *obs_shape) -> (B, A). The policy takes the best action."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int):
        super().__init__()
        self.init = [list(obs_shape), num_actions]  # with which load_policy builds it again
        if len(obs_shape) == 1:
            self.net = mlp(*obs_shape, *HIDDEN, num_actions)
        else:
            self.net = image_network(obs_shape, num_actions)
        self.register_buffer("first_action", torch.zeros((), dtype=torch.long))

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Observations (B, *obs_shape) to the environment's numbers of the best actions (B,)."""
        return self.first_action + self(obs).argmax(dim=1)


@torch.no_grad()
def td_target(q_target: QNetwork, batch: Batch, gamma: float) -> Tensor:
    """(E1): the regression target y, (B,)."""
    # (E1) the maximum is DQN's: nothing here keeps it to the data's actions, (E3) does
    next_q = q_target(batch.next_obs).max(dim=1).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


def critic_loss(q_net: QNetwork, batch: Batch, y: Tensor,
                cql_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(E2), (E3), (E4); also the gap and the mean Q of the data's actions and of the best ones."""
    q = q_net(batch.obs)  # (B, A)
    q_data = q.gather(1, batch.action[:, None]).squeeze(1)  # (B,)
    assert y.shape == q_data.shape, "a target (B, 1) would broadcast to (B, B), and train"
    # (E2)
    td_loss = F.huber_loss(q_data, y)
    # (E3) the gradient lowers each Q by the action's share under softmax(Q), and raises the data's
    gap = (q.logsumexp(dim=1) - q_data).mean()
    # (E4)
    loss = td_loss + cql_weight * gap
    return loss, {"q_data": q_data.detach().mean(), "gap": gap.detach(),
                  "q_policy": q.detach().max(dim=1).values.mean()}


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def copy_weights(target: nn.Module, online: nn.Module) -> None:
    """(E5) target ← online, for all parameters at once."""
    torch._foreach_copy_(list(target.parameters()), list(online.parameters()))


def update(args: Args, data: Dataset, q_net: QNetwork, q_target: QNetwork, optimizer,
           copy_target: bool) -> dict[str, Tensor]:
    """One step of CQL. The target network moves in every target_every-th step."""
    batch = data.sample(args.batch_size)

    y = td_target(q_target, batch, args.gamma)
    q_loss, metrics = critic_loss(q_net, batch, y, args.cql_weight)
    descend(q_loss, optimizer)

    if copy_target:
        # (E5)
        copy_weights(q_target, q_net)
    return metrics | {"critic_loss": q_loss.detach()}


def train(args: Args) -> None:
    check_range(args, "batch_size target_every", 1)
    check_range(args, "learning_rate cql_weight", 0)
    check_range(args, "gamma", 0, 1)
    data = load_dataset(args.env, args.device, discrete=True, images=True, eval_env=args.eval_env,
                        holdout=args.holdout)
    images = len(data.obs_shape) > 1
    run = Run(args, data, gflop=2.4 if images else 0.003)
    if images:
        data.reward = data.reward.clamp(-1, 1)  # [C dopamine]

    q_net = QNetwork(data.obs_shape, data.num_actions).to(data.device)
    q_net.first_action.fill_(data.first_action)
    learned = {
        "q_net": q_net,
        "q_target": copy.deepcopy(q_net),
        "optimizer": torch.optim.Adam(q_net.parameters(), lr=args.learning_rate, eps=ADAM_EPS,
                                      fused=True, capturable=data.device.type == "cuda"),
    }
    start = run.begin(learned, q_net)
    one_update = record_on_cuda(partial(update, args, data, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        run.step(step, one_update(copy_target=step % args.target_every == 0))
    run.finish()


if __name__ == "__main__":
    train(tyro.cli(Args))
