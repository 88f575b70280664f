"""TD3+BC against slow loops, and its special cases with known answers."""
import copy
import math

import pytest
import td3_bc
import torch
from helpers import (
    assert_close,
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
from td3_bc import Actor, Args, Critic


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(td3_bc, "HIDDEN", (7, 6))


def slow_action(actor, obs):
    return [math.tanh(u) for u in slow_mlp(actor.net, obs)]


# ---- each function against a loop over samples


def test_td_target_equals_a_loop(monkeypatch):
    """(E1), (E2): noise clipped, action clipped, minimum of the critics, one transition after the
    other."""
    args = Args(gamma=0.9, policy_noise=0.6, noise_clip=0.5)
    actor, critic, batch = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch()
    draws, expected, clips = record_draws(monkeypatch, "randn_like"), [], set()
    y = td3_bc.td_target(actor, critic, batch, args)
    for b in range(4):
        action = slow_action(actor, batch.next_obs[b])
        for i, eps in enumerate(draws[0][b].tolist()):
            noise = min(max(0.6 * eps, -0.5), 0.5)
            clips |= {"noise"} if abs(noise) == 0.5 else {"neither"}
            clips |= {"action"} if abs(action[i] + noise) > 1 else set()
            action[i] = min(max(action[i] + noise, -1), 1)
        q = min(slow_critic(critic, k, batch.next_obs[b], action) for k in range(2))
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else q)))
    assert clips == {"noise", "action", "neither"}, "this seed must exercise both clips"
    assert_close(y, expected)
    assert not y.requires_grad


def test_critic_loss_equals_a_loop():
    """(E3): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = td3_bc.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    assert abs(q[0][0] - q[1][0]) > 1e-3


def test_critic_loss_refuses_a_column_of_targets():
    """A target (B, 1) would silently compare every Q with every y."""
    with pytest.raises(AssertionError):
        td3_bc.critic_loss(Critic(3, 2), tiny_batch(), torch.randn(4, 1))


def test_actor_loss_equals_a_loop():
    """(E4), (E5): λ from |Q| of the first critic at the policy's actions; cloning averaged over
    action dimensions."""
    actor, critic, batch = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch()
    actions = [slow_action(actor, batch.obs[b]) for b in range(4)]
    critic.layers[-1].bias.data -= slow_critic(critic, 0, batch.obs[0], actions[0]) - 0.01
    q = [slow_critic(critic, 0, batch.obs[b], actions[b]) for b in range(4)]
    assert min(q) < 0 < max(q), "with one sign, mean |Q| and |mean Q| would be the same"
    cloning = (
        sum((actions[b][i] - float(batch.action[b, i])) ** 2 for b in range(4) for i in range(2))
        / 8
    )
    loss, *metrics = td3_bc.actor_loss(actor, critic, batch, 2.5)
    assert_close(loss, -2.5 / (sum(map(abs, q)) / 4) * sum(q) / 4 + cloning)
    assert_close(torch.stack(metrics), [cloning, sum(q) / 4])


# ---- the target


def test_only_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever follows; elsewhere γ and
    Q count."""
    actor = make(Actor, 3, 2)
    critic = make(Critic, 3, 2)
    batch = tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        other_end = batch._replace(next_obs=torch.randn(4, 3))
        assert torch.equal(
            td3_bc.td_target(actor, critic, other_end, Args(gamma=gamma)), batch.reward
        )
    going_on = td3_bc.td_target(actor, lambda obs, action: torch.full((2, 4), 7.0),
                                batch._replace(terminated=torch.zeros(4)), Args(gamma=0.5))
    assert_close(going_on, batch.reward + 3.5)


def test_minimum_over_critics_is_per_transition():
    """Neither critic as a whole wins: each transition takes the smaller of its two values."""
    q = torch.tensor([[1.0, 5.0, -2.0, 4.0], [3.0, 2.0, -1.0, 0.0]])
    batch = tiny_batch(terminated=(0, 0, 0, 0))
    y = td3_bc.td_target(make(Actor, 3, 2), lambda obs, action: q, batch, Args(gamma=0.5))
    assert_close(y - batch.reward, [0.5, 1.0, -1.0, 0.0])


