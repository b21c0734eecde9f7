"""Commands for a grid of cells: run it, or show what it would take."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ctdbench.cli.application import (
    DEFAULT_STORE,
    BlockRows,
    Budget,
    DataDir,
    Debug,
    Limit,
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

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ctdbench.launch.grid import Build, Line
    from ctdbench.launch.slurm import Cluster
    from ctdbench.launch.sweep import Place, Sweep
    from ctdbench.results import Result
    from ctdbench.spec import RunSpec

ALL = "all"


@app.command(name="plan", help="Show the cells of a sweep: done or not, cost, what would fail.")
@app.command(name="sweep")
def sweep(
    context: typer.Context,
    method: Annotated[
        str | None,
        typer.Option(help="Rows with commas: sft,bld[path],gold+ce; all: what serves the pair."),
    ] = None,
    pair: Annotated[str | None, typer.Option(help="Pairs or YAML files, with commas.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many, from 0 on; or a list: 1,2,3.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="This seed alone.")] = None,
    grid: Annotated[
        Path | None, typer.Option(help="YAML: pairs, rows, seeds, train, eval, tuning.")
    ] = None,
    budget: Budget = None,
    tasks: Tasks = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    store: Store = DEFAULT_STORE,
    config: Annotated[
        Path | None, typer.Option(help="YAML with options, train, eval for every cell.")
    ] = None,
    settings: Settings = None,
    plugin: Plugins = None,
    block_rows: BlockRows = None,
    track: Track = None,
    trust_remote_code: TrustRemoteCode = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Cells at a time; default: one a GPU, else one; on Slurm: all."),
    ] = None,
    launcher: Annotated[
        Literal["local", "slurm"], typer.Option(help="Processes here, or a Slurm job array.")
    ] = "local",
    slurm_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="One of sbatch's: gpus=1, time=4:00:00, ..."),
    ] = None,
    when: Annotated[
        Literal["always", "never", "only-missing", "only-failed"],
        typer.Option(help="Which cells to run. Missing ones may have a checkpoint."),
    ] = "only-missing",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show, as plan does.")] = False,
    debug: Debug = False,
) -> None:
    """Run a grid of cells, one process each, and show the table.

    The same command again goes on where it stopped. Exit code 1 if a cell failed.
    """
    from ctdbench import registry
    from ctdbench.distill import tracking
    from ctdbench.launch import local
    from ctdbench.launch.sweep import Sweep

    for path in plugin or []:
        registry.add_plugin(path)
    if track:
        tracking.require(track)
    named = {"method": method, "pair": pair, "seeds": seeds if seed is None else (seed,)}
    over = {
        "train": _given(budget=budget, block_rows=block_rows),
        "eval": _given(
            tasks=tasks and tuple(name.strip() for name in tasks.split(",")),
            limit=limit,
            data_dir=data_dir and str(data_dir),
        ),
    }
    build = partial(_build, config, settings or [], trust_remote_code)
    if grid is None:
        lines = _from_flags(named, over, build)
    else:
        _refuse(**named, config=config, settings=settings)
        lines = _from_file(grid, over, build)
    cluster = _cluster(launcher, slurm_option or [], store, jobs)
    slots = local.slots(jobs)
    here = None if cluster else len(slots)
    lines, problems = _checked(lines, store, here, drop_unfit=method == ALL)
    arguments = [f"--plugin={path}" for path in plugin or []]
    arguments += ["--trust-remote-code"] * trust_remote_code
    arguments += [f"--track={track}"] if track else []
    planned = Sweep(lines, store, when, tuple(arguments))
    if dry_run or context.info_name == "plan":
        _show(planned, problems, cluster)
        raise typer.Exit(3 if problems else 0)
    stop(problems)
    try:
        cells = planned.run(cluster.run if cluster else partial(local.run, places=slots))
    except local.Stopped as stopped:
        typer.echo(f"{stopped}; the same command goes on", err=True)
        raise typer.Exit(128 + stopped.number) from None
    if not _summary(planned, cells) and when != "never":
        raise typer.Exit(1)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _build(
    config: Path | None, settings: Sequence[str], trust: bool, flags: Mapping[str, Any]
) -> RunSpec:
    from ctdbench import request

    return request.build_spec(flags, config, settings, trust_remote_code=trust)


def _from_flags(named: Mapping[str, Any], over: Mapping[str, Any], build: Build) -> list[Line]:
    from ctdbench import registry
    from ctdbench.launch import grid

    for name in ("method", "pair"):
        if not named[name]:
            raise UserError(f"--{name} is missing", f"ctdbench list {name}s shows the names")
    rows = grid.all_rows() if named["method"] == ALL else _split(named["method"])
    fields = _given(pairs=_split(named["pair"]), rows=rows, seeds=named["seeds"])
    return grid.lines(registry.validate(grid.Grid, fields, "sweep"), build, over)


def _from_file(path: Path, over: Mapping[str, Any], build: Build) -> list[Line]:
    from ctdbench.launch import grid

    return grid.lines(grid.read(path), build, over)


def _refuse(**stated: Any) -> None:
    """What a grid's file says itself."""
    for name, value in stated.items():
        if value is not None:
            flag = {"settings": "set"}.get(name, name)
            raise UserError(f"--{flag}: the grid's file says this", "leave one of them out")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _cluster(
    launcher: str, options: Sequence[str], store: Path, jobs: int | None
) -> Cluster | None:
    """None for this machine."""
    from ctdbench.launch import slurm, slurm_script

    if launcher == "slurm":
        slurm_script.parse(options)
        return slurm.Cluster(store / "slurm", tuple(options), jobs)
    if options:
        raise UserError("--slurm-option is of no use here", "give --launcher slurm, too")
    return None


