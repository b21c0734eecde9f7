"""Commands for models that are there: score them, average them, hand them on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ctdbench.cli.application import (
    DEFAULT_STORE,
    CellsLimit,
    CellsTasks,
    DataDir,
    Debug,
    Store,
    TrustRemoteCode,
    app,
)
from ctdbench.errors import UserError

if TYPE_CHECKING:
    from ctdbench.evaluate import Evaluation


@app.command()
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="CELL|MODEL", help="A cell's id; or dir:PATH, hub:ORG/NAME."),
    ] = None,
    ensemble: Annotated[
        str | None, typer.Option(metavar="CELL,CELL", help="Average these, of one vocabulary.")
    ] = None,
    average: Annotated[
        Literal["probabilities", "log-probabilities"],
        typer.Option(help="What of an ensemble's members is averaged."),
    ] = "probabilities",
    tasks: CellsTasks = None,
    limit: CellsLimit = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write: scores, settings, every outcome.")
    ] = None,
    store: Store = DEFAULT_STORE,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Score a kept cell, a model, or an average of several, without training.

    A cell is evaluated as it was; with --tasks on all items, or on --limit of them. A model without
    --tasks is evaluated on those of run's default that need no cell's text or teacher. Cells keep
    their model by run --keep-model; the baselines start and teacher have theirs in any case.
    """
    from ctdbench import request, results

    if (model is None) == (ensemble is None):
        raise UserError("evaluate takes a cell or a model, or --ensemble CELL,CELL")
    names = [model] if model else [name.strip() for name in str(ensemble).split(",")]
    if ensemble and len(names) < 2:
        raise UserError(f"--ensemble {ensemble}: one is no ensemble", "give several, with commas")
    listed = [name.strip() for name in tasks.split(",")] if tasks else None
    asked = {"tasks": listed, "limit": limit, "data_dir": data_dir and str(data_dir)}
    changes = request.named_tasks({k: v for k, v in asked.items() if v is not None})
    from ctdbench.launch.evaluation import evaluate_existing

    found = evaluate_existing(
        names, store, changes, average=average, trust_remote_code=trust_remote_code
    )
    _show(found)
    if out is not None:
        how = {"average": average} if ensemble else {}
        results.write_json_atomic(out, {"models": names, **how, **_record(found)})


def _show(found: Evaluation) -> None:
    width = max(map(len, found.scores))
    for task, metrics in found.scores.items():
        for metric, value in metrics.items():
            error = found.stderr[task].get(metric)
            told = f"standard error {error:.4f}, " if error is not None else ""
            items = f"{len(found.samples[task])} items"
            typer.echo(f"{task:{width}}  {metric:20}  {value:.4f}  ({told}{items})")


def _record(found: Evaluation) -> dict[str, Any]:
    from ctdbench.launch.provenance import without_private

    fields = ("scores", "stderr", "versions", "settings", "samples")
    return dict(without_private({name: getattr(found, name) for name in fields}))


@app.command()
def export(
    cell: Annotated[str, typer.Argument(help="A cell's id, or how it begins.")],
    to: Annotated[Path, typer.Option(help="New folder to write.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights; scores are of float32."),
    ] = "float32",
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Upload the folder to the hub, too; private if new."),
    ] = None,
    store: Store = DEFAULT_STORE,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Write a kept cell's model, tokenizer and model card, for transformers and lm-eval.

    A cell keeps its model by run --keep-model. Nothing is uploaded without --push.
    """
    from ctdbench.launch import export as launcher

    launcher.export(
        store, cell, to, dtype=dtype, repository=push, trust_remote_code=trust_remote_code
    )
    typer.echo(to)
    if push:
        typer.echo(launcher.push(to, push))
