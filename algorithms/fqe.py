"""Fitted Q evaluation, FQE: what is a policy worth, judged from data that another one made?

Le, Voloshin & Yue, "Batch Policy Learning under Constraints", ICML 2019, arXiv 1903.08738 (its Algorithm 3); in the form of
Fu et al., "Benchmarks for Deep Off-Policy Evaluation", DOPE, ICLR 2021, arXiv 2103.16596, "FQE-L2".
Notes: references (Levine et al.'s survey, which calls it off-policy evaluation).

If you may not run your policies, you can't choose among them by running them. FQE fixes a policy and learns its Q from the
data as Q-learning does, with the policy's own next action in place of the best one: no maximum, no importance weights. The
value at the data's first observations is the estimate. It inherits what is wrong with any Q where the policy leaves the data,
so the order of several policies is worth more than the numbers; here the order is compared with what rollouts gave.

All P policies are judged at once, by P networks on the same batches. C stands for (1 − γ) Q, a mean of rewards, which does not
grow with the horizon. Rewards are divided by their root mean square beforehand.

  (E1) y_p = clip( (1 − γ) r + γ (1 − d) C̄_p(s′, π_p(s′)),  min(r_min, 0),  max(r_max, 0) )
  (E2) L = Σ_p E_D[ (C_p(s, a) − y_p)² ]
  (E3) C̄ ← C̄ + rate · (C − C̄)
  (E4) V̂_p = scale / (1 − γ) · mean of C̄_p(s₀, π_p(s₀)) over the first observations of the data's episodes
  (E5) Spearman's ρ: the correlation of ranks, of V̂ with mean returns of rollouts
  (E6) regret: the best policy's mean return less that of the one with the largest V̂

Shapes: B batch, P policies, S observation, A action, N transitions, E episodes. d is terminated: a truncated episode
bootstraps. Observations have mean 0 and std 1 over the data for C, and are raw for the policies; actions lie in [-1, 1].

Differences from DOPE's code (google-research/policy_eval, q_fitter.py), which we follow:
  D1 The bounds in (E1) include 0. There they are r_min and r_max: where every reward is positive, an episode's end would be
     lifted to r_min for ever, and policies that fall early would look good.
  D2 Rewards are divided by their root mean square; there by their standard deviation, after subtracting the mean where no
     episode terminates. Ours is defined for a constant reward too.
  D3 Stochastic policies are judged as their `act` has them, by their mean or mode; DOPE's runs do so too.
  D4 No bootstrap over episodes, and no copies with noise on the reward: both are off in DOPE's runs.
  D5 (E2) is in units of C; there it is in those of Q, 1 / (1 − γ)² as large. Adam does not mind a factor.
V̂ is discounted and knows no time limit, rollouts are not discounted and stop at one: compare ranks, not levels.

Run:     python algorithms/fqe.py --env hopper-medium --policies runs/*/hopper-medium/seed0/policy.pt
Expect:  of 18 policies of these files on hopper-medium, after 40,000 updates, the wrong order: Spearman −0.43, regret 2932, all
         there is to lose (results/ranking.png; 40 minutes on a core). The five highest estimates, up to the bound of (E1), are
         those of the five policies furthest from the data, 0.4 to 0.9 (root mean square of actions) where the others are at
         most 0.25 away; they are among the six worst. Of the other 13, ρ is 0.45. Such a ranking is for policies near the data.
         Of six policies on pendulum-medium-replay it found the true order (Spearman 1.0, seeds 0 and 1) with --steps 1000
         --gamma 0.95 --critic-lr 1e-3 --target-rate 0.1; of nine, with γ 0.99 and 1,500 steps, not (0.73, 0.20).
"""
import copy
import importlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lets this file find common.py
from common import Batch, Dataset, check, evaluate, load_dataset, record_on_cuda, write_atomically


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # suite dataset, Minari id or path of a D4RL .hdf5 file
    policies: tuple[str, ...] = ()  # policy.pt files, or folders to search for them [=]
    seed: int = 0  # of networks and batches
    steps: int = 1_000_000  # gradient updates [C train_eval.py]
    batch_size: int = 256  # transitions per update [C train_eval.py]
    device: str = "auto"  # auto, cpu or cuda
    eval_every: int = 5_000  # updates between estimates, each of which is written down [=]
    final_episodes: int = 100  # rollouts of a policy that has no result.json beside it [=]
    out: str = "runs"  # folder for results
    # optimisation
    critic_lr: float = 3e-4  # AdamW [C q_fitter.py]
    weight_decay: float = 1e-5  # AdamW [C q_fitter.py]
    target_rate: float = 0.005  # share of the new weights in (E3) [C q_fitter.py]
    # FQE
    gamma: float = 0.99  # discount γ, of the estimate too [C train_eval.py]


