"""The learned model that mopo.py and combo.py share: its loss, its bounds, its holdout, and when
bodies fall.

Also what all three model-based files share: the pool, the order of training, the data that they
refuse. """
import ast
import copy
import math
from types import SimpleNamespace

import common
from common import Batch

import combo
import gymnasium as gym
import mopo
import morel
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import SilentRun, assert_close, flat, make, silent_train, slow_dense, tiny_data
from mopo import Args, Dynamics
from test_form import source

ALL = (mopo, combo, morel)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Narrow hidden layers, in float64."""
    for module in ALL:
        monkeypatch.setattr(module, "DYNAMICS_HIDDEN", (5, 4))
        monkeypatch.setattr(module, "HIDDEN", (7, 6))


def slow_dynamics(dynamics, m, x):
    """Mean and log variance of network m at one raw x, one number at a time."""
    x = [
        (v - mean) / std
        for v, mean, std in zip(x, dynamics.x_mean.tolist(), dynamics.x_std.tolist(), strict=True)
    ]
    for i, layer in enumerate(dynamics.layers):
        x = [v / (1 + math.exp(-v)) for v in x] if i else x
        x = slow_dense(x, layer.weight[m].T.tolist(), layer.bias[m, 0].tolist())
    (low, high), n = dynamics.bounds.tolist(), len(x) // 2
    log_var = [u - math.log1p(math.exp(u - v)) for v, u in zip(x[n:], high, strict=True)]
    return x[:n], [v + math.log1p(math.exp(u - v)) for v, u in zip(log_var, low, strict=True)]


def some_dynamics(module=mopo):
    """With weights, biases, bounds and units that all matter."""
    dynamics = make(module.Dynamics, 3, 2)
    for layer in dynamics.layers:
        layer.bias.data.normal_()
    dynamics.bounds.data = torch.stack([torch.linspace(-2, -1, 4), torch.linspace(0.5, 1, 4)])
    dynamics.x_mean.copy_(torch.randn(5))
    dynamics.x_std.copy_(torch.rand(5) + 0.5)
    return dynamics


def constant_dynamics(mean, log_var):
    """Says the same of every x: all weights are zero, and the bounds far away."""
    dynamics = Dynamics(1, 1)
    for layer in dynamics.layers:
        layer.weight.data.zero_()
    dynamics.layers[-1].bias.data[:, 0] = torch.tensor([mean, mean, log_var, log_var])
    dynamics.bounds.data = torch.tensor([[-100.0], [100.0]]).repeat(1, 2)
    return dynamics


def no_run(tmp_path, **what):
    return SimpleNamespace(
        **dict(folder=tmp_path / "seed0", dataset={"fingerprint": "f"}, stop=False, since=0.0)
        | what
    )


def plain_data(obs, action, next_obs, reward, env_id="Pendulum-v1"):
    """A dataset of these columns, without terminations."""
    data = tiny_data(len(obs), action_dim=action.shape[1])
    data.obs, data.action, data.reward, data.next_obs = obs, action, reward, next_obs
    data.terminated.zero_()
    data.obs_shape, data.obs_dim = obs.shape[1:], obs.shape[1]
    data.env_spec = gym.spec(env_id).to_json()
    data.recorded_env = env_id
    return data


def as_rows(batch):
    """obs, action, next_obs, reward, terminated side by side, (B, 2S + A + 2)."""
    return torch.cat(
        [batch.obs, batch.action, batch.next_obs, batch.reward[:, None], batch.terminated[:, None]],
        dim=1,
    )


def filled_pool(module, data):
    """A pool that holds the rows of a dataset."""
    pool = module.Pool(data.size, data)
    pool.add(data.rows(torch.arange(data.size)))
    return pool


# ---- copies


def definitions(name):
    tree = ast.parse((ROOT / "algorithms" / f"{name}.py").read_text())
    found = {node.name: source(node) for node in tree.body if hasattr(node, "name")}
    return found | {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }


def test_the_shared_parts_are_word_for_word_the_same():
    """The model in mopo and combo; the rules in all three; what they take from sac and cql."""
    ours = {name: definitions(name) for name in ("mopo", "combo", "morel", "sac", "cql")}
    model = (
        "Dynamics",
        "dynamics_loss",
        "fit",
        "EnsembleLinear",
        "WEIGHT_DECAY",
        "FALLS",
        "(MAX_HOLDOUT, PATIENCE)",
        "(DYNAMICS_LR, DYNAMICS_BATCH)",
        "(NETWORKS, ELITES)",
        "DYNAMICS_HIDDEN",
    )
    agent = (
        "mlp",
        "Critic",
        "sample_action",
        "actor_loss",
        "entropy_coef_loss",
        "descend",
        "polyak_update",
    )
    for name in model:
        assert ours["mopo"][name] == ours["combo"][name], name
    for name in (
        "FALLS",
        "hopper_falls",
        "walker2d_falls",
        "never_falls",
        "Actor",
        "Pool",
        "join",
        "model_rows",
    ):
        assert ours["mopo"][name] == ours["morel"][name] == ours["combo"][name], name
    for file in ("mopo", "combo", "morel"):
        assert all(ours[file][name] == ours["sac"][name] for name in agent), file
    for file in ("mopo", "morel"):
        assert all(
            ours[file][name] == ours["sac"][name]
            for name in ("critic_loss", "soft_td_target", "HIDDEN")
        ), file
    assert ours["combo"]["HIDDEN"] == ours["cql"]["HIDDEN"]


# ---- (E1), (E2)


def test_forward_equals_a_loop():
    """(E1): standardised x, swish between layers, mean and bounded log variance; for rows of each
    network's own, or common."""
    dynamics, x = some_dynamics(), torch.randn(7, 3, 5)
    expected = [[slow_dynamics(dynamics, m, x[m, b].tolist()) for b in range(3)] for m in range(7)]
    assert_close(torch.stack(dynamics(x), dim=2), expected)
    assert_close(torch.stack(dynamics(x[0]), dim=2)[0], expected[0])
    assert_close(
        torch.stack(dynamics(x[0]), dim=2)[1],
        [slow_dynamics(dynamics, 1, x[0, b].tolist()) for b in range(3)],
    )


