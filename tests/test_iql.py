"""IQL against slow loops, what an expectile is, and that no action is valued but the data's."""
import copy
import math

import iql
import numpy as np
import pytest
import torch
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    silent_train,
    slow_critic,
    slow_mlp,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from iql import Actor, Args, Critic, Value


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(iql, "HIDDEN", (7, 6))


def slow_log_prob(actor, obs, action):
    """log of the product of normal densities around tanh of the network, σ clipped to [e⁻⁵, e²]."""
    mean, density = [math.tanh(u) for u in slow_mlp(actor.net, obs)], 1.0
    for m, log_std, a in zip(mean, actor.log_std.tolist(), action.tolist()):
        std = math.exp(min(max(log_std, -5.0), 2.0))
        density *= math.exp(-((a - m) ** 2) / (2 * std**2)) / math.sqrt(2 * math.pi * std**2)
    return math.log(density)


def slow_min_q(critic, batch, b):
    return min(slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for k in range(2))


# ---- each function against a loop over samples


def test_min_q_equals_a_loop():
    """(E2): each transition's own smaller critic, at the data's action."""
    critic, batch = make(Critic, 3, 2), tiny_batch()
    q = iql.min_q(critic, batch)
    assert_close(q, [slow_min_q(critic, batch, b) for b in range(4)])
    assert len(set((critic(batch.obs, batch.action).argmin(0)).tolist())) == 2, (
        "neither critic as a whole is smaller"
    )
    assert not q.requires_grad


def slow_value_loss(value, batch, q, tau):
    total, above = 0.0, set()
    for b in range(len(q)):
        u = q[b] - slow_mlp(value.net, batch.obs[b])[0]
        total += (tau if u > 0 else 1 - tau) * u**2
        above.add(u > 0)
    assert above == {True, False}, "this seed must have both signs"
    return total / len(q)


def test_value_loss_equals_a_loop():
    """(E3), and its gradient against a finite difference of the loop."""
    value, batch, q = make(Value, 3), tiny_batch(), torch.tensor([2.0, -2.0, 1.5, -0.5])
    loss = iql.value_loss(value, batch, q, 0.7)
    loss.backward()
    assert_close(loss, slow_value_loss(value, batch, q.tolist(), 0.7))
    assert_gradient(value.net[-1].bias, lambda: slow_value_loss(value, batch, q.tolist(), 0.7))


def test_advantage_and_weights_equal_a_loop():
    """(E4), (E5): exp(β (q − V)), capped, none of it with a gradient."""
    value, batch, q = make(Value, 3), tiny_batch(), torch.tensor([3.0, -2.0, 0.5, 0.1])
    expected = [float(q[b]) - slow_mlp(value.net, batch.obs[b])[0] for b in range(4)]
    adv = iql.advantage(value, batch, q)
    assert_close(adv, expected)
    assert_close(iql.weights(adv, 1.5, 20.0), [min(math.exp(1.5 * a), 20.0) for a in expected])
    assert not adv.requires_grad


def test_actor_loss_equals_a_loop():
    """(E6), and its gradient, through μ and through σ."""
    actor, batch, weight = make(Actor, 3, 2), tiny_batch(), torch.tensor([0.1, 7.0, 1.0, 0.5])
    actor.log_std.data[:] = torch.tensor([0.3, -1.0])
    loss = iql.actor_loss(actor, batch, weight)
    loss.backward()

    def slow():
        return (
            -sum(
                float(weight[b]) * slow_log_prob(actor, batch.obs[b], batch.action[b])
                for b in range(4)
            )
            / 4
        )

    assert_close(loss, slow())
    assert_gradient(actor.net[-1].bias, slow)
    assert_gradient(actor.log_std, slow)


def test_td_target_equals_a_loop():
    """(E7): V of the next observation, nothing after a termination."""
    value, batch = make(Value, 3), tiny_batch()
    y = iql.td_target(value, batch, 0.9)
    v = [slow_mlp(value.net, batch.next_obs[b])[0] for b in range(4)]
    assert_close(y, [float(batch.reward[b]) + (0.0 if b == 1 else 0.9 * v[b]) for b in range(4)])
    assert not y.requires_grad


