"""BEAR against slow loops, MMD's known values and what few samples do to it, and the constraint at
work."""
import copy
import math
import sys

import common

import bear
import pytest
import torch
from bear import TUNED, VAE, Actor, Args, Critic
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
    slow_mlp,
    slow_mmd,
    slow_raw,
    slow_vae_loss,
    step_by_hand,
    tiny_batch,
    tiny_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64."""
    monkeypatch.setattr(bear, "HIDDEN", (7, 6))
    monkeypatch.setattr(bear, "VAE_HIDDEN", (6, 5))


# ---- the VAE


def test_vae_loss_equals_a_loop(monkeypatch):
    """(E1) with its gradient, through z into the encoder; the posterior's z is not clipped to
    ±½."""
    vae, batch = make(VAE, 3, 2), tiny_batch()
    draws = record_draws(monkeypatch, "randn_like")
    loss, *parts = bear.vae_loss(vae, batch)
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
    loss, cloning, kl = bear.vae_loss(vae, batch)
    assert_close(torch.stack([kl, loss - cloning]), [0.5, 0.25])


def test_log_std_of_the_latent_is_bounded():
    """Whatever the encoder says, −4 ≤ log σ ≤ 15, while μ is free; two latents per action
    dimension."""
    vae = make(VAE, 3, 2)
    vae.encoder[-1].bias.data += torch.tensor([50.0, 0, 0, 0, 50, -50, 50, -50])
    mean, log_std = vae.encode(torch.randn(4, 3), torch.randn(4, 2))
    assert_close(log_std, [[15.0, -4.0, 15.0, -4.0]] * 4)
    assert mean[:, 0].min() > 20


# ---- the policy's actions


def test_actions_before_tanh_equal_a_loop():
    """u = μ + σ ε for each observation's own noise, or for noise that all share; −5 ≤ log σ ≤ 2."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    own = torch.randn(4, 5, 2)
    shared = torch.randn(1, 5, 2)
    assert_close(
        actor(obs, own), [[slow_raw(actor, obs[b], own[b, n]) for n in range(5)] for b in range(4)]
    )
    assert_close(
        actor(obs, shared),
        [[slow_raw(actor, obs[b], shared[0, n]) for n in range(5)] for b in range(4)],
    )
    actor.net[-1].bias.data[2:] = torch.tensor([50.0, -50.0])
    spread = actor(obs, torch.ones(1, 1, 2)) - actor(obs, torch.zeros(1, 1, 2))
    assert_close(spread[:, 0], [[math.exp(2), math.exp(-5)]] * 4)


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
    assert_close(bear.value_actions(critic, obs, actions), expected)


def test_act_equals_a_loop(monkeypatch):
    """(E8): of the policy's actions the one with the largest Q of the first critic, in the
    environment's units."""
    monkeypatch.setattr(bear, "ACT_SAMPLES", 6)
    actor, obs, expected, winners = make(Actor, 3, 2), torch.randn(8, 3), [], set()
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    for o in obs:
        actions = [[math.tanh(u) for u in slow_raw(actor, o, noise)] for noise in actor.noise[0]]
        q = [slow_critic(actor.critic, 0, o, action) for action in actions]
        winners.add(best := q.index(max(q)))
        expected.append([0.5 + 2 * actions[best][0], -1 + 3 * actions[best][1]])
    assert len(winners) > 1
    assert_close(actor.act(obs), expected)


def test_a_saved_policy_is_a_function():
    """The 100 draws and the units travel with the weights; acting draws no random numbers."""
    actor, obs, copied = make(Actor, 3, 2), torch.randn(4, 3), Actor(3, 2)
    actor.action_half = torch.tensor([2.0, 3.0])
    copied.load_state_dict(actor.state_dict())
    before = torch.get_rng_state()
    assert torch.equal(actor.act(obs), copied.act(obs)) and torch.equal(
        torch.get_rng_state(), before
    )
    assert (
        actor.noise.shape == (1, 100, 2)
        and len(actor.noise.unique()) == 200
        and actor.noise.abs().max() > 1
    )