def test_dynamics_loss_equals_a_loop():
    """(E2): sum over networks of the mean of squares over variances plus log variances; decay per
    layer, of weights; bounds."""
    dynamics, x, y = some_dynamics(), torch.randn(7, 3, 5), torch.randn(7, 3, 4)
    expected = 0.01 * sum(high - low for low, high in zip(*dynamics.bounds.tolist()))
    for m in range(7):
        for b in range(3):
            mean, log_var = slow_dynamics(dynamics, m, x[m, b].tolist())
            expected += (
                sum(
                    (float(y[m, b, i]) - mean[i]) ** 2 / math.exp(log_var[i]) + log_var[i]
                    for i in range(4)
                )
                / 12
            )
    for c, layer in zip((2.5e-5, 5e-5, 7.5e-5), dynamics.layers):
        expected += c * sum(w**2 for w in layer.weight.flatten().tolist()) / 2
    assert_close(mopo.dynamics_loss(dynamics, x, y), expected, 1e-10)


def test_dynamics_loss_refuses_common_targets():
    with pytest.raises(AssertionError):
        mopo.dynamics_loss(some_dynamics(), torch.randn(7, 3, 5), torch.randn(3, 4))


def test_likelihood_in_closed_form():
    """Variance 1: 0 where the mean is right, 1 per network where it is off by 1. Residuals of
    variance v: least at log v."""
    x, bounds = torch.randn(7, 2, 2), 0.01 * 2 * 200
    for error, expected in ((0.0, 0.0), (1.0, 7.0)):
        assert_close(
            mopo.dynamics_loss(constant_dynamics(0.5, 0.0), x, torch.full((7, 2, 2), 0.5 + error)),
            expected + bounds,
        )
    v, values = 0.3, {}
    y = 0.5 + torch.tensor([1.0, -1.0])[None, :, None].expand(7, 2, 2) * math.sqrt(v)
    for log_var in (math.log(v) - 0.01, math.log(v), math.log(v) + 0.01):
        values[log_var] = mopo.dynamics_loss(constant_dynamics(0.5, log_var), x, y).item()
    assert min(values, key=values.get) == math.log(v)
    assert_close(values[math.log(v)], 7 * (1 + math.log(v)) + bounds)


@pytest.mark.parametrize(
    "raw, expected, tol", [(1e4, 0.5 + 2.8e-5, 1e-6), (-1e4, -10.0, 1e-8), (-4.0, -4.0086, 1e-3)]
)
def test_soft_bounds(raw, expected, tol):
    """Between −10 and 0.5, up to a hair; between them nearly as it was."""
    dynamics = constant_dynamics(0.0, raw)
    dynamics.bounds.data = torch.tensor([[-10.0], [0.5]]).repeat(1, 2)
    assert_close(dynamics(torch.randn(1, 2))[1][0, 0, 0], expected, tol)


