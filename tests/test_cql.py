"""CQL against slow loops, its closed forms on tables, and what it does where SAC goes astray."""
import copy
import math

import cql
import numpy as np
import pytest
import sac
import torch
from cql import Actor, Args, Critic
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


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(cql, "HIDDEN", (7, 6))


# ---- each function against a loop


def test_sample_action_equals_a_loop(monkeypatch):
    """(E1): tanh of a Gaussian, and the change of variables written with 1 − tanh², not with
    softplus."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    action, log_prob = cql.sample_action(*actor(obs))
    expected = [slow_sample(actor, obs[b], draws[0][b], -5.0) for b in range(4)]
    assert_close(action, [a for a, _ in expected])
    assert_close(log_prob, [lp for _, lp in expected])


def test_log_std_is_bounded():
    """Whatever the network says, −5 ≤ log σ ≤ 2."""
    actor = make(Actor, 3, 2)
    actor.net[-1].bias.data[2:] = torch.tensor([50.0, -50.0])
    assert_close(actor(torch.randn(4, 3))[1], [[2.0, -5.0]] * 4)


def test_td_target_equals_a_loop(monkeypatch):
    """(E2): one sampled action per next observation, the smaller critic, no entropy; nothing after
    a termination."""
    actor, critic, batch, expected = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    y = cql.td_target(critic, actor(batch.next_obs), batch, 0.9)
    for b in range(4):
        action, _ = slow_sample(actor, batch.next_obs[b], draws[0][b], -5.0)
        q = min(slow_critic(critic, k, batch.next_obs[b], action) for k in range(2))
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else q)))
    assert_close(y, expected)
    assert not y.requires_grad


def test_propose_actions_equals_a_loop(monkeypatch):
    """(E3): N uniform actions of density 2^−A, N of π(·|s), N of π(·|s′), each with the density it
    was drawn with."""
    actor, batch = make(Actor, 3, 2), tiny_batch()
    uniform, normal = record_draws(monkeypatch, "rand"), record_draws(monkeypatch, "randn_like")
    actions, log_density = cql.propose_actions(actor(batch.obs), actor(batch.next_obs), 5)
    for b in range(4):
        expected = [
            ([2 * u - 1 for u in uniform[0][b, n].tolist()], math.log(1 / 4)) for n in range(5)
        ]
        for obs, noise in ((batch.obs, normal[0]), (batch.next_obs, normal[1])):
            expected += [slow_sample(actor, obs[b], noise[b, n], -5.0) for n in range(5)]
        assert_close(actions[b], [action for action, _ in expected])
        assert_close(log_density[b], [density for _, density in expected])
    assert not actions.requires_grad and not log_density.requires_grad


def test_soft_max_q_equals_a_loop():
    """(E3): for each critic and observation, log Σ exp(Q − log μ) over that observation's own
    actions."""
    critic = make(Critic, 3, 2)
    obs = torch.randn(4, 3)
    actions = torch.randn(4, 5, 2)
    log_density = torch.randn(4, 5)

    def term(k, b, j):
        return math.exp(
            slow_critic(critic, k, obs[b], actions[b, j].tolist()) - float(log_density[b, j])
        )

    expected = [
        [math.log(sum(term(k, b, j) for j in range(5))) for b in range(4)] for k in range(2)
    ]
    assert_close(cql.soft_max_q(critic, obs, actions, log_density), expected)


def test_several_actions_equals_a_loop(monkeypatch):
    """(E4): N draws of π(·|s) for each observation, with noise of their own."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    actions, log_prob = cql.several_actions(actor(obs), 5)
    for b in range(4):
        expected = [slow_sample(actor, obs[b], draws[0][b, n], -5.0) for n in range(5)]
        assert_close(actions[b], [action for action, _ in expected])
        assert_close(log_prob[b], [density for _, density in expected])
    assert len(actions.flatten().unique()) == 40 and not actions.requires_grad


def test_mean_q_equals_a_loop():
    """(E4): for each critic and observation, the mean of Q over that observation's own actions."""
    critic, obs, actions = make(Critic, 3, 2), torch.randn(4, 3), torch.randn(4, 5, 2)
    expected = [
        [
            sum(slow_critic(critic, k, obs[b], actions[b, j].tolist()) for j in range(5)) / 5
            for b in range(4)
        ]
        for k in range(2)
    ]
    assert_close(cql.mean_q(critic, obs, actions), expected)


