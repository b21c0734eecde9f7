"""The notebooks: whole, small, of no machine, in step with the command line; slow: they run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from documented_commands import commands, parse
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from python_files import load

from ctdbench import registry, request
from ctdbench.distill import references
from ctdbench.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
REAL = {"quickstart", "reproducing-a-table"}  # on the pair smol-mistral
NAMES = sorted({"adding-a-method", "reading-results"} | REAL)
LARGEST = 200_000  # bytes of a file
PLACES = r"/(?:home|root|Users|tmp|work|var|opt|mnt|private)/|[A-Z]:\\"
READ = {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in NAMES}

notebooks = pytest.mark.parametrize("name", NAMES)


EXECUTE = load(FOLDER / "execute.py")


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def texts(notebook: NotebookNode) -> Iterator[str]:
    """All that can be read: sources, streams, data without the images."""
    yield from (cell.source for cell in notebook.cells)
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (str(text) for kind, text in output.get("data", {}).items() if "text/" in kind)


def lines(notebook: NotebookNode) -> list[list[str]]:
    """Arguments of every ctdbench command, in shell lines and in the text."""
    sources = "\n".join(cell.source for cell in code(notebook))
    shell = "\n".join(re.findall(r"^!((?:.*\\\n)*.*)$", sources, flags=re.MULTILINE))
    found = commands(f"{prose(notebook)}\n```bash\n{shell}\n```", "ctdbench")
    return [list(takewhile(lambda word: word not in {">", "|"}, line)) for line in found]


def prose(notebook: NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_every_notebook_is_known_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@notebooks
def test_it_is_valid_and_small(name: str) -> None:
    nbformat.validate(READ[name])
    assert READ[name].metadata.kernelspec.name == "python3"
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@notebooks
def test_it_was_run_from_top_to_bottom_without_a_fault(name: str) -> None:
    cells = code(READ[name])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[-1].outputs
    assert {output.output_type for output in outputs(READ[name])} >= {"stream"}
    for output in outputs(READ[name]):
        assert output.output_type != "error"
        shown = output.get("text", "")
        assert not re.search(r"warning|traceback|^error:|\x1b|\r", shown, re.I | re.M), shown


@notebooks
def test_it_names_no_place_of_a_machine(name: str) -> None:
    for text in texts(READ[name]):
        assert not re.search(PLACES, text), text
        assert str(Path.home()) not in text


@notebooks
def test_every_command_parses(name: str) -> None:
    assert lines(READ[name])
    for arguments in lines(READ[name]):
        parse(arguments)


@notebooks
def test_its_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(READ[name])):
        assert link.startswith("https://") or (FOLDER / link).is_file(), link


def test_the_method_is_the_tutorials() -> None:
    tutorial = (ROOT / "docs/tutorials/adding-a-method.md").read_text(encoding="utf-8")
    block = r'^```python title="(skew_kl.py)"\n(.*?)^```$'
    (stated,) = re.findall(block, tutorial, flags=re.MULTILINE | re.DOTALL)
    (cell,) = [c for c in code(READ["adding-a-method"]) if c.source.startswith("%%writefile")]
    assert cell.source == f"%%writefile {stated[0]}\n{stated[1]}".rstrip("\n")


def test_progress_bars_are_not_kept() -> None:
    def stream(text: str, name: str = "stdout") -> Any:
        return nbformat.v4.new_output("stream", name=name, text=text)

    bar = "\r  0%|   | 0/2\r100%|###| 2/2\r\n"
    found = EXECUTE.kept(
        [stream("one\r\n" + bar[:9]), stream(bar[9:] + "two\n"), stream(bar, "stderr")]
    )
    assert [(output.name, output.text) for output in found] == [("stdout", "one\ntwo\n")]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["!false\n!true", "1 / 0"])
def test_a_cell_that_fails_ends_the_run(source: str, tmp_path: Path) -> None:
    path = tmp_path / "failing.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    with pytest.raises(CellExecutionError):
        EXECUTE.executed(path, tmp_path)


@pytest.mark.slow
@notebooks
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every cell shows is of the kinds that are kept of it."""
    if name in REAL:
        try:
            for reference in request.references_of(registry.load_pair("smol-mistral")):
                references.require(references.parse(reference))
        except UserError as error:
            pytest.skip(str(error))
    else:
        monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    folder.mkdir()
    found = EXECUTE.executed(FOLDER / f"{name}.ipynb", folder)
    assert [kinds(cell) for cell in code(found)] == [kinds(cell) for cell in code(READ[name])]


def kinds(cell: NotebookNode) -> list[tuple[str, list[str]]]:
    return [
        (output.output_type, sorted(output.get("data", [output.get("name")])))
        for output in cell.outputs
    ]