def test_soft_bounds_have_a_gradient_everywhere():
    """The log variance rises with the network's output on both sides of both bounds; the loss draws
    the bounds together."""
    slopes = []
    for raw in torch.linspace(-25, 15, 41).tolist():
        dynamics = constant_dynamics(0.0, raw)
        dynamics.bounds.data = torch.tensor([[-10.0], [0.5]]).repeat(1, 2)
        dynamics(torch.randn(1, 2))[1][0, 0, 0].backward()
        slopes.append(dynamics.layers[-1].bias.grad[0, 0, 2].item())
    assert min(slopes) > 0 and max(slopes) > 0.9
    dynamics = constant_dynamics(0.0, 0.0)
    mopo.dynamics_loss(dynamics, torch.randn(7, 2, 2), torch.ones(7, 2, 2)).backward()
    assert_close(dynamics.bounds.grad, [[-0.01] * 2, [0.01] * 2])


def test_initial_weights_are_a_truncated_normal(monkeypatch):
    """Within ±1/√inputs, two standard deviations of ½/√inputs; biases 0."""
    monkeypatch.setattr(mopo, "DYNAMICS_HIDDEN", (200, 200))
    for layer in Dynamics(3, 2).layers:
        scaled = layer.weight * math.sqrt(layer.weight.shape[1])
        assert 0.9 < scaled.abs().max() <= 1 and not layer.bias.any()
        assert_close(scaled.std(), 0.5 * 0.8796, 3e-2)  # of a normal cut at ±2


def test_networks_are_independent():
    """Another weight in network 3 changes network 3; what network 3 sees moves no other's
    weights."""
    dynamics, x, y = some_dynamics(), torch.randn(7, 3, 5), torch.randn(7, 3, 4)
    before = dynamics(x)[0].detach()
    dynamics.layers[0].weight.data[3] += 1
    assert [m for m in range(7) if not torch.equal(before[m], dynamics(x)[0][m])] == [3]
    grads = []
    for shift in (0.0, 1.0):
        x[3] += shift
        grads.append(
            torch.autograd.grad(mopo.dynamics_loss(dynamics, x, y), dynamics.layers[0].weight)[0]
        )
    assert [m for m in range(7) if not torch.equal(grads[0][m], grads[1][m])] == [3]


# ---- fit


def recorded_fit(monkeypatch, tmp_path, data, epochs, batch=8):
    """Fits, and returns the model and the x of every step."""
    monkeypatch.setattr(mopo, "DYNAMICS_BATCH", batch)
    seen, loss = [], mopo.dynamics_loss
    monkeypatch.setattr(
        mopo,
        "dynamics_loss",
        lambda dynamics, x, y: seen.append(torch.cat([x, y], 2)) or loss(dynamics, x, y),
    )
    dynamics = Dynamics(data.obs_dim, data.action_dim)
    mopo.fit(dynamics, data, Args(dynamics_epochs=epochs), no_run(tmp_path))
    monkeypatch.setattr(mopo, "dynamics_loss", loss)
    return dynamics, seen


def test_fit_bootstraps_once_and_holds_rows_back(monkeypatch, tmp_path):
    """Each network sees its own draw with replacement, in each epoch in another order; none sees
    the holdout."""
    data = plain_data(
        torch.arange(50.0)[:, None],
        torch.zeros(50, 1),
        torch.arange(50.0)[:, None] * 3,
        -torch.arange(50.0),
    )
    dynamics, seen = recorded_fit(monkeypatch, tmp_path, data, 2)
    assert [batch.shape[1] for batch in seen] == [8] * 5 + [8] * 5, "40 rows, in batches of 8"
    first, second = (torch.cat(seen[i:i + 5], 1) for i in (0, 5))
    # y = [s′ − s | r]
    assert_close(first[..., 2], first[..., 0] * 2), assert_close(first[..., 3], -first[..., 0])
    rows = first[..., 0]
    assert torch.equal(rows.sort(1).values, second[..., 0].sort(1).values) and not torch.equal(
        rows, second[..., 0]
    )
    assert all(not torch.equal(rows[0].sort().values, rows[m].sort().values) for m in range(1, 7))
    assert all(20 < len(row.unique()) < 34 for row in rows), "with replacement, 63% of the rows"
    assert 39 <= len(rows.unique()) <= 40
    trained_on = torch.tensor([i for i in range(50) if i in set(rows.flatten().tolist())]).double()
    assert_close(
        [dynamics.x_mean[0], dynamics.x_std[0]], [trained_on.mean(), trained_on.std(correction=0)]
    )
    assert [dynamics.x_mean[1].item(), dynamics.x_std[1].item()] == [0.0, 1.0], (
        "what never changes is not divided by 0"
    )


