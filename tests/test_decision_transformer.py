"""Decision Transformer against a slow transformer, and what makes it one: causality, padding,
returns-to-go, memory."""
import copy
import json
import math

import common

import decision_transformer as dt
import numpy as np
import pytest
import torch
from decision_transformer import Actor, Args, Player, Window
from helpers import (
    assert_close,
    assert_gradient,
    flat,
    make,
    silent_train,
    slow_dense,
    tiny_data,
)


@pytest.fixture(autouse=True)
def small(exact, monkeypatch):
    """Windows of 4 steps, two narrow layers with two heads, in float64; nobody plays 100
    episodes."""
    for name, value in dict(CONTEXT=4, WIDTH=6, LAYERS=2, HEADS=2, MAX_STEPS=9).items():
        monkeypatch.setattr(dt, name, value)
    monkeypatch.setattr(dt, "evaluate", lambda *_: np.zeros(1))


def window(lengths=(4, 2, 1), steps=4, obs_dim=3, action_dim=2):
    """Random windows that have so many real steps, at random times; the padding on their left is
    random too."""
    num, real = len(lengths), torch.arange(steps) >= steps - torch.tensor(lengths)[:, None]
    return Window(
        torch.randn(num, steps, obs_dim),
        2 * torch.rand(num, steps, action_dim) - 1,
        torch.randn(num, steps),
        torch.randint(9, (num, steps)),
        real,
    )


def bold(*dims):
    """An actor in which every layer matters: GPT-2's initial weights are too small for that."""
    actor = make(Actor, *dims, scale=1.5)
    for block in actor.blocks:
        for layer in (block.query_key_value, block.merge, block.widen, block.narrow):
            layer.weight.data.normal_(), layer.bias.data.normal_()
    for module in actor.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.bias.data.normal_(std=0.3), module.weight.data.normal_()
    return actor


# ---- the network


def slow_norm(norm, x):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(variance + 1e-5) * w + b for v, w, b in
            zip(x, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


def slow_layer(layer, x):
    return slow_dense(x, layer.weight.tolist(), layer.bias.tolist())


def slow_actions(actor, w, b):
    """(E3) to (E6) of one window, token by token: the actions of its real steps only, (K, A) with
    None for padding."""
    tokens, is_real = [], []
    for i in range(len(w.to_go[b])):
        when = actor.embed_step.weight[w.step[b, i]].tolist()
        for layer, x in (
            (actor.embed_to_go, [w.to_go[b, i].item()]),
            (actor.embed_obs, w.obs[b, i].tolist()),
            (actor.embed_action, w.action[b, i].tolist()),
        ):
            tokens.append(
                slow_norm(
                    actor.norm_tokens,
                    [u + v for u, v in zip(slow_layer(layer, x), when, strict=True)],
                )
            )
            is_real.append(bool(w.real[b, i]))
    width = len(tokens[0])
    size = width // dt.HEADS
    for block in actor.blocks:
        parts = [
            slow_layer(block.query_key_value, slow_norm(block.norm_attention, x)) for x in tokens
        ]
        after = []
        for m, x in enumerate(tokens):
            found = []
            for head in range(dt.HEADS):
                at = [n for n in range(m + 1) if is_real[n]] or [m]
                starts = [j * width + head * size for j in range(3)]
                query, key, value = (
                    [part[start : start + size] for part in parts] for start in starts
                )
                weight = [
                    math.exp(sum(q * k for q, k in zip(query[m], key[n])) / math.sqrt(size))
                    for n in at
                ]
                found += [
                    sum(u * value[n][d] for u, n in zip(weight, at)) / sum(weight)
                    for d in range(size)
                ]
            x = [u + v for u, v in zip(x, slow_layer(block.merge, found))]
            inner = [max(v, 0) for v in slow_layer(block.widen, slow_norm(block.norm_mlp, x))]
            after.append([u + v for u, v in zip(x, slow_layer(block.narrow, inner))])
        tokens = after
    return [
        [
            math.tanh(u)
            for u in slow_layer(actor.head, slow_norm(actor.norm_final, tokens[3 * i + 1]))
        ]
        if is_real[3 * i]
        else None
        for i in range(len(tokens) // 3)
    ]


def test_the_transformer_equals_a_slow_one():
    """(E3) to (E6), windows with and without padding."""
    actor, w = bold(3, 2), window()
    got = actor(w)
    assert got.shape == (3, 4, 2) and got.std() > 0.3
    for b in range(3):
        want = slow_actions(actor, w, b)
        assert [row is not None for row in want] == w.real[b].tolist()
        assert_close(got[b][w.real[b]], [row for row in want if row is not None])


def test_action_loss_equals_a_loop():
    """(E7) with its gradient: an average over the 7 real steps of the three windows and over action
    dimensions."""
    actor, w = bold(3, 2), window()

    def slow():
        errors = [
            (u - v) ** 2
            for b in range(3)
            for row, truth in zip(slow_actions(actor, w, b), w.action[b].tolist())
            if row
            for u, v in zip(row, truth, strict=True)
        ]
        assert len(errors) == 14
        return sum(errors) / 14

    loss = dt.action_loss(actor, w, 0.0)
    loss.backward()
    assert_close(loss, slow())
    assert_gradient(actor.head.bias, slow)
    assert_gradient(actor.embed_to_go.bias, slow)


def test_padding_has_no_gradient_and_no_nan():
    """A window of one real step: its padding sees nothing but itself, and changes neither loss nor
    gradient."""
    actor, w = bold(3, 2), window(lengths=(1,))
    gradients = []
    for scale in (1.0, 100.0):
        actor.zero_grad()
        padded = w._replace(
            obs=torch.where(w.real[..., None], w.obs, scale * w.obs),
            action=torch.where(w.real[..., None], w.action, -10 * scale),
        )
        dt.action_loss(actor, padded, 0.0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in actor.parameters()]))
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0
    assert_close(gradients[0], gradients[1], 1e-12)