def test_critic_loss_equals_a_loop():
    """(E8): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = iql.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    assert abs(q[0][0] - q[1][0]) > 1e-3


def test_losses_refuse_columns():
    """(B, 1) where (B,) is meant would silently compare every transition with every other."""
    batch, column = tiny_batch(), torch.ones(4, 1)
    for loss in (
        lambda: iql.value_loss(Value(3), batch, column, 0.7),
        lambda: iql.actor_loss(Actor(3, 2), batch, column),
        lambda: iql.critic_loss(Critic(3, 2), batch, column),
    ):
        with pytest.raises(AssertionError):
            loss()


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh of the network."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [[math.tanh(u) for u in slow_mlp(actor.net, o)] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])


# ---- the expectile


def value_table(v):
    """A V that has one number for all observations."""
    return lambda obs: v.expand(len(obs))


@pytest.mark.parametrize("q, loss", [(1.0, 0.7), (-1.0, 0.3), (0.0, 0.0)])
def test_one_sided_errors(q, loss):
    """V = 0: a Q above it costs τ, a Q below it 1 − τ. With the sign turned round, V would chase
    the worst."""
    assert_close(
        iql.value_loss(value_table(torch.zeros(())), tiny_batch((0,)), torch.tensor([q]), 0.7), loss
    )


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_expectile_of_zero_and_one(tau):
    """Of {0, 1} in equal parts, it is τ: where τ (1 − v) = (1 − τ) v."""
    v = torch.tensor(0.2, requires_grad=True)
    batch, q = tiny_batch((0, 0)), torch.tensor([0.0, 1.0])
    for _ in range(400):
        iql.value_loss(value_table(v), batch, q, tau).backward()
        v.data -= 0.2 * v.grad
        v.grad = None
    assert_close(v, tau, 1e-10)


def chain_value(tau):
    """V at the start of a chain of four states, each with two actions in the data, of reward 0 and
    1: the fixed point of value_loss and td_target on tables, γ = 0.9, the last state terminal."""
    s = torch.arange(4).repeat_interleave(2)
    batch = tiny_batch([0.0] * 6 + [1.0] * 2)._replace(
        obs=s, next_obs=(s + 1) % 4, reward=torch.tensor([0.0, 1.0] * 4)
    )
    table = torch.zeros(4, requires_grad=True)
    for _ in range(2000):
        q = iql.td_target(lambda obs: table[obs], batch, 0.9)  # a Q that fits its target at once
        iql.value_loss(lambda obs: table[obs], batch, q, tau).backward()
        table.data -= 2.0 * table.grad
        table.grad = None
    return table.detach()


def test_stitching_along_a_chain():
    """τ = ½ values the data's average behaviour; τ → 1 the best path, though no episode need have
    taken it whole."""
    discounted = sum(0.9**t for t in range(4))
    assert_close(chain_value(0.5)[0], 0.5 * discounted)
    assert_close(chain_value(0.9)[0], 0.9 * discounted)
    assert chain_value(0.99)[0] > 0.98 * discounted


# ---- the weights


def test_known_weights():
    """β = 3: Â = 0 counts 1; ln(100)/3 = 1.5350567 reaches the cap, and beyond it (also at
    overflow) it stays 100."""
    adv = torch.tensor([0.0, 1.5350567, 1.5, 2.0, 1e4, -1.0, -1e4])
    expected = [1.0, 100.0, math.exp(4.5), 100.0, 100.0, math.exp(-3.0), 0.0]
    assert_close(iql.weights(adv, 3.0, 100.0), expected, 1e-6)
    assert (iql.weights(adv, 3.0, 100.0)[[3, 4]] == 100).all()


def test_without_beta_it_is_behaviour_cloning():
    """β → 0: all weights 1, the loss is the negative log-likelihood."""
    actor, batch, adv = make(Actor, 3, 2), tiny_batch(), torch.randn(4)
    weight = iql.weights(adv, 0.0, 100.0)
    assert torch.equal(weight, torch.ones(4)) and iql.effective_share(weight) == 1
    assert_close(iql.actor_loss(actor, batch, weight),
                 -sum(slow_log_prob(actor, batch.obs[b], batch.action[b]) for b in range(4)) / 4)


def test_effective_share():
    """One action of four that counts: ¼. Weights (3, 1): 16 / (2 · 10). None: 0, and not 0/0."""
    assert_close(iql.effective_share(torch.tensor([0.0, 5.0, 0.0, 0.0])), 0.25)
    assert_close(iql.effective_share(torch.tensor([3.0, 1.0])), 0.8)
    assert iql.effective_share(torch.zeros(4)) == 0


def test_density_without_a_jacobian():
    """μ = ½, σ = 1, at a = ½: log 1/√2π = −0.918939. At the edge of the box it is an ordinary
    number."""
    half, zero = torch.full((1, 1), 0.5), torch.zeros(1, 1)
    assert_close(iql.gaussian_log_prob(half, zero, half), [-0.918939], 1e-6)
    assert_close(iql.gaussian_log_prob(half, zero, torch.ones(1, 1)), [-0.918939 - 0.125], 1e-6)
    assert_close(
        iql.gaussian_log_prob(zero.expand(1, 3), zero.expand(1, 3) - 1, zero.expand(1, 3)),
        [3 * (1 - 0.918939)],
        1e-5,
    )


def test_log_std_is_bounded_and_starts_at_zero():
    """−5 ≤ log σ ≤ 2, whatever the parameter says; at first σ = 1; it is the same in all states."""
    actor = Actor(3, 2)
    assert_close(actor(torch.randn(4, 3))[1], torch.zeros(4, 2))
    actor.log_std.data[:] = torch.tensor([50.0, -50.0])
    assert_close(actor(torch.randn(4, 3))[1], [[2.0, -5.0]] * 4)


# ---- the update


def networks():
    """The target differs from the critic, so that a test sees which one is used."""
    return [make(Actor, 3, 2), make(Critic, 3, 2), make(Critic, 3, 2), make(Value, 3)]


def sgd(actor, critic, value, lr=0.01):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in (actor, critic, value)]


def test_update_is_the_algorithm_box():
    """V on the target critics; π and then Q on the new V; then (E9), exactly."""
    args = Args(batch_size=8, gamma=0.9, target_rate=0.3, expectile=0.8, beta=0.5, max_weight=1.95)
    data, nets, capped = tiny_data(), networks(), set()
    actor, critic, critic_target, value = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = iql.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch = data.sample(8)
        q = critic_target(batch.obs, batch.action).min(0).values.detach()
        v_loss = iql.value_loss(value, batch, q, 0.8)
        v_grad = step_by_hand(v_loss, list(value.parameters()), 0.01)
        weight = ((q - value(batch.obs)) * 0.5).exp().clamp(max=1.95).detach()
        capped |= set((weight == 1.95).tolist())
        pi_loss = iql.actor_loss(actor, batch, weight)
        step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        y = (batch.reward + 0.9 * (1 - batch.terminated) * value(batch.next_obs)).detach()
        q_loss, q_data = iql.critic_loss(critic, batch, y)
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, critic, critic_target, value)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)
        # neither the weights nor y send V a gradient
        assert_close(flat_grad(nets[3]), v_grad, 1e-12)
        expected = dict(value_loss=v_loss, actor_loss=pi_loss, critic_loss=q_loss, q_data=q_data,
                        effective_share=weight.sum() ** 2 / 8 / (weight**2).sum())
        for name, value_ in expected.items():
            assert_close(metrics[name], value_, 1e-12)
    assert capped == {True, False}, "the cap must matter here, and not alone"


def test_no_action_is_valued_but_the_datas():
    """The critics see pairs (s, a) of the data only, and the policy is not asked for any; values
    don't depend on it."""
    args, data, (actor, critic, critic_target, value) = Args(batch_size=4), tiny_data(), networks()
    batch = data.rows(torch.arange(12))
    pairs = set(map(tuple, torch.cat([batch.obs, batch.action], dim=1).tolist()))
    seen = []
    for net in (critic, critic_target):
        net.register_forward_hook(
            lambda module, inputs, output: seen.extend(
                map(tuple, torch.cat(inputs, dim=1).tolist())
            )
        )
    others, results = (actor, make(Actor, 3, 2)), []
    for policy in others:
        torch.manual_seed(1)
        nets = [policy, *copy.deepcopy([critic, critic_target, value])]
        iql.update(args, data, *nets, *sgd(nets[0], nets[1], nets[3]))
        results.append(torch.cat([flat(net) for net in nets[1:]]))
    assert len(seen) == 2 * 8 and set(seen) <= pairs
    assert torch.equal(*results)


