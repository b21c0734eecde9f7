"""`teacher_jsd`: how far the student's next-byte distributions are from the teacher's.

Bits per byte is what fine-tuning trains on; this is what distillation is for. Both sides go through
the same estimator of next-byte distributions (`ctdbench.ops.byte_distributions`, "mixed"), so the
tokenizations cancel out as far as one forward pass allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ctdbench import ops
from ctdbench.distill.precision import autocast, casts_kept
from ctdbench.errors import UserError
from ctdbench.evaluate.ensemble import reads_on
from ctdbench.evaluate.outcomes import sample_id
from ctdbench.text.token_bytes import NotLossless, TokenBytes
from ctdbench.text.vocabulary import ByteTrie

MAX_BYTES = 2000  # of a document: per-document outcomes of similar weight, at a known cost
ROWS = 64  # predictions whose distributions over the vocabulary are alive at once
KEPT_BYTES = 500_000  # of text, whose distributions by teachers are kept: a kilobyte each

Taught = dict[tuple[int, str], Tensor]  # (teacher, text) -> [bytes, 257]


@dataclass(frozen=True)
class ByteModel:
    """A causal model read byte by byte: BOS (EOS where there is none) stands before the text."""

    model: Any
    tokenizer: Any
    precision: str = "float32"

    @cached_property
    def tokens(self) -> TokenBytes:
        """Bytes of the tokens."""
        return TokenBytes(self.tokenizer)

    @cached_property
    def trie(self) -> ByteTrie:
        """The vocabulary's byte prefixes; ids that the model has no column for are left out."""
        head = self.model.get_output_embeddings().weight
        return ByteTrie(self.tokens.vocabulary[: head.shape[0]])

    @property
    def start(self) -> int:
        """The token before the text."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise UserError(
                "a tokenizer has neither BOS nor EOS", "set one: text needs a token before it"
            )
        return int(eos if bos is None else bos)

    @property
    def max_bytes(self) -> int:
        """Bytes that surely fit into the context: no token but the first two is without a byte."""
        length = getattr(self.model.config, "max_position_embeddings", None)
        return MAX_BYTES if length is None else min(MAX_BYTES, int(length) - 2)

    def distributions(self, text: str) -> Tensor:
        """Distribution of every byte of a text given those before, [bytes, 257], on the CPU."""
        encoding = self.tokens.encode(text)
        token = torch.from_numpy(encoding.ids)
        width = torch.from_numpy(encoding.byte_end - encoding.byte_start)
        with casts_kept(self.model, self.precision):
            blocks = [
                self._block(probabilities, token[first:end], width[first:end], first != start)
                for start, first, end, probabilities in self._rows(token)
            ]
        return torch.cat(blocks) if blocks else torch.zeros(0, 257)

    def _block(self, probabilities: Tensor, token: Tensor, width: Tensor, context: bool) -> Tensor:
        select = torch.ones(len(token), dtype=torch.bool)
        select[0] = not context
        device = probabilities.device
        return ops.byte_distributions(
            self.trie,
            probabilities,
            token.to(device),
            width.to(device),
            torch.zeros(len(token), dtype=torch.long, device=device),
            select=select.to(device),
            estimator="mixed",
        ).cpu()

    def _rows(self, token: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
        """Start of a block, its first row (one earlier, for the estimator), end, and [rows, V].

        The model's own head does all that it does before sampling (soft-capping, scaling), and only
        one block of logits is alive where the model can read on from a cache.
        """
        inputs = torch.cat([torch.tensor([self.start]), token[:-1]])[None].to(self.model.device)
        read = self._over_cache if reads_on(self.model) else self._at_once
        last, end = None, 0
        for scores in read(inputs):
            rows = scores[0, :, : self.trie.size].float().softmax(-1)
            start, end = end, end + len(rows)
            joined = rows if last is None else torch.cat([last, rows])
            yield start, end - len(joined), end, joined
            last = rows[-1:]

    def _over_cache(self, inputs: Tensor) -> Iterator[Tensor]:
        """The logits [1, rows, V] of its own forward, block after block."""
        cache = None
        for block in inputs.split(ROWS, 1):
            with autocast(self.model.device, self.precision):
                out = self.model(block, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            yield out.logits

    def _at_once(self, inputs: Tensor) -> Iterator[Tensor]:
        """The same of a model whose state cannot go from block to block."""
        with autocast(self.model.device, self.precision):
            out = self.model(inputs, use_cache=False)
        yield from out.logits.split(ROWS, 1)


def teacher_divergence(
    student: ByteModel,
    teachers: Sequence[ByteModel],
    texts: Sequence[str],
    readers: Sequence[ByteModel] = (),
    taught: Taught | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Per document the mean over its bytes (and over teachers) of the divergence, in bits.

    A document is cut to what fits every model, at most `MAX_BYTES`, and left out if one of them
    cannot spell it; readers: models that count for this and no more. taught: what is known of the
    teachers' distributions, and gets more. Returns one row a document {"id", "weight": bytes,
    "jsd"}, and how many documents were left out.
    """
    limit = min(side.max_bytes for side in (student, *teachers, *readers))
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        text = text.encode()[:limit].decode(errors="ignore")
        try:
            for reader in readers:
                reader.tokens.encode(text)
            own = student.distributions(text)
            parts = [
                jensen_shannon(own, _taught(teacher, number, text, taught))
                for number, teacher in enumerate(teachers)
            ]
        except NotLossless:
            continue
        jsd = float(torch.stack(parts).mean())
        size = float(len(text.encode()))
        rows.append({"id": sample_id(index, text), "weight": size, "jsd": jsd})
    return rows, len(texts) - len(rows)


def _taught(teacher: ByteModel, index: int, text: str, kept: Taught | None) -> Tensor:
    found = None if kept is None else kept.get((index, text))
    if found is None:
        found = teacher.distributions(text)
        if kept is not None and sum(map(len, kept.values())) + len(found) <= KEPT_BYTES:
            kept[index, text] = found
    return found


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Divergence of paired rows [N, K] of probabilities, in bits: [N], from 0 to 1."""
    first, second = first.double(), second.double()
    middle = (first + second) / 2
    entropies = [torch.special.entr(part).sum(-1) for part in (middle, first, second)]
    return (entropies[0] - (entropies[1] + entropies[2]) / 2).clamp(min=0) / math.log(2)
