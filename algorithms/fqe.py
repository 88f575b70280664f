"""Fitted Q evaluation (FQE): what is a policy worth, judged from data that another one recorded?

Le, Voloshin & Yue, "Batch Policy Learning under Constraints", ICML 2019, arXiv 1903.08738,
Algorithm 3; in the form of Fu et al., "Benchmarks for Deep Off-Policy Evaluation" (DOPE), ICLR
2021, arXiv 2103.16596, "FQE-L2".
Notes: references, Levine et al.'s survey, which calls this off-policy evaluation.

Sometimes a policy must be chosen before any may be run; then only the data can judge. FQE fixes a
policy and learns its Q from the data, as Q-learning does, but with the policy's own next action in
place of the best one. The value at the data's first observations is the estimate. Where the policy
leaves the data the estimate is a guess, and so is the order of policies that leave them far.

All P policies are judged at once, by P networks on the same batches. C stands for (1 − γ) Q, a mean
of rewards, which does not grow with the horizon. Rewards are first divided by their root mean
square, the scale; r_min and r_max are the smallest and the largest of the divided rewards.

  (E1) y_p = clip( (1 − γ) r + γ (1 − d) C̄_p(s′, π_p(s′)),  min(r_min, 0),  max(r_max, 0) )
  (E2) L = Σ_p E_D[ (C_p(s, a) − y_p)² ]
  (E3) each weight w ← w − 10⁻⁵ w, then a step of Adam on L
  (E4) C̄ ← C̄ + rate · (C − C̄)
  (E5) V̂_p = scale / (1 − γ) · mean of C̄_p(s₀, π_p(s₀)) over the first observations of episodes
  (E6) Spearman's ρ: the correlation of ranks, of V̂ with mean returns of rollouts
  (E7) regret: the best policy's mean return minus that of the policy with the largest V̂

Shapes: B batch, P policies, S observation, A action, N transitions, E episodes. d is terminated: a
truncated episode bootstraps. Observations have mean 0 and standard deviation 1 over the data for C,
and are raw for the policies; actions lie in [-1, 1]. V̂ is discounted and knows no time limit,
rollouts are not discounted and stop at one: compare ranks, not levels.

Differences from DOPE's code (google-research/policy_eval):
  D1 The bounds in (E1) include 0. There they are r_min and r_max: where every reward is positive,
     the target at an episode's end would be raised to r_min, as if r_min were paid for ever.
  D2 Rewards are divided by their root mean square; there by their standard deviation, after
     subtracting the mean where no episode terminates. Where all rewards are equal, that deviation
     is replaced by 10⁻⁵; ours is their size.
  D3 Stochastic policies are judged by their `act`, the mean or mode; DOPE's runs do so too.
  D4 No bootstrap over episodes, no copies with noise on the reward: both are off in DOPE's runs.
  D5 (E2) is in units of C; there in those of Q, 1 / (1 − γ)² as large. Adam's ε is scaled alike,
     and is added after the bias correction; Keras adds it before.
  D6 Batches are drawn with replacement, and the last step before a time limit is kept; there whole
     passes through the data, without that step.

Watch: the estimates, printed at the end and kept in result.json's curve, must have settled. One
that moves far more than the others, or is near a bound such as scale · r_max / (1 − γ), is of a
policy that has left the data.
With --holdout 0.1, as in training, policies are judged on episodes that training has not seen.

Run:     python algorithms/fqe.py --env hopper-medium --policies runs/*/hopper-medium/seed0
Expect:  it finds policies that fall at once, with exceptions; the order of the better ones is not
         reliable, and changes with the number of updates. Where γ = 0.99 hides what comes late, a
         larger γ with faster targets ordered all but one better. Rankings: results/README.md.
"""
import copy
import json
import math
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import (
    Batch,
    Dataset,
    check_range,
    env_id,
    evaluate,
    fail,
    load_dataset,
    load_policy,
    notice,
    record_on_cuda,
    run_folder,
    split_episodes,
    take_folder,
    use_threads,
    write_json,
)

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id, or path of a .hdf5 or .npz file
    policies: tuple[str, ...] = ()  # policy.pt files, or folders to search for them [=]
    seed: int = 0  # of networks and batches
    steps: int = 1_000_000  # gradient updates [C train_eval.py]
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # of the CPU; 0: one for light updates, up to four for heavy ones
    eval_every: int = 5_000  # updates between estimates, each of which is written down [=]
    final_episodes: int = 100  # rollouts of a policy that has no result.json beside it [=]
    eval_env: str = "auto"  # auto: as recorded; none: no rollouts; or a Gymnasium id
    holdout: float = 0.0  # share of episodes left out of training: judges on these alone; 0: on all
    out: str = "runs"  # folder for results
    # optimisation
    batch_size: int = 256  # transitions per update [C train_eval.py]
    critic_lr: float = 3e-4  # Adam [C train_eval.py]
    weight_decay: float = 1e-5  # in (E3), not multiplied by the learning rate [C train_eval.py]
    target_rate: float = 0.005  # share of the new weights in (E4) [C q_fitter.py]
    # FQE
    gamma: float = 0.99  # discount γ, of the estimate too [C train_eval.py]


