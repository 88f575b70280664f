"""Deep Q-Network (DQN) and Double DQN on a fixed dataset, for discrete actions.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015 (first: arXiv
1312.5602); offline as in Agarwal et al., "An Optimistic Perspective on Offline Reinforcement
Learning", ICML 2020, arXiv 1907.04543. --double: van Hasselt, Guez & Silver, "Deep Reinforcement
Learning with Double Q-learning", AAAI 2016, arXiv 1509.06461.
Notes: Distributional Shift; Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN, which is built
from DQN. The notes name Double DQN as what online RL does against overestimation.

Q-learning with a network: fit Q to a target made of a frozen copy of Q, and refresh the copy now
and then. The maximum in the target prefers actions whose value is estimated too high. Online, the
agent tries such an action and corrects the estimate; a fixed dataset may never show it. Double DQN
lets one network choose the action and the other one evaluate it, so that an error of one network
alone does less harm.

  (E1) a* = argmax_a′ Q̄(s′, a′);  with --double  a* = argmax_a′ Q(s′, a′)
  (E2) y = r + γ (1 − d) Q̄(s′, a*)
  (E3) L = E_D[ ℓ( Q(s, a) − y ) ],  ℓ(x) = x²/2 where |x| ≤ 1, |x| − 1/2 elsewhere (Huber)
  (E4) Q̄ ← Q, every target_every updates

Shapes: B batch, S observation, A the number of actions. d is terminated: a truncated episode
bootstraps. Vectors enter as they are. Images, (H, W), (H, W, C) or (C, H, W) of bytes and at least
36 pixels wide and high, are divided by 255, get the convolutions of the Nature paper, and their
rewards are clipped to ±1.

Differences from the second paper and its official code (google-research/batch_rl), which has no
Double DQN:
  D1 Vectors get CleanRL's network for classic control. The code publishes settings with RMSProp for
     offline DQN and with Adam for the other agents; here DQN has those of REM, so that rem.py
     differs in its heads and the update alone.
  D2 The code copies the target every 8000 agent steps, of which each 4th is an update:
     target_every counts 2000 updates.
  D3 TensorFlow 1's Adam adds ε to √v before the bias correction of v, PyTorch after it. So the
     code's first updates are smaller; after a few thousand both are the same.
  D4 The convolutions are unpadded, as in the Nature paper; the code pads. PyTorch's default
     initialisation.
  D5 100,000 updates, for classic control; the code has 12.5M. All data are in memory, and acting
     never explores; see D5 and D6 of rem.py.

Watch: q_policy, the mean of max_a Q. If Q is right it is at most the largest discounted return, 100
where rewards are at most 1 and γ = 0.99. If it does, the maximum has found overestimated actions
and the policy is of no use: try cql_discrete.py. Below it a policy may still fail, as on
cartpole-medium from the first evaluation on. --double changes little where data are fixed.

Run:     python algorithms/dqn.py --env cartpole-replay
         python algorithms/dqn.py --env cartpole-replay --double
Expect:  far above the data on cartpole-replay, the episodes of 25 snapshots of an online run, with
         large differences between seeds; failure on cartpole-medium, one policy's episodes.
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
    learning_rate: float = 5e-5  # Adam [C fixed_replay/configs] [D1]
    gamma: float = 0.99  # discount γ [C fixed_replay/configs]
    target_every: int = 2_000  # updates between copies (E4) [C fixed_replay/configs] [D2]
    # Double DQN
    double: bool = False  # the learned network chooses a* in (E1) [P 1509.06461]


HIDDEN = (120, 84)  # widths for vectors [C CleanRL dqn.py] [D1]
MIN_PIXELS = 36  # the smallest height and width of which three convolutions leave one pixel
ADAM_EPS = 3.125e-4  # [C fixed_replay/configs] [D3]


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
def td_target(q_net: QNetwork, q_target: QNetwork, batch: Batch, args: Args) -> Tensor:
    """(E1), (E2): the regression target y, (B,)."""
    next_q = q_target(batch.next_obs)  # (B, A)
    # (E1) the one difference between DQN and Double DQN: which network chooses
    chooser = q_net(batch.next_obs) if args.double else next_q
    best = chooser.argmax(dim=1, keepdim=True)  # (B, 1)
    # (E2) in both cases the frozen network says what the choice is worth
    next_value = next_q.gather(1, best).squeeze(1)
    return batch.reward + args.gamma * (1 - batch.terminated) * next_value


def critic_loss(q_net: QNetwork, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E3); also the mean Q of the data's actions and of the best ones."""
    q = q_net(batch.obs)  # (B, A)
    q_data = q.gather(1, batch.action[:, None]).squeeze(1)  # (B,)
    assert y.shape == q_data.shape, "a target (B, 1) would broadcast to (B, B), and train"
    # (E3)
    return F.huber_loss(q_data, y), q_data.detach().mean(), q.detach().max(dim=1).values.mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def copy_weights(target: nn.Module, online: nn.Module) -> None:
    """(E4) target ← online, for all parameters at once."""
    torch._foreach_copy_(list(target.parameters()), list(online.parameters()))


def update(args: Args, data: Dataset, q_net: QNetwork, q_target: QNetwork, optimizer,
           copy_target: bool) -> dict[str, Tensor]:
    """One step of DQN. The target network moves in every target_every-th step."""
    batch = data.sample(args.batch_size)

    y = td_target(q_net, q_target, batch, args)
    q_loss, q_data, q_policy = critic_loss(q_net, batch, y)
    descend(q_loss, optimizer)

    if copy_target:
        # (E4)
        copy_weights(q_target, q_net)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy}


def train(args: Args) -> None:
    check_range(args, "batch_size target_every", 1)
    check_range(args, "learning_rate", 0)
    check_range(args, "gamma", 0, 1)
    data = load_dataset(args.env, args.device, discrete=True, images=True, eval_env=args.eval_env,
                        holdout=args.holdout)
    images = len(data.obs_shape) > 1
    run = Run(args, data, variant="-double" if args.double else "", gflop=2.4 if images else 0.003)
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