def test_loss_refuses_actions_of_another_shape():
    actor, w = bold(3, 2), window()
    with pytest.raises(AssertionError):
        dt.action_loss(lambda *_: actor(w)[..., :1], w, 0.0)


def test_causality_bit_for_bit():
    """Neither the action of step t nor anything later touches what is said up to t; return-to-go
    and observation of t do."""
    actor, w = bold(3, 2), window(lengths=(4, 4))
    before = actor(w)
    for t in range(4):
        later = w._replace(
            **{name: getattr(w, name).clone() for name in ("obs", "action", "to_go", "step")}
        )
        later.action[:, t:] = torch.randn(2, 4 - t, 2)
        later.obs[:, t + 1:], later.to_go[:, t + 1:], later.step[:, t + 1:] = 9.0, -9.0, 1
        after = actor(later)
        assert torch.equal(after[:, :t + 1], before[:, :t + 1])
        assert t == 3 or (after[:, t + 1:] != before[:, t + 1:]).all()
        for name in ("obs", "to_go", "step"):
            changed = getattr(w, name).clone()
            changed[:, t] = (changed[:, t] + 1) % 9 if name == "step" else changed[:, t] + 1
            assert (
                (actor(w._replace(**{name: changed})) != before).all(dim=2)
                == (torch.arange(4) >= t)
            ).all()


def test_what_tokens_see():
    """(E4), the docstring's picture: a window of four steps, of which two are real; padding sees
    only itself."""
    seen = dt.visible_tokens(torch.tensor([[False, False, True, True], [True] * 4]))
    assert seen.shape == (2, 1, 12, 12) and seen.dtype == torch.bool
    for m in range(12):
        assert seen[0, 0, m].nonzero()[:, 0].tolist() == (list(range(6, m + 1)) if m >= 6 else [m])
        assert seen[1, 0, m].nonzero()[:, 0].tolist() == list(range(m + 1))


def test_past_actions_are_seen():
    """Step t + 1 reads the action of t: a return-to-go and an observation alone would be a reactive
    policy."""
    actor, w = bold(3, 2), window(lengths=(4,))
    changed = w.action.clone()
    changed[:, 1] += 1
    assert (
        (actor(w) != actor(w._replace(action=changed))).all(dim=2)
        == torch.tensor([False, False, True, True])
    ).all()


def test_more_padding_changes_nothing():
    """The same windows with five more steps of arbitrary padding on the left."""
    actor, w, extra = bold(3, 2), window(), window(lengths=(0, 0, 0), steps=5)
    wide = Window(*(torch.cat([pad, part], dim=1) for pad, part in zip(extra, w)))
    assert_close(actor(wide)[:, 5:][w.real], actor(w)[w.real], 1e-12)


