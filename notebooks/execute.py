"""Run the notebooks from top to bottom and keep what they show: `make notebooks`.

    .venv/bin/python notebooks/execute.py [NOTEBOOK ...]

Each runs in an empty folder, by the commands of the environment that this script runs in. A command
that fails ends the run, though `!` alone would go on. Progress bars are not kept.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
LIMIT = 3600  # seconds a cell
DRAWN_OVER = re.compile(r"[^\n]*\r[^\n]*\n?")  # a line that went back to its start: a progress bar
STRICT = """
def _strict(run):
    def system(command):
        run(command)
        if get_ipython().user_ns["_exit_code"]:
            raise RuntimeError(f"failed: {command}")
    return system

get_ipython().system = _strict(get_ipython().system)  # what `!command` calls
del _strict
"""


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook with what its cells showed in `folder`; raises nbclient's CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    client = NotebookClient(notebook, timeout=LIMIT, record_timing=False, kernel_name="python3")
    with TemporaryDirectory() as own:  # not the user's settings, which could change anything
        manager = client.create_kernel_manager()
        manager.transport, manager.ip = "ipc", f"{own}/kernel"  # TCP is open to the whole machine
        environment = {**os.environ, "PATH": places, "IPYTHONDIR": own}
        with client.setup_kernel(cwd=str(folder), env=environment):
            _run(client)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def _run(client: NotebookClient) -> None:
    """Every cell in turn, after one of ours that is not kept."""
    cells = client.nb.cells
    cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    client.execute_cell(cells[0], 0, store_history=False)
    del cells[0]
    for index, cell in enumerate(cells):
        client.execute_cell(cell, index)
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)


def kept(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of a stream as one, without progress bars; all else as it is."""
    merged: list[NotebookNode] = []
    for output in outputs:
        if merged and output.get("name") and output.get("name") == merged[-1].get("name"):
            merged[-1].text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            output.text = DRAWN_OVER.sub("", output.text.replace("\r\n", "\n"))
    return [output for output in merged if output.get("text") != ""]


def main(paths: Iterable[Path]) -> None:
    """Run these notebooks and write them back."""
    for path in paths:
        print(path.name, flush=True)
        with TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(HERE.glob("*.ipynb")))