HIDDEN = (256, 256)  # widths of C [C q_fitter.py]


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
        self.layers = nn.ModuleList(EnsembleLinear(num, i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs.expand(len(action), -1, -1), action], dim=-1)  # (P, B, S + A)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(-1)


def load_policy(path: Path, data: Dataset) -> nn.Module:
    """The actor of a policy.pt. Its class stands in the file that trained it, so this file alone imports others."""
    try:
        saved = torch.load(path, map_location=data.device, weights_only=True)
        module = importlib.import_module(saved["algorithm"].split("-")[0])  # sac-online is of sac.py, bc-top10 of bc.py
        check(saved["env_id"] == data.env_id, f"{path} is a policy for {saved['env_id']}, {data.name} is of {data.env_id}")
        actor = module.Actor(saved["obs_dim"], saved["action_dim"])
        actor.load_state_dict(saved["actor"])
    except Exception as error:  # no file, another kind of file, an algorithm whose file is not here
        check(False, f"can't load the policy {path}: {type(error).__name__}, {error}")
    return actor.to(data.device)


def rollout_returns(path: Path, actor: nn.Module, data: Dataset, args: Args) -> list[float]:
    """From the policy's own run, if that is beside it; else it plays."""
    if (record := path.with_name("result.json")).exists():
        return json.loads(record.read_text())["final_returns"]
    return evaluate(actor.act, data.env_id, args.final_episodes, 10**6 * (args.seed + 1000), data.device).tolist()


def policy_actions(actors: list[nn.Module], obs: Tensor, data: Dataset) -> Tensor:
    """π_p(s) of raw observations (N, S), in [-1, 1]: (N, P, A). Once for all, as the policies don't change any more."""
    chunks = tqdm(obs.split(300), desc="the policies' actions", leave=False,  # small, as some methods sample 100 per action
                  mininterval=0.2 if sys.stderr.isatty() else 30)
    actions = torch.cat([torch.stack([actor.act(chunk) for actor in actors], dim=1) for chunk in chunks])
    return ((actions - data.action_mid) / data.action_half).clamp(-1, 1)


def standardize_obs(data: Dataset, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Bring the data's observations to mean 0 and std 1, in place; returns the mean and std + eps used, (S,) each."""
    obs, _, _, next_obs, _ = data.columns(data.packed)
    mean, std = obs.mean(dim=0), obs.std(dim=0, correction=0) + eps  # eps, for what hardly moves [C]
    for part in (obs, next_obs):
        part.sub_(mean).div_(std)
    return mean, std


def scale_by_rms(data: Dataset) -> Tensor:
    """Divide the data's rewards by their root mean square, in place; returns it. [D2]"""
    reward = data.columns(data.packed).reward
    scale = reward.pow(2).mean().sqrt().clamp(min=1e-8)
    reward.div_(scale)
    return scale


@torch.no_grad()
def td_target(critic_target: PolicyCritic, batch: Batch, next_action: Tensor, bounds: Tensor, gamma: float) -> Tensor:
    """(E1): the regression targets y, (P, B), from each policy's action at s′, not at s."""
    next_c = critic_target(batch.next_obs, next_action)
    # (E1)
    return ((1 - gamma) * batch.reward + gamma * (1 - batch.terminated) * next_c).clamp(bounds[0], bounds[1])


def critic_loss(critic: PolicyCritic, batch: Batch, y: Tensor) -> Tensor:
    """(E2): every network sees the data's action."""
    c = critic(batch.obs, batch.action.expand(len(y), -1, -1))
    assert y.shape == c.shape, "other shapes would broadcast"
    # (E2)
    return (c - y).pow(2).mean(dim=1).sum()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step on the optimizer's own parameters; for no others is a gradient computed."""
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, rate: float) -> None:
    """(E3) target ← target + rate · (online − target), for all parameters at once."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


@torch.no_grad()
def estimate_values(critic_target: PolicyCritic, obs: Tensor, action: Tensor, scale: Tensor, gamma: float) -> Tensor:
    """(E4): from first observations (E, S) and the policies' actions there (P, E, A), in units of reward, (P,)."""
    # (E4)
    return scale / (1 - gamma) * critic_target(obs, action).mean(dim=1)


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """(E5); None where there are fewer than two policies, or nothing that tells them apart."""
    # (E5) a rank is the number of smaller values, equal ones share theirs
    ranks = [[np.sum(z < value) + np.sum(z == value) / 2 for value in z] for z in (x, y)]
    return float(np.corrcoef(ranks)[0, 1]) if min(map(np.std, ranks)) > 0 else None


