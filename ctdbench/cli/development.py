"""Commands for those who add to the suite: check a method, write the embedded corpus anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctdbench.cli.application import Debug, Plugins, app
from ctdbench.errors import UserError


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A method's name (ctdbench list methods).")],
    plugin: Plugins = None,
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
