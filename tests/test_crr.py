"""CRR against slow loops, both of its weights, and what tells it from cloning and from SAC."""
import copy
import math

import crr
import pytest
import sac
import torch
from crr import Actor, Args
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    record_draws,
    silent_train,
    slow_mlp,
    slow_normed_critic,
    step_by_hand,
    tiny_batch,
    tiny_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(crr, "HIDDEN", (7, 6))


def make_actor():
    """With σ near 1, so that samples leave the box."""
    actor = make(Actor, 3, 2)
    actor.log_std.data[:] = torch.tensor([-0.2, 0.3])
    return actor


def make_critic():
    """With norms that do something."""
    critic = make(crr.Critic, 3, 2)
    for norm in critic.norms:
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    return critic


def slow_min(critic, obs, action):
    return min(slow_normed_critic(critic, k, obs, action) for k in range(2))


def slow_policy(actor, obs):
    """Mean and σ, the latter between e⁻⁵ and e²."""
    mean = [math.tanh(u) for u in slow_mlp(actor.net, obs)]
    return mean, [math.exp(min(max(log_std, -5.0), 2.0)) for log_std in actor.log_std.tolist()]


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


# ---- each function against a loop over samples


def test_sample_clipped_equals_a_loop(monkeypatch):
    """(E1): noise of its own for each observation and dimension, clipped to the box on both
    sides."""
    actor, obs, draws = make_actor(), torch.randn(16, 3), record_draws(monkeypatch, "randn_like")
    action = crr.sample_clipped(*actor(obs))
    assert_close(action, [slow_sample(actor, obs[b], draws[0][b]) for b in range(16)])
    assert draws[0].shape == (16, 2) and action.min() == -1 and action.max() == 1


def test_td_target_equals_a_loop(monkeypatch):
    """(E2): one clipped action of the policy; nothing after a termination."""
    actor, critic, batch, expected = make_actor(), make_critic(), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    y = crr.td_target(actor, critic, batch, 0.9)
    for b in range(4):
        q = slow_min(critic, batch.next_obs[b], slow_sample(actor, batch.next_obs[b], draws[0][b]))
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else q)))
    assert_close(y, expected)
    assert not y.requires_grad


def test_advantage_equals_a_loop(monkeypatch):
    """(E3): minus the mean over N actions, each drawn on its own at that observation."""
    actor, critic, batch, expected = make_actor(), make_critic(), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    adv = crr.advantage(actor, critic, batch, 3)
    for b in range(4):
        samples = [slow_sample(actor, batch.obs[b], draws[0][b, j]) for j in range(3)]
        mean = sum(slow_min(critic, batch.obs[b], sample) for sample in samples) / 3
        expected.append(slow_min(critic, batch.obs[b], batch.action[b].tolist()) - mean)
    assert draws[0].shape == (4, 3, 2)
    assert_close(adv, expected)
    assert not adv.requires_grad


def test_weights_equal_a_loop():
    """(E4), both kinds."""
    adv = torch.tensor([0.4, -0.3, 3.0, 0.0])
    exp = crr.weights(adv, Args(beta=0.7, max_weight=5.0))
    assert_close(exp, [min(math.exp(a / 0.7), 5.0) for a in adv.tolist()])
    assert_close(crr.weights(adv, Args(weighting="binary")), [1.0, 0.0, 1.0, 0.0])


def test_actor_loss_equals_a_loop():
    """(E5), and its gradient, through μ and through σ."""
    actor, batch, weight = make_actor(), tiny_batch(), torch.tensor([0.1, 7.0, 1.0, 0.5])
    loss = crr.actor_loss(actor, batch, weight)
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


