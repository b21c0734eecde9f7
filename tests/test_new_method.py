"""`new-method`: what it writes works as it is, and nothing is overwritten or half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ctdbench import registry
from ctdbench.cli import app
from ctdbench.launch import new_method

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_files_say_the_name(folder: Path) -> None:
    outcome = call("new-method", "my-loss")
    assert outcome.exit_code == 0
    assert outcome.stdout.splitlines()[:2] == ["my_loss.py", "test_my_loss.py"]
    assert sorted(path.name for path in folder.iterdir()) == ["my_loss.py", "test_my_loss.py"]
    for path in folder.iterdir():
        assert "new-method" not in path.read_text()
        assert "new_method" not in path.read_text()
    assert registry.add_plugin(folder / "my_loss.py") == "my-loss"
    assert str(registry.methods()["my-loss"].meta["title"]).startswith("my-loss: ")


def test_into_a_folder_that_is_not_there_yet(folder: Path) -> None:
    assert call("new-method", "mine", "--out", "deep/down").exit_code == 0
    assert (folder / "deep" / "down" / "mine.py").is_file()


def test_what_it_writes_passes_its_formula(folder: Path) -> None:
    """The rest of its test is `ctdbench check`, which takes longer."""
    call("new-method", "my-loss")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "formula"]
    done = subprocess.run([*command, "test_my_loss.py"], capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_what_it_writes_passes_all_that_it_says(folder: Path) -> None:
    told = call("new-method", "my-loss").stdout
    commands = [line.strip() for line in told.splitlines() if line.startswith("  ")]
    assert len(commands) == 3
    for command in commands:
        program, *arguments = command.split()
        module = "ctdbench" if program == "ctdbench" else "pytest"
        subprocess.run([sys.executable, "-m", module, *arguments], check=True, timeout=300)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("My-Loss", "no valid name"),
        ("../loss", "no valid name"),
        ("my_loss", "no name of a Python file"),
        ("a.b", "no name of a Python file"),
        ("2nd", "no name of a Python file"),
        ("bld", "there is a method 'bld' already"),
        ("start", "there is a method 'start' already"),
        ("teacher-2", "there is a method 'teacher-2' already"),
        ("torch", "would hide Python's module torch"),
    ],
)
def test_a_name_that_cannot_be(name: str, complaint: str, folder: Path) -> None:
    outcome = call("new-method", name)
    assert outcome.exit_code == 2
    assert complaint in outcome.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_nothing_is_overwritten(there: str, folder: Path) -> None:
    for occupy in (Path.touch, lambda path: path.symlink_to("nowhere")):
        path = folder / there
        occupy(path)
        outcome = call("new-method", "mine")
        assert outcome.exit_code == 2
        assert f"{there} is there already" in outcome.stderr
        assert [path.name for path in folder.iterdir()] == [there]
        path.unlink()


def test_what_fails_on_the_way_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = new_method._filled

    def broken(template: str, *names: str) -> str:
        if template.startswith("test_"):
            raise OSError(28, "No space left on device")
        return filled(template, *names)

    monkeypatch.setattr(new_method, "_filled", broken)
    outcome = call("new-method", "mine")
    assert outcome.exit_code == 1
    assert "No space left" in outcome.stderr
    assert not list(folder.iterdir())
