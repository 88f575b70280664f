"""DQN against slow loops, on a tabular problem whose answer value iteration knows, and while it acts."""
import copy

import dqn
import numpy as np
import pytest
import torch
from dqn import Args, QNetwork
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
    tiny_discrete_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(dqn, "HIDDEN", (7, 6))


def discrete_batch(actions=(2, 0, 1, 1)):
    return tiny_batch()._replace(action=torch.tensor(actions))


def slow_huber(x: float) -> float:
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def slow_loss(q_net, batch, y) -> float:
    errors = [slow_mlp(q_net.net, batch.obs[b])[int(batch.action[b])] - float(y[b]) for b in range(len(y))]
    return sum(map(slow_huber, errors)) / len(errors)


# ---- (E1) the target


def test_td_target_equals_a_loop():
    batch, q_target = discrete_batch(), make(QNetwork, 3, 3)
    expected = [float(batch.reward[b]) + 0.9 * (1 - float(batch.terminated[b])) * max(slow_mlp(q_target.net, batch.next_obs[b]))
                for b in range(4)]
    y = dqn.td_target(q_target, batch, 0.9)
    assert_close(y, expected)
    assert not y.requires_grad


def test_maximum_is_per_transition_and_only_termination_stops_the_bootstrap():
    """Q̄ = [1, 5], [7, 2], rewards 1: 1 + γ·5, and 1 where the second episode ended."""
    table = torch.tensor([[1.0, 5.0], [7.0, 2.0]])
    batch = tiny_batch((0, 1))._replace(reward=torch.ones(2), next_obs=torch.eye(2))
    assert_close(dqn.td_target(lambda obs: obs @ table, batch, 0.5), [3.5, 1.0])
    assert_close(dqn.td_target(lambda obs: obs @ table, batch._replace(terminated=torch.zeros(2)), 0.5), [3.5, 4.5])


# ---- (E2) the loss


def test_critic_loss_and_its_gradient_equal_a_loop():
    """Errors on both sides of the Huber loss's knee."""
    batch, q_net, y = discrete_batch(), make(QNetwork, 3, 3), torch.tensor([0.3, -4.0, 5.0, 0.0])
    loss, q_data, q_policy = dqn.critic_loss(q_net, batch, y)
    values = [slow_mlp(q_net.net, batch.obs[b]) for b in range(4)]
    errors = [abs(v[int(a)] - float(t)) for v, a, t in zip(values, batch.action, y)]
    assert min(errors) < 1 < max(errors), "the test's own premise"
    assert_close(loss, slow_loss(q_net, batch, y))
    assert_close(q_data, np.mean([v[int(a)] for v, a in zip(values, batch.action)]))
    assert_close(q_policy, np.mean([max(v) for v in values]))
    loss.backward()
    assert_gradient(q_net.net[-1].bias, lambda: slow_loss(q_net, batch, y))


@pytest.mark.parametrize("error, value, slope", [(0.5, 0.125, 0.5), (1.0, 0.5, 1.0), (-3.0, 2.5, -1.0)])
def test_huber_by_hand(error, value, slope):
    q = torch.tensor([[error, 100.0]], requires_grad=True)
    loss, _, _ = dqn.critic_loss(lambda obs: q, discrete_batch((0,)), torch.zeros(1))
    loss.backward()
    assert_close(loss, value)
    assert_close(q.grad, [[slope, 0.0]])  # of the action taken alone


def test_critic_loss_refuses_a_column_of_targets():
    with pytest.raises(AssertionError, match="broadcast"):
        dqn.critic_loss(make(QNetwork, 3, 3), discrete_batch(), torch.zeros(4, 1))


# ---- the update


def test_update_is_the_algorithm_box():
    """A step on the loss against the frozen network; then, in its turn, a hard copy of what was just learnt."""
    args, data = Args(batch_size=4, gamma=0.9), tiny_discrete_data()
    q_net, q_target = make(QNetwork, 3, 3), make(QNetwork, 3, 3)
    q, target = copy.deepcopy(q_net), copy.deepcopy(q_target)
    optimizer = torch.optim.SGD(q_net.parameters(), lr=0.01)
    for seed, copy_target in enumerate((False, True, False)):
        torch.manual_seed(seed)
        metrics = dqn.update(args, data, q_net, q_target, optimizer, copy_target)

        torch.manual_seed(seed)
        batch = data.sample(4)
        loss, q_data, q_policy = dqn.critic_loss(q, batch, dqn.td_target(target, batch, 0.9))
        grad = step_by_hand(loss, list(q.parameters()), 0.01)
        target = copy.deepcopy(q) if copy_target else target
        assert_close(flat(q_net), flat(q), 1e-12)
        assert_close(flat(q_target), flat(target), 1e-12)
        assert_close(flat_grad(q_net), grad, 1e-12)
        assert all(p.grad is None for p in q_target.parameters())
        for name, value in dict(critic_loss=loss, q_data=q_data, q_policy=q_policy).items():
            assert_close(metrics[name], value, 1e-12)


