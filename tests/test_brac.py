"""BRAC against slow loops, its divergence with known answers, its two forms, and the corridor that
SAC leaves."""
import copy
import math

import brac
import pytest
import sac
import torch
from brac import Actor, Args, Critic, divergence, log_density
from helpers import (
    SilentRun,
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    one_state_data,
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
    """Narrow hidden layers, in float64; a run that nobody stops, and that keeps what it saves."""
    monkeypatch.setattr(brac, "HIDDEN", (7, 6))
    monkeypatch.setattr(brac, "ACTOR_HIDDEN", (6, 5))
    monkeypatch.setattr(SilentRun, "stop", False, raising=False)
    monkeypatch.setattr(SilentRun, "save", lambda run, step: run.snapshot())
    monkeypatch.setattr(SilentRun, "close", lambda run: None, raising=False)


def slow_gaussian(actor, obs):
    """Mean and standard deviation of u per action dimension: log σ goes from −5 to 0 as tanh goes
    from −1 to 1."""
    out = slow_mlp(actor.net, obs)
    half = len(out) // 2
    return out[:half], [math.exp(-5 + 2.5 * (math.tanh(v) + 1)) for v in out[half:]]


def slow_log_density(mean, std, action):
    """Of tanh(u), u normal: log N(u) − log da/du."""
    total = 0.0
    for m, s, a in zip(mean, std, action, strict=True):
        total += (
            -0.5 * ((math.atanh(a) - m) / s) ** 2
            - math.log(s * math.sqrt(2 * math.pi))
            - math.log(1 - a * a)
        )
    return total


def slow_draw(mean, std, noise):
    return [math.tanh(m + s * eps) for m, s, eps in zip(mean, std, noise.tolist(), strict=True)]


def clip(action):
    return [min(max(a, -0.999), 0.999) for a in action]


def slow_divergence(actor, behavior, obs, noise):
    """(E4) at one observation, from N rows of noise: b's argument clipped, π's not."""
    policy, clone, total = slow_gaussian(actor, obs), slow_gaussian(behavior, obs), 0.0
    for eps in noise:
        action = slow_draw(*policy, eps)
        total += slow_log_density(*policy, action) - slow_log_density(*clone, clip(action))
    return total / len(noise)


def fix_noise(monkeypatch, noise):
    monkeypatch.setattr(
        torch, "randn_like", lambda like: torch.as_tensor(noise).reshape(like.shape)
    )


def networks():
    """Actor, clone, critics and their target, all different, so that a test sees which one is
    used."""
    return [make(Actor, 3, 2), make(Actor, 3, 2), make(Critic, 3, 2), make(Critic, 3, 2)]


# ---- (E1) densities


def test_sampled_actions_equal_a_loop(monkeypatch):
    """(E1): tanh of a Gaussian whose log σ is bounded softly, and the change of variables written
    with 1 − tanh²."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    action, log_prob = brac.sample_action(*actor(obs))
    for b in range(4):
        policy = slow_gaussian(actor, obs[b])
        assert_close(action[b], slow_draw(*policy, draws[0][b]))
        assert_close(log_prob[b], slow_log_density(*policy, slow_draw(*policy, draws[0][b])), 1e-6)


def test_log_std_is_bounded_softly():
    """From −5 to 0, −2.5 where the network says 0, and with a gradient on the way."""
    actor = make(Actor, 3, 1, scale=0.0)
    for raw, expected in ((-50.0, -5.0), (0.0, -2.5), (50.0, 0.0)):
        actor.net[-1].bias.data[1] = raw
        assert_close(actor(torch.zeros(1, 3))[1], [[expected]])


def test_log_density_equals_a_loop():
    """At given actions; those beyond ±0.999 count as ±0.999, in every dimension on its own."""
    mean, log_std, action = torch.randn(4, 2), torch.randn(4, 2), 2 * torch.rand(4, 2) - 1
    action[1, 0], action[2, 1] = 1.0, -1.0
    expected = [
        slow_log_density(mean[b].tolist(), log_std[b].exp().tolist(), clip(action[b].tolist()))
        for b in range(4)
    ]
    assert_close(log_density(mean, log_std, action), expected)


@pytest.mark.parametrize("u, expected", [(0.0, -0.918939), (0.5, -0.803710)])
def test_known_densities(u, expected):
    """μ = 0, σ = 1: log b at a = 0, and at a = tanh(0.5), where the Jacobian adds 0.240229."""
    assert_close(
        log_density(torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1), math.tanh(u))),
        [expected],
        1e-6,
    )


# ---- (E2), (E3) the clone


def test_behavior_loss_equals_a_loop(monkeypatch):
    """(E2): the data's action clipped, the sample's not; and (E3) on that sample."""
    behavior = make(Actor, 3, 2)
    batch = tiny_batch()
    draws = record_draws(monkeypatch, "randn_like")
    batch.action[0, 0] = 1.0
    loss, log_prob = brac.behavior_loss(behavior, torch.tensor(0.3), batch)
    expected, sampled = 0.0, []
    for b in range(4):
        policy = slow_gaussian(behavior, batch.obs[b])
        sampled.append(slow_log_density(*policy, slow_draw(*policy, draws[0][b])))
        expected += (
            0.3 * sampled[b] - slow_log_density(*policy, clip(batch.action[b].tolist()))
        ) / 4
    assert_close(loss, expected, 1e-6)
    assert_close(log_prob, sampled, 1e-6)
    assert not log_prob.requires_grad
    assert_close(
        brac.entropy_coef_loss(torch.tensor(0.3), log_prob, -2.0),
        -0.3 * (sum(sampled) / 4 - 2.0),
        1e-6,
    )


def test_update_behavior_is_two_steps():
    """b with the old α, then α from the log b of the same sample; α never below 0."""
    args = Args(batch_size=4)
    data = tiny_data()
    behavior = make(Actor, 3, 2)
    coef = torch.tensor(0.01, requires_grad=True)
    behavior.net[-1].weight.data.mul_(0.1)
    # broad: entropy above the target, so α falls
    behavior.net[-1].bias.data[:] = torch.tensor([0.1, -0.1, 2.0, 2.0])
    by_hand, alpha = copy.deepcopy(behavior), 0.01
    for seed in range(2):
        torch.manual_seed(seed)
        metrics = brac.update_behavior(
            args,
            data,
            behavior,
            coef,
            torch.optim.SGD(behavior.parameters(), lr=0.01),
            torch.optim.SGD([coef], lr=0.01),
        )
        torch.manual_seed(seed)
        loss, log_prob = brac.behavior_loss(by_hand, torch.tensor(alpha), data.sample(4))
        step_by_hand(loss, list(by_hand.parameters()), 0.01)
        alpha = max(alpha + 0.01 * (log_prob.mean().item() - 2), 0.0)
        assert_close(flat(behavior), flat(by_hand), 1e-12)
        assert_close(coef, alpha, 1e-12)
        for name, value in dict(
            behavior_loss=loss, behavior_entropy=-log_prob.mean(), entropy_coef=alpha
        ).items():
            assert_close(metrics[name], value, 1e-12)
    assert alpha == 0.0, "α must have met its bound"


def test_the_clone_is_the_data():
    """Actions tanh(u), u ~ N(0.3, 0.5²), of entropy above the target: α falls to 0, μ and σ come
    back."""
    data = tiny_data(512, action_dim=1)
    quantiles = torch.special.ndtri((torch.arange(512) + 0.5) / 512)
    data.action[:, 0] = torch.tanh(0.3 + 0.5 * quantiles)
    data.obs.fill_(1.0)
    behavior, coef = Actor(3, 1), torch.ones((), requires_grad=True)
    optimizers = torch.optim.Adam(behavior.parameters(), lr=0.01), torch.optim.Adam([coef], lr=0.01)
    for _ in range(400):
        brac.update_behavior(Args(batch_size=256), data, behavior, coef, *optimizers)
    mean, log_std = behavior(torch.ones(1, 3))
    assert coef == 0
    assert abs(mean.item() - 0.3) < 0.1 and abs(log_std.exp().item() - 0.5) < 0.1


def test_entropy_coef_steers_the_entropy():
    """A narrow clone's entropy is below −dim(A): α rises."""
    behavior, coef = make(Actor, 3, 2, scale=0.0), torch.tensor(1.0, requires_grad=True)
    behavior.net[-1].bias.data[2:] = -5.0
    metrics = brac.update_behavior(
        Args(batch_size=12),
        tiny_data(),
        behavior,
        coef,
        torch.optim.SGD(behavior.parameters(), lr=0.0),
        torch.optim.SGD([coef], lr=0.01),
    )
    assert metrics["behavior_entropy"] < -2
    assert_close(coef, 1 + 0.01 * (-metrics["behavior_entropy"] - 2))


# ---- (E4) the divergence


def test_divergence_equals_a_loop(monkeypatch):
    """(E4), and its gradient against a finite difference of the loop: through log π and through the
    actions into b."""
    (actor, behavior, *_), obs = networks(), torch.randn(4, 3)
    actor.net[-1].bias.data[0] += 3.8 - actor(obs)[0][:, 0].detach().mean()
    draws = record_draws(monkeypatch, "randn_like")
    with torch.no_grad():
        clone = behavior(obs)
    got = divergence(actor(obs), clone, 5)
    assert_close(
        got, [slow_divergence(actor, behavior, obs[b], draws[0][b]) for b in range(4)], 1e-5
    )
    actions = [
        slow_draw(*slow_gaussian(actor, obs[b]), eps) for b in range(4) for eps in draws[0][b]
    ]
    assert {abs(a) > 0.999 for action in actions for a in action} == {True, False}, (
        "some samples must meet the clip"
    )
    got.sum().backward()
    assert_gradient(
        actor.net[-1].bias,
        lambda: sum(slow_divergence(actor, behavior, obs[b], draws[0][b]) for b in range(4)),
    )


def gaussian(mean, std, batch_size=1, dim=1):
    return torch.full((batch_size, dim), mean), torch.full((batch_size, dim), math.log(std))


def test_known_divergence_of_two_gaussians():
    """tanh changes no KL: N(0.5, 1) from N(0, 1) is 0.125 apart, N(0, 0.5²) log 2 − 0.375; the clip
    takes little."""
    for mean, std, expected in ((0.5, 1.0, 0.125), (0.0, 0.5, math.log(2) - 0.375)):
        got = divergence(gaussian(mean, std), gaussian(0.0, 1.0), 200_000)
        assert_close(got, [expected], 0.01)


def test_divergence_adds_up_over_action_dimensions():
    """Independent dimensions: twice as many, twice as far; and not symmetric."""
    far = divergence(gaussian(0.5, 1.0, dim=2), gaussian(0.0, 1.0, dim=2), 200_000)
    assert_close(far, [0.25], 0.02)
    back = divergence(gaussian(0.0, 1.0), gaussian(0.0, 0.5), 200_000)
    assert_close(back, [1.5 - math.log(2)], 0.03)


def test_the_estimate_may_be_negative():
    """Few samples of two near Gaussians: a clamp at zero would turn noise into a penalty."""
    got = divergence(gaussian(0.1, 1.0, batch_size=2000), gaussian(0.0, 1.0, batch_size=2000), 1)
    assert (got < 0).double().mean() > 0.3 and abs(got.mean() - 0.005) < 0.01


def test_a_policy_that_is_the_clone_has_no_divergence():
    """π = b: zero for every sample, not only on average, where none is clipped."""
    actor, obs = make(Actor, 3, 2, scale=0.5), torch.randn(4, 3)
    assert_close(divergence(actor(obs), actor(obs), 4), torch.zeros(4), 1e-7)


def test_at_the_clone_the_divergence_has_no_slope():
    """KL(π ‖ b) is smallest at π = b: one sample's gradient is noise, that of many is zero;
    elsewhere it is (μ − μ_b)/σ²."""
    for shift in (0.0, 0.5):
        mean = torch.full((1, 1), 0.3 + shift, requires_grad=True)
        divergence((mean, torch.zeros(1, 1)), gaussian(0.3, 1.0), 100_000).backward()
        assert abs(mean.grad.item() - shift) < 0.03


def test_divergence_is_finite_at_the_bounds():
    """tanh(±30) rounds to ±1: log π comes from u, b sees 0.999."""
    policy = gaussian(30.0, 0.01)
    value = divergence(policy, gaussian(0.0, 1.0), 4)
    b = slow_log_density([0.0], [1.0], [0.999])
    assert (
        value.isfinite()
        and value > 50
        and abs(
            value.item() - (-math.log(0.01 * math.sqrt(2 * math.pi)) - 0.5 + 60 - math.log(4) - b)
        )
        < 2
    )


# ---- (E5) the target


@pytest.mark.parametrize("value_penalty", [False, True])
def test_td_target_equals_a_loop(monkeypatch, value_penalty):
    """(E5): one action for Q, N others for D, the smaller critic; nothing after a termination."""
    args = Args(gamma=0.9, divergence_weight=0.7, num_samples=3, value_penalty=value_penalty)
    (actor, behavior, critic, _), batch = networks(), tiny_batch()
    draws, expected = record_draws(monkeypatch, "randn_like"), []
    y = brac.td_target(actor, behavior, critic, batch, args)
    for b in range(4):
        action = slow_draw(*slow_gaussian(actor, batch.next_obs[b]), draws[0][b])
        value = min(slow_critic(critic, k, batch.next_obs[b], action) for k in range(2))
        if value_penalty:
            value -= 0.7 * slow_divergence(actor, behavior, batch.next_obs[b], draws[1][b])
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else value)))
    assert_close(y, expected, 1e-6)
    assert (
        not y.requires_grad
        and [tuple(noise.shape) for noise in draws] == [(4, 2), (4, 3, 2)][: 1 + value_penalty]
    )


