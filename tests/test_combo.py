"""COMBO against slow loops, its special cases CQL and SAC, and between whom its caution lies."""
import copy
import math
import sys

from common import parse_args

import combo
import cql
import numpy as np
import pytest
import sac
import torch
from combo import Actor, Args, Critic
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    record_draws,
    slow_critic,
    slow_sample,
    slow_soft_actor_loss,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from test_cql import look_up, minimise
from test_dynamics import as_rows, filled_pool, slow_dynamics, some_dynamics, trained


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(combo, "HIDDEN", (7, 6))
    monkeypatch.setattr(combo, "DYNAMICS_HIDDEN", (5, 4))


# ---- each function against a loop


def test_imagine_equals_a_loop(monkeypatch):
    """The policy's action, one elite's sample of the next state and of the reward, without a
    penalty; the fallen stay behind."""
    monkeypatch.setitem(combo.FALLS, "Pendulum-v1", lambda s: s[:, 0] > 0.5)
    data, actor, dynamics = tiny_data(), make(Actor, 3, 2), some_dynamics(combo)
    dynamics.elites.copy_(torch.tensor([6, 2, 0, 3, 5]))
    whole, normal = (record_draws(monkeypatch, name) for name in ("randint", "randn_like"))
    rows = combo.imagine(Args(rollout_starts=6, horizon=3), data, dynamics, actor)

    starts, *picks = whole
    alive, expected = data.obs[starts].tolist(), []
    for step in range(3):
        still = []
        for b, obs in enumerate(alive):
            action, _ = slow_sample(actor, torch.tensor(obs), normal[2 * step][b], -5.0)
            mean, log_var = slow_dynamics(
                dynamics, (6, 2, 0, 3, 5)[int(picks[step][b])], obs + action
            )
            y = [
                mean[i] + math.exp(log_var[i] / 2) * float(normal[2 * step + 1][b, i])
                for i in range(4)
            ]
            next_obs = [obs[i] + y[i] for i in range(3)]
            expected.append(obs + action + next_obs + [y[3], float(next_obs[0] > 0.5)])
            if next_obs[0] <= 0.5:
                still.append(next_obs)
        alive = still
    assert 6 < len(expected) < 18, "some must fall, not all at once"
    assert_close(as_rows(rows), expected)
    assert not any(column.requires_grad for column in rows)


def test_uniform_rollouts_equal_a_loop(monkeypatch):
    """The notes' other μ: actions spread over [-1, 1], whatever the policy; the rest of a rollout
    is as before."""
    data, dynamics = tiny_data(), some_dynamics(combo)
    whole, uniform, normal = (
        record_draws(monkeypatch, name) for name in ("randint", "rand_like", "randn_like")
    )
    rows = combo.imagine(
        Args(rollout_starts=6, horizon=2, rollout_policy="uniform"),
        data,
        dynamics,
        make(Actor, 3, 2),
    )
    starts, *picks = whole
    alive, expected = data.obs[starts].tolist(), []
    for step in range(2):
        for b, obs in enumerate(alive):
            action = [2 * u - 1 for u in uniform[step][b].tolist()]
            mean, log_var = slow_dynamics(dynamics, int(picks[step][b]), obs + action)
            y = [
                mean[i] + math.exp(log_var[i] / 2) * float(normal[2 * step + 1][b, i])
                for i in range(4)
            ]
            expected.append(obs + action + [obs[i] + y[i] for i in range(3)] + [y[3], 0.0])
        alive = [row[5:8] for row in expected[-6:]]
    assert_close(as_rows(rows), expected)


def test_uniform_rollouts_cover_all_actions_and_do_not_depend_on_the_policy():
    """A policy that always steers to one side: its rollouts show that side alone, uniform ones all
    of [-1, 1] alike."""
    data, dynamics = tiny_data(action_dim=1), combo.Dynamics(3, 1)
    shown = {}
    for policy in ("policy", "uniform"):
        args = Args(rollout_starts=10_000, horizon=1, rollout_policy=policy)
        shown[policy] = combo.imagine(
            args, data, dynamics, lambda obs: (0 * obs[:, :1] + 2, 0 * obs[:, :1] - 5)
        ).action[:, 0]
    assert shown["policy"].min() > 0.9
    assert shown["uniform"].abs().max() <= 1 and shown["uniform"].mean().abs() < 0.03
    assert_close(shown["uniform"].std(), 1 / math.sqrt(3), 2e-2)