def test_critic_loss_equals_a_loop():
    """(E6): the mean over transitions of the squared error."""
    critic, batch, y = make_critic(), tiny_batch(), torch.randn(4)
    q = [
        [slow_normed_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = crr.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(map(sum, q)) / 8)


def test_losses_refuse_columns():
    """(B, 1) where (B,) is meant would silently compare every transition with every other."""
    batch, column = tiny_batch(), torch.ones(4, 1)
    for loss in (
        lambda: crr.actor_loss(Actor(3, 2), batch, column),
        lambda: crr.critic_loss(make_critic(), batch, column),
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
    """Where the task is over, y is the reward whatever s′ and γ; elsewhere γ and Q count."""
    actor, critic, batch = make_actor(), make_critic(), tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        assert torch.equal(
            crr.td_target(actor, critic, batch._replace(next_obs=torch.randn(4, 3)), gamma),
            batch.reward,
        )
    q = torch.tensor([[1.0, 5.0, -2.0, 4.0]])
    y = crr.td_target(actor, lambda obs, action: q, batch._replace(terminated=torch.zeros(4)), 0.5)
    assert_close(y - batch.reward, [0.5, 2.5, -1.0, 2.0])


def test_each_q_learns_its_own_target():
    """γ = 0, rewards 0 and 10: Q goes to 0 and 10. Where a column broadcasts (as in acme's JAX
    version), both go to 5."""
    batch = tiny_batch((0, 0))._replace(reward=torch.tensor([0.0, 10.0]))
    table = torch.zeros(1, 2, requires_grad=True)
    for _ in range(100):
        y = crr.td_target(make_actor(), lambda obs, action: table, batch, 0.0)
        crr.critic_loss(lambda obs, action: table, batch, y)[0].backward()
        table.data -= 0.5 * table.grad
        table.grad = None
    assert_close(table, [[0.0, 10.0]])


# ---- the advantage and its weights


def test_known_advantage_and_weights(monkeypatch):
    """Q(s, a) = a, four samples −1, 0, 1, 2: a = 1 is ½ above their mean, so counts e^½ = 1.6487,
    or 1."""
    monkeypatch.setattr(
        crr, "sample_clipped", lambda mean, log_std: torch.tensor([[[-1.0], [0.0], [1.0], [2.0]]])
    )
    batch = tiny_batch((0,), action_dim=1)._replace(action=torch.ones(1, 1))
    adv = crr.advantage(make(Actor, 3, 1), lambda obs, action: action.T, batch, 4)
    assert_close(adv, [0.5])
    assert_close(crr.weights(adv, Args()), [1.6487], 1e-4)
    assert_close(crr.weights(adv, Args(weighting="binary")), [1.0])


@pytest.mark.parametrize("weighting", ["exp", "binary"])
def test_a_constant_added_to_q_changes_nothing(weighting):
    """Neither the advantage nor, then, weights and loss."""
    actor, critic, batch, results = make_actor(), make_critic(), tiny_batch(), []
    for _ in range(2):
        torch.manual_seed(1)
        adv = crr.advantage(actor, critic, batch, 4)
        weight = crr.weights(adv, Args(weighting=weighting))
        results.append(torch.cat([adv, weight, crr.actor_loss(actor, batch, weight)[None]]))
        critic.layers[-1].bias.data += 123.0
    assert_close(*results)


def test_caps():
    """At Â/β = ln 20 = 2.9957 the weight reaches 20 and stays there, also where exp overflows.
    Binary: a tie counts 0."""
    adv = torch.tensor([2.9957322735539909, 2.9, 3.0, 1e4, -1e4, 0.0])
    exp = crr.weights(adv, Args())
    assert_close(exp, [20.0, math.exp(2.9), 20.0, 20.0, 0.0, 1.0])
    assert (exp[2:4] == 20).all()
    assert_close(crr.weights(adv, Args(weighting="binary")), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0])


def test_large_beta_is_behaviour_cloning_and_small_beta_a_step():
    """β → ∞: the negative log-likelihood. β → 0: 20 where Â > 0, else 0: binary's, times 20."""
    actor, batch, adv = make_actor(), tiny_batch(), torch.tensor([0.3, -1.0, 0.9, -0.2])
    uniform = crr.weights(adv, Args(beta=1e12))
    assert_close(uniform, torch.ones(4))
    assert_close(crr.actor_loss(actor, batch, uniform),
                 -sum(slow_log_prob(actor, batch.obs[b], batch.action[b]) for b in range(4)) / 4)
    assert_close(crr.weights(adv, Args(beta=1e-3)), 20 * crr.weights(adv, Args(weighting="binary")))


def test_a_batch_without_a_better_action_is_no_error():
    """All weights 0, as may happen with binary: no loss, no gradient, no 0/0."""
    actor = make_actor()
    batch = tiny_batch()
    weight = crr.weights(-torch.ones(4), Args(weighting="binary"))
    loss = crr.actor_loss(actor, batch, weight)
    loss.backward()
    assert loss == 0 and (flat_grad(actor) == 0).all() and crr.effective_share(weight) == 0


def test_density_without_a_jacobian():
    """μ = ½, σ = 1, at a = ½: log 1/√2π = −0.918939."""
    half = torch.full((1, 1), 0.5)
    assert_close(crr.gaussian_log_prob(half, torch.zeros(1, 1), half), [-0.918939], 1e-6)


def test_log_std_is_bounded_and_starts_at_zero():
    """−5 ≤ log σ ≤ 2, at first 0, the same in all states."""
    actor = Actor(3, 2)
    assert_close(actor(torch.randn(4, 3))[1], torch.zeros(4, 2))
    actor.log_std.data[:] = torch.tensor([50.0, -50.0])
    assert_close(actor(torch.randn(4, 3))[1], [[2.0, -5.0]] * 4)


# ---- the update


def networks():
    """Targets that differ show which one is used."""
    return [make_actor(), make_actor(), make_critic(), make_critic()]


def sgd(actor, actor_target, critic, critic_target, lr=0.01):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in (actor, critic)]


