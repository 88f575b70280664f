"""DQN and Double DQN against slow loops, on a tabular problem whose answer value iteration knows,
on images, and online as results/behavior/train.py runs it."""
import copy
import importlib.util

import common

import dqn
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from dqn import Args, QNetwork
from helpers import (
    assert_close,
    assert_gradient,
    build_pixels,
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
    errors = [
        slow_mlp(q_net.net, batch.obs[b])[int(batch.action[b])] - float(y[b]) for b in range(len(y))
    ]
    return sum(map(slow_huber, errors)) / len(errors)


# ---- (E1), (E2) the target


@pytest.mark.parametrize("double", [False, True])
def test_td_target_equals_a_loop(double):
    """The value is the frozen network's; the action is that network's best, or with --double the
    learned one's."""
    batch, q_net, q_target = discrete_batch(), make(QNetwork, (3,), 3), make(QNetwork, (3,), 3)
    expected, others = [], 0
    for b in range(4):
        frozen = slow_mlp(q_target.net, batch.next_obs[b])
        learned = slow_mlp(q_net.net, batch.next_obs[b])
        chosen = (learned if double else frozen).index(max(learned if double else frozen))
        others += learned.index(max(learned)) != frozen.index(max(frozen))
        expected.append(
            float(batch.reward[b]) + 0.9 * (1 - float(batch.terminated[b])) * frozen[chosen]
        )
    assert others > 0, "the test's own premise: the networks prefer different actions"
    y = dqn.td_target(q_net, q_target, batch, Args(gamma=0.9, double=double))
    assert_close(y, expected)
    assert not y.requires_grad


def test_maximum_is_per_transition_and_only_termination_stops_the_bootstrap():
    """Q̄ = [1, 5], [7, 2], rewards 1: 1 + γ·5, and 1 where the second episode ended."""
    table = torch.tensor([[1.0, 5.0], [7.0, 2.0]])
    q = lambda obs: obs @ table
    batch = tiny_batch((0, 1))._replace(reward=torch.ones(2), next_obs=torch.eye(2))
    assert_close(dqn.td_target(q, q, batch, Args(gamma=0.5)), [3.5, 1.0])
    assert_close(
        dqn.td_target(q, q, batch._replace(terminated=torch.zeros(2)), Args(gamma=0.5)), [3.5, 4.5]
    )


def test_double_dqn_by_hand():
    """Q prefers the first action, Q̄ the second, whose value it overestimates: 1 + γ·1, in place of
    1 + γ·5."""
    batch = tiny_batch((0,))._replace(reward=torch.ones(1), next_obs=torch.ones(1, 1))
    learned = lambda obs: torch.tensor([[3.0, 2.0]])
    frozen = lambda obs: torch.tensor([[1.0, 5.0]])
    assert_close(dqn.td_target(learned, frozen, batch, Args(gamma=0.5, double=True)), [1.5])
    assert_close(dqn.td_target(learned, frozen, batch, Args(gamma=0.5)), [3.5])


def test_double_dqn_with_equal_networks_is_dqn():
    """Bit for bit; and it is never above DQN's target when they differ."""
    batch, q_net, q_target = discrete_batch(), make(QNetwork, (3,), 3), make(QNetwork, (3,), 3)
    equal = [
        dqn.td_target(q_net, copy.deepcopy(q_net), batch, Args(double=double))
        for double in (False, True)
    ]
    assert torch.equal(*equal)
    plain, double = (
        dqn.td_target(q_net, q_target, batch, Args(double=double)) for double in (False, True)
    )
    assert (double <= plain).all() and (double < plain).any()


# ---- (E3) the loss


def test_critic_loss_and_its_gradient_equal_a_loop():
    """Errors on both sides of the Huber loss's knee."""
    batch, q_net, y = discrete_batch(), make(QNetwork, (3,), 3), torch.tensor([0.3, -4.0, 5.0, 0.0])
    loss, q_data, q_policy = dqn.critic_loss(q_net, batch, y)
    values = [slow_mlp(q_net.net, batch.obs[b]) for b in range(4)]
    errors = [abs(v[int(a)] - float(t)) for v, a, t in zip(values, batch.action, y)]
    assert min(errors) < 1 < max(errors), "the test's own premise"
    assert_close(loss, slow_loss(q_net, batch, y))
    assert_close(q_data, np.mean([v[int(a)] for v, a in zip(values, batch.action)]))
    assert_close(q_policy, np.mean([max(v) for v in values]))
    loss.backward()
    assert_gradient(q_net.net[-1].bias, lambda: slow_loss(q_net, batch, y))


@pytest.mark.parametrize(
    "error, value, slope", [(0.5, 0.125, 0.5), (1.0, 0.5, 1.0), (-3.0, 2.5, -1.0)]
)
def test_huber_by_hand(error, value, slope):
    q = torch.tensor([[error, 100.0]], requires_grad=True)
    loss, _, _ = dqn.critic_loss(lambda obs: q, discrete_batch((0,)), torch.zeros(1))
    loss.backward()
    assert_close(loss, value)
    assert_close(q.grad, [[slope, 0.0]])  # of the action taken alone


def test_critic_loss_refuses_a_column_of_targets():
    with pytest.raises(AssertionError, match="broadcast"):
        dqn.critic_loss(make(QNetwork, (3,), 3), discrete_batch(), torch.zeros(4, 1))


# ---- the update


@pytest.mark.parametrize("double", [False, True])
def test_update_is_the_algorithm_box(double):
    """A step on the loss against the frozen network; then, in its turn, a hard copy of what was
    just learnt."""
    args, data = Args(batch_size=4, gamma=0.9, double=double), tiny_discrete_data()
    q_net, q_target = make(QNetwork, (3,), 3), make(QNetwork, (3,), 3)
    q, target = copy.deepcopy(q_net), copy.deepcopy(q_target)
    optimizer = torch.optim.SGD(q_net.parameters(), lr=0.01)
    for seed, copy_target in enumerate((False, True, False)):
        torch.manual_seed(seed)
        metrics = dqn.update(args, data, q_net, q_target, optimizer, copy_target=copy_target)

        torch.manual_seed(seed)
        batch = data.sample(4)
        loss, q_data, q_policy = dqn.critic_loss(q, batch, dqn.td_target(q, target, batch, args))
        grad = step_by_hand(loss, list(q.parameters()), 0.01)
        target = copy.deepcopy(q) if copy_target else target
        assert_close(flat(q_net), flat(q), 1e-12)
        assert_close(flat(q_target), flat(target), 1e-12)
        assert_close(flat_grad(q_net), grad, 1e-12)
        assert all(p.grad is None for p in q_target.parameters())
        for name, value in dict(critic_loss=loss, q_data=q_data, q_policy=q_policy).items():
            assert_close(metrics[name], value, 1e-12)


@pytest.mark.parametrize("double, variant", [(False, ""), (True, "-double")])
def test_the_variant_has_a_folder_of_its_own(monkeypatch, double, variant):
    assert (
        silent_train(
            monkeypatch, dqn, tiny_discrete_data(), steps=1, batch_size=4, double=double
        ).variant
        == variant
    )


def test_train_copies_the_target_on_time(monkeypatch):
    run = silent_train(
        monkeypatch, dqn, tiny_discrete_data(), steps=9, batch_size=4, target_every=3
    )
    assert run.steps_that_moved("q_net") == list(range(1, 10))
    assert run.steps_that_moved("q_target") == [3, 6, 9]
    assert torch.equal(run.history[0]["q_net"], run.history[0]["q_target"])
    for step in (3, 6, 9):
        assert torch.equal(run.history[step]["q_net"], run.history[step]["q_target"])


def test_it_finds_what_value_iteration_finds(monkeypatch):
    """A chain of five states seen in full: left leads home for 0.2, right leads four steps on to
    1."""
    gamma, num, actions = 0.8, 5, 2
    rows, Q = [], np.zeros((num, actions))
    for state in range(num):
        for action in range(actions):
            next_state = state + 1 if action else max(state - 1, 0)
            ended = next_state == num or (state == 0 and not action)
            rows.append(
                (
                    state,
                    action,
                    min(next_state, num - 1),
                    float(next_state == num) + 0.2 * (state == 0 and not action),
                    float(ended),
                )
            )
    for _ in range(200):
        for state, action, next_state, reward, ended in rows:
            Q[state, action] = reward + gamma * (1 - ended) * Q[next_state].max()
    assert set(Q.argmax(1)) == {1} and abs(Q[0, 1] - 0.8**4) < 1e-9, "the test's own premise"

    monkeypatch.setattr(dqn, "HIDDEN", ())  # on one-hot states a linear Q is a table
    data = tiny_discrete_data(len(rows), obs_dim=num, num_actions=actions)
    state, action, next_state, reward, ended = (torch.tensor(column) for column in zip(*rows))
    one_hot = torch.eye(num)
    data.obs = one_hot[state]
    data.action = action
    data.next_obs = one_hot[next_state]
    data.reward = reward
    data.terminated = ended
    run = silent_train(
        monkeypatch,
        dqn,
        data,
        steps=3000,
        batch_size=20,
        gamma=gamma,
        learning_rate=0.01,
        target_every=20,
    )
    learnt = run.actor(one_hot).detach()
    assert_close(learnt, Q, 0.01)
    assert run.actor.act(one_hot).tolist() == [1] * num
    batch, best = data.rows(torch.arange(len(rows))), lambda obs: obs @ torch.tensor(Q)
    # zero at Q*
    assert (
        dqn.critic_loss(best, batch, dqn.td_target(best, best, batch, Args(gamma=gamma)))[0] < 1e-20
    )


# ---- acting


def test_act_is_greedy_on_raw_observations():
    """In the environment's own numbers, which may start elsewhere than at 0."""
    q_net, obs = make(QNetwork, (3,), 3), torch.randn(6, 3)
    values = [slow_mlp(q_net.net, row) for row in obs]
    assert q_net.act(obs).tolist() == [v.index(max(v)) for v in values]
    q_net.first_action.fill_(5)
    assert q_net.act(obs).tolist() == [5 + v.index(max(v)) for v in values]


def test_train_passes_on_where_actions_start(monkeypatch):
    """The losses number actions from 0; the policy that is kept acts from 7 on."""
    data = tiny_discrete_data()
    data.first_action = 7
    actor = silent_train(monkeypatch, dqn, data, steps=1, batch_size=4).actor
    assert actor.first_action == 7 and actor.act(torch.randn(5, 3)).min() >= 7


# ---- images


def test_images_come_out_channels_first_and_scaled():
    """Of each layout, pixel by pixel; a square image's axes keep their order."""
    frames, image = dqn.Frames(), torch.randint(256, (2, 40, 50, 3), dtype=torch.uint8)
    for shape, recorded, at in (
        ((3, 40, 50), image.permute(0, 3, 1, 2), lambda b, c, y, x: image[b, y, x, c]),
        ((40, 50, 3), image, lambda b, c, y, x: image[b, y, x, c]),
        ((40, 50), image[..., 0], lambda b, c, y, x: image[b, y, x, 0]),
    ):
        out = frames(recorded)
        assert out.shape[1:] == dqn.channels_first(shape) and recorded.shape[1:] == shape
        for b, c, y, x in ((0, 0, 0, 0), (1, out.shape[1] - 1, 39, 49), (1, 0, 7, 30)):
            assert_close(out[b, c, y, x], int(at(b, c, y, x)) / 255)


@pytest.mark.parametrize("shape", [(84, 84), (4, 84, 84), (84, 84, 4), (210, 160, 3), (36, 36)])
def test_image_shapes_that_fit(shape):
    q_net = QNetwork(shape, 5)
    assert q_net(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 5)
    if max(shape) == 84:
        assert q_net.net[8].in_features == 3136, "the Nature network's"


@pytest.mark.parametrize(
    "shape", [(35, 84), (3, 35, 84), (84, 35, 3), (84, 4, 84), (40, 40, 40), (4, 84, 84, 3)]
)
def test_other_image_shapes_are_refused_in_one_line(shape, capsys):
    with pytest.raises(SystemExit) as stop:
        QNetwork(shape, 5)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and str(shape) in lines[0]


@pytest.mark.parametrize("shape", [(4, 84, 84), (44, 60, 3), (60, 44)])
def test_it_learns_from_images_in_each_layout(monkeypatch, tmp_path, shape):
    """A Minari set of bytes: read, learnt from, saved and solved, with rewards of 10 counted as 1,
    actions 3 and 4."""
    torch.set_default_dtype(torch.float32)
    name, _ = build_pixels(monkeypatch, tmp_path, shape)
    dqn.train(
        Args(
            env=name,
            steps=60,
            batch_size=16,
            learning_rate=1e-3,
            target_every=10,
            gamma=0.5,
            device="cpu",
            out=str(tmp_path / "runs"),
            eval_every=60,
            eval_episodes=1,
            final_episodes=4,
        )
    )
    folder = next((tmp_path / "runs" / "dqn").iterdir()) / "seed0"
    act = common.load_policy(folder)
    env_spec = gym.make("Pixels-v0", shape=list(shape)).spec.to_json()
    assert (common.evaluate(act, env_spec, 4, 7) == 50).all()
    data = common.load_dataset(name, "cpu", discrete=True, images=True)
    assert act.__self__(data.obs).max() < 4, "Q of rewards of 1, not of 10, is at most 2"
    program = torch.export.load(folder / "policy.pt2").module()
    assert torch.equal(program(data.obs[:7]), act(data.obs[:7]))


# ---- online: results/behavior/train.py


@pytest.fixture(scope="module")
def behavior():
    spec = importlib.util.spec_from_file_location(
        "behavior_train", ROOT / "results" / "behavior" / "train.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exploration_falls_along_a_line(behavior):
    for step, epsilon in ((0, 1.0), (100, 1.0), (600, 0.55), (1100, 0.1), (5000, 0.1)):
        assert_close(
            behavior.exploration(step, random_steps=100, epsilon_steps=1000, final_epsilon=0.1),
            epsilon,
        )


def live(behavior, env_id, steps, random_steps, best, monkeypatch, seed=0) -> common.Batch:
    """What the buffer holds after so many steps of a network that always prefers action `best`,
    with ε 0 in the end."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(behavior, "exploration", lambda step, random: float(step <= random))
    env = common.make_env(env_id)
    learner = behavior.DqnLearner(env, 128, random_steps)
    buffer = behavior.ReplayBuffer(steps, learner.obs_dim, learner.action_dim)
    for parameter in learner.q_net.parameters():
        parameter.data.zero_()
    learner.q_net.net[-1].bias.data[best] = 1.0
    environment = behavior.interact(env, learner, buffer, seed, 0)
    returns = [next(environment) for _ in range(steps)]
    assert buffer.size == steps
    seen = buffer.rows(torch.arange(steps))
    ends = torch.tensor([value is not None for value in returns])
    chained = (seen.obs[1:] == seen.next_obs[:-1]).all(1)
    assert torch.equal(~chained, ends[:-1]), "rows chain within an episode"
    first = ends.nonzero()[0].item()
    assert_close(returns[first], seen.reward[:first + 1].sum())
    return seen


def test_interact_stores_what_happened(behavior, monkeypatch):
    """Uniform first, greedy then; a fallen pole terminates."""
    seen = live(behavior, "CartPole-v1", 2000, 1000, 1, monkeypatch)
    assert abs(seen.action[:1000].double().mean() - 0.5) < 0.1
    assert (seen.action[1000:] == 1).all() and seen.action.dtype == torch.int64
    chained = (seen.obs[1:] == seen.next_obs[:-1]).all(1)
    assert torch.equal(chained, seen.terminated[:-1] == 0), "none of these episodes lasts 500 steps"
    # CartPole's definition
    fallen = (seen.next_obs[:, 2].abs() > 12 * np.pi / 180) | (seen.next_obs[:, 0].abs() > 2.4)
    assert torch.equal(fallen, seen.terminated.bool()) and fallen.any()


def test_a_time_limit_is_not_a_termination(behavior, monkeypatch):
    """Acrobot that never moves is stopped after 500 steps."""
    seen = live(behavior, "Acrobot-v1", 600, 0, 1, monkeypatch, seed=1)
    assert not seen.terminated.any()
    chained = (seen.obs[1:] == seen.next_obs[:-1]).all(1)
    assert (~chained).nonzero().flatten().tolist() == [499]


def test_online_dqn_trains_snapshots_and_resumes(behavior, tmp_path):
    """150 steps and 150 more are 300 but for the episode that the break cuts off; snapshots hold
    weights and ε."""
    torch.set_default_dtype(torch.float32)
    settings = dict(seed=0, batch_size=16, random_steps=100, snapshot_every=50, root=tmp_path)
    behavior.train("cartpole", steps=150, resume=False, **settings)
    path = tmp_path / "behavior" / "cartpole" / "seed0" / "checkpoint.pt"
    half = torch.load(path, weights_only=True)
    behavior.train("cartpole", steps=300, resume=True, **settings)
    saved = torch.load(path, weights_only=True)
    assert [one["step"] for one in saved["snapshots"]] == [50, 100, 150, 200, 250, 300]
    assert (
        torch.equal(saved["buffer"]["obs"][:150], half["buffer"]["obs"])
        and len(saved["buffer"]["obs"]) == 300
    )
    weights = [one["0.weight"] for one in saved["snapshots"]]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2]), (
        "no update in the random steps"
    )
    assert_close(saved["snapshots"][-1]["epsilon"], behavior.exploration(300, 100))


def test_a_stack_of_colour_images_is_refused_not_flattened(monkeypatch, tmp_path, capsys):
    """Four axes fit no network here; as a vector they would train, on 84,672 inputs."""
    np.savez(
        tmp_path / "stack.npz",
        observations=np.zeros((4, 2, 40, 40, 3), np.uint8),
        actions=np.zeros(4, np.int64),
        rewards=np.zeros(4),
        terminals=np.arange(4) % 2,
    )
    with pytest.raises(SystemExit):
        dqn.train(Args(env=str(tmp_path / "stack.npz"), device="cpu", steps=1, out=str(tmp_path)))
    assert "images of shape (2, 40, 40, 3) do not fit" in capsys.readouterr().err.splitlines()[-1]
