"""Discrete CQL against slow loops, against DQN, cloning and cql.py, and what it does where DQN
believes in untried actions."""
import copy
import math

import cql
import cql_discrete
import dqn
import pytest
import torch
from cql_discrete import Args, QNetwork
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
    monkeypatch.setattr(cql_discrete, "HIDDEN", (7, 6))


def discrete_batch(actions=(2, 0, 1, 1)):
    return tiny_batch(terminated=[float(i == 1) for i in range(len(actions))])._replace(
        action=torch.tensor(actions)
    )


def slow_loss(q_net, batch, y, weight) -> tuple[float, float]:
    """(E4) and (E3), one transition after the other."""
    td_loss = gap = 0.0
    for b in range(len(y)):
        q, a = slow_mlp(q_net.net, batch.obs[b]), int(batch.action[b])
        error = abs(q[a] - float(y[b]))
        td_loss += (0.5 * error**2 if error <= 1 else error - 0.5) / len(y)
        gap += (math.log(sum(math.exp(v) for v in q)) - q[a]) / len(y)
    return td_loss + weight * gap, gap


# ---- losses against loops


def test_td_target_equals_a_loop():
    """(E1): the frozen network's largest value; nothing after a termination."""
    batch, q_target, expected = discrete_batch(), make(QNetwork, (3,), 3), []
    y = cql_discrete.td_target(q_target, batch, 0.9)
    for b in range(4):
        value = max(slow_mlp(q_target.net, batch.next_obs[b]))
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else value)))
    assert_close(y, expected)
    assert not y.requires_grad


@pytest.mark.parametrize("weight", [0.0, 1.7])
def test_critic_loss_and_its_gradient_equal_a_loop(weight):
    """(E2) to (E4): Huber loss plus w times log Σ exp Q − Q(a), and the slope of both."""
    q_net, batch = make(QNetwork, (3,), 3), discrete_batch()
    y = torch.tensor([3.0, -3.0, 0.1, 0.2])
    loss, metrics = cql_discrete.critic_loss(q_net, batch, y, weight)
    loss.backward()
    expected, gap = slow_loss(q_net, batch, y, weight)
    q = [slow_mlp(q_net.net, obs) for obs in batch.obs]
    assert_close(loss, expected)
    assert_close(metrics["gap"], gap)
    assert_close(metrics["q_data"], sum(q[b][int(batch.action[b])] for b in range(4)) / 4)
    assert_close(metrics["q_policy"], sum(map(max, q)) / 4)
    assert_gradient(q_net.net[-1].bias, lambda: slow_loss(q_net, batch, y, weight)[0])
    assert not any(value.requires_grad for value in metrics.values())


def test_critic_loss_refuses_a_column_of_targets():
    """A target (B, 1) would silently compare every Q with every y."""
    with pytest.raises(AssertionError):
        cql_discrete.critic_loss(QNetwork((3,), 3), discrete_batch(), torch.randn(4, 1), 1.0)


# ---- special cases


def test_without_weight_it_is_dqn():
    """w = 0: one update leaves dqn.py's network, and reports its losses."""
    nets = make(QNetwork, (3,), 3), make(QNetwork, (3,), 3)
    ours, dqns = copy.deepcopy(nets), copy.deepcopy(nets)
    found = []
    for algorithm, (q_net, q_target), settings in (
        (cql_discrete, ours, dict(cql_weight=0.0)),
        (dqn, dqns, {}),
    ):
        torch.manual_seed(0)
        args = algorithm.Args(batch_size=4, gamma=0.9, **settings)
        optimizer = torch.optim.SGD(q_net.parameters(), lr=0.01)
        found.append(
            algorithm.update(
                args, tiny_discrete_data(), q_net, q_target, optimizer, copy_target=False
            )
        )
    assert torch.equal(flat(ours[0]), flat(dqns[0])) and not torch.equal(
        flat(ours[0]), flat(nets[0])
    )
    for name in ("critic_loss", "q_data", "q_policy"):
        assert torch.equal(found[0][name], found[1][name])


def test_the_gap_alone_is_behaviour_cloning():
    """(E3) is the cross-entropy of the data's actions under softmax(Q)."""
    q_net, batch = make(QNetwork, (3,), 3), discrete_batch()
    _, metrics = cql_discrete.critic_loss(q_net, batch, torch.zeros(4), 1.0)
    assert_close(metrics["gap"], torch.nn.functional.cross_entropy(q_net(batch.obs), batch.action))
    flat_net = make(QNetwork, (3,), 3, scale=0.0)
    assert_close(
        cql_discrete.critic_loss(flat_net, batch, torch.zeros(4), 1.0)[1]["gap"], math.log(3)
    )


def test_the_gap_is_cql_hs_at_its_worst_mu():
    """max_μ E_μ[Q] + H(μ) − E_D[Q], the maximum over all μ, tried on a grid of three shares."""
    q_net, batch = make(QNetwork, (3,), 3), discrete_batch((2,))
    q = q_net(batch.obs)[0].detach()
    shares = torch.cartesian_prod(torch.linspace(0, 1, 201), torch.linspace(0, 1, 201))
    mu = torch.cat([shares, 1 - shares.sum(dim=1, keepdim=True)], dim=1)
    mu = mu[mu[:, 2] >= 0]
    gaps = mu @ q - torch.special.xlogy(mu, mu).sum(dim=1) - q[2]
    gap = cql_discrete.critic_loss(q_net, batch, torch.zeros(1), 1.0)[1]["gap"]
    assert gaps.max() <= gap + 1e-12
    assert_close(gaps.max(), gap, 1e-3)
    assert_close(mu[gaps.argmax()], q.softmax(dim=0), 1e-2)


