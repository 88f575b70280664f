"""Random Ensemble Mixture (REM), and Ensemble-DQN with `--ensemble`.

Agarwal, Schuurmans & Norouzi, "An Optimistic Perspective on Offline Reinforcement Learning", ICML 2020, arXiv 1907.04543.
Notes: Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN; REM. (The notes date it 2021. The K heads here share all but
their last layer, as in the paper's offline runs: "K independently trained Q" they are not, which is one reason for the "too
little diversity" that the notes see.)

Give DQN K heads. Ensemble-DQN teaches each head on its own target. REM draws, for each mini-batch, one random convex
combination of the heads and treats that mixture as the Q network: whatever the combination, it has to fulfil Bellman's
equation. This trains a continuum of Q networks at once, and the mean of the heads, which acts, is one of them. A matrix of
weights M makes the difference: its rows are the combinations that have to be consistent.

  (E1) REM: M = α / Σ_k α_k, one row, α_k ~ U(0, 1);  Ensemble-DQN: M = I, K rows
  (E2) Q̃_c = Σ_k M_ck Q_k,  Q̃′_c = Σ_k M_ck Q̄_k, with the same M
  (E3) y_c = r + γ (1 − d) max_a′ Q̃′_c(s′, a′)
  (E4) L_Q = 1/C Σ_c E_D[ ℓ( Q̃_c(s, a) − y_c ) ],  ℓ(x) = x²/2 where |x| ≤ 1, |x| − 1/2 elsewhere (Huber)
  (E5) Q̄ ← Q, once in a while
  (E6) acting: argmax_a 1/K Σ_k Q_k(s, a)

Shapes: B batch, S observation, A the number of actions, K heads, C combinations (REM 1, Ensemble-DQN K). d is terminated: a
truncated episode bootstraps. Observations are raw. Four frames of 84 × 84 grey pixels (0 to 255) get the Nature network, and
rewards clipped to ±1; any other vector gets a network as in dqn.py, and with K = 1 this file is dqn.py.

Differences from the official code (google-research/batch_rl):
  D1 Vectors get CleanRL's network for classic control; the settings are the paper's for its offline agents on Atari.
  D2 The target is copied every 8000 steps of the agent, of which each 4th is an update: `target_every` counts 2000 updates.
  D3 The Nature network's convolutions are unpadded, as in its paper; the code pads. PyTorch's default initialisation.
  D4 The whole dataset is in memory; the code loads 5 of 50 files at a time, anew in each iteration.
     A pixel is a float32 here, a transition 226 kB: 100,000 of them need 23 GB.
  D5 When acting it never explores; the code's evaluations do in one step of a thousand.

Run:     python algorithms/rem.py --env cartpole-replay
         python algorithms/rem.py --env cartpole-replay --ensemble
Expect:  100,000 updates, scores of REM, Ensemble-DQN and dqn.py: on cartpole-replay 91 ± 7, 60 ± 6, 54 ± 33 (the data 26), on
         acrobot-replay 32 ± 46, 90 ± 11, 62 ± 29 (80), three seeds. The final policy of a curve that swings is a lottery:
         three seeds do not tell which is best. On acrobot-medium 26 ± 37, 0 and 54 ± 39 (67), on cartpole-medium -3 each (37),
         where all fail.
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
from common import Batch, Dataset, Run, check, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "cartpole-replay"  # suite dataset or Minari id with discrete actions
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 100_000  # gradient updates [=]
    batch_size: int = 32  # transitions per update [C fixed_replay/configs]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    learning_rate: float = 5e-5  # Adam [C fixed_replay/configs]
    gamma: float = 0.99  # discount γ [C fixed_replay/configs]
    target_every: int = 2_000  # updates between (E5) [C fixed_replay/configs] [D2]
    # REM
    num_heads: int = 200  # K [C fixed_replay/configs]
    ensemble: bool = False  # Ensemble-DQN: each head on its own target [C multi_head_dqn_agent.py]


HIDDEN = (120, 84)  # for vectors [C CleanRL dqn.py] [D1]
FRAMES = (4, 84, 84)  # what the Nature network is for [C dopamine]
ADAM_EPS = 3.125e-4  # [C fixed_replay/configs]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def nature_network(num_outputs: int) -> nn.Sequential:
    """Three convolutions and two linear layers, for FRAMES."""
    convolutions = [nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
                    nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()]  # (B, 4, 84, 84) -> (B, 3136)
    return nn.Sequential(nn.Unflatten(1, FRAMES), *convolutions, *mlp(3136, 512, num_outputs))


class QNetwork(nn.Module):
    """K heads on one body, (B, S) -> (K, B, A); to act is to take what their mean finds best."""

    def __init__(self, obs_dim: int, num_actions: int, num_heads: int = 200):
        super().__init__()
        self.num_heads, num_outputs, frames = num_heads, num_heads * num_actions, obs_dim == math.prod(FRAMES)
        self.scale = 255 if frames else 1
        self.net = nature_network(num_outputs) if frames else mlp(obs_dim, *HIDDEN, num_outputs)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs / self.scale).view(len(obs), self.num_heads, -1).transpose(0, 1)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, ...) to the numbers of the greedy actions (B,)."""
        # (E6)
        return self(obs.flatten(1)).mean(dim=0).argmax(dim=1)