def both_targets(gamma, weight=0.7):
    (actor, behavior, critic, _), batch, ys = networks(), tiny_batch(), []
    for value_penalty in (False, True):
        torch.manual_seed(1)
        args = Args(gamma=gamma, divergence_weight=weight, value_penalty=value_penalty)
        ys.append(brac.td_target(actor, behavior, critic, batch, args))
    return ys, actor, behavior, batch


def test_both_forms_are_equal_without_a_future():
    """γ = 0 or w = 0: BRAC-v's target is BRAC-p's; with γ > 0 it is lower by γ w D(s′) where the
    episode goes on."""
    for settings in (dict(gamma=0.0), dict(gamma=0.9, weight=0.0)):
        assert_close(*both_targets(**settings)[0])
    ys, actor, behavior, batch = both_targets(0.9)
    torch.manual_seed(1)
    torch.randn(4, 2)  # the action for Q
    with torch.no_grad():
        distance = divergence(actor(batch.next_obs), behavior(batch.next_obs), 4)
    assert_close(ys[0] - ys[1], 0.9 * 0.7 * distance * torch.tensor([1.0, 0, 1, 1]))
    assert distance.abs().min() > 1e-3


def test_bracp_has_sacs_target_without_entropy():
    """The same noise and α = 0 in sac.py."""
    (actor, behavior, critic, _), batch = networks(), tiny_batch()
    torch.manual_seed(1)
    without = sac.soft_td_target(actor, critic, torch.tensor(0.0), batch, 0.9)
    torch.manual_seed(1)
    assert_close(brac.td_target(actor, behavior, critic, batch, Args(gamma=0.9)), without)


