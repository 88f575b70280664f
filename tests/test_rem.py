"""REM and Ensemble-DQN against slow loops, against DQN, and on frames."""
import copy
import math

import common

import dqn
import gymnasium as gym
import numpy as np
import pytest
import rem
import torch
from helpers import (
    assert_close,
    assert_gradient,
    build_pixels,
    flat,
    flat_grad,
    make,
    record_draws,
    silent_train,
    slow_mlp,
    step_by_hand,
    tiny_batch,
    tiny_discrete_data,
)
from rem import Args, QNetwork

K, A = 4, 3


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    for module in (dqn, rem):
        monkeypatch.setattr(module, "HIDDEN", (7, 6))


def discrete_batch(actions=(2, 0, 1, 1)):
    return tiny_batch()._replace(action=torch.tensor(actions))


def heads(q_net, obs) -> list:
    """Q of head k and action a at one observation, [k][a]."""
    out = slow_mlp(q_net.net, obs)
    return [out[k * A:(k + 1) * A] for k in range(K)]


def slow_huber(x: float) -> float:
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def slow_mix(row, values) -> list:
    return [sum(float(w) * head[a] for w, head in zip(row, values)) for a in range(A)]


def slow_targets(q_target, weights, batch, gamma) -> list:
    return [
        [
            float(batch.reward[b])
            + gamma
            * (1 - float(batch.terminated[b]))
            * max(slow_mix(row, heads(q_target, batch.next_obs[b])))
            for b in range(4)
        ]
        for row in weights
    ]


def slow_loss(q_net, weights, batch, y) -> float:
    errors = [slow_mix(row, heads(q_net, batch.obs[b]))[int(batch.action[b])] - float(y[c][b])
              for c, row in enumerate(weights) for b in range(4)]
    return sum(map(slow_huber, errors)) / len(errors)


def some_weights(ensemble) -> torch.Tensor:
    return rem.head_weights(K, ensemble, torch.device("cpu"))


# ---- (E1) the combinations


