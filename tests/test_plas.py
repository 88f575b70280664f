"""PLAS against slow loops: a frozen decoder that the policy learns through, and what it can't
reach."""
import copy
import math

import plas
import pytest
import torch
from helpers import (
    SilentRun,
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
from plas import VAE, Actor, Args, Critic, LatentPolicy


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Two narrow hidden layers, in float64; nobody presses Ctrl-C, and a run keeps what it
    saves."""
    monkeypatch.setattr(plas, "HIDDEN", (7, 6))
    monkeypatch.setattr(plas, "VAE_HIDDEN", (6, 5))
    monkeypatch.setattr(SilentRun, "stop", False, raising=False)
    monkeypatch.setattr(SilentRun, "save", lambda run, step: run.snapshot())
    monkeypatch.setattr(SilentRun, "close", lambda run: None, raising=False)


def latent_policy(bound=1.5):
    net = make(LatentPolicy, 3, 4)
    net.bound.fill_(bound)
    return net


def slow_action(vae, policy, obs):
    """(E2) for one observation."""
    return slow_decode(
        vae, obs, [float(policy.bound) * math.tanh(u) for u in slow_mlp(policy.net, obs)]
    )


# ---- the VAE


def test_vae_loss_equals_a_loop(monkeypatch):
    """(E1) with its gradient, through z into the encoder; the posterior's z is not clipped to
    ±½."""
    vae, batch = make(VAE, 3, 2), tiny_batch()
    draws = record_draws(monkeypatch, "randn_like")
    loss, *parts = plas.vae_loss(vae, batch)
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
    loss, cloning, kl = plas.vae_loss(vae, batch)
    assert_close(torch.stack([kl, loss - cloning]), [0.5, 0.25])


def test_log_std_of_the_latent_is_bounded():
    """Whatever the encoder says, −4 ≤ log σ ≤ 15, while μ is free; two latents per action
    dimension."""
    vae = make(VAE, 3, 2)
    vae.encoder[-1].bias.data += torch.tensor([50.0, 0, 0, 0, 50, -50, 50, -50])
    mean, log_std = vae.encode(torch.randn(4, 3), torch.randn(4, 2))
    assert_close(log_std, [[15.0, -4.0, 15.0, -4.0]] * 4)
    assert mean[:, 0].min() > 20


# ---- the policy


@pytest.mark.parametrize("bound", [2.0, 0.7])
def test_latents_stay_within_their_bound(bound):
    """|z| ≤ Z for any s, reached by a network that pushes hard: not BCQ's ±½; and |a| ≤ 1."""
    vae, policy, obs = make(VAE, 3, 2, scale=4.0), latent_policy(bound), 10 * torch.randn(64, 3)
    policy.net[-1].bias.data[:2] = torch.tensor([99.0, -99.0])
    z = policy(obs)
    assert_close(z[:, :2], [[bound, -bound]] * 64)
    assert z.abs().max() <= bound and 0.01 < z[:, 2:].abs().min() < z[:, 2:].abs().max()
    assert 0.9 < plas.decoded_action(vae, policy, obs).abs().max() <= 1


def test_gradient_reaches_the_policy_through_the_frozen_decoder():
    """The action's derivative by every parameter of h is there; and is what finite differences
    say."""
    vae, policy, obs = make(VAE, 3, 2), latent_policy(), torch.randn(4, 3)
    plas.decoded_action(vae, policy, obs).sum().backward(inputs=list(policy.parameters()))
    assert all(p.grad.abs().max() > 1e-4 for p in policy.parameters())
    assert_gradient(policy.net[-1].bias, lambda: sum(sum(slow_action(vae, policy, o)) for o in obs))
    assert all(p.grad is None for p in vae.parameters())


def test_act_is_the_decoded_action_in_the_environments_units():
    """mid + half · π(s), without any random number; Z and the units travel with a saved policy."""
    actor, obs, copied = make(Actor, 3, 2), torch.randn(4, 3), Actor(3, 2)
    actor.latent_policy.bound.fill_(1.5)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    copied.load_state_dict(actor.state_dict())
    before = torch.get_rng_state()
    actions = [slow_action(actor.vae, actor.latent_policy, o) for o in obs]
    assert_close(copied.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in actions])
    assert torch.equal(torch.get_rng_state(), before)