def test_holdout_is_a_fifth_and_at_most_its_cap(monkeypatch, tmp_path):
    monkeypatch.setattr(mopo, "MAX_HOLDOUT", 4)
    data = plain_data(torch.randn(50, 1), torch.zeros(50, 1), torch.randn(50, 1), torch.randn(50))
    _, seen = recorded_fit(monkeypatch, tmp_path, data, 1)
    assert sum(batch.shape[1] for batch in seen) == 46


def test_the_jump_into_another_episode_is_not_fitted(monkeypatch, tmp_path):
    """Terminated, yet standing: such a next state is another episode's. Terminated and fallen is
    what a model must know."""
    obs = torch.cat([torch.ones(30, 1), torch.zeros(30, 2)], 1)
    obs[:, 2] = torch.arange(30)
    next_obs = obs.clone()
    next_obs[4, 0] = 0.5  # fell
    data = plain_data(obs, torch.zeros(30, 1), next_obs, torch.zeros(30), "Hopper-v5")
    data.terminated[[4, 9]] = 1
    monkeypatch.setattr(mopo, "MAX_HOLDOUT", 1)
    _, seen = recorded_fit(monkeypatch, tmp_path, data, 1)
    rows = set(torch.cat(seen, 1)[..., 2].flatten().tolist())
    assert 9 not in rows and len(rows) >= 27 and sum(batch.shape[1] for batch in seen) == 28


def scripted_fit(monkeypatch, tmp_path, script, epochs=100):
    """Fit, where after epoch e the holdout error of network m is script[e][m]: the last bias is its
    root, and y is 0."""
    data = plain_data(torch.zeros(10, 1), torch.zeros(10, 1), torch.zeros(10, 1), torch.zeros(10))
    calls = []

    def descend(loss, optimizer):
        values = torch.tensor(script[len(calls)])
        dynamics.layers[-1].bias.data[:, 0, :2] = values.sqrt()[:, None]
        calls.append(values)

    monkeypatch.setattr(mopo, "descend", descend)
    dynamics = constant_dynamics(0.0, 0.0)
    mopo.fit(dynamics, data, Args(dynamics_epochs=epochs), no_run(tmp_path))
    return len(calls), (dynamics.layers[-1].bias[:, 0, 0] ** 2), dynamics.elites.tolist()


def test_early_stop(monkeypatch, tmp_path):
    """1.0, .995, .98, .979, .978, ...: kept after the first and the third epoch only, over six more
    at the end."""
    script = [
        [error] * 7 for error in (1.0, 0.995, 0.98, 0.979, 0.978, 0.977, 0.976, 0.975, 0.974, 0.1)
    ]
    epochs, kept, _ = scripted_fit(monkeypatch, tmp_path, script)
    assert epochs == 9
    assert_close(kept, [0.98] * 7)


def test_each_network_keeps_its_own_best_and_the_best_five_are_the_elites(monkeypatch, tmp_path):
    """One network that still improves keeps all going; networks are ranked by what they kept, not
    by how they ended."""
    worse = [[9.0 + m for m in range(7)]]
    script = [[0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [0.7, 0.6, 0.05, 0.4, 0.3, 0.2, 9.0]] + worse * 4
    script += [[9.0] * 6 + [0.01]] + worse * 9
    epochs, kept, elites = scripted_fit(monkeypatch, tmp_path, script)
    assert epochs == 7 + 6
    assert_close(kept, [0.7, 0.6, 0.05, 0.4, 0.3, 0.2, 0.01])
    assert elites == [6, 2, 5, 4, 3]


def test_the_cap_on_epochs(monkeypatch, tmp_path):
    epochs, kept, _ = scripted_fit(
        monkeypatch, tmp_path, [[0.5**e] * 7 for e in range(9)], epochs=3
    )
    assert epochs == 3
    assert_close(kept, [0.25] * 7)


def test_a_model_that_is_not_finite_stops_the_run(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        scripted_fit(monkeypatch, tmp_path, [[0.5] * 7, [0.4] * 6 + [math.nan]])
    assert "holdout error" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_second_start_does_not_fit_again(monkeypatch, tmp_path):
    """The file beside the run's folder is for this seed, this data and these epochs, and holds all
    that the model is."""
    data = plain_data(*(torch.randn(50, 1) for _ in range(3)), torch.randn(50))
    torch_seed = torch.get_rng_state()
    first, again, other = Dynamics(1, 1), Dynamics(1, 1), Dynamics(1, 1)
    torch.set_rng_state(torch_seed)
    mopo.fit(first, data, Args(dynamics_epochs=3), no_run(tmp_path))
    assert torch.equal(torch.get_rng_state(), torch_seed), (
        "whether fitted or read, the run's draws are the same"
    )
    counted = []
    monkeypatch.setattr(mopo, "descend", lambda *_: counted.append(1))
    mopo.fit(again, data, Args(dynamics_epochs=3), no_run(tmp_path))
    assert not counted and all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values())
    )
    for epochs, run in ((3, no_run(tmp_path, folder=tmp_path / "seed1")), (2, no_run(tmp_path)),
                        (3, no_run(tmp_path, dataset={"fingerprint": "g"}))):
        before = len(counted)
        mopo.fit(other, data, Args(dynamics_epochs=epochs), run)
        assert len(counted) > before