def test_uniform_rollouts_train_under_their_own_name(monkeypatch, tmp_path):
    for args, name in ((dict(), ""), (dict(rollout_policy="uniform"), "-uniform")):
        run = trained(
            combo, monkeypatch, tmp_path, steps=2, rollout_starts=10, num_samples=2, **args
        )
        assert run.variant == name and run.steps_that_moved("actor") == [1, 2]


def test_td_target_equals_a_loop(monkeypatch):
    """(E6), (E7): one sampled action per next observation, the smaller critic, no entropy; nothing
    after a termination."""
    actor, critic, batch, expected = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch(), []
    draws = record_draws(monkeypatch, "randn_like")
    y = combo.td_target(actor, critic, batch, 0.9)
    for b in range(4):
        action, _ = slow_sample(actor, batch.next_obs[b], draws[0][b], -5.0)
        q = min(slow_critic(critic, k, batch.next_obs[b], action) for k in range(2))
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else q)))
    assert_close(y, expected)
    assert not y.requires_grad


def test_soft_max_q_equals_a_loop(monkeypatch):
    """(E8): log of the sum over N uniform actions, N of π(·|s), N of π(·|s′), each divided by its
    density, all valued at s."""
    actor, critic, batch = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch()
    uniform, normal = record_draws(monkeypatch, "rand"), record_draws(monkeypatch, "randn_like")
    got = combo.soft_max_q(actor, critic, batch.obs, batch.next_obs, 3)
    for b in range(4):
        proposed = [
            ([2 * u - 1 for u in uniform[0][b, n].tolist()], math.log(1 / 4)) for n in range(3)
        ]
        for obs, noise in ((batch.obs, normal[0]), (batch.next_obs, normal[1])):
            proposed += [slow_sample(actor, obs[b], noise[b, n], -5.0) for n in range(3)]
        for k in range(2):
            terms = [
                math.exp(slow_critic(critic, k, batch.obs[b], action) - density)
                for action, density in proposed
            ]
            assert_close(got[k, b], math.log(sum(terms)))


def test_critic_loss_equals_a_loop():
    """(E9): all rows in the squared error; up only the first, real ones; down the soft maximum."""
    critic = make(Critic, 3, 2)
    batch = tiny_batch((0, 1, 0, 0, 0))
    y = torch.randn(5)
    soft_max = torch.randn(2, 3)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(5)]
        for k in range(2)
    ]
    squares = sum((q[k][b] - float(y[b])) ** 2 / 5 for k in range(2) for b in range(5))
    gaps = sum(sum(soft_max[k].tolist()) / 3 - (q[k][0] + q[k][1]) / 2 for k in range(2))
    got = combo.critic_loss(critic, batch, 2, y, soft_max, 1.7)
    assert_close(
        torch.stack(got),
        [squares + 1.7 * gaps, gaps / 2, (q[0][0] + q[0][1] + q[1][0] + q[1][1]) / 4],
    )


def test_critic_loss_refuses_other_shapes():
    """Targets (B, 1), a soft maximum (B,) or of one critic would broadcast."""
    critic, batch = Critic(3, 2), tiny_batch()
    for y, soft_max in (
        (torch.zeros(4, 1), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(2)),
        (torch.zeros(4), torch.zeros(1, 2)),
        (torch.zeros(4), torch.zeros(2, 2, 1)),
    ):
        with pytest.raises(AssertionError):
            combo.critic_loss(critic, batch, 2, y, soft_max, 1.0)


def test_actor_loss_equals_a_loop(monkeypatch):
    """(E10) with its gradient, and the log π that (E11) needs."""
    actor, critic, obs = make(Actor, 3, 2), make(Critic, 3, 2), torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    loss, *metrics = combo.actor_loss(actor, critic, torch.tensor(0.3), obs)
    loss.backward()

    def slow():
        return slow_soft_actor_loss(actor, critic, 0.3, obs, draws[0], -5.0)

    for got, want in zip((loss, *metrics), slow()):
        assert_close(got, want)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])


# ---- the conservative term


def test_constant_q_sums_over_all_thirty_actions(monkeypatch):
    """Q = c, density ½ per axis: c + log 3N + A log 2. A reshape lost, as in the public code, would
    leave log 3."""
    monkeypatch.setattr(
        combo,
        "sample_action",
        lambda mean, _: (mean, torch.full(mean.shape[:-1], -2 * math.log(2))),
    )
    obs = torch.randn(4, 3)
    soft_max = combo.soft_max_q(
        make(Actor, 3, 2), lambda obs, action: torch.full((2, len(action)), 1.5), obs, obs, 10
    )
    assert_close(soft_max, torch.full((2, 4), 1.5 + math.log(30) + 2 * math.log(2)))