@pytest.mark.parametrize("data_weight", [1.0, 0.0])
def test_critic_loss_equals_a_loop(data_weight):
    """(E5), (E6): per critic the squared error plus w times the gap; summed over critics, averaged
    over transitions. Without the data term the gap is what is pushed down, alone."""
    critic, batch, y, push = make(Critic, 3, 2), tiny_batch(), torch.randn(4), torch.randn(2, 4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    squares = sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4))
    gaps = sum(
        (float(push[k, b]) - (q[k][b] if data_weight else 0.0)) / 4
        for k in range(2)
        for b in range(4)
    )
    got = cql.critic_loss(critic, batch, y, push, torch.tensor(1.7), data_weight)
    assert_close(torch.stack(got), [squares + 1.7 * gaps, gaps / 2, sum(q[0] + q[1]) / 8])


def test_critic_loss_refuses_other_shapes():
    """Targets (B, 1) or a soft maximum (B,) or (K, B, 1) would broadcast."""
    critic, batch = Critic(3, 2), tiny_batch()
    for y, soft_max in ((torch.zeros(4, 1), torch.zeros(2, 4)), (torch.zeros(4), torch.zeros(4)),
                        (torch.zeros(4), torch.zeros(2, 4, 1))):
        with pytest.raises(AssertionError):
            cql.critic_loss(critic, batch, y, soft_max, torch.tensor(1.0))
    with pytest.raises(AssertionError):
        cql.soft_max_q(critic, batch.obs, torch.zeros(4, 5, 2), torch.zeros(4, 1))


def test_actor_and_entropy_losses_equal_loops(monkeypatch):
    """(E8) with its gradient, (E9): SAC's, with this file's bounds of σ."""
    actor, critic, obs = make(Actor, 3, 2), make(Critic, 3, 2), torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    loss, *metrics = cql.actor_loss(actor, critic, torch.tensor(0.3), obs)
    loss.backward()

    def slow():
        return slow_soft_actor_loss(actor, critic, 0.3, obs, draws[0], -5.0)

    for got, want in zip((loss, *metrics), slow()):
        assert_close(got, want)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])
    assert not metrics[0].requires_grad and not metrics[1].requires_grad
    expected = sum(-0.7 * (log_prob - 2.0) for log_prob in slow()[1]) / 4
    assert_close(cql.entropy_coef_loss(torch.tensor(0.7), metrics[0], -2.0), expected)


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh(μ)."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [[math.tanh(u) for u in slow_mlp(actor.net, o)[:2]] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])


# ---- the target


def test_only_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′ and γ; elsewhere each transition takes
    its smaller Q."""
    actor = make(Actor, 3, 2)
    critic = make(Critic, 3, 2)
    batch = tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        assert torch.equal(
            cql.td_target(critic, actor(torch.randn(4, 3)), batch, gamma), batch.reward
        )
    q = torch.tensor([[1.0, 5.0, -2.0, 4.0], [3.0, 2.0, -1.0, 0.0]])
    going_on = batch._replace(terminated=torch.zeros(4))
    y = cql.td_target(lambda obs, action: q, actor(batch.next_obs), going_on, 0.5)
    assert_close(y - batch.reward, [0.5, 1.0, -1.0, 0.0])


def test_target_is_sacs_without_entropy():
    """The same noise and α = 0 in sac.py's target."""
    actor, critic, batch = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch()
    torch.manual_seed(1)
    without = sac.soft_td_target(actor, critic, torch.tensor(0.0), batch, 0.9)
    torch.manual_seed(1)
    assert_close(cql.td_target(critic, actor(batch.next_obs), batch, 0.9), without)


# ---- the conservative term


def propose(num, dim=1, mean=0.3, batch_size=1):
    """N actions of each kind, from a policy N(mean, 1) and another at s′."""
    policy = torch.full((batch_size, dim), mean), torch.zeros(batch_size, dim)
    return cql.propose_actions(policy, (-policy[0], policy[1] - 0.2), num)


