"""BC and the choice of the best episodes: slow loops and known answers."""
import math

import bc
import pytest
import torch
from bc import Actor, Args, best_episodes
from helpers import assert_close, flat, make, silent_train, slow_mlp, step_by_hand, tiny_batch, tiny_data


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(bc, "HIDDEN", (7, 6))


def episodes_data(returns, length=3, terminated=()):
    """Episodes of equal length, rewarded at their last step; a time limit ends those that are not in `terminated`."""
    n = len(returns) * length
    data = tiny_data(n)
    columns = data.columns(data.packed)
    columns.reward.zero_(), columns.terminated.zero_(), data.truncated.zero_()
    for i, value in enumerate(returns):
        last = (i + 1) * length - 1
        columns.reward[last] = value
        (columns.terminated if i in terminated else data.truncated)[last] = True
    return data


# ---- (E2)


def test_actor_loss_equals_a_loop():
    """(E2): the squared error, averaged over transitions and over action dimensions."""
    actor, batch = make(Actor, 3, 2), tiny_batch()
    means = [slow_mlp(actor.net, batch.obs[b]) for b in range(4)]
    errors = [(math.tanh(means[b][i]) - float(batch.action[b, i])) ** 2 for b in range(4) for i in range(2)]
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
        if change:
            data.packed[:, 5:] += change
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
    data, weight, bias = tiny_data(64), torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6]]), torch.tensor([0.3, -0.2])
    data.columns(data.packed).action.copy_(torch.tanh(data.columns(data.packed).obs @ weight.T + bias))
    actor, loss = fit(data, 700, 0.03)
    assert loss < 1e-8
    assert_close(actor.net[0].weight, weight, 1e-3)
    assert_close(actor.net[0].bias, bias, 1e-3)


def test_two_modes_are_averaged():
    """Half the data go left, half right, from one state: a squared error goes straight on, where nobody went."""
    data = tiny_data(64, action_dim=1)
    columns = data.columns(data.packed)
    columns.obs.copy_(torch.tensor([1.0, -1.0, 0.5]).expand(64, 3))
    columns.action.copy_(torch.tensor([-1.0, 1.0]).repeat(32)[:, None])
    data.sample = lambda batch_size: columns
    actor, loss = fit(data, 300, 0.01, action_dim=1)
    assert_close(actor(columns.obs[0]), [0.0], 1e-3)
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
    data.columns(data.packed).reward.mul_(scale)
    assert torch.equal(best_episodes(data, 0.3), before)


def test_returns_are_not_discounted():
    """10 after 99 steps beat 5 at once, though 10 · 0.99⁹⁹ = 3.7."""
    data = episodes_data([10.0, 0.0], length=100)
    data.columns(data.packed).reward[100] = 5.0
    assert best_episodes(data, 0.5).tolist() == list(range(100))


@pytest.mark.parametrize("terminated", [(), (0, 1, 2), (1,)])
def test_episodes_end_by_either_flag(terminated):
    """Time limit or fall, the next row belongs to the next episode."""
    assert best_episodes(episodes_data([1, 3, 2], terminated=terminated), 0.4).tolist() == [3, 4, 5]


def test_a_good_end_of_a_bad_episode_does_not_count():
    """An episode is ranked by its sum: (−10, 0, 4) loses to (0, 0, 1)."""
    data = episodes_data([4, 1])
    data.columns(data.packed).reward[0] = -10.0
    assert best_episodes(data, 0.5).tolist() == [3, 4, 5]


# ---- train


def test_train_standardises_over_the_kept_episodes(monkeypatch):
    """10%-BC draws from the best episodes alone, and their mean and std are the actor's."""
    data = episodes_data([3, 9, 0, 1, 2, 8, 4, 5, 6, 7])
    raw = data.columns(data.packed.clone())
    run = silent_train(monkeypatch, bc, data, steps=3, batch_size=4, top_fraction=0.1)
    kept, mean, std = raw.obs[3:6], raw.obs[3:6].mean(0), raw.obs[3:6].std(0, correction=0) + 1e-3
    assert len(data.packed) == len(data.truncated) == int(data.size) == 3 and run.variant == "-top10"
    assert_close(data.columns(data.packed).obs, (kept - mean) / std)
    assert_close(torch.stack([run.actor.obs_mean, run.actor.obs_std]), torch.stack([mean, std]))
    assert run.steps_that_moved("actor") == [1, 2, 3]
    means = [slow_mlp(run.actor.net, (obs - mean) / std) for obs in kept]
    assert_close(run.actor.act(kept), [[0.5 + math.tanh(u), 0.5 + 2 * math.tanh(v)] for u, v in means])


def test_train_on_everything_by_default(monkeypatch):
    """f = 1 keeps every row."""
    data = episodes_data([3, 9, 0])
    assert silent_train(monkeypatch, bc, data, steps=1, batch_size=4).variant == "" and len(data.packed) == 9