# ---- the losses of stage 2


def test_td_target_equals_a_loop():
    """(E3): the target policy's action, without noise; mostly the smaller critic; reward alone at
    the end."""
    vae = make(VAE, 3, 2)
    policy = latent_policy()
    critic = make(Critic, 3, 2)
    batch = tiny_batch()
    expected = []
    y = plas.td_target(vae, policy, critic, batch, Args(gamma=0.9, min_weight=0.6))
    for b in range(4):
        action = slow_action(vae, policy, batch.next_obs[b])
        q = [slow_critic(critic, k, batch.next_obs[b], action) for k in range(2)]
        expected.append(
            float(batch.reward[b] + (0.0 if b == 1 else 0.9 * (0.6 * min(q) + 0.4 * max(q))))
        )
    assert_close(y, expected)
    assert not y.requires_grad


MIXTURES = [(0.75, [1.5, -0.5]), (1.0, [1.0, -1.0]), (0.5, [2.0, 0.0]), (0.0, [3.0, 1.0])]


@pytest.mark.parametrize("min_weight, expected", MIXTURES)
def test_mixture_of_the_critics(min_weight, expected):
    """Critics that say 1 and 3, or 1 and −1: λ = 1 is the smaller, λ = ½ their mean; per
    transition."""
    q = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    batch = tiny_batch([0, 0])._replace(reward=torch.zeros(2))
    args = Args(gamma=1.0, min_weight=min_weight)
    assert_close(
        plas.td_target(make(VAE, 3, 2), latent_policy(), lambda obs, action: q, batch, args),
        expected,
    )


