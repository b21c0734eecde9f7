"""The tables of a Markdown file, and that README shows what results/ holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctdbench import report, results
from ctdbench.cli.application import headline
from ctdbench.errors import UserError
from ctdbench.report import readme

ROOT = Path(__file__).parents[1]
PUBLISHED = results.find(ROOT / "results")


def test_only_what_lies_between_the_marks_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n", encoding="utf-8")
    readme.insert(path, "| new |\n")
    assert path.read_text(encoding="utf-8") == f"a\n{readme.BEGIN}\n| new |\n{readme.END}\nb\n"
    assert readme.shown(path) == "| new |\n"
    readme.insert(path, "")
    assert readme.shown(path) == ""


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        readme.BEGIN,
        f"{readme.END}\n{readme.BEGIN}\n",
        f"{readme.BEGIN}\n{readme.END}\n" * 2,
    ],
)
def test_a_file_without_a_place_is_named_and_not_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md has no place for a table"):
        readme.insert(path, "new")
    assert path.read_text(encoding="utf-8") == text


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*README\.md"):
        readme.insert(tmp_path / "README.md", "new")


@pytest.mark.skipif(not PUBLISHED, reason="no cell is published in results/ yet")
def test_readme_shows_what_results_holds() -> None:
    tables = report.comparison(PUBLISHED, headline())
    assert readme.shown(ROOT / "README.md") == report.render(tables, "markdown")
