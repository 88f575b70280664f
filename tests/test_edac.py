"""EDAC and SAC-N against slow loops, against SAC, and what many and different critics change."""
import copy
import math
import sys

from common import parse_args

import edac
import pytest
import sac
import torch
from edac import Actor, Args, Critic
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    flat_grad,
    make,
    record_draws,
    silent_train,
    slow_critic,
    slow_mlp,
    slow_sample,
    step_by_hand,
    tiny_batch,
    tiny_data,
)
from torch import nn

N = 5


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Three narrow hidden layers, in float64."""
    monkeypatch.setattr(edac, "HIDDEN", (8, 7, 6))


def lively(num=N, action_dim=2):
    """Critics whose ReLUs are not all off anywhere: a slope of zero has no direction."""
    critic = make(Critic, 3, action_dim, num)
    for layer in critic.layers:
        layer.bias.data.abs_().add_(0.2)
    return critic


def networks(num=N):
    """Actor, critics, other critics as their target, log α."""
    return [make(Actor, 3, 2), lively(num), lively(num), torch.tensor(-0.5, requires_grad=True)]


def slow_similarity(critic, obs, action, eps=1e-6):
    """(E3), (E4) at one transition: slopes by finite differences, cosines of all pairs i ≠ j one
    after the other."""
    num, slopes = len(critic.layers[0].weight), []
    for k in range(num):
        slope = []
        for i in range(len(action)):
            q = []
            for sign in (1, -1):
                moved = action.tolist()
                moved[i] += sign * eps
                q.append(slow_critic(critic, k, obs, moved))
            slope.append((q[0] - q[1]) / (2 * eps))
        slopes.append(slope)
    # a slope of zero has no direction
    norms = [math.sqrt(sum(v * v for v in slope)) or 1.0 for slope in slopes]
    total = 0.0
    for i in range(num):
        for j in range(num):
            if i != j:
                total += sum(u * v for u, v in zip(slopes[i], slopes[j])) / norms[i] / norms[j]
    return total / (num - 1)


class LinearCritic(nn.Module):
    """Q_k(s, a) = w_k · a: slopes that are known."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight))

    def forward(self, obs, action):
        return torch.einsum("kba,ka->kb", action, self.weight)


def loss_of(critic, batch, y, weight):
    """critic_loss for as many critics as there are."""
    return edac.critic_loss(critic, batch, y, len(next(critic.parameters())), weight)


def similarity(critic, batch):
    return loss_of(critic, batch, torch.zeros(len(batch.obs)), 1.0)[1]["similarity"]


# ---- losses against loops


def test_sample_action_equals_a_loop(monkeypatch):
    """(E1): tanh of a Gaussian with −5 ≤ log σ ≤ 2."""
    actor = make(Actor, 3, 2)
    obs = torch.randn(4, 3)
    draws = record_draws(monkeypatch, "randn_like")
    action, log_prob = edac.sample_action(*actor(obs))
    expected = [slow_sample(actor, obs[b], draws[0][b], -5.0) for b in range(4)]
    assert_close(action, [a for a, _ in expected])
    assert_close(log_prob, [lp for _, lp in expected], 1e-6)
    actor.net[-1].bias.data[2:] = torch.tensor([50.0, -50.0])
    assert_close(actor(obs)[1], [[2.0, -5.0]] * 4)


def test_soft_td_target_equals_a_loop(monkeypatch):
    """(E2): one action per next observation, the smallest of all N, minus α log π; nothing after a
    termination."""
    (actor, critic, *_), batch, expected, smallest = networks(), tiny_batch(), [], set()
    draws = record_draws(monkeypatch, "randn_like")
    y = edac.soft_td_target(actor, critic, torch.tensor(0.3), batch, 0.9)
    for b in range(4):
        action, log_prob = slow_sample(actor, batch.next_obs[b], draws[0][b], -5.0)
        q = [slow_critic(critic, k, batch.next_obs[b], action) for k in range(N)]
        smallest |= {q.index(min(q))}
        expected.append(float(batch.reward[b] + 0.9 * (0.0 if b == 1 else min(q) - 0.3 * log_prob)))
    assert len(smallest) > 1, "the minimum is each transition's own"
    assert_close(y, expected)
    assert not y.requires_grad


