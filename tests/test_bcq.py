"""BCQ against slow loops, its known values, the notes' tabular equation, and what its constraint
does."""
import copy
import math
from types import SimpleNamespace

import bcq
import numpy as np
import pytest
import torch
from bcq import VAE, Actor, Args, Critic, Perturbation
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    one_state_data,
    record_draws,
    silent_train,
    slow_critic,
    slow_decode,
    slow_mlp,
    slow_vae_loss,
    step_by_hand,
    tiny_batch,
    tiny_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(bcq, "HIDDEN", (7, 6))
    monkeypatch.setattr(bcq, "VAE_HIDDEN", (6, 5))


def perturbation_of(bound):
    net = make(Perturbation, 3, 2)
    net.bound.fill_(bound)
    return net


def slow_proposal(vae, perturbation, obs, z):
    """(E2), (E3) for one observation and one drawn latent, not yet clipped."""
    z = [min(max(v, -0.5), 0.5) for v in z.tolist()]
    action = slow_decode(vae, obs, z)
    shift = slow_mlp(perturbation.net, torch.tensor(obs.tolist() + action))
    return [
        min(max(a + float(perturbation.bound) * math.tanh(u), -1), 1) for a, u in zip(action, shift)
    ]


# ---- the VAE


def test_vae_loss_equals_a_loop(monkeypatch):
    """(E1) with its gradient, through z into the encoder; the posterior's z is not clipped to
    ±½."""
    vae, batch = make(VAE, 3, 2), tiny_batch()
    draws = record_draws(monkeypatch, "randn_like")
    loss, *parts = bcq.vae_loss(vae, batch)
    loss.backward()
    assert_close(torch.stack([loss, *parts]), slow_vae_loss(vae, batch, draws[0]))
    assert (
        draws[0].shape == (4, 4)
        and draws[0].abs().max() > 1
        and not any(part.requires_grad for part in parts)
    )
    for net in (vae.encoder, vae.decoder):
        assert_gradient(net[-1].bias, lambda: slow_vae_loss(vae, batch, draws[0])[0])


@pytest.mark.parametrize("action_dim", [1, 3])
def test_kl_of_a_shifted_normal(action_dim):
    """μ = 1, σ = 1 in every latent: KL is ½ for any number of latents, and adds ¼ to the loss."""
    vae, batch = make(VAE, 3, action_dim), tiny_batch(action_dim=action_dim)
    vae.encoder[-1].weight.data.zero_()
    vae.encoder[-1].bias.data[:] = torch.tensor([1.0] * 2 * action_dim + [0.0] * 2 * action_dim)
    loss, cloning, kl = bcq.vae_loss(vae, batch)
    assert_close(torch.stack([kl, loss - cloning]), [0.5, 0.25])


def test_log_std_of_the_latent_is_bounded():
    """Whatever the encoder says, −4 ≤ log σ ≤ 15, while μ is free; two latents per action
    dimension."""
    vae = make(VAE, 3, 2)
    vae.encoder[-1].bias.data += torch.tensor([50.0, 0, 0, 0, 50, -50, 50, -50])
    mean, log_std = vae.encode(torch.randn(4, 3), torch.randn(4, 2))
    assert_close(log_std, [[15.0, -4.0, 15.0, -4.0]] * 4)
    assert mean[:, 0].min() > 20


def test_prior_samples_are_clipped_and_all_different():
    """z in [−½, ½], both bounds reached, and its own for each observation, sample and latent."""
    z = bcq.sample_latents(make(VAE, 3, 2), torch.zeros(5, 3), 100)
    inside = z[z.abs() < 0.5]
    assert z.shape == (5, 100, 4) and z.min() == -0.5 and z.max() == 0.5
    assert len(inside.unique()) == len(inside) and 0.3 < len(inside) / z.numel() < 0.46, (
        "of a normal 38% are within ±½"
    )


# ---- proposals


def test_propose_equals_a_loop():
    """(E2), (E3): decoded and moved, observation by observation; some actions meet the clip at
    ±1."""
    vae, perturbation, obs = make(VAE, 3, 2, scale=3.0), perturbation_of(0.8), torch.randn(4, 3)
    z = 0.5 * torch.rand(4, 5, 4)
    actions = bcq.propose(vae, perturbation, obs, z)
    assert_close(
        actions,
        [[slow_proposal(vae, perturbation, obs[b], z[b, n]) for n in range(5)] for b in range(4)],
    )
    assert actions.abs().max() == 1 and actions.abs().min() < 0.9


