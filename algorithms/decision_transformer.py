"""Decision Transformer, DT: offline RL as predicting the next word of a sentence.

Chen, Lu, Rajeswaran, Lee, Grover, Laskin, Abbeel, Srinivas & Mordatch, "Decision Transformer: Reinforcement Learning via
Sequence Modeling", NeurIPS 2021, arXiv 2106.01345.
Notes: Step By Step: SOTA1 — DT; and Offline RL的研究热点, which calls it striking. This file is their walk-through.

Every other file here but bc.py learns what an action is worth. DT learns no value, bootstraps nothing and has no target
network: it writes each episode as a sentence, "return still to come, observation, action, return still to come, ...", and
learns to say the action, by plain regression. To act, one begins the sentence with the return one would like to have, and lets
it go on.

  (E1) R̂_t = Σ_{u ≥ t} r_u / scale,  to the end of the episode, not discounted: the return-to-go
  (E2) a window: the K steps from t on, t uniform over all rows of the data; where the episode ends sooner, padded on the left
  (E3) three tokens for each step i of a window:  x = LayerNorm( W_R R̂_i + e_t ),  LayerNorm( W_s s_i + e_t ),
       LayerNorm( W_a a_i + e_t ),  with e_t an embedding of the step's number t in its episode
  (E4) token m sees token n  ⇔  n ≤ m and n is no padding,  or n = m
  (E5) three times:  x ← x + W_o Σ_n softmax_n( q_m · k_n / √d ) v_n  over what m sees,  x ← x + W_2 relu( W_1 LayerNorm(x) );
       q, k, v are linear in LayerNorm(x)
  (E6) â_i = tanh( W LayerNorm(x) )  from the token of s_i, which has seen R̂_i and s_i but not a_i
  (E7) L = Σ_i ‖â_i − a_i‖² / (A · number of steps),  over steps that are no padding
  (E8) learning rate of update n: lr · min( n / warm-up, 1 )
  (E9) acting: R̂_0 = target / scale;  after a reward r,  R̂ ← R̂ − r / scale

A window of K = 4 whose episode ends after two steps, and what the tokens of its last step see (E4); padding is never seen:

            padding     padding     step t        step t + 1
            R̂  s  a     R̂  s  a     R̂  s  a     R̂  s  a
      R̂     .  .  .     .  .  .     x  x  x     x  .  .
      s     .  .  .     .  .  .     x  x  x     x  x  .      <- predicts the action of t + 1
      a     .  .  .     .  .  .     x  x  x     x  x  x

Why a request is answered: in the data, the steps of good episodes carry large R̂, so "which action, given this R̂" separates
what good and bad episodes did. It is imitation with a label, so it can't stitch as values can, and beyond the best return in
the data a request is a guess; results/asked.py draws what is achieved against what is asked for.

Shapes: B windows, K = 20 steps, 3K tokens, D = 128 wide, H = 1 head, S observation, A action, E episodes. Observations have
mean 0 and std 1 over the data, actions lie in [-1, 1], returns are divided by `return_scale`; the actor converts from and to
raw units.

Differences from the official code (kzl/decision-transformer, gym), which we follow:
  D1 Only what is used: no heads that predict the next state and return, which get no loss there, and no word embedding.
     726,019 parameters for hopper in place of 727,695.
  D2 Padding is zeros; there, actions of -10 in training and 0 in evaluation. Being masked, it has no influence either way.
  D3 Evaluation plays all episodes in step, and needs no padding: a window grows from 1 to K steps, then slides.
  D4 Where no target is known, the best return in the data is asked for; and twice instead of half of it where returns are
     costs, below zero. The score is the first target's; the second is printed.
  D5 10 episodes per evaluation on the way; there, 100 for each target.
Of D4RL files without next observations the loader has left out the last step of an episode that met the time limit, and so
its reward is missing in (E1).

Run:     python algorithms/decision_transformer.py --env hopper-medium
Expect:  hopper-medium-replay (the data 15, BC 18): asked for 3,600 it scores 19.7, for 1,800 27.2; 11,000 updates with 1,000 of
         warm-up, 42 minutes on a core, seed 0. What it earns follows the request up to 870, below which 95% of the data's
         episodes are, and falls to 510 where 4,700 is asked for (results/asked.png). Its evaluations swung between 19 and 69.
         pendulum-medium-replay (the data −1148): −681 after 2,000 updates with --batch-size 16 --actor-lr 1e-3
         --warmup-steps 100 --dropout 0, seed 0.
"""
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import LEVELS, Dataset, Run, check, evaluate, load_dataset, record_on_cuda


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    seed: int = 0  # of networks, batches and evaluation episodes
    steps: int = 100_000  # gradient updates [C experiment.py]
    batch_size: int = 64  # windows per update [P][C experiment.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 10_000  # updates between evaluations, and between checkpoints [C experiment.py]
    eval_episodes: int = 10  # per evaluation [D5]
    final_episodes: int = 100  # behind the final score, and again for the second target [C experiment.py]
    out: str = "runs"  # folder for results
    resume: bool = False  # go on from the last checkpoint
    # optimisation
    actor_lr: float = 1e-4  # AdamW, after the warm-up (E8) [P][C experiment.py]
    warmup_steps: int = 10_000  # updates until then [C experiment.py]
    weight_decay: float = 1e-4  # AdamW, on every parameter [P][C experiment.py]
    clip_norm: float = 0.25  # of the gradient of all parameters together [P][C experiment.py]
    dropout: float = 0.1  # of tokens, attention weights and what both halves of (E5) add [P][C experiment.py]
    # DT
    target_return: float | None = None  # asked for in (E9), raw; hopper, ... have theirs in TUNED, others the data's best [D4]
    return_scale: float = 1000.0  # divides returns in (E1) and (E9) [C experiment.py]


