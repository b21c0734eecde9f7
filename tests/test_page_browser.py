"""The report in a real Chromium: quiet, sortable, safe, readable by night and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import ENTER, Browser
from example_store import HEADLINE, write_store
from poisoned_store import IMAGE, OWNED, SCRIPT, poison

from ctdbench import report, results
from ctdbench.report import figures, page
from ctdbench.report.formats.numbers import number
from ctdbench.report.tables import Column
from ctdbench.results import Result

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:Glyph"),  # what a poisoned label holds
]
Found = dict[Path, Result]
# The table's values of a column as they stand, the row heads as text; null where there is none.
COLUMN = """
const [table, column] = arguments;
return Array.from(document.querySelectorAll("table.scores")[table].tBodies[0].rows, (row) => {
  const cell = row.cells[column];
  return cell.tagName === "TH" ? cell.textContent : cell.dataset.value ?? null;
});
"""
BUTTON = "return document.querySelectorAll('table.scores')[0].tHead.rows[0].cells[%d].firstChild"
SORTED = "return document.querySelectorAll('table.scores')[0].tHead.rows[0].cells[%d].ariaSort"
OPEN_ALL = "for (const cell of document.querySelectorAll('details')) cell.open = true;"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.browser() as window:
        yield window


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two tables: one of three seeds, and one of another budget with a method that has no score."""
    store = tmp_path_factory.mktemp("store")
    write_store(store)
    write_store(store, ("sft",), 1, ("bpb_heldout", "arithmetic_word"), 20, budget=60_000)
    return results.find(store, status=None)


@pytest.fixture(scope="module")
def written(found: Found, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    page.write(found, HEADLINE, out)
    return out


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poisoned")
    write_store(folder / "runs", ("sft", "bld"), 3, documents=12)
    poison(folder / "runs")
    page.write(results.find(folder / "runs", status=None), None, folder / "report.html")
    return folder / "report.html"


def test_the_console_stays_empty_and_nothing_is_fetched(chromium: Browser, written: Path) -> None:
    for dark in (False, True):
        chromium.open(written, dark=dark)
        chromium.run(OPEN_ALL)
        assert chromium.messages() == []
        assert chromium.run("return performance.getEntriesByType('resource').length") == 0


def test_every_column_sorts_both_ways(chromium: Browser, written: Path) -> None:
    chromium.open(written)
    columns = chromium.run(
        "return document.querySelector('table.scores').tHead.rows[0].cells.length"
    )
    assert columns > 5
    for column in range(columns):
        before = chromium.run(COLUMN, 0, column)
        for direction in ("ascending", "descending"):
            chromium.click(chromium.run(BUTTON % column))
            assert chromium.run(SORTED % column) == direction
            after = chromium.run(COLUMN, 0, column)
            assert sorted(map(str, after)) == sorted(map(str, before))
            known = [value for value in after if value is not None]
            assert after == known + [None] * (len(after) - len(known))
            values = known if column == 0 else [float(value) for value in known]
            expected = sorted(values, key=lambda v: v.lower() if isinstance(v, str) else v)
            assert values == (expected if direction == "ascending" else expected[::-1])
        others = [chromium.run(SORTED % other) for other in range(columns) if other != column]
        assert set(others) == {None}


def test_a_header_ends_where_its_numbers_do(chromium: Browser, written: Path) -> None:
    chromium.open(written)
    ends = chromium.run(
        """
        const end = (node) => {
          const range = document.createRange();
          range.selectNodeContents(node);
          return range.getBoundingClientRect().right;
        };
        const table = document.querySelector("table.scores");
        return Array.from(table.tBodies[0].rows[0].cells).slice(1).map((cell, column) =>
          [end(table.tHead.rows[0].cells[column + 1].firstChild), end(cell)]);
        """
    )
    assert len(ends) > 5
    for head, cell in ends:
        assert head == pytest.approx(cell, abs=1)


def test_a_header_sorts_from_the_keyboard(chromium: Browser, written: Path) -> None:
    chromium.open(written)
    button = chromium.run(BUTTON % 1)
    chromium.type(button, ENTER)
    values = [float(value) for value in chromium.run(COLUMN, 0, 1)]
    assert values == sorted(values)
    assert chromium.run("return document.activeElement === arguments[0]", button)


def test_every_number_equals_the_stores(chromium: Browser, written: Path, found: Found) -> None:
    chromium.open(written)
    for cell in found.values():
        shown = chromium.run(
            """
            const section = document.getElementById("cell-" + arguments[0]);
            return Array.from(section.querySelectorAll("table tbody tr"), (row) =>
              Array.from(row.cells, (cell) => [cell.textContent, cell.dataset.value ?? null]));
            """,
            cell["id"],
        )
        told = {(row[0][0], row[1][0].split()[0]): (row[2], row[4]) for row in shown}
        stored = [(task, m) for task, metrics in cell["scores"].items() for m in metrics]
        assert sorted(told) == sorted(stored)
        for task, metric in stored:
            for part, (text, exact) in zip(("scores", "stderr"), told[task, metric], strict=True):
                value = cell[part][task][metric]  # type: ignore[literal-required]
                assert float(exact) == value
                assert text == number(value, Column(task, metric))


def test_every_number_of_a_table_equals_the_stores(
    chromium: Browser, written: Path, found: Found
) -> None:
    chromium.open(written)
    for index, table in enumerate(report.comparison(found, HEADLINE)):
        for place, column in enumerate(table.columns, start=1):
            expected = [
                row.scores[column].value if column in row.scores else None for row in table.rows
            ]
            shown = chromium.run(COLUMN, index, place)
            assert [None if value is None else float(value) for value in shown] == expected


def test_no_script_of_a_poisoned_store_runs(chromium: Browser, poisoned: Path) -> None:
    chromium.open(poisoned)
    chromium.run(OPEN_ALL)
    chromium.click(chromium.run(BUTTON % 1))
    assert chromium.messages() == []
    assert chromium.run("return document.title") != OWNED
    assert chromium.run("return document.scripts.length") == 1
    assert chromium.run("return document.images.length") == 0
    assert OWNED in chromium.run("return document.body.textContent")
    anchors = "return Array.from(document.querySelectorAll('.scores a')).every((a) => a.hash)"
    assert chromium.run(anchors)


def test_no_script_of_a_poisoned_table_or_figure_runs(chromium: Browser, poisoned: Path) -> None:
    """Neither has the report's policy, so all depends on their escaping."""
    found = results.find(poisoned.parent / "runs", status=None)
    tables = report.comparison(found)
    (poisoned.parent / "table.html").write_text(report.render(tables, "html"), encoding="utf-8")
    folders = {result["id"]: folder for folder, result in found.items()}
    drawn = figures.draw(tables[0], folders, poisoned.parent / "figures", ["svg"])
    images = [path for made in drawn.values() if not isinstance(made, str) for path in made]
    assert len(images) >= 3
    for path in (poisoned.parent / "table.html", *images):
        assert OWNED in path.read_text(encoding="utf-8")
        chromium.open(path)
        assert chromium.messages() == []
        assert chromium.run("return document.title") != OWNED
        assert chromium.run("return document.querySelectorAll('script, img').length") == 0


def test_what_is_poison_runs_where_nothing_is_escaped(chromium: Browser, tmp_path: Path) -> None:
    """Else the tests above would pass whatever the report did."""
    for index, text in enumerate((SCRIPT, f'<p title="{IMAGE}">')):
        path = tmp_path / f"{index}.html"
        path.write_text(f"<!DOCTYPE html><title>safe</title><body>{text}", encoding="utf-8")
        chromium.open(path)
        assert chromium.run("return document.title") == OWNED


def test_the_policy_stops_a_script_that_got_in(
    chromium: Browser, written: Path, tmp_path: Path
) -> None:
    """The second line of defence, should the first fail."""
    text = written.read_text(encoding="utf-8")
    script = (
        f"<script>document.title='{OWNED}'</script><img src=x onerror=document.title='{OWNED}'>"
    )
    (tmp_path / "hurt.html").write_text(text.replace("<main>", f"<main>{script}"), encoding="utf-8")
    chromium.open(tmp_path / "hurt.html")
    assert chromium.run("return document.title") != OWNED
    assert len(chromium.messages()) >= 2


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("selector", ["p.lead", ".fine", "td", "figure svg", "a", ".beside"])
def test_text_has_contrast(chromium: Browser, written: Path, dark: bool, selector: str) -> None:
    """4.5 to 1 is what WCAG 2 asks for small text."""
    chromium.open(written, dark=dark)
    ink, page_colour = chromium.run(
        """
        const style = getComputedStyle(document.querySelector(arguments[0]));
        const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        return [rgb(style.color), rgb(getComputedStyle(document.documentElement).backgroundColor)];
        """,
        selector,
    )
    assert (luminance(page_colour) < 0.1) == dark
    low, high = sorted([luminance(ink), luminance(page_colour)])
    assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(rgb: list[float]) -> float:
    """Relative luminance of a colour of 0 to 255 a channel (WCAG 2)."""
    parts = [value / 255 for value in rgb]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [320, 400, 768, 1280])