def test_only_the_perturbation_gets_gradient_from_a_proposal():
    vae, perturbation = make(VAE, 3, 2), perturbation_of(0.3)
    bcq.propose(vae, perturbation, torch.randn(4, 3), torch.zeros(4, 5, 4)).sum().backward()
    assert all(p.grad is None for p in vae.parameters())
    assert all(p.grad.abs().max() > 0 for p in perturbation.parameters())


@pytest.mark.parametrize("bound", [0.05, 0.5])
def test_perturbation_is_bounded(bound):
    """|ã − â| ≤ φ, reached by a network that pushes hard; |ã| ≤ 1 always."""
    perturbation, action = perturbation_of(bound), 2 * torch.rand(64, 2) - 1
    perturbation.net[-1].bias.data[:] = torch.tensor([99.0, -99.0])
    moved = perturbation(torch.randn(64, 3), action)
    assert_close(moved, (action + torch.tensor([bound, -bound])).clamp(-1, 1))
    assert moved.abs().max() == 1


def test_without_perturbation_and_choice_it_is_generative_cloning(monkeypatch):
    """φ = 0, N = 1: the VAE's action, whatever ξ and Q are."""
    monkeypatch.setattr(bcq, "ACT_SAMPLES", 1)
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    before = actor.act(obs)
    assert_close(before, torch.tanh(actor.vae.decode(obs, actor.latents[0].expand(4, -1))))
    for net in (actor.perturbation, actor.critic):
        for parameter in net.parameters():
            parameter.data.normal_()
    assert torch.equal(actor.act(obs), before)


def test_value_actions_equals_a_loop():
    """Each observation's actions are valued at that observation: repeat in place of
    repeat_interleave would mix them."""
    critic, obs, actions = make(Critic, 3, 2), torch.randn(4, 3), torch.randn(4, 5, 2)
    expected = [
        [
            [slow_critic(critic, k, obs[b], actions[b, n].tolist()) for n in range(5)]
            for b in range(4)
        ]
        for k in range(2)
    ]
    assert_close(bcq.value_actions(critic, obs, actions), expected)


# ---- the target


def test_td_target_equals_a_loop(monkeypatch):
    """(E4): N proposals of the VAE and the target ξ, mixed over the critics, then the best; reward
    alone at the end."""
    vae = make(VAE, 3, 2)
    perturbation = perturbation_of(0.3)
    critic = make(Critic, 3, 2)
    batch = tiny_batch()
    args, expected, winners = Args(gamma=0.9, num_samples=5, min_weight=0.6), [], set()
    draws = record_draws(monkeypatch, "randn")
    y = bcq.td_target(vae, perturbation, critic, batch, args)
    assert draws[0].shape == (4, 5, 4)
    for b in range(4):
        values = []
        for n in range(5):
            action = slow_proposal(vae, perturbation, batch.next_obs[b], draws[0][b, n])
            q = [slow_critic(critic, k, batch.next_obs[b], action) for k in range(2)]
            values.append(0.6 * min(q) + 0.4 * max(q))
        winners.add(values.index(max(values)))
        expected.append(float(batch.reward[b] + (0.0 if b == 1 else 0.9 * max(values))))
    assert len(winners) > 1
    assert_close(y, expected)
    assert not y.requires_grad


def target_of(q, **args):
    """td_target where the critics say q (K, B, N), of transitions without reward."""
    batch = tiny_batch([0.0] * q.shape[1])._replace(reward=torch.zeros(q.shape[1]))
    args = Args(gamma=1.0, num_samples=q.shape[2], **args)
    return bcq.td_target(
        make(VAE, 3, 2), perturbation_of(0.0), lambda obs, action: q.flatten(1), batch, args
    )


def test_first_mix_then_maximum():
    """Two actions that the critics value [1, 2] and [3, 2]: mixed they are [1.5, 2]; the maxima
    mixed would give 2.25."""
    assert_close(target_of(torch.tensor([[[1.0, 2.0]], [[3.0, 2.0]]])), [2.0])


