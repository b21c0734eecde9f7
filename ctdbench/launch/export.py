"""A finished cell as a folder that `AutoModelForCausalLM.from_pretrained` and lm-eval read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ctdbench import atomic, results
from ctdbench.distill import saving
from ctdbench.distill.models import Side
from ctdbench.errors import RunError, UserError
from ctdbench.evaluate.language_model import greedy
from ctdbench.launch import kept
from ctdbench.launch.card import card
from ctdbench.report import grouping

Dtype = Literal["float32", "bfloat16", "float16"]


def export(
    store: Path,
    cell: str,
    target: Path,
    *,
    dtype: Dtype = "float32",
    repository: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the kept student of the cell whose id starts with `cell`: model, tokenizer, card.

    What training had beside the student (auxiliary heads, adapters) is not in it. repository: the
    name under which it will be pushed, for the card. Raises UserError if `target` is taken or the
    cell cannot be exported; then nothing is written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {target} exists already", "choose a new folder")
    found = results.find(store)
    folder = results.named(found, cell, store)
    result = found[folder]
    if results.is_baseline(result["spec"]["method"]):
        raise UserError(f"cell {result['id']} was not trained", "export a cell of a method")
    side = kept.load(folder, result, trust_remote_code=trust_remote_code)
    _cut(side)
    side.model.to(getattr(torch, dtype))
    side.model.generation_config = greedy(side.tokenizer)  # as it was evaluated
    beside = {f: other for f, other in found.items() if grouping.is_baseline_of(other, result)}
    name = repository or target.name
    text = card(folder, {folder: result, **beside}, name, dtype, side.tokenizer.bos_token)
    with atomic.new_folder(target) as temporary:
        saving.save(side, temporary)
        (temporary / "README.md").write_text(text, encoding="utf-8")


def _cut(side: Side) -> None:
    """Drop columns that have no token: the evaluation does not count them, lm-eval would."""
    columns = len(side.tokens.vocabulary)
    if side.model.get_output_embeddings().weight.shape[0] > columns:
        side.model.resize_token_embeddings(columns)


def push(folder: Path, repository: str) -> str:
    """Upload the folder to the hub by huggingface_hub; the address. A new repository is private.

    Raises RunError with the library's reason.
    """
    from huggingface_hub import HfApi

    try:
        hub: Any = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # network, authorisation, a name that is taken
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(
            f"{repository} was not pushed: {reason}",
            f"{folder} is written; hf auth login, or hf upload {repository} {folder}",
        ) from error
    return f"https://huggingface.co/{repository}"
