"""Tables as text: the same numbers and marks in every format, and nothing that breaks its syntax.

After a change that is meant, write the golden files anew and read their diff:

    CTDBENCH_WRITE_GOLDEN=1 pytest tests/test_formats.py -k golden
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import debian
import pytest
from example_store import HEADLINE, write_store
from table_readers import READERS, Page

from ctdbench import report, results
from ctdbench.errors import UserError
from ctdbench.report import Column, Row, Score, Table
from ctdbench.report.formats import html, latex, markdown
from ctdbench.report.formats.numbers import count, number, percent, significant
from ctdbench.report.tables import Difference, RowCost

GOLDEN = Path(__file__).parent / "golden" / "tables"
FILES = {name: f"example.{report.SUFFIXES.get(name, name)}" for name in report.FORMATS}
BPB, ACC = Column("bpb_heldout", "bpb"), Column("piqa", "acc_bytes")
NASTY = "a_b%c&d#e$f{g}h^i~j\\k<l>m|n*o`p±–↓λé中 \x07 --q"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Table]]:
    """Of two pairs; the first has everything that a table can show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTDBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        store = tmp_path_factory.mktemp("store")
        write_store(store)
        tasks = ("bpb_heldout", "piqa")
        write_store(store, ("sft", "alm"), 1, tasks, 12, one_seed=(), failed=(), pair="smol-gemma")
        yield report.comparison(results.find(store, status=None), HEADLINE)


def made(rows: Mapping[str, Mapping[Column, Score]], **changes: Any) -> Table:
    """A table of rows of one seed without a cost."""
    setting = {"corpus": "gsm8k", "budget": 200_000, "limit": None}
    table = Table("tiny", setting, (BPB, ACC), (), None, {}, ())
    own = tuple(Row(name, name, (0,), {}, (), scores, None) for name, scores in rows.items())
    return replace(table, rows=own, **changes)


def test_the_example_has_everything_that_a_table_can_show(tables: list[Table]) -> None:
    first = next(table for table in tables if table.pair == "smol-mistral")
    scores = [score for row in first.rows for score in row.scores.values()]
    assert {score.best for score in scores} == {score.floor for score in scores} == {True, False}
    assert {score.delta.claimed for score in scores if score.delta} == {True, False}
    assert {score.share is None for score in scores if score.delta} == {True, False}
    assert {len(row.seeds) for row in first.rows} == {1, 3}
    assert any("failed: gold" in note for note in first.notes)
    assert len(tables) == 2


# Golden files