@pytest.mark.parametrize("weighting, copy_targets", [("exp", False), ("binary", True)])
def test_update_is_the_algorithm_box(weighting, copy_targets):
    """y from both targets, the advantage from both online networks, neither loss after the other's
    step; then (E7)."""
    args = Args(batch_size=16, gamma=0.9, weighting=weighting, num_samples=3)
    data = tiny_data()
    nets = networks()
    actor, actor_target, critic, critic_target = copy.deepcopy(nets)
    optimizers = sgd(*nets)
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = crr.update(args, data, *nets, *optimizers, copy_targets)

        torch.manual_seed(seed)
        batch = data.sample(16)
        y = crr.td_target(actor_target, critic_target, batch, 0.9)
        adv = crr.advantage(actor, critic, batch, 3)
        weight = adv.exp().clamp(max=20) if weighting == "exp" else (adv > 0) * 1.0
        pi_loss, (q_loss, q_data) = (
            crr.actor_loss(actor, batch, weight),
            crr.critic_loss(critic, batch, y),
        )
        pi_grad = step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        if copy_targets:
            actor_target, critic_target = copy.deepcopy([actor, critic])
        for got, want in zip(nets, (actor, actor_target, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(flat_grad(nets[0]), pi_grad, 1e-12)
        assert_close(flat_grad(nets[2]), q_grad, 1e-12)  # the weights send the critic no gradient
        expected = dict(actor_loss=pi_loss, critic_loss=q_loss, q_data=q_data,
                        effective_share=weight.sum() ** 2 / 16 / (weight**2).sum())
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_copy_weights_copies_once():
    """(E7): equal parameters, which then go their own ways; the online network is left alone."""
    target, online = make_critic(), make_critic()
    before = flat(online)
    crr.copy_weights(target, online)
    assert torch.equal(flat(target), before) and torch.equal(flat(online), before)
    online.layers[0].weight.data += 1.0
    assert torch.equal(flat(target), before)


def test_each_loss_moves_its_own_network_only():
    """The actor's loss: no gradient for the critic; the critic's: none for the actor or the
    targets."""
    batch, (actor, actor_target, critic, critic_target) = tiny_batch(), networks()
    crr.actor_loss(
        actor, batch, crr.weights(crr.advantage(actor, critic, batch, 4), Args())
    ).backward()
    assert all(p.grad is not None for p in actor.parameters())
    actor.zero_grad()
    crr.critic_loss(critic, batch, crr.td_target(actor_target, critic_target, batch, 0.9))[
        0
    ].backward()
    assert all(p.grad is not None for p in critic.parameters())
    assert all(
        p.grad is None for net in (actor, actor_target, critic_target) for p in net.parameters()
    )


@pytest.mark.parametrize("weighting, variant", [("exp", ""), ("binary", "-binary")])
def test_train_renews_the_targets_at_intervals(monkeypatch, weighting, variant):
    """Seven updates with target_every 3: both targets move at 3 and 6, and are copies then. Two
    critics."""
    run = silent_train(
        monkeypatch, crr, tiny_data(), steps=7, batch_size=4, target_every=3, weighting=weighting
    )
    for name in ("actor", "critic"):
        assert len(run.steps_that_moved(name)) >= 6  # binary may leave the actor where it is
        assert run.steps_that_moved(name + "_target") == [3, 6]
        for step in (0, 3, 6):
            assert torch.equal(run.history[step][name], run.history[step][name + "_target"])
    assert run.variant == variant and len(run.state["critic"].layers[0].weight) == 2


# ---- unlike cloning, unlike SAC


def train_on(data, monkeypatch, updates, **args):
    monkeypatch.setattr(crr, "HIDDEN", (32, 32))
    nets = [
        actor := Actor(3, 1),
        copy.deepcopy(actor),
        critic := crr.Critic(3, 1, 1),
        copy.deepcopy(critic),
    ]
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3) for net in (actor, critic)]
    for step in range(1, updates + 1):
        metrics = crr.update(Args(batch_size=32, **args), data, *nets, *optimizers, step % 5 == 0)
    return actor.act(torch.zeros(1, 3)).item(), metrics["q_data"].item()


