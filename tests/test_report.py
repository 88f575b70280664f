"""report.py: the table of runs under way."""
import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "results"))
import report


def make_run(folder, name, **files):
    run = folder / name / "hopper-medium" / "seed0"
    run.mkdir(parents=True)
    for file, content in files.items():
        path = run / file.replace("_", ".")
        if isinstance(content, str):
            path.write_text(content)
        else:
            torch.save(content, path)


def test_progress_shows_every_run_and_names_what_cannot_be_read(tmp_path, capsys):
    settings = json.dumps({"steps": 100})
    half = {"step": 50, "seconds": 5.0, "curve": [{"score": None}, {"score": 12.34}]}
    done = json.dumps({"steps": 100, "score": None, "updates_per_second": 7.0})
    make_run(tmp_path, "bc", settings_json=settings, checkpoint_pt=half)
    make_run(tmp_path, "iql", settings_json=settings, result_json=done)
    make_run(tmp_path, "awac", settings_json=settings)
    make_run(tmp_path, "crr", settings_json="")
    make_run(tmp_path, "sac", settings_json=settings, checkpoint_pt="{half")
    report.progress(tmp_path)
    rows = {line.split("/")[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["bc"].split()[1:5] == ["50", "100", "12.3", "10.0"]
    assert "finished" in rows["iql"] and "–" in rows["iql"] and "no checkpoint yet" in rows["awac"]
    assert "can't be read" in rows["crr"] and "can't be read" in rows["sac"]


def test_progress_of_a_folder_without_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.progress(tmp_path)
    assert stop.value.code == 2 and "no runs in" in capsys.readouterr().err