HIDDEN = (256, 256)  # widths of C [C q_fitter.py]
ADAM_EPS = 1e-7  # Keras' default [C q_fitter.py]


class EnsembleLinear(nn.Module):
    """K linear layers as one batched product: (K, B, in) -> (K, B, out)."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(num, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class PolicyCritic(nn.Module):
    """C, a network for each policy: (B, S), (P, B, A) -> (P, B)."""

    def __init__(self, obs_dim: int, action_dim: int, num: int):
        super().__init__()
        widths = (obs_dim + action_dim, *HIDDEN, 1)
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            self.layers.append(EnsembleLinear(num, inputs, outputs))
        for layer in self.layers:
            nn.init.zeros_(layer.bias)  # [C keras_utils.py]
        self.layers[-1].weight.data.mul_(math.sqrt(0.03))  # C starts near 0 [C keras_utils.py]

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs.expand(len(action), -1, -1), action], dim=-1)  # (P, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


# ---- the policies


def find_policies(given: tuple[str, ...]) -> list[Path]:
    """The policy.pt files named, and those in the folders named."""
    paths = []
    for path in [Path(each).expanduser() for each in given]:
        paths += sorted(path.rglob("policy.pt")) if path.is_dir() else [path]
    if not given:
        fail("--policies: give policy.pt files, or folders that hold some")
    if not paths:
        fail(f"--policies: there is no policy.pt in {', '.join(given)}")
    return paths


def load_policies(paths: list[Path], data: Dataset, full: Dataset | None = None,
                  holdout: float = 0.0) -> dict:
    """{path: act} of the policies; those that the data can't judge are left out, by name.

    `full` are the data before the split: a policy that was trained on others of this name is named.
    """
    acts = {}
    training = {}  # share held out: fingerprint of the other episodes
    for path in paths:
        act = load_policy(path, data.device)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        reason = misfit(act, saved["env_spec"], data)
        if reason is None and np.prod(saved["init"][0]) != data.obs_dim:  # (B, 1) would broadcast
            reason = f"is for other observations or actions than those of {data.name}"
        if reason:
            notice(f"left out: {path} {reason}")
        else:
            acts[path] = act
        with suppress(OSError, ValueError, KeyError):  # there is no such file
            settings = json.loads(path.with_name("settings.json").read_text())
            trained = settings["holdout"]
            if full is not None and trained >= holdout > 0:
                if trained not in training:
                    rest = copy.copy(full)
                    split_episodes(rest, trained, held_out=False)
                    training[trained] = rest.describe()["fingerprint"]
                if training[trained] != settings["data"]:
                    notice(f"{path} was trained on other data of the name {data.name}; it may "
                           "have seen these episodes")
            if trained < holdout:
                notice(f"{path} was trained with --holdout {trained} and has seen these episodes")
    if not acts:
        fail("--policies: no policy is left")
    return acts


def misfit(act, own_spec: str | None, data: Dataset) -> str | None:
    """Why the data can't judge a policy; None where they can."""
    env = env_id(data.env_spec) if data.env_spec else data.recorded_env
    if own_spec and env and env_id(own_spec) != env:
        return f"is for {env_id(own_spec)}, {data.name} is of {env}"
    if hasattr(act, "start"):
        return "has a memory, its action is no function of the observation"
    try:
        shape = act(data.obs[:2]).shape
    except (RuntimeError, ValueError, IndexError):  # the observations have other sizes
        shape = None
    if shape != data.action[:2].shape:
        return f"is for other observations or actions than those of {data.name}"
    return None