def test_termination_stops_bootstrap_and_penalty():
    """Where the task is over, y is the reward, whatever s′, γ and w; elsewhere each transition
    takes its smaller Q."""
    (actor, behavior, critic, _), batch = networks(), tiny_batch(terminated=(1, 1, 1, 1))
    for weight in (0.0, 5.0):
        args = Args(divergence_weight=weight, value_penalty=True)
        assert torch.equal(brac.td_target(actor, behavior, critic, batch, args), batch.reward)
    q = torch.tensor([[1.0, 5.0, -2.0, 4.0], [3.0, 2.0, -1.0, 0.0]])
    going_on = batch._replace(terminated=torch.zeros(4))
    y = brac.td_target(actor, behavior, lambda obs, action: q, going_on, Args(gamma=0.5))
    assert_close(y - batch.reward, [0.5, 1.0, -1.0, 0.0])


# ---- (E6), (E7)


def test_critic_loss_equals_a_loop():
    """(E6): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = brac.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    assert abs(q[0][0] - q[1][0]) > 1e-3
    # a target (B, 1) would silently compare every Q with every y
    with pytest.raises(AssertionError):
        brac.critic_loss(critic, batch, y[:, None])


@pytest.mark.parametrize("with_q", [False, True])
def test_actor_loss_equals_a_loop(monkeypatch, with_q):
    """(E7), and its gradient against a finite difference of the loop; the divergence has samples of
    its own."""
    (actor, behavior, critic, _), obs = networks(), torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    loss, distance = brac.actor_loss(
        actor, behavior, critic, obs, Args(divergence_weight=0.7, num_samples=3), with_q
    )
    loss.backward()
    assert [tuple(noise.shape) for noise in draws] == [(4, 3, 2), (4, 2)][:1 + with_q]

    def slow():
        far = sum(slow_divergence(actor, behavior, obs[b], draws[0][b]) for b in range(4)) / 4
        q = 0.0
        if with_q:
            actions = [slow_draw(*slow_gaussian(actor, obs[b]), draws[1][b]) for b in range(4)]
            q = (
                sum(
                    min(slow_critic(critic, k, obs[b], actions[b]) for k in range(2))
                    for b in range(4)
                )
                / 4
            )
        return 0.7 * far - q, far

    assert_close(torch.stack([loss, distance]), slow(), 1e-6)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])
    assert not distance.requires_grad and all(p.grad is None for p in behavior.parameters())


def test_the_warm_start_does_not_look_at_q():
    """Other critics, the same step of the actor; after the warm start another one."""
    for with_q in (False, True):
        steps = []
        for shift in (0.0, 1.0):
            torch.manual_seed(0)
            data, nets = tiny_data(), networks()
            for parameter in nets[2].parameters():
                parameter.data.add_(shift)
            brac.update(Args(batch_size=4), data, *nets, *sgd(nets[0], nets[2]), with_q)
            steps.append(flat(nets[0]))
        assert torch.equal(*steps) != with_q


def test_without_weight_it_is_sacs_actor(monkeypatch):
    """w = 0: sac.py's loss with α = 0, for the same noise."""
    (actor, behavior, critic, _), obs = networks(), torch.randn(4, 3)
    noise = torch.randn(4, 2)
    monkeypatch.setattr(
        torch,
        "randn_like",
        lambda like: noise if like.shape == noise.shape else torch.zeros_like(like),
    )
    got, _ = brac.actor_loss(actor, behavior, critic, obs, Args(divergence_weight=0.0), True)
    assert_close(got, sac.actor_loss(actor, critic, torch.tensor(0.0), obs)[0])


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh(μ)."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [[math.tanh(u) for u in slow_mlp(actor.net, o)[:2]] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])


