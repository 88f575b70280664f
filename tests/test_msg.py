"""MSG against slow loops, against SAC, and what targets of their own change in an ensemble."""
import copy
import math

import edac
import msg
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
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from msg import Actor, Args, Critic
from torch import nn

N = 4


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(msg, "HIDDEN", (7, 6))


def networks(num=N):
    """Actor, critics, other critics as their target, log α."""
    return [
        make(Actor, 3, 2),
        make(Critic, 3, 2, num),
        make(Critic, 3, 2, num),
        torch.tensor(-0.5, requires_grad=True),
    ]


def sgd(actor, critic, log_alpha, lr=0.01):
    return [
        torch.optim.SGD(params, lr=lr)
        for params in (actor.parameters(), critic.parameters(), [log_alpha])
    ]


def moved(critic, k):
    """The same members, but for the k-th."""
    other = copy.deepcopy(critic)
    for parameter in other.parameters():
        parameter.data[k] += 0.3 * torch.randn_like(parameter[k])
    return other


# ---- losses against loops


def test_actions_per_member_equals_a_loop(monkeypatch):
    """(E1): for each member actions with noise of their own, from the same policy, −5 ≤ log σ ≤
    2."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    actions = msg.actions_per_member(actor, obs, N)
    assert_close(
        actions,
        [[slow_sample(actor, obs[b], draws[0][k, b], -5.0)[0] for b in range(4)] for k in range(N)],
    )
    assert len(actions.flatten().unique()) == N * 4 * 2 and not actions.requires_grad


def test_independent_targets_equal_a_loop():
    """(E2): for member k its own target network at its own action; no entropy; nothing after a
    termination."""
    (_, _, target, _), batch, action = networks(), tiny_batch(), 2 * torch.rand(N, 4, 2) - 1
    y = msg.independent_targets(target, batch, action, 0.9)
    for k in range(N):
        for b in range(4):
            q = slow_critic(target, k, batch.next_obs[b], action[k, b].tolist())
            assert_close(y[k, b], float(batch.reward[b]) + 0.9 * (0.0 if b == 1 else q))
    assert not y.requires_grad


@pytest.mark.parametrize("weight", [0.0, 1.7])
def test_critic_loss_equals_a_loop(weight):
    """(E3), (E4): half the squared error of each member on its own target plus w times its gap,
    summed over members."""
    critic = networks()[1]
    batch = tiny_batch()
    y = torch.randn(N, 4)
    action = 2 * torch.rand(N, 4, 2) - 1
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(N)
    ]
    at_policy = [
        [slow_critic(critic, k, batch.obs[b], action[k, b].tolist()) for b in range(4)]
        for k in range(N)
    ]
    squares = sum(0.5 * (q[k][b] - float(y[k, b])) ** 2 / 4 for k in range(N) for b in range(4))
    gaps = sum((at_policy[k][b] - q[k][b]) / 4 for k in range(N) for b in range(4))
    loss, metrics = msg.critic_loss(critic, batch, y, action, weight)
    assert_close(loss, squares + weight * gaps)
    spread = [
        math.sqrt(sum((q[k][b] - sum(q[j][b] for j in range(N)) / N) ** 2 for k in range(N)) / N)
        for b in range(4)
    ]
    assert metrics.keys() == {"q_data", "q_spread", "gap"}
    assert_close(
        torch.stack(list(metrics.values())), [sum(map(sum, q)) / 4 / N, sum(spread) / 4, gaps / N]
    )


def test_gradient_of_the_critic_loss():
    """Down at the policy's actions and up at the data's: every member's last layer against a finite
    difference."""
    critic = networks()[1]
    batch = tiny_batch()
    y = torch.randn(N, 4)
    action = 2 * torch.rand(N, 4, 2) - 1

    def loss():
        return msg.critic_loss(critic, batch, y, action, 1.7)[0]

    loss().backward()
    last = critic.layers[-1]
    for parameter in (last.weight, last.bias):
        for index in torch.cartesian_prod(*(torch.arange(n) for n in parameter.shape[:2])).tolist():
            values = []
            for shift in (1e-5, -2e-5):
                parameter.data[tuple(index)] += shift
                values.append(loss().item())
            parameter.data[tuple(index)] += 1e-5
            assert_close(parameter.grad[tuple(index)], [(values[0] - values[1]) / 2e-5], 1e-6)


def test_critic_loss_refuses_a_shared_target():
    """One target (B,) for all members would broadcast, and be SAC-N's ensemble."""
    for y in (torch.zeros(4), torch.zeros(4, 1), torch.zeros(N, 4, 1)):
        with pytest.raises(AssertionError):
            msg.critic_loss(networks()[1], tiny_batch(), y, torch.zeros(N, 4, 2), 0.1)