# ---- the target


def test_td_target_equals_a_loop(monkeypatch):
    """(E2): N actions of the policy, mixed over the critics, then the best; reward alone at the
    end."""
    actor = make(Actor, 3, 2)
    critic = make(Critic, 3, 2)
    batch = tiny_batch()
    expected = []
    winners = set()
    draws = record_draws(monkeypatch, "randn")
    y = bear.td_target(actor, critic, batch, Args(gamma=0.9, num_samples=5, min_weight=0.6))
    assert draws[0].shape == (4, 5, 2)
    for b in range(4):
        values = []
        for noise in draws[0][b]:
            action = [math.tanh(u) for u in slow_raw(actor, batch.next_obs[b], noise)]
            q = [slow_critic(critic, k, batch.next_obs[b], action) for k in range(2)]
            values.append(0.6 * min(q) + 0.4 * max(q))
        winners.add(values.index(max(values)))
        expected.append(float(batch.reward[b] + (0.0 if b == 1 else 0.9 * max(values))))
    assert len(winners) > 1
    assert_close(y, expected)
    assert not y.requires_grad


def test_first_mix_then_maximum():
    """Two actions that the critics value [1, 2] and [3, 2]: mixed they are [1.5, 2]; the maxima
    mixed would give 2.25."""
    batch = tiny_batch([0.0])._replace(reward=torch.zeros(1))
    y = bear.td_target(
        make(Actor, 3, 2),
        lambda obs, action: torch.tensor([[1.0, 2.0], [3.0, 2.0]]),
        batch,
        Args(gamma=1.0, num_samples=2),
    )
    assert_close(y, [2.0])


def test_only_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′ and γ; elsewhere γ and
    Q count."""
    actor, batch = make(Actor, 3, 2), tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        assert torch.equal(
            bear.td_target(actor, make(Critic, 3, 2), batch, Args(gamma=gamma)), batch.reward
        )
    y = bear.td_target(actor, lambda obs, action: torch.full((2, len(obs)), 7.0),
                       batch._replace(terminated=torch.zeros(4)), Args(gamma=0.5))
    assert_close(y, batch.reward + 3.5)


def test_critic_loss_equals_a_loop():
    """(E6): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = bear.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    with pytest.raises(AssertionError):
        bear.critic_loss(critic, batch, y[:, None])


# ---- MMD


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian"])
def test_mmd_equals_a_loop(kernel):
    """(E3) for each observation, of sets of different sizes."""
    u, v = torch.randn(4, 3, 2), torch.randn(4, 5, 2) + 0.5
    assert_close(
        bear.mmd(u, v, kernel, 0.7),
        [slow_mmd(u[b].tolist(), v[b].tolist(), kernel, 0.7) for b in range(4)],
    )


def test_known_values_of_mmd():
    """Equal points: √10⁻⁶. Distance 2, Gaussian, h = 20, not squared: √(2 − 2 e^−0.1 + 10⁻⁶) =
    0.436264. (0.43628, as it is also quoted, is this number up to 2·10⁻⁵.) Laplacian: e^−0.05 in
    place of e^−0.1."""
    x = torch.tensor([[[0.3, -0.4]]])
    assert_close(bear.mmd(x, x, "gaussian", 20.0), [1e-3])
    assert_close(bear.mmd(x, x, "laplacian", 20.0), [1e-3])
    y = x + torch.tensor([1.2, 1.6])
    assert_close(bear.mmd(x, y, "gaussian", 20.0), [0.4362639], 1e-7)
    assert abs(bear.mmd(x, y, "gaussian", 20.0).item() - 0.43628) < 2e-5
    x, y = x[..., :1], x[..., :1] + 2
    assert_close(bear.mmd(x, y, "laplacian", 20.0), [math.sqrt(2 - 2 * math.exp(-0.05) + 1e-6)])