def _show(planned: Sweep, problems: Sequence[UserError], cluster: Cluster | None) -> None:
    """The cells and what would fail; the script that would be submitted first."""
    from ctdbench.launch.overview import is_known, overview

    typer.echo(overview(planned, problems), nl=False)
    if cluster and is_known(problems) and (jobs := planned.next_jobs()):
        script = cluster.script(jobs)
        typer.echo(f"\n{script.path}:\n\n{script.text}", nl=False)


def _checked(
    lines: list[Line], store: Path, jobs: int | None, *, drop_unfit: bool
) -> tuple[list[Line], list[UserError]]:
    """Lines with all options, unless something is missing or wrong, and what would fail.

    jobs: cells at a time on this machine; None: on others, of which this one knows nothing.
    drop_unfit: leave out methods that cannot serve their pair, instead of complaining.
    """
    from ctdbench import request
    from ctdbench.launch import slurm_queue
    from ctdbench.launch.preflight import Scarce, preflight, unfit

    specs = [cell.spec for line in lines for cell in [*line.trials, *line.finals()]]
    problems = preflight(specs, store, jobs=jobs or 1)
    if jobs is None:
        others = [problem for problem in problems if not isinstance(problem, Scarce)]
        problems = others + slurm_queue.missing()
    if not all(isinstance(problem, Scarce) for problem in problems):
        return lines, problems
    misfits = unfit([line.spec for line in lines])
    if drop_unfit:
        lines = [line for line in lines if all(line.spec is not spec for spec, _ in misfits)]
        for _, error in misfits:
            typer.echo(f"left out: {error}", err=True)
    elif misfits:
        return lines, [*problems, *(error for _, error in misfits)]
    return [line.resolved(request.resolve_options) for line in lines], problems


def _summary(planned: Sweep, cells: Sequence[Place]) -> bool:
    """The table, and before it what failed and what tuning chose; whether all cells are done."""
    from ctdbench import report, results
    from ctdbench.launch.overview import tuning
    from ctdbench.launch.sweep import told

    open_cells = [place for place in [*planned.trials, *cells] if place.state != "done"]
    decided = zip(planned.lines, planned.tuned(), strict=True)
    undecided = [f"{line.title}: not run, {found.why}" for line, found in decided if found.why]
    said = [*tuning(planned), *(f"{place.title}: {told(place)}" for place in open_cells)]
    for text in [*said, *undecided]:
        typer.echo(text, err=True)
    known = results.find(planned.store, status=None)
    shown: dict[Path, Result] = {}
    for place in cells:
        if (result := place.result) is not None:
            shown |= report.comparable(result, known)
    if shown:
        typer.echo(report.render(report.comparison(shown, headline()), "terminal"), nl=False)
    return not open_cells and not undecided
