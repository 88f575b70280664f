"""UWAC against slow loops, what dropout's variance and the spectral norm are known to be, and BEAR
where nothing is dropped."""
import copy
import math
from types import SimpleNamespace

import bear
import pytest
import torch
import torch.nn.functional as F
import uwac
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    one_state_data,
    record_draws,
    silent_train,
    slow_dense,
    slow_mlp,
    slow_mmd,
    slow_raw,
    slow_vae_loss,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from torch import nn
from uwac import VAE, Actor, Args, Critic, SpectralLinear


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(uwac, "HIDDEN", (7, 6))
    monkeypatch.setattr(uwac, "VAE_HIDDEN", (6, 5))


def converge(net):
    """Gives each weight its exact singular vectors."""
    for module in net.modules():
        if isinstance(module, SpectralLinear):
            left, _, right = torch.linalg.svd(module.weight.data)
            module.v, module.u = left[:, :, :1].clone(), right[:, :1].mT.clone()
    return net


def networks():
    """VAE, actor, target Q that differs from Q, log α."""
    return [
        make(VAE, 3, 2),
        converge(make(Actor, 3, 2)),
        converge(make(Critic, 3, 2)),
        torch.tensor(0.4, requires_grad=True),
    ]


def record_masks(monkeypatch):
    """Dropout that keeps its masks, of 0 and 1 / (1 − p), for each call (K, rows, units). The
    layers divide by 1 − p."""
    masks = []

    def drop_units(x, rate):
        share = round(256 * rate) / 256
        kept = (torch.rand(x.shape) >= share).to(x.dtype)
        masks.append(kept.flatten(1, -2) / (1 - share))
        return x * kept

    monkeypatch.setattr(uwac, "drop_units", drop_units)
    return masks


def slow_q(critic, k, obs, action, masks=(None, None)):
    """Q of critic k at one observation and one action, for one mask per hidden layer; ‖W‖₂ from all
    singular values."""
    x, layers = obs.tolist() + list(action), list(critic.layers)
    for layer, mask in zip(layers, (*masks, None)):
        weight = (layer.weight[k] / torch.linalg.matrix_norm(layer.weight[k], 2)).T.tolist()
        x = slow_dense(x, weight, layer.bias[k, 0].tolist())
        x = x if layer is layers[-1] else [max(v, 0) for v in x]
        x = x if mask is None else [v * m for v, m in zip(x, mask.tolist(), strict=True)]
    return x[0]


def slow_moments(critic, obs, action, masks, first_row, passes):
    """(E3) for one observation and action, whose passes are rows first_row... of the masks: M of
    each critic, and V."""
    means, variance = [], 0.0
    for k in range(2):
        q = [
            slow_q(critic, k, obs, action, [m[k, first_row + t] for m in masks])
            for t in range(passes)
        ]
        means.append(sum(q) / passes)
        variance += sum((x - means[k]) ** 2 for x in q) / (passes - 1)
    return means, variance


# ---- the spectral norm


def test_each_weight_has_spectral_norm_one():
    """Of any layer, for each critic; and again once the weight has moved and the vectors have
    followed."""
    for layer in converge(make(Critic, 3, 2)).layers:
        for _ in range(2):
            # (K, in, out)
            matrix = layer(torch.eye(layer.weight.shape[1]).expand(2, -1, -1)) - layer.bias
            assert_close(torch.linalg.matrix_norm(matrix, 2), [1.0, 1.0])
            assert_close(matrix[1] / matrix[1, 0, 0], layer.weight[1] / layer.weight[1, 0, 0])
            layer.weight.data += torch.randn_like(layer.weight)
            for _ in range(2000):
                layer.follow()


def test_the_vectors_start_near_their_goal():
    """At once, after fifteen power iterations, ‖W‖₂ is known to a few percent; one more helps a
    little more."""
    for layer in Critic(3, 2).layers:
        exact = torch.linalg.matrix_norm(layer.weight, 2)
        errors = []
        for _ in range(3):
            errors.append((exact - (layer.v.mT @ layer.weight @ layer.u).flatten()).max().item())
            layer.follow()
        assert 0.05 * exact.max() > errors[0] >= errors[1] >= errors[2] >= -1e-12