def test_gap_ignores_a_constant_added_to_q():
    actor, critic, batch, gaps = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch(), []
    for constant in (0.0, 123.0):
        critic.layers[-1].bias.data += constant
        torch.manual_seed(1)
        soft_max = combo.soft_max_q(actor, critic, batch.obs[2:], batch.next_obs[2:], 2)
        gaps.append(combo.critic_loss(critic, batch, 2, torch.zeros(4), soft_max, 1.0)[1])
    assert_close(gaps[0], gaps[1])


def test_the_push_down_has_a_gradient_and_the_push_up_too():
    """β large, one step: Q falls at the sampled actions of imagined states, and rises at the data's
    pairs."""
    actor, critic, batch, seen = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch((0, 0, 0, 0)), []

    def q_means():
        return critic(*seen[0]).mean().item(), critic(batch.obs[:2], batch.action[:2]).mean().item()

    def watched(obs, action):
        seen.append((obs, action))
        return critic(obs, action)

    soft_max = combo.soft_max_q(actor, watched, batch.obs[2:], batch.next_obs[2:], 2)
    before, y = q_means(), critic(batch.obs, batch.action).mean(0).detach()
    down = torch.autograd.grad(soft_max.sum(), critic.layers[0].weight, retain_graph=True)[0]
    assert down.abs().max() > 1e-3, "a push-down behind a stop-gradient is none"
    loss, *_ = combo.critic_loss(critic, batch, 2, y, soft_max, 100.0)
    with_it = torch.autograd.grad(loss, critic.layers[0].weight, retain_graph=True)[0]
    stopped, *_ = combo.critic_loss(critic, batch, 2, y, soft_max.detach(), 100.0)
    without = torch.autograd.grad(stopped, critic.layers[0].weight)[0]
    assert_close(with_it - without, 100.0 * down / 2, 1e-8)  # two imagined states
    step_by_hand(loss, list(critic.parameters()), 1e-5)
    after = q_means()
    assert after[0] < before[0] and after[1] > before[1]


def test_it_cancels_where_data_and_sampled_actions_coincide():
    """Imagined states that are the data's, and of each the data's action alone: a term of zero, and
    no gradient of it."""
    critic, half = make(Critic, 3, 2), tiny_batch((0, 0))
    batch = half._replace(**{name: torch.cat([getattr(half, name)] * 2) for name in half._fields})
    y = torch.randn(4)
    # the logarithm of one exponential, of density 1
    soft_max = critic(batch.obs[2:], batch.action[2:])
    grads = []
    for beta in (0.0, 50.0):
        loss, gap, _ = combo.critic_loss(critic, batch, 2, y, soft_max, beta)
        assert abs(gap) < 1e-12
        grads.append(torch.autograd.grad(loss, critic.layers[0].weight, retain_graph=True)[0])
    assert_close(grads[0], grads[1])


def test_without_beta_it_is_td_learning_and_with_real_states_alone_cql():
    """β = 0: SAC's loss, over both kinds of rows. f = 1, with the push-down in the data's states:
    CQL's, for any β."""
    critic, batch, y, soft_max = make(Critic, 3, 2), tiny_batch(), torch.randn(4), torch.randn(2, 4)
    assert_close(
        combo.critic_loss(critic, batch, 2, y, soft_max[:, :2], 0.0)[0],
        sac.critic_loss(critic, batch, y)[0],
        1e-12,
    )
    ours = combo.critic_loss(critic, batch, 4, y, soft_max, 1.7)
    assert_close(
        torch.stack(ours),
        torch.stack(cql.critic_loss(critic, batch, y, soft_max, torch.tensor(1.7))),
        1e-12,
    )


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


