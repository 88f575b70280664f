"""Each lesson in its short form: the claim that its picture shows is asserted, so a picture can't
lie."""
import importlib.util
import sys

import pytest
from conftest import ROOT

LESSONS = sorted((ROOT / "results" / "lessons").glob("*_*.py"))


def test_there_are_sixteen_lessons_each_with_its_picture():
    assert len(LESSONS) == 16
    assert all(path.with_suffix(".png").exists() for path in LESSONS)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_claim_holds(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    spec = importlib.util.spec_from_file_location(f"lesson_{path.stem}", path)
    lesson = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, lesson)
    spec.loader.exec_module(lesson)
    lesson.check(lesson.experiment(short=True))