# ---- the update


def sgd(*nets, lr=0.01):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in nets]


@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("value_penalty", [False, True])
def test_update_is_the_algorithm_box(with_q, value_penalty):
    """(E8) first; then Q on the moved targets, then π on the new Q; the clone stays; exactly."""
    args = Args(
        batch_size=4, gamma=0.9, target_rate=0.3, divergence_weight=0.7, value_penalty=value_penalty
    )
    data, nets = tiny_data(), networks()
    actor, behavior, critic, critic_target = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[2])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = brac.update(args, data, *nets, *optimizers, with_q)

        torch.manual_seed(seed)
        batch = data.sample(4)
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        q_loss, q_data = brac.critic_loss(
            critic, batch, brac.td_target(actor, behavior, critic_target, batch, args)
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, distance = brac.actor_loss(actor, behavior, critic, batch.obs, args, with_q)
        step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        for got, want in zip(nets, (actor, behavior, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[2]), q_grad, 1e-12)
        for name, value in dict(critic_loss=q_loss, q_data=q_data, divergence=distance).items():
            assert_close(metrics[name], value, 1e-12)
    assert all(p.grad is None for net in (nets[1], nets[3]) for p in net.parameters())


@pytest.mark.parametrize("value_penalty", [False, True])
def test_train_clones_first(monkeypatch, value_penalty):
    """The clone moves before step 1, and never after; actor and critics only after. The target
    starts as a copy."""
    run = silent_train(
        monkeypatch,
        brac,
        tiny_data(),
        steps=4,
        batch_size=4,
        behavior_steps=3,
        value_penalty=value_penalty,
        actor_lr=0.1,
        critic_lr=0.2,
        behavior_lr=0.3,
    )
    assert run.variant == ("-v" if value_penalty else "-p")
    assert len(run.history) == 6, (
        "at the start, after the clone as step 0, and after each of four steps"
    )
    assert (
        run.steps_that_moved("behavior")
        == run.steps_that_moved("entropy_coef")
        == run.steps_that_moved("cloned")
        == [1]
    )
    assert run.history[1]["cloned"] == 3 and run.history[0]["entropy_coef"] == 1
    assert run.since > 0, "the clone's time does not count in updates per second"
    for name in ("actor", "critic"):
        assert run.steps_that_moved(name) == [2, 3, 4, 5]
    assert run.steps_that_moved("critic_target") == [3, 4, 5], (
        "(E8) comes first, so the first time onto itself"
    )
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[0]["actor"], run.history[0]["behavior"])
    assert_close(
        torch.stack([run.actor.action_mid, run.actor.action_half]), [[0.5, 0.5], [1.0, 2.0]]
    )
    assert_close(run.state["behavior"].action_half, [1.0, 2.0])
    assert [
        run.state[f"{name}_optimizer"].param_groups[0]["lr"]
        for name in ("actor", "critic", "behavior", "entropy")
    ] == [0.1, 0.2, 0.3, 0.3]