def test_the_same_seed_fits_the_same_model(tmp_path):
    data = plain_data(*(torch.randn(50, 1) for _ in range(3)), torch.randn(50))
    start = Dynamics(1, 1)
    models = [copy.deepcopy(start) for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (5, 5, 6))):
        torch.randn(i)
        mopo.fit(model, data, Args(dynamics_epochs=2, seed=seed), no_run(tmp_path / str(i)))
    assert torch.equal(flat(models[0]), flat(models[1])) and not torch.equal(
        flat(models[0]), flat(models[2])
    )


def test_a_model_that_does_not_fit_is_named_and_one_that_does_is_told(tmp_path, capsys):
    """Read and said so; other widths and a damaged file end the run in one line."""
    path, model = tmp_path / "model.pt", Dynamics(1, 1)
    assert not common.read_fitted(path, model)
    torch.save(model.state_dict(), path)
    copied = Dynamics(1, 1)
    assert common.read_fitted(path, copied) and torch.equal(flat(copied), flat(model))
    assert f"read from {path}" in capsys.readouterr().err
    torch.save(Dynamics(2, 1).state_dict(), path)
    for _ in range(2):
        with pytest.raises(SystemExit):
            common.read_fitted(path, model)
        assert "delete it to fit anew" in capsys.readouterr().err
        path.write_bytes(b"junk")


def test_ctrl_c_while_fitting(tmp_path, capsys):
    data = plain_data(*(torch.randn(50, 1) for _ in range(3)), torch.randn(50))
    with pytest.raises(SystemExit) as stop:
        mopo.fit(Dynamics(1, 1), data, Args(dynamics_epochs=3), no_run(tmp_path, stop=True))
    assert (
        stop.value.code == 2
        and "start again" in capsys.readouterr().err
        and not list(tmp_path.iterdir())
    )


def test_units_of_the_input_do_not_matter(tmp_path):
    """Fitted to A x + b instead of x, with the same seed, it predicts the same."""
    obs = torch.randn(60, 2)
    action = torch.randn(60, 1)
    delta = torch.randn(60, 2)
    reward = torch.randn(60)
    start, predictions = Dynamics(2, 1), []
    for i, (scale, shift) in enumerate(
        ((1.0, 0.0), (torch.tensor([30.0, 0.02]), torch.tensor([-7.0, 5.0])))
    ):
        dynamics, there = copy.deepcopy(start), obs * scale + shift
        data = plain_data(there, action * (1 + i) - i, there + delta, reward)
        mopo.fit(dynamics, data, Args(dynamics_epochs=3), no_run(tmp_path / str(i)))
        predictions.append(torch.stack(dynamics(torch.cat([there, action * (1 + i) - i], 1))))
    assert_close(predictions[0], predictions[1], 1e-5)


def test_it_knows_the_noise_where_there_is_data_and_disagrees_where_there_is_none(monkeypatch):
    """r = s + 0.1 (1 + s²) ε on −2 < s < 2: σ within 20% of the truth there, means 3 times as far
    apart at 4 < s < 6. (C8)"""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(mopo, "DYNAMICS_HIDDEN", (32, 32))
    s = torch.linspace(-2, 2, 5000)[:, None]
    x = torch.cat([s, 0 * s], 1)
    y = torch.cat([0 * s, s + 0.1 * (1 + s**2) * torch.randn_like(s)], 1)
    dynamics, own = Dynamics(1, 1), torch.randint(5000, (7, 5000))
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=1e-2)
    for step in range(700):
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 400 else 1e-3
        rows = own[:, torch.randint(5000, (256,))]
        mopo.descend(mopo.dynamics_loss(dynamics, x[rows], y[rows]), optimizer)
    mean, log_var = dynamics(torch.stack([torch.linspace(-1.9, 1.9, 50), torch.zeros(50)], 1))
    ratio = (0.5 * log_var[..., 1]).exp().mean(0) / (0.1 * (1 + torch.linspace(-1.9, 1.9, 50) ** 2))
    assert 0.8 < ratio.min() and ratio.max() < 1.2, ratio
    far, _ = dynamics(torch.stack([torch.linspace(4, 6, 50), torch.zeros(50)], 1))
    assert far[..., 1].std(0).mean() > 3 * mean[..., 1].std(0).mean()


