"""MOReL against slow loops: what it calls unknown, where it halts, and that its values bound the
real ones from below."""
import copy
import math

import morel
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
    slow_critic,
    slow_dense,
    slow_sample,
    slow_soft_actor_loss,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from morel import Actor, Args, Critic, Dynamics
from test_dynamics import as_rows, filled_pool, no_run, plain_data, trained


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(morel, "HIDDEN", (7, 6))
    monkeypatch.setattr(morel, "DYNAMICS_HIDDEN", (5, 4))


def some_dynamics():
    """With units that all matter."""
    dynamics = make(Dynamics, 3, 2)
    dynamics.x_mean, dynamics.x_std = torch.randn(5), torch.rand(5) + 0.5
    dynamics.y_mean, dynamics.y_std = torch.randn(4), torch.rand(4) + 0.5
    dynamics.disc_mean, dynamics.disc_std = torch.tensor(1.0), torch.tensor(0.2)
    return dynamics


def slow_dynamics(dynamics, m, x):
    """y of network m at one raw x, one number at a time."""
    x = [
        (v - mean) / std
        for v, mean, std in zip(x, dynamics.x_mean.tolist(), dynamics.x_std.tolist(), strict=True)
    ]
    for i, layer in enumerate(dynamics.layers):
        x = [max(v, 0) for v in x] if i else x
        x = slow_dense(x, layer.weight[m].T.tolist(), layer.bias[m, 0].tolist())
    units = zip(x, dynamics.y_mean.tolist(), dynamics.y_std.tolist(), strict=True)
    return [mean + std * v for v, mean, std in units]


def slow_disc(ys):
    """The largest Euclidean distance between two networks' next states."""
    return max(
        math.sqrt(sum((a - b) ** 2 for a, b in zip(one[:-1], other[:-1])))
        for one in ys
        for other in ys
    )


# ---- the model


def test_forward_equals_a_loop():
    """(E1): standardised x, ReLU between layers, y in its own units; for rows of each network's
    own, or common."""
    dynamics, x = some_dynamics(), torch.randn(4, 3, 5)
    assert_close(
        dynamics(x),
        [[slow_dynamics(dynamics, m, x[m, b].tolist()) for b in range(3)] for m in range(4)],
    )
    assert_close(
        dynamics(x[0])[1], [slow_dynamics(dynamics, 1, x[0, b].tolist()) for b in range(3)]
    )


def test_dynamics_loss_equals_a_loop():
    """(E2): squares in units of σ_y, averaged over rows and outputs, summed over networks; common
    targets are refused."""
    dynamics, x, y = some_dynamics(), torch.randn(4, 3, 5), torch.randn(4, 3, 4)
    expected = 0.0
    for m in range(4):
        for b in range(3):
            said = slow_dynamics(dynamics, m, x[m, b].tolist())
            expected += (
                sum(
                    ((said[i] - float(y[m, b, i])) / float(dynamics.y_std[i])) ** 2
                    for i in range(4)
                )
                / 12
            )
    assert_close(morel.dynamics_loss(dynamics, x, y), expected)
    with pytest.raises(AssertionError):
        morel.dynamics_loss(dynamics, x, y[0])


def test_disagreement_equals_a_loop():
    """(E3): at each point the largest distance of two networks, the reward aside."""
    y = torch.randn(4, 6, 3)
    assert_close(
        morel.disagreement(y), [slow_disc([y[m, b].tolist() for m in range(4)]) for b in range(6)]
    )


def test_disagreement_in_known_cases():
    """Equal networks: 0. One off by d in each of two dimensions: √2 d. Any order of networks; twice
    the outputs, twice disc."""
    y = torch.randn(1, 6, 3).expand(4, -1, -1).clone()
    assert not morel.disagreement(y).any()
    y[2, :, :2] += 0.3
    assert_close(morel.disagreement(y), torch.full((6,), 0.3 * math.sqrt(2)))
    y = torch.randn(4, 6, 3)
    disc = morel.disagreement(y)
    assert_close(morel.disagreement(y[torch.tensor([2, 0, 3, 1])]), disc)
    assert_close(morel.disagreement(2 * y), 2 * disc)


