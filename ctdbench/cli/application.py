"""The application, its errors on one line, and the options that several commands take."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ctdbench.errors import UserError
from ctdbench.spec import EvalSpec, TrainSpec, format_bytes

DEFAULT_STORE = Path("runs")


class _OneLineErrors(TyperGroup):
    """Shows every error as one line on stderr; with --debug its traceback, too."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> None:
        arguments = sys.argv[1:] if args is None else list(args)
        extra["standalone_mode"] = False
        try:
            code = super().main(arguments, *rest, **extra)
        except Exception as error:
            if "--debug" in arguments:
                traceback.print_exc()
            line, code = _describe(error)
            typer.echo(f"error: {line}", err=True)
        sys.exit(code)


def _describe(error: Exception) -> tuple[str, int]:
    """One line and the exit code: 2 for a bad request, 3 for a failed preflight, else 1."""
    if isinstance(error, UserError):
        line = str(error)
    elif hasattr(error, "format_message"):  # the command line itself is at fault
        context = getattr(error, "ctx", None)
        line = error.format_message() + (f" See {context.command_path} --help" if context else "")
    else:
        line = f"{type(error).__name__}: {error} (--debug shows where)"
    return one_line(line), getattr(error, "exit_code", 1)


def one_line(text: str) -> str:
    """What a file or a name holds must not command the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


app = typer.Typer(
    cls=_OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Cross-tokenizer distillation: many methods, one harness, one evaluation, honest tables.",
)


Store = Annotated[Path, typer.Option(help="Folder of finished cells.")]
Pair = Annotated[str | None, typer.Option(help="A pair's name (ctdbench list pairs) or YAML file.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file with your own method."),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder with tasks' data; without it: the hub.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Text to train on, in bytes: 1.5MB.", show_default=format_bytes(TrainSpec().budget)
    ),
]
_tasks = partial(
    typer.Option, "--tasks", "--task", help="Tasks' names or YAML files, separated by commas."
)
_limit = partial(typer.Option, help="At most this many items a task.")
Tasks = Annotated[str | None, _tasks(show_default=", ".join(EvalSpec().tasks))]
Limit = Annotated[int | None, _limit(show_default=str(EvalSpec().limit or "all items"))]
CellsTasks = Annotated[str | None, _tasks(show_default="a cell's own")]
CellsLimit = Annotated[int | None, _limit(show_default="a cell's own")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Sections: train, method, eval."),
]
BlockRows = Annotated[
    int | None, typer.Option(help="Rows whose logits exist at a time; less memory, same loss.")
]
Track = Annotated[
    Literal["tensorboard", "trackio", "wandb"] | None,
    typer.Option(help="Send the metrics of training to this tracker, too; none by default."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that comes with a hub model.")
]


def stop(problems: Sequence[UserError]) -> None:
    """Tell all problems, a line each, and end; the worst decides the exit code."""
    if problems:
        *others, last = sorted(problems, key=lambda problem: problem.exit_code)
        for problem in others:
            typer.echo(f"error: {one_line(str(problem))}", err=True)
        raise last


@app.callback(invoke_without_command=True)
def main_help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from ctdbench import __version__

        typer.echo(f"ctdbench {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def headline() -> dict[str, str]:
    """The metric to show of every task."""
    from ctdbench.evaluate import available_tasks

    return {info.name: info.metric for info in available_tasks()}