TUNED = {f"{body}-{level}": dict(target_return=target) for level in LEVELS  # the larger of two [C experiment.py]
         for body, target in (("hopper", 3600.0), ("halfcheetah", 12000.0), ("walker2d", 5000.0))}
CONTEXT = 20  # K, steps in a window [P][C experiment.py]
WIDTH, LAYERS, HEADS = 128, 3, 1  # of the transformer [P][C experiment.py]
MAX_STEPS = 1000  # step numbers with an embedding of their own; later steps share the last one's [C experiment.py]

Window = namedtuple("Window", "obs action to_go step real")  # (B, K, S), (B, K, A), (B, K), (B, K) integers, (B, K) or bool


def parse_args() -> Args:
    """The command line; what it leaves open is TUNED's for this dataset, said aloud, or else the default of Args."""
    tuned = TUNED.get(tyro.cli(Args).env, {})
    args = tyro.cli(Args, default=Args(**tuned))  # a tuned value is but another default: what the user sets stands
    for name, value in tuned.items():
        if getattr(args, name) == value:
            print(f"tuned for {args.env}: --{name.replace('_', '-')} {value}")
    return args


# ---- the network


class Block(nn.Module):
    """One layer of the transformer: first every token looks at others, then each thinks by itself."""

    def __init__(self):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        for layer in (self.query_key_value, self.merge, self.widen, self.narrow):  # as GPT-2 [C trajectory_gpt2.py]
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, visible: Tensor, dropout: float) -> Tensor:
        """Tokens (B, 3K, D) -> (B, 3K, D)."""
        # (E5) what a token looks for (query), what it can be found by (key), what it then gives (value)
        parts = self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)  # (B, H, 3K, D / H)
        # scores (B, H, 3K, 3K), a softmax over what is visible, and the mean of the values with these weights
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        x = x + F.dropout(self.merge(found.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.narrow(F.relu(self.widen(self.norm_mlp(x)))), dropout)


class Actor(nn.Module):
    """The transformer. Its buffers hold the data's units and the return to ask for, so that a saved policy is complete.

    As it remembers, `act` is a Player: take it once per evaluation, `act = actor.act`, then call act(raw observations) at
    each step, and tell it what came of it with act.record, as common.evaluate does."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.embed_to_go, self.embed_obs = nn.Linear(1, WIDTH), nn.Linear(obs_dim, WIDTH)
        self.embed_action, self.embed_step = nn.Linear(action_dim, WIDTH), nn.Embedding(MAX_STEPS, WIDTH)
        self.norm_tokens, self.norm_final = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, action_dim)
        for name, dim in (("obs_mean", obs_dim), ("action_mid", action_dim)):
            self.register_buffer(name, torch.zeros(dim))
        for name, dim in (("obs_std", obs_dim), ("action_half", action_dim)):
            self.register_buffer(name, torch.ones(dim))
        self.register_buffer("target_return", torch.zeros((), dtype=torch.float64))
        self.register_buffer("return_scale", torch.ones((), dtype=torch.float64))

    def forward(self, window: Window, dropout: float = 0.0) -> Tensor:
        """The predicted actions (B, K, A) in [-1, 1]. Dropout is an argument: no mode to forget when it comes to acting."""
        # (E3) the step's number is that in the episode, not in the window: the same window later is another one
        step = self.embed_step(window.step)  # (B, K, D)
        tokens = torch.stack([self.embed_to_go(window.to_go.unsqueeze(-1)) + step, self.embed_obs(window.obs) + step,
                              self.embed_action(window.action) + step], dim=2)  # (B, K, 3, D), and flat: R̂ s a R̂ s a ...
        x = F.dropout(self.norm_tokens(tokens.flatten(1, 2)), dropout)  # (B, 3K, D)
        visible = visible_tokens(window.real)
        for block in self.blocks:
            x = block(x, visible, dropout)
        # (E6) every third token, from the second: those of the observations
        return torch.tanh(self.head(self.norm_final(x[:, 1::3])))

    @property
    def act(self) -> "Player":
        """A fresh memory, and the request that belongs to this policy."""
        return Player(self, self.target_return)


def visible_tokens(real: Tensor) -> Tensor:
    """(E4): which tokens n each token m may look at, (B, 1, 3K, 3K), the same for all heads, from the steps that are real."""
    real = real.repeat_interleave(3, dim=1)  # (B, 3K)
    past = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
    # (E4) causal and no padding: one without the other is a known mistake. And m = n, for the rows of padding: a softmax over
    # nothing is 0 / 0, which some kernels call NaN, and NaN times a mask of 0 is NaN still.
    return (past & real[:, None, :] | torch.eye(len(past), dtype=torch.bool, device=real.device)).unsqueeze(1)


# ---- the data, as sentences


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Bring the data's observations to mean 0 and std 1, in place; returns the mean and std + eps used, (S,) each."""
    obs, _, _, next_obs, _ = data.columns(data.packed)
    mean, std = obs.mean(dim=0), obs.std(dim=0, correction=0) + eps  # eps, for what hardly moves [C]
    for part in (obs, next_obs):
        part.sub_(mean).div_(std)
    return mean, std


def drop_fragment(data: Dataset) -> None:
    """Leave out a last episode that the data cut off: how well it would have gone on, nobody knows."""
    ends = (data.columns(data.packed).terminated.bool() | data.truncated).nonzero()
    check(len(ends), f"{data.name} has no complete episode, and so no returns to learn from")
    complete = int(ends.max()) + 1
    data.packed, data.truncated = data.packed[:complete], data.truncated[:complete]
    data.size.fill_(complete)


def write_sentences(data: Dataset, return_scale: float) -> tuple[Tensor, Tensor]:
    """The data's rows as [obs | action | return-to-go | step], (N, S + A + 2), and the row after each one's episode, (N,)."""
    starts, stops = data.episodes()
    seen = data.columns(data.packed)
    reward = seen.reward.double().cpu().numpy()
    # (E1) a sum from the back: rewards (1, 2, 3) are returns-to-go (6, 5, 3)
    to_go = np.concatenate([reward[a:b][::-1].cumsum()[::-1] for a, b in zip(starts, stops)]) / return_scale
    step = np.concatenate([np.arange(b - a) for a, b in zip(starts, stops)]).clip(max=MAX_STEPS - 1)
    more = torch.as_tensor(np.stack([to_go, step], axis=1)).to(seen.obs)
    stop = torch.as_tensor(np.repeat(stops, stops - starts), device=data.device)
    return torch.cat([seen.obs, seen.action, more], dim=1), stop


def sample_windows(rows: Tensor, stop: Tensor, batch_size: int, action_dim: int) -> Window:
    """(E2): B windows. Every row is a start with equal chance, so an episode counts by its length."""
    # (E2) for each window the numbers of its K rows, the last of them real; what lies before the first is padding
    first = (torch.rand(batch_size, device=rows.device) * len(rows)).long()
    length = (stop[first] - first).clamp(max=CONTEXT)  # (B,) real steps
    offset = torch.arange(CONTEXT, device=rows.device) - (CONTEXT - length).unsqueeze(1)  # (B, K): -2 -1 0 1 for length 2 of 4
    real = offset >= 0
    drawn = rows[first.unsqueeze(1) + offset.clamp(min=0)] * real.unsqueeze(-1)  # (B, K, S + A + 2), padding is zero [D2]
    obs, action, tail = drawn.split([rows.shape[1] - action_dim - 2, action_dim, 2], dim=-1)
    return Window(obs, action, tail[..., 0], tail[..., 1].long(), real)


# ---- learning


def action_loss(actor: Actor, window: Window, dropout: float) -> Tensor:
    """(E7): the squared error of the actions, averaged over real steps and action dimensions."""
    prediction = actor(window, dropout)
    assert prediction.shape == window.action.shape
    # (E7) divided by the steps that are real: a mean over all would shrink the loss of windows with padding
    error = (prediction - window.action).pow(2) * window.real.unsqueeze(-1)
    return error.sum() / (window.real.sum() * window.action.shape[-1])


def descend_clipped(loss: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """One gradient step, on a gradient no longer than `clip_norm`."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()


def update(args: Args, rows: Tensor, stop: Tensor, actor: Actor, optimizer) -> dict[str, Tensor]:
    """One step of DT."""
    window = sample_windows(rows, stop, args.batch_size, len(actor.action_mid))
    loss = action_loss(actor, window, args.dropout)
    descend_clipped(loss, optimizer, args.clip_norm)
    return {"action_loss": loss.detach()}


# ---- acting


class Player:
    """Plays E episodes in step, asks for the return `target` in each, and remembers the last K steps of each. It begins anew at
    the first call after all have ended; for one that ended before the others it goes on, unheard."""

    def __init__(self, actor: Actor, target):
        self.actor, self.target, self.alive = actor, target, set()

    def begin(self, obs: Tensor) -> None:
        """Empty memories of no steps yet, (E, 0, ·), and the whole request still to be met."""
        num, actor = len(obs), self.actor
        self.alive, self.time, self.still_asked = set(range(num)), 0, np.full(num, float(self.target))
        self.obs, self.action = obs.new_zeros(num, 0, obs.shape[1]), obs.new_zeros(num, 0, len(actor.action_mid))
        self.to_go = obs.new_zeros(num, 0)

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """Raw observations (E, S) of this moment to the environment's own actions (E, A)."""
        if not self.alive:
            self.begin(obs)
        actor = self.actor
        # the newest step enters without its action, which causality hides anyway, and the oldest of more than K leaves
        to_go = torch.as_tensor(self.still_asked, device=obs.device) / actor.return_scale  # (E,)
        self.obs = torch.cat([self.obs, ((obs - actor.obs_mean) / actor.obs_std).unsqueeze(1)], dim=1)[:, -CONTEXT:]
        self.to_go = torch.cat([self.to_go, to_go.to(obs).unsqueeze(1)], dim=1)[:, -CONTEXT:]
        self.action = F.pad(self.action, (0, 0, 0, 1))[:, -CONTEXT:]
        num, length = self.to_go.shape
        step = torch.arange(self.time + 1 - length, self.time + 1, device=obs.device).clamp(max=MAX_STEPS - 1).expand(num, -1)
        window = Window(self.obs, self.action, self.to_go, step, torch.ones_like(step, dtype=torch.bool))
        self.action[:, -1] = actor(window)[:, -1]
        self.time += 1
        return actor.action_mid + actor.action_half * self.action[:, -1]

    def record(self, i: int, obs, action, reward: float, next_obs, terminated: bool, truncated: bool) -> None:
        """What episode i got for its last action."""
        # (E9) what it got is asked for no longer; who does better than asked ends below 0, where the data have nothing
        self.still_asked[i] -= reward
        if terminated or truncated:
            self.alive.discard(i)


def train(args: Args) -> None:
    check(args.return_scale > 0, f"--return-scale must be above 0, not {args.return_scale}")
    check(args.warmup_steps > 0, f"--warmup-steps must be at least 1, not {args.warmup_steps}")
    check(0 <= args.dropout < 1, f"--dropout must be at least 0 and below 1, not {args.dropout}")
    data = load_dataset(args.env, args.device)
    run = Run(args, data)
    drop_fragment(data)
    best = data.returns().max()
    target = best if args.target_return is None else args.target_return
    print(f"asks for a return of {target:.1f}; the best in the data is {best:.1f}")
    actor = Actor(data.obs_dim, data.action_dim).to(data.device)
    actor.obs_mean, actor.obs_std = standardize_obs(data, eps=1e-6)  # [C experiment.py]
    actor.action_mid, actor.action_half = data.action_mid, data.action_half
    actor.target_return.fill_(target), actor.return_scale.fill_(args.return_scale)
    rows, stop = write_sentences(data, args.return_scale)

    rate = torch.tensor(args.actor_lr, device=data.device)  # a tensor: it changes
    optimizer = torch.optim.AdamW(actor.parameters(), lr=rate, weight_decay=args.weight_decay, fused=True,
                                  capturable=data.device.type == "cuda")
    start = run.resume(actor=actor, optimizer=optimizer)
    one_update = record_on_cuda(partial(update, args, rows, stop, actor, optimizer), data.device)
    for step in range(start + 1, args.steps + 1):
        # (E8)
        optimizer.param_groups[0]["lr"].fill_(args.actor_lr * min(step / args.warmup_steps, 1))
        metrics = one_update()
        run.step(step, metrics, actor.act)
    run.finish(actor)

    second = Player(actor, target / 2 if target > 0 else 2 * target)  # [D4]
    returns = evaluate(second, data.env_id, args.final_episodes, 10**6 * (args.seed + 1000), data.device, second.record)
    print(f"asked for {second.target:.1f}: return {returns.mean():.1f} ± {returns.std():.1f}")


if __name__ == "__main__":
    train(parse_args())