@pytest.mark.parametrize("beta", [0.0, 1.7])
def test_update_is_the_algorithm_box(beta):
    """Q, pushed down in imagined states alone; π on the new Q, then α, with the old α; then (E12).
    With β = 0 the critic's step is that of model-based SAC."""
    args = Args(batch_size=5, real_share=0.5, gamma=0.9, target_rate=0.3, beta=beta, num_samples=3)
    data, pool, nets = tiny_data(), filled_pool(combo, tiny_data(9)), networks()
    actor, critic, critic_target, log_alpha = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = combo.update(args, data, pool, *nets, *optimizers)

        torch.manual_seed(seed)
        real, model, alpha = data.sample(2), pool.sample(3), log_alpha.detach().exp()
        batch = real._replace(
            **{
                name: torch.cat([getattr(real, name), getattr(model, name)])
                for name in real._fields
            }
        )
        y = combo.td_target(actor, critic_target, batch, 0.9)
        soft_max = combo.soft_max_q(actor, critic, model.obs, model.next_obs, 3)
        q_loss, gap, q_data = combo.critic_loss(critic, batch, 2, y, soft_max, beta)
        plain = sac.critic_loss(critic, batch, y)[0]
        assert (q_loss == plain) == (beta == 0)
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, log_prob, q_policy = combo.actor_loss(actor, critic, alpha, batch.obs)
        pi_grad = step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        log_alpha.data += 0.01 * (log_prob.mean() - 2)  # (E11), for two actions
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
            q_data=q_data,
            q_policy=q_policy,
            gap=gap,
            entropy=-log_prob.mean(),
            entropy_coef=alpha,
        )
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_the_critics_loss_moves_the_critic_only():
    """No gradient to the policy that proposed the actions, nor to Q̄."""
    batch, (actor, critic, critic_target, _) = tiny_batch(), networks()
    y = combo.td_target(actor, critic_target, batch, 0.9)
    soft_max = combo.soft_max_q(actor, critic, batch.obs[2:], batch.next_obs[2:], 3)
    loss, gap, _ = combo.critic_loss(critic, batch, 2, y, soft_max, 1.0)
    loss.backward()
    assert all(p.grad is None for net in (actor, critic_target) for p in net.parameters())
    assert all(p.grad is not None for p in critic.parameters()) and not gap.requires_grad


# ---- tuned values


def test_tuned_values(monkeypatch, capsys):
    """Three levels of three bodies; what the user sets stands, what is taken from TUNED is said."""
    table = {
        "halfcheetah": ((5, 0.5), (5, 0.5), (5, 5.0)),
        "hopper": ((5, 5.0), (5, 0.5), (5, 5.0)),
        "walker2d": ((1, 5.0), (1, 0.5), (1, 5.0)),
    }
    assert combo.TUNED == {
        f"{body}-{level}": dict(horizon=horizon, beta=beta)
        for body, row in table.items()
        for level, (horizon, beta) in zip(("medium", "medium-replay", "medium-expert"), row)
    }
    monkeypatch.setattr(sys, "argv", ["combo.py", "--env", "walker2d-medium", "--beta", "1"])
    args = parse_args(Args, combo.TUNED)
    assert (args.horizon, args.beta) == (1, 1.0)
    assert capsys.readouterr().out == "tuned for walker2d-medium: --horizon 1\n"


# ---- how cautious it is (C12)


def rows_of(counts):
    """(s, a) as often as counts (S, A) says, in order."""
    s, a = np.indices(counts.shape).reshape(2, -1).repeat(counts.ravel(), axis=1)
    return torch.as_tensor(s), torch.as_tensor(a)


def value_at_start(loss_of, gamma=0.7, weight=0.3, sweeps=20):
    """Exact evaluation of a fixed policy on a small MDP: the critic's loss is minimised over a
    table, again and again. The data know the policy's favourite action badly. loss_of(table, y of
    all pairs, data's counts, model's counts, policy) -> loss."""
    rng = np.random.default_rng(0)
    # (S, A), (S, A, S′)
    reward, dynamics = rng.normal(size=(3, 3)), rng.dirichlet(np.ones(3), size=(3, 3))
    data = np.array([[1, 5, 4], [5, 2, 3], [4, 5, 1]])
    policy = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    step = np.einsum("ijk,kl->ijkl", dynamics, policy).reshape(9, 9)
    # of the policy in the model, here the truth
    visits = np.linalg.solve(np.eye(9) - gamma * step.T, (policy / 3).ravel())
    model = np.rint(300 * (1 - gamma) * visits).astype(int).reshape(3, 3)
    q = np.zeros((3, 3))
    for _ in range(sweeps):
        y = torch.as_tensor((reward.ravel() + gamma * step @ q.ravel()).reshape(3, 3))
        q = minimise(
            lambda table, y=y: loss_of(table, y, data * 10, model, torch.as_tensor(policy), weight),
            (3, 3),
        ).numpy()
    truth = np.linalg.solve(np.eye(9) - gamma * step, reward.ravel()).reshape(3, 3)
    return (policy * q).sum(1).mean(), (policy * truth).sum(1).mean()