# ---- (E5) the rules


def assert_same_rule(env, states):
    """The rule on what the body observes is the environment's own verdict, which is of both
    kinds."""
    verdicts = []
    for qpos, qvel in states:
        env.set_state(qpos, qvel)
        verdicts.append((env._get_obs(), not env.is_healthy))
    got = mopo.FALLS[env.spec.id](torch.as_tensor(np.stack([obs for obs, _ in verdicts])))
    want = torch.tensor([fell for _, fell in verdicts])
    assert torch.equal(got, want)
    assert 0.05 < want.double().mean() < 0.95
    return want


@pytest.mark.parametrize(
    "env_id, z_range, angle_range",
    [("Hopper-v5", (0.6, 1.3), 0.3), ("Walker2d-v5", (0.7, 2.2), 1.3)],
)
def test_rules_of_falling_bodies(env_id, z_range, angle_range):
    """Thousands of real states, placed around each limit and lived through, also after the fall.
    (The observation clips speeds at 10, so a rule on it can't see one of over 100; none was ever
    near.)"""
    env, rng, placed = gym.make(env_id).unwrapped, np.random.default_rng(0), []
    for i in range(3000):
        qpos, qvel = rng.normal(size=env.model.nq) * 0.3, rng.normal(size=env.model.nv) * 5
        qpos[1], qpos[2] = rng.uniform(*z_range), rng.uniform(-angle_range, angle_range)
        if i % 10 == 0:
            qpos[3 + i // 10 % 3] = rng.choice([-150, -99, 99, 150])
        placed.append((qpos, qvel))
    assert_same_rule(env, placed)

    obs, fell = [], []
    for episode in range(60):
        env.reset(seed=episode)
        for _ in range(60):
            next_obs, _, terminated, _, _ = env.step(
                rng.uniform(env.action_space.low, env.action_space.high)
            )
            obs.append(next_obs)
            fell.append(terminated)
    assert torch.equal(mopo.FALLS[env_id](torch.as_tensor(np.stack(obs))), torch.tensor(fell))
    assert 100 < sum(fell) < 3500


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Pendulum-v1"])
def test_rules_of_bodies_that_never_fall(env_id):
    env, rng, seen = gym.make(env_id).unwrapped, np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(2000):
        obs, _, terminated, _, _ = env.step(
            rng.uniform(env.action_space.low, env.action_space.high)
        )
        seen.append(obs)
        assert not terminated
    assert not mopo.FALLS[env_id](1000 * torch.as_tensor(np.stack(seen))).any()


@pytest.mark.parametrize("module", ALL)
def test_a_body_without_a_rule_is_refused_in_one_line(module, monkeypatch, capsys):
    data = tiny_data()
    data.recorded_env = "Ant-v5"
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: data)
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args())
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and "Ant-v5" in error
        and "Hopper-v5, Walker2d-v5, HalfCheetah-v5, Pendulum-v1" in error
    )
    assert error.count("\n") == 1


# ---- (E4), in mopo and combo


@pytest.mark.parametrize("module", [mopo, combo])
def test_every_elite_has_its_share(module):
    """100,000 rows: each elite a fifth of them, the others none; the same seed, the same
    rollouts."""
    data = tiny_data(action_dim=1)

    class Counting:
        elites = torch.tensor([6, 2, 0, 3, 5])

        def __call__(self, x):
            index = torch.arange(7.0)[:, None, None]
            return index.expand(7, len(x), 4), torch.full((7, len(x), 4), -60.0)

    args, rollouts = module.Args(rollout_starts=100_000, horizon=1), []
    for _ in range(2):
        torch.manual_seed(0)
        rollouts.append(
            module.imagine(args, data, Counting(), lambda obs: (obs[:, :1], obs[:, :1]))
        )
    assert torch.equal(*map(as_rows, rollouts))
    seen = rollouts[0]
    chosen = (seen.next_obs - seen.obs).mean(1).round().long()
    shares = torch.bincount(chosen, minlength=7) / 100_000
    assert (shares[[6, 2, 0, 3, 5]] - 0.2).abs().max() < 0.01 and not shares[[1, 4]].any()


