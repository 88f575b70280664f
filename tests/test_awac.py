"""AWAC against slow loops, its batch softmax, and what tells it from cloning and from SAC."""
import copy
import math

import awac
import pytest
import sac
import torch
from awac import Actor, Args, Critic
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    record_draws,
    silent_train,
    slow_critic,
    slow_mlp,
    step_by_hand,
    tiny_batch,
    tiny_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(awac, "HIDDEN", (7, 6))
    monkeypatch.setattr(awac, "ACTOR_HIDDEN", (6, 5, 5))


def make_actor():
    """With σ near 1, so that samples leave the box."""
    actor = make(Actor, 3, 2)
    actor.std_logit.data[:] = torch.tensor([3.0, 0.5])
    return actor


def slow_policy(actor, obs):
    """Mean and σ, the latter between e⁻⁶ and 1 by a logistic curve."""
    mean = [math.tanh(u) for u in slow_mlp(actor.net, obs)]
    return mean, [math.exp(-6 + 6 / (1 + math.exp(-logit))) for logit in actor.std_logit.tolist()]


def slow_log_prob(actor, obs, action):
    """log of the product of normal densities."""
    density = 1.0
    for m, std, a in zip(*slow_policy(actor, obs), action.tolist()):
        density *= math.exp(-((a - m) ** 2) / (2 * std**2)) / math.sqrt(2 * math.pi * std**2)
    return math.log(density)


def slow_sample(actor, obs, noise):
    return [
        min(max(m + std * eps, -1.0), 1.0)
        for m, std, eps in zip(*slow_policy(actor, obs), noise.tolist())
    ]


def slow_min_q(critic, obs, action):
    return min(slow_critic(critic, k, obs, action) for k in range(2))


# ---- each function against a loop over samples


def test_sample_clipped_equals_a_loop(monkeypatch):
    """(E1): noise of its own for each observation and dimension, clipped to the box on both
    sides."""
    actor, obs, draws = make_actor(), torch.randn(16, 3), record_draws(monkeypatch, "randn_like")
    action = awac.sample_clipped(*actor(obs))
    assert_close(action, [slow_sample(actor, obs[b], draws[0][b]) for b in range(16)])
    assert draws[0].shape == (16, 2) and action.min() == -1 and action.max() == 1


def test_td_target_equals_a_loop(monkeypatch):
    """(E2): one clipped action of the policy, the smaller critic; nothing after a termination, no
    entropy."""
    actor, critic, batch, expected = make_actor(), make(Critic, 3, 2), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    y = awac.td_target(actor, critic, batch, 0.9)
    for b in range(4):
        q = slow_min_q(
            critic, batch.next_obs[b], slow_sample(actor, batch.next_obs[b], draws[0][b])
        )
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else q)))
    assert_close(y, expected)
    assert not y.requires_grad


def test_advantage_equals_a_loop(monkeypatch):
    """(E3): the minimum over critics of either action on its own, then the difference."""
    actor, critic, batch, expected = make_actor(), make(Critic, 3, 2), tiny_batch([0] * 8), []
    draws, orders = record_draws(monkeypatch, "randn_like"), set()
    adv = awac.advantage(actor, critic, batch)
    for b in range(8):
        sample = slow_sample(actor, batch.obs[b], draws[0][b])
        pairs = [
            [slow_critic(critic, k, batch.obs[b], a) for k in range(2)]
            for a in (batch.action[b].tolist(), sample)
        ]
        orders.add((pairs[0][0] < pairs[0][1]) == (pairs[1][0] < pairs[1][1]))
        expected.append(min(pairs[0]) - min(pairs[1]))
    assert orders == {True, False}, (
        "somewhere the smaller critic must not be the same for both actions"
    )
    assert_close(adv, expected)
    assert not adv.requires_grad


def test_weights_equal_a_loop():
    """(E4): the softmax over the batch, times its size."""
    adv = torch.randn(5)
    total = sum(math.exp(a / 0.7) for a in adv.tolist())
    assert_close(awac.weights(adv, 0.7), [5 * math.exp(a / 0.7) / total for a in adv.tolist()])


def test_actor_loss_equals_a_loop():
    """(E5), and its gradient, through μ and through σ."""
    actor, batch, weight = make_actor(), tiny_batch(), torch.tensor([0.1, 7.0, 1.0, 0.5])
    loss = awac.actor_loss(actor, batch, weight)
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
    assert_gradient(actor.std_logit, slow)


def test_critic_loss_equals_a_loop():
    """(E6): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = awac.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    assert abs(q[0][0] - q[1][0]) > 1e-3


def test_losses_refuse_columns():
    """(B, 1) where (B,) is meant would silently compare every transition with every other."""
    batch, column = tiny_batch(), torch.ones(4, 1)
    for loss in (
        lambda: awac.actor_loss(Actor(3, 2), batch, column),
        lambda: awac.critic_loss(Critic(3, 2), batch, column),
    ):
        with pytest.raises(AssertionError):
            loss()


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh of the network."""
    actor, obs = make_actor(), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [slow_policy(actor, o)[0] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])


