"""ReBRAC against slow loops, its special cases with known answers, and where it holds on while TD3
runs away."""
import copy
import math
import sys

from common import LEVELS, SUITE, parse_args

import pytest
import rebrac
import td3_bc
import torch
from helpers import (
    assert_close,
    flat,
    flat_grad,
    make,
    record_draws,
    silent_train,
    slow_mlp,
    slow_normed_critic,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from rebrac import Actor, Args, Critic


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Three narrow hidden layers, in float64."""
    monkeypatch.setattr(rebrac, "HIDDEN", (7, 6, 5))


def networks():
    """Actor, its target, critics, their target: all different, with outputs that are not small, and
    norms that do something."""
    nets = [make(net, 3, 2) for net in (Actor, Actor, Critic, Critic)]
    for net in nets:
        for parameter in (net.net[-1] if isinstance(net, Actor) else net.layers[-1]).parameters():
            parameter.data.normal_(std=0.7)
    for norm in (*nets[2].norms, *nets[3].norms):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    return nets


def slow_action(actor, obs):
    return [math.tanh(u) for u in slow_mlp(actor.net, obs)]


# ---- each function against a loop


def test_td_target_equals_a_loop(monkeypatch):
    """(E1), (E2): noise and action clipped, the smaller critic, the noisy action's distance to the
    data's next action."""
    args, (actor, _, critic, _) = (
        Args(gamma=0.9, policy_noise=0.6, noise_clip=0.5, critic_penalty=0.7),
        networks(),
    )
    batch, next_data_action = tiny_batch(), 2 * torch.rand(4, 2) - 1
    draws, expected, clips = record_draws(monkeypatch, "randn_like"), [], set()
    y = rebrac.td_target(actor, critic, batch, next_data_action, args)
    for b in range(4):
        action = slow_action(actor, batch.next_obs[b])
        for i, eps in enumerate(draws[0][b].tolist()):
            noise = min(max(0.6 * eps, -0.5), 0.5)
            clips |= {"noise"} if abs(noise) == 0.5 else {"neither"}
            clips |= {"action"} if abs(action[i] + noise) > 1 else set()
            action[i] = min(max(action[i] + noise, -1), 1)
        penalty = sum((action[i] - float(next_data_action[b, i])) ** 2 for i in range(2))
        q = min(slow_normed_critic(critic, k, batch.next_obs[b], action) for k in range(2))
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else q - 0.7 * penalty)))
    assert clips == {"noise", "action", "neither"}, "this seed must exercise both clips"
    assert_close(y, expected)
    assert not y.requires_grad


def test_critic_loss_equals_a_loop():
    """(E3): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = networks()[2], tiny_batch(), torch.randn(4)
    q = [
        [slow_normed_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = rebrac.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    assert abs(q[0][0] - q[1][0]) > 1e-3


def test_critic_loss_refuses_a_column_of_targets():
    """A target (B, 1) would silently compare every Q with every y."""
    with pytest.raises(AssertionError):
        rebrac.critic_loss(Critic(3, 2), tiny_batch(), torch.randn(4, 1))


def test_actor_loss_equals_a_loop():
    """(E4), (E5): λ from |Q|, Q the smaller of both critics per transition; cloning summed over
    action dimensions."""
    (actor, _, critic, _), batch = networks(), tiny_batch()
    actions = [slow_action(actor, batch.obs[b]) for b in range(4)]
    both = [
        [slow_normed_critic(critic, k, batch.obs[b], actions[b]) for b in range(4)]
        for k in range(2)
    ]
    # so that each critic is the smaller one somewhere
    critic.layers[-1].bias.data[1] -= both[1][0] - both[0][0] + 0.1
    both = [
        [slow_normed_critic(critic, k, batch.obs[b], actions[b]) for b in range(4)]
        for k in range(2)
    ]
    critic.layers[-1].bias.data -= min(both[0][0], both[1][0]) - 0.01
    both = [
        [slow_normed_critic(critic, k, batch.obs[b], actions[b]) for b in range(4)]
        for k in range(2)
    ]
    assert {u < v for u, v in zip(*both)} == {True, False}
    q = [min(both[0][b], both[1][b]) for b in range(4)]
    assert min(q) < 0 < max(q), "with one sign, mean |Q| and |mean Q| would be the same"
    cloning = (
        sum((actions[b][i] - float(batch.action[b, i])) ** 2 for b in range(4) for i in range(2))
        / 4
    )
    loss, *metrics = rebrac.actor_loss(actor, critic, batch, 0.3)
    assert_close(loss, 0.3 * cloning - sum(q) / 4 / (sum(map(abs, q)) / 4))
    assert_close(torch.stack(metrics), [cloning, sum(q) / 4])


# ---- the critic's penalty


def test_the_target_drops_by_the_penalty():
    """ã′ − a′ = 0.2 in each of 3 dimensions, β₂ = 0.01, γ = 0.99: y is 0.99 · 0.01 · 3 · 0.04 =
    0.001188 lower."""
    batch = tiny_batch(terminated=(0, 1, 0, 0), action_dim=3)
    args = dict(policy_noise=0.0, gamma=0.99)
    ys = [
        rebrac.td_target(
            lambda obs: torch.full((4, 3), 0.5),
            lambda obs, action: torch.full((2, 4), 7.0),
            batch,
            torch.full((4, 3), 0.3),
            Args(critic_penalty=penalty, **args),
        )
        for penalty in (0.0, 0.01)
    ]
    assert_close(ys[0] - ys[1], [0.001188, 0.0, 0.001188, 0.001188], 1e-10)


def test_without_the_penalty_the_target_is_td3s():
    """β₂ = 0 and the same noise: td3_bc.py's target."""
    (actor, _, critic, _), batch, ys = networks(), tiny_batch(), []
    for target, extra in ((rebrac.td_target, (torch.rand(4, 2),)), (td3_bc.td_target, ())):
        torch.manual_seed(1)
        ys.append(target(actor, critic, batch, *extra, Args(critic_penalty=0.0)))
    assert_close(*ys)