def recorded_fit(monkeypatch, tmp_path, data, epochs=2, batch=8, **args):
    """Fits, and returns the model and [x | y] of every step."""
    monkeypatch.setattr(morel, "DYNAMICS_BATCH", batch)
    seen, loss = [], morel.dynamics_loss
    monkeypatch.setattr(
        morel,
        "dynamics_loss",
        lambda model, x, y: seen.append(torch.cat([x, y], 2)) or loss(model, x, y),
    )
    dynamics = Dynamics(data.obs_dim, data.action_dim)
    morel.fit(dynamics, data, Args(dynamics_epochs=epochs, **args), no_run(tmp_path))
    return dynamics, seen


def test_fit_shows_each_network_all_rows_in_its_own_order(monkeypatch, tmp_path):
    """No bootstrap: in each epoch each row once. y = [s′ − s | r]; units are the data's; disc's are
    over the data."""
    obs = torch.arange(30.0)[:, None]
    data = plain_data(obs, torch.zeros(30, 1), obs * 3 + 1, -obs[:, 0])
    dynamics, seen = recorded_fit(monkeypatch, tmp_path, data)
    assert [batch.shape[1] for batch in seen] == [8, 8, 8, 6] * 2
    first, second = (torch.cat(seen[i:i + 4], 1) for i in (0, 4))
    assert_close(first[..., 2], 2 * first[..., 0] + 1), assert_close(first[..., 3], -first[..., 0])
    orders = [tuple(row) for epoch in (first, second) for row in epoch[..., 0].tolist()]
    assert len(set(orders)) == 8 and all(sorted(order) == list(range(30)) for order in orders)
    std = obs.std(correction=0)
    # a constant: not by 0
    assert_close(torch.stack([dynamics.x_mean, dynamics.x_std]), [[14.5, 0.0], [std, 1.0]])
    assert_close(torch.stack([dynamics.y_mean, dynamics.y_std]), [[30.0, -14.5], [2 * std, std]])
    x = torch.cat([obs, 0 * obs], 1)
    disc = torch.tensor(
        [slow_disc([slow_dynamics(dynamics, m, row) for m in range(4)]) for row in x.tolist()]
    )
    assert_close([dynamics.disc_mean, dynamics.disc_std], [disc.mean(), disc.std(correction=0)])


def test_the_jump_into_another_episode_is_not_fitted(monkeypatch, tmp_path):
    """Terminated, yet standing: such a next state is another episode's. Terminated and fallen is
    what a model must know."""
    obs = torch.cat([torch.ones(30, 1), torch.zeros(30, 1), torch.arange(30.0)[:, None]], 1)
    next_obs = obs.clone()
    next_obs[4, 0] = 0.5  # fell
    data = plain_data(obs, torch.zeros(30, 1), next_obs, torch.zeros(30), "Hopper-v5")
    data.terminated[[4, 9]] = 1
    _, seen = recorded_fit(monkeypatch, tmp_path, data, epochs=1)
    assert set(torch.cat(seen, 1)[0, :, 2].tolist()) == set(range(30)) - {9}


def test_fit_is_kept_and_reproducible(monkeypatch, tmp_path, capsys):
    """The same seed, the same model, and torch's own draws as before; β may change without a new
    fit; Ctrl-C leaves nothing."""
    data = plain_data(*(torch.randn(50, 1) for _ in range(3)), torch.randn(50))
    start = Dynamics(1, 1)
    models, before = [copy.deepcopy(start) for _ in range(4)], torch.get_rng_state()
    for i, (model, seed) in enumerate(zip(models, (5, 5, 6))):
        morel.fit(model, data, Args(dynamics_epochs=2, seed=seed), no_run(tmp_path / str(i)))
    assert torch.equal(flat(models[0]), flat(models[1])) and not torch.equal(
        flat(models[0]), flat(models[2])
    )
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(SystemExit) as stop:
        morel.fit(models[3], data, Args(dynamics_epochs=2), no_run(tmp_path / "3", stop=True))
    assert (
        stop.value.code == 2
        and "start again" in capsys.readouterr().err
        and not (tmp_path / "3").exists()
    )
    monkeypatch.setattr(morel, "descend", lambda *_: pytest.fail("fitted again"))
    morel.fit(models[3], data, Args(dynamics_epochs=2, beta=9.0), no_run(tmp_path / "0"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[3].state_dict().values(), models[0].state_dict().values())
    )


# ---- (E4), (E5), (E6): imagination