def test_the_time_in_the_episode_counts():
    """The same observations two steps later in an episode are another situation."""
    actor, w = bold(3, 2), window(lengths=(4,))
    early, late = (actor(w._replace(step=torch.arange(4)[None] + shift)) for shift in (0, 2))
    assert (early != late).all()


def test_dropout_only_where_asked_for():
    """In the loss with this rate, in three kinds of places; without an argument there is none."""
    actor, w = bold(3, 2), window()
    assert torch.equal(actor(w), actor(w)) and torch.equal(actor.train()(w), actor.eval()(w))
    one, two = (dt.action_loss(actor, w, 0.3) for _ in range(2))
    assert one != two and one != dt.action_loss(actor, w, 0.0)


def test_every_dropout_is_there(monkeypatch):
    """Once on the tokens; in each layer on the attention weights and on what each half adds: with
    this rate."""
    rates = []
    drop = torch.nn.functional.dropout
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(dt.F, "dropout", lambda x, p: rates.append((x.shape[1:], p)) or drop(x, p))
    monkeypatch.setattr(
        dt.F,
        "scaled_dot_product_attention",
        lambda *a, attn_mask, dropout_p: (
            rates.append(("attention", dropout_p))
            or attend(*a, attn_mask=attn_mask, dropout_p=dropout_p)
        ),
    )
    dt.action_loss(bold(3, 2), window(), 0.3)
    layer = [("attention", 0.3), ((12, 6), 0.3), ((12, 6), 0.3)]
    assert rates == [((12, 6), 0.3)] + 2 * layer


def test_parameter_count_is_the_official_ones_but_for_what_is_unused(monkeypatch):
    """727,695 in the official model for hopper: less its heads for state and return and its word
    embedding, it is ours [D1]."""
    for name, value in dict(WIDTH=128, LAYERS=3, HEADS=1, MAX_STEPS=1000).items():
        monkeypatch.setattr(dt, name, value)
    assert len(flat(Actor(11, 3))) == 726_019 == 727_695 - (11 * 128 + 11) - 129 - 128


def test_blocks_start_as_gpt_2_and_the_rest_as_pytorch(monkeypatch):
    """N(0, 0.02²) and zero biases in the blocks; the embeddings and the head are far larger."""
    monkeypatch.setattr(dt, "WIDTH", 64)
    actor = Actor(11, 3)
    for block in actor.blocks:
        for layer in (block.query_key_value, block.merge, block.widen, block.narrow):
            assert 0.019 < layer.weight.std() < 0.021 and not layer.bias.any()
    assert actor.head.weight.std() > 0.06 and actor.embed_obs.weight.std() > 0.1
    assert 0.9 < actor.embed_step.weight.std() < 1.1


# ---- the data


def episodes_data(*rewards, terminated=()):
    """An episode for each list of rewards; a time limit ends those that are not in `terminated`."""
    data = tiny_data(sum(map(len, rewards)))
    data.reward[:] = torch.tensor([r for episode in rewards for r in episode])
    data.terminated.zero_(), data.truncated.zero_()
    for i, last in enumerate(np.cumsum([len(episode) for episode in rewards]) - 1):
        (data.terminated if i in terminated else data.truncated)[last] = True
    return data


def test_returns_to_go():
    """(E1): (1, 2, 3) is (6, 5, 3), whichever way episodes end, not discounted, and nothing of the
    next one."""
    data = episodes_data([1, 2, 3], [10], [-1, 0, 0, 5], terminated=(1,))
    places = dt.find_places(data, 1.0)
    assert_close(places.to_go, [6.0, 5, 3, 10, 4, 5, 5, 5])
    assert places.step.tolist() == [0, 1, 2, 0, 0, 1, 2, 3] and places.step.dtype == torch.long
    assert places.stop.tolist() == [3, 3, 3, 4, 8, 8, 8, 8]
    assert_close(dt.find_places(data, 10.0).to_go, places.to_go / 10)


def test_late_steps_share_the_last_number():
    """MAX_STEPS = 9 embeddings: step 9 and 10 of an episode count as step 8."""
    places = dt.find_places(episodes_data([0.0] * 11), 1.0)
    assert places.step.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8]