def test_train_counts_the_warm_start(monkeypatch):
    """warm_start_steps = 2: of four steps the first two without Q."""
    seen = []
    monkeypatch.setattr(brac, "update", lambda *args, with_q, **parts: seen.append(with_q) or {})
    silent_train(
        monkeypatch, brac, tiny_data(), steps=4, batch_size=4, behavior_steps=1, warm_start_steps=2
    )
    assert seen == [False, False, True, True]


def test_a_resumed_run_does_not_clone_again(monkeypatch):
    """What the checkpoint says is done is not done again; a clone that was stopped half-way goes
    on."""
    moved = []
    monkeypatch.setattr(brac, "update_behavior", lambda *args, **parts: moved.append(1) or {})
    for done, expected in ((5, 0), (2, 3)):
        def resumed(run, parts, actor, done=done):
            parts["cloned"].fill_(done)
            return begin(run, parts, actor)

        begin = SilentRun.begin
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(SilentRun, "begin", resumed)
            run = silent_train(patch, brac, tiny_data(), steps=1, batch_size=4, behavior_steps=5)
        assert len(moved) == expected and run.state["cloned"] == done + expected
        assert len(run.history) == 2 + (expected > 0), (
            "saved once more where something was left to do"
        )


def test_a_killed_clone_loses_little(monkeypatch):
    """It is saved every so often and at its end, as step 0, and always as unsaved since."""
    saved = []
    monkeypatch.setattr(brac, "FIT_SAVE_EVERY", 2)
    monkeypatch.setattr(
        SilentRun, "save", lambda run, step: saved.append((step, int(run.state["cloned"])))
    )
    silent_train(monkeypatch, brac, tiny_data(), steps=1, batch_size=4, behavior_steps=5)
    assert saved == [(0, 2), (0, 4), (0, 5)] and SilentRun.last.unsaved


