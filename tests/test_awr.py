"""AWR against slow loops: returns over episodes that end in different ways, weights of any scale,
and whose turn it is."""
import copy
import math

import awr
import pytest
import torch
from awr import Actor, Args, Value
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    silent_train,
    slow_mlp,
    step_by_hand,
    tiny_batch,
    tiny_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(awr, "HIDDEN", (7, 6))


def uneven_data():
    """Rows 0–3 terminate, 4–8 meet a time limit, 9 terminates at once, 10 and 11 are a fragment
    that the file cut off."""
    data = tiny_data()
    data.truncated[:] = False
    data.truncated[8] = True
    data.terminated[9] = 1.0
    return data


def slow_value(value, obs, gamma):
    return slow_mlp(value.net, obs)[0] / (1 - gamma)


def slow_returns(value, data, gamma, td_lambda):
    """Row by row from the back; episodes are told by hand. After a last row comes its own next_obs,
    not the next row."""
    batch, returns = data.rows(torch.arange(12)), [0.0] * 12
    for t in reversed(range(12)):
        if t in (3, 9):
            rest = 0.0
        elif t in (8, 11):
            rest = slow_value(value, batch.next_obs[t], gamma)
        else:
            rest = (1 - td_lambda) * slow_value(
                value, batch.obs[t + 1], gamma
            ) + td_lambda * returns[t + 1]
        returns[t] = float(batch.reward[t]) + gamma * rest
    return returns


def slow_log_prob(actor, obs, action):
    """log of the product of normal densities of σ = 0.4 around the network's own output."""
    density = 1.0
    for m, a in zip(slow_mlp(actor.net, obs), action.tolist()):
        density *= math.exp(-((a - m) ** 2) / (2 * 0.4**2)) / math.sqrt(2 * math.pi * 0.4**2)
    return math.log(density)


def make_actor():
    """Means on both sides of the box's edge."""
    actor = make(Actor, 3, 2)
    actor.net[-1].weight.data.mul_(200)
    return actor


# ---- each function against a loop over samples


@pytest.mark.parametrize("td_lambda", [0.0, 0.6, 1.0])
def test_td_lambda_returns_equal_a_loop(td_lambda):
    """(E1): nothing flows over the end of an episode; all but a termination end on V."""
    value, data = make(Value, 3), uneven_data()
    returns, v = awr.td_lambda_returns(value, data, 0.9, td_lambda)
    assert_close(returns, slow_returns(value, data, 0.9, td_lambda))
    assert_close(v, [slow_value(value, obs, 0.9) for obs in data.obs])
    assert not returns.requires_grad and not v.requires_grad


def test_value_loss_equals_a_loop():
    """(E2), and its gradient: half the squared error, in units of (1 − γ) times a return."""
    value, batch, returns = make(Value, 3), tiny_batch(), 10 * torch.randn(4)
    loss = awr.value_loss(value, batch, returns, 0.9)
    loss.backward()

    def slow():
        return (
            sum(
                (0.1 * float(returns[b]) - slow_mlp(value.net, batch.obs[b])[0]) ** 2
                for b in range(4)
            )
            / 8
        )

    assert_close(loss, slow())
    assert_gradient(value.net[-1].bias, slow)


def test_advantage_equals_a_loop():
    """(E3): returns minus V, of all the data."""
    value, data = make(Value, 3), uneven_data()
    obs, returns = data.obs, slow_returns(value, data, 0.9, 0.6)
    adv = awr.advantage(value, data, 0.9, 0.6)
    assert_close(adv, [returns[t] - slow_value(value, obs[t], 0.9) for t in range(12)])
    assert not adv.requires_grad


def test_weights_equal_a_loop():
    """(E4): the standard deviation is the population's."""
    adv = torch.tensor([1.0, -2.0, 0.5, 4.0])
    mean = sum(adv.tolist()) / 4
    std = math.sqrt(sum((a - mean) ** 2 for a in adv.tolist()) / 4)
    expected = [min(math.exp((a - mean) / (std + 1e-5) / 0.5), 9.0) for a in adv.tolist()]
    assert_close(awr.weights(adv, 0.5, 9.0), expected)
    assert max(expected) == 9.0


