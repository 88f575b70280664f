"""Decision Transformer (DT): offline RL as the prediction of the next action in a sequence.

Chen, Lu, Rajeswaran, Lee, Grover, Laskin, Abbeel, Srinivas & Mordatch, "Decision Transformer:
Reinforcement Learning via Sequence Modeling", NeurIPS 2021, arXiv 2106.01345.
Notes: Step By Step: SOTA1 — DT; and Offline RL的研究热点. This file is the notes' walk-through.

DT learns no value and has no target network. It writes each episode as a sequence, "return still
to come, observation, action, return still to come, ...", and learns to predict the actions by
regression. To act, one puts the return that one asks for at the start. In the data good episodes
carry large returns-to-go, so the action "given this return" tells good from bad behaviour; it can't
stitch, and a request beyond the best return in the data is a guess (results/asked.py).

  (E1) R̂_t = Σ_{u ≥ t} r_u / scale, to the end of the episode, not discounted: the return-to-go
  (E2) a window: the K steps from t on, t uniform over all rows; where the episode ends sooner, the
       window is padded on the left
  (E3) three tokens for each step i of a window, with e_i an embedding of that step's number in its
       episode:  LayerNorm(W_R R̂_i + e_i),  LayerNorm(W_s s_i + e_i),  LayerNorm(W_a a_i + e_i)
  (E4) token m sees token n  ⇔  n ≤ m and n is no padding,  or n = m
  (E5) three times:  x ← x + W_o Σ_n softmax_n(q_m · k_n / √(D/H)) v_n  over what m sees;  q, k, v
       are linear in LayerNorm(x);  x ← x + W_2 relu(W_1 LayerNorm(x))
  (E6) â_i = tanh(W LayerNorm(x)) from the token of s_i, which has seen R̂_i and s_i but not a_i
  (E7) L = Σ_i ‖â_i − a_i‖² / (A · number of steps), over steps that are no padding
  (E8) learning rate of update n:  lr · min(n / warm-up, 1)
  (E9) acting: R̂_0 = target / scale;  after a reward r,  R̂ ← R̂ − r / scale

A window of K = 4 whose episode ends after two steps, and what its last tokens see (E4):

            padding     padding     step t        step t + 1
            R̂  s  a     R̂  s  a     R̂  s  a     R̂  s  a
      R̂     .  .  .     .  .  .     x  x  x     x  .  .
      s     .  .  .     .  .  .     x  x  x     x  x  .      <- predicts the action of t + 1
      a     .  .  .     .  .  .     x  x  x     x  x  x

Shapes: B windows, K = 20 steps, 3K tokens, D = 128 wide, H = 1 head, S observation, A action, E
episodes. Observations have mean 0 and standard deviation 1 over the data, actions lie in [-1, 1].

Differences from the official code (kzl/decision-transformer, gym):
  D1 No heads for the next state and return, which get no loss there, and no unused word embedding.
  D2 Padding is zeros; there, actions of −10 in training and 0 in evaluation. It is masked anyway.
  D3 Evaluation plays all episodes side by side, without padding: windows grow to K, then slide.
  D4 Where no target is known, the best return in the data is asked for. The second target is half
     of the first, or twice the first if that is negative. Its return is printed.
  D5 10 episodes per evaluation on the way; there, 100 for each target.

Watch: action_loss falls, and says little. Compare the return with the target: far below, the
request is beyond the data, or the updates are too few to have learned what a request means.

Run:     python algorithms/decision_transformer.py --env hopper-medium
Expect:  with --warmup-steps 1000, above a clone on hopper-medium-replay after 10,000 updates; half
         the usual target brings more than the target does. (The default warm-up alone takes
         10,000.) Scores and curves: results/README.md.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import (
    Dataset,
    Run,
    check_range,
    evaluate,
    fail,
    load_dataset,
    parse_args,
    record_on_cuda,
)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 100_000  # gradient updates [C experiment.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 10_000  # updates between evaluations and checkpoints [C experiment.py]
    eval_episodes: int = 10  # per evaluation; 0: none [D5]
    final_episodes: int = 100  # of the final evaluation, and of the 2nd target [C experiment.py]
    eval_env: str = "auto"  # auto: as recorded; none: no evaluation; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training, for fqe.py
    out: str = "runs"  # folder for results
    resume: bool = False  # continue from the last checkpoint
    # optimisation
    batch_size: int = 64  # windows per update [P][C experiment.py]
    actor_lr: float = 1e-4  # AdamW, after the warm-up (E8) [P][C experiment.py]
    warmup_steps: int = 10_000  # updates until then [C experiment.py]
    weight_decay: float = 1e-4  # AdamW, on every parameter [P][C experiment.py]
    clip_norm: float = 0.25  # of the gradient of all parameters together [P][C experiment.py]
    dropout: float = 0.1  # of tokens, attention weights, additions in (E5) [P][C experiment.py]
    # DT
    target_return: float | None = None  # asked for in (E9), raw; None: the data's best [D4]
    return_scale: float = 1000.0  # divides returns in (E1) and (E9) [C experiment.py]


TUNED = {  # the larger of the code's two targets [C experiment.py]
    "hopper-random": {"target_return": 3600.0},
    "hopper-medium": {"target_return": 3600.0},
    "hopper-medium-replay": {"target_return": 3600.0},
    "hopper-medium-expert": {"target_return": 3600.0},
    "hopper-expert": {"target_return": 3600.0},
    "halfcheetah-random": {"target_return": 12000.0},
    "halfcheetah-medium": {"target_return": 12000.0},
    "halfcheetah-medium-replay": {"target_return": 12000.0},
    "halfcheetah-medium-expert": {"target_return": 12000.0},
    "halfcheetah-expert": {"target_return": 12000.0},
    "walker2d-random": {"target_return": 5000.0},
    "walker2d-medium": {"target_return": 5000.0},
    "walker2d-medium-replay": {"target_return": 5000.0},
    "walker2d-medium-expert": {"target_return": 5000.0},
    "walker2d-expert": {"target_return": 5000.0},
}
CONTEXT = 20  # K, steps in a window [P][C experiment.py]
WIDTH, LAYERS, HEADS = 128, 3, 1  # of the transformer [P][C experiment.py]
MAX_STEPS = 1000  # step numbers with an embedding; later steps share the last [C experiment.py]


class Window(NamedTuple):
    """B windows of K steps."""

    obs: Tensor  # (B, K, S)
    action: Tensor  # (B, K, A)
    to_go: Tensor  # (B, K) returns-to-go
    step: Tensor  # (B, K) the steps' numbers in their episode
    real: Tensor  # (B, K) bool, False for padding


class Places(NamedTuple):
    """Where each row of the data stands in its episode, (N,) each."""

    to_go: Tensor  # its return-to-go (E1)
    step: Tensor  # its number in the episode, at most MAX_STEPS - 1
    stop: Tensor  # the row after the last of its episode


# ---- the network


class Block(nn.Module):
    """One layer of the transformer: attention among the tokens, then an MLP for each token."""

    def __init__(self):
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)
        for layer in (self.query_key_value, self.merge, self.widen, self.narrow):
            nn.init.normal_(layer.weight, std=0.02)  # as GPT-2 [C trajectory_gpt2.py]
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, visible: Tensor, dropout: float) -> Tensor:
        """Tokens (B, 3K, D) -> (B, 3K, D)."""
        # (E5) query: what a token looks for; key: what it is found by; value: what it then gives
        parts = []
        for part in self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1):
            parts.append(part.unflatten(-1, (HEADS, -1)).transpose(1, 2))  # (B, H, 3K, D / H)
        found = F.scaled_dot_product_attention(*parts, attn_mask=visible, dropout_p=dropout)
        merged = self.merge(found.transpose(1, 2).flatten(2))  # (B, 3K, D)
        x = x + F.dropout(merged, dropout)
        widened = F.relu(self.widen(self.norm_mlp(x)))
        return x + F.dropout(self.narrow(widened), dropout)


class Actor(nn.Module):
    """The transformer. Its buffers hold the data's units and the return to ask for.

    The policy has a memory, so `act` is not a method but a Player, one and the same for the life
    of the actor: act.start(E) before the first step of E episodes, act(raw observations) in each
    step, act.record(i, reward) after it. common.evaluate does so.
    """

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.embed_to_go = nn.Linear(1, WIDTH)
        self.embed_obs = nn.Linear(obs_dim, WIDTH)
        self.embed_action = nn.Linear(action_dim, WIDTH)
        self.embed_step = nn.Embedding(MAX_STEPS, WIDTH)
        self.norm_tokens = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm_final = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, action_dim)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("action_mid", torch.zeros(action_dim))
        self.register_buffer("action_half", torch.ones(action_dim))
        self.register_buffer("target_return", torch.zeros((), dtype=torch.float64))
        self.register_buffer("return_scale", torch.ones((), dtype=torch.float64))
        self.act = Player(self)

    def forward(self, window: Window, dropout: float = 0.0) -> Tensor:
        """The predicted actions (B, K, A) in [-1, 1]."""
        # (E3) the step's number is that in the episode, not that in the window
        when = self.embed_step(window.step)  # (B, K, D)
        to_go = self.embed_to_go(window.to_go.unsqueeze(-1)) + when
        obs = self.embed_obs(window.obs) + when
        action = self.embed_action(window.action) + when
        tokens = torch.stack([to_go, obs, action], dim=2).flatten(1, 2)  # (B, 3K, D): R̂ s a R̂ s a
        x = F.dropout(self.norm_tokens(tokens), dropout)
        visible = visible_tokens(window.real)
        for block in self.blocks:
            x = block(x, visible, dropout)
        # (E6) every third token, from the second: those of the observations
        return torch.tanh(self.head(self.norm_final(x[:, 1::3])))


def visible_tokens(real: Tensor) -> Tensor:
    """(E4): which tokens n each token m may see, (B, 1, 3K, 3K), from the steps that are real."""
    real = real.repeat_interleave(3, dim=1)  # (B, 3K)
    # (E4) causal and no padding. n = m is for the rows of padding: a softmax over nothing is 0 / 0,
    # which some kernels make NaN, and NaN times a mask of 0 remains NaN
    past = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(len(past), dtype=torch.bool, device=real.device)
    return (past & real[:, None, :] | itself).unsqueeze(1)


# ---- the data, as windows


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Brings the data's observations to mean 0 and standard deviation 1, in place.

    Returns the mean and the deviation + eps that were used, (S,) each.
    """
    mean = data.obs.mean(dim=0)
    std = data.obs.std(dim=0, correction=0) + eps  # eps: for what hardly moves
    data.obs = (data.obs - mean) / std
    data.next_obs = (data.next_obs - mean) / std
    return mean, std


