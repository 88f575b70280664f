"""SAC against slow loops, and what is known about its density, its target and its temperature."""
import copy
import math

import numpy as np
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
    silent_train,
    slow_critic,
    slow_mlp,
    slow_sample,
    slow_soft_actor_loss,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from sac import Actor, Args, Critic, sample_action


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(sac, "HIDDEN", (7, 6))


def density(a, mean, std):
    """Of a = tanh(u), u normal: N(u) |du/da|."""
    u = np.arctanh(a)
    return np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi)) / (1 - a**2)


def fix_noise(monkeypatch, noise):
    monkeypatch.setattr(
        torch, "randn_like", lambda like: torch.as_tensor(noise).reshape(like.shape)
    )


# ---- (E1) the density


def test_sample_action_equals_a_loop(monkeypatch):
    """(E1): tanh of a Gaussian, and the change of variables written with 1 − tanh², not with
    softplus."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    action, log_prob = sample_action(*actor(obs))
    expected = [slow_sample(actor, obs[b], draws[0][b], -20.0) for b in range(4)]
    assert_close(action, [a for a, _ in expected])
    assert_close(log_prob, [lp for _, lp in expected])


def test_log_std_is_bounded():
    """Whatever the network says, −20 ≤ log σ ≤ 2, while μ is free."""
    actor = make(Actor, 3, 2)
    actor.net[-1].bias.data += torch.tensor([50.0, 0.0, 50.0, -50.0])
    obs = torch.randn(4, 3)
    mean, log_std = actor(obs)
    assert_close(mean[:, 0], [slow_mlp(actor.net, o)[0] for o in obs])
    assert_close(log_std, [[2.0, -20.0]] * 4)


@pytest.mark.parametrize("noise, expected", [(0.0, -0.918939), (0.5, -0.803710)])
def test_known_densities(monkeypatch, noise, expected):
    """μ = 0, σ = 1: log π at a = 0, and at a = tanh(0.5), where the Jacobian adds 0.240229."""
    fix_noise(monkeypatch, [[noise]])
    action, log_prob = sample_action(torch.zeros(1, 1), torch.zeros(1, 1))
    assert_close(action, [[math.tanh(noise)]])
    assert_close(log_prob, [expected], 1e-6)


def test_density_integrates_to_one(monkeypatch):
    """Over all actions in (−1, 1), for μ = 0.7 and σ = 0.5."""
    a = np.linspace(-1, 1, 20_001)[1:-1]
    fix_noise(monkeypatch, ((np.arctanh(a) - 0.7) / 0.5)[:, None])
    _, log_prob = sample_action(
        torch.full((len(a), 1), 0.7), torch.full((len(a), 1), math.log(0.5))
    )
    assert_close(np.trapezoid(log_prob.exp().numpy(), a), 1.0, 1e-3)


def test_density_far_out_is_finite(monkeypatch):
    """At u = ±50 tanh rounds to ±1 and 1 − tanh² to 0; its logarithm is really log 4 − 100."""
    fix_noise(monkeypatch, [[50.0], [-50.0]])
    _, log_prob = sample_action(torch.zeros(2, 1), torch.zeros(2, 1))
    assert_close(log_prob, [-0.5 * 50**2 - 0.5 * math.log(2 * math.pi) - math.log(4) + 100] * 2)


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh(μ)."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [[math.tanh(u) for u in slow_mlp(actor.net, o)[:2]] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])


# ---- losses against loops


def test_soft_td_target_equals_a_loop(monkeypatch):
    """(E2): one action per next observation, the smaller critic, minus α log π; nothing after a
    termination."""
    actor, critic, batch, expected = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    y = sac.soft_td_target(actor, critic, torch.tensor(0.3), batch, 0.9)
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
    """(E3): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = sac.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    assert abs(q[0][0] - q[1][0]) > 1e-3


def test_critic_loss_refuses_a_column_of_targets():
    """A target (B, 1) would silently compare every Q with every y."""
    with pytest.raises(AssertionError):
        sac.critic_loss(Critic(3, 2), tiny_batch(), torch.randn(4, 1))


def test_actor_loss_equals_a_loop(monkeypatch):
    """(E4), and its gradient against a finite difference of the loop: through the action and
    through log π."""
    actor, critic, obs = make(Actor, 3, 2), make(Critic, 3, 2), torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    loss, *metrics = sac.actor_loss(actor, critic, torch.tensor(0.3), obs)
    loss.backward()

    def slow():
        return slow_soft_actor_loss(actor, critic, 0.3, obs, draws[0], -20.0)

    for got, want in zip((loss, *metrics), slow()):
        assert_close(got, want)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])
    assert not metrics[0].requires_grad and not metrics[1].requires_grad


def test_entropy_coef_loss_equals_a_loop():
    """(E5): −log α times how far log π is above −H̄."""
    log_prob = torch.randn(4)
    expected = sum(-0.7 * (float(lp) - 2.0) for lp in log_prob) / 4
    assert_close(sac.entropy_coef_loss(torch.tensor(0.7), log_prob, -2.0), expected)


# ---- the target


def test_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′, γ and α; the entropy after the end
    doesn't count either."""
    actor = make(Actor, 3, 2)
    critic = make(Critic, 3, 2)
    batch = tiny_batch(terminated=(1, 1, 1, 1))
    for gamma, alpha in ((0.5, 0.0), (0.99, 3.0)):
        y = sac.soft_td_target(
            actor, critic, torch.tensor(alpha), batch._replace(next_obs=torch.randn(4, 3)), gamma
        )
        assert torch.equal(y, batch.reward)