def combos_loss(table, y, data, model, policy, weight):
    (s, a), (ms, ma) = rows_of(data), rows_of(model)
    both = torch.cat([s, ms]), torch.cat([a, ma])
    batch = tiny_batch()._replace(obs=both[0][:, None], action=both[1][:, None])
    soft_max = (policy * table).sum(1)[ms][None]  # ρ's actions: the policy's
    return combo.critic_loss(look_up(table), batch, len(s), y[both], soft_max, weight)[0]


def cqls_loss(table, y, data, model, policy, weight):
    s, a = rows_of(data)
    batch = tiny_batch()._replace(obs=s[:, None], action=a[:, None])
    return cql.critic_loss(
        look_up(table), batch, y[s, a], (policy * table).sum(1)[s][None], torch.tensor(weight)
    )[0]


def test_its_value_lies_between_cqls_and_the_truth():
    """C12: with the same weight and an exact model, COMBO's value of the policy is a lower bound,
    and tighter than CQL's."""
    ours, truth = value_at_start(combos_loss)
    theirs, _ = value_at_start(cqls_loss)
    plain, _ = value_at_start(lambda *args: combos_loss(*args[:-1], 0.0))
    assert_close(plain, truth, 5e-3)
    assert theirs < ours - 0.02 and ours < truth - 0.02, (theirs, ours, truth)


@pytest.mark.parametrize("beta, value", [(0.0, 4.0), (3.0, 2.0), (5.0, 2 / 3)])
def test_an_action_that_the_data_lack(beta, value):
    """One state, γ = ½. The data's action pays 1, so their way is worth 2; of the other, which they
    lack, the model says 3. A policy that does each half the time is worth 4 − ⅔ β: more than their
    way only while β < 3."""
    real, imagined = torch.zeros(8, dtype=torch.long), torch.tensor([0, 1]).repeat(4)
    action = torch.cat([real, imagined])
    batch = tiny_batch([0.0] * 16)._replace(
        obs=torch.zeros(16, 1, dtype=torch.long), action=action[:, None]
    )
    q = torch.zeros(1, 2)
    for _ in range(60):
        y = torch.tensor([1.0, 3.0])[action] + 0.5 * q.mean()
        q = minimise(
            lambda table, y=y: combo.critic_loss(
                look_up(table), batch, 8, y, table.mean().expand(1, 8), beta
            )[0],
            size=(1, 2),
        )
    assert_close(q.mean(), value, 1e-6)


def test_an_optimistic_model_is_not_believed(monkeypatch):
    """A line: the action is the step, and the model predicts the more reward the further one goes;
    the data are of |s| < 1, and go back to 0. β = 0 walks off; with β the policy stays."""
    monkeypatch.setattr(combo, "HIDDEN", (32, 32))

    class Line:
        elites = torch.arange(5)

        def __call__(self, x):
            y = torch.cat([0.5 * x[:, 3:], 0 * x[:, :2], x[:, :1]], 1)
            return y.expand(7, -1, -1), torch.full((7, len(x), 4), -8.0)

    reached = []
    for beta in (0.0, 20.0):
        torch.manual_seed(0)
        args = Args(
            batch_size=64, beta=beta, rollout_starts=200, gamma=0.9, target_rate=0.1, num_samples=2
        )
        data, pool = tiny_data(200, action_dim=1), filled_pool(combo, tiny_data(1000, action_dim=1))
        for column in (data.obs, data.action, data.reward, data.next_obs, data.terminated):
            column.zero_()
        data.obs[:, 0] = data.reward[:] = torch.linspace(-1, 1, 200)
        data.action.copy_((-data.obs[:, :1] + 0.2 * torch.randn(200, 1)).clamp(-1, 1))
        data.next_obs[:, 0] = data.obs[:, 0] + 0.5 * data.action[:, 0]
        nets = [Actor(3, 1), Critic(3, 1), None, torch.tensor(-3.0, requires_grad=True)]
        nets[2] = copy.deepcopy(nets[1])
        optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3) for net in nets[:2]] + [
            torch.optim.SGD([nets[3]], lr=0.0)
        ]
        for step in range(300):
            if step % 30 == 0:
                pool.add(combo.imagine(args, data, Line(), nets[0]))
            combo.update(args, data, pool, *nets, *optimizers)
        obs = torch.zeros(1, 3)
        for _ in range(12):
            obs[:, 0] += 0.5 * nets[0].act(obs)[0]
        reached.append(obs[0, 0].item())
    assert reached[0] > 3 and abs(reached[1]) < 1.5, reached