def test_a_cut_off_episode_at_the_end_is_left_out(capsys):
    """Its returns-to-go would be too small. Data that have nothing else are refused."""
    data = episodes_data([1, 2], [3, 4, 5])
    data.truncated[4] = False
    dt.drop_fragment(data)
    assert len(data.obs) == len(data.reward) == len(data.truncated) == data.size == 2
    dt.drop_fragment(data)
    assert len(data.obs) == 2
    data.truncated[1] = False
    with pytest.raises(SystemExit):
        dt.drop_fragment(data)
    assert "no complete episode" in capsys.readouterr().err


def test_windows_equal_a_loop():
    """(E2): up to four rows from a start on, ending with the episode, at the right of the window;
    zeros before."""
    data = episodes_data([1, 2, 3], [4] * 6, [7])
    places = dt.find_places(data, 1.0)
    rows = torch.cat([data.obs, data.action, places.to_go[:, None], places.step[:, None]], dim=1)
    torch.manual_seed(1)
    w = dt.sample_windows(data, places, 50)
    torch.manual_seed(1)
    starts = torch.randint(10, (50,)).tolist()
    assert set(starts) == set(range(10))
    for b, start in enumerate(starts):
        kept = list(range(start, min(start + 4, 3 if start < 3 else 9 if start < 9 else 10)))
        pad = 4 - len(kept)
        assert w.real[b].tolist() == [False] * pad + [True] * len(kept)
        zeros = torch.zeros(pad, rows.shape[1])
        got = torch.cat([w.obs[b], w.action[b], w.to_go[b][:, None], w.step[b][:, None]], dim=1)
        assert_close(got, torch.cat([zeros, rows[kept]]), 1e-12)
    assert w.step.dtype == torch.long and w.real.dtype == torch.bool


def test_episodes_are_drawn_by_length():
    """Lengths 1 and 9: one window in ten is of the first; all starts are equally likely, and the
    last has one real step."""
    data = episodes_data([100.0], [1.0] * 9)
    w = dt.sample_windows(data, dt.find_places(data, 1.0), 20_000)
    first = w.to_go[torch.arange(20_000), w.real.int().argmax(dim=1)]
    counts = [(first == value).double().mean().item() for value in (100, 9, 8, 7, 6, 5, 4, 3, 2, 1)]
    assert max(abs(count - 0.1) for count in counts) < 0.01
    assert (w.real.sum(1)[first == 1] == 1).all() and (w.real.sum(1)[first == 9] == 4).all()


# ---- the update


def test_update_is_one_clipped_step():
    """A gradient longer than clip_norm is shortened to it, one that is shorter stays; twice, with
    dropout's own draws."""
    data = tiny_data()
    places = dt.find_places(data, 1.0)
    for clip_norm in (0.01, 1e3):
        args, actor = Args(batch_size=5, dropout=0.2, clip_norm=clip_norm), bold(3, 2)
        by_hand, optimizer = copy.deepcopy(actor), torch.optim.SGD(actor.parameters(), lr=0.1)
        for seed in range(2):
            torch.manual_seed(seed)
            metrics = dt.update(args, data, places, actor, optimizer)

            torch.manual_seed(seed)
            loss = dt.action_loss(by_hand, dt.sample_windows(data, places, 5), 0.2)
            grads = torch.autograd.grad(loss, list(by_hand.parameters()))
            norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
            assert (norm > 0.1) and norm < 1e3
            for parameter, grad in zip(by_hand.parameters(), grads):
                parameter.data -= 0.1 * min(1, clip_norm / norm) * grad
            assert_close(flat(actor), flat(by_hand), 1e-6)
            assert_close(metrics["action_loss"], loss, 1e-6)


def test_train_warms_up_and_decays_every_parameter(monkeypatch):
    """(E8): 1/4, 2/4, 3/4, 1, 1 of the learning rate; AdamW's decay on all."""
    rates, plain_update = [], dt.update

    def watched(args, data, places, actor, optimizer):
        group, = optimizer.param_groups
        rates.append(float(group["lr"]))
        assert type(optimizer) is torch.optim.AdamW and group["weight_decay"] == 0.03
        assert len(group["params"]) == len(list(actor.parameters()))
        return plain_update(args, data, places, actor, optimizer)

    monkeypatch.setattr(dt, "update", watched)
    run = silent_train(
        monkeypatch,
        dt,
        tiny_data(),
        steps=5,
        batch_size=4,
        actor_lr=0.2,
        warmup_steps=4,
        weight_decay=0.03,
    )
    assert_close(rates, [0.05, 0.1, 0.15, 0.2, 0.2])
    assert run.steps_that_moved("actor") == [1, 2, 3, 4, 5]


