"""MOPO against slow loops, its penalty, what it costs, and where the penalty keeps a policy on the
data."""
import copy
import math
import sys

from common import LEVELS, SUITE, parse_args

import mopo
import pytest
import sac
import torch
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    record_draws,
    slow_critic,
    slow_sample,
    slow_soft_actor_loss,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from mopo import Actor, Args, Critic
from test_dynamics import as_rows, filled_pool, slow_dynamics, some_dynamics


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(mopo, "HIDDEN", (7, 6))
    monkeypatch.setattr(mopo, "DYNAMICS_HIDDEN", (5, 4))


# ---- (E4), (E5), (E6): imagination


def test_imagine_equals_a_loop(monkeypatch):
    """Row by row: the policy's action, one elite's sample, the body's rule, the penalty; fallen
    rows are not imagined further."""
    monkeypatch.setitem(mopo.FALLS, "Pendulum-v1", lambda s: s[:, 0] > 0.5)
    data, actor, dynamics = tiny_data(), make(Actor, 3, 2), some_dynamics()
    dynamics.elites.copy_(torch.tensor([6, 2, 0, 3, 5]))
    whole, normal = (record_draws(monkeypatch, name) for name in ("randint", "randn_like"))
    rows = mopo.imagine(
        Args(rollout_starts=6, horizon=3, penalty_weight=1.7), data, dynamics, actor
    )

    starts, *picks = whole
    alive, expected = data.obs[starts].tolist(), []
    for step in range(3):
        still = []
        for b, obs in enumerate(alive):
            action, _ = slow_sample(actor, torch.tensor(obs), normal[2 * step][b], -20.0)
            said = [slow_dynamics(dynamics, m, obs + action) for m in range(7)]
            mean, log_var = said[(6, 2, 0, 3, 5)[int(picks[step][b])]]
            y = [
                mean[i] + math.exp(log_var[i] / 2) * float(normal[2 * step + 1][b, i])
                for i in range(4)
            ]
            penalty = max(math.sqrt(sum(math.exp(v) for v in log_var)) for _, log_var in said)
            next_obs = [obs[i] + y[i] for i in range(3)]
            expected.append(
                obs + action + next_obs + [y[3] - 1.7 * penalty, float(next_obs[0] > 0.5)]
            )
            if next_obs[0] <= 0.5:
                still.append(next_obs)
        alive = still
    assert 6 < len(expected) < 18, "some must fall, not all at once"
    assert_close(as_rows(rows), expected)
    assert not any(column.requires_grad for column in rows)


class Constant:
    """A model with these means (M, S + 1) and standard deviations (M, S + 1) for every x."""
    elites = torch.arange(5)

    def __init__(self, mean, std):
        self.mean, self.log_var = torch.as_tensor(mean), 2 * torch.as_tensor(std).log()

    def __call__(self, x):
        return tuple(part[:, None].expand(-1, len(x), -1) for part in (self.mean, self.log_var))


def imagined(std, penalty_weight, mean=0.0, starts=4, horizon=1, seed=0):
    """Rows of a model with these deviations (7, 4)."""
    torch.manual_seed(seed)
    data, model = tiny_data(action_dim=1), Constant(torch.full((7, 4), mean), std)
    args = Args(rollout_starts=starts, horizon=horizon, penalty_weight=penalty_weight)
    return mopo.imagine(args, data, model, lambda obs: (obs[:, :1], obs[:, :1]))


def penalty(std):
    return (imagined(std, 0.0).reward - imagined(std, 1.0).reward).mean()


def test_known_penalty():
    """Deviations (3, 4) and (0, 1) of two networks, λ = 2: u is 5, and r = 1 becomes −9. The others
    hardly count."""
    std = torch.full((7, 4), 1e-12)
    std[6] = torch.tensor([3.0, 4.0, 1e-12, 1e-12])  # no elite
    std[2] = torch.tensor([1e-12, 1.0, 1e-12, 1e-12])
    assert_close(imagined(std, 2.0, mean=1.0).reward, [-9.0] * 4)
    assert_close(penalty(std), 5.0)
    std[0, 3] = 6.0  # the reward's own deviation counts
    assert_close(penalty(std), 6.0)


def test_penalty_scales_with_the_deviations_and_ignores_the_order_of_networks():
    std = torch.rand(7, 4) + 0.1
    assert_close(penalty(3 * std), 3 * penalty(std))
    assert_close(penalty(std[torch.randperm(7)]), penalty(std))