def test_the_gradient_knows_the_norm():
    """A weight's gradient is that of W / ‖W‖₂: a longer W is no other function, so none is along
    W."""
    critic = converge(make(Critic, 3, 2))
    obs, action = torch.randn(4, 3), torch.randn(4, 2)
    critic(obs, action)[1].sum().backward()
    for layer in critic.layers:
        assert_close((layer.weight.grad * layer.weight).sum(), 0.0)
        assert layer.weight.grad[0].abs().max() == 0
    # a view: what the finite difference moves is the critic's own
    part = nn.Parameter(critic.layers[1].weight.data[1, 2])
    part.grad = critic.layers[1].weight.grad[1, 2]
    assert_gradient(
        part, lambda: sum(slow_q(critic, 1, obs[b], action[b].tolist()) for b in range(4))
    )


@pytest.mark.parametrize("rate, bound", [(0.0, 1.0), (0.1, (256 / 230) ** 2)])
def test_q_changes_by_no_more_than_its_bound(monkeypatch, rate, bound):
    """Per unit of (s, a): 1; with p = 0.1 (26/256) in two hidden layers and the same units dropped,
    1.239."""
    critic, masks = converge(make(Critic, 3, 2)), record_masks(monkeypatch)
    x, direction = torch.randn(200, 5), F.normalize(torch.randn(200, 5), dim=1)
    before = critic(x[:, :3], x[:, 3:], rate)
    kept = iter(masks[:2])
    monkeypatch.setattr(uwac, "drop_units", lambda x, rate: x * (next(kept) > 0).view(x.shape))
    x = x + 1e-3 * direction
    slopes = (critic(x[:, :3], x[:, 3:], rate) - before).abs() / 1e-3
    assert 0.05 < slopes.max() <= bound + 1e-9


# ---- dropout


def test_critic_equals_a_loop(monkeypatch):
    """(E2): normed weights, and dropout behind each hidden layer, not of inputs or outputs, for
    each critic and row its own."""
    critic = converge(make(Critic, 3, 2))
    obs = torch.randn(4, 3)
    action = torch.randn(4, 2)
    masks = record_masks(monkeypatch)
    q = critic(obs, action, 0.4)
    assert [mask.shape for mask in masks] == [(2, 4, 7), (2, 4, 6)] and all(
        len(m.unique()) == 2 for m in masks
    )
    assert_close(
        q,
        [
            [
                slow_q(critic, k, obs[b], action[b].tolist(), [m[k, b] for m in masks])
                for b in range(4)
            ]
            for k in range(2)
        ],
    )


def test_dropout_is_always_on_and_without_a_rate_off():
    """In evaluation mode too; with p = 0, two passes are equal and no random number is drawn."""
    critic, obs, action = converge(make(Critic, 3, 2)).eval(), torch.randn(4, 3), torch.randn(4, 2)
    assert not torch.equal(critic(obs, action, 0.4), critic(obs, action, 0.4))
    before = torch.get_rng_state()
    assert torch.equal(critic(obs, action, 0.0), critic(obs, action)) and torch.equal(
        torch.get_rng_state(), before
    )
    assert_close(
        critic(obs, action),
        [[slow_q(critic, k, obs[b], action[b].tolist()) for b in range(4)] for k in range(2)],
    )