def test_value_is_learned_from_the_target_critics():
    """Another online Q leaves V's and π's steps as they were; another target does not."""
    data, (actor, critic, critic_target, value) = tiny_data(), networks()
    results = []
    for online, target in (
        (critic, critic_target),
        (make(Critic, 3, 2), critic_target),
        (critic, make(Critic, 3, 2)),
    ):
        torch.manual_seed(1)
        nets = copy.deepcopy([actor, online, target, value])
        iql.update(Args(batch_size=4), data, *nets, *sgd(nets[0], nets[1], nets[3]))
        results.append((flat(nets[0]), flat(nets[3])))
    for part in range(2):
        assert torch.equal(results[0][part], results[1][part]) and not torch.equal(
            results[0][part], results[2][part]
        )


def test_each_loss_moves_its_own_network_only():
    """V's loss: no gradient for critics; the actor's: none for V; the critic's: none for V, its
    target or the actor."""
    batch, (actor, critic, critic_target, value) = tiny_batch(), networks()
    q = iql.min_q(critic_target, batch)
    iql.value_loss(value, batch, q, 0.7).backward()
    assert all(p.grad is not None for p in value.parameters())
    value.zero_grad()
    iql.actor_loss(actor, batch, iql.weights(iql.advantage(value, batch, q), 3.0, 100.0)).backward()
    assert all(p.grad is not None for p in actor.parameters())
    actor.zero_grad()
    iql.critic_loss(critic, batch, iql.td_target(value, batch, 0.9))[0].backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for net in (actor, critic_target, value) for p in net.parameters())