def test_train_standardises_without_a_floor_and_asks_for_the_best(monkeypatch, capsys):
    """The finished actor holds units, scale and the best return of a complete episode; the second
    request is half of it."""
    data = episodes_data([1, 2, 3], [8, 8, 8], [9] * 6)
    data.truncated[-1] = False  # the best is cut off
    raw = data.obs[:6].clone()
    asked = []
    monkeypatch.setattr(
        dt,
        "evaluate",
        lambda player, *rest: asked.append((player.target, rest)) or np.array([5.0, 7.0]),
    )
    actor = silent_train(
        monkeypatch, dt, data, steps=1, batch_size=4, final_episodes=7, return_scale=50.0
    ).actor
    assert_close(actor.obs_mean, raw.mean(0))
    assert_close(actor.obs_std, raw.std(0, correction=0) + 1e-6, 1e-12)
    assert_close(data.obs, (raw - actor.obs_mean) / actor.obs_std)
    (
        assert_close(actor.action_mid, data.action_mid),
        assert_close(actor.action_half, data.action_half),
    )
    assert actor.target_return == 24 and actor.return_scale == 50
    (target, (env_spec, episodes, seed, device)), = asked
    assert (target, common.env_id(env_spec), episodes, seed) == (12.0, "Pendulum-v1", 7, 10**9)
    assert (
        "asks for a return of 24.0" in (said := capsys.readouterr().out)
        and "asked for 12.0: return 6.0 ± 1.0" in said
    )


@pytest.mark.parametrize("target, second", [(30.0, 15.0), (-30.0, -60.0)])
def test_the_users_target_stands(monkeypatch, target, second):
    """Of costs the modest second request is twice, not half."""
    asked = []
    monkeypatch.setattr(
        dt, "evaluate", lambda player, *rest: asked.append(player.target) or np.zeros(1)
    )
    actor = silent_train(
        monkeypatch, dt, tiny_data(), steps=1, batch_size=4, target_return=target
    ).actor
    assert actor.target_return == target and asked == [second]


def test_without_an_environment_nothing_is_played(monkeypatch):
    asked = []
    monkeypatch.setattr(
        dt, "evaluate", lambda player, *rest: asked.append(player.target) or np.zeros(1)
    )
    data = tiny_data()
    data.env_spec = None
    silent_train(monkeypatch, dt, data, steps=1, batch_size=4)
    assert not asked


def test_targets_of_the_suite():
    assert {
        name: tuned["target_return"]
        for name, tuned in dt.TUNED.items()
        if name.endswith("medium-replay")
    } == {
        "hopper-medium-replay": 3600,
        "halfcheetah-medium-replay": 12000,
        "walker2d-medium-replay": 5000,
    }
    assert len(dt.TUNED) == 15


# ---- acting


class Listener(torch.nn.Module):
    """Stands in for the actor: keeps each window it is shown, and always says the same for a last
    step."""

    def __init__(self, inner=None):
        super().__init__()
        self.seen, self.inner = [], inner
        self.obs_mean, self.obs_std = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 4])
        self.action_mid, self.action_half = torch.tensor([0.5, -1]), torch.tensor([2.0, 3])
        self.return_scale = torch.tensor(2.0)

    def forward(self, w):
        self.seen.append(Window(*(part.clone() for part in w)))
        return self.inner(w) if self.inner else torch.tensor([0.5, -0.5]).expand(*w.to_go.shape, 2)


def play(player, steps, episodes=1, reward=1.0, ends=()):
    """Starts it, calls it and tells it a reward of 1 each time, `steps` times; `ends` holds (time,
    episode) of terminations."""
    alive, said = list(range(episodes)), []
    player.start(episodes)
    for t in range(steps):
        obs = torch.arange(3.0) + 10 * t + 100 * torch.arange(episodes)[:, None]
        said.append(player(obs))
        for i in tuple(alive):
            player.record(i, reward * (i + 1))
            if (t, i) in ends:
                alive.remove(i)
    return said