def test_actor_loss_equals_a_loop():
    """(E5), (E6), and the gradient."""
    actor, batch, weight = make_actor(), tiny_batch(), torch.tensor([0.1, 7.0, 1.0, 0.5])
    loss = awr.actor_loss(actor, batch, weight, 10.0)
    loss.backward()

    def slow():
        cloning = (
            -sum(
                float(weight[b]) * slow_log_prob(actor, batch.obs[b], batch.action[b])
                for b in range(4)
            )
            / 4
        )
        beyond = [
            max(m - 1, -1 - m, 0.0) for b in range(4) for m in slow_mlp(actor.net, batch.obs[b])
        ]
        assert 0 < sum(x > 0 for x in beyond) < 8, (
            "some means must be outside of the box, and some not"
        )
        return cloning + 10 * 0.5 * sum(x**2 for x in beyond) / 4

    assert_close(loss, slow())
    assert_gradient(actor.net[-1].bias, slow)


def test_losses_refuse_columns():
    """(B, 1) where (B,) is meant would silently compare every transition with every other."""
    batch, column = tiny_batch(), torch.ones(4, 1)
    for loss in (lambda: awr.value_loss(Value(3), batch, column, 0.9),
                 lambda: awr.actor_loss(Actor(3, 2), batch, column, 10.0)):
        with pytest.raises(AssertionError):
            loss()


# ---- returns


def three_steps(terminated):
    """r = 1, 1, 1."""
    data = tiny_data(3)
    data.truncated[:] = torch.tensor([False, False, not terminated])
    data.reward[:] = 1.0
    data.terminated[:] = torch.tensor([0.0, 0.0, float(terminated)])
    return data


@pytest.mark.parametrize("td_lambda, value, terminated, expected", [
    (0.95, 0.0, True, [2.825040, 1.9405, 1.0]),
    (1.0, 0.0, True, [2.9701, 1.99, 1.0]),
    (0.0, 5.0, False, [5.95, 5.95, 5.95]),
    (1.0, 5.0, False, [1 + 0.99 + 0.99**2 + 5 * 0.99**3, 1 + 0.99 + 5 * 0.99**2, 5.95]),
    (0.0, 5.0, True, [5.95, 5.95, 1.0]),
])
def test_known_returns(td_lambda, value, terminated, expected):
    """γ = 0.99 and a constant V; at a time limit, V stands for what would have come."""
    constant = lambda obs: torch.full((len(obs),), value * 0.01)
    returns, _ = awr.td_lambda_returns(constant, three_steps(terminated), 0.99, td_lambda)
    assert_close(returns, expected, 1e-6)


def test_a_true_value_is_a_fixed_point_for_every_lambda():
    """Rewards 1 for ever, V = 1 / (1 − γ): every λ gives R = V, and so Â = 0."""
    data = uneven_data()
    data.reward[:] = 1.0
    data.terminated[:] = 0.0
    data.truncated[3] = data.truncated[9] = True
    for td_lambda in (0.0, 0.5, 1.0):
        returns, _ = awr.td_lambda_returns(lambda obs: torch.ones(len(obs)), data, 0.9, td_lambda)
        assert_close(returns, torch.full((12,), 10.0))
        assert_close(
            awr.advantage(lambda obs: torch.ones(len(obs)), data, 0.9, td_lambda), torch.zeros(12)
        )


def test_the_networks_unit_is_a_hundredth():
    """γ = 0.99: an output of 1 means V = 100. The pieces that large data are cut into come back in
    order."""
    value, obs = make(Value, 3), torch.randn(70_000, 3)
    assert_close(
        awr.state_values(lambda obs: torch.ones(len(obs)), obs, 0.99), torch.full((70_000,), 100.0)
    )
    with torch.no_grad():
        assert_close(awr.state_values(value, obs, 0.99), 100 * value(obs))


# ---- weights


def test_known_weights():
    """Â = ∓1 gives e^∓1. All the same: exactly 1, so plain cloning. One far above the rest: the
    cap, exactly."""
    assert_close(awr.weights(torch.tensor([-1.0, 1.0]), 1.0, 20.0), [0.3679, 2.7183], 1e-4)
    assert torch.equal(awr.weights(torch.full((5,), 3.0), 1.0, 20.0), torch.ones(5))
    outlier = awr.weights(torch.eye(17)[0], 1.0, 20.0)  # standardised: 4 and −¼
    assert outlier[0] == 20.0
    assert_close(outlier[1:], torch.full((16,), math.exp(-0.25)), 1e-4)


def test_weights_ignore_scale_and_offset():
    """Rewards in other units, a wrong constant in V: the same weights."""
    adv = torch.randn(50)
    assert_close(awr.weights(1000 * adv - 77, 1.0, 20.0), awr.weights(adv, 1.0, 20.0), 1e-4)
    assert not torch.allclose(awr.weights(-adv, 1.0, 20.0), awr.weights(adv, 1.0, 20.0))


