"""BC and the choice of the best episodes: slow loops and known answers."""
import math

from common import load_policy, save_policy

import bc
import numpy as np
import pytest
import torch
from bc import Actor, Args, DiscreteActor, best_episodes
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    make,
    silent_train,
    slow_mlp,
    step_by_hand,
    tiny_batch,
    tiny_data,
    tiny_discrete_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(bc, "HIDDEN", (7, 6))


def episodes_data(returns, length=3, terminated=(), make_data=tiny_data):
    """Episodes of equal length, rewarded at their last step; a time limit ends those that are not
    in `terminated`."""
    data = make_data(len(returns) * length)
    data.reward.zero_()
    data.terminated.zero_()
    data.truncated.zero_()
    for i, value in enumerate(returns):
        last = (i + 1) * length - 1
        data.reward[last] = value
        (data.terminated if i in terminated else data.truncated)[last] = True
    return data


# ---- (E2)


def test_actor_loss_equals_a_loop():
    """(E2): the squared error, averaged over transitions and over action dimensions."""
    actor, batch = make(Actor, 3, 2), tiny_batch()
    means = [slow_mlp(actor.net, batch.obs[b]) for b in range(4)]
    errors = [
        (math.tanh(means[b][i]) - float(batch.action[b, i])) ** 2
        for b in range(4)
        for i in range(2)
    ]
    assert_close(bc.actor_loss(actor, batch), sum(errors) / 8)


def test_actor_loss_is_a_mean_over_action_dimensions():
    """π = (0, 0, 0) and a = (1, 1, 1) make 1, not 3."""
    batch = tiny_batch(action_dim=3)._replace(action=torch.ones(4, 3))
    assert_close(bc.actor_loss(torch.zeros_like, batch), 1.0)


def test_actor_loss_refuses_a_missing_axis():
    """Actions (B,) against predictions (B, 1) would silently compare all with all."""
    batch = tiny_batch(action_dim=1)
    with pytest.raises(AssertionError):
        bc.actor_loss(make(Actor, 3, 1), batch._replace(action=batch.action[:, 0]))


def test_update_is_one_step_and_blind_to_rewards():
    """Gradient descent on (E2); rewards, next observations and ends of episodes play no part."""
    results, data = [], tiny_data()
    for change in (0.0, 100.0):
        torch.manual_seed(0)
        actor = make(Actor, 3, 2)
        for column in (data.reward, data.next_obs, data.terminated):
            column += change
        torch.manual_seed(1)
        bc.update(Args(batch_size=4), data, actor, torch.optim.SGD(actor.parameters(), lr=0.1))
        results.append(flat(actor))
    torch.manual_seed(0)
    actor = make(Actor, 3, 2)
    torch.manual_seed(1)
    step_by_hand(bc.actor_loss(actor, data.sample(4)), list(actor.parameters()), 0.1)
    assert_close(results[0], flat(actor), 1e-12)
    assert torch.equal(results[0], results[1])


def fit(data, steps, lr, obs_dim=3, action_dim=2):
    actor = Actor(obs_dim, action_dim)
    optimizer = torch.optim.Adam(actor.parameters(), lr=lr)
    for _ in range(steps):
        loss = bc.update(Args(batch_size=32), data, actor, optimizer)["cloning_error"]
    return actor, float(loss)


def test_recovers_a_linear_policy(monkeypatch):
    """Data a = tanh(W s + b) and a clone without hidden layers: W and b come back."""
    monkeypatch.setattr(bc, "HIDDEN", ())
    data = tiny_data(64)
    weight = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6]])
    bias = torch.tensor([0.3, -0.2])
    data.action = torch.tanh(data.obs @ weight.T + bias)
    actor, loss = fit(data, 700, 0.03)
    assert loss < 1e-8
    assert_close(actor.net[0].weight, weight, 1e-3)
    assert_close(actor.net[0].bias, bias, 1e-3)


def test_two_modes_are_averaged():
    """Half the data go left, half right, from one state: a squared error goes straight on, where
    nobody went."""
    data = tiny_data(64, action_dim=1)
    data.obs = torch.tensor([1.0, -1.0, 0.5]).repeat(64, 1)
    data.action = torch.tensor([-1.0, 1.0]).repeat(32)[:, None]
    everything = data.rows(torch.arange(64))
    data.sample = lambda batch_size: everything
    actor, loss = fit(data, 300, 0.01, action_dim=1)
    assert_close(actor(data.obs[0]), [0.0], 1e-3)
    assert_close(loss, 1.0, 1e-4)


# ---- (E1)


def test_the_best_tenth_of_ten_episodes_is_the_best_one():
    """Returns 0 to 9 in any order: exactly the rows of the 9; the whole with f = 1."""
    data = episodes_data([3, 9, 0, 1, 2, 8, 4, 5, 6, 7])
    assert best_episodes(data, 0.1).tolist() == [3, 4, 5]
    assert best_episodes(data, 0.2).tolist() == [3, 4, 5, 15, 16, 17], "rows keep their order"
    assert best_episodes(data, 0.19).tolist() == [3, 4, 5], "⌊f·n⌋"
    assert best_episodes(data, 1.0).tolist() == list(range(30))