def drop_fragment(data: Dataset) -> None:
    """Leaves out a last episode that the recording cut off: its returns-to-go are unknown."""
    ends = (data.terminated.bool() | data.truncated).nonzero()
    if not len(ends):
        fail(f"{data.name} has no complete episode, and so no returns to learn from")
    data.keep(np.arange(int(ends.max()) + 1))


def find_places(data: Dataset, return_scale: float) -> Places:
    """The return-to-go, the step and the end of the episode of each row of the data."""
    starts, stops = data.episodes()
    reward = data.reward.double().cpu().numpy()
    to_go = []
    step = []
    for first, stop in zip(starts, stops):
        # (E1) a sum from the back: rewards (1, 2, 3) have returns-to-go (6, 5, 3)
        to_go.append(reward[first:stop][::-1].cumsum()[::-1] / return_scale)
        step.append(np.arange(stop - first).clip(max=MAX_STEPS - 1))
    columns = Places(np.concatenate(to_go), np.concatenate(step), np.repeat(stops, stops - starts))
    to_go, step, stop = (torch.as_tensor(column, device=data.device) for column in columns)
    return Places(to_go.to(data.obs.dtype), step, stop)


def sample_windows(data: Dataset, places: Places, batch_size: int) -> Window:
    """(E2): B windows. Each row is a start with equal chance, so long episodes count more."""
    first = data.draw_rows(batch_size)  # (B,)
    length = (places.stop[first] - first).clamp(max=CONTEXT)  # (B,) real steps
    # (E2) row numbers relative to the first: for 2 real steps of 4 they are −2 −1 0 1
    offset = torch.arange(CONTEXT, device=data.device) - (CONTEXT - length).unsqueeze(1)  # (B, K)
    real = offset >= 0
    index = (first.unsqueeze(1) + offset.clamp(min=0)).flatten()  # (B·K,)

    def take(column: Tensor) -> Tensor:
        drawn = column.index_select(0, index).unflatten(0, real.shape)  # (B, K, ...)
        return drawn * real.view(*real.shape, *[1] * (drawn.dim() - 2))  # padding is zero [D2]

    return Window(take(data.obs), take(data.action), take(places.to_go), take(places.step), real)


