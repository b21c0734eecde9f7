"""Malformed input: one line that names the culprit, the right exit code, nothing changed."""

from __future__ import annotations

from pathlib import Path

import malformed
import pytest
from malformed import Bad
from typer.testing import CliRunner, Result

from ctdbench import registry
from ctdbench.cli import app

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_plugins", {})
    return tmp_path


def content(folder: Path) -> dict[Path, bytes | None]:
    """Every file with its bytes, and every folder."""
    found = (path for path in folder.rglob("*") if path.name != "__pycache__")
    return {p: p.read_bytes() if p.is_file() else None for p in found if p.suffix != ".pyc"}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("bad", malformed.ALL, ids=lambda bad: bad.name)
def test_malformed_input_is_one_line_and_changes_nothing(bad: Bad, folder: Path) -> None:
    arguments = bad.make(folder)
    before = content(folder)
    outcome = call(*arguments)
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert outcome.stderr.endswith(line + "\n")
    assert bad.culprit in line
    assert line.isprintable()
    assert outcome.exit_code == bad.code, line
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert content(folder) == before


def test_there_are_enough_of_them() -> None:
    names = [bad.name for bad in malformed.ALL]
    assert len(set(names)) == len(names) >= 60