def test_limits_of_the_mixture():
    """λ = 1: the largest minimum; λ = 0: the largest of all; per transition."""
    q = torch.tensor([[[1.0, 2.0], [-5.0, 0.0]], [[3.0, 2.0], [4.0, -1.0]]])
    assert_close(target_of(q, min_weight=1.0), [2.0, -1.0])
    assert_close(target_of(q, min_weight=0.0), [3.0, 4.0])


def test_only_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′ and γ; elsewhere γ and
    Q count."""
    vae, perturbation, critic = make(VAE, 3, 2), perturbation_of(0.3), make(Critic, 3, 2)
    batch = tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        assert torch.equal(
            bcq.td_target(vae, perturbation, critic, batch, Args(gamma=gamma)), batch.reward
        )
    y = bcq.td_target(vae, perturbation, lambda obs, action: torch.full((2, len(obs)), 7.0),
                      batch._replace(terminated=torch.zeros(4)), Args(gamma=0.5))
    assert_close(y, batch.reward + 3.5)


def test_with_the_datas_actions_it_is_the_notes_equation():
    """C4: Q(s, a) ← r + γ max_{a′: (s′, a′) ∈ D} Q(s′, a′), on a table whose best actions are not
    in the data."""
    gamma, grid = 0.5, torch.tensor([-0.8, 0.0, 0.8])
    rng = np.random.default_rng(0)
    following = rng.integers(4, size=(4, 3))
    # the last action is the best, and in two states unseen
    reward = rng.normal(size=(4, 3)) + np.array([0.0, 0.0, 5.0])
    known = [[0, 1], [1, 2], [0], [0, 1, 2]]
    pairs = [(s, a) for s in range(4) for a in known[s]]
    states, actions = (torch.tensor(column) for column in zip(*pairs))
    batch = tiny_batch([0.0] * len(pairs))._replace(
        obs=states[:, None],
        action=grid[actions][:, None],
        next_obs=torch.as_tensor(following[states, actions])[:, None],
        reward=torch.as_tensor(reward[states, actions]),
    )

    def decode(obs, z):
        """A perfect model: of state s it gives back each of the actions that the data hold there,
        and no other."""
        choice = [
            [
                known[int(s)][int((v + 0.5) * 0.999 * len(known[int(s)]))]
                for s, v in zip(o[:, 0], row[:, 0])
            ]
            for o, row in zip(obs, z)
        ]
        return torch.atanh(grid[torch.tensor(choice)])[..., None]

    table = torch.zeros(4, 3)
    critic = lambda obs, action: table[obs[:, 0], (action[:, 0] / 0.8).round().long() + 1].expand(
        2, -1
    )
    perturbation = lambda obs, action: action
    for _ in range(60):
        y = bcq.td_target(SimpleNamespace(latent_dim=1, decode=decode), perturbation, critic, batch,
                          Args(gamma=gamma, num_samples=40))
        table[states, actions] = y

    def solve(allowed):
        q = np.zeros((4, 3))
        for _ in range(60):
            q = np.array(
                [
                    [
                        reward[s, a]
                        + gamma * max(q[following[s, a], b] for b in allowed[following[s, a]])
                        for a in range(3)
                    ]
                    for s in range(4)
                ]
            )
        return torch.as_tensor(q)[states, actions]

    assert_close(table[states, actions], solve(known))
    assert (solve([range(3)] * 4) - solve(known)).max() > 1, (
        "Q-learning over all actions says something else"
    )


# ---- the other losses


def test_critic_loss_equals_a_loop():
    """(E5): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = bcq.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    with pytest.raises(AssertionError):
        bcq.critic_loss(critic, batch, y[:, None])