@pytest.mark.parametrize("rate, share", [(0.1, 26), (0.5, 128), (0.3, 77)])
def test_units_are_dropped_independently_with_the_probability_that_results(rate, share):
    """round(256 p) / 256 in each of the eight bytes of a number; any two units, neighbours in a
    number or in two, together with the product of their probabilities; what is kept stays as it is.
    [D2]"""
    torch.manual_seed(0)
    x = torch.randn(20_000, 24)  # three numbers a row
    out = uwac.drop_units(x, rate)
    dropped = out == 0
    assert torch.equal(out[~dropped], x[~dropped])
    p = share / 256
    assert_close(dropped.double().mean(dim=0), [p] * 24, 5 * math.sqrt(p * (1 - p) / 20_000))
    assert_close(dropped.double().mean(), p, 5 * math.sqrt(p * (1 - p) / 480_000))
    correlation = torch.corrcoef(dropped.double().T) - torch.eye(24)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    again = uwac.drop_units(x, rate) == 0
    assert abs(
        torch.corrcoef(torch.stack([dropped.flatten(), again.flatten()]).double())[0, 1]
    ) < 5 / math.sqrt(480_000)
    rows = torch.corrcoef(torch.stack([dropped[:-1].flatten(), dropped[1:].flatten()]).double())[
        0, 1
    ]
    assert abs(rows) < 5 / math.sqrt(480_000)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4, 7)])
def test_sizes_that_are_no_multiple_of_eight(shape):
    x = torch.ones(shape)
    assert uwac.drop_units(x, 0.5).shape == shape and torch.equal(x, torch.ones(shape))
    assert 0.4 < torch.cat([uwac.drop_units(x, 0.5).flatten() for _ in range(4000)]).mean() < 0.6


def test_passes_differ_in_their_units_alone():
    """T passes at once are T calls: the first hidden layer is shared, dropout is not."""
    critic, obs, action = converge(make(Critic, 3, 2)), torch.randn(4, 3), torch.randn(4, 2)
    assert_close(
        critic.passes(obs, action, 0.0, 3), critic(obs, action).unsqueeze(2).expand(-1, -1, 3)
    )
    q = critic.passes(obs, action, 0.4, 4000)
    assert q.shape == (2, 4, 4000) and len(q[0, 0].unique()) > 10
    single = torch.stack([critic(obs, action, 0.4) for _ in range(4000)], dim=2)
    assert_close(q.std(dim=2) / single.std(dim=2), torch.ones(2, 4), 0.1)
    assert (
        (q.mean(dim=2) - single.mean(dim=2)).abs() < 5 * single.std(dim=2) * math.sqrt(2 / 4000)
    ).all()


def test_known_variance_of_one_hidden_layer(monkeypatch):
    """Var = p / (1 − p) Σ_i (u_i h_i)², with h the activations and u the output's weights: a sum
    over critics; p = 26/256."""
    monkeypatch.setattr(uwac, "HIDDEN", (20,))
    critic, obs, action = converge(make(Critic, 3, 2)), torch.randn(1, 3), torch.randn(1, 1, 2)
    expected = 0.0
    for k in range(2):
        first, last = (
            layer.weight[k] / torch.linalg.matrix_norm(layer.weight[k], 2)
            for layer in critic.layers
        )
        h = (torch.cat([obs[0], action[0, 0]]) @ first + critic.layers[0].bias[k, 0]).relu()
        expected += ((last[:, 0] * h) ** 2).sum().item() * 26 / 230
    mean, variance = uwac.mean_and_variance(critic, obs, action, Args(passes=40_000))
    assert_close(variance / expected, [[1.0]], 0.05)
    assert_close(mean, critic(obs, action[:, 0])[:, :, None], 0.01)
    draws = uwac.mean_and_variance(critic, obs, action.expand(1, 4000, 2), Args(passes=2))[1]
    # unbiased: with 1/T in place of 1/(T − 1) it would be half
    assert_close(draws.mean() / expected, 1.0, 0.1)


def test_mean_and_variance_equal_a_loop(monkeypatch):
    """(E3): each action of each observation has T passes of its own."""
    critic, obs, actions = converge(make(Critic, 3, 2)), torch.randn(4, 3), torch.randn(4, 5, 2)
    masks = record_masks(monkeypatch)
    mean, variance = uwac.mean_and_variance(critic, obs, actions, Args(passes=3, dropout_rate=0.4))
    for b in range(4):
        for n in range(5):
            means, v = slow_moments(
                critic, obs[b], actions[b, n].tolist(), masks, (b * 5 + n) * 3, 3
            )
            assert_close(mean[:, b, n], means)
            assert_close(variance[b, n], v)
    assert variance.min() > 0 and masks[0].shape == (2, 60, 7)