def test_termination_stops_bootstrap_and_penalty():
    """Where the task is over, y is the reward, whatever s′, a′, γ and β₂."""
    (actor, _, critic, _), batch = networks(), tiny_batch(terminated=(1, 1, 1, 1))
    for penalty in (0.0, 5.0):
        y = rebrac.td_target(actor, critic, batch, torch.rand(4, 2), Args(critic_penalty=penalty))
        assert torch.equal(y, batch.reward)


@pytest.mark.parametrize(
    "noise, clip, largest", [(0.2, 0.5, 0.5), (9.0, 0.5, 0.5), (9.0, 3.0, 1.0), (0.0, 0.5, 0.0)]
)
def test_smoothing_noise(noise, clip, largest):
    """Bounded by noise_clip, then by the action range; none with σ = 0; its own for each transition
    and dimension."""
    seen = []
    rebrac.td_target(
        torch.zeros_like,
        lambda obs, action: seen.append(action) or torch.zeros(2, 64),
        tiny_batch([0] * 64, obs_dim=2),
        torch.zeros(64, 2),
        Args(policy_noise=noise, noise_clip=clip),
    )
    assert seen[0].abs().max() <= largest
    if noise == 0.2:
        assert len(seen[0].unique()) > 120, "128 draws, of which a few may sit on the clip"
    elif noise == 9.0:
        assert seen[0].min() == -largest and seen[0].max() == largest
    else:
        assert torch.equal(seen[0], torch.zeros(64, 2))


# ---- the next action of the data


def test_next_actions_stay_within_their_episode():
    """a′ is the next row's action. Rows at a time limit and a cut-off last row have none and go;
    terminated ones stay."""
    def taken(terminated=(3,), truncated=(7, 11)):
        """(a′, what is left of the data), for a dataset of twelve rows with these ends."""
        data = copy.deepcopy(whole)
        data.terminated = torch.tensor([float(i in terminated) for i in range(12)])
        data.truncated = torch.tensor([i in truncated for i in range(12)])
        return rebrac.take_next_actions(data), data

    def assert_left(data, kept):
        """Every column has these rows of the whole dataset."""
        assert data.size == len(kept)
        for name in ("obs", "action", "reward", "next_obs"):
            assert torch.equal(getattr(data, name), getattr(whole, name)[kept])

    whole = tiny_data()  # a termination in row 3, time limits in rows 7 and 11
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    next_action, data = taken()
    assert_left(data, kept)
    assert torch.equal(next_action, whole.action[[i + 1 for i in kept]])
    again, data = taken(truncated=(7,))  # the file ends in row 11, the episode does not
    assert_left(data, kept)
    assert torch.equal(again, next_action)
    assert_left(taken(terminated=(3, 11), truncated=(7,))[1], [*kept, 11])
    # both ends at once: over is over
    assert_left(taken(terminated=(3, 11), truncated=(3, 7, 11))[1], [*kept, 11])


def test_data_without_any_next_action_are_refused(capsys):
    data = tiny_data()
    data.terminated.zero_()
    data.truncated = torch.ones(12, dtype=torch.bool)
    with pytest.raises(SystemExit):
        rebrac.take_next_actions(data)
    assert "has a next one in its episode" in capsys.readouterr().err