@pytest.mark.parametrize("weight", [0.0, 1.7])
def test_critic_loss_equals_a_loop(weight):
    """(E3) to (E5): squared errors summed over critics and averaged over transitions, plus η times
    the similarity."""
    critic, batch, y = networks()[1], tiny_batch(), torch.randn(4)
    q = [
        [slow_critic(critic, k, batch.obs[b], batch.action[b].tolist()) for b in range(4)]
        for k in range(N)
    ]
    squares = sum((q[k][b] - float(y[b])) ** 2 / 4 for k in range(N) for b in range(4))
    alike = sum(slow_similarity(critic, batch.obs[b], batch.action[b]) for b in range(4)) / 4
    loss, metrics = loss_of(critic, batch, y, weight)
    assert_close(loss, squares + weight * alike, 1e-6)
    assert_close(metrics.pop("q_data"), sum(map(sum, q)) / 4 / N)
    spread = [
        math.sqrt(sum((q[k][b] - sum(q[j][b] for j in range(N)) / N) ** 2 for k in range(N)) / N)
        for b in range(4)
    ]
    assert_close(metrics.pop("q_spread"), sum(spread) / 4)
    assert_close(
        torch.stack([*metrics.values()]) if metrics else torch.zeros(0),
        [alike] if weight else [],
        1e-6,
    )


def test_gradient_of_the_similarity():
    """(E4) trains the critics: its gradient against a finite difference of the finite
    differences."""
    critic, batch = networks(num=3)[1], tiny_batch()
    other = copy.deepcopy(critic)
    y = torch.randn(4)
    for net, weight in ((critic, 1.0), (other, 0.0)):
        loss_of(net, batch, y, weight)[0].backward()
    got = critic.layers[-1].weight.grad - other.layers[-1].weight.grad  # (K, 6, 1)
    assert got.abs().max() > 1e-2
    for k in range(3):
        for i in range(6):
            values = []
            for shift in (1e-4, -2e-4):
                critic.layers[-1].weight.data[k, i, 0] += shift
                values.append(
                    sum(slow_similarity(critic, batch.obs[b], batch.action[b]) for b in range(4))
                    / 4
                )
            critic.layers[-1].weight.data[k, i, 0] += 1e-4
            assert_close(got[k, i, 0], (values[0] - values[1]) / 2e-4, 1e-4)


def test_critic_loss_refuses_a_column_of_targets():
    """A target (B, 1) would silently compare every Q with every y."""
    for weight in (0.0, 1.0):
        with pytest.raises(AssertionError):
            loss_of(Critic(3, 2, N), tiny_batch(), torch.randn(4, 1), weight)


def test_actor_loss_equals_a_loop(monkeypatch):
    """(E6), the smallest of all N, and its gradient; (E7) on the same log π."""
    (actor, critic, *_), obs = networks(), torch.randn(4, 3)
    critic.layers[-1].bias.data[:2] += 10  # the smallest is none of the first two
    draws = record_draws(monkeypatch, "randn_like")
    loss, log_prob, q_policy = edac.actor_loss(actor, critic, torch.tensor(0.3), obs)
    loss.backward()

    def slow():
        samples = [slow_sample(actor, obs[b], draws[0][b], -5.0) for b in range(4)]
        q = [[slow_critic(critic, k, obs[b], samples[b][0]) for k in range(N)] for b in range(4)]
        return (
            sum(0.3 * samples[b][1] - min(q[b]) for b in range(4)) / 4,
            [lp for _, lp in samples],
            sum(map(sum, q)) / 4 / N,
        )

    for got, want in zip((loss, log_prob, q_policy), slow()):
        assert_close(got, want, 1e-6)
    assert_gradient(actor.net[-1].bias, lambda: slow()[0])
    assert not log_prob.requires_grad and not q_policy.requires_grad
    expected = sum(-0.7 * (lp - 2.0) for lp in slow()[1]) / 4
    assert_close(edac.entropy_coef_loss(torch.tensor(0.7), log_prob, -2.0), expected, 1e-6)