def test_the_best_of_bad_episodes():
    """Negative returns: the least bad one."""
    assert best_episodes(episodes_data([-5, -1, -7]), 0.4).tolist() == [3, 4, 5]


def test_a_single_short_episode_is_kept():
    """At least one, also where f·n is below one."""
    assert best_episodes(episodes_data([2.0], length=2), 0.1).tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_rewards_leaves_the_choice(scale):
    """Units of reward don't matter."""
    data = episodes_data([3, 9, 0, 1, 2, 8, 4, 5, 6, 7])
    before = best_episodes(data, 0.3)
    data.reward *= scale
    assert np.array_equal(best_episodes(data, 0.3), before)


def test_returns_are_not_discounted():
    """10 after 99 steps beat 5 at once, though 10 · 0.99⁹⁹ = 3.7."""
    data = episodes_data([10.0, 0.0], length=100)
    data.reward[100] = 5.0
    assert best_episodes(data, 0.5).tolist() == list(range(100))


@pytest.mark.parametrize("terminated", [(), (0, 1, 2), (1,)])
def test_episodes_end_by_either_flag(terminated):
    """Time limit or fall, the next row belongs to the next episode."""
    assert best_episodes(episodes_data([1, 3, 2], terminated=terminated), 0.4).tolist() == [3, 4, 5]


def test_a_good_end_of_a_bad_episode_does_not_count():
    """An episode is ranked by its sum: (−10, 0, 4) loses to (0, 0, 1)."""
    data = episodes_data([4, 1])
    data.reward[0] = -10.0
    assert best_episodes(data, 0.5).tolist() == [3, 4, 5]


# ---- train


def test_train_standardises_over_the_kept_episodes(monkeypatch):
    """10%-BC draws from the best episodes alone, and their mean and std are the actor's."""
    data = episodes_data([3, 9, 0, 1, 2, 8, 4, 5, 6, 7])
    kept = data.obs[3:6].clone()
    mean, std = kept.mean(0), kept.std(0, correction=0) + 1e-3
    run = silent_train(monkeypatch, bc, data, steps=3, batch_size=4, top_fraction=0.1)
    assert len(data.obs) == len(data.truncated) == data.size == 3 and run.variant == "-top10"
    assert_close(data.obs, (kept - mean) / std)
    assert_close(torch.stack([run.actor.obs_mean, run.actor.obs_std]), torch.stack([mean, std]))
    assert run.steps_that_moved("actor") == [1, 2, 3]
    means = [slow_mlp(run.actor.net, (obs - mean) / std) for obs in kept]
    assert_close(
        run.actor.act(kept), [[0.5 + math.tanh(u), 0.5 + 2 * math.tanh(v)] for u, v in means]
    )


def test_train_on_everything_by_default(monkeypatch):
    """f = 1 keeps every row."""
    data = episodes_data([3, 9, 0])
    assert (
        silent_train(monkeypatch, bc, data, steps=1, batch_size=4).variant == ""
        and len(data.obs) == 9
    )


# ---- (E3), discrete actions


def slow_log_likelihood(actor, obs, action):
    """log of the action's softmax, from the exponentials themselves."""
    powers = [math.exp(logit) for logit in slow_mlp(actor.net, obs)]
    return math.log(powers[action] / sum(powers))


def test_discrete_actor_loss_equals_a_loop():
    """(E3), and its gradient."""
    data, actor = tiny_discrete_data(), make(DiscreteActor, 3, 3)
    batch = data.rows(torch.arange(5))
    loss = bc.discrete_actor_loss(actor, batch)
    loss.backward()

    def slow():
        return (
            -sum(slow_log_likelihood(actor, batch.obs[b], int(batch.action[b])) for b in range(5))
            / 5
        )

    assert len(set(batch.action.tolist())) > 1
    assert_close(loss, slow())
    assert_gradient(actor.net[-1].bias, slow)


def test_equal_logits_cost_the_logarithm_of_the_number_of_actions():
    """As the docstring says of a clone that does not look; logits are not squashed: a sure one
    costs nothing."""
    batch = tiny_discrete_data().rows(torch.arange(12))
    assert_close(bc.discrete_actor_loss(lambda obs: torch.full((12, 3), 7.0), batch), math.log(3))
    assert bc.discrete_actor_loss(lambda obs: 50 * torch.eye(3)[batch.action], batch) < 1e-20


def test_discrete_actor_loss_refuses_a_column():
    """Actions are (B,) here."""
    batch = tiny_discrete_data().rows(torch.arange(4))
    with pytest.raises(AssertionError):
        bc.discrete_actor_loss(
            make(DiscreteActor, 3, 3), batch._replace(action=batch.action[:, None])
        )


