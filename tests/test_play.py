"""Playing a saved policy: its score, and a film of two side by side. Drawing MuJoCo needs EGL, so it is not tested."""
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
    assert f"return {expected.mean():.1f}" in shown and "over 2 episodes" in shown and "score" in shown


def test_what_is_not_there_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["play.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        play.main()
    assert stop.value.code == 2 and "there is no" in capsys.readouterr().err


def test_a_film_waits_for_the_longer_one(tmp_path):
    films = [[Image.new("RGB", (play.WIDTH, play.HEIGHT), (shade, 0, 0)) for shade in shades] for shades in ((10, 20), (1, 2, 3))]
    frames = play.side_by_side(films, ["one", "two"])
    corner = [(np.asarray(frame)[-1, 0, 0], np.asarray(frame)[-1, -1, 0]) for frame in frames]
    assert corner == [(10, 1), (20, 2), (20, 3)]
    play.save(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.size == (2 * play.WIDTH, play.HEIGHT)
