"""AlgaeDICE against slow loops, and the duality on tables: residuals that are density ratios, and
where the released mixture of online and target Q leaves them."""
import copy
import math

import algae_dice
import numpy as np
import pytest
import torch
from algae_dice import Actor, Args, Critic
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
from torch import nn


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(algae_dice, "HIDDEN", (7, 6))


ARGS = dict(gamma=0.9, exponent=1.5, initial_weight=0.3, online_share=0.2)


def slow_sample(actor, obs, noise):
    """One action and its log-density, by change of variables; log σ between −5 and 2, reached by
    tanh."""
    out, action, log_prob = slow_mlp(actor.net, obs), [], 0.0
    for i, eps in enumerate(noise.tolist()):
        std = math.exp(-1.5 + 3.5 * math.tanh(out[len(out) // 2 + i]))
        u = out[i] + std * eps
        log_prob -= (
            0.5 * eps**2 + math.log(std * math.sqrt(2 * math.pi)) + math.log(1 - math.tanh(u) ** 2)
        )
        action.append(math.tanh(u))
    return action, log_prob


def slow_residuals(actor, critic, target, alpha, batch, noise, args):
    """(E2), (E3): [k][b]; and log π(ã′|s′) of each transition."""
    residuals, log_probs = [[], []], []
    for b in range(len(noise)):
        action, log_prob = slow_sample(actor, batch.next_obs[b], noise[b])
        log_probs.append(log_prob)
        smaller = min(slow_critic(target, k, batch.next_obs[b], action) for k in range(2))
        for k in range(2):
            online = slow_critic(critic, k, batch.next_obs[b], action)
            mixed = (
                args.online_share * online + (1 - args.online_share) * smaller - alpha * log_prob
            )
            y = float(batch.reward[b]) + (0.0 if batch.terminated[b] else args.gamma * mixed)
            residuals[k].append(y - slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()))
    return residuals, log_probs


def slow_initial(actor, critic, first, noise):
    """Q_k(s₀, ã₀), [k][b]."""
    actions = [slow_sample(actor, first[b], noise[b])[0] for b in range(len(noise))]
    return [
        [slow_critic(critic, k, first[b], actions[b]) for b in range(len(noise))] for k in range(2)
    ]


def networks():
    """The target differs from the critic, so that a test sees which one is used."""
    return [make(Actor, 3, 2), make(Critic, 3, 2), make(Critic, 3, 2)]


# ---- the policy


def test_sample_equals_a_loop(monkeypatch):
    """(E1), with log σ softly bounded; and acting is tanh of the mean in the environment's
    units."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    action, log_prob = algae_dice.sample_action(*actor(obs))
    expected = [slow_sample(actor, obs[b], draws[0][b]) for b in range(4)]
    assert_close(action, [a for a, _ in expected])
    assert_close(log_prob, [lp for _, lp in expected])
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [slow_mlp(actor.net, o)[:2] for o in obs]
    assert_close(
        actor.act(obs), [[0.5 + 2 * math.tanh(x), -1 + 3 * math.tanh(y)] for x, y in means]
    )
    actor.net[-1].bias.data[2:] = torch.tensor([50.0, -50.0])
    assert_close(actor(obs)[1], [[2.0, -5.0]] * 4)


# ---- losses against loops


@pytest.mark.parametrize("exponent", [1.5, 2.0])
def test_critic_loss_equals_a_loop(monkeypatch, exponent):
    """(E2)-(E4) with its gradient, whose part through Q(s′, ã′) is κ of a full one; a sum over
    critics, f with two sides."""
    (actor, critic, target), batch, first = networks(), tiny_batch(), torch.randn(4, 3)
    batch = batch._replace(reward=batch.reward + 2)
    args, draws = Args(**ARGS | dict(exponent=exponent)), record_draws(monkeypatch, "randn_like")
    loss, residual = algae_dice.critic_loss(
        actor, critic, target, torch.tensor(0.4), batch, first, args
    )
    loss.backward()

    def slow():
        e, _ = slow_residuals(actor, critic, target, 0.4, batch, draws[0], args)
        q0 = slow_initial(actor, critic, first, draws[1])
        total = (
            sum(abs(x) ** exponent / exponent / 4 for x in e[0] + e[1])
            + 0.3 * 0.1 * sum(q0[0] + q0[1]) / 4
        )
        return total, sum(e[0] + e[1]) / 8, e

    total, mean, e = slow()
    assert_close(torch.stack([loss, residual]), [total, mean])
    assert min(map(min, e)) < 0 < max(map(max, e)), "both sides of f must have work"
    for k in range(2):
        parameter = critic.layers[-1].bias
        # a view: what the finite difference moves is the critic's own
        part = nn.Parameter(parameter.data[k, 0])
        part.grad = parameter.grad[k, 0]
        assert_gradient(part, lambda: slow()[0])
    part = nn.Parameter(critic.layers[0].weight.data[0, :, 0])
    part.grad = critic.layers[0].weight.grad[0, :, 0]
    assert_gradient(part, lambda: slow()[0])
    assert not residual.requires_grad and all(p.grad is None for p in actor.parameters())


def test_actor_loss_equals_a_loop(monkeypatch):
    """(E6): the loss, the weight and what else it reports; and the gradient of the loop with its
    weights held still: no second derivative of f, nothing where e < 0; through ã′, log π and ã₀,
    through Q and Q̄ alike."""
    (actor, critic, target), batch, first = (
        networks(),
        tiny_batch((0, 1, 0, 0, 0, 0)),
        torch.randn(6, 3),
    )
    batch = batch._replace(reward=batch.reward + 1.5)
    args, draws = Args(**ARGS), record_draws(monkeypatch, "randn_like")
    loss, log_prob, weight, q_initial = algae_dice.actor_loss(
        actor, critic, target, torch.tensor(0.4), batch, first, args
    )
    loss.backward()

    def slow(weights=None):
        e, log_probs = slow_residuals(actor, critic, target, 0.4, batch, draws[0], args)
        weights = weights or [[max(x, 0) ** 0.5 for x in e[k]] for k in range(2)]
        q0 = slow_initial(actor, critic, first, draws[1])
        total = (
            sum(w * x for k in range(2) for w, x in zip(weights[k], e[k])) / 6
            + 0.3 * 0.1 * sum(q0[0] + q0[1]) / 6
        )
        return (
            -total / 2 + 1e-4 * slow_penalty(actor.net),
            weights,
            log_probs,
            sum(q0[0] + q0[1]) / 12,
        )

    total, weights, log_probs, q0 = slow()
    assert_close(
        torch.stack([loss, weight, q_initial]), [total, sum(weights[0] + weights[1]) / 12 / 0.3, q0]
    )
    assert_close(log_prob, log_probs)
    alive = [w for k in range(2) for b, w in enumerate(weights[k]) if b != 1]
    assert 0.0 in alive and max(alive) > 0, (
        "some residuals of transitions that go on are negative, some not"
    )
    assert_gradient(actor.net[-1].bias, lambda: slow(weights)[0])
    held, moving = slow(weights), slow()
    actor.net[-1].bias.data[0] += 1e-3
    assert abs((slow(weights)[0] - held[0]) / (slow()[0] - moving[0]) - 1) > 0.1, (
        "holding the weights still matters here"
    )
    assert not any(part.requires_grad for part in (log_prob, weight, q_initial))


def slow_penalty(net):
    total = 0.0
    for layer in net:
        rows = layer.weight.tolist() if isinstance(layer, nn.Linear) else []
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                total += sum(x * y for x, y in zip(one, other)) ** 2 if i != j else 0.0
    return total


def test_orthogonal_penalty():
    """(E5) equals a loop; orthogonal rows cost nothing, of whatever length."""
    net = make(Actor, 3, 2).net
    assert_close(algae_dice.orthogonal_penalty(net), slow_penalty(net))
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].weight.data = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))[:3]
    assert algae_dice.orthogonal_penalty(net) == 0
    # rows (1, ½, 0, 0), (0, 2, 0, 0): their product is 1, counted twice
    net[0].weight.data[0, 1] = 0.5
    assert_close(algae_dice.orthogonal_penalty(net), 2.0)


def test_entropy_coef_loss_equals_its_formula():
    """(E7), whose gradient on log α is the loss itself: α is learned, by its logarithm."""
    log_alpha = torch.tensor(0.7, requires_grad=True)
    loss = algae_dice.entropy_coef_loss(log_alpha.exp(), torch.tensor([1.0, 2.0, 6.0]), -2.0)
    loss.backward()
    assert_close(torch.stack([loss, log_alpha.grad]), [-math.exp(0.7)] * 2)


@pytest.mark.parametrize("log_std, direction", [(0.3, -1), (-3.0, 1)])
def test_entropy_coef_steers_the_entropy(log_std, direction):
    """A broad policy's entropy is above −dim(A): α falls. A narrow one's is below: α rises."""
    data, (actor, critic, target) = tiny_data(), networks()
    for parameter in actor.parameters():
        parameter.data.zero_()
    actor.net[-1].bias.data[2:] = log_std
    log_alpha = torch.tensor(-0.5, requires_grad=True)
    metrics = algae_dice.update(
        Args(batch_size=12),
        data,
        algae_dice.first_obs(data),
        actor,
        critic,
        target,
        log_alpha,
        *sgd(actor, critic, log_alpha),
        update_actor=True,
    )
    assert torch.sign(metrics["entropy"] + 2) == -direction, "the test's own premise"
    assert np.sign(log_alpha.item() + 0.5) == direction


# ---- f, f′ and the residual


def given_residuals(values, args):
    """Both losses where γ = 0 makes e = r − Q and Q = 0."""
    batch = tiny_batch([0.0] * len(values))._replace(reward=torch.tensor(values))
    actor = make(Actor, 3, 2)

    def zero(obs, action):
        return torch.zeros(2, len(obs))

    common = actor, zero, zero, torch.tensor(0.0), batch, torch.randn(5, 3), args
    penalty = 1e-4 * algae_dice.orthogonal_penalty(actor.net)
    pi_loss, _, weight, _ = algae_dice.actor_loss(*common)
    return algae_dice.critic_loss(*common)[0], pi_loss - penalty, weight


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0])
def test_f_has_two_sides_and_its_derivative_one(exponent):
    """Critic: f(−e) = f(e). Actor: f′(e) is e^{p−1} for e > 0, and 0 for e < 0. Sums over critics
    there, means here."""
    args = Args(gamma=0.0, exponent=exponent, initial_weight=0.5)
    q_loss, pi_loss, weight = given_residuals([2.0], args)
    expected = [2 * 2**exponent / exponent, -(2**exponent), 2 ** (exponent - 1) / 0.5]
    assert_close(torch.stack([q_loss, pi_loss, weight]), expected)
    negative = given_residuals([-2.0], args)
    assert_close(torch.stack(negative), [q_loss, 0.0, 0.0])
    assert_close(given_residuals([2.0, -2.0], args)[1], pi_loss / 2)


def test_the_weight_is_bounded():
    """f′(e) of e = 10⁸ is that of 10⁶."""
    assert_close(given_residuals([1e8], Args(gamma=0.0, initial_weight=1.0))[2], 1e3)


def test_the_mask_stops_the_bootstrap_where_the_task_is_over_and_only_there():
    """1 − d: at a termination e = r − Q(s, a) whatever s′, α and κ; elsewhere (also at a time
    limit) all of s′ counts."""
    (actor, critic, target), batch = networks(), tiny_batch((1, 0, 1, 0))
    q = critic(batch.obs, batch.action)
    for share, alpha in ((0.05, 0.0), (1.0, 3.0)):
        args = Args(gamma=0.9, online_share=share)
        action, log_prob = algae_dice.sample_action(*actor(torch.randn(4, 3)))
        e = algae_dice.bellman_residual(
            critic, target, torch.tensor(alpha), batch, action, log_prob, args
        )
        mixed = algae_dice.mix_with_target(critic, target, batch.next_obs, action, share)
        assert_close(e[:, [0, 2]], (batch.reward - q)[:, [0, 2]])
        assert_close(e[:, [1, 3]], (batch.reward + 0.9 * (mixed - alpha * log_prob) - q)[:, [1, 3]])


def test_the_mixture_takes_the_minimum_of_the_targets_and_each_critics_own():
    """0.05 Q_k + 0.95 min_j Q̄_j, per transition; κ = 1 has no target in it."""
    online = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    target = torch.tensor([[10.0, 30.0], [20.0, -10.0]])
    mixed = algae_dice.mix_with_target(lambda *_: online, lambda *_: target, None, None, 0.05)
    assert_close(mixed, [[0.05 + 9.5, 0.25 - 9.5], [0.15 + 9.5, 0.1 - 9.5]])
    assert torch.equal(
        algae_dice.mix_with_target(lambda *_: online, lambda *_: target, None, None, 1.0), online
    )


def test_broadcasting_is_refused():
    """A reward (B, 1) would make residuals of every pair of transitions."""
    (actor, critic, target), batch = networks(), tiny_batch()
    with pytest.raises(AssertionError):
        algae_dice.critic_loss(
            actor,
            critic,
            target,
            torch.tensor(0.0),
            batch._replace(reward=batch.reward[:, None]),
            torch.randn(4, 3),
            Args(),
        )


# ---- fixed points on tables: what the residual is


def only_action(obs):
    """A policy whose action a table doesn't look at."""
    return torch.zeros(len(obs), 1), torch.zeros(len(obs), 1)


def minimise(loss_of, table, quadratic):
    """The minimiser of a loss over a table of Q values: one Newton step where the loss is a square,
    else L-BFGS."""
    if quadratic:
        gradient = torch.autograd.functional.jacobian(loss_of, table).flatten()
        hessian = torch.autograd.functional.hessian(loss_of, table).view(len(gradient), -1)
        return table - torch.linalg.solve(hessian, gradient).view_as(table)
    table = table.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=2000,
        max_eval=4000,
        tolerance_grad=1e-14,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(table)
        loss.backward()
        return loss

    optimizer.step(closure)
    return table.detach()


def solve(rows, next_row, reward, terminated, first, args, rounds=1):
    """The minimum of critic_loss over a table (K = 2, states); `rounds` times, each with the last
    one's Q as the target. Rows are transitions: a state's number, the next one's, what it pays.
    Returns Q and the residuals, (states,) each, and the least loss of one critic."""
    as_obs = lambda numbers: torch.tensor(numbers, dtype=torch.float64)[:, None]
    batch = tiny_batch(terminated)._replace(
        obs=as_obs(rows), next_obs=as_obs(next_row), reward=torch.tensor(reward)
    )
    n = max(rows + next_row) + 1
    table, target = torch.randn(2, n), torch.zeros(2, n)
    read = lambda values: lambda obs, action: values[:, obs[:, 0].long()]
    zero = torch.tensor(0.0)
    for _ in range(rounds):
        loss_of = lambda q: algae_dice.critic_loss(
            only_action, read(q), read(target), zero, batch, as_obs(first), args
        )[0]
        target = table = minimise(loss_of, table, quadratic=args.exponent == 2)
    action, log_prob = algae_dice.sample_action(*only_action(batch.obs))
    e = algae_dice.bellman_residual(read(target), read(target), zero, batch, action, log_prob, args)
    assert_close(target[0], target[1], 1e-4)
    residuals = torch.zeros(n)
    residuals[torch.tensor(rows)] = e[0].detach()
    return target[0], residuals, loss_of(target) / 2


RING = dict(rows=[0, 1, 2, 3], next_row=[1, 2, 3, 0], terminated=[0.0] * 4, first=[0, 1, 2, 3])


def ring_values(reward, gamma):
    """Q^π of the ring, by summing rewards."""
    return [sum(gamma**t * reward[(s + t) % 4] for t in range(2000)) for s in range(4)]


@pytest.mark.parametrize("exponent, residual", [(2.0, 0.01), (1.5, 1e-4)])
def test_on_policy_the_residual_is_constant(exponent, residual):
    """d^D = d^π on a ring of four states, full gradient: e = w^{1/(p−1)} everywhere and Q = Q^π − e
    / (1 − γ)."""
    reward = [1.0, -0.5, 0.3, 2.0]
    args = Args(gamma=0.9, exponent=exponent, initial_weight=0.01, online_share=1.0)
    q, e, _ = solve(reward=reward, args=args, **RING)
    assert_close(e / residual, [1.0] * 4, 1e-3)
    assert_close(q, [value - 10 * residual for value in ring_values(reward, 0.9)], 1e-5)


def test_without_weight_on_the_start_it_is_policy_evaluation():
    """w → 0: e = 0 and Q = Q^π, whatever the data's distribution (here one state has five rows of
    eight)."""
    reward = [1.0, -0.5, 0.3, 2.0]
    extra = dict(
        rows=[0, 1, 2, 3, 2, 2, 2, 2],
        next_row=[1, 2, 3, 0, 3, 3, 3, 3],
        terminated=[0.0] * 8,
        first=[0],
    )
    args = Args(gamma=0.9, exponent=2.0, initial_weight=1e-9, online_share=1.0)
    q, e, _ = solve(reward=[reward[s] for s in extra["rows"]], args=args, **extra)
    assert_close(e, [0.0] * 4, 1e-6)
    assert_close(q, ring_values(reward, 0.9), 1e-5)


@pytest.mark.parametrize("exponent", [1.5, 2.0])
def test_off_policy_the_residual_is_the_density_ratio(exponent):
    """Start in 0, go to 1, to 2, stay: d^π = (½, ¼, ¼) with γ = ½. The data has the states 1 : 2 :
    5 times; at rest f′(e) = w d^π / d^D, so the mean of reward by these weights is E_{d^π}[r] = (1
    − γ) Q^π(0). No gap between the two problems: the least loss is w (E_{d^π}[r] − λ E_D[(d^π /
    d^D)^q] / q), with w = λ^{p−1}."""
    rows, reward = [0, 1, 1, 2, 2, 2, 2, 2], torch.tensor([3.0, -1.0, 2.0])
    args = Args(gamma=0.5, exponent=exponent, initial_weight=0.2, online_share=1.0)
    _, e, least = solve(rows, [1, 2, 2, 2, 2, 2, 2, 2], reward[rows].tolist(), [0.0] * 8, [0], args)
    ratio = e.pow(exponent - 1) / 0.2
    assert_close(ratio, [0.5 / (1 / 8), 0.25 / (2 / 8), 0.25 / (5 / 8)], 1e-5)
    assert_close((ratio * reward)[rows].mean(), 0.5 * (3 + 0.5 * (-1 + 0.5 * 2 / 0.5)), 1e-5)
    q, price = exponent / (exponent - 1), 0.2 ** (1 / (exponent - 1))
    spread = (4**q + 2 * 1**q + 5 * 0.4**q) / 8  # E_D of the ratio's q-th power, the ratio as above
    assert_close(least / 0.2, 1.75 - price * spread / q, 1e-5)


def test_a_termination_ends_what_the_policy_visits():
    """The same with 2 → 2 a termination: d^π = (½, ¼, ⅛), the rest is nowhere; Q(2) is r less its
    residual alone."""
    rows, reward = [0, 1, 1, 2, 2, 2, 2, 2], torch.tensor([3.0, -1.0, 2.0])
    args = Args(gamma=0.5, exponent=2.0, initial_weight=0.2, online_share=1.0)
    q, e, _ = solve(
        rows, [1, 2, 2, 2, 2, 2, 2, 2], reward[rows].tolist(), [0.0] * 3 + [1.0] * 5, [0], args
    )
    assert_close(e / 0.2, [0.5 / (1 / 8), 0.25 / (2 / 8), 0.125 / (5 / 8)], 1e-6)
    assert_close(q[2], 2.0 - 0.2 * 0.125 / (5 / 8), 1e-6)


def test_the_released_mixture_has_the_mass_of_its_first_step():
    """κ = 0.05, γ = 0.9, p = 2: the mean residual is w (1 − γ) / (1 − κγ) = 0.0010471, not w =
    0.01, and where the start is known it is w (1 − γ) Σ_t (κγ)^t p_t / d^D: the last of four states
    gets (κγ)³ of the first one's."""
    reward = [1.0, -0.5, 0.3, 2.0]
    args = Args(gamma=0.9, exponent=2.0, initial_weight=0.01, online_share=0.05)
    q, e, _ = solve(reward=reward, args=args, rounds=150, **RING)
    assert_close(e / 0.0010471204, [1.0] * 4, 1e-3)
    assert_close(q, [value - 0.010471204 for value in ring_values(reward, 0.9)], 1e-5)
    _, e, _ = solve(reward=reward, args=args, rounds=150, **RING | dict(first=[0]))
    visits = [0.045**t / (1 - 0.045**4) for t in range(4)]
    assert_close(e / 0.004, visits, 1e-4)


def test_the_upside_down_mask_would_forget_the_future():
    """No terminations: a two-state loop has Q^π, up to w. With the flag in place of 1 − flag (γ(1 −
    1) = 0) Q = r."""
    args = Args(gamma=0.9, exponent=2.0, initial_weight=1e-6, online_share=1.0)
    loop = dict(rows=[0, 1], next_row=[1, 0], reward=[1.0, 0.0], first=[0, 1], args=args)
    q, *_ = solve(terminated=[0.0, 0.0], **loop)
    assert_close(q, [1 / (1 - 0.81), 0.9 / (1 - 0.81)], 1e-4)
    q, *_ = solve(terminated=[1.0, 1.0], **loop)
    assert_close(q, [1.0, 0.0], 1e-4)


def test_bandit(monkeypatch):
    """One state, two actions, γ = 0, behaviour (¾, ¼), policy (0.3, 0.7): f′(e) / w = π / β, and
    weighs the data's rewards (2 and −1) to the policy's mean, −0.1. The policy is the file's
    Gaussian, fed ten quantiles of its noise."""
    quantiles = torch.special.ndtri((torch.arange(10) + 0.5) / 10)[:, None]
    monkeypatch.setattr(
        torch,
        "randn_like",
        lambda like: quantiles[: len(like)] if len(like) == 10 else torch.zeros_like(like),
    )
    shift = torch.special.ndtri(torch.tensor(0.7))  # P(u > 0) = 0.7
    reward = torch.tensor([2.0, -1.0])
    args = Args(gamma=0.0, exponent=2.0, initial_weight=0.01, online_share=1.0)
    batch = tiny_batch([0.0] * 4, action_dim=1)._replace(
        action=torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]]), reward=reward[[0, 0, 0, 1]])
    policy = lambda obs: (shift.expand(len(obs), 1), torch.zeros(len(obs), 1))

    def loss_of(table):
        read = lambda obs, action: table[:, (action[:, 0] > 0).long()]
        return algae_dice.critic_loss(
            policy, read, read, torch.tensor(0.0), batch, torch.zeros(10, 3), args
        )[0]

    e = reward - minimise(loss_of, torch.randn(2, 2), quadratic=True)[0]
    assert_close(e / 0.01, [0.3 / 0.75, 0.7 / 0.25], 1e-6)
    assert_close((torch.tensor([0.75, 0.25]) * e / 0.01 * reward).sum(), 0.3 * 2 - 0.7, 1e-6)


