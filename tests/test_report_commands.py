"""The commands that show results: what they write, what they load, how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from example_store import write_store
from test_cli import apart, call

from ctdbench import report
from ctdbench.distill import models
from ctdbench.report import FORMATS, readme

HEAVY = {"torch", "transformers", "peft", "lm_eval", "datasets"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))
    write_store(tmp_path / "runs", ("sft", "bld"), seeds=2, documents=20)
    return tmp_path / "runs"


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_in_every_format(store: Path, name: str) -> None:
    done = call("table", "--store", str(store), "--format", name)
    assert done.exit_code == 0, done.output
    assert "mixed" in done.stdout


def test_tables_figures_and_the_page_load_nothing_heavy(store: Path, tmp_path: Path) -> None:
    here = ("--store", str(store))
    commands = {
        "table": HEAVY | {"matplotlib"},
        "figures": HEAVY,
        "report": HEAVY,
        "results": HEAVY,
    }
    out = {name: ("--out", str(tmp_path / name)) for name in ("figures", "report", "results")}
    out["results"] += ("--format", "svg")
    for command, unwanted in commands.items():
        done, loaded = apart(command, *here, *out.get(command, ()))
        assert done.returncode == 0, done.stderr
        assert not loaded & unwanted


def test_figures_name_their_files_or_the_reason(store: Path, tmp_path: Path) -> None:
    done = call("figures", "--store", str(store), "--out", str(tmp_path), "--format", "svg")
    assert done.exit_code == 0, done.output
    (folder,) = tmp_path.glob("1-smol-mistral")
    assert {path.stem for path in folder.glob("*.svg")} == {"scores", "curves", "points", "cost"}
    assert "ranks: " in done.stdout  # two seeds are too few
    wrong = call("figures", "--store", str(store), "--out", str(tmp_path), "--format", "gif")
    assert wrong.exit_code == 2
    assert "gif" in wrong.stderr


def test_one_command_writes_everything(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = call("results", "--store", str(store), "--out", str(out), "--format", "svg,pdf")
    assert done.exit_code == 0, done.output
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    suffixes = {report.SUFFIXES.get(name, name) for name in report.FORMATS}
    figures = {"scores", "curves", "points", "cost"}  # two seeds are too few for ranks
    assert files == {
        "report.html",
        *(f"tables.{suffix}" for suffix in suffixes),
        *(f"figures/1-smol-mistral/{name}.{kind}" for name in figures for kind in ("svg", "pdf")),
    }
    assert len(suffixes) == 6
    assert all((out / name).stat().st_size > 500 for name in files)
    markdown = call("table", "--store", str(store), "--format", "markdown").stdout
    assert (out / "tables.md").read_text(encoding="utf-8") == markdown
    again = call("results", "--store", str(store), "--out", str(out / "report.html"))
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    assert "cannot write" in again.stderr


def test_a_table_can_be_put_into_a_file(store: Path, tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text(f"above\n{readme.BEGIN}\n{readme.END}\nbelow\n", encoding="utf-8")
    assert call("table", "--store", str(store), "--into", str(page)).exit_code == 0
    markdown = call("table", "--store", str(store), "--format", "markdown").stdout
    assert readme.shown(page) == markdown
    assert page.read_text(encoding="utf-8").endswith("below\n")


def test_an_inspection_of_the_tiny_pair(tmp_path: Path) -> None:
    done = call("inspect", "--pair", "tiny", "--bytes", "5kB", "--format", "json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pair"] == "tiny"
    figures = call("inspect", "--pair", "tiny", "--bytes", "2kB", "--figures", str(tmp_path))
    assert figures.exit_code == 0, figures.output
    assert {path.stem for path in tmp_path.glob("*.pdf")} == {
        "teacher-alignment", "teacher-overlap",
    }  # fmt: skip


def test_an_inspection_loads_every_tokenizer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = models.load_tokenizer, list[str]()

    def counted(name: str, **trust: bool) -> Any:
        loaded.append(name)
        return load(name, **trust)

    monkeypatch.setattr(models, "load_tokenizer", counted)
    done = call("inspect", "--pair", "tiny", "--bytes", "2kB", "--figures", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert loaded == ["tiny:student", "tiny:teacher"]


def test_a_sentence_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    arguments = ("--pair", "tiny", "--bytes", "2kB", "--figures", str(tmp_path))
    done = call("inspect", *arguments, "--sentence", "caf\udce9")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "the sentence has a lone surrogate at character 3" in done.stderr


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for command in (["table"], ["figures", *out], ["report"], ["results", *out]):
        done = call(*command, "--store", str(tmp_path / "none"))
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert "ctdbench run makes some" in done.stderr
    assert not [*tmp_path.iterdir()]
    done = call("publish", "abc", "--store", str(tmp_path / "none"))
    assert done.exit_code == 2
    assert "no finished cell" in done.stderr