def test_train_copies_the_target_on_time(monkeypatch):
    run = silent_train(monkeypatch, dqn, tiny_discrete_data(), steps=9, batch_size=4, target_every=3)
    assert run.steps_that_moved("q_net") == list(range(1, 10))
    assert run.steps_that_moved("q_target") == [3, 6, 9]
    assert torch.equal(run.history[0]["q_net"], run.history[0]["q_target"])
    for step in (3, 6, 9):
        assert torch.equal(run.history[step]["q_net"], run.history[step]["q_target"])


def test_it_finds_what_value_iteration_finds(monkeypatch):
    """A chain of five states seen in full: left leads home for 0.2, right leads four steps on to 1."""
    gamma, num, actions = 0.8, 5, 2
    rows, Q = [], np.zeros((num, actions))
    for state in range(num):
        for action in range(actions):
            next_state = state + 1 if action else max(state - 1, 0)
            ended = next_state == num or (state == 0 and not action)
            rows.append((state, action, min(next_state, num - 1), float(next_state == num) + 0.2 * (state == 0 and not action),
                         float(ended)))
    for _ in range(200):
        for state, action, next_state, reward, ended in rows:
            Q[state, action] = reward + gamma * (1 - ended) * Q[next_state].max()
    assert set(Q.argmax(1)) == {1} and abs(Q[0, 1] - 0.8**4) < 1e-9, "the test's own premise"

    monkeypatch.setattr(dqn, "HIDDEN", ())  # on one-hot states a linear Q is a table
    data = tiny_discrete_data(len(rows), obs_dim=num, num_actions=actions)
    state, action, next_state, reward, ended = (torch.tensor(column) for column in zip(*rows))
    one_hot = torch.eye(num)
    data.packed = torch.cat([one_hot[state], action[:, None], one_hot[next_state], reward[:, None], ended[:, None]], dim=1)
    run = silent_train(monkeypatch, dqn, data, steps=3000, batch_size=20, gamma=gamma, learning_rate=0.01, target_every=20)
    learnt = run.actor(one_hot).detach()
    assert_close(learnt, Q, 0.01)
    assert run.actor.act(one_hot).tolist() == [1] * num
    batch = data.columns(data.packed)
    assert dqn.critic_loss(lambda obs: obs @ torch.tensor(Q), batch,
                           dqn.td_target(lambda obs: obs @ torch.tensor(Q), batch, gamma))[0] < 1e-20  # zero at Q*


# ---- acting


def test_act_is_greedy_on_raw_observations():
    q_net, obs = make(QNetwork, 3, 3), torch.randn(6, 3)
    values = [slow_mlp(q_net.net, row) for row in obs]
    assert q_net.act(obs).tolist() == [v.index(max(v)) for v in values]


def test_exploration_falls_along_a_line():
    args = Args(random_steps=100, epsilon_steps=1000, final_epsilon=0.1)
    for step, epsilon in ((0, 1.0), (100, 1.0), (600, 0.55), (1100, 0.1), (5000, 0.1)):
        assert_close(dqn.exploration(args, step), epsilon)


def test_interact_stores_what_happened():
    """Uniform first, greedy then; rows chain within an episode; a fallen pole terminates, a time limit does not."""
    torch.set_default_dtype(torch.float32)
    data = dqn.Dataset("cartpole", "CartPole-v1", 3000, "cpu", (0.0, 1.0))
    q_net = make(QNetwork, 4, 2, scale=0.0)
    q_net.net[-1].bias.data[:] = torch.tensor([0.0, 1.0])  # always to the right
    steps = dqn.interact(Args(random_steps=1000, epsilon_steps=1, final_epsilon=0.0), data, q_net, 0)
    for _ in range(2000):
        next(steps)
    seen = data.columns(data.packed[:2000])
    assert data.size == 2000 and abs(seen.action[:1000].double().mean() - 0.5) < 0.1
    assert (seen.action[1002:] == 1).all()
    chained = (seen.obs[1:] == seen.next_obs[:-1]).all(1)
    assert torch.equal(chained, seen.terminated[:-1] == 0), "none of these episodes lasts 500 steps"
    fallen = (seen.next_obs[:, 2].abs() > 12 * np.pi / 180) | (seen.next_obs[:, 0].abs() > 2.4)  # CartPole's definition
    assert torch.equal(fallen, seen.terminated.bool()) and fallen.any()


def test_a_time_limit_is_not_a_termination():
    """Acrobot that never moves is stopped after 500 steps."""
    torch.set_default_dtype(torch.float32)
    data = dqn.Dataset("acrobot", "Acrobot-v1", 600, "cpu", (0.0, 1.0))
    q_net = make(QNetwork, 6, 3, scale=0.0)
    q_net.net[-1].bias.data[:] = torch.tensor([0.0, 1.0, 0.0])  # no torque
    steps = dqn.interact(Args(random_steps=0, epsilon_steps=1, final_epsilon=0.0), data, q_net, 1)
    for _ in range(600):
        next(steps)
    seen = data.columns(data.packed)
    assert not seen.terminated.any()
    chained = (seen.obs[1:] == seen.next_obs[:-1]).all(1)
    assert (~chained).nonzero().flatten().tolist() == [499]