def test_it_is_cql_py_with_the_sum_over_all_actions():
    """cql.py's loss on the same table, with every action as a proposal, at twice the weight: twice
    this loss (it has no ½)."""
    table, batch, y = 0.3 * torch.randn(4, 3), discrete_batch(), 0.1 * torch.randn(4)
    every = torch.arange(3.0).expand(4, 3)[:, :, None]
    rows = batch._replace(obs=torch.arange(4.0)[:, None], action=batch.action[:, None].double())

    def critic(obs, action):
        return table[obs[:, 0].long(), action[:, 0].long()][None]

    soft_max = cql.soft_max_q(critic, rows.obs, every, torch.zeros(4, 3))
    theirs, gap, _ = cql.critic_loss(critic, rows, y, soft_max, torch.tensor(2 * 0.7))
    ours, metrics = cql_discrete.critic_loss(lambda obs: table, batch, y, 0.7)
    assert_close(gap, metrics["gap"], 1e-12)
    assert_close(theirs, 2 * ours, 1e-12)


def test_stationary_point_of_a_table():
    """One state, behaviour β: Q(a) = y(a) − w · (softmax(Q)(a) / β(a) − 1): w is the paper's α."""
    counts, y, w = torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 0.5, -0.3, 0.2]), 0.2
    action = torch.arange(4).repeat_interleave(counts)
    batch = discrete_batch(action.tolist())
    table = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-13, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = cql_discrete.critic_loss(lambda obs: table.expand(10, 4), batch, y[action], w)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    q = table[0].detach()
    assert_close(q, y - w * (q.softmax(dim=0) / (counts / 10) - 1), 1e-6)
    assert (q - y).abs().max() < 1, "within Huber's square"
    assert (q - y).abs().max() > 0.1, "w must matter here"


# ---- the update


def test_update_is_the_algorithm_box():
    """Q on the frozen network's target, then, in its turn, the copy; exactly."""
    args, data = Args(batch_size=4, gamma=0.9, cql_weight=0.7), tiny_discrete_data()
    q_net, q_target = make(QNetwork, (3,), 3), make(QNetwork, (3,), 3)
    net, target = copy.deepcopy((q_net, q_target))
    optimizer = torch.optim.SGD(q_net.parameters(), lr=0.01)
    for seed, copy_target in enumerate((False, True, False)):
        torch.manual_seed(seed)
        metrics = cql_discrete.update(args, data, q_net, q_target, optimizer, copy_target)

        torch.manual_seed(seed)
        batch = data.sample(4)
        loss, expected = cql_discrete.critic_loss(
            net, batch, cql_discrete.td_target(target, batch, 0.9), 0.7
        )
        grad = step_by_hand(loss, list(net.parameters()), 0.01)
        if copy_target:
            target = copy.deepcopy(net)
        assert_close(flat(q_net), flat(net), 1e-12)
        assert_close(flat(q_target), flat(target), 1e-12)
        assert_close(flat_grad(q_net), grad, 1e-12)
        assert metrics.keys() == {"critic_loss", *expected}
        for name, value in dict(critic_loss=loss, **expected).items():
            assert_close(metrics[name], value, 1e-12)
    assert all(p.grad is None for p in q_target.parameters())


def test_train_copies_the_target_on_time(monkeypatch):
    """Ten updates, a copy after each fourth; the target starts as a copy."""
    run = silent_train(
        monkeypatch, cql_discrete, tiny_discrete_data(), steps=10, batch_size=4, target_every=4
    )
    assert run.steps_that_moved("q_net") == list(range(1, 11))
    assert run.steps_that_moved("q_target") == [4, 8]
    assert torch.equal(run.history[0]["q_net"], run.history[0]["q_target"])
    assert torch.equal(run.history[8]["q_net"], run.history[8]["q_target"])


@pytest.mark.parametrize("seed", range(3))
def test_dqn_takes_the_untried_action_and_cql_does_not(monkeypatch, seed):
    """21 actions from −1 to 1, of which the data hold the five middle ones; r = a − 1 there, in one
    state for ever. No policy is worth more than −8 = −0.8 / (1 − γ) within the data. DQN's maximum
    takes an action that was never tried, whose Q is still near 0, and so does its target; CQL's
    takes one of the five, and its Q falls."""
    data = tiny_discrete_data(256, num_actions=21)
    torch.manual_seed(seed)
    data.obs = data.next_obs = torch.ones(256, 3)
    data.terminated = torch.zeros(256)
    data.action = torch.randint(8, 13, (256,))
    data.reward = (data.action - 10) / 10.0 - 1
    best = {}
    for algorithm, settings in ((dqn, {}), (cql_discrete, dict(cql_weight=1.0))):
        monkeypatch.setattr(algorithm, "HIDDEN", (16,))
        torch.manual_seed(seed)
        q_net = algorithm.QNetwork((3,), 21)
        q_target = copy.deepcopy(q_net)
        optimizer = torch.optim.Adam(q_net.parameters(), lr=5e-3)
        args = algorithm.Args(batch_size=32, gamma=0.9, **settings)
        for step in range(300):
            metrics = algorithm.update(
                args, data, q_net, q_target, optimizer, copy_target=step % 25 == 0
            )
        best[algorithm] = int(q_net.act(torch.ones(1, 3))) - 10, metrics["q_policy"].item()
    action, q = best[dqn]
    assert abs(action) > 2 and q > -1
    action, q = best[cql_discrete]
    assert abs(action) <= 2 and q < -3


def test_settings_out_of_range_are_refused(capsys):
    """A weight below 0 would push unseen actions up."""
    with pytest.raises(SystemExit) as stop:
        cql_discrete.train(Args(cql_weight=-1.0))
    assert stop.value.code == 2 and "--cql-weight" in capsys.readouterr().err
