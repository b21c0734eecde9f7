"""Commands that show: what there is, and what finished cells say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ctdbench.cli.application import DEFAULT_STORE, Debug, Store, app, headline
from ctdbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ctdbench.report import Table
    from ctdbench.results import Result

SENTENCE = "In 1969 Neil Armstrong's first step was broadcast to 650 million people: 月球."
Formats = Annotated[str, typer.Option("--format", help="pdf, svg, png; several with commas.")]
OnePair = Annotated[str | None, typer.Option(help="Only this pair: its name or YAML file.")]


@app.command(name="list")
def list_names(
    what: Annotated[
        Literal["methods", "pairs", "tasks", "all"], typer.Argument(help="What to list.")
    ] = "all",
) -> None:
    """List methods, pairs and tasks."""
    from ctdbench import request

    if what == "methods":
        typer.echo("\n".join([*request.method_table(), "", *request.row_table()]))
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
        str, typer.Option("--format", help="terminal, markdown, latex, csv, html or json.")
    ] = "terminal",
    pair: OnePair = None,
    into: Annotated[
        Path | None, typer.Option(help="Markdown file: replace the tables between its marks.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show finished cells beside the baselines."""
    from ctdbench import report
    from ctdbench.report import readme

    if into is not None and format_name not in ("terminal", "markdown"):
        raise UserError(f"--into writes markdown, not {format_name}", "leave one of them out")
    found = _found(store, pair)
    tables = report.comparison(found, headline())
    if into is None:
        typer.echo(report.render(tables, format_name), nl=False)
    else:
        readme.insert(into, report.render(tables, "markdown"))


@app.command()
def figures(
    out: Annotated[Path, typer.Option(help="Folder to write to; one below it for each table.")],
    store: Store = DEFAULT_STORE,
    pair: OnePair = None,
    formats: Formats = "pdf,svg,png",
    debug: Debug = False,
) -> None:
    """Draw finished cells: scores, learning curves, quality against cost, average ranks."""
    from ctdbench import report

    found = _found(store, pair)
    _draw(report.comparison(found, headline()), found, out, formats)


@app.command(name="report")
def write_report(
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    store: Store = DEFAULT_STORE,
    pair: OnePair = None,
    debug: Debug = False,
) -> None:
    """Write one HTML file that opens offline: tables, figures, every cell, what is missing."""
    from ctdbench.report import page

    page.write(_found(store, pair), headline(), out)
    typer.echo(out)


@app.command(name="results")
def write_results(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    store: Store = DEFAULT_STORE,
    pair: OnePair = None,
    formats: Formats = "pdf,svg,png",
    debug: Debug = False,
) -> None:
    """Write all of it into one folder: tables in every format, the figures, the report."""
    from ctdbench import atomic, report
    from ctdbench.report import page

    found = _found(store, pair)
    tables = report.comparison(found, headline())
    for name in report.FORMATS:
        path = out / f"tables.{report.SUFFIXES.get(name, name)}"
        atomic.write_bytes(path, report.render(tables, name).encode(errors="replace"))
        typer.echo(path)
    _draw(tables, found, out / "figures", formats)
    page.write(found, headline(), out / "report.html")
    typer.echo(out / "report.html")


def _draw(tables: Sequence[Table], found: Mapping[Path, Result], out: Path, formats: str) -> None:
    """The figures of every table, each in a folder of its own."""
    from ctdbench.report import figures as drawing

    names = [name.strip() for name in formats.split(",")]
    folders = {result["id"]: folder for folder, result in found.items()}
    for number, table in enumerate(tables, 1):
        typer.echo(table.title)
        _tell(drawing.draw(table, folders, out / f"{number}-{table.pair}", names))


def _tell(drawn: Mapping[str, list[Path] | str]) -> None:
    """Files that were written, or why a figure was not drawn."""
    for name, made in drawn.items():
        typer.echo(f"  {name}: {made if isinstance(made, str) else ' '.join(map(str, made))}")


def _found(store: Path, pair: str | None) -> dict[Path, Result]:
    """All cells, those that failed too; raises UserError where there are none."""
    from ctdbench import registry, results

    if pair and registry.is_file_name(pair):
        pair = registry.load_pair(pair).name
    found = results.find(store, pair=pair, status=None)
    if not found:
        of_pair = f" of pair {pair}" if pair else ""
        raise UserError(f"no results{of_pair} in {store}", "ctdbench run makes some")
    return found


@app.command()
def inspect(
    pair: Annotated[str, typer.Option(help="A pair's name (ctdbench list pairs) or YAML file.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text file, or .jsonl with field text; default: held-out embedded text."),
    ] = None,
    size: Annotated[str, typer.Option("--bytes", help="How much of the text: 100kB.")] = "100kB",
    model: Annotated[
        bool, typer.Option("--model", help="Load the teachers, to measure their probabilities.")
    ] = False,
    format_name: Annotated[
        Literal["terminal", "json"], typer.Option("--format", help="terminal or json.")
    ] = "terminal",
    figures_to: Annotated[
        Path | None, typer.Option("--figures", help="Folder: draw both tokenizations, the overlap.")
    ] = None,
    sentence: Annotated[str, typer.Option(help="What --figures shows tokenized.")] = SENTENCE,
    debug: Debug = False,
) -> None:
    """Show what a pair's tokenizers share, how they cut a text, and which X-Token loss fits.

    Only tokenizers are loaded, unless --model is given.
    """
    from ctdbench import registry, request, results
    from ctdbench.distill import references
    from ctdbench.report.inspection import render_inspection

    amount, found = request.bytes_of(size, "--bytes"), registry.load_pair(pair)
    needed = request.references_of(found) if model else request.tokenizers_of(found)
    for reference in needed:  # before torch, which takes seconds
        references.require(references.parse(reference))
    from ctdbench.distill.inspection import inspect_pair, tokenizer_sides

    sides = tokenizer_sides(found)
    findings = inspect_pair(found, text, size=amount, load_models=model, sides=sides)
    typer.echo(render_inspection(findings, format_name), nl=False)
    if figures_to is not None:
        from ctdbench.report import figures as drawing

        student, *teachers = sides
        *names, _ = results.baselines(len(teachers))
        for name, teacher in zip(names, teachers, strict=True):
            made = drawing.draw_pair(student.tokens, teacher.tokens, sentence, figures_to, name)
            _tell(made)


@app.command()
def doctor() -> None:
    """Show what this machine has for a run."""
    from ctdbench.doctor import findings

    for name, finding in findings():
        typer.echo(f"{name:<24} {finding}")