def test_the_page_never_scrolls_sideways(
    chromium: Browser, written: Path, poisoned: Path, width: int
) -> None:
    for file in (written, poisoned):
        chromium.open(file, width=width)
        chromium.run(OPEN_ALL)
        assert chromium.run("return document.documentElement.scrollWidth") <= width


def test_a_wide_table_scrolls_in_its_own_box(chromium: Browser, written: Path) -> None:
    chromium.open(written, width=400)
    box = "document.querySelector('.scroll')"
    assert chromium.run(f"return {box}.scrollWidth > {box}.clientWidth + 100")
    left = f"{box}.querySelector('tbody th').getBoundingClientRect().left"
    assert chromium.run(f"const was = {left}; {box}.scrollLeft = 100; return {left} === was")


def test_a_link_opens_the_cell_it_leads_to(chromium: Browser, written: Path) -> None:
    chromium.open(written)
    link = chromium.run("return document.querySelector('table.scores tbody a')")
    opened = "return Array.from(document.querySelectorAll('details[open]'), (cell) => cell.id)"
    assert chromium.run(opened) == []
    chromium.click(link)
    (cell,) = chromium.run(opened)
    assert chromium.run("return location.hash") == f"#{cell}"
    top = chromium.run("return document.querySelector('details[open]').getBoundingClientRect().top")
    assert 0 <= top < 200


def test_a_cell_is_found_by_its_name(chromium: Browser, written: Path) -> None:
    chromium.open(written)
    shown: Any = """
    return Array.from(document.querySelectorAll("details.cell")).filter((cell) =>
      cell.checkVisibility()).map((cell) => cell.querySelector(".name").textContent);
    """
    assert len(set(chromium.run(shown))) > 2
    chromium.type(chromium.run("return document.querySelector('#cells input')"), "BLD 2")
    (name,) = chromium.run(shown)
    assert name.startswith("bld")