def rollout_return(path: Path, act, data: Dataset, args: Args) -> float:
    """The mean return: from the policy's own run, if that is beside it; otherwise it plays."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
        record = path.with_name("result.json")
        if record.stat().st_mtime < path.stat().st_mtime:
            raise ValueError("the record of an earlier policy")
        result = json.loads(record.read_text())
        returns = np.array(result["final_returns"], float)
        if returns.ndim == 1 and len(returns) and np.isfinite(returns).all():
            return float(returns.mean())
    seed = 10**6 * (args.seed + 1000)
    try:
        returns = evaluate(act, data.env_spec, args.final_episodes, seed, data.device)
    except KeyboardInterrupt:
        fail("stopped in the rollouts; --eval-env none judges without them")
    except (Exception, SystemExit) as error:  # whatever an environment may raise
        fail(f"the rollouts of {path} in {env_id(data.env_spec)} failed ({type(error).__name__}: "
             f"{error}); --eval-env none judges without rollouts")
    return float(returns.mean())


def policy_actions(acts: list, obs: Tensor, data: Dataset) -> Tensor:
    """π_p(s) of raw observations (N, S), in [-1, 1]: (N, P, A). Once, as policies are fixed."""
    chunks = tqdm(obs.split(300), desc="the policies' actions", leave=False,  # some sample 100
                  mininterval=0.2 if sys.stderr.isatty() else 30)
    try:
        actions = torch.cat([torch.stack([act(part) for act in acts], dim=1) for part in chunks])
    except KeyboardInterrupt:
        fail("stopped before the first estimate")
    return ((actions - data.action_mid) / data.action_half).clamp(-1, 1)


# ---- the data


def load_data(args: Args) -> tuple[Dataset, Dataset]:
    """All episodes, and those to judge on."""
    full = load_dataset(args.env, args.device, eval_env=args.eval_env)
    data = copy.copy(full)
    if args.holdout:
        split_episodes(data, args.holdout, held_out=True)
    return full, data


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Brings the data's observations to mean 0 and standard deviation 1, in place.

    Returns the mean and the deviation + eps that were used, (S,) each.
    """
    mean = data.obs.mean(dim=0)
    std = data.obs.std(dim=0, correction=0) + eps  # eps: for what hardly moves
    data.obs = (data.obs - mean) / std
    data.next_obs = (data.next_obs - mean) / std
    return mean, std


def scale_by_rms(data: Dataset) -> Tensor:
    """Divides the data's rewards by their root mean square, and returns it. [D2]"""
    scale = data.reward.pow(2).mean().sqrt().clamp(min=1e-8)
    data.reward = data.reward / scale
    return scale


# ---- learning


@torch.no_grad()
def td_target(critic_target: PolicyCritic, batch: Batch, next_action: Tensor, bounds: Tensor,
              gamma: float) -> Tensor:
    """(E1): the regression targets y, (P, B), from each policy's action at s′, not at s."""
    next_c = critic_target(batch.next_obs, next_action)
    # (E1) the bounds are those of a mean of rewards, before and after an episode's end
    y = (1 - gamma) * batch.reward + gamma * (1 - batch.terminated) * next_c
    return y.clamp(bounds[0], bounds[1])


def critic_loss(critic: PolicyCritic, batch: Batch, y: Tensor) -> Tensor:
    """(E2): every network sees the data's action."""
    c = critic(batch.obs, batch.action.expand(len(y), -1, -1))
    assert y.shape == c.shape, "other shapes would broadcast"
    # (E2)
    return (c - y).pow(2).mean(dim=1).sum()


def make_optimizer(critic: PolicyCritic, args: Args) -> torch.optim.Optimizer:
    """AdamW as TensorFlow Addons has it."""
    # (E3) PyTorch's AdamW multiplies the decay by the learning rate, which is taken out here
    decay = args.weight_decay / args.critic_lr
    eps = ADAM_EPS * (1 - args.gamma) ** 2  # [D5]
    on_cuda = next(critic.parameters()).is_cuda
    return torch.optim.AdamW(critic.parameters(), lr=args.critic_lr, eps=eps, weight_decay=decay,
                             fused=True, capturable=on_cuda)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; no others get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E4) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def update(args: Args, data: Dataset, next_actions: Tensor, bounds: Tensor, critic: PolicyCritic,
           critic_target: PolicyCritic, optimizer) -> Tensor:
    """One step of FQE, for all policies. `next_actions` are π_p(s′) for all rows, (N, P, A)."""
    index = data.draw_rows(args.batch_size)
    batch = data.rows(index)
    next_action = next_actions.index_select(0, index).transpose(0, 1)  # (P, B, A)

    y = td_target(critic_target, batch, next_action, bounds, args.gamma)
    loss = critic_loss(critic, batch, y)
    descend(loss, optimizer)
    # (E4)
    polyak_update(critic_target, critic, args.target_rate)
    return loss.detach()


# ---- the estimates


@torch.no_grad()
def estimate_values(critic_target: PolicyCritic, obs: Tensor, action: Tensor, scale: Tensor,
                    gamma: float) -> Tensor:
    """(E5): from first observations (E, S) and the policies' actions there (P, E, A), (P,)."""
    # (E5) in units of reward, a sum in place of a mean
    return scale / (1 - gamma) * critic_target(obs, action).mean(dim=1)


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """(E6); None where there are fewer than two policies, or all values of x or y are equal."""
    # (E6) a rank is the number of smaller values; equal values share theirs
    ranks = []
    for values in (x, y):
        ranks.append([np.sum(values < v) + np.sum(values == v) / 2 for v in values])
    if min(np.std(ranks[0]), np.std(ranks[1])) == 0:
        return None
    return float(np.corrcoef(ranks)[0, 1])