@pytest.mark.parametrize("seed", range(2))
def test_the_better_of_two_modes(monkeypatch, seed):
    """One state; half of the data does −0.6, which earns 0, half +0.6, which earns 1. A clone goes
    between, CRR to +0.6."""
    modes = {}
    for weighting, beta in (("exp", 1e6), ("exp", 0.2), ("binary", 1.0)):
        torch.manual_seed(seed)
        data = tiny_data(64, action_dim=1)
        data.obs.zero_()
        data.next_obs.zero_()
        data.action[:, 0] = torch.tensor([-0.6, 0.6]).repeat(32)
        data.reward[:] = torch.tensor([0.0, 1.0]).repeat(32)
        data.terminated[:] = 1.0
        modes[beta], _ = train_on(data, monkeypatch, 200, beta=beta, weighting=weighting)
    assert abs(modes[1e6]) < 0.25 and 0.45 < modes[0.2] < 0.7 and 0.45 < modes[1.0] < 0.7, modes


def test_it_stays_where_sac_leaves_the_data(monkeypatch):
    """The corridor of test_cql.py: actions in [−0.2, 0.2] earn r = a for ever, so no data action is
    worth more than 2."""
    torch.manual_seed(0)
    data = tiny_data(256, action_dim=1)
    for column in (data.obs, data.next_obs, data.terminated):
        column.zero_()
    data.action[:, 0] = data.reward[:] = torch.linspace(-0.2, 0.2, 256)
    action, q = train_on(data, monkeypatch, 250, beta=0.1, gamma=0.9)
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
    "setting, value", [("beta", 0.0), ("num_samples", 0), ("target_every", 0), ("max_weight", -1.0)]
)
def test_settings_out_of_range_are_refused(monkeypatch, capsys, setting, value):
    with pytest.raises(SystemExit) as stop:
        silent_train(monkeypatch, crr, tiny_data(), steps=2, **{setting: value})
    assert (
        stop.value.code == 2 and f"--{setting.replace('_', '-')} must be" in capsys.readouterr().err
    )
