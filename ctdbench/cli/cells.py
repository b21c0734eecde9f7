"""Commands that compute cells, and what is done with finished ones."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ctdbench.cli.application import (
    DEFAULT_STORE,
    BlockRows,
    Budget,
    DataDir,
    Debug,
    Limit,
    Pair,
    Plugins,
    Settings,
    Store,
    Tasks,
    Track,
    TrustRemoteCode,
    app,
    headline,
    stop,
)
from ctdbench.errors import UserError
from ctdbench.spec import RunSpec


@app.command()
def run(
    method: Annotated[
        str | None,
        typer.Option(help="A row: bld, bld[path], gold+ce (see ctdbench list methods)."),
    ] = None,
    pair: Pair = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of data order and new weights.",
            show_default=str(RunSpec.model_fields["seed"].default),
        ),
    ] = None,
    budget: Budget = None,
    tasks: Tasks = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    store: Store = DEFAULT_STORE,
    config: Annotated[
        Path | None, typer.Option(help="YAML with method, pair, seed, options, train, eval.")
    ] = None,
    settings: Settings = None,
    plugin: Plugins = None,
    block_rows: BlockRows = None,
    track: Track = None,
    keep_model: Annotated[
        bool,
        typer.Option("--keep-model", help="Keep the trained student, for export and evaluate."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Train and evaluate one cell.

    Shows it beside the baselines. The same command again resumes, or says that it is done.
    """
    from ctdbench import registry, request
    from ctdbench.distill import tracking

    if method and "," in method:
        raise UserError(f"run takes one method; several: ctdbench sweep --method {method}")
    for path in plugin or []:
        registry.add_plugin(path)
    if track:
        tracking.require(track)
    flags = {
        "method": method,
        "pair": pair,
        "seed": seed,
        "train": {
            "budget": budget,
            "block_rows": block_rows,
            "keep_model": keep_model or None,
        },
        "eval": {
            "tasks": tasks and tuple(name.strip() for name in tasks.split(",")),
            "limit": limit,
            "data_dir": data_dir and str(data_dir),
        },
    }
    spec = request.build_spec(flags, config, settings or [], trust_remote_code=trust_remote_code)
    from ctdbench.launch.preflight import preflight

    stop(preflight([spec], store))
    spec = request.resolve_options(spec)
    from ctdbench.launch.cell import run_cell

    result = run_cell(spec, store, track=track)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        return
    if result["was_done"]:
        typer.echo("This cell was done already; nothing was computed.", err=True)
    _show_beside(result, store)


def _show_beside(result: Any, store: Path) -> None:
    """The tables that the cell is in, and where it is."""
    from ctdbench import report, results

    pair, method = result["spec"]["pair"]["name"], result["spec"]["method"]
    known = results.find(store, pair=pair, status=None)
    tables = report.comparison(report.comparable(result, known), headline())
    typer.echo(report.render(tables, "terminal"), nl=False)
    cell = result["id"]
    typer.echo(f"cell {cell}: {results.cell_dir(store, pair, method, cell)}")


@app.command()
def reproduce(
    table: Annotated[
        str, typer.Argument(help="bld-table1, bld-table2, ... (a wrong one lists them).")
    ],
    scale: Annotated[
        Literal["paper", "cpu"],
        typer.Option(help="The paper's models, or its design on a small pair."),
    ] = "paper",
    budget: Annotated[
        str | None,
        typer.Option(help="Text to train on, in bytes; default: the paper's, cpu: 200kB."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many items a task.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0 on.")] = 1,
    corpus: Annotated[
        str | None, typer.Option(help="Text, such as jsonl:PATH; needed at the paper's scale.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with tasks' data; without it: the hub, cpu: embedded."),
    ] = None,
    store: Store = DEFAULT_STORE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show cells and settings only.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a published table here and show it beside the paper's numbers."""
    from ctdbench import recipes, request
    from ctdbench.launch import reproduce as launcher
    from ctdbench.launch.preflight import preflight
    from ctdbench.launch.table_plan import Ask, plan
    from ctdbench.report.reproduction_text import render

    size = request.bytes_of(budget, "--budget") if budget else None
    planned = plan(recipes.load(table), Ask(scale, size, limit, seeds, corpus, data_dir))
    check = partial(preflight, store=store)
    if dry_run:
        planned = planned.resolved(request.resolve_options)
        text, failing = launcher.describe(planned, store, check)
        typer.echo(text, nl=False)
        raise typer.Exit(3 if failing else 0)
    stop(launcher.problems(planned, check))
    planned = planned.resolved(request.resolve_options)
    outcomes = launcher.run(planned, store, lambda line: typer.echo(line, err=True))
    typer.echo(render(launcher.compare(planned, outcomes, store)), nl=False)
    if any(isinstance(outcome, str) for outcome in outcomes.values()):
        raise typer.Exit(1)


@app.command()
def publish(
    cell: Annotated[str, typer.Argument(help="A cell's id, or how it begins; none: all.")] = "",
    store: Store = DEFAULT_STORE,
    to: Annotated[Path, typer.Option(help="Folder of published cells.")] = Path("results"),
    debug: Debug = False,
) -> None:
    """Copy checked cells and their baselines to where they are committed.

    Without a cell: all that are not there yet, and the trials of sweeps.
    """
    from ctdbench.launch.publish import publish as copy
    from ctdbench.launch.publish import publish_all

    for folder in copy(store, cell, to) if cell else publish_all(store, to):
        typer.echo(folder)