def test_the_memory_is_a_sliding_window():
    """Six steps with K = 4: standardised observations, own actions and rewards so far, the times in
    the episode."""
    listener = Listener()
    said = play(Player(listener, 6.0), 6, episodes=2)
    assert_close(said[0], [[0.5 + 2 * 0.5, -1 - 3 * 0.5]] * 2)
    for t, w in enumerate(listener.seen):
        times = list(range(max(0, t - 3), t + 1))
        assert (
            w.step.tolist() == [times, times] and w.real.all() and w.real.shape == (2, len(times))
        )
        for i in range(2):
            raw = torch.stack([torch.arange(3.0) + 10 * u + 100 * i for u in times])
            assert_close(w.obs[i], (raw - listener.obs_mean) / listener.obs_std)
            # 6, then 5, ... of scale 2
            assert_close(w.to_go[i], [(6.0 - u * (i + 1)) / 2 for u in times])
            assert_close(w.action[i], [[0.5, -0.5]] * (len(times) - 1) + [[0.0, 0.0]])


def test_acting_equals_predicting_with_the_whole_story():
    """What the player says at t is what the network says of the last K steps as they went, padded
    as in training."""
    actor = bold(3, 2)
    player = actor.act
    player.target = 3.0
    listener = player.actor = Listener(actor)
    said = [
        (action - listener.action_mid) / listener.action_half
        for action in play(player, 7, episodes=2)
    ]
    assert torch.stack(said).std() > 0.3
    for t in range(7):
        w, length = listener.seen[t], min(t + 1, 4)
        padded = Window(
            *(
                torch.cat([part.new_zeros(2, 4 - length, *part.shape[2:]), part], dim=1)
                for part in w
            )
        )
        assert_close(actor(padded)[:, -1], said[t], 1e-10)
        if t:
            assert_close(w.action[:, -2], said[t - 1], 1e-12)


def test_start_empties_the_memory():
    """One that ended earlier is carried along, its request stays; then a new start, also with
    another number."""
    listener = Listener()
    player = Player(listener, 6.0)
    play(player, 3, episodes=2, ends={(0, 0)})
    assert [w.obs.shape[1] for w in listener.seen] == [1, 2, 3]
    assert_close(listener.seen[2].to_go, [[3.0, 2.5, 2.5], [3.0, 2.0, 1.0]])
    play(player, 2, episodes=3)
    assert [tuple(w.to_go.shape) for w in listener.seen[3:]] == [(3, 1), (3, 2)]
    assert_close(listener.seen[3].to_go, [[3.0]] * 3)
    assert listener.seen[3].step.tolist() == [[0]] * 3


def test_times_beyond_the_embedding():
    """Step 9 and later count as step 8, as in the data."""
    listener = Listener()
    play(Player(listener, 6.0), 11)
    assert listener.seen[-1].step.tolist() == [[7, 8, 8, 8]]


@pytest.mark.parametrize("dtype", ["float64", ">f8"])
def test_arrays_of_any_type_order_and_stride(dtype):
    player = bold(3, 2).act
    obs = np.arange(6, dtype=dtype).reshape(2, 3)
    said = []
    for array in (obs[::-1], np.float32([[3, 4, 5], [0, 1, 2]])):
        player.start(2)
        said.append(player(array))
    assert_close(*said)