def test_equal_weights_are_behaviour_cloning():
    """Of fixed width: the loss is the squared error / 2σ², up to a constant."""
    actor, batch = make(Actor, 3, 2, scale=1.0), tiny_batch()
    loss = awr.actor_loss(actor, batch, torch.ones(4), 10.0)
    squared = sum(
        (m - a) ** 2
        for b in range(4)
        for m, a in zip(slow_mlp(actor.net, batch.obs[b]), batch.action[b].tolist())
    )
    assert_close(loss, squared / 4 / (2 * 0.4**2) + math.log(2 * math.pi * 0.4**2))


def test_effective_share():
    """One action of four that counts: ¼. All alike: 1."""
    assert_close(awr.effective_share(torch.tensor([0.0, 5.0, 0.0, 0.0])), 0.25)
    assert_close(awr.effective_share(torch.full((4,), 7.0)), 1.0)


# ---- the actor


@pytest.mark.parametrize(
    "mean, expected",
    [([0.9, -1.0, 0.0], 0.0), ([1.3, 0.0, -0.5], 0.045), ([-1.3, 0.0, 2.0], 0.545)],
)
def test_bound_loss(mean, expected):
    """Inside the box nothing; 0.3 beyond in one dimension: 0.045, times the weight 10 that is
    0.45."""
    assert_close(awr.bound_loss(torch.tensor([mean])), expected)


def test_a_new_actor_does_nothing_yet():
    """The last layer starts within ±0.01, and σ is 0.4 everywhere and no parameter."""
    actor = Actor(3, 2)
    assert 0.005 < actor.net[-1].weight.abs().max() <= 0.01 < actor.net[-3].weight.abs().max()
    assert_close(actor(torch.randn(4, 3))[1].exp(), torch.full((4, 2), 0.4))
    assert {name.split(".")[0] for name, _ in actor.named_parameters()} == {"net"}


def test_standardisation_round_trip(monkeypatch):
    """In training mean 0 and std / (std + 0.001); the finished actor's input and output are in raw
    units, clipped."""
    data = tiny_data()
    raw = data.rows(torch.arange(12))
    run = silent_train(monkeypatch, awr, data, steps=2, batch_size=4)
    seen = data.rows(torch.arange(12))
    std = raw.obs.std(0, correction=0)
    assert_close(seen.obs.mean(0), torch.zeros(3))
    assert_close(seen.obs.std(0, correction=0), std / (std + 1e-3))
    run.actor.net[-1].weight.data.mul_(500)
    means = [slow_mlp(run.actor.net, seen.obs[b]) for b in range(12)]
    assert max(map(max, means)) > 1 and min(map(min, means)) < -1
    expected = [[0.5 + (i + 1) * min(max(m, -1), 1) for i, m in enumerate(mean)] for mean in means]
    assert_close(run.actor.act(raw.obs), expected)


# ---- the update


