"""Commands for those who add to the suite: check a method, measure what methods cost, write the
embedded corpus anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ctdbench.cli.application import DataDir, Debug, Plugins, TrustRemoteCode, app
from ctdbench.errors import UserError

SMALLEST_VOCABULARY = 1024  # for all bytes, and words beside them


@app.command(name="new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Of the method: letters, digits, hyphens.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("."),
    debug: Debug = False,
) -> None:
    """Write a method that runs as it is, and its test; both are yours to change."""
    from ctdbench.launch import new_method as writer

    method, test = writer.write(name, out)
    typer.echo(f"{method}\n{test}\n\nWhat it does is yours to write. As it is, these pass:")
    for command in (
        f"ctdbench check {name} --plugin {method}",
        f"ctdbench run --method {name} --plugin {method} --pair tiny --budget 20kB --limit 10",
        f"pytest {test}",
    ):
        typer.echo(f"  {command}")


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(help="A method, pair or task (ctdbench list), or a YAML file.")
    ],
    kind: Annotated[
        Literal["method", "pair", "task"] | None,
        typer.Option(help="What the name is, where it stands for several things."),
    ] = None,
    plugin: Plugins = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="method.FIELD=VALUE", help="Options of the method."),
    ] = None,
    data_dir: DataDir = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Check a method, a pair or a task, one line a finding.

    A method: its contract, what must not change its loss, a short training run. A pair: models and
    tokenizers, text as bytes, alignment, the start. A task: its file, its data, one item, scores.
    Exit code 0 if every check passes, else 1.
    """
    from ctdbench import registry
    from ctdbench.launch.check import kind_of

    if registry.is_file_name(name) and not Path(name).expanduser().is_file():
        raise UserError(f"there is no file {Path(name)}", "ctdbench list shows the names")
    for setting in settings or []:
        if not setting.startswith("method."):
            raise UserError(
                f"--set {setting}: check takes options of the method alone",
                "write --set method.FIELD=VALUE",
            )
    for path in plugin or []:
        registry.add_plugin(path)
    kind = kind or kind_of(name)
    if kind == "method":
        passed = _check_method(name, settings or [], debug)
    elif settings:
        raise UserError(f"--set: {name} is a {kind} and has no options", "leave it out")
    elif kind == "pair":
        passed = _check_pair(name, trust_remote_code, debug)
    else:
        passed = _check_task(name, data_dir, debug)
    if not passed:
        raise typer.Exit(1)


def _check_method(name: str, settings: list[str], debug: bool) -> bool:
    from ctdbench import request

    spec = request.build_spec({"method": name, "pair": "tiny"}, settings=settings)
    spec = request.resolve_options(spec)
    from ctdbench.launch.check import method

    return method.run(spec, typer.echo, debug=debug)


def _check_pair(name: str, trust: bool, debug: bool) -> bool:
    from ctdbench import registry

    pair = registry.load_pair(name)
    from ctdbench.launch.check import pair as pairs

    return pairs.run(pair, typer.echo, trust_remote_code=trust, debug=debug)


def _check_task(name: str, data_dir: Path | None, debug: bool) -> bool:
    from ctdbench.launch.check import task

    return task.run(task.TaskCase.of(name, data_dir), typer.echo, debug=debug)


@app.command()
def bench(
    methods: Annotated[
        str, typer.Option(help="Rows separated by commas: sft,bld[path],gold+ce; or all.")
    ] = "all",
    vocabulary: Annotated[
        str, typer.Option(help="Tokens of the student's and of the teacher's vocabulary.")
    ] = "128000,151646",
    rows: Annotated[int, typer.Option(min=1, help="Predictions on both sides.")] = 256,
    end_to_end: Annotated[
        str | None,
        typer.Option(metavar="PAIR", help="Measure training steps on this pair instead of losses."),
    ] = None,
    alignment: Annotated[
        str | None,
        typer.Option(metavar="PAIR", help="Measure aligning this pair's tokens instead."),
    ] = None,
    documents: Annotated[
        int, typer.Option(min=1, help="With --end-to-end: documents of a step.")
    ] = 4,
    cached: Annotated[
        bool, typer.Option("--cached", help="With --end-to-end: teacher states from disk.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's own.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians of so many.")] = 7,
    format_name: Annotated[
        Literal["terminal", "json"], typer.Option("--format", help="terminal or json.")
    ] = "terminal",
    plugin: Plugins = None,
    debug: Debug = False,
) -> None:
    """Measure what methods cost: milliseconds and extra memory, and the ratio to the bare cost.

    Losses on random predictions, beside the softmax of both sides and cross-entropy's gradient; or
    training steps (--end-to-end), beside the teacher's forward and the student's own step; or how
    much text a second is aligned (--alignment).
    """
    from ctdbench import registry, request
    from ctdbench.launch import grid

    for path in plugin or []:
        registry.add_plugin(path)
    names = grid.all_rows() if methods == "all" else methods.split(",")
    sizes, specs = _sizes(vocabulary), {}
    for name in names:
        method, options = grid.parse_row(name)
        if end_to_end:
            cell = {"method": method, "pair": end_to_end, "options": options}
            specs[name] = request.build_spec(cell)
    import torch

    from ctdbench.launch.bench import costs, losses
    from ctdbench.launch.bench import end_to_end as steps

    if threads is not None:
        torch.set_num_threads(threads)
    if alignment is not None:
        from ctdbench.launch.bench import alignment as aligning

        rates = aligning.bench_alignment(registry.load_pair(alignment), repeats, progress=True)
        typer.echo(aligning.render(alignment, rates, format_name), nl=False)
        return
    if specs:
        resolved = {name: request.resolve_options(spec) for name, spec in specs.items()}
        found = steps.bench_steps(resolved, documents, repeats, cached=cached, progress=True)
    else:
        found = losses.bench_losses(names, sizes, rows, repeats, progress=True)
    typer.echo(costs.render(found, format_name), nl=False)


def _sizes(text: str) -> tuple[int, int]:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(sizes) != 2 or min(sizes) < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocabulary {text}", f"give two numbers from {SMALLEST_VOCABULARY} on: 32768,49152"
        )
    return sizes[0], sizes[1]


@app.command()
def corpus(
    out: Annotated[Path, typer.Option(help="New file to write, .jsonl.gz.")],
    seed: Annotated[int, typer.Option(help="Of the prompts' order and the sampling.")] = 0,
    size: Annotated[str, typer.Option("--bytes", help="How much text: 1500kB.")] = "1500kB",
    debug: Debug = False,
) -> None:
    """Generate the embedded corpus anew.

    SmolLM2-135M-Instruct answers the shipped prompts; on a CPU that takes hours, and the file is
    written at the end.
    """
    from ctdbench import registry, request

    target = request.bytes_of(size, "--bytes")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist", "make it first, or name another")
    if not out.name.endswith(".jsonl.gz") or out.exists():
        raise UserError(f"--out {out}: not a new file that ends in .jsonl.gz", "name another")
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