def test_minimum_over_critics_is_per_transition_and_truncation_bootstraps():
    """Each transition takes the smaller of its two values; none is cut off, at a time limit
    neither."""
    q = torch.tensor([[1.0, 5.0, -2.0, 4.0], [3.0, 2.0, -1.0, 0.0]])
    batch = tiny_batch(terminated=(0, 0, 0, 0))
    y = sac.soft_td_target(make(Actor, 3, 2), lambda obs, action: q, torch.tensor(0.0), batch, 0.5)
    assert_close(y - batch.reward, [0.5, 1.0, -1.0, 0.0])


def test_soft_value_of_a_constant_reward(monkeypatch):
    """Frozen policy and α, r = 1 for ever: the target's fixed point is r / (1 − γ) + γ α H / (1 −
    γ)."""
    n, gamma, alpha, mean, std = 2000, 0.9, 0.3, 0.7, 0.5
    # a Gaussian's quantiles: nothing random
    fix_noise(monkeypatch, torch.special.ndtri((torch.arange(n) + 0.5) / n))
    batch = tiny_batch([0.0] * n)._replace(reward=torch.ones(n))
    q = 0.0
    for _ in range(300):
        y = sac.soft_td_target(
            lambda obs: (torch.full((n, 1), mean), torch.full((n, 1), math.log(std))),
            lambda obs, action: torch.full((2, n), q),
            torch.tensor(alpha),
            batch,
            gamma,
        )
        q = y.mean().item()
    a = np.linspace(-1, 1, 20_001)[1:-1]
    p = density(a, mean, std)
    entropy = -np.trapezoid(p * np.log(p + 1e-300), a)
    assert_close(q, (1 + gamma * alpha * entropy) / (1 - gamma), 1e-3)


# ---- the temperature


@pytest.mark.parametrize("log_std, direction", [(0.0, -1), (-5.0, 1)])
def test_temperature_steers_the_entropy(log_std, direction):
    """A broad policy's entropy is above −dim(A): α falls. A narrow one's is below: α rises."""
    args, data, (actor, critic, critic_target, log_alpha) = (
        Args(batch_size=12),
        tiny_data(),
        networks(),
    )
    for parameter in actor.parameters():
        parameter.data.zero_()
    actor.net[-1].bias.data[2:] = log_std
    start = log_alpha.item()
    optimizers = sgd(actor, critic, log_alpha)
    metrics = sac.update(args, data, actor, critic, critic_target, log_alpha, *optimizers)
    assert torch.sign(metrics["entropy"] + 2) == -direction, "the test's own premise"
    assert np.sign(log_alpha.item() - start) == direction
    assert_close(log_alpha.item() - start, 0.01 * (-metrics["entropy"] - 2))


def test_temperature_rests_at_the_target():
    """Entropy equal to H̄: no gradient on α."""
    log_alpha = torch.tensor(0.3, requires_grad=True)
    sac.entropy_coef_loss(log_alpha, torch.tensor([1.0, 3.0]), -2.0).backward()
    assert log_alpha.grad == 0


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
    """Q, then π on the new Q, then α, each with the old α; then (E6), exactly."""
    args, data, nets = Args(batch_size=4, gamma=0.9, target_rate=0.3), tiny_data(), networks()
    actor, critic, critic_target, log_alpha = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = sac.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch, alpha = data.sample(4), log_alpha.detach().exp()
        q_loss, q_data = sac.critic_loss(
            critic, batch, sac.soft_td_target(actor, critic_target, alpha, batch, 0.9)
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, log_prob, q_policy = sac.actor_loss(actor, critic, alpha, batch.obs)
        step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        log_alpha.data += 0.01 * (log_prob.mean() - 2)
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(nets[3], log_alpha, 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)
        expected = dict(
            critic_loss=q_loss,
            q_data=q_data,
            q_policy=q_policy,
            entropy=-log_prob.mean(),
            entropy_coef=alpha,
        )
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_each_loss_moves_its_own_part_only():
    """Critic's loss: no gradient for actor, α or target. Actor's step and α's: none for the critics
    or each other."""
    batch, (actor, critic, critic_target, log_alpha) = tiny_batch(), networks()
    y = sac.soft_td_target(actor, critic_target, log_alpha.exp(), batch, 0.9)
    sac.critic_loss(critic, batch, y)[0].backward()
    assert log_alpha.grad is None and all(
        p.grad is None for net in (actor, critic_target) for p in net.parameters()
    )
    assert all(p.grad is not None for p in critic.parameters())
    loss, log_prob, _ = sac.actor_loss(actor, critic, log_alpha.detach().exp(), batch.obs)
    actor_optimizer, _, entropy_optimizer = sgd(actor, critic, log_alpha)
    critic.zero_grad()
    sac.descend(loss, actor_optimizer)
    after = flat_grad(actor)
    sac.descend(sac.entropy_coef_loss(log_alpha, log_prob, -2), entropy_optimizer)
    assert all(p.grad is None for p in critic.parameters()) and torch.equal(flat_grad(actor), after)
    assert log_alpha.grad is not None


def test_train_moves_every_part_each_step(monkeypatch):
    """Actor, critic, target and α, from a target that starts as a copy and α = 1."""
    run = silent_train(monkeypatch, sac, tiny_data(), steps=3, batch_size=4)
    for name in ("actor", "critic", "critic_target", "log_entropy_coef"):
        assert run.steps_that_moved(name) == [1, 2, 3]
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[3]["critic"], run.history[3]["critic_target"])
    assert run.history[0]["log_entropy_coef"] == 0