@pytest.mark.parametrize(
    "noise, clip, largest", [(0.2, 0.5, 0.5), (9.0, 0.5, 0.5), (9.0, 3.0, 1.0), (0.0, 0.5, 0.0)]
)
def test_smoothing_noise(noise, clip, largest):
    """Bounded by noise_clip, then by the action range; none with σ = 0; its own for each transition
    and dimension."""
    seen = []
    td3_bc.td_target(
        torch.zeros_like,
        lambda obs, action: seen.append(action) or torch.zeros(2, 64),
        tiny_batch([0] * 64, obs_dim=2),
        Args(policy_noise=noise, noise_clip=clip),
    )
    assert seen[0].abs().max() <= largest
    if noise == 0.2:
        assert len(seen[0].unique()) > 120, "128 draws, of which a few may sit on the clip"
    elif noise == 9.0:
        assert seen[0].min() == -largest and seen[0].max() == largest
    else:
        assert torch.equal(seen[0], torch.zeros(64, 2))


# ---- the actor's loss


def actor_gradient(actor, critic, batch, q_weight):
    actor.zero_grad()
    td3_bc.actor_loss(actor, critic, batch, q_weight)[0].backward()
    return flat_grad(actor)


def test_the_scale_of_q_does_not_matter():
    """Multiply all rewards, hence Q, by 1000: the actor's gradient stays."""
    actor, critic, batch = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch()
    before = actor_gradient(actor, critic, batch, 2.5)
    for parameter in critic.layers[-1].parameters():
        parameter.data.mul_(1000)
    assert_close(actor_gradient(actor, critic, batch, 2.5), before)


def test_lambda_is_a_constant_to_the_gradient():
    """The gradient treats λ as a plain number; attached, it would cancel Q wherever all Q > 0."""
    actor, critic, batch = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch()
    critic.layers[-1].bias.data += 50
    got = actor_gradient(actor, critic, batch, 2.5)
    actor.zero_grad()
    action = actor(batch.obs)
    q = critic(batch.obs, action)[0]
    lam = 2.5 / q.abs().mean().item()
    (-lam * q.mean() + ((action - batch.action) ** 2).mean()).backward()
    assert_close(got, flat_grad(actor))
    assert (got - actor_gradient(actor, critic, batch, 0.0)).abs().max() > 1e-3, (
        "Q must matter here"
    )


def test_constant_q_contributes_exactly_its_weight():
    """−λ mean Q = −w for any constant Q > 0."""
    actor, batch = make(Actor, 3, 2), tiny_batch()
    loss, cloning, _ = td3_bc.actor_loss(
        actor, lambda obs, action: torch.full((2, 4), 123.0), batch, 2.5
    )
    assert_close(loss - cloning, -2.5)


def test_without_weight_on_q_it_is_behaviour_cloning():
    """w → 0 leaves the gradient of BC's loss, in its own file."""
    import bc
    actor, critic, batch = make(Actor, 3, 2), make(Critic, 3, 2), tiny_batch()
    got = actor_gradient(actor, critic, batch, 1e-12)
    actor.zero_grad()
    bc.actor_loss(actor, batch).backward()
    assert_close(got, flat_grad(actor))


def test_cloning_error_is_a_mean_over_action_dimensions():
    """π = (0, 0, 0) and a = (1, 1, 1) make 1, not 3."""
    batch = tiny_batch(action_dim=3)._replace(action=torch.ones(4, 3))
    loss, cloning, _ = td3_bc.actor_loss(
        torch.zeros_like, lambda obs, action: torch.ones(2, 4), batch, 0.0
    )
    assert_close(torch.stack([loss, cloning]), [1.0, 1.0])


# ---- the update