def test_the_actor_moves_in_the_first_step_and_every_second(monkeypatch):
    run = silent_train(monkeypatch, rebrac, tiny_data(), steps=5, batch_size=4)
    assert run.steps_that_moved("actor") == [1, 3, 5]


def test_update_pairs_each_transition_with_its_own_next_action(monkeypatch):
    """Action = row number / 100: wherever the episode goes on, a′ = a + 0.01."""
    data, seen = tiny_data(), []
    data.action = torch.arange(12.0)[:, None].expand(12, 2) / 100
    monkeypatch.setattr(
        rebrac,
        "td_target",
        lambda actor, critic, batch, next_data_action, args: (
            seen.append((batch, next_data_action)) or batch.reward
        ),
    )
    actor, actor_target, critic, critic_target = networks()
    rebrac.update(
        Args(batch_size=64),
        data,
        rebrac.take_next_actions(data),
        actor,
        actor_target,
        critic,
        critic_target,
        *sgd(actor, critic),
        False,
    )
    batch, next_data_action = seen[0]
    assert_close(next_data_action, batch.action + 0.01)
    assert set((100 * batch.action[:, 0]).round().int().tolist()) == {
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        9,
        10,
    }, "64 draws see all rows"


# ---- the actor's loss


def actor_gradient(actor, critic, batch, actor_penalty):
    actor.zero_grad()
    rebrac.actor_loss(actor, critic, batch, actor_penalty)[0].backward()
    return flat_grad(actor)


def test_cloning_error_is_a_sum_over_action_dimensions():
    """π = (0, 0, 0), a = (1, 1, 1), β₁ = 0.01: 0.03, not 0.01; and a constant Q adds −1 whatever
    its size."""
    batch = tiny_batch(action_dim=3)._replace(action=torch.ones(4, 3))
    loss, cloning, _ = rebrac.actor_loss(
        torch.zeros_like, lambda obs, action: torch.full((2, 4), 123.0), batch, 0.01
    )
    assert_close(torch.stack([loss, cloning]), [0.03 - 1, 3.0])


def test_the_scale_of_q_does_not_matter():
    """Multiply all rewards, hence Q, by 1000: the actor's gradient stays."""
    (actor, _, critic, _), batch = networks(), tiny_batch()
    before = actor_gradient(actor, critic, batch, 0.3)
    for parameter in critic.layers[-1].parameters():
        parameter.data.mul_(1000)
    assert_close(actor_gradient(actor, critic, batch, 0.3), before)


def test_lambda_is_a_constant_to_the_gradient():
    """The gradient treats λ as a plain number; attached, it would cancel Q wherever all Q > 0."""
    (actor, _, critic, _), batch = networks(), tiny_batch()
    critic.layers[-1].bias.data += 5
    got = actor_gradient(actor, critic, batch, 0.3)
    actor.zero_grad()
    action = actor(batch.obs)
    q = critic(batch.obs, action).min(0).values
    assert (q > 0).all()
    (0.3 * ((action - batch.action) ** 2).sum(1) - q / q.abs().mean().item()).mean().backward()
    assert_close(got, flat_grad(actor))
    assert (
        got - actor_gradient(actor, lambda obs, action: torch.ones(2, 4), batch, 0.3)
    ).abs().max() > 1e-3, "Q matters"


def test_with_one_critic_it_is_td3_bcs_loss():
    """β₂ = 0, one critic: td3_bc.py's gradient with w = 1 / (β₁ A), times β₁ A."""
    actor, batch, critic = networks()[0], tiny_batch(), Critic(3, 2, num=1)
    critic.layers[-1].weight.data.normal_()
    got = actor_gradient(actor, critic, batch, 0.2)
    actor.zero_grad()
    td3_bc.actor_loss(actor, critic, batch, 1 / (0.2 * 2))[0].backward()
    assert_close(got, 0.2 * 2 * flat_grad(actor))


# ---- networks


def test_hidden_features_are_normalised_after_the_relu():
    """Mean 0 and variance 1 over the features, for every critic and transition; and so not the
    pre-activations."""
    critic, seen = Critic(3, 2), []
    for norm in critic.norms:
        norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    critic(5 * torch.randn(4, 3), torch.rand(4, 2))
    assert len(seen) == 3
    for before, after in seen:
        assert (before >= 0).all() and before.max() > 0
        varied = before.var(-1, correction=0) > 1e-2  # where the eps of 1e-6 plays no part
        assert varied.any()
        assert_close(after.mean(-1), torch.zeros(2, 4), 1e-6)
        assert_close(after.var(-1, correction=0)[varied], torch.ones(int(varied.sum())), 1e-3)


