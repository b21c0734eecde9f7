"""The commands. Nothing heavy is imported here: `--help` and `list` answer at once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ctdbench.errors import UserError

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
    return " ".join(line.split()), getattr(error, "exit_code", 1)


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


@app.command()
def run(
    method: Annotated[str | None, typer.Option(help="A method's name (ctdbench list).")] = None,
    pair: Pair = None,
    seed: Annotated[int | None, typer.Option(help="Of data order and new weights.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Text to train on, in bytes: 200kB, 1.5MB.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Task names, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many items a task.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with tasks' data; without it: the hub.")
    ] = None,
    store: Store = DEFAULT_STORE,
    config: Annotated[
        Path | None, typer.Option(help="YAML with method, pair, seed, options, train, eval.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Sections: train, method, eval."),
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Python file with your own method."),
    ] = None,
    block_rows: Annotated[
        int | None, typer.Option(help="Rows whose logits exist at a time; less memory, same loss.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python that comes with a hub model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train and evaluate one cell.

    Shows it beside the baselines. The same command again resumes, or says that it is done.
    """
    from ctdbench import registry, request

    for path in plugin or []:
        registry.add_plugin(path)
    flags = {
        "method": method,
        "pair": pair,
        "seed": seed,
        "train": {"budget": budget, "block_rows": block_rows},
        "eval": {
            "tasks": tasks and tuple(name.strip() for name in tasks.split(",")),
            "limit": limit,
            "data_dir": data_dir and str(data_dir),
        },
    }
    spec = request.build_spec(flags, config, settings or [], trust_remote_code=trust_remote_code)
    request.preflight(spec)
    spec = request.resolve_options(spec)
    from ctdbench.launch.cell import run_cell

    folder = Path(spec.eval.data_dir) if spec.eval.data_dir else None
    result = run_cell(spec, store, data_dir=folder)
    if result["was_done"]:
        typer.echo("This cell was done already; nothing was computed.", err=True)
    _show_beside(result, store)


def _show_beside(result: Any, store: Path) -> None:
    from ctdbench import report, results

    known = results.find(store, pair=result["spec"]["pair"]["name"], status=None).values()
    tables = report.comparison(report.comparable(result, known), _headline())
    typer.echo(report.render(tables, "terminal"), nl=False)


def _headline() -> dict[str, str]:
    """The metric to show of every task."""
    from ctdbench.evaluate import available_tasks

    return {info.name: info.metric for info in available_tasks()}


@app.command(name="list")
def list_names(
    what: Annotated[
        Literal["methods", "pairs", "tasks", "all"], typer.Argument(help="What to list.")
    ] = "all",
) -> None:
    """List methods, pairs and tasks."""
    from ctdbench import request

    if what == "methods":
        typer.echo("\n".join(request.method_table()))
        return
    listed = request.listing()
    for kind in listed if what == "all" else [what]:
        if what == "all":
            typer.echo(f"{kind}:")
        width = max(map(len, listed[kind]))
        for name, title in listed[kind].items():
            typer.echo(f"  {name:{width}}  {title}".rstrip())


@app.command()
def table(
    store: Store = DEFAULT_STORE,
    format_name: Annotated[
        str, typer.Option("--format", help="terminal, markdown, csv or json.")
    ] = "terminal",
    pair: Annotated[str | None, typer.Option(help="Only this pair.")] = None,
    debug: Debug = False,
) -> None:
    """Show finished cells beside the baselines."""
    from ctdbench import report, results

    found = results.find(store, pair=pair, status=None)
    if not found:
        of_pair = f" of pair {pair}" if pair else ""
        raise UserError(f"no results{of_pair} in {store}", "ctdbench run makes some")
    typer.echo(report.render(report.comparison(found.values(), _headline()), format_name), nl=False)


@app.command()
def corpus(
    out: Annotated[Path, typer.Option(help="File to write, .jsonl.gz.")],
    seed: Annotated[int, typer.Option(help="Of the prompts' order and the sampling.")] = 0,
    size: Annotated[str, typer.Option("--bytes", help="How much text: 1500kB.")] = "1500kB",
    debug: Debug = False,
) -> None:
    """Generate the embedded corpus anew.

    SmolLM2-135M-Instruct answers the shipped prompts.
    """
    from ctdbench import registry, request

    target = request.bytes_of(size, "--bytes")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist", "make it first, or name another")
    import torch
    from tqdm import tqdm

    from ctdbench.distill import generate, models

    author = registry.load_pair("smol-mistral").teachers[0].model
    model = models.load_model(author).to(torch.bfloat16)
    tokenizer = models.load_tokenizer(author)
    documents = []
    with tqdm(total=target, unit="B", unit_scale=True) as progress:
        sampling = generate.Sampling(seed=seed)
        for document in generate.generate_corpus(model, tokenizer, target, sampling):
            documents.append(document)
            progress.update(sum(len(part["text"].encode()) for part in document["segments"]))
    generate.write_corpus(out, documents, author, sampling)
    typer.echo(f"{out}: {len(documents)} documents")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A method's name (ctdbench list methods).")],
    plugin: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Python file with your own method."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="method.FIELD=VALUE", help="Options of the method."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check a method: its contract, what must not change its loss, a short training run.

    Exit code 0 if every check passes, else 1.
    """
    from ctdbench import registry, request

    for setting in settings or []:
        if not setting.startswith("method."):
            raise UserError(
                f"--set {setting}: check takes options of the method alone",
                "write --set method.FIELD=VALUE",
            )
    for path in plugin or []:
        registry.add_plugin(path)
    spec = request.build_spec({"method": name, "pair": "tiny"}, settings=settings or [])
    spec = request.resolve_options(spec)
    from ctdbench.launch import conformance

    if not conformance.run(spec, typer.echo, debug=debug):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Show what this machine has for a run."""
    from ctdbench.doctor import findings

    for name, finding in findings():
        typer.echo(f"{name:<24} {finding}")


def main() -> None:
    """Entry point of the `ctdbench` command."""
    app()
