"""Fitted Q evaluation against slow loops, exact values of a small chain, and the policies it must
refuse."""
import copy
import json
import os

import common

import bc
import decision_transformer
import fqe
import gymnasium as gym
import numpy as np
import pytest
import sac
import torch
from fqe import Args, PolicyCritic
from helpers import assert_close, flat, make, slow_critic, step_by_hand, tiny_batch, tiny_data


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers for C; policies without any, so that their weights say what they
    do."""
    monkeypatch.setattr(fqe, "HIDDEN", (7, 6))
    monkeypatch.setattr(bc, "HIDDEN", ())
    monkeypatch.setattr(sac, "HIDDEN", ())


WIDE = torch.tensor([-1e9, 1e9])  # bounds that bind nothing


# ---- each function against a loop over samples


def test_td_target_equals_a_loop():
    """(E1): for each of three policies its own network at s′ and its own action there; reward alone
    at the end; clipped."""
    critic, batch, action = make(PolicyCritic, 3, 2, 3), tiny_batch(), 2 * torch.rand(3, 4, 2) - 1
    expected = [
        [
            0.1 * float(batch.reward[b])
            + (
                0.0
                if b == 1
                else 0.9 * slow_critic(critic, p, batch.next_obs[b], action[p, b].tolist())
            )
            for b in range(4)
        ]
        for p in range(3)
    ]
    y = fqe.td_target(critic, batch, action, WIDE, 0.9)
    assert_close(y, expected)
    assert not y.requires_grad
    low, high = y.flatten().sort().values[[3, 9]]
    assert_close(
        fqe.td_target(critic, batch, action, torch.stack([low, high]), 0.9), y.clamp(low, high)
    )


def test_critic_loss_equals_a_loop():
    """(E2): the data's action in every network; a mean over transitions, a sum over policies."""
    critic, batch, y = make(PolicyCritic, 3, 2, 3), tiny_batch(), torch.randn(3, 4)
    c = [
        [slow_critic(critic, p, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for p in range(3)
    ]
    expected = sum((c[p][b] - float(y[p, b])) ** 2 / 4 for p in range(3) for b in range(4))
    assert_close(fqe.critic_loss(critic, batch, y), expected)
    with pytest.raises(AssertionError):
        fqe.critic_loss(critic, batch, y[..., None])


def test_estimate_equals_a_loop():
    """(E5): the mean over first observations, in the rewards' units, and a sum of rewards in place
    of their mean."""
    critic, obs, action = make(PolicyCritic, 3, 2, 2), torch.randn(5, 3), torch.randn(2, 5, 2)
    expected = [
        7 / 0.1 * sum(slow_critic(critic, p, obs[e], action[p, e].tolist()) for e in range(5)) / 5
        for p in range(2)
    ]
    assert_close(fqe.estimate_values(critic, obs, action, torch.tensor(7.0), 0.9), expected)


def test_update_is_one_step_for_all_policies():
    """A batch with each policy's action at s′, a step of C, then (E4); twice."""
    data, args = tiny_data(), Args(batch_size=5, gamma=0.9, target_rate=0.3)
    actions = 2 * torch.rand(12, 3, 2) - 1  # of three policies
    critic, target = make(PolicyCritic, 3, 2, 3), make(PolicyCritic, 3, 2, 3)
    by_hand, by_hand_target = copy.deepcopy(critic), copy.deepcopy(target)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
    for seed in range(2):
        torch.manual_seed(seed)
        loss = fqe.update(args, data, actions, WIDE, critic, target, optimizer)

        torch.manual_seed(seed)
        drawn = torch.randint(12, (5,))
        batch = data.rows(drawn)
        y = fqe.td_target(
            by_hand_target, batch, torch.stack([actions[drawn, p] for p in range(3)]), WIDE, 0.9
        )
        want = fqe.critic_loss(by_hand, batch, y)
        step_by_hand(want, list(by_hand.parameters()), 0.05)
        for t, o in zip(by_hand_target.parameters(), by_hand.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        assert_close(loss, want, 1e-12)
        (
            assert_close(flat(critic), flat(by_hand), 1e-12),
            assert_close(flat(target), flat(by_hand_target), 1e-12),
        )
    assert all(p.grad is None for p in target.parameters())


def test_weight_decay_is_not_multiplied_by_the_learning_rate():
    """As TensorFlow Addons' AdamW: w ← w − decay · w, and then PyTorch's step of Adam; two
    steps, one number at a time."""
    critic, args = make(PolicyCritic, 3, 2, 1), Args(critic_lr=0.01, weight_decay=0.2, gamma=0.9)
    weight = critic.layers[0].weight
    optimizer = fqe.make_optimizer(critic, args)
    w, first, second = float(weight[0, 0, 0].detach()), 0.0, 0.0
    for step, gradient in enumerate((0.3, -2.0), 1):
        optimizer.zero_grad()
        for parameter in critic.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**step), second / (1 - 0.999**step)
        w = w - 0.2 * w - 0.01 * corrected[0] / (corrected[1] ** 0.5 + 1e-9)
        assert_close(weight[0, 0, 0], w)


def test_decay_alone_shrinks_every_weight():
    critic, args = make(PolicyCritic, 3, 2, 2), Args(critic_lr=3e-4, weight_decay=1e-5)
    for layer in critic.layers:
        torch.nn.init.normal_(layer.bias)
    before, optimizer = flat(critic), fqe.make_optimizer(critic, args)
    for parameter in critic.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_close(flat(critic) / before, torch.full_like(before, 1 - 1e-5), 1e-12)


def test_networks_start_as_the_source_does(monkeypatch):
    """Biases 0; kernels uniform with variance 0.333 / fan-in, the last one 0.01 / fan-in."""
    monkeypatch.setattr(fqe, "HIDDEN", (256, 256))
    critic = PolicyCritic(11, 3, 40)
    for layer, scale in zip(critic.layers, (0.333, 0.333, 0.01)):
        assert not layer.bias.any()
        fan_in = layer.weight.shape[1]
        assert_close(layer.weight.var() * fan_in / scale, 1.0, 0.03)
        assert layer.weight.abs().max() <= (3.01 * scale / fan_in) ** 0.5


def test_policies_do_not_disturb_each_other():
    """What one network learns does not depend on the others."""
    batch, y = tiny_batch(), torch.randn(2, 4)
    critic = make(PolicyCritic, 3, 2, 2)
    fqe.critic_loss(critic, batch, y).backward()
    before = [p.grad[0].clone() for p in critic.parameters()]
    critic.zero_grad()
    fqe.critic_loss(critic, batch, torch.stack([y[0], y[1] + 9])).backward()
    assert all(torch.equal(p.grad[0], grad) for p, grad in zip(critic.parameters(), before))


@pytest.mark.parametrize(
    "x, y, rho",
    [
        ([1, 2, 3, 4], [10, 20, 30, 99], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        ([1, 1, 2, 3], [1, 2, 3, 4], 0.9486832980505138),
        ([1], [2], None),
        ([1, 1], [1, 2], None),
    ],
)
def test_spearman(x, y, rho):
    """1 − 6 Σ d² / (n (n² − 1)) where no values are equal; equal ones share their rank."""
    got = fqe.spearman(np.array(x), np.array(y))
    assert got == rho if rho is None else abs(got - rho) < 1e-12


def test_actions_are_in_the_datas_units():
    """Environment's actions back to [-1, 1], row by row and policy by policy, also over several
    chunks."""
    data, obs = tiny_data(), torch.randn(2500, 3)
    actors = [make(bc.Actor, 3, 2) for _ in range(2)]
    for actor in actors:
        actor.action_mid, actor.action_half = data.action_mid, data.action_half
    acts = [actor.act for actor in actors]
    assert_close(
        fqe.policy_actions(acts, obs, data), torch.stack([actor(obs) for actor in actors], dim=1)
    )
    actors[0].action_half = 9 * data.action_half
    assert fqe.policy_actions(acts, obs, data)[:, 0].abs().max() == 1


# ---- whole runs, on policies saved as files


PENDULUM = common.gym.spec("Pendulum-v1").to_json()


def save(folder, actor, returns=(0.0,), module="bc", **other):
    folder.mkdir(parents=True)
    saved = {
        "module": module,
        "class": "Actor",
        "algorithm": module,
        "env_spec": PENDULUM,
        "init": [3, 1],
        "actor": actor and actor.state_dict(),
    } | other
    torch.save(saved, folder / "policy.pt")
    if returns:
        (folder / "result.json").write_text(json.dumps(dict(final_returns=list(returns))))
    return str(folder / "policy.pt")


def linear_policy(*action):
    """π(s) = this action in state 1, that in state 2, ...; states are unit vectors."""
    actor = bc.Actor(3, 1)
    actor.net[0].weight.data[0, : len(action)], actor.net[0].bias.data[:] = (
        torch.atanh(torch.tensor(action)),
        0.0,
    )
    return actor


STAY, GO = -0.8, 0.8
POLICIES = [(STAY, STAY), (GO, GO), (GO, STAY), (STAY, GO)]
REWARD = {(0, STAY): 1.0, (0, GO): 0.5, (1, STAY): 3.0, (1, GO): -2.0}


def chain(rewards, terminated=0.0):
    """Two states, in each a transition that stays and one that goes to the other; each an episode
    of its own."""
    data = tiny_data(4, action_dim=1)
    data.action_mid, data.action_half = torch.zeros(1), torch.ones(1)
    for row, ((state, action), reward) in enumerate(rewards.items()):
        data.obs[row], data.next_obs[row] = (
            torch.eye(3)[state],
            torch.eye(3)[state if action == STAY else 1 - state],
        )
        data.action[row], data.reward[row], data.terminated[row] = action, reward, terminated
        data.truncated[row] = not terminated
    return data


def judge(monkeypatch, tmp_path, data, returns=(4, 1, 3, 2), **args):
    """The result of a whole run on the four policies of the chain."""
    monkeypatch.setattr(fqe, "HIDDEN", (16,))
    monkeypatch.setattr(fqe, "load_dataset", lambda *_, **__: data)
    for i, (policy, value) in enumerate(zip(POLICIES, returns)):
        save(tmp_path / "policies" / str(i), linear_policy(*policy), (value - 1.0, value + 1.0))
    args = (
        dict(
            steps=500,
            batch_size=16,
            critic_lr=1e-2,
            target_rate=0.2,
            eval_every=250,
            out=str(tmp_path),
        )
        | args
    )
    fqe.train(Args(env="chain", policies=(str(tmp_path / "policies"),), **args))
    return json.loads((tmp_path / "fqe" / "chain" / "seed0" / "result.json").read_text())


def test_a_chain_with_known_values(monkeypatch, tmp_path, capsys):
    """V of four policies by a linear solve, to 1e-3; their ranks against made-up returns, and the
    regret."""
    result = judge(
        monkeypatch,
        tmp_path,
        chain(REWARD),
        gamma=0.8,
        steps=2000,
        weight_decay=0.0,
        critic_lr=5e-3,
    )
    exact = []
    for policy in POLICIES:
        flow = np.array([np.eye(2)[s if a == STAY else 1 - s] for s, a in enumerate(policy)])
        exact.append(
            np.linalg.solve(
                np.eye(2) - 0.8 * flow, [REWARD[s, a] for s, a in enumerate(policy)]
            ).mean()
        )
    got = [one["estimate"] for one in result["policies"]]
    np.testing.assert_allclose(got, exact, atol=1e-3)
    assert [one["return_mean"] for one in result["policies"]] == [4, 1, 3, 2]
    difference = np.argsort(np.argsort(exact)) - np.array([3, 0, 2, 1])
    assert abs(result["spearman"] - (1 - 6 * (difference**2).sum() / (4 * 15))) < 1e-12
    assert result["regret"] == 4 - [4, 1, 3, 2][int(np.argmax(exact))]
    assert [point["step"] for point in result["curve"]] == list(range(250, 2001, 250))
    assert f"Spearman's correlation {result['spearman']:.2f}" in capsys.readouterr().out


def test_constant_reward(monkeypatch, tmp_path):
    """1 for ever is worth 1 / (1 − γ) = 10, whatever the policy."""
    result = judge(
        monkeypatch,
        tmp_path,
        chain(dict.fromkeys(REWARD, 1.0)),
        gamma=0.9,
        steps=3000,
        weight_decay=0.0,
        critic_lr=1e-3,
    )
    np.testing.assert_allclose([one["estimate"] for one in result["policies"]], 10, atol=0.02)


def test_where_actions_change_nothing_all_policies_are_worth_the_same(monkeypatch, tmp_path):
    """Reward and next state depend on the state alone: 1 and 3 in turns, from either state half the
    time."""
    data = chain({key: 1.0 + 2 * key[0] for key in REWARD})
    data.next_obs[:] = torch.eye(3)[[1, 1, 0, 0]]
    result = judge(
        monkeypatch, tmp_path, data, gamma=0.8, steps=3000, weight_decay=0.0, critic_lr=1e-3
    )
    np.testing.assert_allclose(
        [one["estimate"] for one in result["policies"]], 2 / (1 - 0.8), atol=0.01
    )


def test_where_every_step_is_the_last_q_is_the_reward(monkeypatch, tmp_path):
    """Positive rewards of 1 to 4: (E1)'s lower bound is 0; with r_min all would be worth at least
    r_min / (1 − γ) = 10."""
    rewards = {key: 1.0 + i for i, key in enumerate(REWARD)}
    result = judge(
        monkeypatch, tmp_path, chain(rewards, terminated=1.0), gamma=0.9, weight_decay=0.0
    )
    exact = [np.mean([rewards[s, a] for s, a in enumerate(policy)]) for policy in POLICIES]
    np.testing.assert_allclose([one["estimate"] for one in result["policies"]], exact, atol=0.02)


def test_the_units_of_reward_are_those_of_the_estimate(monkeypatch, tmp_path):
    """Rewards a thousand times as large: everything is the same but the estimates, a thousand times
    as large."""
    small, large = (
        judge(
            monkeypatch,
            tmp_path / str(scale),
            chain({key: scale * r for key, r in REWARD.items()}),
            gamma=0.8,
            steps=20,
        )
        for scale in (1, 1000)
    )
    np.testing.assert_allclose([one["estimate"] for one in large["policies"]],
                               [1000 * one["estimate"] for one in small["policies"]], rtol=1e-6)


def test_bounds_hold_from_the_first_target_on(monkeypatch, tmp_path):
    """Rewards of -3 to -1: bounds are -3 and 0, in units of their root mean square; of 1 to 3: 0
    and 3."""
    seen = []
    monkeypatch.setattr(
        fqe,
        "update",
        lambda args, data, next_actions, bounds, *rest: seen.append(bounds) or torch.zeros(()),
    )
    for sign in (-1, 1):
        rewards = dict(zip(REWARD, (sign * 1.0, sign * 2.0, sign * 3.0, sign * 2.0)))
        judge(monkeypatch, tmp_path / str(sign), chain(rewards), steps=1)
    rms = (18 / 4) ** 0.5
    assert_close(torch.stack(seen), [[-3 / rms, 0.0], [0.0, 3 / rms]])


def test_without_an_environment_there_are_estimates_alone(monkeypatch, tmp_path, capsys):
    """Nothing plays, no record is read; the estimates are those of a run with an environment."""
    want = judge(monkeypatch, tmp_path / "with", chain(REWARD), steps=20)
    data = chain(REWARD)
    data.env_spec = None
    for name in ("evaluate", "rollout_return"):
        monkeypatch.setattr(fqe, name, lambda *_: 1 / 0)
    result = judge(monkeypatch, tmp_path / "without", data, steps=20)
    assert [one["estimate"] for one in result["policies"]] == [
        one["estimate"] for one in want["policies"]
    ]
    assert [one["return_mean"] for one in result["policies"]] == [None] * 4
    assert result["spearman"] is result["regret"] is result["env_id"] is None
    said = capsys.readouterr().out
    assert said.count("rollouts       none") == 4 and said.count("Spearman") == 1, (
        "the latter of the first run"
    )


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_holdout_judges_on_the_episodes_that_were_kept_from_training(
    monkeypatch, tmp_path, holdout
):
    data = tiny_data(action_dim=1)
    kept = copy.copy(data)
    if holdout:
        common.split_episodes(kept, holdout, held_out=True)
    path = save(tmp_path / "one", linear_policy(0.5, 0.5, 0.5))
    monkeypatch.setattr(fqe, "load_dataset", lambda *_, **__: data)
    fqe.train(
        Args(
            env="tiny", policies=(path,), steps=1, batch_size=4, holdout=holdout, out=str(tmp_path)
        )
    )
    result = json.loads((tmp_path / "fqe" / "tiny" / "seed0" / "result.json").read_text())
    assert result["dataset"] == kept.describe() and kept.size == (4 if holdout else 12)


def test_a_policy_of_other_data_of_the_same_name_is_told(tmp_path, capsys):
    """A log that has grown is split otherwise: what is held out now was trained on then."""
    folder, data = tmp_path / "one", tiny_data(action_dim=1)
    save(folder, linear_policy(0.5))
    rest, kept = copy.copy(data), copy.copy(data)
    common.split_episodes(rest, 0.3, held_out=False)
    common.split_episodes(kept, 0.3, held_out=True)
    for seen, told in ((rest, False), (data, True)):
        settings = {"holdout": 0.3, "data": seen.describe()["fingerprint"]}
        (folder / "settings.json").write_text(json.dumps(settings))
        fqe.load_policies([folder / "policy.pt"], kept, data, holdout=0.3)
        assert ("was trained on other data" in capsys.readouterr().err) == told


def test_same_seed_same_result_and_an_earlier_one_is_kept(monkeypatch, tmp_path):
    first = judge(monkeypatch, tmp_path, chain(REWARD), steps=10)
    for number in range(4):
        for path in (tmp_path / "policies" / str(number)).iterdir():
            path.unlink()
        (tmp_path / "policies" / str(number)).rmdir()
    assert judge(monkeypatch, tmp_path, chain(REWARD), steps=10) == first
    assert len(list((tmp_path / "fqe" / "chain").glob("seed0*"))) == 2


@pytest.mark.parametrize("record", [(), []])
def test_a_policy_without_a_record_plays(monkeypatch, tmp_path, record):
    """No result.json beside it, or one of a run without rollouts: as many episodes as
    --final-episodes says."""
    seen = []
    monkeypatch.setattr(fqe, "evaluate", lambda act, *rest: seen.append(rest[:2]) or np.ones(2))
    path = save(tmp_path / "one", linear_policy(0.5), returns=())
    if record == []:
        (tmp_path / "one" / "result.json").write_text(json.dumps({"final_returns": []}))
    data = tiny_data(action_dim=1)
    act = common.load_policy(path)
    assert (
        fqe.rollout_return(
            tmp_path / "one" / "policy.pt", act, data, Args(policies=(path,), final_episodes=3)
        )
        == 1
    )
    assert seen == [(PENDULUM, 3)]


def test_the_record_of_an_earlier_policy_does_not_count(monkeypatch, tmp_path):
    """A longer run that was stopped in its last evaluation has a new policy and an old result."""
    monkeypatch.setattr(fqe, "evaluate", lambda *_: np.full(2, 7.0))
    path = tmp_path / "one" / "policy.pt"
    save(path.parent, linear_policy(0.5), returns=(1.0, 1.0))
    data, act = tiny_data(action_dim=1), common.load_policy(path)
    for age, expected in ((-10, 7), (10, 1)):
        written = path.stat().st_mtime + age
        os.utime(path.with_name("result.json"), (written, written))
        assert fqe.rollout_return(path, act, data, Args(policies=(str(path),))) == expected


def test_observations_of_another_width_are_left_out_also_where_they_would_broadcast(
    tmp_path, capsys
):
    data = tiny_data(action_dim=1)
    data.obs, data.obs_dim = data.obs[:, :1], 1
    data.env_spec = data.recorded_env = None
    save(tmp_path / "one", linear_policy(0.5))
    with pytest.raises(SystemExit):
        fqe.load_policies([tmp_path / "one" / "policy.pt"], data)
    assert "is for other observations" in capsys.readouterr().err


def test_a_policy_that_has_seen_the_episodes_is_told(tmp_path, capsys):
    folder = tmp_path / "one"
    save(folder, linear_policy(0.5))
    for own, told in ((0.0, True), (0.1, False)):
        (folder / "settings.json").write_text(json.dumps({"holdout": own}))
        fqe.load_policies([folder / "policy.pt"], tiny_data(action_dim=1), holdout=0.1)
        assert ("has seen these episodes" in capsys.readouterr().err) == told


def test_classes_of_other_files_are_found(tmp_path):
    """By the module that the file names; units come with the weights."""
    for name, actor in (("sac", sac.Actor(3, 1)), ("bc", bc.Actor(3, 1))):
        actor.action_half = torch.tensor([2.0])
        path = tmp_path / name / "policy.pt"
        save(tmp_path / name, actor, module=name, algorithm=f"{name}-variant")
        (act,) = fqe.load_policies([path], tiny_data(action_dim=1)).values()
        assert type(act.__self__) is type(actor) and torch.equal(
            act(torch.ones(1, 3)), actor.act(torch.ones(1, 3))
        )


def test_what_cannot_be_loaded_or_does_not_fit_is_named(tmp_path, capsys):
    """The one ends the run; the other is left out, and the run ends where no policy is left."""
    def error(path):
        with pytest.raises(SystemExit) as stop:
            fqe.load_policies([path], tiny_data(action_dim=1))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and lines[1:] in ([], ["error: --policies: no policy is left"])
        return lines[0]

    path = tmp_path / "policy.pt"
    assert "No such file" in error(path)
    path.write_text("nonsense")
    assert "can't load" in error(path)
    torch.save(bc.Actor(3, 1).state_dict(), path)
    assert "'module'" in error(path)
    hopper = common.gym.spec("Hopper-v5").to_json()
    for i, (actor, other, message) in enumerate([
            (bc.Actor(3, 1), dict(env_spec=hopper), "is for Hopper-v5, tiny is of Pendulum-v1"),
            (bc.Actor(3, 1), dict(module="ppo"), "No module named 'ppo'"),
            (bc.Actor(3, 1), dict(init=[3, 2]), "size mismatch"),
            (bc.Actor(3, 2), dict(init=[3, 2]), "for other observations or actions"),
            (bc.Actor(4, 1), dict(init=[4, 1]), "for other observations or actions")]):
        assert message in error(
            tmp_path / str(i) / save(tmp_path / str(i), actor, **other).split("/")[-1]
        )


def test_a_policy_of_another_environment_is_left_out_also_without_rollouts():
    """With --eval-env none the environment of the recording counts."""
    data = tiny_data()
    data.env_spec, data.recorded_env = None, "Pendulum-v1"
    other, own = gym.spec("Hopper-v5").to_json(), gym.spec("Pendulum-v1").to_json()
    assert "is for Hopper-v5" in fqe.misfit(lambda obs: data.action[: len(obs)], other, data)
    assert fqe.misfit(lambda obs: data.action[: len(obs)], own, data) is None


def test_a_policy_with_a_memory_is_left_out(monkeypatch, tmp_path, capsys):
    """Its action is no function of the observation; the others are judged, and without others there
    is nothing to judge."""
    monkeypatch.setattr(fqe, "load_dataset", lambda *_, **__: tiny_data(action_dim=1))
    monkeypatch.setattr(fqe, "rollout_return", lambda *_: 1.0)
    remembers = save(
        tmp_path / "dt", decision_transformer.Actor(3, 1), module="decision_transformer"
    )
    args = dict(env="tiny", out=str(tmp_path), steps=2, eval_every=2, batch_size=4)
    fqe.train(Args(policies=(remembers, save(tmp_path / "bc", bc.Actor(3, 1))), **args))
    assert f"left out: {remembers} has a memory" in capsys.readouterr().err
    [one] = json.loads((tmp_path / "fqe" / "tiny" / "seed0" / "result.json").read_text())[
        "policies"
    ]
    assert one["policy"].endswith("bc/policy.pt")
    with pytest.raises(SystemExit):
        fqe.train(Args(policies=(remembers,), **args))
    assert "no policy is left" in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [
    (dict(), "--policies: give"), (dict(policies=("/nowhere",), gamma=1.0), "--gamma"),
    (dict(policies=("/nowhere",), steps=0), "--steps must be at least 1"),
    (dict(policies=("/nowhere",), critic_lr=0.0), "--critic-lr"),
    (dict(policies=("tests",)), "no policy.pt in tests")])
def test_bad_settings(args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(SystemExit) as stop:
        fqe.train(Args(**args))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_estimates(monkeypatch, tmp_path, capsys):
    """Ctrl-C after the second estimate; a loss that is no number is named."""
    plain_update, calls = fqe.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return plain_update(*args)

    monkeypatch.setattr(fqe, "update", interrupted)
    with pytest.raises(SystemExit):
        judge(monkeypatch, tmp_path, chain(REWARD), steps=50, eval_every=10)
    assert "stopped; the estimates so far" in capsys.readouterr().err
    assert (
        json.loads((tmp_path / "fqe" / "chain" / "seed0" / "result.json").read_text())["steps"]
        == 20
    )
    monkeypatch.setattr(fqe, "update", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(SystemExit):
        judge(monkeypatch, tmp_path / "again", chain(REWARD), steps=50, eval_every=10)
    assert "by step 10 the loss is nan" in capsys.readouterr().err