def test_imagine_equals_a_loop(monkeypatch):
    """Row by row: the policy's action, disc of all networks, the next state of the rollout's own
    one; HALT where unknown."""
    monkeypatch.setitem(morel.FALLS, "Pendulum-v1", lambda s: s[:, 1] > 2.5)
    data, actor, dynamics = tiny_data(), make(Actor, 3, 2), some_dynamics()
    dynamics.disc_mean, dynamics.disc_std = torch.tensor(5.0), torch.tensor(1.0)
    whole, normal = (record_draws(monkeypatch, name) for name in ("randint", "randn_like"))
    rows = morel.imagine(
        Args(rollout_starts=24, horizon=3, beta=2.0, gamma=0.9), data, dynamics, actor
    )

    worst = -max(abs(r) for r in data.reward.tolist()) / 0.1
    starts, picks = whole  # one network for a whole rollout
    alive = [(data.obs[i].tolist(), int(m)) for i, m in zip(starts, picks)]
    expected = []
    kinds = set()
    for step in range(3):
        still = []
        for b, (obs, m) in enumerate(alive):
            action, _ = slow_sample(actor, torch.tensor(obs), normal[step][b], -20.0)
            said = [slow_dynamics(dynamics, i, obs + action) for i in range(4)]
            unknown = slow_disc(said) > 5.0 + 2 * 1.0
            next_obs = [obs[i] + said[m][i] for i in range(3)]
            fell = next_obs[1] > 2.5
            expected.append(
                obs + action + next_obs + [worst if unknown else said[m][3], float(unknown or fell)]
            )
            kinds.add((unknown, fell))
            if not unknown and not fell:
                still.append((next_obs, m))
        alive = still
    assert kinds == {(a, b) for a in (False, True) for b in (False, True)} and len(expected) > 30, (
        kinds,
        len(expected),
    )
    assert_close(as_rows(rows), expected)
    assert not any(column.requires_grad for column in rows)


class Constant:
    """A model with these y (M, S + 1) for every x, and whose disc has this mean and std over the
    data."""

    def __init__(self, y, mean, std=0.0):
        self.y, self.disc_mean, self.disc_std = torch.as_tensor(y), mean, std

    def __call__(self, x):
        return self.y[:, None].expand(-1, len(x), -1)


@pytest.mark.parametrize("threshold, halts", [(0.31, False), (0.29, True)])
def test_two_networks_that_differ_by_d(threshold, halts):
    """disc = d = 0.3 everywhere. Threshold above: nothing halts. Below: each rollout on its first
    row, at V(HALT), an end."""
    y = torch.ones(4, 4)
    y[3, 1] += 0.3
    data = tiny_data(action_dim=1)
    data.reward[3] = -7.0
    rows = morel.imagine(Args(rollout_starts=5, horizon=3, gamma=0.9), data, Constant(y, threshold),
                         lambda obs: (obs[:, :1], obs[:, :1]))
    assert len(rows.obs) == (5 if halts else 15)
    assert rows.terminated.unique().tolist() == [float(halts)]
    assert_close(rows.reward, torch.full((len(rows.obs),), -70.0 if halts else 1.0))
    target = morel.soft_td_target(
        make(Actor, 3, 1), make(Critic, 3, 1), torch.tensor(0.3), rows, 0.9
    )
    assert torch.equal(target, rows.reward) == halts
    paid_for_ever = sum(-7.0 * 0.9**k for k in range(1000))  # of −κ (1 − γᴷ) / (1 − γ), K → ∞
    assert not halts or abs(target[0] - paid_for_ever) < 1e-9


def test_threshold_is_of_the_data(monkeypatch, tmp_path):
    """β = 0 halts the share of the data's pairs that are above the mean; the β of the largest disc
    halts none of them."""
    data = plain_data(
        torch.randn(200, 2), torch.rand(200, 1), torch.randn(200, 2), torch.randn(200)
    )
    dynamics = Dynamics(2, 1)
    morel.fit(dynamics, data, Args(dynamics_epochs=3), no_run(tmp_path))
    rows = data.rows(torch.arange(200))
    disc = morel.disagreement(dynamics(torch.cat([rows.obs, rows.action], 1))).detach()
    monkeypatch.setattr(data, "sample", lambda n: rows)
    monkeypatch.setattr(morel, "sample_action", lambda mean, log_std: (rows.action, None))
    for beta, share in (
        (0.0, (disc > disc.mean()).double().mean()),
        ((disc.max() - disc.mean()) / disc.std(correction=0), 0.0),
        (2.0, (disc > disc.mean() + 2 * disc.std(correction=0)).double().mean()),
    ):
        args = Args(rollout_starts=200, horizon=1, beta=float(beta) + 1e-9)
        assert_close(morel.imagine(args, data, dynamics, Actor(2, 1)).terminated.mean(), share)
    assert 0.2 < (disc > disc.mean()).double().mean() < 0.8