def update(args: Args, data: Dataset, rows: Tensor, bounds: Tensor, critic: PolicyCritic, critic_target: PolicyCritic,
           optimizer) -> Tensor:
    """One step of FQE, for all policies."""
    drawn = rows[(torch.rand(args.batch_size, device=rows.device) * len(rows)).long()]  # as Dataset.sample, with π_p(s′)
    batch = data.columns(drawn[:, :data.packed.shape[1]])
    next_action = drawn[:, data.packed.shape[1]:].unflatten(1, (-1, data.action_dim)).transpose(0, 1)  # (P, B, A)

    y = td_target(critic_target, batch, next_action, bounds, args.gamma)
    loss = critic_loss(critic, batch, y)
    descend(loss, optimizer)
    # (E3)
    polyak_update(critic_target, critic, args.target_rate)
    return loss.detach()


def train(args: Args) -> None:
    check(args.policies, "--policies: give policy.pt files, or folders that hold some")
    check(0 <= args.gamma < 1, f"--gamma must be at least 0 and below 1, not {args.gamma}")
    for name in ("steps", "batch_size", "eval_every", "final_episodes"):
        check(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    paths = [path for given in map(Path, args.policies)
             for path in (sorted(given.rglob("policy.pt")) if given.is_dir() else [given])]
    check(paths, f"--policies: there is no policy.pt in {', '.join(args.policies)}")
    data = load_dataset(args.env, args.device)
    actors = {path: load_policy(path, data) for path in paths}
    for path in [path for path, actor in actors.items() if hasattr(actor.act, "record")]:
        print(f"left out: {path} has a memory, its action is no function of the observation")
        del actors[path]
    check(actors, "--policies: no policy is left")
    paths, actors = list(actors), list(actors.values())
    returns = [float(np.mean(rollout_returns(path, actor, data, args))) for path, actor in zip(paths, actors)]
    torch.manual_seed(args.seed)
    folder = Path(args.out) / "fqe" / args.env.removesuffix(".hdf5").replace("/", "_") / f"seed{args.seed}"
    if folder.exists():  # an earlier run of this name is kept
        folder.rename(f"{folder}.{time.strftime('%Y%m%d-%H%M%S')}")

    raw, first = data.columns(data.packed), torch.as_tensor(data.episodes()[0], device=data.device)
    rows = policy_actions(actors, raw.next_obs, data).flatten(1)  # (N, P A)
    first_action = policy_actions(actors, raw.obs[first], data).transpose(0, 1)  # (P, E, A)
    standardize_obs(data)
    scale = scale_by_rms(data)
    seen = data.columns(data.packed)
    bounds = torch.stack([seen.reward.min().clamp(max=0), seen.reward.max().clamp(min=0)])  # [D1]
    rows, first_obs = torch.cat([data.packed, rows], dim=1), seen.obs[first]

    critic = PolicyCritic(data.obs_dim, data.action_dim, len(actors)).to(data.device)
    critic_target = copy.deepcopy(critic)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=args.critic_lr, weight_decay=args.weight_decay, fused=True,
                                  capturable=data.device.type == "cuda")
    one_update = record_on_cuda(partial(update, args, data, rows, bounds, critic, critic_target, optimizer), data.device)
    curve, steps = [], range(1, args.steps + 1)
    try:
        for step in tqdm(steps, unit=" updates", leave=False, mininterval=0.2 if sys.stderr.isatty() else 30):
            loss = one_update()
            if step % args.eval_every and step != args.steps:
                continue
            check(loss.isfinite(), f"the loss is {float(loss)} by step {step:,}; estimates until then, if any, are in {folder}")
            values = estimate_values(critic_target, first_obs, first_action, scale, args.gamma).cpu().numpy()
            correlation = spearman(values, np.array(returns))
            # (E6)
            regret = max(returns) - returns[int(values.argmax())]
            curve.append(dict(step=step, loss=float(loss), estimates=values.tolist(), spearman=correlation, regret=regret))
            judged = [dict(policy=str(path), estimate=float(value), return_mean=mean)
                      for path, value, mean in zip(paths, values, returns)]
            result = dict(algorithm="fqe", env=args.env, seed=args.seed, steps=step, args=asdict(args), policies=judged,
                          spearman=correlation, regret=regret, curve=curve)
            write_atomically(folder / "result.json", lambda part: part.write_text(json.dumps(result, indent=1)))
    except KeyboardInterrupt:
        check(False, f"stopped; the estimates so far, if any, are in {folder}")
    for one in sorted(judged, key=lambda one: -one["estimate"]):
        print(f"estimate {one['estimate']:10.1f}   rollouts {one['return_mean']:10.1f}   {one['policy']}")
    shown = "undefined" if correlation is None else f"{correlation:.2f}"
    print(f"Spearman's correlation {shown}, regret {regret:.1f}; {folder / 'result.json'}")


if __name__ == "__main__":
    train(tyro.cli(Args))
