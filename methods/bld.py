"""BLD: Byte-Level Distillation (arXiv 2604.07466).

Both models share one alphabet, the bytes. Beside its own token head the student gets `slots` = 10
linear heads d -> 260 (256 bytes and 4 specials) that read the state *predicting* a token; head j
predicts the token's j-th byte, bytes past the tenth are not supervised. The heads are dropped when
the student is saved.
    L = CE + byte_weight * mean over slots of CE(head_j, byte j)
           + kl_weight  * mean over slots of KL(P_T(. | bytes before) || head_j),
slots j <= min(bytes of the token, 10), byte_weight = 1.0, kl_weight = 0.1. Both models meet at byte
offsets only. KL slots are those of tokens in a chunk; a token outside every chunk (the teacher
never reaches its bytes) still has its CE.

Classes of a head: 0..255 bytes, 256 the end (of the text, or with `end_bin` of the teacher's
token), 257..259 the other specials, which nothing here supervises. The teacher's 257 columns are
compared with the first 257 of the softmax over all 260, so that it has mass 0 on the rest.

P_T(b | bytes before) = P_T(prefix + b) / P_T(prefix), estimated by `bytes`:
mixed (default), path: one teacher forward (`ops.byte_distributions`); beam: the paper's, cached
once a document (`ctdbench.distill.byte_beam`). `end_bin` (arXiv 2609.12303): path with a bin for
the tokens that end.

The paper's start and learning rate of the heads are not known; here they start at zero, with a rate
of 1e-3. It does not say how it reduces: `slot_mean` (default) is the mean over all slots of the
batch, `token_sum` the sum over a token's slots, mean over tokens. Trap: a head that reads the
state after the token has seen its label; `student.hidden` of row r is the state before token r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ctdbench import ops
from ctdbench.method import (
    Block,
    ByteEstimator,
    Method,
    MethodOptions,
    Needs,
    PairInfo,
    Term,
    Trainable,
)

META = {
    "title": "BLD: byte-level distillation through extra byte heads",
    "paper": "2604.07466",
    "year": 2026,
    "needs": ["hidden states", "teacher bytes"],
    "cost": "prefix sums, byte heads",
    "row": "bytes",
    "floor": "none: the byte heads are its own, and read the student's states",
}

CLASSES = 260  # 256 bytes and 4 specials
TAUGHT = 257  # bytes and the end: what the teacher's distributions cover


class BLDOptions(MethodOptions):
    """Options of `bld`; weights and slots are the paper's."""

    byte_weight: float = Field(1.0, ge=0, description="Weight of the heads' CE on the true bytes.")
    kl_weight: float = Field(0.1, ge=0, description="Weight of the KL to the teacher (0: none).")
    bytes: ByteEstimator = Field(
        "mixed", description="Estimator of the teacher's byte distributions: mixed, path or beam."
    )
    end_bin: bool = Field(False, description="Bin for the teacher's token ending; bytes=path only.")
    reduction: Literal["slot_mean", "token_sum"] = Field(
        "slot_mean",
        description="Mean over slots, or sum over a token's slots, mean over tokens.",
    )
    slots: int = Field(10, ge=1, description="Number of heads; later bytes are not supervised.")
    head_learning_rate: float | None = Field(
        1e-3, gt=0, description="Learning rate of the byte heads; none: the student's."
    )

    @model_validator(mode="after")
    def _end_bin_is_of_path(self) -> BLDOptions:
        if self.end_bin and self.bytes != "path":
            raise ValueError("end_bin goes with bytes=path only")
        return self


