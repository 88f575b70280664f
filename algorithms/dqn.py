"""Deep Q-Network (DQN), offline and online, for discrete actions.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015 (first: arXiv 1312.5602); offline as in
Agarwal et al., "An Optimistic Perspective on Offline Reinforcement Learning", ICML 2020, arXiv 1907.04543.
Notes: Uncertainty-Based › Bootstrap ensembles, Ensemble-DQN; DQN is what REM and Ensemble-DQN are built from and compared with.

Q-learning with a network: fit Q to a target made of a frozen copy of itself, and refresh the copy now and then. Nothing in it
asks where the data came from, so the same update runs online and on a fixed dataset. Offline its `max` looks for actions that
the data may not show; how well that goes depends on how much of a training run the data holds: compare `cartpole-replay`,
everything that an online run lived through, with `cartpole-medium`, one policy's episodes.

  (E1) y = r + γ (1 − d) max_a′ Q̄(s′, a′)
  (E2) L_Q = E_D[ ℓ( Q(s, a) − y ) ],  ℓ(x) = x²/2 where |x| ≤ 1, |x| − 1/2 elsewhere (Huber)
  (E3) Q̄ ← Q, once in a while
  (E4) online: a uniform with probability ε, otherwise argmax_a Q(s, a);  ε falls from 1 along a line, then stays

Shapes: B batch, S observation, A the number of actions. d is terminated: a truncated episode bootstraps.
Observations are raw.

Differences from the second paper and its official code (google-research/batch_rl):
  D1 Its network is Nature's for Atari frames, ours CleanRL's for vectors. It publishes settings of offline DQN with RMSProp, of
     the other agents with Adam; here DQN has the others', so that the update alone is compared.
  D2 Its target is copied every 8000 steps of the agent, of which each 4th is an update: `target_every` counts 2000 updates.
  D3 Online a step is an update, too, and ε falls within 10,000 steps. The Makefile's runs for behaviour data have CleanRL's
     settings for classic control, as 50,000 steps are too few for slow ones.

Run:     python algorithms/dqn.py --env cartpole-replay
         make behavior ENV=cartpole      (online)
Expect:  100,000 updates, 2 minutes, seed 0: 500 steps of balance on cartpole-replay, −90 on acrobot-replay, −107 on
         acrobot-medium; seeds 1 and 2 are far worse on the first two (rem.py has the means). On cartpole-medium 9: its mean Q
         of 329, where 100 is possible, is of no use; results/curves/.
"""
import copy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import SUITE, Batch, Dataset, Run, check, load_dataset, make_env, record_on_cuda, write_atomically


@dataclass
class Args:
    # run
    env: str = "cartpole-replay"  # suite dataset or Minari id with discrete actions; with --online a body: cartpole
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 100_000  # gradient updates; online also steps in the environment [=]
    batch_size: int = 32  # transitions per update [C fixed_replay/configs]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between evaluations, and between checkpoints [=]
    eval_episodes: int = 10  # per evaluation [=]
    final_episodes: int = 100  # behind the final score [=]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    learning_rate: float = 5e-5  # Adam [C fixed_replay/configs] [D1]
    gamma: float = 0.99  # discount γ [C fixed_replay/configs]
    target_every: int = 2_000  # updates between (E3); 500 let it diverge offline [C fixed_replay/configs] [D2]
    # DQN, online
    online: bool = False  # act in the real environment, learn from what was lived so far
    random_steps: int = 500  # first steps, without update [=]
    final_epsilon: float = 0.05  # ε in the end [C CleanRL dqn.py]
    epsilon_steps: int = 10_000  # steps until then [D3]
    snapshot_every: int = 500  # steps between saved policies, the makings of behaviour data [=]