# ---- the target


def test_only_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′ and γ; elsewhere each transition takes
    its smaller Q."""
    actor, critic, batch = make_actor(), make(Critic, 3, 2), tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        assert torch.equal(
            awac.td_target(actor, critic, batch._replace(next_obs=torch.randn(4, 3)), gamma),
            batch.reward,
        )
    q = torch.tensor([[1.0, 5.0, -2.0, 4.0], [3.0, 2.0, -1.0, 0.0]])
    y = awac.td_target(actor, lambda obs, action: q, batch._replace(terminated=torch.zeros(4)), 0.5)
    assert_close(y - batch.reward, [0.5, 1.0, -1.0, 0.0])


@pytest.mark.parametrize("logit", [-20.0, 20.0])
def test_no_entropy_in_the_target(logit):
    """Whatever σ and so log π: a constant Q makes y = r + γ Q."""
    actor, batch = make_actor(), tiny_batch([0] * 4)
    actor.std_logit.data[:] = logit
    assert_close(
        awac.td_target(actor, lambda obs, action: torch.full((2, 4), 7.0), batch, 0.5),
        batch.reward + 3.5,
    )


# ---- the weights


def test_known_weights():
    """Two actions, Â = ±1, β = 1: 2 e / (e + 1/e) = 1.7616 and 0.2384. (An exponential with a cap
    has 2.7183 and 0.3679.)"""
    assert_close(awac.weights(torch.tensor([1.0, -1.0]), 1.0), [1.7616, 0.2384], 1e-4)


def test_weights_have_mean_one_and_ignore_a_constant():
    """Also where exp would overflow; what is added to every Â, so to every Q, changes nothing."""
    adv = torch.randn(6)
    for shift in (0.0, 5.0, 1e4):
        assert_close(awac.weights(adv + shift, 2.0).sum(), 6.0)
        assert_close(awac.weights(adv + shift, 2.0), awac.weights(adv, 2.0))


def test_large_beta_is_behaviour_cloning_and_small_beta_the_best_action_alone():
    """β → ∞: the negative log-likelihood. β → 0: all weight on one action, whose share is 1/B."""
    actor, batch, adv = make_actor(), tiny_batch(), torch.tensor([0.3, -1.0, 0.9, 0.2])
    uniform = awac.weights(adv, 1e12)
    assert_close(uniform, torch.ones(4))
    assert_close(awac.actor_loss(actor, batch, uniform),
                 -sum(slow_log_prob(actor, batch.obs[b], batch.action[b]) for b in range(4)) / 4)
    best = awac.weights(adv, 1e-3)
    assert_close(best, [0.0, 0.0, 4.0, 0.0])
    assert_close(awac.effective_share(best), 0.25)
    assert_close(awac.effective_share(uniform), 1.0)


def test_density_without_a_jacobian():
    """μ = ½, σ = 1, at a = ½: log 1/√2π = −0.918939."""
    half = torch.full((1, 1), 0.5)
    assert_close(awac.gaussian_log_prob(half, torch.zeros(1, 1), half), [-0.918939], 1e-6)


def test_std_is_between_its_bounds_and_starts_in_the_middle():
    """−6 ≤ log σ ≤ 0, at first −3, the same in all states."""
    actor = Actor(3, 2)
    assert_close(actor(torch.randn(4, 3))[1], torch.full((4, 2), -3.0))
    actor.std_logit.data[:] = torch.tensor([50.0, -50.0])
    assert_close(actor(torch.randn(4, 3))[1], [[0.0, -6.0]] * 4)


# ---- the update


def networks():
    """The target differs from the critic, so that a test sees which one is used."""
    return [make_actor(), make(Critic, 3, 2), make(Critic, 3, 2)]


def sgd(actor, critic, lr=0.01):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in (actor, critic)]


def test_update_is_the_algorithm_box():
    """y and the weights from the networks before their steps, the advantage from the online
    critics; then (E7), exactly."""
    args = Args(batch_size=4, gamma=0.9, target_rate=0.3, beta=0.7)
    data = tiny_data()
    nets = networks()
    actor, critic, critic_target = copy.deepcopy(nets)
    optimizers = sgd(*nets[:2])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = awac.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch = data.sample(4)
        y = awac.td_target(actor, critic_target, batch, 0.9)
        weight = 4 * torch.softmax(awac.advantage(actor, critic, batch) / 0.7, dim=0)
        pi_loss, (q_loss, q_data) = (
            awac.actor_loss(actor, batch, weight),
            awac.critic_loss(critic, batch, y),
        )
        pi_grad = step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(flat_grad(nets[0]), pi_grad, 1e-12)
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)  # the weights send the critics no gradient
        expected = dict(actor_loss=pi_loss, critic_loss=q_loss, q_data=q_data,
                        effective_share=weight.sum() ** 2 / 4 / (weight**2).sum())
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_each_loss_moves_its_own_network_only():
    """The actor's loss: no gradient for the critics; the critics': none for the actor or the
    target."""
    batch, (actor, critic, critic_target) = tiny_batch(), networks()
    awac.actor_loss(
        actor, batch, awac.weights(awac.advantage(actor, critic, batch), 2.0)
    ).backward()
    assert all(p.grad is not None for p in actor.parameters())
    actor.zero_grad()
    awac.critic_loss(critic, batch, awac.td_target(actor, critic_target, batch, 0.9))[0].backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for net in (actor, critic_target) for p in net.parameters())


def test_train_moves_every_part_each_step(monkeypatch):
    """Actor, critic and target, from a target that starts as a copy."""
    run = silent_train(monkeypatch, awac, tiny_data(), steps=3, batch_size=4)
    for name in ("actor", "critic", "critic_target"):
        assert run.steps_that_moved(name) == [1, 2, 3]
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[3]["critic"], run.history[3]["critic_target"])


def test_only_the_actors_weights_decay(monkeypatch):
    settings, original = [], awac.update

    def spy(*args, **learned):
        optimizers = [learned["actor_optimizer"], learned["critic_optimizer"]]
        settings.append(
            [(opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) for opt in optimizers]
        )
        return original(*args, **learned)

    monkeypatch.setattr(awac, "update", spy)
    silent_train(
        monkeypatch,
        awac,
        tiny_data(),
        steps=1,
        batch_size=4,
        actor_lr=0.2,
        critic_lr=0.3,
        weight_decay=0.4,
    )
    assert settings == [[(0.2, 0.4), (0.3, 0.0)]]


# ---- unlike cloning, unlike SAC


def train_on(data, monkeypatch, updates, **args):
    monkeypatch.setattr(awac, "HIDDEN", (32, 32))
    monkeypatch.setattr(awac, "ACTOR_HIDDEN", (32, 32))
    nets = [Actor(3, 1), critic := Critic(3, 1), copy.deepcopy(critic)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3) for net in nets[:2]]
    for _ in range(updates):
        metrics = awac.update(Args(batch_size=32, **args), data, *nets, *optimizers)
    return nets[0].act(torch.zeros(1, 3)).item(), metrics["q_data"].item()


@pytest.mark.parametrize("seed", range(2))
def test_the_better_of_two_modes(monkeypatch, seed):
    """One state; half of the data does −0.6, which earns 0, half +0.6, which earns 1. A clone goes
    between, AWAC to +0.6."""
    modes = {}
    for beta in (1e6, 0.2):
        torch.manual_seed(seed)
        data = tiny_data(64, action_dim=1)
        data.obs.zero_()
        data.next_obs.zero_()
        data.action[:, 0] = torch.tensor([-0.6, 0.6]).repeat(32)
        data.reward[:] = torch.tensor([0.0, 1.0]).repeat(32)
        data.terminated[:] = 1.0
        modes[beta], _ = train_on(data, monkeypatch, 200, beta=beta)
    assert abs(modes[1e6]) < 0.25 and 0.45 < modes[0.2] < 0.7, modes


def test_it_stays_where_sac_leaves_the_data(monkeypatch):
    """The corridor of test_cql.py: actions in [−0.2, 0.2] earn r = a for ever, so no data action is
    worth more than 2."""
    torch.manual_seed(0)
    data = tiny_data(256, action_dim=1)
    for column in (data.obs, data.next_obs, data.terminated):
        column.zero_()
    data.action[:, 0] = data.reward[:] = torch.linspace(-0.2, 0.2, 256)
    action, q = train_on(data, monkeypatch, 250, beta=0.1, gamma=0.9, target_rate=0.2)
    assert 0.05 < action < 0.25 and q < 2, "above the data's average, 0, and within the data"

    monkeypatch.setattr(sac, "HIDDEN", (32, 32))
    parts = [
        sac.Actor(3, 1),
        critic := sac.Critic(3, 1),
        copy.deepcopy(critic),
        torch.tensor(-5.0, requires_grad=True),
    ]
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3) for net in parts[:2]] + [
        torch.optim.SGD([parts[3]], lr=0.0)
    ]
    for _ in range(200):
        sac.update(sac.Args(batch_size=32, gamma=0.9, target_rate=0.2), data, *parts, *optimizers)
    assert parts[0].act(torch.zeros(1, 3)).item() > 0.9


# ---- settings


@pytest.mark.parametrize(
    "setting, value",
    [("beta", 0.0), ("batch_size", 0), ("weight_decay", -1.0), ("target_rate", 1.1)],
)
def test_settings_out_of_range_are_refused(monkeypatch, capsys, setting, value):
    with pytest.raises(SystemExit) as stop:
        silent_train(monkeypatch, awac, tiny_data(), steps=2, **{setting: value})
    assert (
        stop.value.code == 2 and f"--{setting.replace('_', '-')} must be" in capsys.readouterr().err
    )