def test_only_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′ and γ; elsewhere γ and
    Q count."""
    vae, policy, batch = make(VAE, 3, 2), latent_policy(), tiny_batch(terminated=(1, 1, 1, 1))
    for gamma in (0.5, 0.99):
        assert torch.equal(
            plas.td_target(vae, policy, make(Critic, 3, 2), batch, Args(gamma=gamma)), batch.reward
        )
    y = plas.td_target(vae, policy, lambda obs, action: torch.full((2, 4), 7.0),
                       batch._replace(terminated=torch.zeros(4)), Args(gamma=0.5))
    assert_close(y, batch.reward + 3.5)


def test_critic_loss_equals_a_loop():
    """(E4): the mean over transitions of the squared error, summed over two different critics."""
    critic, batch, y = make(Critic, 3, 2), tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(2)
    ]
    loss, q_data = plas.critic_loss(critic, batch, y)
    assert_close(loss, sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(2) for b in range(4)))
    assert_close(q_data, sum(q[0] + q[1]) / 8)
    with pytest.raises(AssertionError):
        plas.critic_loss(critic, batch, y[:, None])


def test_actor_loss_equals_a_loop():
    """(E5) with its gradient: minus the mean of the first critic alone."""
    vae = make(VAE, 3, 2)
    policy = latent_policy()
    critic = make(Critic, 3, 2)
    obs = torch.randn(4, 3)
    critic.layers[-1].bias.data[0] += 9  # the first is not the smaller one
    loss, q_policy = plas.actor_loss(vae, policy, critic, obs)
    loss.backward()

    def slow():
        return -sum(slow_critic(critic, 0, o, slow_action(vae, policy, o)) for o in obs) / 4

    assert_close(torch.stack([loss, q_policy]), [slow(), -slow()])
    assert_gradient(policy.net[-1].bias, slow)
    assert not q_policy.requires_grad


# ---- the updates


def networks():
    """Actor, target h, Q, target Q; targets that differ from the online networks show which one is
    used."""
    actor = make(Actor, 3, 2)
    actor.latent_policy.bound.fill_(1.5)
    return [actor, latent_policy(), make(Critic, 3, 2), make(Critic, 3, 2)]


def sgd(*nets, lr=0.01):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in nets]


def test_update_is_the_algorithm_box():
    """Q on a target from the target networks; h on the new Q; then (E6), exactly. The VAE keeps
    every bit."""
    args, data, nets = Args(batch_size=4, gamma=0.9, target_rate=0.3), tiny_data(), networks()
    actor, latent_target, critic, critic_target = copy.deepcopy(nets)
    optimizers = sgd(nets[0].latent_policy, nets[2])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = plas.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch = data.sample(4)
        q_loss, q_data = plas.critic_loss(
            critic, batch, plas.td_target(actor.vae, latent_target, critic_target, batch, args)
        )
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, q_policy = plas.actor_loss(actor.vae, actor.latent_policy, critic, batch.obs)
        step_by_hand(pi_loss, list(actor.latent_policy.parameters()), 0.01)
        for target, online in ((critic_target, critic), (latent_target, actor.latent_policy)):
            for t, o in zip(target.parameters(), online.parameters()):
                t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, latent_target, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert torch.equal(flat(nets[0].vae), flat(actor.vae))
        # the policy's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[2]), q_grad, 1e-12)
        for name, value in dict(critic_loss=q_loss, q_data=q_data, q_policy=q_policy).items():
            assert_close(metrics[name], value, 1e-12)
            assert not metrics[name].requires_grad
    assert all(p.grad is None for net in (nets[0].vae, nets[1], nets[3]) for p in net.parameters())


def test_update_of_the_vae_is_one_step_of_its_loss():
    args, data, vae = Args(batch_size=4), tiny_data(), make(VAE, 3, 2)
    by_hand, (optimizer,) = copy.deepcopy(vae), sgd(vae)
    for seed in range(2):
        torch.manual_seed(seed)
        metrics = plas.update_vae(args, data, vae, optimizer)
        torch.manual_seed(seed)
        loss, cloning, kl = plas.vae_loss(by_hand, data.sample(4))
        step_by_hand(loss, list(by_hand.parameters()), 0.01)
        assert_close(flat(vae), flat(by_hand), 1e-12)
        assert_close([metrics["cloning_error"], metrics["kl"]], [cloning, kl], 1e-12)


def split(run):
    """The VAE and h at each moment of a silent run."""
    sizes = [len(flat(net)) for net in (run.actor.vae, run.actor.latent_policy)]
    return [
        dict(zip(("vae", "latent_policy"), moment["actor"].split(sizes))) for moment in run.history
    ]


def test_first_the_vae_then_all_but_the_vae(monkeypatch):
    """Stage 1 moves the VAE alone; stage 2 leaves it bit for bit as it is, and moves all else, each
    step."""
    run = silent_train(monkeypatch, plas, tiny_data(), steps=3, vae_steps=5, batch_size=4)
    parts, history = split(run), run.history  # at the start, after stage 1, and after each update
    assert len(history) == 5 and history[1]["fitted"] == 5
    assert run.since > 0, "the VAE's time does not count in updates per second"
    assert not torch.equal(parts[0]["vae"], parts[1]["vae"])
    assert all(torch.equal(parts[1]["vae"], part["vae"]) for part in parts[1:])
    assert torch.equal(parts[0]["latent_policy"], parts[1]["latent_policy"])
    assert all(
        not torch.equal(a["latent_policy"], b["latent_policy"])
        for a, b in zip(parts[1:], parts[2:])
    )
    for name in ("critic", "latent_target", "critic_target"):
        assert run.steps_that_moved(name) == [2, 3, 4]
    assert torch.equal(history[0]["critic"], history[0]["critic_target"])
    assert torch.equal(parts[0]["latent_policy"], history[0]["latent_target"])
    assert not torch.equal(history[-1]["critic"], history[-1]["critic_target"])
    assert run.actor.latent_policy.bound == 2 and run.state["latent_target"].bound == 2


@pytest.mark.parametrize(
    "setting, still", [("vae_lr", "vae"), ("actor_lr", "latent_policy"), ("critic_lr", "critic")]
)
def test_each_learning_rate_has_its_own_network(monkeypatch, setting, still):
    run = silent_train(
        monkeypatch, plas, tiny_data(), steps=2, vae_steps=2, batch_size=4, **{setting: 0.0}
    )
    parts = [part | {"critic": moment["critic"]} for part, moment in zip(split(run), run.history)]
    moved = {name for name in parts[0] if not torch.equal(parts[0][name], parts[-1][name])}
    assert moved == {"vae", "latent_policy", "critic"} - {still}


def test_a_resumed_run_goes_on_with_the_vae_where_it_was(monkeypatch):
    """Of five steps three are behind it: two more. With five behind it, none, and nothing to save
    before step 1."""
    steps = []
    real = plas.update_vae
    monkeypatch.setattr(plas, "update_vae", lambda *args: steps.append(0) or real(*args))
    for behind, fitted_now, moments in ((3, 2, 4), (5, 0, 3)):
        def begin(self, parts, actor, behind=behind):
            self.state, self.actor = parts, actor
            parts["fitted"].fill_(behind)
            self.snapshot()
            return 0

        steps.clear()
        monkeypatch.setattr(SilentRun, "begin", begin)
        run = silent_train(monkeypatch, plas, tiny_data(), steps=2, vae_steps=5, batch_size=4)
        assert len(steps) == fitted_now and len(run.history) == moments and run.state["fitted"] == 5


def test_a_kill_in_stage_1_loses_little(monkeypatch):
    """It is saved every so often and at its end, as step 0, and always as unsaved since."""
    saved = []
    monkeypatch.setattr(plas, "FIT_SAVE_EVERY", 2)
    monkeypatch.setattr(
        SilentRun, "save", lambda run, step: saved.append((step, int(run.state["fitted"])))
    )
    silent_train(monkeypatch, plas, tiny_data(), steps=1, vae_steps=5, batch_size=4)
    assert saved == [(0, 2), (0, 4), (0, 5)] and SilentRun.last.unsaved


def test_ctrl_c_in_stage_1_saves_at_once(monkeypatch, capsys):
    """The step under way is finished and saved as step 0, and the run ends."""
    saved = []
    monkeypatch.setattr(SilentRun, "stop", True)
    monkeypatch.setattr(
        SilentRun, "save", lambda run, step: saved.append((step, int(run.state["fitted"])))
    )
    with pytest.raises(SystemExit) as left:
        silent_train(monkeypatch, plas, tiny_data(), steps=2, vae_steps=50, batch_size=4)
    said = capsys.readouterr()
    assert saved == [(0, 1)] and left.value.code == 2 and "--resume" in said.err
    assert float(said.out.split("cloning_error")[1].split()[0]) > 0


# ---- two modes, and the gap between them


def learn_between_two_modes(monkeypatch, reward):
    """One state, for ever; half the data's actions are −0.8 and half 0.8. What others earn, nobody
    knows."""
    for name in ("HIDDEN", "VAE_HIDDEN"):
        monkeypatch.setattr(plas, name, (32, 32))
    torch.manual_seed(0)
    data = one_state_data(256)
    data.action[:, 0] = torch.where(torch.arange(256) % 2 == 0, 0.8, -0.8)
    data.reward[:] = reward(data.action[:, 0])
    data.action_mid, data.action_half = torch.zeros(1), torch.ones(1)
    run = silent_train(
        monkeypatch,
        plas,
        data,
        steps=200,
        vae_steps=500,
        batch_size=32,
        gamma=0.5,
        target_rate=0.2,
        vae_lr=5e-3,
        actor_lr=5e-3,
        critic_lr=5e-3,
    )
    return run


@pytest.mark.parametrize("better", [1, -1])
def test_it_finds_the_better_mode_where_a_clone_would_average(monkeypatch, better):
    """r = ±a, so a clone's 0 earns nothing, and Q, never told what ±1 brings, is largest there: an
    unconstrained policy leaves for it. PLAS settles on the better mode."""
    run = learn_between_two_modes(monkeypatch, lambda action: better * action)
    actor, anything = run.actor, torch.linspace(-1, 1, 101)[:, None]
    assert better * anything[run.state["critic"](torch.zeros(101, 3), anything)[0].argmax()] > 0.99
    assert 0.6 < better * actor.act(torch.zeros(1, 3)).item() < 0.95
    z = 4 * torch.rand(1000, 2) - 2
    decoded = torch.tanh(actor.vae.decode(torch.zeros(1000, 3), z))[:, 0].abs()
    assert decoded.max() < 0.95 and decoded.quantile(0.5) > 0.6, (
        "any latent within ±2 stays near a mode, or between them"
    )