@pytest.mark.parametrize("module", [mopo, combo])
def test_each_row_and_step_has_an_elite_of_its_own(module):
    """Two rows of one rollout go different ways, and one row changes its elite on the way."""
    data = tiny_data(action_dim=1)

    class Stepping:
        elites = torch.arange(5)

        def __call__(self, x):
            return 10.0 ** torch.arange(7)[:, None, None].expand(7, len(x), 4), torch.full(
                (7, len(x), 4), -80.0
            )

    rows = module.imagine(
        module.Args(rollout_starts=50, horizon=3), data, Stepping(), module.Actor(3, 1)
    )
    elite = (rows.next_obs - rows.obs)[:, 0].log10().round().view(3, 50)
    assert len(elite[0].unique()) == 5 and (elite[0] != elite[1]).any()
    assert_close(rows.obs[50:], rows.next_obs[:-50])  # each step begins where the one before ended


# ---- train, in all three: the pool, the order of things


def trained(module, monkeypatch, tmp_path, imagine=None, fit=lambda *_: None, size=12, **args):
    """A silent run, with a model that is not fitted, and maybe scripted rollouts. Its history has
    the pool's rows too."""
    snapshot = SilentRun.snapshot

    def snapshot_with_pool(self):
        snapshot(self)
        self.history[-1]["pool"] = as_rows(self.state["pool"]).clone()

    for name, value in vars(no_run(tmp_path)).items():
        monkeypatch.setattr(SilentRun, name, value, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(SilentRun, "snapshot", snapshot_with_pool)
        patch.setattr(module, "fit", fit)
        patch.setattr(module, "imagine", imagine or module.imagine)
        return silent_train(patch, module, tiny_data(size, action_dim=1), batch_size=20, **args)


def numbered(*numbers):
    """Transitions full of these numbers."""
    column = torch.tensor(numbers, dtype=torch.get_default_dtype())
    return Batch(
        column[:, None].expand(-1, 3),
        column[:, None],
        column,
        column[:, None].expand(-1, 3),
        column,
    )


@pytest.mark.parametrize("module", ALL)
def test_the_pool_holds_the_newest_rows_in_their_order(module, monkeypatch, tmp_path):
    """Room for retain · horizon · starts = 12 rows; they come by 5, 1 and 12: the newest 12, in
    their order, and no zeros."""
    numbers, sizes, seen = iter(range(1, 1000)), [5, 5, 5, 1, 12], []

    def imagine(*_):
        return numbered(*(float(next(numbers)) for _ in range(sizes[len(seen)])))

    def step(self, *_):
        rows = as_rows(self.state["pool"])
        assert (rows == rows[:, :1]).all(), "the columns of one transition stay together"
        seen.append((int(self.state["pool"].size), rows[:, 0].tolist()))

    monkeypatch.setattr(SilentRun, "step", step)
    trained(
        module,
        monkeypatch,
        tmp_path,
        imagine,
        steps=5,
        rollout_every=1,
        rollout_starts=4,
        horizon=3,
        retain=1,
    )
    expected = [list(range(max(1, n - 11), n + 1)) for n in (5, 10, 15, 16, 28)]
    for (size, rows), want in zip(seen, expected, strict=True):
        assert size == len(want) and rows == want + [0] * (12 - size)


@pytest.mark.parametrize("module", ALL)
def test_the_pool_draws_whole_rows_of_those_in_use_alike(module):
    """Room for 40, seven in use: each has a seventh of 70,000 draws. Its tensors stay where they
    are, for CUDA graphs."""
    pool = module.Pool(40, tiny_data(action_dim=1))
    before = [tensor.data_ptr() for tensor in pool.buffers()]
    pool.add(numbered(3, 4))
    pool.add(numbered(5, 6, 7, 8, 9))
    assert [tensor.data_ptr() for tensor in pool.buffers()] == before
    rows = as_rows(pool.sample(70_000))
    assert (rows == rows[:, :1]).all() and rows[:, 0].unique().tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert (torch.bincount(rows[:, 0].long())[3:] / 70_000 - 1 / 7).abs().max() < 0.01


@pytest.mark.parametrize("module", ALL)
def test_rollouts_come_before_the_first_update_of_each_round(module, monkeypatch, tmp_path):
    """With every 3 updates: before 1, 4 and 7; each with the policy of that moment."""
    policies = []

    def imagine(args, data, dynamics, actor):
        policies.append(flat(actor))
        return numbered(*[0.1 * len(policies)] * 2)

    run = trained(module, monkeypatch, tmp_path, imagine, steps=8, rollout_every=3)
    assert len(policies) == 3
    for policy, step in zip(policies, (0, 3, 6)):
        assert torch.equal(policy, run.history[step]["actor"])
    assert run.steps_that_moved("pool") == [1, 4, 7]


@pytest.mark.parametrize("module", ALL)
def test_train_moves_every_part_each_step(module, monkeypatch, tmp_path):
    """Actor, critic, target and α, from a target that starts as a copy and α = 1, each at its rate;
    the pool by rollouts."""
    rates = dict(actor_lr=0.01, critic_lr=0.02)
    run = trained(
        module,
        monkeypatch,
        tmp_path,
        steps=3,
        rollout_starts=10,
        rollout_every=2,
        horizon=2,
        retain=2,
        **rates,
    )
    for name in ("actor", "critic", "critic_target", "log_entropy_coef"):
        assert run.steps_that_moved(name) == [1, 2, 3]
    assert run.steps_that_moved("pool") == [1, 3]
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[3]["critic"], run.history[3]["critic_target"])
    assert run.history[0]["log_entropy_coef"] == 0 and as_rows(run.state["pool"]).shape == (40, 9)
    assert 0 < run.state["pool"].size <= 40
    for name, rate in dict(actor=0.01, critic=0.02, entropy=0.01).items():
        assert run.state[f"{name}_optimizer"].param_groups[0]["lr"] == rate


