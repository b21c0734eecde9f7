"""The frozen teacher: hidden states of a batch, logits of chosen rows, byte distributions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctdbench import atomic, ops
from ctdbench.cache import cache_dir
from ctdbench.distill import models
from ctdbench.distill.batches import Batch, SideBatch
from ctdbench.distill.byte_beam import beam_distributions
from ctdbench.distill.models import Side
from ctdbench.distill.precision import autocast
from ctdbench.distill.teacher_cache import StoredStates
from ctdbench.errors import UserError
from ctdbench.method import Needs
from ctdbench.text.vocabulary import ByteTrie

ROWS_AT_A_TIME = 64  # rows whose probabilities over the whole vocabulary exist at a time
BEAMS_AT_A_TIME = 8  # documents; each holds some dozens of rows of cumulated probabilities


class Teacher:
    """A frozen teacher: it never gets a gradient and stays outside the student's wrapper.

    stored: states on disk that spare its body where they hold a batch's documents.
    """

    def __init__(self, side: Side, trie: ByteTrie, precision: str, identity: str) -> None:
        """`identity` names the model's content; the cache of beam distributions depends on it."""
        self.side = side
        self.trie = trie
        self.precision = precision
        self.identity = identity
        self.columns = len(side.tokens.vocabulary)
        self.stored: StoredStates | None = None
        side.model.eval().requires_grad_(False)

    def hidden(self, batch: SideBatch) -> Tensor:
        """States that the head reads, [B * L, d]."""
        known = self.stored.read(batch, self.side.width) if self.stored else None
        return self.live(batch.ids, batch.mask).flatten(0, 1) if known is None else known

    @torch.no_grad()
    def live(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The same, computed now: [B, L, d] for ids and mask [B, L]."""
        with autocast(ids.device, self.precision):
            return models.hidden_states(self.side.model, ids, mask)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] float32 for states [R, d]."""
        with autocast(hidden.device, self.precision):
            return models.logits(self.side.model, hidden, self.columns)

    def mean_prediction(self, batch: SideBatch) -> Tensor:
        """Its probabilities averaged over the batch's predictions, [V] float64 on the CPU."""
        states = self.hidden(batch)[batch.position]
        parts = (self.logits(rows).softmax(-1) for rows in states.split(ROWS_AT_A_TIME))
        total = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0)
        return (total / len(states)).cpu()

    def byte_distributions(
        self, batch: Batch, hidden: Tensor | None, needs: Needs, block_rows: int = ROWS_AT_A_TIME
    ) -> Tensor:
        """The teacher's distribution of every byte of the batch's documents joined, [N, 257].

        Bytes that no teacher row predicts (a first token without BOS) have a row of zeros.
        hidden: [B * L, d], or None for `beam`, which runs the model by itself. block_rows: as many
        rows, or fewer, have their probabilities at a time.
        """
        if hidden is None:
            return torch.cat(self._beam(batch.texts)).to(batch.student.ids.device)
        side = batch.teacher
        # A template's token ends for sure, whatever bytes it has: `mixed` must not lengthen it.
        in_text = (side.byte_end > side.byte_start) | (side.chunk >= 0)
        token = torch.where(in_text, side.token, -1)
        first = batch.first_bytes()
        out = torch.zeros(batch.size, ops.BYTES + 1, dtype=torch.float32, device=hidden.device)
        step = max(1, min(block_rows, ROWS_AT_A_TIME) - 1)
        for start in range(0, len(side.position), step):
            lead = min(start, 1)  # `mixed` reads the row before, too
            rows = slice(start - lead, start + step)
            width = (side.byte_end - side.byte_start)[rows]
            wanted = torch.ones_like(width, dtype=torch.bool)
            wanted[:lead] = False
            found = ops.byte_distributions(
                self.trie,
                self.logits(hidden[side.position[rows]]).softmax(-1),
                token[rows],
                width,
                side.document[rows],
                select=wanted,
                estimator="path" if needs.bytes == "path" else "mixed",
                end_bin=needs.end_bin,
            )
            row, offset = ops.ragged(torch.where(wanted, width, 0))
            place = first[side.document[rows]] + side.byte_start[rows]
            out[place[row] + offset] = found
        return out

    def _beam(self, texts: Sequence[bytes]) -> list[Tensor]:
        """The paper's beam for every document, computed once and cached by content."""
        keys = [b"\0".join([b"beam-3", self.identity.encode(), text]) for text in texts]
        names = [f"{hashlib.sha256(key).hexdigest()}.safetensors" for key in keys]
        paths = [cache_dir() / "beam" / name for name in names]
        missing = {
            path: text for path, text in zip(paths, texts, strict=True) if not path.is_file()
        }
        if missing:
            for path, rows in zip(missing, self._new_beam([*missing.values()]), strict=True):
                with atomic.new_file(path) as temporary:
                    save_file({"bytes": rows}, temporary)
        return [load_file(path)["bytes"] for path in paths]

    def _new_beam(self, texts: Sequence[bytes]) -> list[Tensor]:
        bos = self.side.specials.bos
        if bos is None:
            raise UserError(
                "method.bytes: beam needs a teacher whose tokenizer has a BOS token",
                "use method.bytes=mixed",
            )
        tokens, vocabulary = self.side.tokens, self.side.tokens.vocabulary
        own = [tokens.encode(text).ids.tolist() for text in texts]
        # With the space that a tokenizer may put in front: it is given, so its own row is dropped.
        read = [b"".join(vocabulary[index] for index in ids) for ids in own]
        known = dict(zip(read, own, strict=True)).__getitem__
        parts = (read[i : i + BEAMS_AT_A_TIME] for i in range(0, len(read), BEAMS_AT_A_TIME))
        model, trie = self.side.model, self.trie
        found = (beam_distributions(model, trie, part, [bos], encode=known) for part in parts)
        rows = (one for part in found for one in part)
        pairs = zip(rows, texts, strict=True)
        return [one[len(one) - len(text) :].contiguous() for one, text in pairs]