def networks():
    actor, critic = make(Actor, 3, 2), make(Critic, 3, 2)
    # targets that differ show which one is used
    return [actor, make(Actor, 3, 2), critic, make(Critic, 3, 2)]


def sgd(*nets, lr=0.01):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in nets]


@pytest.mark.parametrize("delayed", [False, True])
def test_update_is_the_algorithm_box(delayed):
    """Critic on a target from the target networks; in its turn the actor, on the new critic; then
    (E6), exactly."""
    args, data, nets = Args(batch_size=4, gamma=0.9, target_rate=0.3), tiny_data(), networks()
    actor, actor_target, critic, critic_target = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[2])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = td3_bc.update(args, data, *nets, *optimizers, delayed)

        torch.manual_seed(seed)
        batch = data.sample(4)
        y = td3_bc.td_target(actor_target, critic_target, batch, args)
        q_loss, q_data = td3_bc.critic_loss(critic, batch, y)
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        expected = dict(critic_loss=q_loss, q_data=q_data)
        if delayed:
            pi_loss, cloning, q_policy = td3_bc.actor_loss(actor, critic, batch, args.q_weight)
            step_by_hand(pi_loss, list(actor.parameters()), 0.01)
            expected |= dict(cloning_error=cloning, q_policy=q_policy)
            for target, online in ((actor_target, actor), (critic_target, critic)):
                for t, o in zip(target.parameters(), online.parameters()):
                    t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, actor_target, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[2]), q_grad, 1e-12)
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_each_step_moves_its_own_network_only():
    """The critic's loss gives the actor no gradient, the actor's step leaves critic and targets
    without one."""
    args, data, (actor, actor_target, critic, critic_target) = (
        Args(batch_size=4),
        tiny_data(),
        networks(),
    )
    td3_bc.update(
        args, data, actor, actor_target, critic, critic_target, *sgd(actor, critic), False
    )
    assert all(
        p.grad is None for net in (actor, actor_target, critic_target) for p in net.parameters()
    )
    before = flat(critic)
    td3_bc.update(
        args, data, actor, actor_target, critic, critic_target, *sgd(actor, critic, lr=0.0), True
    )
    assert torch.equal(flat(critic), before) and all(p.grad is not None for p in actor.parameters())
    assert all(p.grad is None for net in (actor_target, critic_target) for p in net.parameters())


def test_train_delays_actor_and_targets(monkeypatch):
    """Ten updates with policy_delay 2: ten of the critic, five of actor and targets; targets start
    as copies."""
    run = silent_train(monkeypatch, td3_bc, tiny_data(), steps=10, batch_size=4, policy_delay=2)
    assert run.steps_that_moved("critic") == list(range(1, 11))
    for name in ("actor", "actor_target", "critic_target"):
        assert run.steps_that_moved(name) == [2, 4, 6, 8, 10]
    for name in ("actor", "critic"):
        assert torch.equal(run.history[0][name], run.history[0][name + "_target"])
        assert not torch.equal(run.history[10][name], run.history[10][name + "_target"])


# ---- units


def test_standardisation_round_trip(monkeypatch):
    """In training mean 0 and std / (std + 0.001); the finished actor's input and output are in raw
    units."""
    data = tiny_data()
    data.obs[:, 2] = 4.0  # a dimension that never changes must not blow up
    raw_obs, raw_next_obs = data.obs.clone(), data.next_obs.clone()
    run = silent_train(monkeypatch, td3_bc, data, steps=2, batch_size=4)
    std = raw_obs.std(0, correction=0)
    assert_close(data.obs.mean(0), torch.zeros(3))
    assert_close(data.obs.std(0, correction=0), std / (std + 1e-3))
    assert_close(data.next_obs * (std + 1e-3) + raw_obs.mean(0), raw_next_obs)
    expected = [
        [0.5 + (i + 1) * a for i, a in enumerate(slow_action(run.actor, data.obs[b]))]
        for b in range(12)
    ]
    assert_close(run.actor.act(raw_obs), expected)