# ---- the weight


def test_known_weights():
    """β = ½: e^{−½V}, so e⁻¹ of V = 2; or ½ / V, at most 1, also of V = 0, and not less than all of
    it below V = ½."""
    variance = torch.tensor([0.0, 0.25, 0.5, 2.0, 1000.0])
    assert_close(
        uwac.uncertainty_weight(variance, Args()),
        [1.0, math.exp(-0.125), math.exp(-0.25), 0.36787944, 0.0],
    )
    assert_close(
        uwac.uncertainty_weight(variance, Args(weighting="inverse")), [1.0, 1.0, 1.0, 0.25, 0.0005]
    )
    assert_close(
        uwac.uncertainty_weight(variance, Args(weighting="inverse", beta=4.0)),
        [1.0, 1.0, 1.0, 1.0, 0.004],
    )
    for weighting in ("exponential", "inverse"):
        assert not uwac.uncertainty_weight(
            variance.clone().requires_grad_(), Args(weighting=weighting)
        ).requires_grad


def test_the_critics_loss_has_the_square_of_the_weight():
    """V = 2 makes a loss of e⁻² = 0.1353 of what it was, not of e⁻¹; no mean of weights divides
    it."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    plain, _ = uwac.critic_loss(critic, batch, y, torch.ones(4), 0.0)
    weighted, _ = uwac.critic_loss(
        critic, batch, y, uwac.uncertainty_weight(torch.full((4,), 2.0), Args()), 0.0
    )
    assert_close(weighted / plain, 0.1353352832)


# ---- losses against loops


def test_vae_loss_equals_a_loop(monkeypatch):
    """(E1)."""
    vae, batch, draws = make(VAE, 3, 2), tiny_batch(), record_draws(monkeypatch, "randn_like")
    loss, *parts = uwac.vae_loss(vae, batch)
    assert_close(torch.stack([loss, *parts]), slow_vae_loss(vae, batch, draws[0]))


@pytest.mark.parametrize("weighting", ["exponential", "inverse"])
def test_td_target_equals_a_loop(monkeypatch, weighting):
    """(E5): means of the target's passes, mixed, then the best; the weight of the largest variance,
    which another action may have. The weight of a terminal transition is its s′'s too."""
    actor, critic, batch = converge(make(Actor, 3, 2)), converge(make(Critic, 3, 2)), tiny_batch()
    args = Args(
        gamma=0.9,
        num_samples=5,
        min_weight=0.6,
        passes=3,
        dropout_rate=0.4,
        weighting=weighting,
        beta=0.3,
    )
    draws = record_draws(monkeypatch, "randn")
    masks = record_masks(monkeypatch)
    targets = []
    weights = []
    others = 0
    y, weight = uwac.td_target(actor, critic, batch, args)
    for b in range(4):
        values, variances = [], []
        for n in range(5):
            action = [math.tanh(u) for u in slow_raw(actor, batch.next_obs[b], draws[0][b, n])]
            means, variance = slow_moments(
                critic, batch.next_obs[b], action, masks, (b * 5 + n) * 3, 3
            )
            values.append(0.6 * min(means) + 0.4 * max(means))
            variances.append(variance)
        others += values.index(max(values)) != variances.index(max(variances))
        targets.append(float(batch.reward[b] + (0.0 if b == 1 else 0.9 * max(values))))
        v = max(variances)
        weights.append(math.exp(-0.3 * v) if weighting == "exponential" else min(1.0, 0.3 / v))
    assert others > 0
    assert_close(y, targets)
    assert_close(weight, weights)
    assert not y.requires_grad and not weight.requires_grad


