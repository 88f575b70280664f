"""The landing page: short, with links that lead somewhere, code that is the file's, and tests that
exist."""
import re

import pytest
from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "results" / "README.md",
    ROOT / "results" / "lessons" / "README.md",
]
README = PAGES[0].read_text()


def test_it_is_a_landing_page():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert links
    for link in links:
        assert link.startswith("https://") or (page.parent / link.partition("#")[0]).exists(), link


def test_the_code_shown_is_that_of_the_file():
    shown = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    for definition in shown.strip().split("\n\n\n"):
        assert definition in (ROOT / "algorithms" / "td3_bc.py").read_text()


def test_every_algorithm_is_linked():
    for path in (ROOT / "algorithms").glob("*.py"):
        assert f"(algorithms/{path.name})" in README, path.name


def test_the_equations_are_where_the_table_says():
    rows = [
        row for row in README.splitlines() if re.search(r"\(E\d+\)", row) and row.startswith("|")
    ]
    assert len(rows) >= 12
    for row in rows:
        files = re.findall(r"\((algorithms/\w+\.py)\)", row)
        text = "".join((ROOT / file).read_text() for file in files)
        assert files and all(tag in text for tag in re.findall(r"\(E\d+\)", row)), row
        file = re.search(r"(test_\w+\.py)", row)[1]
        for name in re.findall(r"(?:::|`)(test_\w+)(?=`|,)", row):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