def test_constant_q_gives_the_volume_of_the_action_box():
    """Q = c at N uniform actions: log Σ exp(c)·2^A = c + log N + A log 2, exactly."""
    actions, log_density = propose(10, dim=3, batch_size=4)
    soft_max = cql.soft_max_q(
        lambda obs, action: torch.full((2, len(action)), 1.5),
        torch.zeros(4, 3),
        actions[:, :10],
        log_density[:, :10],
    )
    assert_close(soft_max, torch.full((2, 4), 1.5 + math.log(10) + 3 * math.log(2)))


def test_soft_maximum_is_an_integral():
    """Importance sampling: with many samples, soft_max − log 3N is log ∫ exp Q da, for either of
    two curves."""
    def curves(a):
        return torch.stack([2 * torch.sin(3 * a), -4 * a**2])

    estimate = cql.soft_max_q(
        lambda obs, action: curves(action[:, 0]), torch.zeros(1, 3), *propose(100_000)
    )
    a = torch.linspace(-1, 1, 20_001)
    expected = torch.trapezoid(curves(a).exp(), a).log()[:, None]
    assert_close(estimate - math.log(300_000), expected, 1e-2)


def test_gap_ignores_a_constant_added_to_q():
    """Only differences between actions count."""
    critic, batch, gaps = make(Critic, 3, 2), tiny_batch(), []
    proposals = propose(5, dim=2, batch_size=4)
    for _ in range(2):
        soft_max = cql.soft_max_q(critic, batch.obs, *proposals)
        gaps.append(cql.critic_loss(critic, batch, torch.zeros(4), soft_max, torch.tensor(1.0))[1])
        critic.layers[-1].bias.data += 123.0
    assert_close(gaps[0], gaps[1])


def test_every_action_is_valued_at_s():
    """Actions proposed at s′ are one more proposal for s: the online critic never sees a next
    observation."""
    data, nets, seen = tiny_data(), networks(), []
    nets[1].register_forward_hook(
        lambda module, inputs, output: seen.extend(map(tuple, inputs[0].tolist()))
    )
    cql.update(
        Args(batch_size=4, num_samples=3), data, *nets, *sgd(nets[0], nets[1], nets[3], nets[4])
    )
    assert set(seen) <= set(map(tuple, data.obs.tolist()))
    assert len(seen) == 4 * (9 + 1 + 1), "nine proposals, the data's action, the actor's"