def test_update_on_discrete_actions_is_one_step():
    """Gradient descent on (E3), of every parameter."""
    data = tiny_discrete_data()
    actor = make(DiscreteActor, 3, 3)
    by_hand = make(DiscreteActor, 3, 3)
    by_hand.load_state_dict(actor.state_dict())
    torch.manual_seed(1)
    metrics = bc.update(
        Args(batch_size=4), data, actor, torch.optim.SGD(actor.parameters(), lr=0.1)
    )
    torch.manual_seed(1)
    loss = bc.discrete_actor_loss(by_hand, data.sample(4))
    step_by_hand(loss, list(by_hand.parameters()), 0.1)
    assert_close(flat(actor), flat(by_hand), 1e-12)
    assert_close(metrics["cloning_error"], loss)
    assert all((p.grad != 0).any() for p in actor.parameters())


def expert(obs):
    """The action, of three, in whose direction the observation points."""
    directions = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 0.9, 0.0], [-0.5, -0.9, 0.0]])
    return (obs @ directions.T).argmax(dim=1)


def test_a_discrete_clone_is_the_expert_behind_noisy_data(monkeypatch):
    """A third of the actions is random. The likeliest action is the expert's own: the clone is
    right more often than the data. Seen on new raw observations of another scale, with actions that
    count from 4."""
    monkeypatch.setattr(bc, "HIDDEN", (32, 32))
    data = tiny_discrete_data(4000)
    data.first_action = 4
    data.action = torch.where(torch.rand(4000) < 1 / 3, torch.randint(3, (4000,)), expert(data.obs))
    right_in_data = (data.action == expert(data.obs)).double().mean()
    data.obs = 10 * data.obs + 3
    run = silent_train(monkeypatch, bc, data, steps=400, batch_size=128, actor_lr=3e-3)
    new = torch.randn(2000, 3)
    right = (run.actor.act(10 * new + 3) == 4 + expert(new)).double().mean()
    assert right_in_data < 0.82 and right > 0.93, (right_in_data, right)


def test_of_two_modes_a_discrete_clone_takes_the_more_frequent():
    """Two thirds of the data take action 2, a third action 0, from one state: no average, as there
    is none."""
    data = tiny_discrete_data(66)
    data.obs = torch.ones(66, 3)
    data.action = torch.tensor([2, 0, 2]).repeat(22)
    everything = data.rows(torch.arange(66))
    data.sample = lambda batch_size: everything
    actor = DiscreteActor(3, 3)
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.02)
    for _ in range(1000):
        bc.update(Args(), data, actor, optimizer)
    assert_close(actor(data.obs[:1]).softmax(dim=1), [[1 / 3, 0.0, 2 / 3]], 2e-3)
    assert actor.act(data.obs[:2]).tolist() == [2, 2]


def test_the_best_episodes_of_discrete_data(monkeypatch):
    """10%-BC keeps the same rows there, and the actor has their mean and deviation."""
    data = episodes_data([3, 9, 0, 1, 2, 8, 4, 5, 6, 7], make_data=tiny_discrete_data)
    kept, actions = data.obs[3:6].clone(), data.action[3:6].clone()
    run = silent_train(
        monkeypatch, bc, data, steps=200, batch_size=8, actor_lr=1e-2, top_fraction=0.1
    )
    assert run.variant == "-top10" and data.size == 3 and torch.equal(data.action, actions)
    assert_close(run.actor.obs_mean, kept.mean(0))
    assert torch.equal(run.actor.act(kept), actions)


def test_a_saved_discrete_policy_acts_alike(monkeypatch, tmp_path):
    """policy.pt alone rebuilds it, and policy.pt2 too: in raw observations and the environment's
    own numbers."""
    torch.set_default_dtype(torch.float32)
    data = tiny_discrete_data()
    data.first_action = 4
    run = silent_train(monkeypatch, bc, data, steps=5, batch_size=8)
    save_policy(tmp_path, "bc", "bc", run.actor, data)
    obs = torch.randn(50, 3)
    expected = run.actor.act(obs)
    assert torch.equal(load_policy(tmp_path)(obs), expected) and set(expected.tolist()) <= {4, 5, 6}
    assert torch.equal(torch.export.load(tmp_path / "policy.pt2").module()(obs), expected)


# ---- settings


@pytest.mark.parametrize(
    "setting, value",
    [("top_fraction", 0.0), ("top_fraction", 1.5), ("batch_size", 0), ("actor_lr", -1.0)],
)
def test_settings_out_of_range_are_refused(monkeypatch, capsys, setting, value):
    with pytest.raises(SystemExit) as stop:
        silent_train(monkeypatch, bc, tiny_data(), steps=2, **{setting: value})
    assert (
        stop.value.code == 2 and f"--{setting.replace('_', '-')} must be" in capsys.readouterr().err
    )