def test_only_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′ and γ; elsewhere γ and
    Q count."""
    actor, batch = make(Actor, 3, 2), tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        assert torch.equal(
            uwac.td_target(actor, make(Critic, 3, 2), batch, Args(gamma=gamma))[0], batch.reward
        )
    seven = SimpleNamespace(
        passes=lambda obs, action, dropout_rate, num: torch.full((2, len(obs), num), 7.0)
    )
    y, _ = uwac.td_target(actor, seven, batch._replace(terminated=torch.zeros(4)), Args(gamma=0.5))
    assert_close(y, batch.reward + 3.5)


def test_critic_loss_equals_a_loop(monkeypatch):
    """(E8): one pass of dropout, weight times error squared, a mean over transitions, a sum over
    critics; with its gradient."""
    critic = converge(make(Critic, 3, 2))
    batch = tiny_batch()
    y = torch.randn(4)
    weight = torch.rand(4)
    masks = record_masks(monkeypatch)
    loss, q_data = uwac.critic_loss(critic, batch, y, weight, 0.4)
    loss.backward()

    def slow():
        q = [
            [
                slow_q(critic, k, batch.obs[b], batch.action[b].tolist(), [m[k, b] for m in masks])
                for b in range(4)
            ]
            for k in range(2)
        ]
        errors = [float(weight[b]) * (q[k][b] - float(y[b])) for k in range(2) for b in range(4)]
        return sum(error**2 for error in errors) / 4, sum(q[0] + q[1]) / 8

    assert_close(torch.stack([loss, q_data]), slow())
    assert masks[0].shape == (2, 4, 7) and len(masks[0].unique()) == 2, (
        "the prediction is of one pass, with dropout"
    )
    part = nn.Parameter(critic.layers[1].bias.data[1, 0])
    part.grad = critic.layers[1].bias.grad[1, 0]
    assert_gradient(part, lambda: slow()[0])
    for column in ((y[:, None], weight), (y, weight[:, None])):
        with pytest.raises(AssertionError):
            uwac.critic_loss(critic, batch, *column, 0.4)


@pytest.mark.parametrize("warm_up", [True, False])
def test_actor_loss_equals_a_loop(monkeypatch, warm_up):
    """(E6): the smaller of the critics' means at the first action, times that action's own weight
    (not squared); and the gradient of the loop with its weights held still."""
    actor, vae, obs = converge(make(Actor, 3, 2)), make(VAE, 3, 2), torch.randn(4, 3)
    args = Args(num_mmd_samples=3, bandwidth=0.7, max_mmd=0.3, passes=3, dropout_rate=0.4, beta=2.0)
    latents, noise = record_draws(monkeypatch, "randn"), record_draws(monkeypatch, "randn_like")
    masks = record_masks(monkeypatch)
    loss, distance, q_policy = uwac.actor_loss(actor, vae, torch.tensor(1.7), obs, args, warm_up)
    loss.backward()

    def slow(weights=None):
        distance, q_policy, weighted_q, kept = 0.0, 0.0, 0.0, []
        for b in range(4):
            behavior = [
                slow_mlp(vae.decoder, torch.cat([obs[b], z.clamp(-0.5, 0.5)]))
                for z in latents[0][b]
            ]
            u = [slow_raw(actor, obs[b], eps) for eps in noise[0][b]]
            distance += slow_mmd(u, behavior, "gaussian", 0.7) / 4
            if not warm_up:
                means, variance = slow_moments(
                    actor.critic, obs[b], [math.tanh(x) for x in u[0]], masks, b * 3, 3
                )
                kept.append(weights[b] if weights else math.exp(-2 * variance))
                q_policy += min(means) / 4
                weighted_q += kept[-1] * min(means) / 4
        return -weighted_q + 1.7 * (distance - 0.3), distance, q_policy, kept

    *values, weights = slow()
    assert_close(torch.stack([loss, distance, q_policy]), values)
    assert_gradient(actor.net[-1].bias, lambda: slow(weights)[0])
    if not warm_up:
        held, moving = slow(weights)[0], slow()[0]
        actor.net[-1].bias.data += 1e-3
        assert abs((slow(weights)[0] - held) - (slow()[0] - moving)) > 1e-6, (
            "holding the weights still matters here"
        )
    assert (
        not distance.requires_grad
        and not q_policy.requires_grad
        and all(p.grad is None for p in vae.parameters())
    )
    assert all((p.grad is None) == warm_up for p in actor.critic.parameters()), (
        "no gradient to Q's output in the warm-up"
    )


def test_act_equals_a_loop(monkeypatch):
    """(E10): of the policy's actions the one with the largest Q of the first critic, without
    dropout, in the environment's units; a saved policy, which carries the vectors of the norm, does
    the same, and draws no random numbers."""
    monkeypatch.setattr(uwac, "ACT_SAMPLES", 6)
    actor, obs, expected, winners = converge(make(Actor, 3, 2)), torch.randn(8, 3), [], set()
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    for o in obs:
        actions = [[math.tanh(u) for u in slow_raw(actor, o, noise)] for noise in actor.noise[0]]
        q = [slow_q(actor.critic, 0, o, action) for action in actions]
        winners.add(best := q.index(max(q)))
        expected.append([0.5 + 2 * actions[best][0], -1 + 3 * actions[best][1]])
    assert len(winners) > 1
    copied, before = Actor(3, 2), torch.get_rng_state()
    copied.load_state_dict(actor.state_dict())
    before = torch.get_rng_state()
    assert_close(actor.act(obs), expected)
    assert torch.equal(actor.act(obs), copied.act(obs)) and torch.equal(
        torch.get_rng_state(), before
    )


# ---- BEAR


@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("weighting", ["exponential", "inverse"])
def test_without_dropout_it_is_bear(monkeypatch, warm_up, weighting):
    """p = 0 and plain layers: V = 0, w = 1, and three updates are BEAR's, from the same random
    numbers."""
    for name in ("HIDDEN", "VAE_HIDDEN"):
        monkeypatch.setattr(bear, name, getattr(uwac, name))
    def forward(self, x, scale=1.0):
        assert scale == 1
        return bear.EnsembleLinear.forward(self, x)

    plain = type("Plain", (bear.EnsembleLinear,), dict(follow=lambda self: None, forward=forward))
    monkeypatch.setattr(uwac, "SpectralLinear", plain)
    data = tiny_data()
    shared = dict(
        batch_size=4, num_samples=3, gamma=0.9, bandwidth=2.0, max_mmd=0.05, target_rate=0.3
    )
    ours = networks()
    theirs = [make(module, 3, 2) for module in (bear.VAE, bear.Actor, bear.Critic)]
    for mine, other in zip(ours, theirs):
        other.load_state_dict(mine.state_dict())
    theirs.append(ours[3].detach().clone().requires_grad_())
    optimizers, others = sgd(*ours), sgd(*theirs)
    for seed in range(3):
        torch.manual_seed(seed)
        got = uwac.update(
            Args(**shared, dropout_rate=0.0, passes=4, weighting=weighting),
            data,
            *ours,
            *optimizers,
            warm_up=warm_up,
        )
        torch.manual_seed(seed)
        want = bear.update(bear.Args(**shared), data, *theirs, *others, warm_up=warm_up)
        assert got.pop("weight") == 1
        assert_close(
            torch.stack(list(got.values())), torch.stack([want[name] for name in got]), 1e-12
        )
        for mine, other in zip(ours[:3], theirs):
            assert_close(flat(mine), flat(other), 1e-12)
        assert_close(ours[3], theirs[3], 1e-12)


# ---- the update


def sgd(vae, actor, critic_target, log_multiplier, lr=0.01):
    parts = vae.parameters(), actor.net.parameters(), actor.critic.parameters(), [log_multiplier]
    return [torch.optim.SGD(part, lr=lr) for part in parts]


@pytest.mark.parametrize("warm_up", [True, False])
def test_update_is_the_algorithm_box(warm_up):
    """One power iteration of Q and of Q̄; VAE; then all of the official code's losses on what is
    there before any of its steps; the steps; (E9), of parameters alone, exactly."""
    args = Args(
        batch_size=4,
        gamma=0.9,
        target_rate=0.3,
        num_samples=3,
        passes=2,
        dropout_rate=0.3,
        bandwidth=2.0,
    )
    data, nets = tiny_data(), networks()
    vae, actor, target, log_alpha = copy.deepcopy(nets)
    optimizers = sgd(*nets)
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = uwac.update(args, data, *nets, *optimizers, warm_up=warm_up)

        torch.manual_seed(seed)
        for layer in (*actor.critic.layers, *target.layers):
            layer.v = F.normalize(layer.weight.data @ layer.u, dim=1)
            layer.u = F.normalize(layer.weight.data.transpose(1, 2) @ layer.v, dim=1)
        batch, alpha = data.sample(4), log_alpha.detach().exp()
        loss, cloning, kl = uwac.vae_loss(vae, batch)
        step_by_hand(loss, list(vae.parameters()), 0.01)
        y, weight = uwac.td_target(actor, target, batch, args)
        pi_loss, distance, q_policy = uwac.actor_loss(actor, vae, alpha, batch.obs, args, warm_up)
        q_loss, q_data = uwac.critic_loss(actor.critic, batch, y, weight, 0.3)
        q_grads = torch.autograd.grad(q_loss, list(actor.critic.parameters()))
        step_by_hand(pi_loss, list(actor.net.parameters()), 0.01)
        for parameter, grad in zip(actor.critic.parameters(), q_grads):
            parameter.data -= 0.01 * grad
        log_alpha.data += 0.01 * alpha * (distance - 0.07)
        for t, o in zip(target.parameters(), actor.critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets[:3], (vae, actor, target)):
            assert_close(torch.cat([x.flatten() for x in got.state_dict().values()]),
                         torch.cat([x.flatten() for x in want.state_dict().values()]), 1e-12)
        assert_close(nets[3], log_alpha, 1e-12)
        assert_close(
            flat_grad(nets[1].critic), torch.cat([grad.flatten() for grad in q_grads]), 1e-12
        )
        expected = dict(
            critic_loss=q_loss,
            q_data=q_data,
            q_policy=q_policy,
            mmd=distance,
            multiplier=alpha,
            weight=weight.mean(),
            cloning_error=cloning,
            kl=kl,
        )
        assert metrics.keys() == expected.keys() and metrics["weight"] < 1
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)
    assert all(p.grad is None for p in nets[2].parameters())


@pytest.mark.parametrize(
    "setting, still",
    [
        ("vae_lr", "vae"),
        ("actor_lr", "policy"),
        ("critic_lr", "critic"),
        ("multiplier_lr", "log_multiplier"),
    ],
)
def test_each_learning_rate_has_its_own_part(monkeypatch, setting, still):
    """Without it the part stands still and the others learn, each step; α starts at 1, the target
    as a copy."""
    run = silent_train(monkeypatch, uwac, tiny_data(), steps=3, batch_size=4, **{setting: 0.0})
    sizes = [len(flat(net)) for net in (run.actor.net, run.actor.critic)]
    parts = [
        moment | dict(zip(("policy", "critic"), moment["actor"].split(sizes)))
        for moment in run.history
    ]
    for name in ("vae", "policy", "critic", "log_multiplier"):
        moved = [
            not torch.equal(before[name], after[name]) for before, after in zip(parts, parts[1:])
        ]
        assert moved == [name != still] * 3
    assert (
        torch.equal(parts[0]["critic"], parts[0]["critic_target"])
        and parts[0]["log_multiplier"] == 0
    )
    assert (run.steps_that_moved("critic_target") == [1, 2, 3]) == (still != "critic")


def test_train_warms_up(monkeypatch):
    """The first updates are without Q for the policy, the others with."""
    seen, real = [], uwac.update
    monkeypatch.setattr(
        uwac, "update", lambda *args, **parts: seen.append(parts["warm_up"]) or real(*args, **parts)
    )
    silent_train(monkeypatch, uwac, tiny_data(), steps=5, batch_size=4, warm_up_steps=3)
    assert seen == [True, True, True, False, False]


@pytest.mark.parametrize("max_mmd, end", [(-1.0, 10.0), (100.0, -5.0)])
def test_the_multiplier_stays_in_its_bounds(max_mmd, end):
    """MMD above ε: log α rises, until 10; below: it falls, until −5."""
    data, nets = tiny_data(), networks()
    nets[3].data.fill_(end - math.copysign(1e-9, end))
    uwac.update(Args(batch_size=4, max_mmd=max_mmd), data, *nets, *sgd(*nets), warm_up=True)
    assert nets[3].item() == end


@pytest.mark.parametrize(
    "setting",
    [
        dict(passes=1),
        dict(dropout_rate=1.0),
        dict(dropout_rate=1e-3),
        dict(beta=0.0),
        dict(num_samples=0),
    ],
)
def test_settings_without_meaning_are_refused(setting, capsys):
    with pytest.raises(SystemExit) as stop:
        uwac.train(Args(**setting))
    assert stop.value.code == 2 and next(iter(setting)).replace("_", "-") in capsys.readouterr().err


# ---- the claim of the notes (C15)


@pytest.mark.parametrize("seed", range(3))
def test_the_variance_is_larger_off_the_data(monkeypatch, seed):
    """One state, for ever; data actions in [−0.2, 0.2] earn what they say. After training the
    variance of actions in [0.8, 1] and [−1, −0.8] is larger than that of the data's, and their
    weight is smaller."""
    monkeypatch.setattr(uwac, "HIDDEN", (32, 32))
    torch.manual_seed(seed)
    critic, action = Critic(3, 1), torch.linspace(-0.2, 0.2, 64)[:, None]
    batch = tiny_batch([1.0] * 64)._replace(
        obs=torch.zeros(64, 3), action=action, reward=action[:, 0]
    )
    optimizer, args = torch.optim.Adam(critic.parameters(), lr=5e-3), Args(passes=100)
    for _ in range(300):
        for layer in critic.layers:
            layer.follow()
        uwac.descend(
            uwac.critic_loss(critic, batch, 5 * batch.reward, torch.ones(64), 0.1)[0], optimizer
        )
    far = torch.cat([torch.linspace(-1, -0.8, 32), torch.linspace(0.8, 1, 32)])[:, None]
    inside, outside = (
        uwac.mean_and_variance(critic, batch.obs, a[:, None], args)[1] for a in (action, far)
    )
    assert outside.mean() > 2 * inside.mean()
    weights = [uwac.uncertainty_weight(v, args).mean() for v in (inside, outside)]
    assert weights[0] > weights[1]


def test_the_policy_beats_its_data_and_stays_near_them(monkeypatch):
    """One state, for ever; data actions in [−½, ½] earn what they say, 0 on average. The policy
    goes towards ½, as far as ε lets it: the MMD of one point u to actions spread over [−½, ½] is
    near u. Q, of slope 1, is among those that the spectral norm permits."""
    for name in ("HIDDEN", "VAE_HIDDEN"):
        monkeypatch.setattr(uwac, name, (64, 64))
    data = one_state_data(512)
    data.action[:, 0] = data.reward[:] = torch.linspace(-0.5, 0.5, 512)
    data.action_mid, data.action_half = torch.zeros(1), torch.ones(1)
    rates = dict(vae_lr=5e-3, critic_lr=3e-3, actor_lr=3e-3, multiplier_lr=0.05, target_rate=0.2)
    settings = dict(batch_size=32, gamma=0.5, num_samples=2, passes=3, bandwidth=1.0, max_mmd=0.3)
    torch.manual_seed(0)
    run = silent_train(monkeypatch, uwac, data, steps=500, warm_up_steps=100, **rates, **settings)
    assert 0.15 < torch.tanh(run.actor(torch.zeros(1, 3), torch.randn(1, 999, 1))).mean() < 0.5
    assert 0.15 < run.actor.act(torch.zeros(1, 3)).item() < 0.6