# ---- learning


def action_loss(actor: Actor, window: Window, dropout: float) -> Tensor:
    """(E7): the squared error of the actions, averaged over real steps and action dimensions."""
    prediction = actor(window, dropout)
    assert prediction.shape == window.action.shape
    # (E7) divided by the real steps: a mean over all would shrink the loss of windows with padding
    error = (prediction - window.action).pow(2) * window.real.unsqueeze(-1)
    return error.sum() / (window.real.sum() * window.action.shape[-1])


def descend_clipped(loss: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """One gradient step, on a gradient no longer than `clip_norm`."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()


def update(args: Args, data: Dataset, places: Places, actor: Actor, optimizer) -> dict[str, Tensor]:
    """One step of DT."""
    window = sample_windows(data, places, args.batch_size)
    loss = action_loss(actor, window, args.dropout)
    descend_clipped(loss, optimizer, args.clip_norm)
    return {"action_loss": loss.detach()}


# ---- acting


class Player:
    """Plays E episodes side by side, asks for a return in each, and remembers the last K steps.

    Without a `target` of its own it asks for the actor's. An episode that ended before the others
    is carried along; what is said for it is to be ignored.
    """

    def __init__(self, actor: Actor, target: float | None = None):
        self.actor = actor
        self.target = target
        self.start(0)

    def start(self, num: int) -> None:
        """Empties the memory, for `num` new episodes."""
        actor = self.actor
        target = float(actor.target_return) if self.target is None else self.target
        self.time = 0
        self.still_asked = np.full(num, target)  # (E,) raw returns
        self.obs = actor.obs_mean.new_zeros(num, 0, len(actor.obs_mean))
        self.action = actor.obs_mean.new_zeros(num, 0, len(actor.action_mid))
        self.to_go = actor.obs_mean.new_zeros(num, 0)

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """Raw observations (E, S) of this moment to the environment's own actions (E, A)."""
        actor = self.actor
        if len(obs) != len(self.obs):
            raise ValueError(f"{len(obs)} observations for {len(self.obs)} episodes: call start")
        # the newest step enters without its action, which (E4) hides; the oldest of more than K
        # leaves
        if isinstance(obs, np.ndarray):  # of any type, byte order and stride
            obs = obs.astype(np.float32)
        obs = torch.as_tensor(obs).to(actor.obs_mean)
        obs = ((obs - actor.obs_mean) / actor.obs_std).unsqueeze(1)  # (E, 1, S)
        asked = torch.as_tensor(self.still_asked, device=obs.device) / actor.return_scale  # (E,)
        self.obs = torch.cat([self.obs, obs], dim=1)[:, -CONTEXT:]
        self.to_go = torch.cat([self.to_go, asked.to(obs.dtype).unsqueeze(1)], dim=1)[:, -CONTEXT:]
        self.action = F.pad(self.action, (0, 0, 0, 1))[:, -CONTEXT:]
        num, length = self.to_go.shape
        step = torch.arange(self.time + 1 - length, self.time + 1, device=obs.device)
        step = step.clamp(max=MAX_STEPS - 1).expand(num, -1)
        window = Window(self.obs, self.action, self.to_go, step, torch.ones_like(step).bool())
        self.action[:, -1] = actor(window)[:, -1]
        self.time += 1
        return actor.action_mid + actor.action_half * self.action[:, -1]

    def record(self, i: int, reward: float) -> None:
        """What episode i received for its last action."""
        # (E9) it is asked for no longer; after more than was asked, R̂ is outside the data's range
        self.still_asked[i] -= reward


def actor_rate(args: Args, step: int) -> float:
    """(E8): the learning rate in update `step`, counted from 1."""
    # (E8) it grows linearly, then stays
    return args.actor_lr * min(step / args.warmup_steps, 1)


def train(args: Args) -> None:
    check_range(args, "batch_size warmup_steps", 1)
    check_range(args, "actor_lr weight_decay clip_norm", 0)
    check_range(args, "dropout", 0, 0.99)
    if not args.return_scale > 0:
        fail(f"--return-scale must be above 0, not {args.return_scale}")
    if args.target_return is not None and not np.isfinite(args.target_return):
        fail(f"--target-return must be a finite number, not {args.target_return}")
    data = load_dataset(args.env, args.device, eval_env=args.eval_env, holdout=args.holdout)
    run = Run(args, data, gflop=14.7)
    drop_fragment(data)
    best = float(data.returns().max())
    target = best if args.target_return is None else args.target_return
    print(f"asks for a return of {target:.1f}; the best in the data is {best:.1f}")

    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.obs_mean, actor.obs_std = standardize_obs(data, eps=1e-6)  # [C experiment.py]
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    actor.target_return.fill_(target)
    actor.return_scale.fill_(args.return_scale)
    # a tensor: a CUDA graph would freeze a number
    changing_lr = torch.tensor(args.actor_lr, device=data.device)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=changing_lr,
                                  weight_decay=args.weight_decay, fused=True,
                                  capturable=data.device.type == "cuda")
    learned = {"actor": actor, "optimizer": optimizer}
    start = run.begin(learned, actor)
    places = find_places(data, args.return_scale)
    one_update = record_on_cuda(partial(update, args, data, places, **learned), data.device)
    for step in range(start + 1, args.steps + 1):
        optimizer.param_groups[0]["lr"].fill_(actor_rate(args, step))
        run.step(step, one_update())
    run.finish()

    if data.env_spec and args.final_episodes > 0:
        second = target / 2 if target > 0 else 2 * target  # [D4]
        try:
            returns = evaluate(Player(actor, second), data.env_spec, args.final_episodes,
                               10**6 * (args.seed + 1000), data.device)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            fail(f"the run is complete; the second request, {second:.1f}, was not played to its "
                 f"end ({type(error).__name__})")
        print(f"asked for {second:.1f}: return {returns.mean():.1f} ± {returns.std():.1f}")


if __name__ == "__main__":
    train(parse_args(Args, TUNED))