def test_without_weight_it_is_td_learning():
    """w → 0: sac.py's critic loss."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    loss, *_ = cql.critic_loss(critic, batch, y, torch.randn(2, 4), torch.tensor(1e-14))
    assert_close(loss, sac.critic_loss(critic, batch, y)[0], 1e-12)


def minimise(loss_of, size):
    """The minimiser over a free table of Q values."""
    table = torch.zeros(size, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-13, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(table)
        loss.backward()
        return loss

    optimizer.step(closure)
    return table.detach()


def table_rows(counts):
    """Data with each cell (s, a) as often as counts (S, A) says; obs and action are the cell's
    indices."""
    s, a = np.indices(counts.shape).reshape(2, -1).repeat(counts.ravel(), axis=1)
    rows = tiny_batch([0.0] * len(s))
    return rows._replace(obs=torch.as_tensor(s)[:, None], action=torch.as_tensor(a)[:, None]), s, a


def look_up(table):
    """A critic (K = 1) that reads a table (S, A)."""
    return lambda obs, action: table[obs[:, 0], action[:, 0]][None]


def test_stationary_point_of_a_table():
    """One state, behaviour β: Q(a) = y(a) − w/2 · (softmax(Q)(a) / β(a) − 1), by another road."""
    counts, y, w = np.array([[1, 2, 3, 4]]), np.array([1.0, 0.5, -0.3, 0.2]), 0.8
    batch, _, a = table_rows(counts)
    actions = torch.arange(4).expand(10, 4)[:, :, None]

    def loss_of(table):
        soft_max = cql.soft_max_q(look_up(table), batch.obs, actions, torch.zeros(10, 4))
        return cql.critic_loss(
            look_up(table), batch, torch.as_tensor(y[a]), soft_max, torch.tensor(w)
        )[0]

    q, beta = y.copy(), counts[0] / 10
    for _ in range(5000):
        q += 0.05 * (y - w / 2 * (np.exp(q) / np.exp(q).sum() / beta - 1) - q)
    assert_close(minimise(loss_of, (1, 4)), q[None], 1e-6)
    assert abs(q - y).max() > 0.1, "w must matter here"


# ---- the three forms


def pushed(form, critic, batch, policy, next_policy, num):
    """What `update` pushes down in each form."""
    if form == "logsumexp":
        return cql.soft_max_q(critic, batch.obs, *cql.propose_actions(policy, next_policy, num))
    return cql.mean_q(critic, batch.obs, cql.several_actions(policy, num)[0])


def test_plain_with_a_data_term_of_weight_one_is_cql_h():
    """One setting, two forms: with c = 1 instead of 0, an update of `plain` has the loss and the
    critic of `cql-h`."""
    batch, nets, losses, grads = tiny_batch(), networks(), [], []
    push = cql.mean_q(nets[1], batch.obs, torch.rand(4, 5, 2))
    q = nets[1](batch.obs, batch.action)
    plain = cql.critic_loss(nets[1], batch, torch.zeros(4), push, torch.tensor(0.7), 0.0)[0]
    by_hand = plain - 0.7 * 1.0 * q.mean(dim=1).sum()
    cql_h = cql.critic_loss(nets[1], batch, torch.zeros(4), push, torch.tensor(0.7), 1.0)[0]
    for loss in (by_hand, cql_h, plain):
        losses.append(loss)
        nets[1].zero_grad()
        loss.backward(retain_graph=True)
        grads.append(flat_grad(nets[1]))
    assert_close(losses[0], losses[1], 1e-12)
    assert_close(grads[0], grads[1], 1e-12)
    assert (grads[1] - grads[2]).abs().max() > 1e-3, "the data term must matter here"


def test_logsumexp_is_cql_hs_maximum_over_mu():
    """max_μ E_μ[Q] + H(μ) = log Σ exp Q, at μ = softmax(Q); and Q's gradient is that of E_μ[Q] at
    this μ.

    Q(a) = log of 1, 2, 3, 4 makes softmax(Q) = 0.1, 0.2, 0.3, 0.4: ten actions of which the first
    is one, the next two … """
    def value(table, counts):
        """E_μ[Q] + H(μ) for the μ that draws action a with probability counts(a) / 10."""
        actions = torch.arange(4).repeat_interleave(torch.tensor(counts))[None, :, None]
        share = torch.tensor(counts)[torch.tensor(counts) > 0] / 10.0
        return (
            cql.mean_q(look_up(table), torch.zeros(1, 1, dtype=torch.long), actions)
            - (share * share.log()).sum()
        )

    table = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log().requires_grad_()
    soft_max = cql.soft_max_q(
        look_up(table),
        torch.zeros(1, 1, dtype=torch.long),
        torch.arange(4)[None, :, None],
        torch.zeros(1, 4),
    )
    best = value(table, [1, 2, 3, 4])
    assert_close(soft_max, best, 1e-12)
    assert_close(*(torch.autograd.grad(form.sum(), table)[0] for form in (soft_max, best)), 1e-12)
    others = [
        [i, j, k, 10 - i - j - k]
        for i in range(11)
        for j in range(11 - i)
        for k in range(11 - i - j)
    ]
    others.remove([1, 2, 3, 4])
    assert (
        len(others) == 285
        and max(value(table, counts).item() for counts in others) < soft_max.item() - 1e-3
    )


@pytest.mark.parametrize("form", ["cql-h", "plain"])
def test_the_mean_gives_the_critic_a_gradient_and_nobody_else(form):
    """E_μ[Q] has a gradient to Q; none to the policy that is μ, none to the target."""
    batch, (actor, critic, critic_target, *_) = tiny_batch(), networks()
    policy, next_policy = actor(batch.obs), actor(batch.next_obs)  # with their graph, to tempt it
    y = cql.td_target(critic_target, next_policy, batch, 0.9)
    push = pushed(form, critic, batch, policy, next_policy, 3)
    without = torch.autograd.grad(
        cql.critic_loss(critic, batch, y, push.detach(), torch.tensor(1.0))[0],
        critic.layers[0].weight,
    )[0]
    cql.critic_loss(critic, batch, y, push, torch.tensor(1.0), float(form == "cql-h"))[0].backward()
    assert all(p.grad is None for net in (actor, critic_target) for p in net.parameters())
    assert (critic.layers[0].weight.grad - without).abs().max() > 1e-3


def test_the_multiplier_needs_the_data_term(capsys):
    """A gap without the data's Q is Q itself: no multiplier could hold it at τ."""
    with pytest.raises(SystemExit) as stop:
        cql.train(Args(form="plain", lagrange=True))
    assert stop.value.code == 2 and "--form plain" in capsys.readouterr().err