@pytest.mark.parametrize("beta", [0.0, -2.5])
def test_actor_loss_equals_a_loop(monkeypatch, beta):
    """(E5), (E6) and the gradient: α log π − (mean + β std), the std over members with 1/N; (E7) on
    the same log π."""
    (actor, critic, *_), obs = networks(), torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    loss, log_prob, metrics = msg.actor_loss(actor, critic, torch.tensor(0.3), obs, beta)
    loss.backward()

    def slow():
        total, q_policy, q_spread, log_probs = 0.0, 0.0, 0.0, []
        for b in range(4):
            action, lp = slow_sample(actor, obs[b], draws[0][b], -5.0)
            q = [slow_critic(critic, k, obs[b], action) for k in range(N)]
            mean = sum(q) / N
            std = math.sqrt(sum((v - mean) ** 2 for v in q) / N)
            total += (0.3 * lp - (mean + beta * std)) / 4
            q_policy, q_spread = q_policy + mean / 4, q_spread + std / 4
            log_probs.append(lp)
        return total, log_probs, q_policy, q_spread

    for got, want in zip((loss, log_prob, metrics["q_policy"], metrics["q_spread_policy"]), slow()):
        assert_close(got, want)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])
    assert not log_prob.requires_grad and not metrics["q_policy"].requires_grad
    expected = sum(-0.7 * (lp + 1.5) for lp in slow()[1]) / 4
    assert_close(msg.entropy_coef_loss(torch.tensor(0.7), log_prob, 1.5), expected)


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh(μ)."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [[math.tanh(u) for u in slow_mlp(actor.net, o)[:2]] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])


# ---- independence


def test_each_target_depends_on_its_own_target_network_only():
    """Another network for member 2: its row of y changes, all others stay bit for bit."""
    (_, _, target, _), batch, action = networks(), tiny_batch(), 2 * torch.rand(N, 4, 2) - 1
    before = msg.independent_targets(target, batch, action, 0.9)
    after = msg.independent_targets(moved(target, 2), batch, action, 0.9)
    assert [torch.equal(before[k], after[k]) for k in range(N)] == [True, True, False, True]


def test_an_update_carries_nothing_from_member_to_member():
    """Another target network, or another critic, for member 2: after the update no other member
    knows. In SAC-N, which shares the minimum, every critic moves otherwise."""
    def critics_after(algorithm, nets, **args):
        nets = copy.deepcopy(nets)
        torch.manual_seed(5)
        algorithm.update(algorithm.Args(batch_size=4, num_critics=N, **args), tiny_data(), *nets,
                         *sgd(nets[0], nets[1], nets[3]))
        return [
            torch.cat([p[k].flatten() for net in nets[1:3] for p in net.parameters()])
            for k in range(N)
        ]

    nets = networks()
    with torch.no_grad():
        for critic in nets[1:3]:  # member 2's Q is the smallest, so that a shared minimum shows it
            critic.layers[-1].bias[2] -= 20
    for i in (1, 2):
        others = [*nets]
        others[i] = moved(nets[i], 2)
        assert [
            torch.equal(*pair) for pair in zip(critics_after(msg, nets), critics_after(msg, others))
        ] == [True, True, False, True]
    shared = zip(
        critics_after(edac, nets, diversity_weight=0.0),
        critics_after(edac, others, diversity_weight=0.0),
    )
    assert not any(torch.equal(*pair) for pair in shared)


@pytest.mark.parametrize("seed", range(2))
def test_disagreement_off_the_data_is_carried_back_to_the_data(monkeypatch, seed):
    """One state, for ever; data actions in [−0.2, 0.2], no reward; the policy, held fixed, acts at
    0.95, where there are no data. What follows the data's actions is therefore unknown. MSG's
    members say so by their spread at the data; SAC-N's have one target there, and agree."""
    spread = {}
    for algorithm, settings in ((msg, dict(cql_weight=0.0)), (edac, dict(diversity_weight=0.0))):
        monkeypatch.setattr(algorithm, "HIDDEN", (32, 32))
        torch.manual_seed(seed)
        data = tiny_data(256, action_dim=1)
        data.obs = data.next_obs = torch.zeros(256, 3)
        data.reward = data.terminated = torch.zeros(256)
        data.action = torch.linspace(-0.2, 0.2, 256)[:, None]
        actor, critic = algorithm.Actor(3, 1), algorithm.Critic(3, 1, 6)
        for parameter in actor.parameters():
            parameter.data.zero_()
        actor.net[-1].bias.data[:] = torch.tensor([math.atanh(0.95), -5.0])
        nets = actor, critic, copy.deepcopy(critic), torch.tensor(-20.0, requires_grad=True)
        optimizers = [torch.optim.Adam(critic.parameters(), lr=3e-3)]
        optimizers = [
            torch.optim.SGD(actor.parameters(), lr=0.0),
            *optimizers,
            torch.optim.SGD([nets[3]], lr=0.0),
        ]
        args = algorithm.Args(batch_size=32, gamma=0.9, target_rate=0.1, num_critics=6, **settings)
        for _ in range(200):
            metrics = algorithm.update(args, data, *nets, *optimizers)
        spread[algorithm] = metrics["q_spread"].item()
    assert spread[msg] > 5 * spread[edac]