def test_symmetries_of_mmd():
    """No order of samples, no common shift, no order of the two sets matters; and equal sets have a
    finite gradient."""
    u, v = torch.randn(4, 5, 2, requires_grad=True), torch.randn(4, 5, 2)
    for kernel in ("gaussian", "laplacian"):
        expected = bear.mmd(u, v, kernel, 2.0)
        assert_close(bear.mmd(u[:, [3, 1, 4, 0, 2]], v[:, [1, 0, 2, 4, 3]], kernel, 2.0), expected)
        assert_close(bear.mmd(u + 7, v + 7, kernel, 2.0), expected)
        assert_close(bear.mmd(v, u, kernel, 2.0), expected)
    bear.mmd(u, u.detach(), "gaussian", 2.0).sum().backward()
    assert u.grad.isfinite().all()


def test_subset_is_enough_for_few_samples_only():
    """C5: behaviour uniform on [−1, 1], a policy on a twentieth of it, near its mean. With 4
    samples its MMD is smaller than that of the behaviour with itself; with 400, larger. Its KL
    divergence from the behaviour, log 20, objects in either case."""
    for num, states, subset_is_nearer in ((4, 2000, True), (400, 20, False)):
        def uniform():
            return 2 * torch.rand(states, num, 1) - 1

        policy = 0.2 + 0.05 * uniform()
        itself, subset = (
            bear.mmd(other, uniform(), "gaussian", 20.0).mean() for other in (uniform(), policy)
        )
        assert (subset < 0.9 * itself) == subset_is_nearer and (
            subset > 1.5 * itself
        ) != subset_is_nearer


# ---- the losses of policy and multiplier


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian"])
@pytest.mark.parametrize("warm_up", [True, False])
def test_actor_loss_equals_a_loop(monkeypatch, kernel, warm_up):
    """(E4) with its gradient: MMD before tanh, z clipped to ±½; the smaller Q at the first action
    alone; at first without Q."""
    actor, vae, obs = make(Actor, 3, 2), make(VAE, 3, 2), torch.randn(4, 3)
    args = Args(num_mmd_samples=3, kernel=kernel, bandwidth=0.7, max_mmd=0.3)
    latents, noise = record_draws(monkeypatch, "randn"), record_draws(monkeypatch, "randn_like")
    loss, distance, q_policy = bear.actor_loss(actor, vae, torch.tensor(1.7), obs, args, warm_up)
    loss.backward()
    assert (
        latents[0].shape == (4, 3, 4)
        and latents[0].abs().max() > 0.5
        and noise[0].shape == (4, 3, 2)
    )

    smaller = set()

    def slow():
        distance, q_policy = 0.0, 0.0
        for b in range(4):
            behavior = [
                slow_mlp(vae.decoder, torch.cat([obs[b], z.clamp(-0.5, 0.5)]))
                for z in latents[0][b]
            ]
            u = [slow_raw(actor, obs[b], eps) for eps in noise[0][b]]
            distance += slow_mmd(u, behavior, kernel, 0.7) / 4
            q = [
                slow_critic(actor.critic, k, obs[b], [math.tanh(x) for x in u[0]]) for k in range(2)
            ]
            smaller.add(q.index(min(q)))
            q_policy += min(q) / 4
        q_policy = 0.0 if warm_up else q_policy
        return -q_policy + 1.7 * (distance - 0.3), distance, q_policy

    assert_close(torch.stack([loss, distance, q_policy]), slow())
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])
    assert smaller == {0, 1}
    assert (
        not distance.requires_grad
        and not q_policy.requires_grad
        and all(p.grad is None for p in vae.parameters())
    )
    assert all((p.grad is None) == warm_up for p in actor.critic.parameters()), (
        "no gradient to Q's output in the warm-up"
    )


def test_multiplier_loss_equals_its_formula():
    """(E5): −α (MMD − ε) with α = exp(log α): its gradient on log α is the loss itself."""
    log_multiplier = torch.tensor(0.4, requires_grad=True)
    loss = bear.multiplier_loss(log_multiplier, torch.tensor(0.2), 0.05)
    loss.backward()
    assert_close(torch.stack([loss, log_multiplier.grad]), [-math.exp(0.4) * 0.15] * 2)