def test_without_weight_there_is_no_penalty():
    """λ = 0: the sampled reward itself, and for any λ the same states."""
    std = torch.rand(7, 4)
    free, penalised = imagined(std, 0.0), imagined(std, 5.0)
    assert torch.equal(free.next_obs, penalised.next_obs) and (free.reward > penalised.reward).all()
    assert free.reward.std() > 0, "a sample, not a mean"


def test_a_model_in_which_all_fall_at_once(monkeypatch):
    """One row per start whatever the horizon, marked as the end; its target is its reward."""
    monkeypatch.setitem(mopo.FALLS, "Pendulum-v1", lambda s: torch.ones(len(s), dtype=torch.bool))
    rows = imagined(torch.rand(7, 4), 1.0, horizon=5)
    assert rows.terminated.tolist() == [1.0] * 4
    y = mopo.soft_td_target(make(Actor, 3, 1), make(Critic, 3, 1), torch.tensor(0.3), rows, 0.9)
    assert torch.equal(y, rows.reward)


def test_no_row_survives_its_end(monkeypatch):
    """Of each rollout the end comes last, and there is one wherever the rollout is short."""
    monkeypatch.setitem(mopo.FALLS, "Pendulum-v1", lambda s: s[:, 0].abs() > 1.5)
    rows = imagined(torch.ones(7, 4), 1.0, starts=500, horizon=4)
    assert torch.equal(rows.terminated, (rows.next_obs[:, 0].abs() > 1.5).double())
    ended = {tuple(o) for o in rows.next_obs[rows.terminated.bool()].tolist()}
    assert not ended & set(map(tuple, rows.obs.tolist()))
    assert len(rows.obs) == 500 + sum(
        tuple(o) in set(map(tuple, rows.obs.tolist())) for o in rows.next_obs.tolist()
    )
    assert 500 < len(rows.obs) < 2000


# ---- losses against loops


def test_soft_td_target_equals_a_loop(monkeypatch):
    """(E7), (E8): one action per next observation, the smaller critic, minus α log π; nothing after
    a termination."""
    actor, critic, batch, expected = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    y = mopo.soft_td_target(actor, critic, torch.tensor(0.3), batch, 0.9)
    for b in range(4):
        action, log_prob = slow_sample(actor, batch.next_obs[b], draws[0][b], -20.0)
        value = (
            min(slow_critic(critic, k, batch.next_obs[b], action) for k in range(2))
            - 0.3 * log_prob
        )
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else value)))
    assert_close(y, expected)
    assert not y.requires_grad