# ---- the lower bound


def test_lower_bound_of_known_values():
    """Members 1, 3 and 1, 5: mean 2 and 3, std 1 and 2; β = −0.5."""
    assert_close(msg.lower_bound(torch.tensor([[1.0, 1.0], [3.0, 5.0]]), -0.5), [1.5, 2.0])


def test_equal_members_give_a_finite_gradient():
    """Where all members agree, and with one member, the std is 0 and has no slope: it must not make
    a NaN."""
    actor, critic = make(Actor, 3, 2), make(Critic, 3, 2, 1)
    for num in (1, 3):
        repeated = make(Critic, 3, 2, num)
        for parameter, one in zip(repeated.parameters(), critic.parameters()):
            parameter.data.copy_(one.data.expand_as(parameter))
        actor.zero_grad()
        torch.manual_seed(0)
        msg.actor_loss(actor, repeated, torch.tensor(0.3), torch.randn(4, 3), -8.0)[0].backward()
        assert flat_grad(actor).isfinite().all() and flat_grad(actor).abs().max() > 1e-3


def test_a_negative_beta_leads_the_policy_to_where_the_members_agree():
    """Q_k = 1 + c_k a with slopes c that average 0.5: the mean says a = 1, the bound with β = −2
    says a = 0."""
    slopes = torch.tensor([-1.0, 0.5, 2.0])[:, None]
    for beta, expected in ((0.0, 1.0), (-2.0, 0.0)):
        torch.manual_seed(0)
        actor = make(Actor, 3, 1)
        optimizer = torch.optim.Adam(actor.parameters(), lr=0.02)
        for _ in range(150):
            loss, _, _ = msg.actor_loss(
                actor,
                lambda obs, action: 1 + slopes * action[:, 0],
                torch.tensor(1e-4),
                torch.zeros(16, 3),
                beta,
            )
            msg.descend(loss, optimizer)
        assert abs(actor(torch.zeros(1, 3))[0].tanh().item() - expected) < 0.1


# ---- SAC


def test_one_member_with_beta_zero_is_sac_without_the_minimum(monkeypatch):
    """N = 1, β = 0, w = 0, α = e⁻⁸⁰ (MSG's target has no entropy term), H̄ = −dim(A): one update
    moves everything as sac.py's does with two equal critics. Its critic's loss has a ½, so its
    critic has twice the learning rate."""
    monkeypatch.setattr(sac, "HIDDEN", (7, 6))
    monkeypatch.setattr(sac, "LOG_STD_MIN", -5.0)
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 0.3))
    nets = networks(num=1)
    nets[3].data.fill_(-80.0)
    twins = copy.deepcopy(nets)
    for critic in twins[1:3]:
        for layer in critic.layers:
            for name in ("weight", "bias"):
                setattr(layer, name, nn.Parameter(getattr(layer, name).data.repeat(2, 1, 1)))
    args = dict(batch_size=4, gamma=0.9, target_rate=0.3)
    data = tiny_data()
    optimizers = sgd(nets[0], nets[1], nets[3])
    optimizers[1] = torch.optim.SGD(nets[1].parameters(), lr=0.02)
    torch.manual_seed(3)
    metrics = msg.update(
        Args(**args, num_critics=1, beta=0.0, cql_weight=0.0, target_entropy=-2.0),
        data,
        *nets,
        *optimizers,
    )
    torch.manual_seed(3)
    expected = sac.update(sac.Args(**args), data, *twins, *sgd(twins[0], twins[1], twins[3]))
    assert_close(flat(nets[0]), flat(twins[0]), 1e-12)
    assert_close(nets[3], twins[3], 1e-12)
    for i in (1, 2):
        for ours, both in zip(nets[i].parameters(), twins[i].parameters()):
            assert_close(ours[0], both[0], 1e-12)
            assert torch.equal(both[0], both[1])
    for name in ("q_data", "q_policy", "entropy", "entropy_coef"):
        assert_close(metrics[name], expected[name], 1e-12)