def test_train_moves_every_part_each_step(monkeypatch):
    """Actor, critic, target and V, from a target that starts as a copy."""
    run = silent_train(monkeypatch, iql, tiny_data(), steps=3, batch_size=4)
    for name in ("actor", "critic", "critic_target", "value"):
        assert run.steps_that_moved(name) == [1, 2, 3]
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[3]["critic"], run.history[3]["critic_target"])


def test_the_actors_learning_rate_falls_along_a_cosine(monkeypatch):
    """(E10): lr at update t of T, counted from 0: lr₀ (1 + cos πt/T) / 2. Of 4: 1, 0.853553, ½,
    0.146447. The others' are constant."""
    rates, original = [], iql.update

    def spy(*args, **learned):
        optimizers = [learned[f"{name}_optimizer"] for name in ("actor", "critic", "value")]
        rates.append([float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers])
        return original(*args, **learned)

    monkeypatch.setattr(iql, "update", spy)
    silent_train(monkeypatch, iql, tiny_data(), steps=4, batch_size=4, actor_lr=0.2, critic_lr=0.3)
    assert_close(rates, [[0.2 * c, 0.3, 0.3] for c in (1, 0.853553, 0.5, 0.146447)], 1e-6)


# ---- rewards


def test_returns_span_a_thousand_after_scaling():
    """The best and the worst episode then differ by 1000; other units of reward make the same
    data."""
    data = tiny_data()
    everything = torch.arange(12)
    before = data.rows(everything)
    iql.scale_rewards(data)
    after = data.rows(everything)
    totals = [float(sum(after.reward[i:j])) for i, j in ((0, 4), (4, 8), (8, 12))]
    assert_close(max(totals) - min(totals), 1000.0)
    assert_close(after.reward / before.reward, (after.reward / before.reward)[:1].expand(12))
    for name in ("obs", "action", "next_obs", "terminated"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    other = tiny_data()
    other.reward = before.reward * 77
    other.terminated = before.terminated
    iql.scale_rewards(other)
    assert_close(other.reward, after.reward)


@pytest.mark.parametrize("reward", [0.0, 0.1, -3e4])
def test_equal_returns_leave_the_rewards_and_say_so(capsys, reward):
    """One return has no range to divide by; a sum that differs in its last digits has none
    either."""
    data = tiny_data()
    data.reward[:] = reward
    data.reward[0] *= 1 + 1e-12
    before = data.reward.clone()
    iql.scale_rewards(data)
    assert torch.equal(data.reward, before) and "same return" in capsys.readouterr().err


def test_a_single_episode_trains(monkeypatch, capsys):
    """It is the same case: its rewards stay as they are."""
    data = tiny_data(4)
    before = data.reward.clone()
    run = silent_train(monkeypatch, iql, data, steps=2, batch_size=4)
    assert torch.equal(data.reward, before) and run.steps_that_moved("actor") == [1, 2]
    assert len(data.returns()) == 1 and "same return" in capsys.readouterr().err


def test_a_small_range_is_a_range():
    """Returns that differ by a thousandth of their size are scaled as any others."""
    data = tiny_data()
    data.reward[:] = 100.0
    data.reward[0] = 100.4
    iql.scale_rewards(data)
    assert_close(np.ptp(data.returns()), 1000.0)


def test_train_scales_the_rewards_once(monkeypatch):
    data = tiny_data()
    silent_train(monkeypatch, iql, data, steps=2, batch_size=4)
    returns = data.returns()
    assert_close(np.ptp(returns), 1000.0)


# ---- unlike cloning


@pytest.mark.parametrize("seed", range(2))
def test_the_better_of_two_modes(monkeypatch, seed):
    """One state; half of the data does −0.6, which earns 0, half +0.6, which earns 1. A clone goes
    between, IQL to +0.6."""
    monkeypatch.setattr(iql, "HIDDEN", (32, 32))
    modes = {}
    for beta in (0.0, 3.0):
        torch.manual_seed(seed)
        data = tiny_data(64, action_dim=1)
        data.obs.zero_()
        data.next_obs.zero_()
        data.action[:, 0] = torch.tensor([-0.6, 0.6]).repeat(32)
        data.reward[:] = torch.tensor([0.0, 1.0]).repeat(32)
        data.terminated[:] = 1.0
        nets = [Actor(3, 1), critic := Critic(3, 1), copy.deepcopy(critic), Value(3)]
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=5e-3) for net in (nets[0], nets[1], nets[3])
        ]
        for _ in range(300):
            iql.update(Args(batch_size=32, target_rate=0.1, beta=beta), data, *nets, *optimizers)
        modes[beta] = nets[0].act(torch.zeros(1, 3)).item()
    assert abs(modes[0.0]) < 0.2 and 0.45 < modes[3.0] < 0.7, modes


# ---- settings


@pytest.mark.parametrize(
    "setting, value",
    [("expectile", 0.0), ("expectile", 1.0), ("beta", -1.0), ("batch_size", 0), ("gamma", 1.1)],
)
def test_settings_out_of_range_are_refused(monkeypatch, capsys, setting, value):
    with pytest.raises(SystemExit) as stop:
        silent_train(monkeypatch, iql, tiny_data(), steps=2, **{setting: value})
    assert (
        stop.value.code == 2 and f"--{setting.replace('_', '-')} must be" in capsys.readouterr().err
    )
