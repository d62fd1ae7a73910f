"""The tables of methods in the documentation are those of the code."""

import inspect
import re
from pathlib import Path

import pytest

from vitrim.measure.table import Table
from vitrim.showing.listing import METHODS, listing, methods_table, with_methods_table
from vitrim.tables import Table as Methods
from vitrim.text import with_written
from vitrim.tokens import SCORES, score

PAGE = Path(__file__).parents[1] / "docs" / "list.md"


def test_the_page_holds_every_method() -> None:
    page = PAGE.read_text()
    assert page == with_methods_table(page), "run `make docs`"
    assert methods_table() in page


def test_the_page_of_the_demonstration_holds_its_last_table() -> None:
    page = PAGE.with_name("demo.md").read_text()
    table = Table.read(PAGE.parents[1] / "results" / "demo-cpu.json")
    assert page == with_written(page, "demo", table.markdown(), "python benchmarks/demo_page.py")
    assert table.markdown() in page


@pytest.mark.parametrize("heading", METHODS)
def test_every_method_has_one_line_that_says_what_it_does(heading: str) -> None:
    for name, entry in METHODS[heading].items():
        summary = getattr(entry, "summary", "") or (inspect.getdoc(entry) or "").splitlines()[0]
        assert re.search(r"^[A-Z].*[.)]$", summary), f"{name}: {summary!r}"
        assert f"  {name:<22}{summary}" in listing(heading)


@pytest.mark.parametrize("heading", ["reducers", "schedules", "curricula"])
def test_every_option_is_explained(heading: str) -> None:
    for name, part in METHODS[heading].items():
        text = inspect.getdoc(part) or ""
        for option in inspect.get_annotations(part):
            assert re.search(rf"^ +{option}: ", text, re.MULTILINE), f"{name}.{option} is not in the docstring"


def test_a_method_without_documentation_is_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(SCORES, Methods)
    monkeypatch.setattr(SCORES, "_entries", dict(SCORES))
    monkeypatch.setattr(SCORES, "_homes", dict(SCORES._homes))

    def bare(evidence: object) -> None: ...

    score(needs="nothing")(bare)
    assert "\n  bare\n" in listing("scores") + "\n"
    assert "`bare`" not in methods_table(), "the documentation is about the package"