def test_without_regulariser_the_critics_ignore_the_policys_actions():
    """w = 0: the gap is reported, and moves nothing."""
    critic, batch, y, grads = networks()[1], tiny_batch(), torch.randn(N, 4), []
    for _ in range(2):
        critic.zero_grad()
        msg.critic_loss(critic, batch, y, 2 * torch.rand(N, 4, 2) - 1, 0.0)[0].backward()
        grads.append(flat_grad(critic))
    assert torch.equal(*grads)


# ---- the update


def test_each_loss_moves_its_own_part_only():
    """The critics' loss, with its regulariser, gives actor and target no gradient; the actor's step
    none to the critics."""
    data, (actor, critic, critic_target, log_alpha) = tiny_data(), networks()
    batch = data.sample(4)
    y = msg.independent_targets(
        critic_target, batch, msg.actions_per_member(actor, batch.next_obs, N), 0.9
    )
    msg.critic_loss(critic, batch, y, msg.actions_per_member(actor, batch.obs, N), 0.5)[
        0
    ].backward()
    assert all(p.grad is None for net in (actor, critic_target) for p in net.parameters())
    assert all(p.grad is not None for p in critic.parameters())
    critic.zero_grad()
    loss, _, _ = msg.actor_loss(actor, critic, log_alpha.detach().exp(), batch.obs, -8.0)
    msg.descend(loss, sgd(actor, critic, log_alpha)[0])
    assert all(p.grad is None for p in critic.parameters()) and log_alpha.grad is None


def test_update_is_the_algorithm_box():
    """Q, then π on the new Q, then α, each with the old α; then (E8), exactly."""
    args = Args(
        batch_size=4,
        gamma=0.9,
        target_rate=0.3,
        num_critics=N,
        beta=-1.5,
        cql_weight=0.4,
        target_entropy=-0.7,
    )
    data, nets = tiny_data(), networks()
    actor, critic, critic_target, log_alpha = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = msg.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch, alpha = data.sample(4), log_alpha.detach().exp()
        y = msg.independent_targets(
            critic_target, batch, msg.actions_per_member(actor, batch.next_obs, N), 0.9
        )
        q_loss, at_data = msg.critic_loss(
            critic, batch, y, msg.actions_per_member(actor, batch.obs, N), 0.4
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, log_prob, at_policy = msg.actor_loss(actor, critic, alpha, batch.obs, -1.5)
        step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        log_alpha.data += 0.01 * (log_prob.mean() - 0.7)
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(nets[3], log_alpha, 1e-12)
        # the actor's step adds nothing to the critics' gradient
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)
        expected = dict(
            critic_loss=q_loss, entropy=-log_prob.mean(), entropy_coef=alpha, **at_data, **at_policy
        )
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)
    assert all(p.grad is None for p in nets[2].parameters())


def test_train_moves_every_part_each_step(monkeypatch):
    """Actor, critics, targets and α, from targets that start as copies and α = 1; N members, all
    different."""
    run = silent_train(
        monkeypatch,
        msg,
        tiny_data(),
        steps=3,
        batch_size=4,
        num_critics=3,
        actor_lr=0.1,
        critic_lr=0.2,
        entropy_lr=0.3,
    )
    for name in ("actor", "critic", "critic_target", "log_entropy_coef"):
        assert run.steps_that_moved(name) == [1, 2, 3]
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[3]["critic"], run.history[3]["critic_target"])
    assert run.history[0]["log_entropy_coef"] == 0
    first = run.state["critic"].layers[0].weight
    assert (
        len(first) == 3
        and not torch.equal(first[0], first[1])
        and not torch.equal(first[1], first[2])
    )
    assert_close(
        torch.stack([run.actor.action_mid, run.actor.action_half]), [[0.5, 0.5], [1.0, 2.0]]
    )
    assert [
        run.state[f"{name}_optimizer"].param_groups[0]["lr"]
        for name in ("actor", "critic", "entropy")
    ] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("name, value", [("beta", 0.1), ("num_critics", 0), ("cql_weight", -1.0)])
def test_settings_out_of_range_are_refused(capsys, name, value):
    """A β above 0 would reward disagreement: that is for exploration, which offline there is none
    of."""
    with pytest.raises(SystemExit) as stop:
        msg.train(Args(**{name: value}))
    assert stop.value.code == 2 and f"--{name.replace('_', '-')}" in capsys.readouterr().err