HIDDEN = (120, 84)  # [C CleanRL dqn.py] [D1]
ADAM_EPS = 3.125e-4  # [C fixed_replay/configs]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class QNetwork(nn.Module):
    """Q of every action at once, (B, S) -> (B, A); to act is to take the best."""

    def __init__(self, obs_dim: int, num_actions: int):
        super().__init__()
        self.net = mlp(obs_dim, *HIDDEN, num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Raw observations (B, S) to the numbers of the greedy actions (B,)."""
        return self(obs).argmax(dim=1)


@torch.no_grad()
def td_target(q_target: QNetwork, batch: Batch, gamma: float) -> Tensor:
    """(E1): the regression target y, (B,)."""
    # (E1) the frozen network both chooses the action and says what it is worth
    next_q = q_target(batch.next_obs).max(dim=1).values
    return batch.reward + gamma * (1 - batch.terminated) * next_q


def critic_loss(q_net: QNetwork, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E2); also the mean Q of the data's actions and of the greedy ones."""
    q = q_net(batch.obs)  # (B, A)
    q_data = q.gather(1, batch.action[:, None]).squeeze(1)  # (B,)
    assert y.shape == q_data.shape, "a target (B, 1) would broadcast to (B, B), and train"
    # (E2)
    return F.huber_loss(q_data, y), q_data.detach().mean(), q.detach().max(dim=1).values.mean()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def copy_weights(target: nn.Module, online: nn.Module) -> None:
    """(E3) target ← online, all parameters at once."""
    torch._foreach_copy_(list(target.parameters()), list(online.parameters()))


def update(args: Args, data: Dataset, q_net: QNetwork, q_target: QNetwork, optimizer, copy_target: bool) -> dict[str, Tensor]:
    """One step of DQN. `copy_target` says whether (E3) has its turn."""
    batch = data.sample(args.batch_size)

    y = td_target(q_target, batch, args.gamma)
    q_loss, q_data, q_policy = critic_loss(q_net, batch, y)
    descend(q_loss, optimizer)

    if copy_target:
        # (E3)
        copy_weights(q_target, q_net)
    return {"critic_loss": q_loss.detach(), "q_data": q_data, "q_policy": q_policy}


def exploration(args: Args, step: int) -> float:
    """ε of (E4): 1 in the random steps, then down a line."""
    share = max(0, step - args.random_steps) / args.epsilon_steps
    return max(args.final_epsilon, 1 + share * (args.final_epsilon - 1))


def interact(args: Args, data: Dataset, q_net: QNetwork, start: int):
    """Online only: each next() takes one step in the environment and stores it. A resumed run begins a new episode."""
    env = make_env(data.env_id, "training")
    obs, _ = env.reset(seed=args.seed + start)
    while True:
        # (E4)
        action = torch.randint(data.num_actions, (), device=data.device)
        if torch.rand(()) >= exploration(args, int(data.size)):
            action = q_net.act(torch.as_tensor(obs[None], dtype=torch.float32, device=data.device))[0]
        next_obs, reward, terminated, truncated, _ = env.step(int(action))
        # `truncated` is not stored: a time limit is not the end of the task
        row = np.concatenate([obs, [int(action)], next_obs, [reward, terminated]])
        data.packed[int(data.size)] = torch.as_tensor(row)
        data.size += 1
        obs = env.reset()[0] if terminated or truncated else next_obs
        yield


def train(args: Args) -> None:
    if args.online:
        check(args.env in SUITE, f"--online takes a body, one of {', '.join(SUITE)}, not '{args.env}'")
        data = Dataset(args.env, SUITE[args.env][0], args.steps, args.device, SUITE[args.env][1:])
        check(data.num_actions, f"{args.env} has continuous actions, this algorithm needs the other kind; try sac.py")
    else:
        data = load_dataset(args.env, args.device, discrete=True)
    run = Run(args, data, variant="-online" if args.online else "")
    q_net = QNetwork(data.obs_dim, data.num_actions).to(data.device)
    q_target = copy.deepcopy(q_net)
    optimizer = torch.optim.Adam(q_net.parameters(), lr=args.learning_rate, eps=ADAM_EPS, fused=True,
                                 capturable=data.device.type == "cuda")

    memory = {"packed": data.packed, "size": data.size} if args.online else {}
    start = run.resume(q_net=q_net, q_target=q_target, optimizer=optimizer, **memory)
    one_update = record_on_cuda(partial(update, args, data, q_net, q_target, optimizer), data.device)
    environment = interact(args, data, q_net, start) if args.online else None
    for step in range(start + 1, args.steps + 1):
        if args.online:
            next(environment)
            if step % args.snapshot_every == 0:
                snapshot = q_net.state_dict() | {"epsilon": torch.tensor(exploration(args, step))}
                write_atomically(run.folder / "snapshots" / f"{step:07d}.pt", lambda path: torch.save(snapshot, path))
        metrics = one_update(step % args.target_every == 0) if not args.online or step > args.random_steps else {}
        run.step(step, metrics, q_net.act)
    run.finish(q_net)


if __name__ == "__main__":
    train(tyro.cli(Args))