@pytest.mark.parametrize("max_mmd, direction, end", [(-1.0, 1, 10.0), (100.0, -1, -5.0)])
def test_multiplier_rises_above_the_threshold_and_stays_in_its_bounds(max_mmd, direction, end):
    """MMD above ε: log α rises, until 10; below: it falls, until −5. In the warm-up as after it."""
    for warm_up in (True, False):
        data, nets = tiny_data(), networks()
        optimizers = sgd(*nets)
        args = Args(batch_size=4, max_mmd=max_mmd)
        bear.update(args, data, *nets, *optimizers, warm_up)
        assert 0 < direction * (nets[3].item() - 0.4)
        nets[3].data.fill_(end - 1e-9 * direction)
        metrics = bear.update(args, data, *nets, *optimizers, warm_up)
        assert nets[3].item() == end
        # the α that was used, not the next
        assert_close(metrics["multiplier"], math.exp(end), 1e-6)


# ---- the update


def networks():
    """VAE, actor, target Q that differs from Q, log α."""
    return [
        make(VAE, 3, 2),
        make(Actor, 3, 2),
        make(Critic, 3, 2),
        torch.tensor(0.4, requires_grad=True),
    ]


def sgd(vae, actor, critic_target, log_multiplier, lr=0.01):
    parts = vae.parameters(), actor.net.parameters(), actor.critic.parameters(), [log_multiplier]
    return [torch.optim.SGD(part, lr=lr) for part in parts]


@pytest.mark.parametrize("warm_up", [True, False])
def test_update_is_the_algorithm_box(warm_up):
    """VAE; then all of the official code's losses on what is there before any of its steps; the
    steps; (E7), exactly."""
    args = Args(batch_size=4, gamma=0.9, target_rate=0.3, num_samples=3, bandwidth=2.0)
    data, nets = tiny_data(), networks()
    vae, actor, critic_target, log_multiplier = copy.deepcopy(nets)
    optimizers = sgd(*nets)
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = bear.update(args, data, *nets, *optimizers, warm_up)

        torch.manual_seed(seed)
        batch, alpha = data.sample(4), log_multiplier.detach().exp()
        loss, cloning, kl = bear.vae_loss(vae, batch)
        vae_grad = step_by_hand(loss, list(vae.parameters()), 0.01)
        y = bear.td_target(actor, critic_target, batch, args)
        q_loss, q_data = bear.critic_loss(actor.critic, batch, y)
        pi_loss, distance, q_policy = bear.actor_loss(actor, vae, alpha, batch.obs, args, warm_up)
        q_grads = torch.autograd.grad(q_loss, list(actor.critic.parameters()))
        step_by_hand(pi_loss, list(actor.net.parameters()), 0.01)
        for parameter, grad in zip(actor.critic.parameters(), q_grads):
            parameter.data -= 0.01 * grad
        log_multiplier.data += 0.01 * alpha * (distance - 0.05)
        for t, o in zip(critic_target.parameters(), actor.critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets[:3], (vae, actor, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(nets[3], log_multiplier, 1e-12)
        # nothing that comes later adds to these gradients
        assert_close(flat_grad(nets[0]), vae_grad, 1e-12)
        assert_close(
            flat_grad(nets[1].critic), torch.cat([grad.flatten() for grad in q_grads]), 1e-12
        )
        expected = dict(
            critic_loss=q_loss,
            q_data=q_data,
            q_policy=q_policy,
            mmd=distance,
            multiplier=alpha,
            cloning_error=cloning,
            kl=kl,
        )
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)
            assert not metrics[name].requires_grad
    assert all(p.grad is None for p in nets[2].parameters())


def split(run):
    """Policy and Q at each moment of a silent run, beside its other parts."""
    sizes = [len(flat(net)) for net in (run.actor.net, run.actor.critic)]
    return [
        moment | dict(zip(("policy", "critic"), moment["actor"].split(sizes)))
        for moment in run.history
    ]


@pytest.mark.parametrize(
    "setting, still",
    [
        ("vae_lr", "vae"),
        ("actor_lr", "policy"),
        ("critic_lr", "critic"),
        ("multiplier_lr", "log_multiplier"),
    ],
)
def test_each_learning_rate_has_its_own_part(monkeypatch, setting, still):
    """Without it the part stands still and the others learn, each step; α starts at 1, the target
    as a copy."""
    run = silent_train(
        monkeypatch, bear, tiny_data(), steps=3, batch_size=4, warm_up_steps=0, **{setting: 0.0}
    )
    parts = split(run)
    for name in ("vae", "policy", "critic", "log_multiplier"):
        moved = [
            not torch.equal(before[name], after[name]) for before, after in zip(parts, parts[1:])
        ]
        assert moved == [name != still] * 3
    assert (
        torch.equal(parts[0]["critic"], parts[0]["critic_target"])
        and parts[0]["log_multiplier"] == 0
    )
    assert (run.steps_that_moved("critic_target") == [1, 2, 3]) == (still != "critic")


def test_train_warms_up(monkeypatch):
    """The first updates are without Q for the policy, the others with."""
    seen, real = [], bear.update
    monkeypatch.setattr(
        bear, "update", lambda *args, **parts: seen.append(parts["warm_up"]) or real(*args, **parts)
    )
    silent_train(monkeypatch, bear, tiny_data(), steps=5, batch_size=4, warm_up_steps=3)
    assert seen == [True, True, True, False, False]


def test_tuned_kernels_are_used_and_said_aloud(monkeypatch, capsys):
    """D4RL's kernels by body; what the user sets stands; elsewhere the script's default."""
    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["bear.py", *arguments])
        args = common.parse_args(Args, TUNED)
        return args.kernel, args.bandwidth, capsys.readouterr().out.count("tuned for")

    assert parsed() == ("laplacian", 20.0, 2)
    assert parsed("--env", "walker2d-expert", "--bandwidth", "50") == ("laplacian", 50.0, 1)
    assert parsed("--env", "halfcheetah-medium-replay") == ("gaussian", 20.0, 2)
    assert parsed("--env", "pendulum-medium") == ("gaussian", 50.0, 0)


