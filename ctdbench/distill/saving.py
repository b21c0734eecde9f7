"""A model and its tokenizer as folders that `AutoModelForCausalLM.from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ctdbench.distill.models import Side, base_model, merged
from ctdbench.distill.tokenizers import PROBE, probe_ids
from ctdbench.distill.transplant import has_subwords
from ctdbench.errors import UserError


def save(side: Side, folder: Path) -> None:
    """Write model (LoRA folded in) and tokenizer; raises UserError as `check_savable` does."""
    check_savable(side)
    merged(side.model).save_pretrained(folder)
    side.tokenizer.save_pretrained(folder)


def check_savable(side: Side) -> None:
    """Raise UserError for what an ordinary folder cannot hold.

    Sub-words: what they add depends on several bytes, so no table of an ordinary model can hold it,
    and without it the model would be another one. A tokenizer that AutoTokenizer reads back with
    other ids: which class it takes depends on the model's type, too.
    """
    model = base_model(side.model)
    if has_subwords(model):
        raise UserError(
            "student.add_subwords: no ordinary model can hold the sub-words, so it is not saved",
            "train without add_subwords to save",
        )
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        side.tokenizer.save_pretrained(folder)
        if not _reads_alike(side.tokenizer, folder):
            raise UserError(
                "the student's tokenizer comes back from its files with other ids",
                "name another tokenizer: this one cannot be saved",
            )


def _reads_alike(tokenizer: Any, folder: str) -> bool:
    """Whether the saved tokenizer has these ids, and BOS in front where lm-eval asks for it."""
    from transformers import AutoTokenizer

    bos = tokenizer.bos_token_id
    again = AutoTokenizer.from_pretrained(folder, add_bos_token=bos is not None)
    ids, other_ids = (probe_ids(one.backend_tokenizer) for one in (tokenizer, again))
    return (
        ids == other_ids
        and tokenizer.get_vocab() == again.get_vocab()
        and [bos] * (bos is not None) + ids == again.encode(PROBE)
    )