def test_it_fires_on_random_actions_and_not_on_held_out_data(monkeypatch, tmp_path):
    """C9: data of a policy with a little noise. At such pairs, held out, it hardly fires; at random
    actions often."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(morel, "DYNAMICS_HIDDEN", (64, 64))

    def transitions(n, random_actions):
        obs = torch.randn(n, 3)
        action = torch.tanh(-obs[:, :1]) * 0.8 + 0.05 * torch.randn(n, 1)
        action = 2 * torch.rand(n, 1) - 1 if random_actions else action.clamp(-1, 1)
        delta = torch.cat(
            [
                torch.sin(obs[:, 1:2]) + action**3,
                0.1 * obs[:, :1] * action,
                0.2 * torch.cos(3 * obs[:, 2:]),
            ],
            1,
        )
        return obs, action, obs + delta, obs[:, 0]

    dynamics = Dynamics(3, 1)
    morel.fit(
        dynamics, plain_data(*transitions(4000, False)), Args(dynamics_epochs=15), no_run(tmp_path)
    )
    mean, std = dynamics.disc_mean, dynamics.disc_std
    fires = {}
    for kind in (False, True):
        obs, action, *_ = transitions(2000, kind)
        fires[kind] = (
            (morel.disagreement(dynamics(torch.cat([obs, action], 1))) > mean + 5 * std)
            .double()
            .mean()
            .item()
        )
    assert fires[False] < 0.02 and fires[True] > 10 * fires[False] and fires[True] > 0.15, fires


# ---- (E7): the soft form


def soft_and_slow(monkeypatch, weight, **args):
    """imagine with a penalty, and the same by a loop, row by row."""
    monkeypatch.setitem(morel.FALLS, "Pendulum-v1", lambda s: s[:, 1] > 2.5)
    data, actor, dynamics = tiny_data(), make(Actor, 3, 2, scale=1.0), some_dynamics()
    whole, normal = (record_draws(monkeypatch, name) for name in ("randint", "randn_like"))
    args = Args(rollout_starts=24, horizon=3, penalty="soft", penalty_weight=weight, **args)
    rows = morel.imagine(args, data, dynamics, actor)
    starts, picks = whole
    alive, expected = [(data.obs[i].tolist(), int(m)) for i, m in zip(starts, picks)], []
    for step in range(3):
        still = []
        for b, (obs, m) in enumerate(alive):
            action, _ = slow_sample(actor, torch.tensor(obs), normal[step][b], -20.0)
            said = [slow_dynamics(dynamics, i, obs + action) for i in range(4)]
            next_obs = [obs[i] + said[m][i] for i in range(3)]
            fell = next_obs[1] > 2.5
            expected.append(
                obs + action + next_obs + [said[m][3] - weight * slow_disc(said), float(fell)]
            )
            if not fell:
                still.append((next_obs, m))
        alive = still
    assert 24 < len(expected) < 72, "some must fall, not all at once"
    return rows, expected


def test_soft_penalty_equals_a_loop(monkeypatch):
    """At every pair λ disc is subtracted; no pair halts, whatever β; only a fall ends a rollout."""
    rows, expected = soft_and_slow(monkeypatch, 1.7, beta=0.0)
    assert_close(as_rows(rows), expected)
    assert not any(column.requires_grad for column in rows)


def test_soft_penalty_in_known_cases():
    """disc = 0.3, λ = 2: 0.6 less. The slope in λ is −disc; the reward's and disc's own slopes are
    1 and −λ."""
    reward, disc = torch.randn(5, requires_grad=True), torch.rand(5, requires_grad=True)
    weight = torch.tensor(2.0, requires_grad=True)
    assert_close(morel.soft_penalty(torch.ones(2), torch.tensor([0.3, 0.0]), 2.0), [0.4, 1.0])
    morel.soft_penalty(reward, disc, weight).sum().backward()
    assert_close(reward.grad, torch.ones(5))
    assert_close(disc.grad, torch.full((5,), -2.0))
    assert_close(weight.grad, -disc.sum())


def test_without_weight_it_is_the_unpenalised_model():
    """λ = 0: the rows of HALT with a threshold that nothing reaches, bit for bit, and not those of
    the default threshold. Any λ leaves states, actions and ends as they are."""
    data, actor, dynamics = tiny_data(), make(Actor, 3, 2), some_dynamics()

    def imagined(**args):
        torch.manual_seed(1)
        return morel.imagine(Args(rollout_starts=24, horizon=3, **args), data, dynamics, actor)

    free = imagined(penalty="soft", penalty_weight=0.0)
    assert torch.equal(as_rows(free), as_rows(imagined(beta=1e9)))
    assert len(imagined(beta=0.0).obs) < len(free.obs)
    soft = imagined(penalty="soft", penalty_weight=3.0)
    assert (soft.reward < free.reward).all()
    assert torch.equal(as_rows(soft._replace(reward=free.reward)), as_rows(free))


def test_the_soft_form_trains_under_its_own_name(monkeypatch, tmp_path):
    """-soft beside the default; γ = 1 is allowed, as nothing pays for ever."""
    for args, name in ((dict(), ""), (dict(penalty="soft", gamma=1.0), "-soft")):
        run = trained(morel, monkeypatch, tmp_path, steps=2, rollout_starts=10, **args)
        assert run.variant == name and run.steps_that_moved("actor") == [1, 2]


# ---- the pessimistic MDP


class Corridor:
    """Five cells with known moves, −1 or +1, by the action's sign; networks disagree at the pairs
    called unknown."""
    disc_mean, disc_std = 0.5, 0.0

    def __init__(self, unknown, reward):
        self.unknown, self.reward = unknown, reward

    @staticmethod
    def move(s, right):
        return (s + (1 if right else -1)) % 5

    def __call__(self, x):
        y = torch.zeros(4, len(x), 4)
        for b, (s, right) in enumerate(
            zip(x[:, 0].round().long().tolist(), (x[:, 3] > 0).tolist())
        ):
            y[:, b, 0] = self.move(s, right) - s
            y[:, b, 3] = self.reward[s, int(right)]
            y[3, b, 1] += (s, right) in self.unknown
        return y


def pessimistic_mdp(unknown, reward, **penalty):
    """What imagine makes of it: for each pair the reward, the next cell and whether it ends; (5, 2)
    each."""
    data = tiny_data(300, action_dim=1)
    data.obs.zero_()
    data.obs[:, 0] = torch.arange(300) % 5
    data.reward.zero_()
    data.reward[:10] = torch.as_tensor(reward).flatten()  # κ is the largest |r| of the data
    args = Args(rollout_starts=600, horizon=1, gamma=0.9, **penalty)
    rows = morel.imagine(
        args, data, Corridor(unknown, reward), lambda obs: (0 * obs[:, :1], 0 * obs[:, :1])
    )
    got = np.full((3, 5, 2), np.nan)
    for obs, action, r, next_obs, ends in zip(*(part.tolist() for part in rows)):
        got[:, round(obs[0]), int(action[0] > 0)] = r, round(next_obs[0]), ends
    assert not np.isnan(got).any()
    return got


def evaluate(policy, mdp, sweeps=400):
    reward, following, ends = mdp
    value = np.zeros(5)
    for _ in range(sweeps):
        value = (policy * (reward + 0.9 * (1 - ends) * value[following.astype(int)])).sum(1)
    return value


def test_its_values_are_lower_bounds():
    """Some pairs unknown, whatever the sign of the rewards: no policy is worth more than in truth.
    None unknown: equal."""
    rng = np.random.default_rng(0)
    for shift in (-2.0, 0.0, 2.0):
        reward = rng.normal(size=(5, 2)) + shift
        truth = pessimistic_mdp(set(), reward)
        assert not truth[2].any()
        assert_close(truth[0], reward)
        pessimist = pessimistic_mdp({(0, True), (3, False)}, reward)
        assert pessimist[2].sum() == 2
        for _ in range(20):
            policy = rng.dirichlet(np.ones(2) * 0.3, size=5)
            assert (evaluate(policy, pessimist) <= evaluate(policy, truth) + 1e-9).all()


def test_the_best_policy_goes_round_the_unknown():
    """The short way to cell 0 leads over an unknown pair: known, it is taken; unknown, the long way
    is. With the soft form the weight decides: 0.01 for the pair costs less than the long way, 2
    costs more."""
    reward = np.zeros((5, 2))
    reward[1, 0] = reward[4, 1] = 1.0  # arrives at 0

    def best_first_step(unknown, **penalty):
        pairs, value = pessimistic_mdp(unknown, reward, **penalty), np.zeros(5)
        for _ in range(300):
            q = pairs[0] + 0.9 * (1 - pairs[2]) * value[pairs[1].astype(int)]
            value = q.max(1)
        return q[2].argmax()

    assert best_first_step(set()) == 0 and best_first_step({(1, False)}) == 1
    for weight, step in ((0.0, 0), (0.01, 0), (2.0, 1)):
        assert best_first_step({(1, False)}, penalty="soft", penalty_weight=weight) == step


# ---- SAC's losses against loops


def test_soft_td_target_equals_a_loop(monkeypatch):
    """(E8), (E9): one action per next observation, the smaller critic, minus α log π; nothing after
    an end."""
    actor, critic, batch, expected = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    y = morel.soft_td_target(actor, critic, torch.tensor(0.3), batch, 0.9)
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
    """(E10): the mean over transitions of the squared error, summed over two critics; a column of
    targets is refused."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, _ = morel.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    with pytest.raises(AssertionError):
        morel.critic_loss(critic, batch, y[:, None])


