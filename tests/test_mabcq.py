"""MABCQ against slow loops, its two factors on the matrix game, and that an agent sees no action
but its own."""
import copy
import math
import signal
from dataclasses import replace

import common

import bcq
import gymnasium as gym
import mabcq
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import (
    assert_close,
    assert_gradient,
    ends_every_four,
    flat,
    flat_grad,
    make,
    silent_train,
    slow_critic,
    slow_mlp,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from mabcq import VAE, Actor, Args, Critic, Perturbation, outcome_model


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64, here and in bcq."""
    for module in (mabcq, bcq):
        monkeypatch.setattr(module, "HIDDEN", (7, 6))
        monkeypatch.setattr(module, "VAE_HIDDEN", (6, 5))


# ---- one agent


def test_a_single_agent_is_bcq_bit_for_bit(monkeypatch):
    """With the weights switched on: alone there is nobody to re-weight for. All networks after each
    step, and what it does."""
    runs = []
    for module, args in ((bcq, {}), (mabcq, dict(agents=1))):
        torch.manual_seed(3)
        runs.append(
            silent_train(
                monkeypatch,
                module,
                tiny_data(),
                steps=12,
                batch_size=5,
                max_perturbation=0.3,
                **args,
            )
        )
        torch.manual_seed(0)  # tiny_data draws: the same for both
    one, team = runs
    assert len(one.history) == 13
    for name, teams_name in (
        ("actor", "actor"),
        ("critic_target", "critic_targets"),
        ("perturbation_target", "perturbation_targets"),
    ):
        for before, after in zip(one.history, team.history):
            assert torch.equal(before[name], after[teams_name])
    obs = torch.randn(50, 3)
    assert torch.equal(one.actor.act(obs), team.actor.act(obs)) and one.actor.act(obs).std() > 0.01


# ---- the two factors


# the team's reward: rows are agent 1's actions, columns agent 2's
MATRIX = np.array([[1.0, 5.0], [6.0, 1.0]])
POLICIES = np.array([[0.8, 0.2], [0.2, 0.8]])  # of the data, agent by agent


def errors_of(probability):
    """The u of one-dimensional changes that are as likely as that, relative to the likeliest, for
    one other dimension."""
    return (-2 * probability.log()).sqrt()[:, None]


def learn_matrix_game(agent, deviation, normalization):
    """Q of both actions of one agent: the exact solution of (E9) on 25 plays, each s' worth what
    its pair of actions earns."""
    counts = np.outer(*(25 * POLICIES / 5)).round().astype(int)  # 4, 16, 1, 4
    plays = [(a, b) for a in range(2) for b in range(2) for _ in range(counts[a, b])]
    own = torch.tensor([play[agent] for play in plays])
    value = torch.tensor([MATRIX[play] for play in plays])
    mean_value = torch.stack([value[own == a].mean() for a in range(2)])[own]
    probability = torch.tensor([POLICIES[1 - agent][play[1 - agent]] for play in plays])
    u = errors_of(probability) if normalization else torch.zeros(25, 1)
    weight = mabcq.transition_weights(value, mean_value if deviation else value, u, 1, 10.0)
    table = torch.zeros(2, requires_grad=True)
    loss, _ = mabcq.critic_loss(
        lambda obs, action: table[action].expand(1, -1),
        tiny_batch([0.0] * 25)._replace(action=own),
        value,
        weight,
    )
    slope, = torch.autograd.grad(loss, table, create_graph=True)
    curvature, = torch.autograd.grad(slope.sum(), table)  # of separate squares
    return (-slope / curvature).detach()


@pytest.mark.parametrize(
    "deviation, normalization, q_1, q_2, team_reward",
    [
        (False, False, [4.2, 2.0], [2.0, 4.2], 5),
        (True, False, [20.2 / 4.2, 4.0], [4.0, 20.2 / 4.2], 5),
        (False, True, [3.0, 3.5], [3.5, 3.0], 6),
        (True, True, [26 / 6, 37 / 7], [37 / 7, 26 / 6], 6),
    ],
)
def test_the_matrix_game(deviation, normalization, q_1, q_2, team_reward):
    """C18: each agent by itself. Independent learners choose the pair worth 5, as the data do; with
    (E7) both choose 6."""
    q = [learn_matrix_game(agent, deviation, normalization) for agent in range(2)]
    assert_close(torch.stack(q), [q_1, q_2])
    assert MATRIX[int(q[0].argmax()), int(q[1].argmax())] == team_reward


@pytest.mark.parametrize("values", [[1.0, 5.0, 3.0], [-1.0, -5.0, -2.0], [-1.0, -2.0, 0.5]])
def test_value_deviation_has_mean_one_and_raises_the_value(values):
    """Under P the weight averages 1, so (E8)'s division changes nothing, and V becomes E + Var /
    |E|, for either sign of E."""
    value = torch.tensor(values).repeat_interleave(torch.tensor([2, 5, 3]))
    mean = value.mean()
    weight = mabcq.transition_weights(value, mean.expand(10), torch.zeros(10, 1), 1, 1e9)
    assert_close(weight, 1 + (value - mean) / mean.abs())
    assert_close((weight * value).mean(), mean + value.var(correction=0) / mean.abs())


def test_equal_values_and_equal_chances_change_nothing():
    """V constant over s': 1 exactly, also 0; all s' equally likely: (E7) is the identity, whatever
    the probability."""
    for constant in (7.0, -7.0, 0.0):
        value = torch.full((6,), constant)
        assert torch.equal(
            mabcq.transition_weights(value, value, torch.zeros(6, 3), 2, 10.0), torch.ones(6)
        )
    assert_close(
        mabcq.transition_weights(value, value, errors_of(torch.full((6,), 0.25)), 1, 10.0),
        torch.ones(6),
    )


def test_normalization_ignores_how_often():
    """Twice as many transitions to one s': the weighted mean of y stays."""
    for copies in (1, 2):
        value = torch.tensor([1.0] * 4 + [5.0] * copies)
        p = torch.tensor([4.0] * 4 + [copies] * copies) / (4 + copies)
        weight = mabcq.transition_weights(value, value, errors_of(p), 1, 10.0)
        assert_close((weight * value).sum() / weight.sum(), 3.0)


def test_transition_weights_equal_a_loop():
    """(E6) with its floor, a tenth of the mean |M|; (E8): both factors clipped before their
    product, which the mean divides."""
    value = torch.tensor([3.0, 0.5, -9.0, 1e3, 0.1])
    mean = torch.tensor([2.0, -4.0, 1.0, 1.0, 0.01])
    p = torch.tensor([0.5, 0.8, 1.0, 1e-30, 1.0])
    raw = [3 / 2 * 2, (1 + 4.5 / 4) / 0.8, 0.2, 5 * 5, 1 + 0.09 / (0.1 * 8.01 / 5)]
    weight = mabcq.transition_weights(value, mean, errors_of(p), 1, 5.0)
    assert_close(weight, [w / (sum(raw) / 5) for w in raw], 1e-5)  # the floor has a millionth more
    assert_close(weight.mean(), 1.0)


def test_transition_normalization_equals_a_loop():
    """(E7): the power is the others' dimensions over those of s'; without others all s' weigh the
    same."""
    u, value = torch.randn(4, 6), torch.ones(4)
    for others in (0, 1, 5):
        raw = [math.exp(0.5 * others / 6 * sum(v**2 for v in row)) for row in u.tolist()]
        assert_close(
            mabcq.transition_weights(value, value, u, others, 1e9),
            [w / (sum(raw) / 4) for w in raw],
        )


# ---- losses


def slow_outcome_loss(outcome, batch, value, scale):
    errors, likelihood, means, us = 0.0, 0.0, [], []
    for b in range(4):
        x = torch.cat([batch.obs[b], batch.action[b]])
        means.append(slow_mlp(outcome["value"], x)[0])
        errors += (means[-1] - float(value[b])) ** 2 / 4
        out, row = slow_mlp(outcome["change"], x), []
        for j in range(3):
            std = math.exp(min(max(out[3 + j], -5), 2))
            change = float(batch.next_obs[b, j] - batch.obs[b, j]) / scale[j]
            row.append((change - out[j]) / std)
            likelihood += (0.5 * ((change - out[j]) / std) ** 2 + math.log(std)) / 12
        us.append(row)
    return errors + likelihood, means, us


def test_outcome_loss_equals_a_loop():
    """(E5) with its gradient; M and u come without one."""
    outcome = make(outcome_model, 3, 2, scale=3.0)
    batch = tiny_batch()
    value = torch.randn(4)
    scale = [1.0, 2.0, 0.5]
    outcome["change"][-1].bias.data[3:] = torch.tensor([-9.0, 0.0, 5.0])  # clamped, free, clamped
    outcome["change"][-1].weight.data[3:] *= 0.1
    loss, mean_value, u = mabcq.outcome_loss(outcome, batch, value, torch.tensor(scale))
    loss.backward()
    want, means, us = slow_outcome_loss(outcome, batch, value, scale)
    assert_close(loss, want), assert_close(mean_value, means), assert_close(u, us)
    assert not mean_value.requires_grad and not u.requires_grad
    for net in outcome.values():
        assert_gradient(net[-1].bias, lambda: slow_outcome_loss(outcome, batch, value, scale)[0])
    with pytest.raises(AssertionError):
        mabcq.outcome_loss(outcome, batch, value[:, None], torch.tensor(scale))


def test_what_follows_a_termination_may_be_unknown():
    """Where a file has no next observations, s stands for a termination's s': neither the loss nor
    the weight takes it for a rare change. A state that stays as it is counts."""
    outcome, batch, scale = make(outcome_model, 3, 2), tiny_batch(), torch.ones(3)
    still = batch.next_obs.clone()
    still[:2] = batch.obs[:2]  # the second row is a termination
    batch = batch._replace(next_obs=still)
    _, value, u = mabcq.outcome_loss(outcome, batch, torch.zeros(4), scale)
    assert (u[1] == 0).all() and (u[[0, 2, 3]] != 0).all()
    loss = mabcq.outcome_loss(outcome, batch, value, scale)[0]  # without errors of M
    known = mabcq.Batch(*(column[[0, 2, 3]] for column in batch))
    assert_close(loss, 3 / 4 * mabcq.outcome_loss(outcome, known, value[[0, 2, 3]], scale)[0])


def test_what_the_models_learn():
    """M is the conditional mean of V, the Gaussian that of s': an own action of 0, after which s'
    is 0 or 1 at 1 : 3."""
    batch = tiny_batch([0.0] * 8, action_dim=1)._replace(
        obs=torch.zeros(8, 3), action=torch.zeros(8, 1)
    )
    batch = batch._replace(next_obs=torch.tensor([0.0, 1, 1, 1] * 2)[:, None].expand(8, 3))
    value, outcome, scale = torch.tensor([8.0, 4, 4, 4] * 2), outcome_model(3, 1), torch.ones(3)
    optimizer = torch.optim.Adam(outcome.parameters(), lr=2e-2)
    for _ in range(300):
        mabcq.descend(mabcq.outcome_loss(outcome, batch, value, scale)[0], optimizer)
    _, mean_value, u = mabcq.outcome_loss(outcome, batch, value, scale)
    assert_close(mean_value, [5.0] * 8, 1e-2)
    rare, common_one = -math.sqrt(3), 1 / math.sqrt(3)
    assert_close(u, torch.tensor([rare, *[common_one] * 3] * 2)[:, None].expand(8, 3), 2e-2)


def test_td_target_is_bcqs_and_says_what_comes_after():
    """(E4): y to the last bit; V(s') is 0 after a termination."""
    vae = make(VAE, 3, 2)
    perturbation = make(Perturbation, 3, 2)
    critic = make(Critic, 3, 2)
    batch = tiny_batch()
    perturbation.bound.fill_(0.3)
    torch.manual_seed(5)
    next_value, y = mabcq.td_target(vae, perturbation, critic, batch, Args(gamma=0.9))
    torch.manual_seed(5)
    assert torch.equal(y, bcq.td_target(vae, perturbation, critic, batch, bcq.Args(gamma=0.9)))
    assert_close(batch.reward + 0.9 * next_value, y)
    assert (
        next_value.shape == (4,)
        and (next_value == 0).tolist() == [False, True, False, False]
        and not y.requires_grad
    )


def test_critic_loss_equals_a_loop():
    """(E9): the weighted squared error, averaged over transitions and summed over two different
    critics."""
    critic, batch, y, weight = make(Critic, 3, 2), tiny_batch(), torch.randn(4), torch.rand(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = mabcq.critic_loss(critic, batch, y, weight)
    assert_close(
        loss,
        sum(
            float(weight[b]) * (q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)
        ),
    )
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    for bad in ((y[:, None], weight), (y, weight[:, None])):
        with pytest.raises(AssertionError):
            mabcq.critic_loss(critic, batch, *bad)


# ---- the team


def agents_of(actor):
    """(vae, perturbation, critic) of each agent."""
    return list(zip(actor.vaes, actor.perturbations, actor.critics, strict=True))


def team(agents=2, action_dim=2):
    """A team, its targets and its models."""
    actor = Actor(3, action_dim, agents)
    modules = [
        actor,
        *(
            torch.nn.ModuleList(
                make(net, 3, action_dim // agents, scale=scale) for _ in range(agents)
            )
            for net, scale in ((Perturbation, 2.0), (Critic, 2.0), (outcome_model, 1.0))
        ),
    ]
    for parameter in actor.parameters():
        parameter.data.mul_(2)
    for net in (*actor.perturbations, *modules[1]):
        net.bound.fill_(0.3)
    return modules


def sgd(modules, lr=0.01):
    actor, _, _, outcomes = modules
    teams = dict(
        vae=actor.vaes, critic=actor.critics, perturbation=actor.perturbations, outcome=outcomes
    )
    return {f"{name}_optimizer{i}": torch.optim.SGD(net.parameters(), lr=lr)
            for name, nets in teams.items() for i, net in enumerate(nets)}


@pytest.mark.parametrize("agents", [2, 4])
def test_update_is_the_algorithm_box(agents):
    """Each agent on its own batch and its own part of the action: VAE, models, Q with weights, ξ,
    targets; twice."""
    args = Args(
        batch_size=5, gamma=0.9, target_rate=0.3, num_samples=3, agents=agents, weight_clip=40.0
    )
    data, modules, scale = tiny_data(action_dim=4), team(agents, 4), torch.tensor([1.0, 2.0, 0.5])
    by_hand = copy.deepcopy(modules)
    optimizers = sgd(modules)
    for seed in range(2):
        torch.manual_seed(seed)
        metrics = mabcq.update(args, data, *modules, scale, optimizers)

        torch.manual_seed(seed)
        expected = []
        for i, ((vae, xi, critic), xi_target, q_target, outcome) in enumerate(
            zip(agents_of(by_hand[0]), *by_hand[1:])
        ):
            batch = data.sample(5)
            own = 4 // agents
            batch = batch._replace(action=batch.action[:, own * i:own * i + own])
            loss, cloning, kl = mabcq.vae_loss(vae, batch)
            step_by_hand(loss, list(vae.parameters()), 0.01)
            value, y = mabcq.td_target(vae, xi_target, q_target, batch, args)
            loss, mean_value, u = mabcq.outcome_loss(outcome, batch, value, scale)
            step_by_hand(loss, list(outcome.parameters()), 0.01)
            weight = mabcq.transition_weights(value, mean_value, u, 4 - own, 40.0)
            assert weight.std() > 0.1
            q_loss, q_data = mabcq.critic_loss(critic, batch, y, weight)
            q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
            xi_loss, q_policy = mabcq.perturbation_loss(vae, xi, critic, batch.obs)
            step_by_hand(xi_loss, list(xi.parameters()), 0.01)
            for target, online in ((q_target, critic), (xi_target, xi)):
                for t, o in zip(target.parameters(), online.parameters()):
                    t.data = 0.7 * t.data + 0.3 * o.data
            assert_close(flat_grad(modules[0].critics[i]), q_grad, 1e-12)
            expected.append(
                [q_loss.detach(), q_data, q_policy, cloning, kl, weight.std(correction=0)]
            )
        for got, want in zip(modules, by_hand):
            assert_close(flat(got), flat(want), 1e-12)
        names = ("critic_loss", "q_data", "q_policy", "cloning_error", "kl", "weight_std")
        assert_close([metrics[name] for name in names], torch.tensor(expected).mean(0), 1e-10)


@pytest.mark.parametrize("reweight", [True, False])
def test_no_agent_sees_anothers_action(monkeypatch, reweight):
    """Other actions of agent 2 in the data: agent 1 learns the same to the last bit, agent 2
    something else."""
    parts = []
    for change in (0.0, 0.5):
        torch.manual_seed(0)
        data = tiny_data(action_dim=2)
        data.action[:, 1] += change
        torch.manual_seed(1)
        actor = silent_train(
            monkeypatch,
            mabcq,
            data,
            steps=5,
            batch_size=5,
            agents=2,
            reweight=reweight,
            num_samples=2,
        ).actor
        parts.append([torch.cat([flat(net) for net in nets]) for nets in agents_of(actor)])
    assert torch.equal(parts[0][0], parts[1][0]) and not torch.equal(parts[0][1], parts[1][1])


def test_agents_are_different_and_act_on_their_own_part():
    """Nothing is shared; the team's action is agent 1's best, then agent 2's, in the environment's
    units."""
    actor, obs = team(2, 4)[0], torch.randn(6, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, 0, -1, 2]), torch.arange(1.0, 5.0)
    before = actor.act(obs)
    for own, (vae, perturbation, critic), z in zip(
        (slice(2), slice(2, 4)), agents_of(actor), actor.latents
    ):
        # (N, A_i) each
        proposed = [mabcq.propose(vae, perturbation, o[None], z[None])[0] for o in obs]
        best = [a[critic(o.expand(100, 3), a)[0].argmax()] for o, a in zip(obs, proposed)]
        assert_close(
            before[:, own], actor.action_mid[own] + actor.action_half[own] * torch.stack(best)
        )
    assert (
        actor.latents.shape == (2, 100, 4)
        and not torch.equal(*actor.latents)
        and actor.latents.abs().max() == 0.5
    )
    for net in agents_of(actor)[0]:
        for parameter in net.parameters():
            parameter.data.normal_()
    after = actor.act(obs)
    assert torch.equal(after[:, 2:], before[:, 2:]) and not torch.equal(after[:, :2], before[:, :2])


def test_any_saved_team_loads(monkeypatch, tmp_path):
    """policy.pt says in `init` how many agents there are, and load_policy rebuilds as many."""
    monkeypatch.setattr(common, "export_policy", lambda *_: None)  # slow, and not what is tested
    obs, data = torch.randn(6, 3), tiny_data(action_dim=6)
    for agents in (1, 2, 3, 6):
        actor = team(agents, 6)[0]
        common.save_policy(tmp_path, "mabcq", "mabcq", actor, data)
        act = common.load_policy(tmp_path)
        assert len(act.__self__.vaes) == agents and torch.equal(actor.act(obs), act(obs))


def test_train_sets_up_each_agent(monkeypatch):
    """Targets start as copies, all move at each step; units and spread are the data's; without
    weights there are no models."""
    data, scales = tiny_data(action_dim=2), []
    outcome_loss = mabcq.outcome_loss
    monkeypatch.setattr(
        mabcq, "outcome_loss", lambda *args: scales.append(args[-1]) or outcome_loss(*args)
    )
    for reweight in (True, False):
        run = silent_train(
            monkeypatch, mabcq, data, steps=3, batch_size=4, agents=2, reweight=reweight
        )
        assert run.variant == ("" if reweight else "-independent")
        assert len(run.state["outcomes"]) == (2 if reweight else 0) and len(scales) == 6
        for name in (
            "actor",
            "perturbation_targets",
            "critic_targets",
            *(["outcomes"] if reweight else []),
        ):
            assert run.steps_that_moved(name) == [1, 2, 3]
        start, actor = run.history[0], run.actor
        sizes = [len(flat(nets)) for nets in (actor.vaes, actor.perturbations, actor.critics)]
        _, perturbations, critics = start["actor"].split(sizes)
        assert torch.equal(perturbations, start["perturbation_targets"]) and torch.equal(
            critics, start["critic_targets"]
        )
        assert all(
            net.bound == 0.05 for net in (*actor.perturbations, *run.state["perturbation_targets"])
        )
        (
            assert_close(actor.action_mid, data.action_mid),
            assert_close(actor.action_half, data.action_half),
        )
    assert_close(scales[0], (data.next_obs - data.obs).std(0, correction=0))


@pytest.mark.parametrize(
    "still, setting",
    [
        ("vaes", "vae_lr"),
        ("critics", "critic_lr"),
        ("perturbations", "actor_lr"),
        ("outcomes", "model_lr"),
    ],
)
def test_each_optimizer_has_its_own_network(monkeypatch, still, setting):
    """Without its learning rate a network stands still in every agent, and the others learn."""
    run = silent_train(
        monkeypatch, mabcq, tiny_data(), steps=2, batch_size=4, agents=2, **{setting: 0.0}
    )
    names, actor = ("vaes", "perturbations", "critics", "outcomes"), run.actor
    sizes = [
        len(flat(net))
        for nets in (actor.vaes, actor.perturbations, actor.critics, run.state["outcomes"])
        for net in nets
    ]
    before, after = (
        torch.cat([run.history[i]["actor"], run.history[i]["outcomes"]]).split(sizes)
        for i in (0, -1)
    )
    for name, old, new in zip(
        [name for name in names for _ in range(2)], before, after, strict=True
    ):
        assert torch.equal(old, new) == (name == still)


@pytest.mark.parametrize("args, message", [
    (dict(agents=3), "--agents 3: tiny has 2 action dimensions"), (dict(agents=0), "--agents 0"),
    (dict(weight_clip=0.5), "--weight-clip"), (dict(num_samples=0), "--num-samples"),
    (dict(max_perturbation=-1.0), "--max-perturbation")])
def test_bad_settings(monkeypatch, capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        silent_train(monkeypatch, mabcq, tiny_data(), **args)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_interrupted_team_resumes_bit_for_bit(monkeypatch, tmp_path):
    """A real Run with evaluations in Hopper, a joint per agent: models, targets and optimizers are
    in the checkpoint."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    batch = tiny_batch([float(i == 3) for i in range(12)], obs_dim=11, action_dim=3)
    data = common.Dataset(
        "tiny",
        batch._asdict() | {"truncated": ends_every_four(12)},
        spaces.Box(-1, 1, (3,)),
        gym.spec("Hopper-v5").to_json(),
        (0.0, 1.0),
    )
    monkeypatch.setattr(mabcq, "load_dataset", lambda *_, **__: copy.deepcopy(data))
    monkeypatch.setattr(mabcq, "ACT_SAMPLES", 2)
    monkeypatch.setattr(common, "export_policy", lambda *_: None)  # slow, and not what is tested
    args = Args(
        env="tiny",
        steps=6,
        eval_every=2,
        eval_episodes=1,
        final_episodes=1,
        batch_size=4,
        agents=3,
        out=str(tmp_path / "a"),
    )
    mabcq.train(args)
    step = common.Run.step

    def interrupted(run, number, *rest):
        step(run, number, *rest)
        if number == 3:
            run.close()  # as the end of a process would
            raise InterruptedError

    monkeypatch.setattr(common.Run, "step", interrupted)
    with pytest.raises(InterruptedError):
        mabcq.train(replace(args, out=str(tmp_path / "b")))
    monkeypatch.setattr(common.Run, "step", step)
    mabcq.train(replace(args, out=str(tmp_path / "b"), resume=True))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    one, two = (
        torch.load(next((tmp_path / letter).glob("*/tiny/seed0/checkpoint.pt")), weights_only=True)
        for letter in "ab"
    )
    for name in ("actor", "outcomes", "critic_targets", "perturbation_targets"):
        assert all(
            torch.equal(one["learned"][name][key], two["learned"][name][key])
            for key in one["learned"][name]
        )
    assert one["step"] == two["step"] == 6 and "outcome_optimizer1" in one["learned"]
    assert one["learned"]["outcome_optimizer1"]["state"][0]["exp_avg"].abs().max() > 0


# ---- what it is for


def play_differential_game(monkeypatch, seed, reweight):
    """The team earns up to 5 on a wide hill if both go to -0.8, 6 on a narrow one if both go to
    0.8; in the data each went to the wide one six times of ten. s' shows both actions; there the
    reward is paid, and the game is over."""
    for name in ("HIDDEN", "VAE_HIDDEN"):
        monkeypatch.setattr(mabcq, name, (32, 32))
    monkeypatch.setattr(mabcq, "ACT_SAMPLES", 20)
    # so that what four of ten did is among the proposals
    monkeypatch.setattr(mabcq, "LATENT_CLIP", 1.5)
    torch.manual_seed(seed)
    plays = 200
    data = tiny_data(2 * plays, action_dim=2)
    columns = data.obs, data.action, data.reward, data.next_obs, data.terminated
    # views
    first, second = (common.Batch(*(column[half::2] for column in columns)) for half in (0, 1))
    action = 0.8 * torch.where(torch.rand(plays, 2) < 0.6, -1, 1) + 0.05 * torch.randn(plays, 2)
    first.obs[:], first.action[:], first.reward[:], first.terminated[:] = 0, action, 0, 0
    first.next_obs[:] = second.obs[:] = torch.stack([*action.T, torch.ones(plays)], dim=1)
    wide, narrow = ((action - peak).pow(2).sum(1) for peak in (-0.8, 0.8))
    second.reward[:] = 5 * torch.exp(-wide / 0.5) + 6 * torch.exp(-narrow / 0.1)
    second.next_obs[:], second.terminated[:] = 0, 1
    data.action_mid, data.action_half = torch.zeros(2), torch.ones(2)
    rates = dict(target_rate=0.1, vae_lr=3e-3, actor_lr=3e-3, critic_lr=3e-3, model_lr=3e-3)
    actor = silent_train(
        monkeypatch,
        mabcq,
        data,
        steps=300,
        batch_size=64,
        agents=2,
        num_samples=5,
        reweight=reweight,
        **rates,
    ).actor
    return actor.act(torch.zeros(1, 3))[0].tolist()


def test_the_differential_game(monkeypatch):
    """C18 with continuous actions: independent BCQ agents take the wide hill that the data prefer,
    MABCQ's the higher one."""
    assert max(play_differential_game(monkeypatch, 0, False)) < -0.4
    assert min(play_differential_game(monkeypatch, 0, True)) > 0.4