def test_critic_loss_equals_a_loop():
    """(E9): the mean over transitions of the squared error, summed over two critics; a column of
    targets is refused."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_batch = mopo.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_batch, sum(q[0] + q[1]) / 8)
    with pytest.raises(AssertionError):
        mopo.critic_loss(critic, batch, y[:, None])


def test_actor_loss_equals_a_loop(monkeypatch):
    """(E10) with its gradient, and the log π that (E11) needs."""
    actor, critic, obs = make(Actor, 3, 2), make(Critic, 3, 2), torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    loss, *metrics = mopo.actor_loss(actor, critic, torch.tensor(0.3), obs)
    loss.backward()

    def slow():
        return slow_soft_actor_loss(actor, critic, 0.3, obs, draws[0], -20.0)

    for got, want in zip((loss, *metrics), slow()):
        assert_close(got, want)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh(μ); log σ is bounded."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [slow_sample(actor, o, torch.zeros(2), -20.0)[0] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])
    actor.net[-1].bias.data += torch.tensor([0.0, 0.0, 50.0, -50.0])
    assert_close(actor(obs)[1], [[2.0, -20.0]] * 4)


# ---- the update


def networks():
    """The target differs from the critic, so that a test sees which one is used."""
    return [
        make(Actor, 3, 2),
        make(Critic, 3, 2),
        make(Critic, 3, 2),
        torch.tensor(-0.5, requires_grad=True),
    ]


def sgd(actor, critic, log_alpha, lr=0.01):
    return [
        torch.optim.SGD(params, lr=lr)
        for params in (actor.parameters(), critic.parameters(), [log_alpha])
    ]


def test_update_is_the_algorithm_box():
    """Real rows first, then imagined ones; Q, then π on the new Q, then α, each with the old α;
    then (E12), exactly."""
    args = Args(batch_size=5, real_share=0.5, gamma=0.9, target_rate=0.3)
    data, pool, nets = tiny_data(), filled_pool(mopo, tiny_data(9)), networks()
    actor, critic, critic_target, log_alpha = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = mopo.update(args, data, pool, *nets, *optimizers)

        torch.manual_seed(seed)
        real, model, alpha = data.sample(2), pool.sample(3), log_alpha.detach().exp()
        batch = real._replace(
            **{
                name: torch.cat([getattr(real, name), getattr(model, name)])
                for name in real._fields
            }
        )
        q_loss, q_batch = mopo.critic_loss(
            critic, batch, mopo.soft_td_target(actor, critic_target, alpha, batch, 0.9)
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, log_prob, q_policy = mopo.actor_loss(actor, critic, alpha, batch.obs)
        pi_grad = step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        log_alpha.data += 0.01 * (log_prob.mean() - 2)  # (E11), for two actions
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(nets[3], log_alpha, 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)
        assert_close(flat_grad(nets[0]), pi_grad, 1e-12)  # nor α's to the actor's
        expected = dict(
            critic_loss=q_loss,
            q_batch=q_batch,
            q_policy=q_policy,
            reward=batch.reward.mean(),
            entropy=-log_prob.mean(),
            entropy_coef=alpha,
        )
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_a_batch_has_twelve_real_rows_of_256(monkeypatch):
    """int(0.05 · 256), and the real ones are what they were: no penalty."""
    data, pool, nets, seen = tiny_data(), filled_pool(mopo, tiny_data()), networks(), []
    pool.reward.fill_(-99.0)
    loss = mopo.critic_loss
    monkeypatch.setattr(
        mopo, "critic_loss", lambda critic, batch, y: seen.append(batch) or loss(critic, batch, y)
    )
    mopo.update(Args(), data, pool, *nets, *sgd(nets[0], nets[1], nets[3]))
    assert (seen[0].reward == -99).tolist() == [False] * 12 + [True] * 244
    known = {
        tuple(row) for row in torch.cat([data.obs, data.action, data.reward[:, None]], 1).tolist()
    }
    assert {(*o, *a, r) for o, a, r in zip(*(part[:12].tolist() for part in seen[0][:3]))} <= known


def test_with_real_rows_alone_it_is_sac():
    """real_share 1: the same step as sac.py's on the same data, bit for bit, whatever is in the
    pool."""
    nets = networks()
    other = copy.deepcopy(nets)
    torch.manual_seed(3)
    data = tiny_data()
    torch.manual_seed(3)
    pool = filled_pool(mopo, tiny_data())
    torch.manual_seed(3)
    mopo.update(
        Args(batch_size=6, real_share=1.0), data, pool, *nets, *sgd(nets[0], nets[1], nets[3])
    )
    torch.manual_seed(3)
    sac.update(sac.Args(batch_size=6), data, *other, *sgd(other[0], other[1], other[3]))
    assert all(torch.equal(flat(a), flat(b)) for a, b in zip(nets[:3], other[:3])) and torch.equal(
        nets[3], other[3]
    )


def test_each_loss_moves_its_own_part_only():
    """Critic's loss: no gradient for actor, α or target. Actor's step: none for the critics."""
    batch, (actor, critic, critic_target, log_alpha) = tiny_batch(), networks()
    mopo.critic_loss(
        critic, batch, mopo.soft_td_target(actor, critic_target, log_alpha.exp(), batch, 0.9)
    )[0].backward()
    assert log_alpha.grad is None and all(
        p.grad is None for net in (actor, critic_target) for p in net.parameters()
    )
    assert all(p.grad is not None for p in critic.parameters())
    loss, log_prob, _ = mopo.actor_loss(actor, critic, log_alpha.detach().exp(), batch.obs)
    critic.zero_grad()
    mopo.descend(loss, sgd(actor, critic, log_alpha)[0])
    assert all(p.grad is None for p in critic.parameters()) and all(
        p.grad is not None for p in actor.parameters()
    )
    assert not log_prob.requires_grad


# ---- what it costs


def test_rollouts_cost_less_than_15_percent():
    """In floating-point operations, of the default settings: 1000 updates, and the rollout that
    belongs to them."""
    from torch.utils.flop_counter import FlopCounterMode
    torch.set_default_dtype(torch.float32)
    # the fixture's patches end with the test
    mopo.HIDDEN, mopo.DYNAMICS_HIDDEN = (256, 256), (200,) * 4
    args, data, nets = Args(rollout_starts=100), tiny_data(), networks()
    flops, pool = [], filled_pool(mopo, data)
    for work in (lambda: mopo.update(args, data, pool, *nets, *sgd(nets[0], nets[1], nets[3])),
                 lambda: mopo.imagine(args, data, mopo.Dynamics(3, 2), nets[0])):
        with FlopCounterMode(display=False) as counter:
            work()
        flops.append(counter.get_total_flops())
    rollout = flops[1] * Args().rollout_starts / 100
    assert rollout < 0.15 * (rollout + Args().rollout_every * flops[0])


# ---- tuned values


def test_tuned_values_are_those_of_the_paper(monkeypatch, capsys):
    """Four levels of three bodies; what the user sets stands, what is taken from TUNED is said."""
    table = {  # random, medium, medium-replay, medium-expert
        "halfcheetah": ((5, 0.5), (1, 1.0), (5, 1.0), (5, 1.0)),
        "hopper": ((5, 1.0), (25, 5.0), (5, 1.0), (5, 1.0)),  # 25: mopo.py D8
        "walker2d": ((1, 1.0), (5, 5.0), (1, 1.0), (1, 2.0)),
    }
    assert set(table) < set(SUITE)
    assert mopo.TUNED == {
        f"{body}-{level}": dict(horizon=horizon, penalty_weight=weight)
        for body, row in table.items()
        for level, (horizon, weight) in zip(LEVELS[:4], row, strict=True)
    }
    monkeypatch.setattr(
        sys, "argv", ["mopo.py", "--env", "walker2d-medium-expert", "--horizon", "3"]
    )
    args = parse_args(Args, mopo.TUNED)
    assert (args.horizon, args.penalty_weight) == (3, 2.0)
    assert capsys.readouterr().out == "tuned for walker2d-medium-expert: --penalty-weight 2.0\n"


# ---- what the penalty is for (C10)


def walk(penalty_weight, monkeypatch):
    """A line: the action is the step, the reward is where one stands. The model is sure for |s| <
    1, and less and less beyond, as data near 0 would leave it. How far out a policy goes in 12
    steps from 0 after learning."""
    monkeypatch.setattr(mopo, "HIDDEN", (32, 32))

    class Line:
        elites = torch.arange(5)

        def __call__(self, x):
            y = torch.cat([0.5 * x[:, 3:], 0 * x[:, :2], x[:, :1]], 1)
            std = 0.02 + 0.5 * (x[:, :1].abs() - 1).clamp(min=0)
            return y.expand(7, -1, -1), 2 * std.log().expand(7, len(x), 4)

    torch.manual_seed(0)
    args = Args(
        batch_size=64, penalty_weight=penalty_weight, rollout_starts=200, gamma=0.9, target_rate=0.1
    )
    data = tiny_data(200, action_dim=1)
    for column in (data.obs, data.action, data.reward, data.next_obs, data.terminated):
        column.zero_()
    data.obs[:, 0] = torch.linspace(-1, 1, 200)
    pool = filled_pool(mopo, tiny_data(1000, action_dim=1))
    nets = [Actor(3, 1), Critic(3, 1), None, torch.tensor(-3.0, requires_grad=True)]
    nets[2] = copy.deepcopy(nets[1])
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3) for net in nets[:2]] + [
        torch.optim.SGD([nets[3]], lr=0.0)
    ]
    for step in range(300):
        if step % 30 == 0:
            pool.add(mopo.imagine(args, data, Line(), nets[0]))
        mopo.update(args, data, pool, *nets, *optimizers)
    obs = torch.zeros(1, 3)
    for _ in range(12):
        obs[:, 0] += 0.5 * nets[0].act(obs)[0]
    return obs[0, 0].item()


def test_the_penalty_keeps_the_policy_on_the_data(monkeypatch):
    """λ = 0 walks off to where nobody was, since the model predicts more reward there; λ = 5 stays
    within about 1."""
    reached = [walk(weight, monkeypatch) for weight in (0.0, 5.0)]
    assert reached[0] > 3 and 0.3 < reached[1] < 1.7, reached