class ByteHeads(nn.Module):
    """`slots` linear heads width -> 260: weight [slots, 260, width], bias [slots, 260].

    They start at zero: a random head would first of all push its noise into the student's states.
    """

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(slots, CLASSES, width))
        self.bias = nn.Parameter(torch.zeros(slots, CLASSES))

    def forward(self, hidden: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        """Logits [S, 260] of head slot[s] at hidden[row[s]]; `slot` ascends, hidden [R, width]."""
        sizes = torch.bincount(slot, minlength=len(self.weight)).tolist()
        states = hidden.to(self.weight.dtype)
        logits = [
            nn.functional.linear(states.index_select(0, rows), weight, bias)
            for rows, weight, bias in zip(
                torch.split(row, sizes), self.weight, self.bias, strict=True
            )
        ]
        return torch.cat(logits)


class _Slots(NamedTuple):
    """The supervised bytes of a block, S of them, by head; the first that the teacher has too."""

    row: Tensor  # [S] student row
    slot: Tensor  # [S] which byte of the token's bytes in the document
    taught: Tensor  # [S] bool: the block has the teacher's distribution for it


class BLD(Method):
    """Byte heads on the student's predicting states, with CE and KL to the teacher's bytes."""

    Options = BLDOptions
    options: BLDOptions

    @property
    def needs(self) -> Needs:
        """The student's states and, unless kl_weight is 0, the teacher's byte distributions."""
        taught = self.options.kl_weight > 0
        estimator, end_bin = (self.options.bytes, self.options.end_bin) if taught else (None, False)
        return Needs(teacher_logits=False, hidden=True, bytes=estimator, end_bin=end_bin)

    def weights(self) -> Mapping[str, float]:
        """lambda_b and lambda_KL."""
        return {"byte": self.options.byte_weight, "kl": self.options.kl_weight}

    def modules(self, pair: PairInfo) -> dict[str, Trainable]:
        """`heads`: the byte heads."""
        heads = ByteHeads(self.options.slots, pair.student_width)
        return {"heads": Trainable(heads, self.options.head_learning_rate)}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`byte`: CE on the token's bytes. `kl`: KL to the teacher, for the slots that have one."""
        if block.student.hidden is None:
            raise TypeError("bld reads the student's states; set Needs(hidden=True)")
        row, slot, taught = slots = self._slots(block)
        scores = modules["heads"](block.student.hidden, row, slot).float().log_softmax(-1)
        totals = {"byte": -scores.gather(1, _labels(block, slots)[:, None]).sum()}
        if block.bytes is not None:
            target = block.bytes[_offsets(block)[row[taught]] + slot[taught]].to(scores)
            entropy = torch.special.entr(target).sum()
            totals["kl"] = -(target * scores[taught, :TAUGHT]).sum() - entropy
        counts = self.counts(block)
        return {name: Term(total, counts[name]) for name, total in totals.items()}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Slots, or with token_sum the tokens that have any (those with a first byte)."""
        _, slot, taught = self._slots(block)
        counted = slot == 0 if self.options.reduction == "token_sum" else torch.ones_like(taught)
        counts = {"byte": counted.sum()}
        if self.needs.bytes is not None:
            counts["kl"] = (counted & taught).sum()
        return counts

    def _slots(self, block: Block) -> _Slots:
        rows = block.student
        width = torch.where(rows.scored(), rows.byte_end - rows.byte_start, 0)
        heads = torch.arange(self.options.slots, device=width.device)
        slot, row = torch.nonzero(heads[:, None] < width, as_tuple=True)
        return _Slots(row, slot, rows.chunk[row] >= 0)


def _labels(block: Block, slots: _Slots) -> Tensor:
    """The byte at every slot, [S]. A SentencePiece dummy prefix is in the token, not in the text:
    the token's last bytes are the ones that its span covers."""
    rows = block.student
    token = rows.token[slots.row]
    hidden_bytes = ops.token_lengths(block.pair.student_trie, token)
    hidden_bytes -= (rows.byte_end - rows.byte_start)[slots.row]
    return ops.token_bytes(block.pair.student_trie, token, hidden_bytes + slots.slot)


def _offsets(block: Block) -> Tensor:
    """Place of every row's first byte in `block.bytes`, which holds the bytes of chunks only."""
    rows = block.student
    width = torch.where(rows.chunk >= 0, rows.byte_end - rows.byte_start, 0)
    return width.cumsum(0) - width


METHOD = BLD