def compare(values: np.ndarray, returns: list[float] | None) -> dict:
    """Estimates, their rank correlation with the returns, and the regret; None without returns."""
    if returns is None:
        return {"estimates": values.tolist(), "spearman": None, "regret": None}
    # (E7) what taking the policy with the largest estimate costs
    regret = max(returns) - returns[int(values.argmax())]
    correlation = spearman(values, np.array(returns))
    return {"estimates": values.tolist(), "spearman": correlation, "regret": regret}


def show(result: dict, folder: Path) -> None:
    """The policies by their estimates, the best first."""
    for one in sorted(result["policies"], key=lambda one: -one["estimate"]):
        rollouts = "none" if one["return_mean"] is None else f"{one['return_mean']:.1f}"
        print(f"estimate {one['estimate']:10.1f}   rollouts {rollouts:>10}   {one['policy']}")
    correlation = result["spearman"]
    shown = "undefined" if correlation is None else f"{correlation:.2f}"
    if result["regret"] is not None:
        print(f"Spearman's correlation {shown}, regret {result['regret']:.1f}")
    print(folder / "result.json")


def train(args: Args) -> None:
    check_range(args, "steps eval_every final_episodes", 1)
    check_range(args, "batch_size", 1, 2**20)
    check_range(args, "seed threads weight_decay", 0, 2**31 - 1)
    check_range(args, "target_rate", 0, 1)
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must be at least 0 and below 1, not {args.gamma}")
    if not args.critic_lr > 0:
        fail(f"--critic-lr must be above 0, not {args.critic_lr}")
    paths = find_policies(args.policies)
    full, data = load_data(args)
    policies = load_policies(paths, data, full, args.holdout)
    acts = list(policies.values())
    use_threads(args.threads, gflop=0.14 * len(acts))
    returns = None
    if data.env_spec:
        returns = [rollout_return(path, act, data, args) for path, act in policies.items()]
    dataset = data.describe()
    torch.manual_seed(args.seed)
    folder = run_folder(args, "fqe")
    lock = take_folder(folder)

    first = torch.as_tensor(data.episodes()[0], device=data.device)  # (E,) row numbers
    next_actions = policy_actions(acts, data.next_obs, data)  # (N, P, A)
    first_action = policy_actions(acts, data.obs[first], data).transpose(0, 1)  # (P, E, A)
    standardize_obs(data, eps=1e-5)  # [C dataset.py], there the least deviation
    first_obs = data.obs[first]
    scale = scale_by_rms(data)
    bounds = torch.stack([data.reward.min().clamp(max=0), data.reward.max().clamp(min=0)])  # [D1]

    critic = PolicyCritic(data.obs_dim, data.action_dim, len(acts)).to(data.device)
    critic_target = copy.deepcopy(critic)
    optimizer = make_optimizer(critic, args)
    one_update = record_on_cuda(partial(update, args, data, next_actions, bounds, critic,
                                        critic_target, optimizer), data.device)
    curve = []
    bar = tqdm(range(1, args.steps + 1), unit=" updates", leave=False,
               mininterval=0.2 if sys.stderr.isatty() else 30)
    try:
        for step in bar:
            loss = one_update()
            if step % args.eval_every and step != args.steps:
                continue
            values = estimate_values(critic_target, first_obs, first_action, scale, args.gamma)
            if not (loss.isfinite() and values.isfinite().all()):
                fail(f"by step {step:,} the loss is {float(loss)}, the estimates are "
                     f"{values.tolist()}; those until then, if any, are in {folder}")
            estimates = compare(values.cpu().numpy(), returns)
            curve.append({"step": step, "loss": float(loss)} | estimates)
            judged = [{"policy": str(path), "estimate": estimates["estimates"][i],
                       "return_mean": returns[i] if returns else None}
                      for i, path in enumerate(policies)]
            result = {"algorithm": "fqe", "env": args.env, "seed": args.seed, "steps": step,
                      "args": asdict(args), "dataset": dataset, "env_id": env_id(data.env_spec),
                      "policies": judged, "spearman": estimates["spearman"],
                      "regret": estimates["regret"], "curve": curve}
            write_json(folder / "result.json", result)
    except KeyboardInterrupt:
        fail(f"stopped; the estimates so far, if any, are in {folder}")
    show(result, folder)
    lock.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    train(tyro.cli(Args))