# ---- first observations


def test_s0_is_the_first_of_each_episode():
    """tiny_data has episodes of rows 0-3 (a termination), 4-7 and 8-11 (time limits)."""
    data = tiny_data()
    assert torch.equal(algae_dice.first_obs(data), data.obs[[0, 4, 8]])


def test_s0_is_drawn_from_the_episodes_starts(monkeypatch):
    """In each update of a training: all of them turn up, and nothing else."""
    data, seen, real = tiny_data(), [], algae_dice.critic_loss
    monkeypatch.setattr(
        algae_dice, "critic_loss", lambda *args: seen.append(args[5]) or real(*args)
    )
    silent_train(monkeypatch, algae_dice, data, steps=3, batch_size=64)
    starts = data.obs[[0, 4, 8]]
    assert [len(initial_obs) for initial_obs in seen] == [64] * 3
    assert all(
        set(map(tuple, initial_obs.tolist())) == set(map(tuple, starts.tolist()))
        for initial_obs in seen
    )


# ---- the update


def sgd(actor, critic, log_alpha, lr=0.01):
    return [
        torch.optim.SGD(part, lr=lr)
        for part in (actor.parameters(), critic.parameters(), [log_alpha])
    ]


@pytest.mark.parametrize("update_actor", [False, True])
def test_update_is_the_algorithm_box(update_actor):
    """Q; in its turn π on the new Q, with samples of its own, then α on these, each with the old α;
    then (E8), exactly."""
    args = Args(batch_size=4, target_rate=0.3, **ARGS)
    data, nets = tiny_data(), [*networks(), torch.tensor(-0.5, requires_grad=True)]
    actor, critic, target, log_alpha = copy.deepcopy(nets)
    optimizers, first = sgd(nets[0], nets[1], nets[3]), algae_dice.first_obs(data)
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = algae_dice.update(
            args, data, first, *nets, *optimizers, update_actor=update_actor
        )

        torch.manual_seed(seed)
        batch, alpha = data.sample(4), log_alpha.detach().exp()
        initial_obs = first[torch.randint(3, (4,))]
        q_loss, residual = algae_dice.critic_loss(
            actor, critic, target, alpha, batch, initial_obs, args
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        expected = dict(critic_loss=q_loss, residual=residual)
        if update_actor:
            loss, log_prob, weight, q0 = algae_dice.actor_loss(
                actor, critic, target, alpha, batch, initial_obs, args
            )
            step_by_hand(loss, list(actor.parameters()), 0.01)
            log_alpha.data += 0.01 * alpha * (log_prob.mean() - 2)
            for t, o in zip(target.parameters(), critic.parameters()):
                t.data = 0.7 * t.data + 0.3 * o.data
            expected |= dict(
                weight=weight, q_initial=q0, entropy=-log_prob.mean(), entropy_coef=alpha
            )
        for got, want in zip(nets[:3], (actor, critic, target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(nets[3], log_alpha, 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)
    assert all(p.grad is None for p in nets[2].parameters())


@pytest.mark.parametrize(
    "setting, still",
    [("actor_lr", "actor"), ("critic_lr", "critic"), ("entropy_lr", "log_entropy_coef")],
)
def test_train_delays_actor_alpha_and_targets(monkeypatch, setting, still):
    """Six updates with policy_delay 2: six of the critic, three of the rest; each with its own
    learning rate; α = 1 at first, targets as copies."""
    run = silent_train(
        monkeypatch, algae_dice, tiny_data(), steps=6, batch_size=4, **{setting: 0.0}
    )
    for name, steps in (
        ("critic", [1, 2, 3, 4, 5, 6]),
        ("actor", [2, 4, 6]),
        ("log_entropy_coef", [2, 4, 6]),
    ):
        assert run.steps_that_moved(name) == ([] if name == still else steps)
    assert run.steps_that_moved("critic_target") == ([] if still == "critic" else [2, 4, 6])
    assert (
        torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
        and run.history[0]["log_entropy_coef"] == 0
    )


@pytest.mark.parametrize(
    "setting",
    [dict(exponent=1.0), dict(gamma=1.0), dict(initial_weight=0.0), dict(online_share=1.5)],
)
def test_settings_without_meaning_are_refused(setting, capsys):
    with pytest.raises(SystemExit) as stop:
        algae_dice.train(Args(**setting))
    assert stop.value.code == 2 and next(iter(setting)).replace("_", "-") in capsys.readouterr().err


# ---- on- and off-policy policy gradients agree


def test_the_actors_gradient_is_the_on_policy_gradient(monkeypatch):
    """A deterministic two-step task: reward a in state 0, −a² in state 1, then over; π(0) = x, π(1)
    = y, data's actions differ from both in density only. With exact Q of the full objective and
    tiny w, the gradient of L_π is −w times that of (1 − γ) J = (1 − γ)(x + γ(−y²)): at s₀ through
    ã₀, and at s′ with the weight of having come there."""
    x, y, gamma, w = 0.3, 0.5, 0.5, 1e-7
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # a policy without noise
    monkeypatch.setattr(algae_dice, "ORTHOGONAL_WEIGHT", 0.0)
    u = torch.atanh(torch.tensor([x, y])).requires_grad_()
    policy = lambda obs: (u[obs[:, :1].long()], torch.full((len(obs), 1), -5.0))
    policy.net = nn.Sequential(nn.Linear(1, 1))  # for the penalty, of weight 0
    # data: each state once, with π's action; so d^D = (½, ½), d^π = (½, ¼)
    batch = tiny_batch([0.0, 1.0], obs_dim=1, action_dim=1)._replace(
        obs=torch.tensor([[0.0], [1.0]]),
        action=torch.tensor([[x], [y]]),
        reward=torch.tensor([x, -(y**2)]),
        next_obs=torch.tensor([[1.0], [0.0]]),
    )
    args = Args(gamma=gamma, exponent=2.0, initial_weight=w, online_share=1.0)
    e = w * torch.tensor([0.5 / 0.5, 0.25 / 0.5])  # f′(e) = w d^π / d^D with p = 2

    def q(obs, action):
        """Q^π − the discounted e: in state 1 it is −a² − e_1; in state 0, a + γ Q(1, y) − e_0."""
        in_one = obs[:, 0]
        value = torch.where(
            in_one > 0, -(action[:, 0] ** 2) - e[1], action[:, 0] + gamma * (-(y**2) - e[1]) - e[0]
        )
        return value.expand(2, -1)

    loss, _, weight, _ = algae_dice.actor_loss(
        policy, q, q, torch.tensor(0.0), batch, torch.tensor([[0.0]]), args
    )
    loss.backward()
    assert_close(weight, 0.75, 1e-6)
    # dJ/du, by the chain rule of tanh
    on_policy = torch.tensor([1 - x**2, gamma * -2 * y * (1 - y**2)]) * (1 - gamma)
    assert_close(u.grad / -w, on_policy, 1e-6)