def test_act_is_the_mean_in_the_environments_units():
    """No noise at evaluation: mid + half · tanh(μ)."""
    actor, obs = make(Actor, 3, 2), torch.randn(4, 3)
    actor.action_mid, actor.action_half = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 3.0])
    means = [[math.tanh(u) for u in slow_mlp(actor.net, o)[:2]] for o in obs]
    assert_close(actor.act(obs), [[0.5 + 2 * a, -1 + 3 * b] for a, b in means])


def test_each_member_starts_as_a_network_of_its_own():
    """Weights within ±1/√in of one member, whatever N; no two members alike."""
    for num in (2, 50):
        weight = Critic(3, 2, num).layers[0].weight
        assert 0.9 < weight.abs().max() * math.sqrt(5) <= 1
        assert len(weight.flatten().unique()) == weight.numel()


# ---- the target


def test_termination_stops_the_bootstrap():
    """Where the task is over, y is the reward whatever s′, γ and α; the entropy after the end
    doesn't count either."""
    (actor, critic, *_), batch = networks(), tiny_batch(terminated=(1, 1, 1, 1))
    for gamma, alpha in ((0.5, 0.0), (0.99, 3.0)):
        assert torch.equal(
            edac.soft_td_target(actor, critic, torch.tensor(alpha), batch, gamma), batch.reward
        )


def test_the_minimum_of_n_falls_with_n():
    """Of N standard Gaussians per transition the smallest is −0.564 on average for N = 2 (−1/√π),
    −1.539 for N = 10."""
    batch = tiny_batch([0.0] * 100_000, action_dim=1)._replace(reward=torch.zeros(100_000))
    for num, expected in ((1, 0.0), (2, -1 / math.sqrt(math.pi)), (10, -1.5388)):
        q = torch.randn(num, 100_000)
        y = edac.soft_td_target(
            lambda obs: (torch.zeros(100_000, 1),) * 2,
            lambda obs, action, q=q: q,
            torch.tensor(0.0),
            batch,
            1.0,
        )
        assert_close(y.mean(), expected, 0.02)


# ---- the similarity