@pytest.mark.parametrize("update_actor", [False, True])
def test_update_is_the_algorithm_box(update_actor):
    """V on its rows' returns, or π on its rows' weights; the other one keeps still."""
    args = Args(batch_size=4, gamma=0.9, bound_weight=3.0)
    data = tiny_data()
    nets = [make_actor(), make(Value, 3)]
    actor, value = copy.deepcopy(nets)
    returns, weight = torch.randn(12), torch.rand(12)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = awr.update(args, data, *nets, returns, weight, *optimizers, update_actor)

        torch.manual_seed(seed)
        rows = data.draw_rows(4)
        batch = data.rows(rows)
        if update_actor:
            loss = awr.actor_loss(actor, batch, weight[rows], 3.0)
            share = weight[rows].sum() ** 2 / 4 / (weight[rows] ** 2).sum()
            expected, trained, still = dict(actor_loss=loss, effective_share=share), actor, nets[1]
        else:
            loss = awr.value_loss(value, batch, returns[rows], 0.9)
            expected, trained, still = dict(value_loss=loss), value, nets[0]
        grad = step_by_hand(loss, list(trained.parameters()), 0.01)
        for got, want in zip(nets, (actor, value)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(flat_grad(nets[0] if update_actor else nets[1]), grad, 1e-12)
        assert all(p.grad is None for p in still.parameters())
        assert metrics.keys() == expected.keys()
        for name, want in expected.items():
            assert_close(metrics[name], want, 1e-12)


def test_batches_come_from_all_rows():
    data, seen = tiny_data(), set()
    value = make(Value, 3)
    value.register_forward_hook(
        lambda module, inputs, output: seen.update(map(tuple, inputs[0].tolist()))
    )
    awr.update(
        Args(batch_size=400),
        data,
        make_actor(),
        value,
        torch.randn(12),
        torch.rand(12),
        None,
        torch.optim.SGD(value.parameters(), lr=0.0),
        False,
    )
    assert seen == set(map(tuple, data.obs.tolist()))


def test_turns_and_labels(monkeypatch):
    """Rounds of three updates of V and two of π. Returns are made once, before V's turn, with V as
    it then is; weights once, before π's turn, with the V that has just learned."""
    labelled, original = [], awr.td_lambda_returns

    def spy(value, data, *args):
        labelled.append(flat(value))
        return original(value, data, *args)

    monkeypatch.setattr(awr, "td_lambda_returns", spy)
    data = uneven_data()
    run = silent_train(
        monkeypatch,
        awr,
        data,
        steps=12,
        batch_size=4,
        value_steps=3,
        actor_steps=2,
        actor_lr=1e-2,
        beta=0.7,
        max_weight=1.5,
        td_lambda=0.6,
        gamma=0.9,
    )
    assert run.steps_that_moved("value") == [1, 2, 3, 6, 7, 8, 11, 12]
    assert run.steps_that_moved("actor") == [4, 5, 9, 10]
    assert run.steps_that_moved("returns") == [1, 6, 11]
    assert run.steps_that_moved("weight") == [4, 9]
    assert len(labelled) == 5
    for seen, step in zip(labelled, (0, 3, 5, 8, 10)):  # the state after that many updates
        assert torch.equal(seen, run.history[step]["value"])
    value = Value(3)
    torch.nn.utils.vector_to_parameters(run.history[8]["value"], value.parameters())
    assert_close(
        run.history[9]["weight"], awr.weights(awr.advantage(value, data, 0.9, 0.6), 0.7, 1.5)
    )
    torch.nn.utils.vector_to_parameters(run.history[5]["value"], value.parameters())
    assert_close(run.history[6]["returns"], slow_returns(value, data, 0.9, 0.6))


def test_the_optimizers_are_sgd_with_momentum(monkeypatch):
    seen, original = [], awr.update

    def spy(*args, **learned):
        optimizers = [learned["actor_optimizer"], learned["value_optimizer"]]
        seen.append(
            [
                (type(opt), opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"])
                for opt in optimizers
            ]
        )
        return original(*args, **learned)

    monkeypatch.setattr(awr, "update", spy)
    silent_train(
        monkeypatch,
        awr,
        tiny_data(),
        steps=1,
        batch_size=4,
        actor_lr=0.2,
        value_lr=0.3,
        momentum=0.4,
    )
    assert seen == [[(torch.optim.SGD, 0.2, 0.4), (torch.optim.SGD, 0.3, 0.4)]]


@pytest.mark.parametrize(
    "setting, complaint",
    [
        (dict(value_steps=0), "--value-steps must be at least 1"),
        (dict(actor_steps=0), "--actor-steps must be at least 1"),
        (dict(gamma=1.0), "--gamma must be"),  # (1 - γ) divides and multiplies
        (dict(beta=0.0), "--beta must be above 0"),
        (dict(td_lambda=1.1), "--td-lambda must be"),
    ],
)
def test_settings_out_of_range_are_refused(monkeypatch, capsys, setting, complaint):
    with pytest.raises(SystemExit) as stop:
        silent_train(monkeypatch, awr, tiny_data(), **dict(steps=2, batch_size=4) | setting)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


# ---- unlike cloning


def two_modes():
    """One state; half of the data does −0.6, which earns 0, half +0.6, which earns 1."""
    data = tiny_data(64, action_dim=1)
    data.obs.zero_()
    data.next_obs.zero_()
    data.action[:, 0] = torch.tensor([-0.6, 0.6]).repeat(32)
    data.reward[:] = torch.tensor([0.0, 1.0]).repeat(32)
    data.terminated[:] = 1.0
    return data


@pytest.mark.parametrize("seed", range(2))
def test_the_better_of_two_modes(monkeypatch, seed):
    """A clone goes between; AWR, with β = 1, to the means' weighted average 0.6 tanh 1 = 0.457;
    with β = ⅓ to 0.597."""
    monkeypatch.setattr(awr, "HIDDEN", (32, 32))
    modes = {}
    for beta in (1e6, 1.0, 1 / 3):
        torch.manual_seed(seed)
        run = silent_train(
            monkeypatch,
            awr,
            two_modes(),
            steps=400,
            batch_size=64,
            value_steps=50,
            actor_steps=50,
            value_lr=0.1,
            actor_lr=3e-3,
            beta=beta,
        )
        modes[beta] = run.actor.act(torch.zeros(1, 3)).item() - 0.5  # tiny_data's units
    assert abs(modes[1e6]) < 0.15 and abs(modes[1.0] - 0.457) < 0.12 and modes[1 / 3] > 0.5, modes