def test_a_saved_policy_is_complete():
    """Units, request and scale travel with the weights; acting draws no random numbers."""
    actor = bold(3, 2)
    actor.target_return.fill_(7.0), actor.return_scale.fill_(3.0)
    actor.obs_mean, actor.action_half = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 3])
    copied = Actor(3, 2)
    copied.load_state_dict(actor.state_dict())
    before = torch.get_rng_state()
    one, two, other = play(actor.act, 6), play(copied.act, 6), play(Player(actor, 1.0), 6)
    assert torch.equal(torch.stack(one), torch.stack(two)) and not torch.equal(
        torch.stack(one), torch.stack(other)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(action.requires_grad for action in one)


def test_act_is_one_player_and_a_copy_of_the_actor_has_its_own():
    """actor.act(obs) at each step plays as act = actor.act does; what a copy plays and learns
    leaves the original alone."""
    actor = bold(3, 2)
    actor.target_return.fill_(7.0)
    assert actor.act is actor.act and actor.act.actor is actor
    want, said = play(actor.act, 6), []
    actor.act.start(1)
    for t in range(6):
        said.append(actor.act(torch.arange(3.0)[None] + 10 * t))
        actor.act.record(0, 1.0)
    assert torch.equal(torch.stack(said), torch.stack(want))
    copied = copy.deepcopy(actor)
    assert copied.act is not actor.act and copied.act.actor is copied
    assert torch.equal(copied.act.obs, actor.act.obs) and copied.act.time == 6
    copied.head.bias.data += 1
    copied.target_return.fill_(-7.0)
    assert not torch.equal(torch.stack(play(copied.act, 6)), torch.stack(want))
    assert torch.equal(torch.stack(play(actor.act, 6)), torch.stack(want))


def test_without_a_start_it_refuses():
    """Rather than play another policy in silence."""
    player = bold(3, 2).act
    with pytest.raises(ValueError, match="call start"):
        player(torch.zeros(2, 3))
    player.start(2)
    player(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="call start"):
        player(torch.zeros(3, 3))


def test_load_policy_acts_like_the_run(monkeypatch, minari_root, tmp_path):
    """The loaded policy earns, to the digit, what the run's own first evaluation did, and then
    again; also by hand, with act.start and act.record; without start after the first episode, when
    its memory is not empty, it is another policy."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(dt, "evaluate", common.evaluate)
    dt.train(
        Args(
            env="pendulum-medium",
            steps=30,
            batch_size=16,
            actor_lr=1e-3,
            warmup_steps=1,
            eval_every=30,
            eval_episodes=3,
            final_episodes=1,
            device="cpu",
            out=str(tmp_path),
        )
    )
    folder = tmp_path / "decision_transformer" / "pendulum-medium" / "seed0"
    want = json.loads((folder / "result.json").read_text())["curve"][0]["returns"]
    act, saved = common.load_policy(folder), torch.load(folder / "policy.pt", weights_only=True)
    for _ in range(2):
        assert common.evaluate(act, saved["env_spec"], 3, 0).tolist() == want
    assert not (folder / "policy.pt2").exists(), (
        "a policy with a memory is no function of the observation"
    )

    def by_hand(start):
        env, total, ended = common.make_env(saved["env_spec"]), 0.0, False
        obs, _ = env.reset(seed=0)
        if start:
            act.start(1)
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(
                act(torch.as_tensor(obs)[None])[0].numpy()
            )
            act.record(0, float(reward))
            total, ended = total + float(reward), terminated or truncated
        return total

    assert by_hand(start=True) == pytest.approx(want[0], abs=1e-2)
    assert by_hand(start=False) != pytest.approx(want[0], abs=1e-2)


# ---- what it learns


def learn(data, monkeypatch, **args):
    for name, value in dict(WIDTH=16, LAYERS=2, HEADS=1, MAX_STEPS=20).items():
        monkeypatch.setattr(dt, name, value)
    torch.manual_seed(0)
    args = dict(warmup_steps=10, actor_lr=5e-3, dropout=0.0, return_scale=1.0) | args
    return silent_train(monkeypatch, dt, data, **args)


def test_it_can_learn_an_episode_by_heart(monkeypatch):
    """Twelve steps with different observations, no dropout: below 1e-4."""
    data = episodes_data(list(torch.randn(12)))
    losses = []
    plain_update = dt.update
    monkeypatch.setattr(
        dt, "update", lambda *a, **b: losses.append(plain_update(*a, **b)["action_loss"]) or {}
    )
    learn(data, monkeypatch, steps=400, batch_size=12, weight_decay=0.0, actor_lr=8e-3)
    assert torch.stack(losses[-20:]).max() < 1e-4 < losses[0]


def test_it_does_what_it_is_asked_for(monkeypatch):
    """C16 in one state: actions of -0.8 earn 0, of 0.8 earn 1. A clone does the mean, DT what
    belongs to the request."""
    data = episodes_data(*[[float(i % 2)] for i in range(40)])
    data.obs.zero_()
    data.action[:] = 1.6 * (torch.arange(40) % 2)[:, None] - 0.8
    data.action_mid, data.action_half = torch.zeros(2), torch.ones(2)
    actor = learn(data, monkeypatch, steps=60, batch_size=32).actor
    said = []
    for asked in (0.0, 1.0):
        player = Player(actor, asked)
        player.start(1)
        said.append(player(torch.zeros(1, 3)))
    assert_close(torch.cat(said), [[-0.8, -0.8], [0.8, 0.8]], 0.1)
