"""Numbers of the papers: complete, unambiguous, and never read from another table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from statistics import fmean

import pytest

from ctdbench.errors import UserError
from ctdbench.report import papers
from ctdbench.report.papers import Key, PaperTable, Reported

# Rows by table, counted when the files were made.
SIZES = {
    ("bld", "Table 1"): 9,
    ("bld", "Table 2"): 6,
    ("bld", "Table 3"): 2,
    ("alm", "Table 1"): 176,
    ("alm", "Table 3"): 21,
    ("x-token", "Table 1"): 72,
}
TOTAL = 1519


def every_table() -> Iterator[PaperTable]:
    for name in papers.tables():
        yield papers.read(*name)


def test_no_number_was_lost() -> None:
    found = {(table.paper, table.table): len(table.numbers) for table in every_table()}
    assert SIZES.items() <= found.items()
    assert sum(found.values()) == TOTAL


def test_every_number_is_one_a_paper_can_print() -> None:
    for table in every_table():
        for key, reported in table.numbers.items():
            assert reported.provenance in ("primary", "two-sources", "one-source"), key
            assert reported.stderr is None or reported.stderr > 0, key
            if key.metric in ("acc", "mean", "exact_match"):
                assert 0 <= reported.value <= 100, key


def test_a_number_is_found_by_its_table_and_key() -> None:
    table = papers.read("alm", "Table 3")
    found = table.find("OpenMath2-Llama3.1-8B -> Gemma2 2B", "alm+sft", "gsm8k")
    assert found is not None
    assert (found.value, found.stderr, found.provenance) == (70.2, 1.26, "primary")
    assert found.teacher == "OpenMath2-Llama3.1-8B"
    assert table.find("OpenMath2-Llama3.1-8B -> Gemma2 2B", "bld", "gsm8k") is None


def test_a_table_knows_nothing_of_another() -> None:
    """The unmodified model is in Tables 1, 2 and 12 of ALM, under other settings."""
    gemma = ("original", "piqa")
    assert papers.read("alm", "Table 2").find("Gemma2 2B IT", *gemma) is not None
    assert papers.read("alm", "Table 1").find("Gemma2 2B IT", *gemma) is None


def test_an_unknown_table_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean .*alm Table 1"):
        papers.read("alm", "Tabel 1")


def test_two_numbers_for_one_key_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(papers._rows())
    monkeypatch.setattr(papers, "_rows", lambda: iter([*rows, rows[0]]))
    with pytest.raises(UserError, match="two numbers"):
        papers._tables.__wrapped__()


@pytest.mark.parametrize("name", [("alm", "Table 1"), ("alm", "Table 3"), ("x-token", "Table 1")])
def test_printed_averages_agree_with_their_cells(name: tuple[str, str]) -> None:
    """A slip of a column or a row would show here."""
    table = papers.read(*name)
    rows: dict[tuple[str, str], dict[Key, Reported]] = {}
    for key, reported in table.numbers.items():
        rows.setdefault((key.setting, key.method), {})[key] = reported
    for numbers in rows.values():
        printed = [one.value for key, one in numbers.items() if key.task == "average"]
        cells = [one.value for key, one in numbers.items() if key.task != "average"]
        assert printed == pytest.approx([fmean(cells)], abs=0.11)


def test_reading_them_loads_nothing_heavy() -> None:
    code = (
        "import sys, json; from ctdbench.report import papers; papers.read('alm', 'Table 1');"
        "print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & {"torch", "transformers", "pandas", "matplotlib"}