# ---- the constraint at work


@pytest.mark.parametrize(
    "log_multiplier, chosen, q_bounds",
    [(10.0, (-0.35, 0.35), (-1, 2.5)), (-5.0, (0.9, 1.0), (4, 1e9))],
)
def test_the_multiplier_decides_between_support_and_q(
    monkeypatch, log_multiplier, chosen, q_bounds
):
    """One state, for ever; data actions in [−0.2, 0.2] earn what they say, so none is worth more
    than 0.2 / (1 − γ) = 2. With α = e¹⁰ the policy's mean stays with the data's, with α = e⁻⁵ it
    acts far outside and expects more."""
    for name in ("HIDDEN", "VAE_HIDDEN"):
        monkeypatch.setattr(bear, name, (32, 32))
    data = one_state_data(256)
    data.action[:, 0] = data.reward[:] = torch.linspace(-0.2, 0.2, 256)
    vae, actor = VAE(3, 1), Actor(3, 1)
    parts = [
        vae,
        actor,
        copy.deepcopy(actor.critic),
        torch.tensor(log_multiplier, requires_grad=True),
    ]
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=5e-3) for net in (vae, actor.net, actor.critic)
    ]
    optimizers.append(torch.optim.SGD([parts[3]], lr=0.0))
    args = Args(batch_size=32, gamma=0.9, target_rate=0.2, num_samples=4, bandwidth=1.0)
    for step in range(300):
        metrics = bear.update(args, data, *parts, *optimizers, step < 50)
    mean = torch.tanh(actor(torch.zeros(1, 3), torch.zeros(1, 1, 1))).item()
    assert chosen[0] < mean < chosen[1]
    assert q_bounds[0] < metrics["q_policy"] < q_bounds[1]