def head_weights(num_heads: int, ensemble: bool, device: torch.device) -> Tensor:
    """(E1): the combinations of heads that shall be consistent, (C, K); each row sums to 1."""
    # (E1) normalised uniform numbers, anew for each mini-batch; not a Dirichlet's, not one set for all of training
    if ensemble:
        return torch.eye(num_heads, device=device)
    weights = torch.rand(1, num_heads, device=device)
    return weights / weights.sum()


def mix(q: Tensor, weights: Tensor) -> Tensor:
    """(E2): heads (K, B, A) to combinations (C, B, A)."""
    # (E2)
    return torch.einsum("ck,kba->cba", weights, q)


@torch.no_grad()
def td_target(q_target: QNetwork, weights: Tensor, batch: Batch, gamma: float) -> Tensor:
    """(E3): the regression targets y, (C, B)."""
    # (E3) first mixed, then the maximum: heads that disagree about the best action are not each granted theirs
    next_q = mix(q_target(batch.next_obs), weights).max(dim=2).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


def critic_loss(q_net: QNetwork, weights: Tensor, batch: Batch, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(E4); also, to be watched, the mean Q of the data's actions, that of the greedy ones, and the heads' spread."""
    heads = q_net(batch.obs)  # (K, B, A)
    q_data = mix(heads, weights).gather(2, batch.action.expand(len(weights), -1)[..., None]).squeeze(2)  # (C, B)
    assert y.shape == q_data.shape, "shapes that differ would broadcast, and train"
    mean = heads.detach().mean(dim=0)
    metrics = {"q_data": q_data.detach().mean(), "q_policy": mean.max(dim=1).values.mean(),
               "head_std": heads.detach().std(dim=0, correction=0).mean()}
    # (E4)
    return F.huber_loss(q_data, y), metrics


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def copy_weights(target: nn.Module, online: nn.Module) -> None:
    """(E5) target ← online, all parameters at once."""
    torch._foreach_copy_(list(target.parameters()), list(online.parameters()))


def update(args: Args, data: Dataset, q_net: QNetwork, q_target: QNetwork, optimizer, copy_target: bool) -> dict[str, Tensor]:
    """One step of REM. `copy_target` says whether (E5) has its turn."""
    batch = data.sample(args.batch_size)
    weights = head_weights(args.num_heads, args.ensemble, data.device)  # the same for Q and for its target

    y = td_target(q_target, weights, batch, args.gamma)
    q_loss, metrics = critic_loss(q_net, weights, batch, y)
    descend(q_loss, optimizer)

    if copy_target:
        # (E5)
        copy_weights(q_target, q_net)
    return metrics | {"critic_loss": q_loss.detach()}


def train(args: Args) -> None:
    check(args.num_heads > 0, f"--num-heads must be at least 1, not {args.num_heads}")
    data = load_dataset(args.env, args.device, discrete=True)
    run = Run(args, data, variant="-ensemble" if args.ensemble else "")
    if data.obs_dim == math.prod(FRAMES):
        data.columns(data.packed).reward.clamp_(-1, 1)
    q_net = QNetwork(data.obs_dim, data.num_actions, args.num_heads).to(data.device)
    q_target = copy.deepcopy(q_net)
    optimizer = torch.optim.Adam(q_net.parameters(), lr=args.learning_rate, eps=ADAM_EPS, fused=True,
                                 capturable=data.device.type == "cuda")

    start = run.resume(q_net=q_net, q_target=q_target, optimizer=optimizer)
    one_update = record_on_cuda(partial(update, args, data, q_net, q_target, optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        metrics = one_update(step % args.target_every == 0)
        run.step(step, metrics, q_net.act)
    run.finish(q_net)


if __name__ == "__main__":
    train(tyro.cli(Args))