def test_perturbation_loss_equals_a_loop(monkeypatch):
    """(E6) with its gradient: minus the mean of the first critic alone, at one proposal per
    observation."""
    vae = make(VAE, 3, 2)
    perturbation = perturbation_of(0.3)
    critic = make(Critic, 3, 2)
    obs = torch.randn(4, 3)
    critic.layers[-1].bias.data[0] += 9  # the first is not the smaller one
    draws = record_draws(monkeypatch, "randn")
    loss, q_policy = bcq.perturbation_loss(vae, perturbation, critic, obs)
    loss.backward()

    def slow():
        actions = [slow_proposal(vae, perturbation, obs[b], draws[0][b, 0]) for b in range(4)]
        return -sum(slow_critic(critic, 0, obs[b], actions[b]) for b in range(4)) / 4

    assert draws[0].shape == (4, 1, 4)
    assert_close(torch.stack([loss, q_policy]), [slow(), -slow()])
    assert_gradient(perturbation.net[-1].bias, slow)
    assert not q_policy.requires_grad and all(p.grad is None for p in vae.parameters())


# ---- acting


def test_act_equals_a_loop(monkeypatch):
    """(E8): the proposal with the largest Q of the first critic, in the environment's units."""
    monkeypatch.setattr(bcq, "ACT_SAMPLES", 6)
    actor, obs, expected, winners = make(Actor, 3, 2), torch.randn(8, 3), [], set()
    actor.perturbation.bound.fill_(0.3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    for o in obs:
        actions = [slow_proposal(actor.vae, actor.perturbation, o, z) for z in actor.latents[0]]
        q = [slow_critic(actor.critic, 0, o, action) for action in actions]
        winners.add(best := q.index(max(q)))
        expected.append([0.5 + 2 * actions[best][0], -1 + 3 * actions[best][1]])
    assert len(winners) > 1
    assert_close(actor.act(obs), expected)


def test_a_saved_policy_is_a_function():
    """The 100 latents, φ and the units travel with the weights; acting draws no random numbers."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.perturbation.bound.fill_(0.3)
    actor.action_half = torch.tensor([2.0, 3.0])
    copied = Actor(3, 2)
    copied.load_state_dict(actor.state_dict())
    before = torch.get_rng_state()
    assert torch.equal(actor.act(obs), copied.act(obs)) and torch.equal(
        actor.act(obs[:1]), copied.act(obs)[:1]
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert actor.latents.shape == (1, 100, 4) and actor.latents.abs().max() == 0.5
    assert len(actor.latents.unique()) > 100, (
        "one latent for all would leave nothing to choose from"
    )


# ---- the update


def networks():
    """Actor, target ξ, target Q; targets that differ from the online networks show which one is
    used."""
    actor = make(Actor, 3, 2)
    actor.perturbation.bound.fill_(0.3)
    return [actor, perturbation_of(0.3), make(Critic, 3, 2)]


def sgd(actor, lr=0.01):
    return [
        torch.optim.SGD(net.parameters(), lr=lr)
        for net in (actor.vae, actor.critic, actor.perturbation)
    ]


def test_update_is_the_algorithm_box():
    """VAE; Q on a target from the new VAE and the target networks; ξ on the new Q and the new VAE;
    then (E7), exactly."""
    args = Args(batch_size=4, gamma=0.9, target_rate=0.3, num_samples=3)
    data = tiny_data()
    nets = networks()
    actor, perturbation_target, critic_target = copy.deepcopy(nets)
    vae, perturbation, critic = actor.vae, actor.perturbation, actor.critic
    optimizers = sgd(nets[0])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = bcq.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch = data.sample(4)
        loss, cloning, kl = bcq.vae_loss(vae, batch)
        vae_grad = step_by_hand(loss, list(vae.parameters()), 0.01)
        q_loss, q_data = bcq.critic_loss(
            critic, batch, bcq.td_target(vae, perturbation_target, critic_target, batch, args)
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        xi_loss, q_policy = bcq.perturbation_loss(vae, perturbation, critic, batch.obs)
        step_by_hand(xi_loss, list(perturbation.parameters()), 0.01)
        for target, online in ((critic_target, critic), (perturbation_target, perturbation)):
            for t, o in zip(target.parameters(), online.parameters()):
                t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, perturbation_target, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        # the later steps add nothing to these gradients
        assert_close(flat_grad(nets[0].vae), vae_grad, 1e-12)
        assert_close(flat_grad(nets[0].critic), q_grad, 1e-12)
        expected = dict(
            critic_loss=q_loss, q_data=q_data, q_policy=q_policy, cloning_error=cloning, kl=kl
        )
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)
            assert not metrics[name].requires_grad
    assert all(p.grad is None for net in nets[1:] for p in net.parameters())


def test_each_optimizer_has_its_own_network(monkeypatch):
    """In train: without its learning rate a network stands still and the others learn, each step;
    targets start as copies."""
    for still, setting in (
        ("vae", "vae_lr"),
        ("critic", "critic_lr"),
        ("perturbation", "actor_lr"),
    ):
        run = silent_train(monkeypatch, bcq, tiny_data(), steps=3, batch_size=4, **{setting: 0.0})
        actor, state = run.actor, run.history
        sizes = [len(flat(net)) for net in (actor.vae, actor.perturbation, actor.critic)]
        parts = [
            dict(zip(("vae", "perturbation", "critic"), moment["actor"].split(sizes)))
            for moment in state
        ]
        for name in parts[0]:
            moved = [
                not torch.equal(before[name], after[name])
                for before, after in zip(parts, parts[1:])
            ]
            assert moved == [name != still] * 3
        for name in ("perturbation", "critic"):
            assert torch.equal(parts[0][name], state[0][name + "_target"])
            assert (run.steps_that_moved(name + "_target") == [1, 2, 3]) == (name != still)
        assert actor.perturbation.bound == 0.05 and run.state["perturbation_target"].bound == 0.05


# ---- unlike Q-learning over all actions


def learn_from_a_narrow_corridor(monkeypatch, seed, bound):
    """One state, for ever; data actions in [−0.2, 0.2] earn what they say, r = a. What a = 1 earns,
    nobody knows."""
    for name in ("HIDDEN", "VAE_HIDDEN"):
        monkeypatch.setattr(bcq, name, (32, 32))
    torch.manual_seed(seed)
    data = one_state_data(256)
    data.action[:, 0] = data.reward[:] = torch.linspace(-0.2, 0.2, 256)
    data.action_mid, data.action_half = torch.zeros(1), torch.ones(1)
    actor = silent_train(
        monkeypatch,
        bcq,
        data,
        steps=300,
        batch_size=32,
        gamma=0.9,
        target_rate=0.2,
        num_samples=4,
        vae_lr=5e-3,
        actor_lr=5e-3,
        critic_lr=5e-3,
        max_perturbation=bound,
    ).actor
    action = actor.act(torch.zeros(1, 3))
    return action.item(), actor.critic(torch.zeros(1, 3), action).mean().item()


@pytest.mark.parametrize("seed", range(2))
def test_the_constraint_is_what_keeps_it_in_the_data(monkeypatch, seed):
    """No data action is worth more than 0.2 / (1 − γ) = 2. With φ = 2, so any action, it acts far
    outside and expects more."""
    action, q = learn_from_a_narrow_corridor(monkeypatch, seed, 2.0)
    assert action > 0.9 and q > 4
    action, q = learn_from_a_narrow_corridor(monkeypatch, seed, 0.05)
    assert 0.03 < action < 0.25 + 0.02, (
        "in the data, or φ outside; to the better side of their middle"
    )
    assert q < 2.5


def fit_vae(monkeypatch, action):
    """The actions that a VAE draws, (1000,), after it has seen these in one state."""
    monkeypatch.setattr(bcq, "VAE_HIDDEN", (32, 32))
    vae = VAE(3, 1)
    batch = tiny_batch([0.0] * len(action))._replace(
        obs=torch.zeros(len(action), 3), action=action[:, None]
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    for _ in range(400):
        bcq.descend(bcq.vae_loss(vae, batch)[0], optimizer)
    return torch.tanh(
        vae.decode(torch.zeros(1000, 3), bcq.sample_latents(vae, torch.zeros(1000, 3), 1)[:, 0])
    )[:, 0].detach()


def test_the_vae_resolves_what_is_wider_than_a_third(monkeypatch):
    """With ½ KL a latent costs more than it explains where the data's actions have a variance below
    ⅛: then it is not used."""
    narrow = fit_vae(monkeypatch, torch.linspace(-0.4, 0.4, 64))  # variance 0.055
    two_modes = fit_vae(monkeypatch, torch.tensor([-0.8, 0.8]).repeat(32))  # variance 0.64
    assert narrow.std() < 0.03 and narrow.mean().abs() < 0.05
    assert two_modes.std() > 0.4 and (two_modes.abs() > 0.3).float().mean() > 0.7
