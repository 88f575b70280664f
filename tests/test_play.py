"""Playing a saved policy: its score, and a film of two side by side. Drawing MuJoCo needs EGL, so
it is not tested."""
import sys

import common

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import tiny_data
from PIL import Image

sys.path.append(str(ROOT / "results"))
import play
import td3_bc


@pytest.fixture
def policy(tmp_path):
    """An untrained policy for the pendulum, saved."""
    torch.manual_seed(0)
    common.save_policy(tmp_path, "td3_bc", "td3_bc", td3_bc.Actor(3, 1), tiny_data(action_dim=1))
    return tmp_path


def test_it_scores_a_saved_policy(policy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["play.py", str(policy), "--episodes", "2"])
    play.main()
    shown = capsys.readouterr().out
    expected = common.evaluate(common.load_policy(policy), "Pendulum-v1", 2)
    assert (
        f"return {expected.mean():.1f}" in shown and "over 2 episodes" in shown and "score" in shown
    )


def test_what_is_not_there_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["play.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        play.main()
    assert stop.value.code == 2 and "there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, line",
    [
        (["--episodes", "0"], "--episodes must be at least 1"),
        (["--most-steps", "0"], "--most-steps must be at least 1"),
        (["--video", "film"], "ends in .gif or .mp4"),
        (["--labels", "one", "two"], "2 names for 1 runs"),
        (["--video", "nowhere/film.gif"], "there is no folder nowhere"),
    ],
)
def test_wrong_options_get_one_line_before_anything_is_played(
    policy, monkeypatch, capsys, options, line
):
    monkeypatch.setattr(play, "evaluate", lambda *_: pytest.fail("it was played"))
    monkeypatch.setattr(sys, "argv", ["play.py", str(policy), *options])
    with pytest.raises(SystemExit) as stop:
        play.main()
    assert stop.value.code == 2 and line in capsys.readouterr().err


def test_what_is_no_policy_and_what_cannot_be_played(policy, monkeypatch, capsys):
    """Any file; an environment that raises. One line each."""
    (policy / "other.pt").write_text("nonsense")
    monkeypatch.setattr(
        common, "make_env", lambda env: pytest.fail("made") if env is None else 1 / 0
    )
    for path, line in (
        (policy / "other.pt", "is no saved policy"),
        (policy, "in Pendulum-v1 failed (ZeroDivisionError"),
    ):
        monkeypatch.setattr(sys, "argv", ["play.py", str(path)])
        with pytest.raises(SystemExit) as stop:
            play.main()
        err = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and line in err and "\n" not in err


def test_a_film_waits_for_the_longer_one(tmp_path):
    films = [
        [Image.new("RGB", (play.WIDTH, play.HEIGHT), (shade, 0, 0)) for shade in shades]
        for shades in ((10, 20), (1, 2, 3))
    ]
    frames = play.side_by_side(films, ["one", "two"])
    corner = [(np.asarray(frame)[-1, 0, 0], np.asarray(frame)[-1, -1, 0]) for frame in frames]
    assert corner == [(10, 1), (20, 2), (20, 3)]
    play.save(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.size == (2 * play.WIDTH, play.HEIGHT)