def test_a_draw_of_zero_is_no_nan(monkeypatch):
    """torch.rand includes 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.zeros(size))
    assert rem.head_weights(1, False, torch.device("cpu")).isfinite().all()


def test_head_weights_equal_a_loop(monkeypatch):
    draws = record_draws(monkeypatch, "rand")
    weights = some_weights(False)
    assert_close(weights, [[float(u) / sum(map(float, draws[0][0])) for u in draws[0][0]]])
    assert not torch.equal(weights, some_weights(False)), "anew at each call"
    assert_close(some_weights(True), np.eye(K))


def test_weights_are_normalised_uniform_not_dirichlet():
    """Of two heads the variance is 3/4 − log 2 = 0.0569; Dirichlet(1) would have 1/12 = 0.0833."""
    first = torch.cat([rem.head_weights(2, False, torch.device("cpu")) for _ in range(20_000)])[
        :, 0
    ]
    assert_close(first.var(), 0.75 - math.log(2), 0.002)
    assert_close(first.mean(), 0.5, 0.005)
    assert first.min() >= 0 and first.max() <= 1


# ---- (E2), (E3), (E4)


def test_heads_share_a_body_and_keep_their_order():
    q_net, obs = make(lambda *dims: QNetwork(*dims, num_heads=K), (3,), A), torch.randn(4, 3)
    assert_close(q_net(obs), np.transpose([heads(q_net, row) for row in obs], (1, 0, 2)))


@pytest.mark.parametrize("ensemble", [False, True])
def test_target_and_loss_and_gradient_equal_a_loop(ensemble):
    q_net, q_target = (make(lambda *dims: QNetwork(*dims, num_heads=K), (3,), A) for _ in range(2))
    batch, weights = discrete_batch(), some_weights(ensemble)
    y = rem.td_target(q_target, weights, batch, 0.9)
    assert y.shape == (K if ensemble else 1, 4) and not y.requires_grad
    assert_close(y, slow_targets(q_target, weights, batch, 0.9))
    y = y + torch.tensor([0.3, -4.0, 5.0, 0.0])  # errors on both sides of the knee
    loss, metrics = rem.critic_loss(q_net, weights, batch, y)
    assert_close(loss, slow_loss(q_net, weights, batch, y))
    values = np.array([heads(q_net, row) for row in batch.obs])  # (B, K, A)
    assert_close(metrics["q_policy"], values.mean(1).max(1).mean())
    assert_close(metrics["head_std"], values.std(1).mean())
    mixed = [[slow_mix(row, values[b])[int(batch.action[b])] for b in range(4)] for row in weights]
    assert_close(metrics["q_data"], np.mean(mixed))
    loss.backward()
    assert_gradient(q_net.net[-1].bias, lambda: slow_loss(q_net, weights, batch, y))


def test_rem_mixes_before_the_maximum_and_ensemble_dqn_after():
    """Q̄_1 = [1, 0], Q̄_2 = [0, 1], α = (½, ½): the mixture's best is ½, the mean of the heads'
    bests is 1."""
    q_target = lambda obs: torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    batch = tiny_batch((0,))._replace(reward=torch.zeros(1))
    assert_close(rem.td_target(q_target, torch.tensor([[0.5, 0.5]]), batch, 1.0), [[0.5]])
    assert_close(rem.td_target(q_target, torch.eye(2), batch, 1.0).mean(0), [1.0])


def test_equal_heads_lose_what_dqn_loses_and_share_its_gradient():
    """dL/dQ_k = α_k dL/dQ of DQN."""
    batch, weights, y = discrete_batch(), some_weights(False), torch.tensor([0.3, -4.0, 5.0, 0.0])
    q = torch.randn(4, A, requires_grad=True)
    several = q.detach().expand(K, -1, -1).clone().requires_grad_()
    expected, _, _ = dqn.critic_loss(lambda obs: q, batch, y)
    loss, _ = rem.critic_loss(lambda obs: several, weights, batch, y[None])
    assert_close(loss, expected)
    expected.backward()
    loss.backward()
    assert_close(several.grad, weights[0][:, None, None] * q.grad)


def test_fixed_equal_weights_are_dqn_of_the_mean_head_and_random_ones_are_not():
    """With α_k = 1/K each time the mixture is the mean of the heads, and REM is DQN of it."""
    q_net, q_target = (make(lambda *dims: QNetwork(*dims, num_heads=K), (3,), A) for _ in range(2))
    mean, mean_target = (lambda obs, net=net: net(obs).mean(dim=0) for net in (q_net, q_target))
    batch, equal, random = discrete_batch(), torch.full((1, K), 1 / K), some_weights(False)
    expected = dqn.critic_loss(
        mean, batch, dqn.td_target(mean, mean_target, batch, dqn.Args(gamma=0.9))
    )[0]
    loss = rem.critic_loss(q_net, equal, batch, rem.td_target(q_target, equal, batch, 0.9))[0]
    other = rem.critic_loss(q_net, random, batch, rem.td_target(q_target, random, batch, 0.9))[0]
    assert_close(loss, expected)
    assert abs(other - expected) > 1e-4


@pytest.mark.parametrize("ensemble", [False, True])
def test_one_head_is_dqn(ensemble):
    """Same seed, same batch: the same loss, and the same network after two updates, of which one
    copies the target."""
    data, results = tiny_discrete_data(), []
    for module, settings in ((dqn, {}), (rem, dict(num_heads=1, ensemble=ensemble))):
        torch.manual_seed(1)
        q_net = module.QNetwork((3,), A, *([1] if module is rem else []))
        q_target, optimizer = copy.deepcopy(q_net), torch.optim.Adam(q_net.parameters(), lr=0.1)
        for seed in range(3):
            torch.manual_seed(seed)
            metrics = module.update(
                module.Args(batch_size=4, **settings),
                data,
                q_net,
                q_target,
                optimizer,
                copy_target=seed == 1,
            )
        results.append(
            (
                metrics["critic_loss"],
                metrics["q_data"],
                metrics["q_policy"],
                flat(q_net),
                flat(q_target),
            )
        )
    for got, want in zip(*results):
        assert_close(got, want, 1e-12)


def test_no_loss_where_every_head_is_right():
    """Two states, both actions: Q* by hand; any combination of equal right heads is right."""
    gamma = 0.5
    # in state 0: 1 + γ·1 by way of state 1, or 1 and the end; in state 1: 1 or 0
    Q = torch.tensor([[1.5, 1.0], [1.0, 0.0]])
    batch = tiny_batch((0, 1, 1, 1))._replace(
        obs=torch.eye(2)[[0, 0, 1, 1]],
        action=torch.tensor([0, 1, 0, 1]),
        reward=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        next_obs=torch.eye(2)[[1, 0, 0, 0]],
    )
    q_net = lambda obs: (obs @ Q).expand(K, -1, -1)
    for ensemble in (False, True):
        weights = some_weights(ensemble)
        loss, _ = rem.critic_loss(
            q_net, weights, batch, rem.td_target(q_net, weights, batch, gamma)
        )
        assert loss < 1e-20


def test_critic_loss_refuses_other_shapes():
    q_net = QNetwork((3,), A, K)
    with pytest.raises(AssertionError, match="broadcast"):
        rem.critic_loss(q_net, some_weights(True), discrete_batch(), torch.zeros(1, 4))


# ---- the update


@pytest.mark.parametrize("ensemble", [False, True])
def test_update_is_the_algorithm_box(ensemble):
    """One draw of M for both networks; a step; in its turn a hard copy of what was just learnt."""
    args, data = Args(batch_size=4, gamma=0.9, num_heads=K, ensemble=ensemble), tiny_discrete_data()
    q_net, q_target = (make(lambda *dims: QNetwork(*dims, num_heads=K), (3,), A) for _ in range(2))
    q, target = copy.deepcopy(q_net), copy.deepcopy(q_target)
    optimizer = torch.optim.SGD(q_net.parameters(), lr=0.01)
    for seed, copy_target in enumerate((False, True, False)):
        torch.manual_seed(seed)
        metrics = rem.update(args, data, q_net, q_target, optimizer, copy_target=copy_target)

        torch.manual_seed(seed)
        batch, weights = data.sample(4), some_weights(ensemble)
        loss, _ = rem.critic_loss(q, weights, batch, rem.td_target(target, weights, batch, 0.9))
        grad = step_by_hand(loss, list(q.parameters()), 0.01)
        target = copy.deepcopy(q) if copy_target else target
        assert_close(flat(q_net), flat(q), 1e-12)
        assert_close(flat(q_target), flat(target), 1e-12)
        assert_close(flat_grad(q_net), grad, 1e-12)
        assert_close(metrics["critic_loss"], loss, 1e-12)
        assert all(p.grad is None for p in q_target.parameters())


def test_train_copies_the_target_on_time(monkeypatch):
    run = silent_train(
        monkeypatch, rem, tiny_discrete_data(), steps=9, batch_size=4, target_every=3, num_heads=K
    )
    assert run.steps_that_moved("q_net") == list(range(1, 10))
    assert run.steps_that_moved("q_target") == [3, 6, 9]
    assert torch.equal(run.history[0]["q_net"], run.history[0]["q_target"])


def test_act_takes_what_the_mean_of_the_heads_finds_best():
    q_net, obs = make(lambda *dims: QNetwork(*dims, num_heads=K), (3,), A), 5 * torch.randn(20, 3)
    values = np.array([heads(q_net, row) for row in obs])  # (B, K, A)
    best = values.mean(axis=1).argmax(axis=1)
    assert q_net.act(obs).tolist() == best.tolist()
    assert all((values[:, k].argmax(axis=1) != best).any() for k in range(K)), (
        "no head alone says the same"
    )


# ---- images


@pytest.mark.parametrize("shape", [(4, 84, 84), (44, 60, 3)])
def test_frames_get_the_nature_network_and_clipped_rewards(monkeypatch, tmp_path, shape):
    """A Minari set of uint8 images: read, learnt from, saved and solved, with rewards of 10 counted
    as 1."""
    torch.set_default_dtype(torch.float32)
    name, episodes = build_pixels(monkeypatch, tmp_path, shape)
    args = Args(
        env=name,
        steps=40,
        batch_size=16,
        learning_rate=1e-3,
        target_every=10,
        num_heads=5,
        gamma=0.5,
        device="cpu",
        out=str(tmp_path / "runs"),
        eval_every=40,
        eval_episodes=1,
        final_episodes=4,
    )
    rem.train(args)
    act = common.load_policy(next((tmp_path / "runs" / "rem").iterdir()) / "seed0")
    q_net, env_spec = act.__self__, gym.make("Pixels-v0", shape=list(shape)).spec.to_json()
    assert (common.evaluate(act, env_spec, 4, 7) == 50).all()
    batch = torch.as_tensor(np.array(episodes[0].observations[:5]))
    frames = (batch if shape[0] == 4 else batch.permute(0, 3, 1, 2)).float() / 255
    assert_close(q_net(batch).transpose(0, 1).flatten(1), q_net.net[1:](frames), 1e-6)
    assert q_net(batch).max() < 4, "Q of rewards of 1, not of 10, is at most 2"
    if shape[0] == 4:
        assert sum(p.numel() for p in q_net.net[:8].parameters()) == 77_984, (
            "the Nature network's convolutions"
        )
