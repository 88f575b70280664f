"""Random Ensemble Mixture (REM), and Ensemble-DQN with `--ensemble`.

Agarwal, Schuurmans & Norouzi, "An Optimistic Perspective on Offline Reinforcement Learning", ICML
2020, arXiv 1907.04543.
Notes: Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN; REM. (The notes date it 2021. As in
the paper's offline runs the K heads share all but their last layer; they are not "K independently
trained Q", which is one reason for the "too little diversity" that the notes see.)

DQN with K heads. Ensemble-DQN trains each head on its own target. REM draws for each mini-batch one
random convex combination of the heads and trains this mixture as if it were the Q network. So
every combination must satisfy the Bellman equation, and the mean of the heads, which acts, is one
of them.

  (E1) REM: M = α / Σ_k α_k, one row, α_k ~ U(0, 1);  Ensemble-DQN: M = I, K rows
  (E2) Q̃_c = Σ_k M_ck Q_k,  Q̃′_c = Σ_k M_ck Q̄_k, with the same M
  (E3) y_c = r + γ (1 − d) max_a′ Q̃′_c(s′, a′)
  (E4) L = 1/C Σ_c E_D[ ℓ( Q̃_c(s, a) − y_c ) ],  ℓ the Huber loss: x²/2 where |x| ≤ 1, |x| − 1/2
       elsewhere
  (E5) Q̄ ← Q, every target_every updates
  (E6) acting: argmax_a 1/K Σ_k Q_k(s, a)

Shapes: B batch, S observation, A the number of actions, K heads, C combinations (REM 1,
Ensemble-DQN K). d is terminated: a truncated episode bootstraps. Vectors and images enter as in
dqn.py; with K = 1 this file is dqn.py.

Differences from the official code (google-research/batch_rl):
  D1 Vectors get CleanRL's network for classic control, and 100,000 updates; the code has 12.5M. The
     other settings are the paper's for its offline agents on Atari.
  D2 The code copies the target every 8000 agent steps, of which each 4th is an update:
     target_every counts 2000 updates.
  D3 TensorFlow 1's Adam adds ε to √v before the bias correction of v, PyTorch after it. So the
     code's first updates are smaller; after a few thousand both are the same.
  D4 The convolutions are unpadded, as in the Nature paper; the code pads. PyTorch's default
     initialisation.
  D5 The whole dataset is in memory, 56 kB for a transition of four 84 × 84 frames; the code loads 5
     of 50 files at a time, anew in each iteration.
  D6 When acting it never explores; the code's evaluations do so in one step of a thousand.

Watch: head_std, the spread of the heads, grows slowly with Q; a sudden rise means that the heads
differ where no data are. q_policy above the largest discounted return proves overestimation, as in
dqn.py; below it a policy may fail all the same, so look at the evaluations.

Run:     python algorithms/rem.py --env cartpole-replay
         python algorithms/rem.py --env cartpole-replay --ensemble
Expect:  far above the data on cartpole-replay; failure on cartpole-medium, one policy's episodes.
         In the committed runs none of DQN, REM and Ensemble-DQN is ahead everywhere; evaluations
         swing, and seeds lie far apart. Scores and curves: results/README.md.
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
    learning_rate: float = 5e-5  # Adam [C fixed_replay/configs]
    gamma: float = 0.99  # discount γ [C fixed_replay/configs]
    target_every: int = 2_000  # updates between copies (E5) [C fixed_replay/configs] [D2]
    # REM
    num_heads: int = 200  # K [C fixed_replay/configs]
    ensemble: bool = False  # Ensemble-DQN: each head on its own target [C multi_head_dqn_agent.py]


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
    """K heads on one body, (B, *obs_shape) -> (K, B, A). The policy takes their mean's best action.
    """

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, num_heads: int = 200):
        super().__init__()
        self.init = [list(obs_shape), num_actions, num_heads]  # for load_policy to build it again
        self.num_heads = num_heads
        if len(obs_shape) == 1:
            self.net = mlp(*obs_shape, *HIDDEN, num_heads * num_actions)
        else:
            self.net = image_network(obs_shape, num_heads * num_actions)
        self.register_buffer("first_action", torch.zeros((), dtype=torch.long))

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Observations (B, *obs_shape) to the environment's numbers of the best actions (B,)."""
        # (E6)
        return self.first_action + self(obs).mean(dim=0).argmax(dim=1)


def head_weights(num_heads: int, ensemble: bool, device: torch.device) -> Tensor:
    """(E1): the combinations that must be consistent, (C, K); each row sums to 1."""
    # (E1) drawn anew for each mini-batch; normalised uniform numbers, which are not a Dirichlet
    if ensemble:
        return torch.eye(num_heads, device=device)
    weights = torch.rand(1, num_heads, device=device)
    return weights / weights.sum().clamp(min=1e-30)  # a single head's draw may be 0


def mix(q: Tensor, weights: Tensor) -> Tensor:
    """(E2): heads (K, B, A) to combinations (C, B, A)."""
    # (E2)
    return torch.einsum("ck,kba->cba", weights, q)


@torch.no_grad()
def td_target(q_target: QNetwork, weights: Tensor, batch: Batch, gamma: float) -> Tensor:
    """(E3): the regression targets y, (C, B)."""
    # (E3) first mixed, then the maximum: where heads disagree, they do not each get their own best
    next_q = mix(q_target(batch.next_obs), weights).max(dim=2).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


def critic_loss(q_net: QNetwork, weights: Tensor, batch: Batch,
                y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(E4); also the mean Q of the data's actions and of the best ones, and the heads' spread."""
    heads = q_net(batch.obs)  # (K, B, A)
    action = batch.action.expand(len(weights), -1).unsqueeze(2)  # (C, B, 1)
    q_data = mix(heads, weights).gather(2, action).squeeze(2)  # (C, B)
    assert y.shape == q_data.shape, "shapes that differ would broadcast, and train"
    mean = heads.detach().mean(dim=0)
    metrics = {"q_data": q_data.detach().mean(), "q_policy": mean.max(dim=1).values.mean(),
               "head_std": heads.detach().std(dim=0, correction=0).mean()}
    # (E4)
    return F.huber_loss(q_data, y), metrics


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
    """One step of REM. The target network moves in every target_every-th step."""
    batch = data.sample(args.batch_size)
    weights = head_weights(args.num_heads, args.ensemble, data.device)  # the same for Q and Q̄

    y = td_target(q_target, weights, batch, args.gamma)
    q_loss, metrics = critic_loss(q_net, weights, batch, y)
    descend(q_loss, optimizer)

    if copy_target:
        # (E5)
        copy_weights(q_target, q_net)
    return metrics | {"critic_loss": q_loss.detach()}


def train(args: Args) -> None:
    check_range(args, "batch_size target_every num_heads", 1)
    check_range(args, "learning_rate", 0)
    check_range(args, "gamma", 0, 1)
    data = load_dataset(args.env, args.device, discrete=True, images=True, eval_env=args.eval_env,
                        holdout=args.holdout)
    images = len(data.obs_shape) > 1
    run = Run(args, data, variant="-ensemble" if args.ensemble else "",
              gflop=2.4 if images else 0.011)
    if images:
        data.reward = data.reward.clamp(-1, 1)  # [C dopamine]

    q_net = QNetwork(data.obs_shape, data.num_actions, args.num_heads).to(data.device)
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