def test_equal_critics_have_similarity_n_and_opposite_ones_minus_n_over_n_minus_1():
    """All slopes alike: N. Two opposite ones: −2. Three at 120°: −3/2, the least that three can
    have."""
    critic, batch = networks()[1], tiny_batch()
    for parameter in critic.parameters():
        parameter.data.copy_(parameter.data[:1].clone().expand_as(parameter))
    assert_close(similarity(critic, batch), N)
    assert_close(similarity(LinearCritic([[1.0, 2.0], [-3.0, -6.0]]), batch), -2.0)
    three = [[math.cos(angle), math.sin(angle)] for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    assert_close(similarity(LinearCritic(three), batch), -1.5)


def test_linear_critics():
    """Q_k = w_k · a: mean over pairs of cos(w_i, w_j), times N; and its gradient by another
    road."""
    weight, batch = torch.randn(4, 2), tiny_batch()
    critic = LinearCritic(weight)
    cosines = [
        torch.nn.functional.cosine_similarity(weight[i], weight[j], dim=0)
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    assert_close(similarity(critic, batch), sum(cosines) / 3)
    loss = [loss_of(critic, batch, torch.zeros(4), eta)[0] for eta in (1.0, 0.0)]
    got = torch.autograd.grad(loss[0] - loss[1], critic.weight)[0]
    w = weight.clone().requires_grad_()
    unit = w / w.norm(dim=1, keepdim=True)
    assert_close(got, torch.autograd.grad(((unit @ unit.T).sum() - 4) / 3, w)[0])


def test_the_scale_of_a_critic_does_not_matter():
    """Multiply one critic's output by 1000: the same slopes' directions."""
    critic, batch = networks()[1], tiny_batch()
    before = similarity(critic, batch)
    for parameter in critic.layers[-1].parameters():
        parameter.data[2] *= 1000
    assert_close(similarity(critic, batch), before)


def test_a_flat_critic_breaks_nothing():
    """Where a critic has slope zero, its direction counts as zero, and every gradient is finite."""
    critic, batch = networks()[1], tiny_batch()
    critic.layers[-1].weight.data[1] = 0.0
    loss, _ = loss_of(critic, batch, torch.zeros(4), 1.0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in critic.parameters())
    assert_close(similarity(LinearCritic([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), batch), 1.0)


def test_with_one_action_dimension_there_is_nothing_to_turn():
    """A slope is up or down: the similarity has no gradient, and EDAC is SAC-N."""
    critic, batch, grads = lively(action_dim=1), tiny_batch(action_dim=1), []
    for weight in (0.0, 1.0):
        critic.zero_grad()
        loss_of(critic, batch, torch.zeros(4), weight)[0].backward()
        grads.append(flat_grad(critic))
    assert_close(*grads, 1e-5)  # the 1e-10 beside the norm leaves a trace


def test_the_similarity_makes_critics_different():
    """Minimised alone, from critics that are nearly alike, it turns their slopes apart; the data's
    action stays as it is."""
    critic, batch = lively(3), tiny_batch()
    for parameter in critic.parameters():
        parameter.data.copy_(
            parameter.data[:1].clone().expand_as(parameter) + 0.02 * torch.randn_like(parameter)
        )
    before, action = similarity(critic, batch), batch.action.clone()
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(40):
        loss, metrics = loss_of(critic, batch, torch.zeros(4), 1e3)
        edac.descend(loss, optimizer)
    assert before > 2 and metrics["similarity"] < 0
    assert torch.equal(batch.action, action) and not batch.action.requires_grad


# ---- SAC


def one_update(algorithm, nets, **args):
    torch.manual_seed(3)
    nets = copy.deepcopy(nets)
    if algorithm is edac:
        args["num_critics"] = len(nets[1].layers[0].weight)
    metrics = algorithm.update(
        algorithm.Args(batch_size=4, gamma=0.9, target_rate=0.3, **args),
        tiny_data(),
        *nets,
        *sgd(nets[0], nets[1], nets[3]),
    )
    return [flat(net) for net in nets[:3]] + [nets[3].detach()], metrics


def test_two_critics_and_no_diversity_are_sac():
    """N = 2, η = 0: one update moves everything as sac.py's does."""
    nets = networks(num=2)
    (ours, metrics), (sacs, expected) = (
        one_update(edac, nets, diversity_weight=0.0),
        one_update(sac, nets),
    )
    for got, want in zip(ours, sacs):
        assert_close(got, want, 1e-12)
    assert metrics.pop("q_spread") > 0
    assert metrics.keys() == expected.keys() and all(
        torch.equal(metrics[name], expected[name]) for name in metrics
    )


def test_one_critic_is_sac_without_the_minimum():
    """N = 1, η = 0: as sac.py with two equal critics, between which the minimum has no choice."""
    nets = networks(num=1)
    twins = copy.deepcopy(nets)
    for critic in twins[1:3]:
        for layer in critic.layers:
            for name in ("weight", "bias"):
                setattr(layer, name, nn.Parameter(getattr(layer, name).data.repeat(2, 1, 1)))
    (ours, metrics), (sacs, expected) = (
        one_update(edac, nets, diversity_weight=0.0),
        one_update(sac, twins),
    )
    assert_close(ours[0], sacs[0], 1e-12)
    assert_close(ours[3], sacs[3], 1e-12)
    for i in (1, 2):
        first = torch.cat(
            [
                part.reshape(2, -1)[0]
                for part in torch.split(sacs[i], [p.numel() for p in twins[i].parameters()])
            ]
        )
        assert_close(ours[i], first, 1e-12)
    assert_close(2 * metrics["critic_loss"], expected["critic_loss"])


def test_diversity_changes_the_critics_only():
    """Another η: another critic; the loss reported contains it; the similarity is reported where it
    is paid for."""
    nets = networks()
    (plain, without), (diverse, with_it) = (
        one_update(edac, nets, diversity_weight=eta) for eta in (0.0, 2.0)
    )
    assert "similarity" not in without
    assert_close(with_it["critic_loss"] - without["critic_loss"], 2 * with_it["similarity"])
    assert not torch.equal(plain[1], diverse[1]) and torch.equal(plain[3], diverse[3])


# ---- the update


def sgd(actor, critic, log_alpha, lr=0.01):
    return [
        torch.optim.SGD(params, lr=lr)
        for params in (actor.parameters(), critic.parameters(), [log_alpha])
    ]


def test_update_is_the_algorithm_box():
    """Q, then π on the new Q, then α, each with the old α; then (E8), exactly."""
    args = Args(batch_size=4, gamma=0.9, target_rate=0.3, num_critics=N, diversity_weight=0.8)
    data, nets = tiny_data(), networks()
    actor, critic, critic_target, log_alpha = copy.deepcopy(nets)
    optimizers = sgd(nets[0], nets[1], nets[3])
    for seed in range(2):  # twice, so that no gradient is left over
        torch.manual_seed(seed)
        metrics = edac.update(args, data, *nets, *optimizers)

        torch.manual_seed(seed)
        batch, alpha = data.sample(4), log_alpha.detach().exp()
        y = edac.soft_td_target(actor, critic_target, alpha, batch, 0.9)
        q_loss, watched = edac.critic_loss(critic, batch, y, N, 0.8)
        q_grad = step_by_hand(q_loss, list(critic.parameters()), 0.01)
        pi_loss, log_prob, q_policy = edac.actor_loss(actor, critic, alpha, batch.obs)
        step_by_hand(pi_loss, list(actor.parameters()), 0.01)
        log_alpha.data += 0.01 * (log_prob.mean() - 2)
        for t, o in zip(critic_target.parameters(), critic.parameters()):
            t.data = 0.7 * t.data + 0.3 * o.data
        for got, want in zip(nets, (actor, critic, critic_target)):
            assert_close(flat(got), flat(want), 1e-12)
        assert_close(nets[3], log_alpha, 1e-12)
        # the actor's step adds nothing to the critic's gradient
        assert_close(flat_grad(nets[1]), q_grad, 1e-12)
        expected = dict(
            critic_loss=q_loss,
            q_policy=q_policy,
            entropy=-log_prob.mean(),
            entropy_coef=alpha,
            **watched,
        )
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(metrics[name], value, 1e-12)
    assert all(p.grad is None for p in nets[2].parameters())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_train_moves_every_part_each_step(monkeypatch, weight):
    """Actor, critics, target and α, from a target that starts as a copy and α = 1; N critics, all
    different."""
    run = silent_train(
        monkeypatch,
        edac,
        tiny_data(),
        steps=3,
        batch_size=4,
        num_critics=3,
        diversity_weight=weight,
        actor_lr=0.1,
        critic_lr=0.2,
    )
    assert run.variant == ("" if weight else "-sac-n")
    for name in ("actor", "critic", "critic_target", "log_entropy_coef"):
        assert run.steps_that_moved(name) == [1, 2, 3]
    assert torch.equal(run.history[0]["critic"], run.history[0]["critic_target"])
    assert not torch.equal(run.history[3]["critic"], run.history[3]["critic_target"])
    assert run.history[0]["log_entropy_coef"] == 0
    first = run.state["critic"].layers[0].weight
    assert (
        len(first) == 3
        and not torch.equal(first[0], first[1])
        and not torch.equal(first[1], first[2])
    )
    assert_close(
        torch.stack([run.actor.action_mid, run.actor.action_half]), [[0.5, 0.5], [1.0, 2.0]]
    )
    assert [
        run.state[f"{name}_optimizer"].param_groups[0]["lr"]
        for name in ("actor", "critic", "entropy")
    ] == [0.1, 0.2, 0.1]


def test_too_few_critics_are_refused(monkeypatch, capsys):
    """A pair takes two; SAC-N needs one."""
    for num, weight in ((1, 1.0), (0, 0.0), (0, 1.0)):
        with pytest.raises(SystemExit) as stop:
            edac.train(Args(num_critics=num, diversity_weight=weight))
        assert stop.value.code == 2 and "--num-critics" in capsys.readouterr().err
    assert silent_train(
        monkeypatch, edac, tiny_data(), steps=1, batch_size=4, num_critics=1, diversity_weight=0.0
    ).actor


# ---- tuned settings


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["edac.py", *arguments])
    return parse_args(Args, edac.TUNED)


def test_tuned_values_fill_what_the_user_leaves_open(monkeypatch, capsys):
    """A suite dataset brings its own N and η, and says so; a flag stands."""
    args = parse(monkeypatch, "--env", "walker2d-medium-expert")
    assert (args.num_critics, args.diversity_weight) == (10, 5.0)
    assert "--diversity-weight 5.0" in capsys.readouterr().out
    args = parse(
        monkeypatch, "--env", "hopper-medium", "--diversity-weight", "0", "--num-critics", "500"
    )
    assert (args.num_critics, args.diversity_weight) == (500, 0.0) and capsys.readouterr().out == ""
    assert parse(monkeypatch, "--env", "hopper-medium").num_critics == 50
    assert parse(monkeypatch, "--env", "pendulum-medium") == Args(env="pendulum-medium")


# ---- what many critics change


def disagreement(num, weight, seed):
    """One state; data actions in [−0.2, 0.2]² earn nothing. How far the smallest Q falls from the
    data to the border."""
    torch.manual_seed(seed)
    data = tiny_data(256)
    data.obs = data.next_obs = torch.zeros(256, 3)
    data.reward = data.terminated = torch.zeros(256)
    data.action = 0.4 * torch.rand(256, 2) - 0.2
    critic = Critic(3, 2, num)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(150):
        batch = data.sample(32)
        edac.descend(loss_of(critic, batch, batch.reward, weight)[0], optimizer)
    angles = torch.arange(64) * (2 * math.pi / 64)
    border = 0.9 * torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.no_grad():
        far = critic(torch.zeros(64, 3), border).min(dim=0).values.mean()
        return float(critic(torch.zeros(1, 3), torch.zeros(1, 2)).min() - far)


def test_the_minimum_falls_off_the_data_more_with_more_critics_and_with_diversity(monkeypatch):
    """All is worth 0. Off the data, where nobody said so, the smallest Q is lower with N, and with
    η at the same N."""
    monkeypatch.setattr(edac, "HIDDEN", (32, 32))
    two, twenty, diverse = (sum(disagreement(num, weight, seed) for seed in range(2)) / 2
                            for num, weight in ((2, 0.0), (20, 0.0), (2, 1.0)))
    assert 0 < two < twenty
    assert diverse > 1.5 * two


def test_members_agree_where_all_of_them_are_wrong(monkeypatch):
    """The notes' "too little diversity": r = −10 ‖a‖², seen for a in [−0.2, 0.2]² alone. Ten
    networks continue it in the same way, so beside the data their spread is far below their error;
    only on the data is a member about as wrong as it seems."""
    monkeypatch.setattr(edac, "HIDDEN", (32, 32))
    torch.manual_seed(0)
    data = tiny_data(512)
    data.obs = data.next_obs = torch.zeros(512, 3)
    data.terminated = torch.zeros(512)
    data.action = 0.4 * torch.rand(512, 2) - 0.2
    data.reward = -10 * data.action.pow(2).sum(dim=1)
    critic = Critic(3, 2, 10)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(600):
        batch = data.sample(64)
        edac.descend(loss_of(critic, batch, batch.reward, 0.0)[0], optimizer)
    angles = torch.arange(64) * (2 * math.pi / 64)
    found = {}
    for radius in (0.1, 0.9):
        with torch.no_grad():
            # (K, 64)
            q = critic(
                torch.zeros(64, 3), radius * torch.stack([angles.cos(), angles.sin()], dim=1)
            )
        found[radius] = float(q.std(dim=0).mean()), float((q + 10 * radius**2).pow(2).mean().sqrt())
    spread, error = found[0.9]
    assert error > 1 and spread < error / 3
    spread, error = found[0.1]
    assert error < 0.1 and spread > error / 3