def test_official_initialisation():
    """Hidden biases 0.1; last layers within ±0.003 (critics) and ±0.001 (actor); two critics that
    differ; norms neutral."""
    actor, critic = Actor(3, 2), Critic(3, 2)
    hidden = [*actor.net[:-1:2], *critic.layers[:-1]]
    assert len(hidden) == 6 and all(
        (layer.bias == 0.1).all() and layer.weight.std() > 0.1 for layer in hidden
    )
    for layer, bound in ((actor.net[-1], 1e-3), (critic.layers[-1], 3e-3)):
        assert bound / 2 < layer.weight.abs().max() <= bound and 0 < layer.bias.abs().max() <= bound
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in critic.norms)
    assert not torch.equal(*critic.layers[0].weight)


def test_act_gives_the_environments_units():
    """Raw observations in, mid + half · π(s) out."""
    actor, obs = networks()[0], torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    actions = [slow_action(actor, o) for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in actions])


# ---- the update


def sgd(*nets, lr=0.01):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in nets]


@pytest.mark.parametrize("update_actor", [False, True])
def test_update_is_the_algorithm_box(update_actor):
    """Critic; in its turn the actor on the new critic, after its target has moved; then the
    critic's target, exactly."""
    args = Args(batch_size=4, gamma=0.9, target_rate=0.3, actor_penalty=0.4, critic_penalty=0.2)
    data, nets = tiny_data(), networks()
    next_action = rebrac.take_next_actions(data)
    actor, actor_target, critic, critic_target = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[2])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = rebrac.update(args, data, next_action, *nets, *optimizers, update_actor)

        torch.manual_seed(seed)
        index = data.draw_rows(4)
        batch = data.rows(index)
        y = rebrac.td_target(actor_target, critic_target, batch, next_action[index], args)
        q_loss, q_data = rebrac.critic_loss(critic, batch, y)
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        expected = dict(critic_loss=q_loss, q_data=q_data)
        if update_actor:
            pi_loss, cloning, q_policy = rebrac.actor_loss(actor, critic, batch, 0.4)
            for t, o in zip(actor_target.parameters(), actor.parameters()):
                t.data = 0.7 * t.data + 0.3 * o.data
            step_by_hand(pi_loss, list(actor.parameters()), 0.01)
            for t, o in zip(critic_target.parameters(), critic.parameters()):
                t.data = 0.7 * t.data + 0.3 * o.data
            expected |= dict(cloning_error=cloning, q_policy=q_policy)
        for got, want in zip(nets, (actor, actor_target, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[2]), q_grad, 1e-12)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)


def test_the_actors_target_lags_one_step():
    """With rate 1, one update leaves π̄ at the actor from before it and Q̄ at the critic from after
    it."""
    data, (actor, actor_target, critic, critic_target) = tiny_data(), networks()
    before = flat(actor), flat(critic)
    rebrac.update(
        Args(batch_size=4, target_rate=1.0),
        data,
        rebrac.take_next_actions(data),
        actor,
        actor_target,
        critic,
        critic_target,
        *sgd(actor, critic),
        True,
    )
    assert_close(flat(actor_target), before[0], 1e-14)
    assert_close(flat(critic_target), flat(critic), 1e-14)
    assert not torch.equal(flat(actor), before[0]) and not torch.equal(flat(critic), before[1])


def test_each_step_moves_its_own_network_only():
    """The critic's loss gives the actor no gradient, the actor's step leaves critic and targets
    without one."""
    args, data, (actor, actor_target, critic, critic_target) = (
        Args(batch_size=4),
        tiny_data(),
        networks(),
    )
    nets = args, data, rebrac.take_next_actions(data), actor, actor_target, critic, critic_target
    rebrac.update(*nets, *sgd(actor, critic), False)
    assert all(
        p.grad is None for net in (actor, actor_target, critic_target) for p in net.parameters()
    )
    assert all(p.grad is not None for p in critic.parameters())
    before = flat(critic)
    rebrac.update(*nets, *sgd(actor, critic, lr=0.0), True)
    assert torch.equal(flat(critic), before) and all(p.grad is not None for p in actor.parameters())
    assert all(p.grad is None for net in (actor_target, critic_target) for p in net.parameters())


