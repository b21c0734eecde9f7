"""The report as a file: nothing from a store runs, every number is there, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from example_results import example, store_example
from example_store import HEADLINE, write_store
from matplotlib.figure import Figure
from parsed_page import Node, parse
from poisoned_store import IMAGE, SCRIPT, poison

from ctdbench import report, results
from ctdbench.errors import UserError
from ctdbench.report import figures, page, statistics
from ctdbench.report.page.curves import curves
from ctdbench.report.page.markup import Markup, element, joined
from ctdbench.report.tables import Table
from ctdbench.results import Result

TASKS = ("bpb_heldout", "everyday_physics", "arithmetic_word")
Found = dict[Path, Result]
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:Glyph"),  # what a poisoned label holds
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Three seeds of sft and bld, one of alm, and gold, which failed."""
    store = tmp_path_factory.mktemp("somewhere") / "my-store"
    write_store(store, ("sft", "bld"), 3, TASKS, 24)
    return results.find(store, status=None)


@pytest.fixture(scope="module")
def text(found: Found) -> str:
    return page.html(found, HEADLINE)


@pytest.fixture(scope="module")
def document(text: str) -> Node:
    return parse(text)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Node:
    store = tmp_path_factory.mktemp("poisoned")
    write_store(store, ("sft", "bld"), 1, ("bpb_heldout", "arithmetic_word"), 8)
    poison(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", {"one": _figure, "other": lambda *_: SCRIPT})
        return parse(page.html(results.find(store, status=None)))


def _figure(table: Table, folders: Mapping[str, Path]) -> Figure:
    """Drawn in no time, with text of the store in its title and its label."""
    figure = Figure((3, 1))
    figure.suptitle(table.title)
    figure.set_label(table.title)
    return figure


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", {})


def by_id(document: Node, name: str) -> Node:
    (node,) = [node for node in document.walk() if node.attributes.get("id") == name]
    return node


def cell_of(document: Node, cell: Result) -> Node:
    return by_id(document, f"cell-{cell['id']}")


def made(*cells: Result, headline: dict[str, str] | None = None) -> Node:
    """The page on cells that have no files."""
    return parse(page.html({Path("runs/pair/method") / c["id"]: c for c in cells}, headline))


def facts(node: Node) -> dict[str, str]:
    """What the lists in a node tell, by name."""
    return {
        row.children[0].text: row.children[1].text for dl in node.find("dl") for row in dl.children
    }


def test_every_score_of_the_store_is_in_the_section_of_its_cell(
    document: Node, found: Found
) -> None:
    done = [cell for cell in found.values() if cell["status"] == "done"]
    assert len(done) == 9
    for cell in done:
        numbers = cell_of(document, cell).numbers
        for part in (cell["scores"], cell["stderr"]):
            for metrics in part.values():
                assert {repr(value) for value in metrics.values()} <= set(numbers)
        assert {repr(value) for value in cell["cost"].values()} <= set(numbers)


def test_every_score_of_a_table_is_in_its_section(document: Node, found: Found) -> None:
    (table,) = report.comparison(found, HEADLINE)
    numbers = [float(number) for number in by_id(document, "table-1").numbers]
    scores = [score.value for row in table.rows for score in row.scores.values()]
    assert len(scores) == 15
    for score in scores:
        assert score in numbers


def test_a_row_leads_to_each_of_its_cells(document: Node, found: Found) -> None:
    (table,) = by_id(document, "table-1").find("table")
    links = {
        row.find("th")[0].text: row.find("a")
        for row in table.find("tbody")[0].children
        if row.tag == "tr"
    }
    seeds = next(node for label, node in links.items() if label.startswith("bld"))
    assert [link.text for link in seeds] == ["0", "1", "2"]
    for seed, link in enumerate(seeds):
        target = by_id(document, str(link.attributes["href"])[1:])
        (cell,) = [
            c for c in found.values() if (c["spec"]["method"], c["spec"]["seed"]) == ("bld", seed)
        ]
        assert target is cell_of(document, cell)
    assert len(links["teacher"]) == 1


def test_ids_are_unique_and_links_lead_somewhere(document: Node, poisoned: Node) -> None:
    for root in (document, poisoned):
        ids = [node.attributes["id"] for node in root.walk() if "id" in node.attributes]
        assert len(ids) == len(set(ids))
        for node in root.walk():
            if "href" in node.attributes:
                assert str(node.attributes["href"]).startswith("#")
                assert str(node.attributes["href"])[1:] in ids
            label = node.attributes.get("aria-labelledby")
            assert label is None or label in ids


def test_nothing_is_loaded(text: str, document: Node) -> None:
    tags = {node.tag for node in document.walk()}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form", "image"}
    for node in document.walk():
        assert not node.attributes.keys() & {"src", "srcset", "action", "background", "data"}
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_the_policy_allows_the_own_style_and_script_alone(document: Node) -> None:
    (meta,) = document.find("meta", **{"http-equiv": "Content-Security-Policy"})
    policy = str(meta.attributes["content"])
    for tag in ("style", "script"):
        (node,) = document.find(tag)
        digest = base64.b64encode(hashlib.sha256(node.text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not [node for node in document.walk() if "style" in node.attributes]


def test_no_text_of_a_store_becomes_markup(poisoned: Node) -> None:
    assert len(poisoned.find("script")) == 1
    assert not poisoned.find("img")
    for node in poisoned.walk():
        assert not [name for name in node.attributes if name.startswith("on")]
    shown = poisoned.text
    for escaped in ("bld", "smol-mistral", "mixed", "more", "bpb", "embedded"):
        assert escaped + SCRIPT in shown
    assert "arithmetic_word" + IMAGE in shown
    assert shown.count(SCRIPT) > 100


def test_what_is_missing_is_told(document: Node) -> None:
    missing = by_id(document, "missing")
    (failed,) = missing.find("li")
    assert "gold" in failed.text
    assert "loss is not finite at step 3" in failed.text
    told = facts(missing)
    absent = told["Methods without a finished cell"].split(", ")
    assert "gold" in absent
    assert "simct" in absent
    assert not {"sft", "bld", "alm"} & set(absent)
    assert told["Rows of fewer than 3 seeds, so not ranked"] == "alm (1)"
    assert told["Not better than guessing on everyday_physics"]
    assert "Baselines not evaluated" not in told


@pytest.mark.usefixtures("_no_figures")
def test_absent_baselines_and_numbers_are_told() -> None:
    scores = {"piqa": {"acc": 0.6}}
    cells = [example("sft", scores | {"gsm8k": {"exact_match": 0.1}}), example("bld", scores)]
    told = facts(by_id(made(*cells), "missing"))
    assert told["Baselines not evaluated"] == "teacher, start"
    assert told["No number for gsm8k"] == "bld"
    assert "No number for piqa" not in told


def test_a_failed_cell_has_a_section_with_its_reason(document: Node, found: Found) -> None:
    (failed,) = [cell for cell in found.values() if cell["status"] == "failed"]
    section = cell_of(document, failed)
    assert "loss is not finite at step 3" in section.text
    assert section.find("summary")[0].text.count("failed") == 1


def test_outputs_stand_side_by_side_with_whether_they_are_right(
    document: Node, found: Found
) -> None:
    (folder,) = [
        path
        for path, cell in found.items()
        if (cell["spec"]["method"], cell["spec"]["seed"]) == ("bld", 1)
    ]
    lines = (folder / "samples" / "arithmetic_word.jsonl").read_text().splitlines()
    own = [json.loads(line) for line in lines]
    section = cell_of(document, found[folder])
    documents = section.find("div", **{"class": "document"})
    assert len(documents) == 3
    for row, node in zip(own, documents, strict=False):
        sides = node.find("figure")
        names = [side.find("b")[0].text for side in sides]
        assert [name.partition("[")[0] for name in names] == ["start", "bld", "teacher"]
        assert row["id"] in node.text
        assert sides[1].find("pre")[0].text == row["output"]
        assert ("right" if row["exact_match"] else "wrong") in sides[1].find("span")[0].text


@pytest.mark.usefixtures("_no_figures")
def test_settings_are_told_where_they_are_not_the_default() -> None:
    cell = example("bld", {"piqa": {"acc": 0.6}}, batch_documents=8, options={"kl_weight": None})
    cell["spec"]["eval"]["data_dir"] = "/home/somebody/data"
    document = made(cell)
    told = facts(cell_of(document, cell))
    assert told["train.batch_documents"] == "8 (default 4)"
    assert told["eval.limit"] == "24 (default none)"
    assert "train.clip" not in told
    assert told["kl_weight"] == "none"
    assert "somebody" not in document.text


def test_only_the_name_of_the_stores_folder_is_told(found: Found, text: str) -> None:
    (store,) = {folder.parents[2] for folder in found}
    assert f"<code>{store.name}</code>" in text
    assert str(store.parent) not in text


def test_an_interval_is_that_of_the_table_where_the_row_has_one_seed(
    document: Node, found: Found
) -> None:
    (table,) = report.comparison(found, HEADLINE)
    (row,) = [row for row in table.rows if row.method == "alm"]
    (cell,) = [cell for cell in found.values() if cell["spec"]["method"] == "alm"]
    lows = {node.attributes.get("data-low") for node in cell_of(document, cell).find("td")}
    assert {repr(score.low) for score in row.scores.values()} <= lows


def test_an_interval_of_one_of_several_seeds_is_wilsons(document: Node, found: Found) -> None:
    (cell,) = [
        cell
        for cell in found.values()
        if (cell["spec"]["method"], cell["spec"]["seed"]) == ("sft", 0)
    ]
    share = cell["scores"]["everyday_physics"]["acc"]
    assert share is not None
    right = round(24 * share)
    expected = statistics.wilson([1] * right + [0] * (24 - right))
    ends = [
        (float(node.attributes["data-low"] or 0), float(node.attributes["data-high"] or 0))
        for node in cell_of(document, cell).find("td")
        if "data-low" in node.attributes
    ]
    assert any(pair == pytest.approx(expected) for pair in ends)


def test_figures_have_labels_and_no_ids_in_common(document: Node) -> None:
    drawings = by_id(document, "table-1").find("svg")
    assert len(drawings) >= 3
    for drawing in drawings:
        assert drawing.attributes["aria-label"]
        assert drawing.attributes["role"] == "img"
        assert not drawing.find("style")
        assert not drawing.find("metadata")


def test_a_figure_that_cannot_be_drawn_says_why() -> None:
    section = by_id(made(example("sft", {"piqa": {"acc": 0.6}})), "table-1")
    reasons = [node.text for node in section.find("p") if node.text.startswith("No figure of")]
    assert any("curves" in reason and "metrics.jsonl" in reason for reason in reasons)


@pytest.mark.usefixtures("_no_figures")
def test_cells_without_files_and_without_numbers_have_sections() -> None:
    cells = [example("sft", {"piqa": {"acc": None}}), example("bld", {}, status="failed")]
    document = made(*cells)
    assert "–" in cell_of(document, cells[0]).text
    assert "In no table" in cell_of(document, cells[1]).text


def test_a_curve_goes_from_the_first_to_the_last_logged_value(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": n, "text_bytes": 100 * n, "ce": 3.0 - n / 100, "weight ce": 1.0}
        for n in range(1, 201)
    ]
    results.write_jsonl_atomic(tmp_path / "metrics.jsonl", rows)
    drawn = parse(str(curves(tmp_path)))
    (figure,) = drawn.find("figure")  # a weight that never changes is no curve
    assert "2.99 → 1" in figure.text
    points = str(drawn.find("polyline")[0].attributes["points"]).split()
    assert len(points) == 67
    heights = [float(point.partition(",")[2]) for point in points]
    assert heights == sorted(heights)  # downwards on the screen


def test_a_broken_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        curves(tmp_path)


def test_a_cell_without_a_log_has_no_curves(tmp_path: Path) -> None:
    assert curves(tmp_path) is None


@pytest.mark.usefixtures("_no_figures")
def test_the_report_is_written_whole_or_not_at_all(found: Found, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    few = {path: cell for path, cell in found.items() if cell["status"] == "failed"}
    page.write(few, None, out)
    before = out.read_text(encoding="utf-8")
    assert before.startswith("<!DOCTYPE html>")
    broken = tmp_path / "store"
    write_store(broken, ("sft",), 1, ("bpb_heldout",), 4)
    next(broken.glob("*/sft/*/samples/*.jsonl")).write_text("{")
    with pytest.raises(UserError, match="samples"):
        page.write(results.find(broken), None, out)
    assert out.read_text(encoding="utf-8") == before
    shutil.rmtree(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_cannot_be_written_is_told_before_it_is_computed(found: Found, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        page.write(found, None, tmp_path / "nowhere" / "report.html")
    with pytest.raises(UserError, match="is a folder"):
        page.write(found, None, tmp_path)
    with pytest.raises(UserError, match="no results"):
        page.write({}, None, tmp_path / "report.html")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_two_hundred_cells_take_twenty_seconds(tmp_path: Path) -> None:
    """And less than 15 MB; their bootstraps are not known yet."""
    write_store(tmp_path / "runs", [f"method-{number}" for number in range(66)], 3)
    found = results.find(tmp_path / "runs", status=None)
    assert len(found) > 200
    started = time.process_time()
    page.write(found, HEADLINE, tmp_path / "report.html")
    assert time.process_time() - started < 20
    assert (tmp_path / "report.html").stat().st_size < 15_000_000


def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    store_example(tmp_path, example("sft", {"piqa": {"acc": 0.6}}))
    code = (
        "import sys; from pathlib import Path; from ctdbench import results\n"
        "from ctdbench.report import page\n"
        f"page.html(results.find(Path({str(tmp_path)!r})))\n"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("dirty", [SCRIPT, "a & b", "'\"", "<b>", "&lt;"])
def test_a_plain_string_is_escaped_wherever_it_goes(dirty: str) -> None:
    made = element("p", dirty, [dirty, element("b", dirty)], title=dirty, data_name=dirty)
    (node,) = parse(made).children
    assert node.attributes == {"title": dirty, "data-name": dirty}
    assert [child.tag for child in node.children] == ["b"]
    assert node.text == 3 * dirty


def test_attributes_are_left_out_or_bare() -> None:
    made = element("input", hidden=True, checked=False, value=None, class_="a", tabindex=0)
    assert made == '<input hidden class="a" tabindex="0"></input>'
    assert joined([None, 1, ["<", Markup("<br>")]]) == "1&lt;<br>"