@pytest.mark.parametrize("module", ALL)
def test_a_second_start_goes_the_same_way_without_a_fit(module, monkeypatch, tmp_path):
    """Whole, as a user starts it: the second start reads the model that the first one left, and
    does the same."""
    fit, runs = module.fit, []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(
            trained(
                module,
                monkeypatch,
                tmp_path,
                fit=fit,
                size=40,
                steps=2,
                rollout_starts=10,
                dynamics_epochs=2,
            )
        )
        monkeypatch.setattr(module, "dynamics_loss", lambda *_: pytest.fail("fitted again"))
        assert [path.name for path in tmp_path.iterdir()] == ["seed0-model-f-2.pt"]
    assert all(
        torch.equal(runs[0].history[2][name], runs[1].history[2][name])
        for name in ("actor", "critic", "pool")
    )


@pytest.mark.parametrize("module", ALL)
def test_bad_settings_get_one_line(module, monkeypatch, tmp_path, capsys):
    own = {
        mopo: [dict(penalty_weight=-1.0)],
        combo: [dict(real_share=0.0), dict(real_share=1.0), dict(beta=-1.0), dict(num_samples=0)],
        morel: [dict(gamma=1.0), dict(beta=-1.0), dict(penalty_weight=-1.0)],
    }[module]
    for args in (
        dict(horizon=0),
        dict(rollout_starts=0),
        dict(retain=0),
        dict(dynamics_epochs=0),
        dict(rollout_every=0),
        dict(real_share=1.1),
        dict(real_share=-0.1),
        *own,
    ):
        with pytest.raises(SystemExit) as stop:
            trained(module, monkeypatch, tmp_path, steps=1, **args)
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and "--" + next(iter(args)).replace("_", "-") in error
            and error.count("\n") == 1
        )


# ---- data that no model can be fitted to


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize(
    "rows, terminated, env_id, words",
    [
        (3, 0, "Pendulum-v1", "fewer than 10"),
        (50, 1, "Pendulum-v1", "fewer than 10"),
        (50, 1, None, "no known environment"),
    ],
)
def test_data_without_a_model_are_refused_in_one_line(
    module, rows, terminated, env_id, words, monkeypatch, tmp_path, capsys
):
    """Three rows, rows that all terminate where nothing falls, no environment: before a folder is
    made."""
    data = tiny_data(rows)
    data.terminated[:] = terminated
    data.recorded_env = env_id
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: data)
    monkeypatch.setattr(module, "Run", lambda *_, **__: pytest.fail("a run began"))
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(out=str(tmp_path)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and data.name in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ALL)
def test_a_model_of_data_in_which_everything_falls_at_once(module, tmp_path):
    """Hopper that falls in every row: that is what the model learns, and holdout errors are
    numbers."""
    next_obs = torch.zeros(50, 3)
    data = plain_data(
        torch.randn(50, 3), torch.randn(50, 1), next_obs, torch.randn(50), "Hopper-v5"
    )
    data.terminated[:] = 1
    dynamics = module.Dynamics(3, 1)
    module.fit(dynamics, data, module.Args(dynamics_epochs=2), no_run(tmp_path))
    assert flat(dynamics).isfinite().all()
    rows = module.imagine(
        module.Args(rollout_starts=20, horizon=3), data, dynamics, module.Actor(3, 1)
    )
    assert as_rows(rows).isfinite().all() and len(rows.obs) >= 20