# ---- the claim of the notes (C11): which Q is a lower bound, in which form?


def iterate_cql(
    form: str, choose_policy=None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Exact expectations on a small known MDP: a policy's true Q, CQL's Q, the policy, the
    behaviour; all (S, A).

    The push that cql.critic_loss gets is E_{a~π}[Q(s, a)] in forms plain and cql-h, the notes' E_μ
    answered by μ = π, and log Σ exp Q(s, a) in form logsumexp. `choose_policy` makes the policy to
    be valued from Q and the behaviour; without it, the policy is a random one. """
    rng, gamma, w = np.random.default_rng(0), 0.5, 0.5
    # (S, A), (S, A, S′)
    reward, dynamics = rng.normal(size=(3, 3)), rng.dirichlet(np.ones(3), size=(3, 3))
    counts, policy = np.array([[6, 3, 1], [2, 5, 3], [1, 2, 7]]), rng.dirichlet(np.ones(3), size=3)
    batch, s, a = table_rows(counts)
    data_weight = 0.0 if form == "plain" else 1.0

    q = np.zeros((3, 3))
    for _ in range(26):
        if choose_policy is not None:
            policy = choose_policy(q, counts / 10)
        step = np.einsum("ijk,kl->ijkl", dynamics, policy).reshape(9, 9)  # from (s, a) to (s′, a′)
        y = torch.as_tensor((reward.ravel() + gamma * step @ q.ravel()).reshape(3, 3)[s, a])

        def loss_of(table):
            push = (
                torch.logsumexp(table, dim=1)
                if form == "logsumexp"
                else (torch.as_tensor(policy) * table).sum(1)
            )
            return cql.critic_loss(
                look_up(table), batch, y, push[s][None], torch.tensor(w), data_weight
            )[0]

        q = minimise(loss_of, (3, 3)).numpy()
    truth = np.linalg.solve(np.eye(9) - gamma * step, reward.ravel()).reshape(3, 3)
    mu = softmax(q) if form == "logsumexp" else policy
    penalty = w / 2 * (mu / (counts / 10) - data_weight)
    assert_close(
        q, truth - np.linalg.solve(np.eye(9) - gamma * step, penalty.ravel()).reshape(3, 3), 1e-6
    )
    return truth, q, policy, counts / 10


def softmax(q):
    return np.exp(q) / np.exp(q).sum(axis=1, keepdims=True)


def test_without_the_data_term_every_q_is_a_lower_bound():
    """C11: push-down alone keeps Q(s, a) below the truth for all s and a."""
    truth, q, _, _ = iterate_cql("plain")
    assert (q < truth).all()


def test_with_the_data_term_only_the_value_is_a_lower_bound():
    """C11: E_π[Q] stays below the truth in every state, while at well-covered actions Q itself is
    too high."""
    truth, q, policy, behavior = iterate_cql("cql-h")
    assert ((policy * q).sum(1) < (policy * truth).sum(1)).all()
    too_high = q > truth + 0.01
    assert too_high.any() and (behavior > policy)[too_high].all()


def test_the_practical_form_bounds_the_value_of_its_own_softmax():
    """log-sum-exp: V is a lower bound for π = softmax(Q), the μ of its maximum; not every Q is."""
    truth, q, policy, _ = iterate_cql("logsumexp", lambda q, behavior: softmax(q))
    assert ((policy * q).sum(1) < (policy * truth).sum(1)).all()
    assert (q > truth + 0.001).any()


def test_the_practical_form_overvalues_the_datas_habit():
    """log-sum-exp: for π ∝ β⁴, which keeps to the data's most frequent actions, V is too high in
    every state."""
    truth, q, policy, _ = iterate_cql(
        "logsumexp", lambda q, behavior: behavior**4 / (behavior**4).sum(1, keepdims=True)
    )
    assert ((policy * q).sum(1) > (policy * truth).sum(1) + 0.01).all()


# ---- the multiplier


def test_weight_loss_equals_its_formula():
    """(E7): −w (gap − τ) with w = exp(log w)."""
    assert_close(cql.weight_loss(torch.tensor(0.4), torch.tensor(7.0), 5.0), -math.exp(0.4) * 2.0)


def step_of_the_multiplier(target_gap):
    """How one update changes log w; and the gap and w of that update."""
    torch.manual_seed(0)
    data, nets = tiny_data(), networks()
    args = Args(batch_size=4, lagrange=True, target_gap=target_gap)
    metrics = cql.update(args, data, *nets, *sgd(nets[0], nets[1], nets[3], nets[4], lr=1e-3))
    return nets[4].item() - 0.4, metrics["gap"].item(), metrics["cql_weight"].item()


@pytest.mark.parametrize("offset, direction", [(-1.0, 1), (1.0, -1), (0.0, 0)])
def test_multiplier_moves_the_gap_to_its_target(offset, direction):
    """Gap above τ: w rises; below: falls; equal: stays. The w used, and reported, is the old
    one."""
    _, gap, _ = step_of_the_multiplier(0.0)
    change, same_gap, weight = step_of_the_multiplier(gap + offset)
    assert np.sign(change) == direction and same_gap == gap
    assert_close([change, weight], [-1e-3 * math.exp(0.4) * offset, math.exp(0.4)])


# ---- the update


def networks():
    """The target differs from the critic, so that a test sees which one is used; then log α and log
    w."""
    return [
        make(Actor, 3, 2),
        make(Critic, 3, 2),
        make(Critic, 3, 2),
        torch.tensor(-0.5, requires_grad=True),
        torch.tensor(0.4, requires_grad=True),
    ]


def sgd(actor, critic, log_alpha, log_weight, lr=0.01):
    parts = actor.parameters(), critic.parameters(), [log_alpha], [log_weight]
    return [torch.optim.SGD(part, lr=lr) for part in parts]


@pytest.mark.parametrize(
    "form, lagrange",
    [
        ("logsumexp", False),
        ("logsumexp", True),
        ("cql-h", False),
        ("cql-h", True),
        ("plain", False),
    ],
)
def test_update_is_the_algorithm_box(form, lagrange):
    """Q with the old w (then w), π on the new Q, α; each with the old α; then (E10), exactly."""
    args = Args(
        batch_size=4,
        gamma=0.9,
        target_rate=0.3,
        num_samples=3,
        form=form,
        lagrange=lagrange,
        target_gap=2.0,
    )
    data, nets = tiny_data(), networks()
    actor, critic, critic_target, log_alpha, log_weight = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3], nets[4])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = cql.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch, alpha, weight = data.sample(4), log_alpha.detach().exp(), log_weight.detach().exp()
        policy, next_policy = actor(batch.obs), actor(batch.next_obs)
        y = cql.td_target(critic_target, next_policy, batch, 0.9)
        push = pushed(form, critic, batch, policy, next_policy, 3)
        q_loss, gap, q_data = cql.critic_loss(
            critic, batch, y, push, weight, 0.0 if form == "plain" else 1.0
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        if lagrange:
            log_weight.data += 0.01 * weight * (gap - 2.0)
        pi_loss, log_prob, q_policy = cql.actor_loss(actor, critic, alpha, batch.obs)
        step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        log_alpha.data += 0.01 * (log_prob.mean() - 2)
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(torch.stack(nets[3:]), torch.stack([log_alpha, log_weight]), 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)
        expected = dict(
            critic_loss=q_loss,
            q_data=q_data,
            q_policy=q_policy,
            gap=gap,
            cql_weight=weight,
            entropy=-log_prob.mean(),
            entropy_coef=alpha,
        )
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_the_critics_loss_moves_the_critic_only():
    """The conservative term has a gradient to Q, and none to the policy that proposed the actions,
    to w or to Q̄."""
    batch, (actor, critic, critic_target, _, log_weight) = tiny_batch(), networks()
    policy, next_policy = actor(batch.obs), actor(batch.next_obs)  # with their graph, to tempt it
    y = cql.td_target(critic_target, next_policy, batch, 0.9)
    soft_max = cql.soft_max_q(critic, batch.obs, *cql.propose_actions(policy, next_policy, 3))
    td_only = torch.autograd.grad(
        cql.critic_loss(critic, batch, y, soft_max.detach(), torch.tensor(1.0))[0],
        critic.layers[0].weight,
    )[0]
    loss, gap, _ = cql.critic_loss(critic, batch, y, soft_max, torch.tensor(1.0))
    loss.backward()
    assert all(p.grad is None for net in (actor, critic_target) for p in net.parameters())
    assert (critic.layers[0].weight.grad - td_only).abs().max() > 1e-3, (
        "soft_max must carry gradient"
    )
    # would fail if the gap still had the critic's (freed) graph
    cql.weight_loss(log_weight, gap, 5.0).backward()
    assert log_weight.grad is not None


def test_entropy_plays_no_part_in_the_critics_step():
    """Whatever α: same critic after the update, another actor."""
    results = []
    for log_alpha in (0.0, 5.0):
        torch.manual_seed(0)
        data, nets = tiny_data(), networks()
        nets[3].data.fill_(log_alpha)
        cql.update(
            Args(batch_size=4), data, *nets, *sgd(nets[0], nets[1], nets[3], nets[4], lr=1e-3)
        )
        results.append(nets)
    (actor, critic, *_), (other_actor, other_critic, *_) = results
    assert torch.equal(flat(critic), flat(other_critic)) and not torch.equal(
        flat(actor), flat(other_actor)
    )


@pytest.mark.parametrize(
    "form, lagrange, variant",
    [
        ("logsumexp", False, ""),
        ("logsumexp", True, "-lagrange"),
        ("cql-h", False, "-h"),
        ("plain", False, "-plain"),
    ],
)
def test_train_moves_every_part_each_step(monkeypatch, form, lagrange, variant):
    """Actor, critic, target and α; w, from its first value, with --lagrange only. Each form has its
    own folder."""
    run = silent_train(
        monkeypatch,
        cql,
        tiny_data(),
        steps=3,
        batch_size=4,
        cql_weight=2.0,
        form=form,
        lagrange=lagrange,
    )
    assert run.variant == variant
    for name in ("actor", "critic", "critic_target", "log_entropy_coef"):
        assert run.steps_that_moved(name) == [1, 2, 3]
    assert run.steps_that_moved("log_weight") == ([1, 2, 3] if lagrange else [])
    assert_close(run.history[0]["log_weight"], math.log(2.0))
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[3]["critic"], run.history[3]["critic_target"])


# ---- unlike SAC


def learn_from_a_narrow_corridor(algorithm, seed, monkeypatch):
    """One state, for ever; data actions in [−0.2, 0.2] earn what they say, r = a. What a = 1 earns,
    nobody knows."""
    monkeypatch.setattr(algorithm, "HIDDEN", (32, 32))
    torch.manual_seed(seed)
    data = tiny_data(256, action_dim=1)
    data.obs = data.next_obs = torch.zeros(256, 3)
    data.terminated = torch.zeros(256)
    data.reward = torch.linspace(-0.2, 0.2, 256)
    data.action = data.reward[:, None]
    actor, critic = algorithm.Actor(3, 1), algorithm.Critic(3, 1)
    parts = [actor, critic, copy.deepcopy(critic), torch.tensor(-5.0, requires_grad=True)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3) for net in (actor, critic)]
    optimizers.append(torch.optim.SGD([parts[3]], lr=0.0))  # next to no entropy bonus, in both
    args = dict(batch_size=32, gamma=0.9, target_rate=0.2)
    if algorithm is cql:
        parts.append(torch.tensor(0.0))
        optimizers.append(None)
        args["num_samples"] = 4
    for _ in range(200):
        metrics = algorithm.update(algorithm.Args(**args), data, *parts, *optimizers)
    one = torch.ones(1, 1)
    far, near = critic(torch.zeros(2, 3), torch.cat([one, 0.2 * one])).mean(0).tolist()
    return metrics["q_policy"].item(), actor.act(torch.zeros(1, 3)).item(), far - near


@pytest.mark.parametrize("seed", range(3))
def test_sac_leaves_the_data_and_cql_does_not(monkeypatch, seed):
    """No data action is worth more than 0.2 / (1 − γ) = 2. SAC acts far outside and expects far
    more, CQL neither."""
    q, action, far_minus_near = learn_from_a_narrow_corridor(sac, seed, monkeypatch)
    assert q > 5 and action > 0.9 and far_minus_near > 0
    q, action, far_minus_near = learn_from_a_narrow_corridor(cql, seed, monkeypatch)
    assert q < 2 and abs(action) < 0.3 and far_minus_near < 0
