"""Every command in the README is one that the command line takes, with names that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from documented_commands import commands, parse
from typer.testing import CliRunner

from ctdbench import registry
from ctdbench.cli import app
from ctdbench.errors import PreflightError
from ctdbench.evaluate import available_tasks
from ctdbench.launch import preflight

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


COMMANDS = commands(TEXT, "ctdbench")
TASK = """\
task: my-task
output_type: loglikelihood_rolling
custom_dataset: !function ctdbench_tasks.data.pydoc
test_split: test
doc_to_text: ""
doc_to_target: text
process_results: !function ctdbench_tasks.scoring.document
metric_list:
  - {metric: bpb, aggregation: mean, higher_is_better: false}
"""


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_parses(arguments: list[str]) -> None:
    parse(arguments)


runs = [line for line in COMMANDS if line[0] == "run"]


@pytest.mark.parametrize("arguments", runs, ids=" ".join)
def test_a_run_of_the_readme_names_what_exists(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything up to the engine goes through: names, settings, the method's options."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_plugins", {})
    if "mine.py" in arguments:
        assert CliRunner().invoke(app, ["new-method", "mine"]).exit_code == 0
    pair = (ROOT / "ctdbench" / "pairs" / "smol-mistral.yaml").read_text(encoding="utf-8")
    Path("my-pair.yaml").write_text(pair, encoding="utf-8")
    Path("my-task.yaml").write_text(TASK, encoding="utf-8")

    def stop(spec: Any, *_: Any, **__: Any) -> None:
        known = {info.name for info in available_tasks(spec.eval.extra_tasks)}
        assert set(spec.eval.tasks) <= known
        raise PreflightError("reached the engine")

    engine = ModuleType("ctdbench.launch.cell")
    engine.run_cell = stop  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ctdbench.launch.cell", engine)
    monkeypatch.setattr(preflight, "preflight", lambda specs, store: [])
    outcome = CliRunner().invoke(app, arguments)
    assert (outcome.exit_code, outcome.stderr) == (3, "error: reached the engine\n")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_tree_of_the_readme_exists() -> None:
    (tree,) = re.findall(r"```\n(ctdbench/.*?)```", TEXT, flags=re.DOTALL)
    for name in re.findall(r"(?<![\w/])(\w+\.py|\w+/)(?=\s)", tree):
        assert (ROOT / name).exists() or (ROOT / "ctdbench" / name).exists(), name