def test_train_delays_actor_and_targets(monkeypatch):
    """Ten updates: ten of the critic, five of actor and targets, from the first on; π̄'s first is
    onto itself."""
    run = silent_train(
        monkeypatch,
        rebrac,
        tiny_data(),
        steps=10,
        batch_size=4,
        policy_delay=2,
        actor_lr=0.01,
        critic_lr=0.02,
    )
    assert run.steps_that_moved("critic") == list(range(1, 11))
    for name in ("actor", "critic_target"):
        assert run.steps_that_moved(name) == [1, 3, 5, 7, 9]
    assert run.steps_that_moved("actor_target") == [3, 5, 7, 9]
    for name in ("actor", "critic"):
        assert torch.equal(run.history[0][name], run.history[0][name + "_target"])
        assert not torch.equal(run.history[10][name], run.history[10][name + "_target"])
    assert_close(
        torch.stack([run.actor.action_mid, run.actor.action_half]), [[0.5, 0.5], [1.0, 2.0]]
    )
    assert [
        run.state[f"{name}_optimizer"].param_groups[0]["lr"] for name in ("actor", "critic")
    ] == [0.01, 0.02]


# ---- tuned settings


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rebrac.py", *arguments])
    return parse_args(Args, rebrac.TUNED)


def test_tuned_values_fill_what_the_user_leaves_open(monkeypatch, capsys):
    """A suite dataset brings its own two weights, and says so; a flag stands, even where it repeats
    the default of Args."""
    args = parse(monkeypatch, "--env", "hopper-medium-replay", "--seed", "3")
    assert (args.actor_penalty, args.critic_penalty, args.seed) == (0.05, 0.5, 3)
    assert capsys.readouterr().out == ("tuned for hopper-medium-replay: --actor-penalty 0.05\n"
                                       "tuned for hopper-medium-replay: --critic-penalty 0.5\n")
    args = parse(
        monkeypatch, "--env", "hopper-medium-replay", "--actor-penalty", str(Args().actor_penalty)
    )
    assert (args.actor_penalty, args.critic_penalty) == (Args().actor_penalty, 0.5)
    assert capsys.readouterr().out == "tuned for hopper-medium-replay: --critic-penalty 0.5\n"


def test_other_datasets_have_the_defaults(monkeypatch, capsys):
    """Nobody tuned for pendulum."""
    assert parse(monkeypatch, "--env", "pendulum-medium") == Args(env="pendulum-medium")
    assert capsys.readouterr().out == ""


def test_tuned_values_are_of_suite_datasets_and_own_settings():
    """Every key is a name that load_dataset knows, every value goes to a setting that exists."""
    assert set(rebrac.TUNED) == {
        f"{body}-{level}" for body in ("hopper", "walker2d", "halfcheetah") for level in LEVELS
    }
    assert {env.split("-")[0] for env in rebrac.TUNED} < set(SUITE)
    assert all(
        set(values) == {"actor_penalty", "critic_penalty"} for values in rebrac.TUNED.values()
    )


# ---- unlike TD3


def learn_from_a_narrow_corridor(algorithm, seed, **settings):
    """One state, for ever; data actions in [−0.2, 0.2] earn what they say, r = a. What a = 1 earns,
    nobody knows."""
    torch.manual_seed(seed)
    data = tiny_data(257, action_dim=1)
    data.obs = data.next_obs = torch.zeros(257, 3)
    data.terminated = torch.zeros(257)
    data.truncated.zero_()
    data.reward = torch.linspace(-0.2, 0.2, 257)[torch.randperm(257)]
    data.action = data.reward[:, None]
    actor, critic = algorithm.Actor(3, 1), algorithm.Critic(3, 1)
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3) for net in (actor, critic)]
    next_action = (rebrac.take_next_actions(data),) * (algorithm is rebrac)
    nets = actor, copy.deepcopy(actor), critic, copy.deepcopy(critic)
    for step in range(300):
        args = algorithm.Args(batch_size=32, gamma=0.9, target_rate=0.2, **settings)
        algorithm.update(args, data, *next_action, *nets, *optimizers, step % 2 == 0)
    action = actor.act(torch.zeros(1, 3))
    return action.item(), critic(torch.zeros(1, 3), action).min().item()


@pytest.mark.parametrize("seed", (1, 2))
def test_layer_norm_alone_stops_what_td3_runs_away_with(monkeypatch, seed):
    """No data action is worth more than 0.2 / (1 − γ) = 2. Without any penalty TD3 acts far outside
    and expects far more."""
    for algorithm in (rebrac, td3_bc):
        monkeypatch.setattr(algorithm, "HIDDEN", (32, 32, 32))
    action, q = learn_from_a_narrow_corridor(td3_bc, seed, q_weight=1e6)
    assert action > 0.9 and q > 4
    action, q = learn_from_a_narrow_corridor(rebrac, seed, actor_penalty=0.0, critic_penalty=0.0)
    assert abs(action) < 0.4 and q < 2