def test_a_stop_in_the_cloning_saves_and_leaves(monkeypatch, capsys):
    """The step under way is finished, and saved as step 0; no update of BRAC comes after it."""
    monkeypatch.setattr(SilentRun, "stop", True)
    monkeypatch.setattr(brac, "update", None)
    with pytest.raises(SystemExit) as left:
        silent_train(monkeypatch, brac, tiny_data(), steps=1, batch_size=4, behavior_steps=5)
    run, said = SilentRun.last, capsys.readouterr()
    assert left.value.code == 2 and "--resume" in said.err and "behavior_entropy" in said.out
    assert (
        run.state["cloned"] == 1
        and run.steps_that_moved("behavior") == [1]
        and len(run.history) == 2
    )
    assert run.unsaved, "else common.Run would leave at the signal, before anything is saved"


def test_a_clone_that_is_not_a_number_is_not_saved(monkeypatch, capsys):
    data = tiny_data()
    data.obs.fill_(math.nan)
    with pytest.raises(SystemExit) as left:
        silent_train(monkeypatch, brac, data, steps=1, batch_size=4, behavior_steps=5)
    assert (
        left.value.code == 2
        and "behavior_loss of the behaviour clone is nan by update 5" in capsys.readouterr().err
    )
    assert len(SilentRun.last.history) == 1