def test_actor_loss_equals_a_loop(monkeypatch):
    """(E11) with its gradient, and the log π that (E12) needs."""
    actor, critic, obs = make(Actor, 3, 2), make(Critic, 3, 2), torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    loss, *metrics = morel.actor_loss(actor, critic, torch.tensor(0.3), obs)
    loss.backward()

    def slow():
        return slow_soft_actor_loss(actor, critic, 0.3, obs, draws[0], -20.0)

    for got, want in zip((loss, *metrics), slow()):
        assert_close(got, want)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])


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
    then (E13), exactly."""
    args = Args(batch_size=5, real_share=0.5, gamma=0.9, target_rate=0.3)
    data, pool, nets = tiny_data(), filled_pool(morel, tiny_data(9)), networks()
    actor, critic, critic_target, log_alpha = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = morel.update(args, data, pool, *nets, *optimizers)

        torch.manual_seed(seed)
        real, model, alpha = data.sample(2), pool.sample(3), log_alpha.detach().exp()
        batch = real._replace(
            **{
                name: torch.cat([getattr(real, name), getattr(model, name)])
                for name in real._fields
            }
        )
        q_loss, q_batch = morel.critic_loss(
            critic, batch, morel.soft_td_target(actor, critic_target, alpha, batch, 0.9)
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, log_prob, q_policy = morel.actor_loss(actor, critic, alpha, batch.obs)
        pi_grad = step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        log_alpha.data += 0.01 * (log_prob.mean() - 2)  # (E12), for two actions
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
            ends=batch.terminated.mean(),
            entropy=-log_prob.mean(),
            entropy_coef=alpha,
        )
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_with_real_rows_alone_it_is_sac():
    """real_share 1: the same step as sac.py's on the same data, bit for bit, whatever is in the
    pool."""
    nets, data, pool = networks(), tiny_data(), filled_pool(morel, tiny_data())
    other = copy.deepcopy(nets)
    torch.manual_seed(3)
    morel.update(
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
    morel.critic_loss(
        critic, batch, morel.soft_td_target(actor, critic_target, log_alpha.exp(), batch, 0.9)
    )[0].backward()
    assert log_alpha.grad is None and all(
        p.grad is None for net in (actor, critic_target) for p in net.parameters()
    )
    critic.zero_grad()
    morel.descend(
        morel.actor_loss(actor, critic, log_alpha.detach().exp(), batch.obs)[0],
        sgd(actor, critic, log_alpha)[0],
    )
    assert all(p.grad is None for p in critic.parameters()) and all(
        p.grad is not None for p in actor.parameters()
    )
