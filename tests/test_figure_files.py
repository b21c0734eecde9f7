"""Figures as files: colours that stay, text that fits, the same bytes each time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from example_figures import (
    ACC,
    BPB,
    SENTENCE,
    STUDENT,
    TEACHER,
    assert_inside,
    drawn,
    logs,
    row,
    stored_table,
    table_of,
    wide_table,
)

from ctdbench.errors import UserError
from ctdbench.report import figures
from ctdbench.report.figures import style
from ctdbench.report.tables import Table

Stored = tuple[Table, dict[str, Path]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return stored_table(tmp_path_factory.mktemp("store"))


def test_colours_follow_from_the_labels_alone() -> None:
    labels = [f"m{number:02}" for number in range(30)]
    rows = [row("teacher", {}), *(row(label, {}) for label in labels)]
    marks = style.marks(table_of(rows))
    assert marks == style.marks(table_of(rows[::-1]))
    assert marks["teacher"].colour == style.GREY
    trained = [marks[label] for label in labels]
    assert style.GREY not in {mark.colour for mark in trained}
    assert len({(mark.colour, mark.dashes) for mark in trained}) == 30
    assert len({(mark.colour, mark.marker) for mark in trained}) == 30
    assert len({mark.marker for mark in trained[:11]}) == 11  # apart in grey, too


@pytest.mark.parametrize("name", figures.FIGURES)
def test_everything_fits(name: str, stored: Stored, tmp_path: Path) -> None:
    narrow, wide = drawn(figures.FIGURES[name](*stored)), wide_table()
    assert_inside(narrow)
    full = drawn(figures.FIGURES[name](wide, logs(tmp_path, wide, steps=30)))
    assert_inside(full)
    assert narrow.get_figwidth() in (style.COLUMN, style.PAGE)
    assert full.get_figwidth() == style.PAGE
    assert full.get_figheight() < 9


def test_files_are_whole_and_undated(stored: Stored, tmp_path: Path) -> None:
    made = figures.draw(*stored, tmp_path)
    assert list(made) == ["scores", "curves", "points", "cost", "ranks"]
    assert len(list(tmp_path.iterdir())) == 15  # and nothing temporary
    for paths in made.values():
        assert isinstance(paths, list)
        pdf, svg, png = (path.read_bytes() for path in paths)
        assert pdf.startswith(b"%PDF")
        assert b"CreationDate" not in pdf
        assert b"/Type3" not in pdf
        assert png.startswith(b"\x89PNG")
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert b"date" not in svg.lower()
    again = figures.draw(*stored, tmp_path / "again", ["svg"])
    for name, paths in again.items():
        assert Path(paths[0]).read_bytes() == (tmp_path / f"{name}.svg").read_bytes()


def save_small(folder: Path) -> list[Path]:
    rows = [row(name, {BPB: 1.0, ACC: 0.5}) for name in ("teacher", "sft", "bld")]
    figure = drawn(figures.FIGURES["scores"](table_of(rows), {}))
    return style.save(figure, folder, "small", ("pdf", "svg", "png"))


SCRIPT = """
import sys, pathlib, test_figure_files
test_figure_files.save_small(pathlib.Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""


def test_files_are_the_same_in_every_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "other")]
    subprocess.run(command, check=True, env=environment, timeout=300)
    for path in save_small(tmp_path / "own"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_draw_tells_why_a_figure_is_absent(tmp_path: Path) -> None:
    made = figures.draw(table_of([row("sft", {BPB: 1.0, ACC: 0.5})]), {}, tmp_path, ["svg"])
    assert made["scores"] == [tmp_path / "scores.svg"]
    assert "metrics.jsonl" in made["curves"]
    assert "average ranks take" in made["ranks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.svg", "scores.svg"]


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown figure format 'gif'"):
        figures.draw(wide_table(), {}, tmp_path / "out", ["svg", "gif"])
    with pytest.raises(UserError, match="unknown figure format 'gif'"):
        figures.draw_pair(STUDENT, TEACHER, SENTENCE, tmp_path / "out", "tiny", ["gif"])
    assert not (tmp_path / "out").exists()


def test_an_svg_for_a_page_keeps_to_itself() -> None:
    tables = [table_of([row(name, {BPB: 1.0, ACC: 0.5})]) for name in ("sft", "bld")]
    made = [figures.svg(drawn(figures.FIGURES["scores"](table, {}))) for table in tables]
    ids = [{e.get("id") for e in ElementTree.fromstring(one).iter()} - {None} for one in made]
    assert ids[0]
    assert not ids[0] & ids[1]
    for one, own in zip(made, ids, strict=True):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', one)
        assert {first or second for first, second in used} <= own
        assert one.startswith("<svg ")
        assert "<style" not in one  # it would be the page's
        assert "<metadata" not in one
        assert style.INK not in one  # dark on a dark page
        assert style.PAPER not in one
        assert "currentColor" in one


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    rows = [row("sft", {BPB: 1.0, ACC: 0.5})]
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        loud = figures.svg(drawn(figures.FIGURES["scores"](table_of(rows), {})))
    plain = figures.svg(drawn(figures.FIGURES["scores"](table_of(rows), {})))
    assert loud == plain  # the user's own settings do not count
    assert dict(matplotlib.rcParams) == before