# ---- unlike SAC


def corridor_data():
    """One state, for ever; data actions in [−0.2, 0.2] earn what they say, r = a. What a = 1 earns,
    nobody knows."""
    data = one_state_data(256)
    data.action[:, 0] = data.reward[:] = torch.linspace(-0.2, 0.2, 256)
    return data


def clone_and_policies(monkeypatch, data, weights) -> tuple[float, dict]:
    """The clone's action in the one state, and for each weight of the penalty the policy's and its
    divergence."""
    for name in ("HIDDEN", "ACTOR_HIDDEN"):
        monkeypatch.setattr(brac, name, (32, 32))
    behavior, coef = Actor(3, 1), torch.ones((), requires_grad=True)
    optimizers = torch.optim.Adam(behavior.parameters(), lr=0.01), torch.optim.Adam([coef], lr=0.01)
    for _ in range(200):
        brac.update_behavior(Args(batch_size=128), data, behavior, coef, *optimizers)
    results = {}
    for weight in weights:
        torch.manual_seed(0)
        nets = [Actor(3, 1), behavior, Critic(3, 1)]
        nets.append(copy.deepcopy(nets[2]))
        args = Args(
            batch_size=32, gamma=0.9, target_rate=0.2, divergence_weight=weight, value_penalty=True
        )
        optimizers = [torch.optim.Adam(nets[i].parameters(), lr=5e-3) for i in (0, 2)]
        for step in range(200):
            metrics = brac.update(args, data, *nets, *optimizers, step > 50)
        results[weight] = nets[0].act(torch.zeros(1, 3)).item(), metrics["divergence"].item()
    return behavior.act(torch.zeros(1, 3)).item(), results


def test_a_heavy_penalty_keeps_the_policy_at_the_clone(monkeypatch):
    """No data action is worth more than 0.2 / (1 − γ) = 2. SAC, which has no clone, acts far
    outside; BRAC near it."""
    clone, results = clone_and_policies(monkeypatch, corridor_data(), (1e-6, 10.0))
    assert abs(clone) < 0.1, "the mean of the data"
    assert results[1e-6][0] > 0.9 and results[1e-6][1] > 3, (
        "next to no penalty is SAC without entropy"
    )
    assert abs(results[10.0][0] - clone) < 0.1 and abs(results[10.0][1]) < 0.2


def test_a_wrong_clone_makes_a_wrong_policy(monkeypatch):
    """The notes' problem with explicit constraints: half the data's actions are −0.5, half 0.5, and
    r = |a|. A Gaussian is no model of that. Its clone acts as nobody did, at about 0, and the
    penalty keeps the policy there."""
    data = corridor_data()
    data.action[:, 0] = torch.where(torch.arange(256) % 2 == 0, 0.5, -0.5)
    data.reward[:] = 0.5
    clone, results = clone_and_policies(monkeypatch, data, (10.0,))
    assert abs(clone) < 0.2 and abs(results[10.0][0]) < 0.2


def test_a_constraint_creates_a_preference_where_all_is_worth_the_same():
    """Another of the notes: with no reward anywhere Q is 0, and an unconstrained policy has nothing
    to prefer. BRAC prefers the clone. It costs nothing there: the cost shows where the data cover
    better actions (results/lessons)."""
    actor = make(Actor, 3, 1, scale=0.5)
    behavior = make(Actor, 3, 1, scale=0.5)
    obs = torch.randn(256, 3)
    nothing = lambda obs, action: torch.zeros(2, len(obs))
    gradients = []
    for weight in (0.0, 1.0):
        loss = brac.actor_loss(actor, behavior, nothing, obs, Args(divergence_weight=weight), True)[
            0
        ]
        actor.zero_grad()
        loss.backward()
        gradients.append(flat_grad(actor).norm().item())
    assert gradients[0] == 0 and gradients[1] > 0.1