@pytest.mark.parametrize("name", FILES)
def test_golden(tables: list[Table], name: str) -> None:
    text = report.render([stable(table) for table in tables], name)
    path = GOLDEN / FILES[name]
    if os.environ.get("CTDBENCH_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def stable(value: Any) -> Any:
    """Six digits, since processors sum in different orders; and no cell ids, which are hashes."""
    if isinstance(value, Row):
        value = replace(value, cells=tuple(f"cell-{seed}" for seed in value.seeds))
    if is_dataclass(value) and not isinstance(value, type | Column):
        parts = {field.name: stable(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **parts)
    if isinstance(value, Mapping):
        return {key: stable(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(stable, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


# Every number and mark, as the readers find them in every format

NUMBER = re.compile(r"([+-]?[\d,]*\d(?:\.\d+)?)(%|kB|[kM])?([*~!]*)")


@pytest.mark.parametrize("name", READERS)
def test_every_number_and_mark_is_that_of_the_json(tables: list[Table], name: str) -> None:
    for table, data in zip(tables, json.loads(report.render(tables, "json")), strict=True):
        labels = [
            row["row"] + (f" ({n} seeds)" if (n := len(row["seeds"])) != 1 else "")
            for row in data["rows"]
        ]
        read = READERS[name](report.render([table], name), labels)
        for label, row in zip(labels, data["rows"], strict=True):
            shown = NUMBER.findall(read[label])
            expected = list(numbers_of(row))
            assert [marks for *_, marks in shown] == [marks for _, marks in expected]
            for (text, unit, _), (value, _) in zip(shown, expected, strict=True):
                check_rounded(text, unit, value)


def numbers_of(row: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """What a row must show, in reading order, with its marks; in percent, points, minutes, GB."""
    for score in row["scores"]:
        scale = 100 if score["metric"].startswith(("acc", "exact")) else 1
        yield scale * score["value"], "*" * score["best"] + "~" * score["floor"]
        sides = score["high"] - score["value"], score["value"] - score["low"]
        yield scale * max(sides), ""
        if delta := score["delta"]:
            yield scale * delta["value"], "!" * delta["claimed"]
        if share := score["share"]:
            yield 100 * share["value"], ""
    if cost := row["cost"]:
        yield cost["device_seconds"] / 60, ""
        yield cost["peak_memory_bytes"] / 1e9, ""
        yield from ((cost[name], "") for name in ("text_bytes", "student_tokens", "teacher_tokens"))


def check_rounded(text: str, unit: str, value: float) -> None:
    scale = {"k": 1e3, "kB": 1e3, "M": 1e6}.get(unit, 1)
    decimals = len(text.partition(".")[2])
    shown = float(text.replace(",", ""))
    assert abs(shown - value / scale) <= 0.5000001 * 10**-decimals


def test_csv_and_json_hold_the_same_numbers(tables: list[Table]) -> None:
    lines = list(csv.DictReader(io.StringIO(report.render(tables, "csv"))))
    data = json.loads(report.render(tables, "json"))
    flat = [(row, score) for table in data for row in table["rows"] for score in row["scores"]]
    for line, (row, score) in zip(lines, flat, strict=True):
        assert (line["row"], line["task"]) == (row["row"], score["task"])
        assert int(line["seeds"]) == len(row["seeds"])
        for name in ("value", "low", "high", "rank"):
            assert told(line[name]) == score[name]
        for name in ("delta", "share"):
            parts = score[name] or {"value": None, "low": None, "high": None}
            for part in ("value", "low", "high"):
                key = f"{name}_{part}".removesuffix("_value")
                assert told(line[key]) == parts[part]
        for name in ("device_seconds", "peak_memory_bytes", "flops"):
            assert told(line[name]) == (row["cost"] or {}).get(name)


def told(text: str) -> float | None:
    return float(text) if text else None


def test_json_has_the_tie_groups_and_what_they_rest_on(tables: list[Table]) -> None:
    (data,) = (t for t in json.loads(report.render(tables, "json")) if t["standings"])
    standing = data["standings"][0]
    ranked = [label for group in standing["groups"] for label in group]
    assert sorted(ranked) == ["bld[mixed]", "sft (seqkd)", "uld"]
    assert len(standing["pairs"]) == 3
    assert standing["groups"][0] == [r["row"] for r in data["rows"] if r["scores"][0]["best"]]


# Rounding


def test_numbers_are_told_in_the_metrics_unit() -> None:
    jsd, perplexity = Column("teacher_jsd", "jsd"), Column("wikitext", "word_perplexity")
    assert number(0.5536, ACC) == "55.4"
    assert number(-0.0312, ACC, sign="+") == "-3.1"
    assert number(1.2345678, BPB) == "1.235"
    assert number(0.04396, jsd) == "0.0440"
    assert number(12345.678, perplexity) == "12345.7"
    found = [count(n) for n in (0, 7, 5442, 200_000, 27e6)]
    assert found == ["0", "7", "5.44k", "200k", "27.0M"]
    assert [significant(n) for n in (0.02134, 17, 99.96, 1234.5)] == [
        "0.0213",
        "17.0",
        "100",
        "1,234",
    ]


def test_what_is_just_below_nothing_has_no_sign() -> None:
    assert number(-0.0004, BPB, sign="+") == "+0.000"
    assert number(-0.0004, ACC) == "0.0"
    assert percent(-0.002) == "0%"


# What is not known is not told


def test_without_intervals_there_is_no_plus_minus() -> None:
    table = made({"start": {BPB: Score(1.4)}, "bld": {BPB: Score(1.2), ACC: Score(0.5)}})
    for name in ("terminal", "markdown", "html"):
        assert "±" not in report.render([table], name)
    assert r"\pm" not in report.render([table], "latex")
    assert lines_of("terminal", table, "bld")[0].split() == ["bld", "1.200", "50.0"]


def test_a_score_that_is_missing_is_not_invented() -> None:
    table = made({"start": {}, "bld": {BPB: Score(1.2, 1.1, 1.3)}})
    assert lines_of("terminal", table, "start")[0].split() == ["start", "–", "–"]
    assert lines_of("markdown", table, "| bld") == ["| bld | 1.200 ± 0.100 | – |"]
    cells = Page(report.render([table], "html")).rows[1]
    assert [(cell.text, cell.get("class"), cell.get("data-value")) for cell in cells[1:]] == [
        ("–", "absent", None),
        ("–", "absent", None),
    ]


def test_a_column_announces_what_stands_in_its_brackets() -> None:
    delta = Difference(-0.1)
    table = made({"sft": {BPB: Score(1.3)}, "bld": {BPB: Score(1.2, delta=delta), ACC: Score(0.5)}})
    text = report.render([table], "markdown")
    assert "| method | bpb_heldout<br>bpb ↓<br>(d) | piqa<br>acc_bytes % ↑ |" in text
    assert "| bld | 1.200 (-0.100) | 50.0 |" in text


def lines_of(name: str, table: Table, start: str) -> list[str]:
    lines = report.render([table], name).splitlines()
    return [line for line in lines if line.startswith(f"{start} ")]


# Costs


def costing(**cost: Any) -> RowCost:
    unknown: dict[str, Any] = {field.name: None for field in fields(RowCost)}
    return RowCost(**{**unknown, "device": "CPU", **cost})


def test_time_is_told_for_each_kind_of_device() -> None:
    table = made({"teacher": {}, "bld": {}, "sft": {}})
    costs = (None, costing(device="GPU", device_seconds=9000.0), costing(device_seconds=90.0))
    rows = tuple(replace(row, cost=cost) for row, cost in zip(table.rows, costs, strict=True))
    text = report.render([replace(table, rows=rows)], "markdown")
    heads = text.splitlines()[2]
    assert heads.endswith("| train<br>GPU-h | train<br>CPU-min |")  # nothing else is known
    assert "| bld | – | – | 2.50 | – |" in text
    assert "| sft | – | – | – | 1.50 |" in text
    assert "| teacher | – | – | – | – |" in text


def test_a_table_without_costs_has_no_columns_for_them() -> None:
    table = made({"bld": {BPB: Score(1.2)}})
    assert "CPU-min" not in "".join(report.render([table], name) for name in READERS)


# Widths


def test_terminal_tables_fit_and_show_every_task() -> None:
    columns = tuple(Column(f"task_number_{i}", "acc") for i in range(9))
    score = Score(0.55, 0.5, 0.6, Difference(0.35, claimed=True), rank=1, floor=True)
    table = made({name: dict.fromkeys(columns, score) for name in ("bld", "a_long_name" * 3)})
    text = report.render([replace(table, columns=columns)], "terminal")
    assert max(map(len, text.splitlines())) <= 118
    assert all(f"task_number_{i}" in text for i in range(9))
    assert text.count("\nbld ") == 3
    assert "acc % ↑" in text
    assert "55.0*~ ±5.0 +35.0!" in text


def test_numbers_stand_below_each_other() -> None:
    def score(value: float, **marks: Any) -> Score:
        return Score(
            value, value - value / 8, value, Difference(-value / 2, claimed=value > 0.5), **marks
        )

    rows = {"a": score(0.05, floor=True), "b": score(0.55), "c": score(1.0, rank=1)}
    table = made({name: {ACC: own} for name, own in rows.items()}, columns=(ACC,))
    points = [
        [match.start() for match in re.finditer(r"\.", line)]
        for line in report.render([table], "terminal").splitlines()
        if line[:1] in rows
    ]
    assert points[0] == points[1] == points[2]
    assert len(points[0]) == 3


# Syntax


def test_markdown_rows_have_as_many_cells_as_the_head() -> None:
    table = made({"a|b*c": {BPB: Score(1.2)}, "bld": {}}, notes=(NASTY,))
    text = report.render([table], "markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert r"a\|b\*c" in text
    assert markdown.escape("<script>\n*") == r"\<script> \*"


def test_latex_is_plain_ascii_with_every_special_character_escaped() -> None:
    text = latex.escape(NASTY)
    assert text.isascii()
    assert r"a\_b\%c\&d\#e\$f\{g\}h\textasciicircum{}i\textasciitilde{}j\textbackslash{}k" in text
    assert r"$\pm$\textendash{}$\downarrow$$\lambda$U+00E9U+4E2D U+0007 -{}-q" in text


def test_latex_lines_have_as_many_cells_as_the_tabular(tables: list[Table]) -> None:
    text = report.render(tables, "latex")
    assert text.isascii()
    for tabular in re.findall(r"\\begin\{tabular\}(.+?)\\end\{tabular\}", text, re.DOTALL):
        columns = len(re.match(r"\{(\w+)\}", tabular)[1])  # type: ignore[index]
        rows = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    labels = re.findall(r"\\label\{(.+?)\}", report.render([*tables, *tables], "latex"))
    assert len(set(labels)) == 4


def test_html_cells_carry_the_unrounded_number_and_the_marks(tables: list[Table]) -> None:
    for table in tables:
        rows = Page(html.table(table)).rows[1:]
        for row, (label, *cells) in zip(table.rows, rows, strict=True):
            assert label.text.startswith(row.label)
            values = [cell.get("data-value") for cell in cells[: len(table.columns)]]
            assert [float(value or math.nan) for value in values] == [
                row.scores[column].value for column in table.columns
            ]
            marks = [(cell.get("class") or "").split() for cell in cells]
            assert [("best" in m, "floor" in m) for m in marks[: len(table.columns)]] == [
                (row.scores[column].best, row.scores[column].floor) for column in table.columns
            ]
            if row.cost:
                costs = [float(cell["data-value"] or math.nan) for cell in cells[-5:]]
                assert costs[0] == row.cost.device_seconds
                assert costs[-1] == row.cost.teacher_tokens


def test_html_is_semantic_and_unstyled(tables: list[Table]) -> None:
    page = Page(html.table(tables[0]))
    tags = [tag for tag, _ in page.tags]
    assert {"table", "caption", "thead", "tbody"} <= set(tags)
    assert all(attrs["scope"] in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert not any("style" in attrs for _, attrs in page.tags)
    assert {cell["scope"] for cell in page.rows[0]} == {"col"}
    assert all(row[0]["scope"] == "row" for row in page.rows[1:])


def test_html_escapes_whatever_it_shows() -> None:
    evil = '<script>alert("x")</script>&amp;'
    column = Column(evil, evil)
    table = made({evil: {column: Score(1.0)}}, columns=(column,), notes=(evil,), pair=evil)
    page = Page(report.render([table], "html"))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.rows[1][0].text == evil
    assert page.rows[0][1].text.startswith(evil)


def test_an_unknown_format_is_a_bad_request() -> None:
    with pytest.raises(UserError, match="did you mean markdown"):
        report.render([], "markdwon")


@pytest.mark.parametrize("name", FILES)
def test_no_tables_are_no_error(name: str) -> None:
    report.render([], name)


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_pdflatex_compiles_the_fragment(tables: list[Table], tmp_path: Path, columns: str) -> None:
    debian.need(["pdflatex"], ["texlive-latex-base", "texlive-latex-recommended"])
    table = made({"a_b%": {BPB: Score(1.2)}, "bld": {}}, notes=(NASTY,))
    (tmp_path / "tables.tex").write_text(report.render([*tables, table], "latex"), "ascii")
    document = rf"""\documentclass[{columns}]{{article}}
\usepackage{{booktabs,graphicx}}
\begin{{document}}
See Table~\ref{{tab:smol-mistral}}.
\input{{tables}}
\end{{document}}
"""
    (tmp_path / "paper.tex").write_text(document, "ascii")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    for _ in range(2):  # the second run knows the references
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "paper.log").read_text("latin-1")
    assert "Overfull" not in log
    assert "undefined references" not in log
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000
