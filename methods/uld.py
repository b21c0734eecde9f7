"""ULD: Universal Logit Distillation (arXiv 2402.12030).

Rows of both sides are paired, softmaxed at temperatures T_S and T_T, sorted, and compared by rank:
    ULD = mean over documents of (1/n) sum_k sum_v |p_S^(v)(k) - p_T^(v)(k)|
with p^(1) >= p^(2) >= .. and the shorter vocabulary zero-padded (Wasserstein distance with a
uniform cost, eq. 5). L = CE + 1.5 ULD, T_S = T_T = 1.

alignment = positions (default, the paper): the k-th supervised token with the k-th, from the first
on, n = the shorter length; the texts are not aligned, so rows drift apart. The harness pairs them.
alignment = chunks ("extended ULD", TRL's GOLD trainer with `use_extended_uld`, merge strategy
`bayesian`): byte-aligned chunks instead of positions. A chunk of rows i..k has
    m(y) = p_k(y) * prod_{j<k} max(p_j(token_j), 1e-8),
not renormalised. A table that shows positions alone shows a straw man.

Public code (Nicolas-BZRD/llm-recipes): the mean per document, then over documents, as here. The
authors train with the student's last answer token (its end token) left out of the pairs and the
teacher's kept: `skip_last_student_token`, true here as well; the code's own default is false.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.method import Block, Method, MethodOptions, Needs, Term

META = {
    "title": "ULD: L1 distance between sorted probabilities",
    "paper": "2402.12030",
    "year": 2024,
    "needs": ["teacher logits"],
    "cost": "one sort a side",
    "floor": "zero",
}


class ULDOptions(MethodOptions):
    """Options of `uld`; the defaults are the paper's."""

    weight: float = Field(1.5, ge=0, description="Weight of the ULD term.")
    temperature_student: float = Field(1.0, gt=0, description="Softmax temperature, student.")
    temperature_teacher: float = Field(1.0, gt=0, description="Softmax temperature, teacher.")
    alignment: Literal["positions", "chunks"] = Field(
        "positions",
        description="Pair rows by index (the paper) or merge byte-aligned chunks (extended ULD).",
    )
    skip_last_student_token: bool = Field(
        True,
        description="Leave the student's last supervised token of a document out of the pairs "
        "(positions only; as in the authors' training).",
    )
    top: int | None = Field(
        None,
        ge=1,
        description="Compare this many of either side's largest probabilities alone; the distance "
        "is too small by at most the masses left out.",
    )


class ULD(Method):
    """Sorted L1 between paired rows, or between merged chunks."""

    Options = ULDOptions
    options: ULDOptions

    @property
    def needs(self) -> Needs:
        """Teacher logits, with rows paired as `alignment` says."""
        if self.options.alignment == "chunks":
            return Needs()
        skip = self.options.skip_last_student_token
        return Needs(pairing="positions", skip_last_student_token=skip)

    def weights(self) -> Mapping[str, float]:
        """The ULD term has weight 1.5."""
        return {"uld": self.options.weight}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`uld`: the sum over documents of their share in this block; the count likewise."""
        if self.options.alignment == "chunks":
            parts = pieces.by_chunks(block)
        else:
            parts = pieces.by_pairs(block, _paired_rows("positions", block))
        totals = pieces.totals(self._totals, block, parts)
        return {"uld": Term(totals["uld"], self.counts(block)["uld"])}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Documents: every pair counts 1/n of its document, which may reach over several blocks."""
        return {"uld": _shares(block, _paired_rows(self.options.alignment, block)).sum()}

    def _totals(self, block: Block) -> dict[str, Tensor]:
        rows = _paired_rows(self.options.alignment, block)
        sides = (block.student, block.taught())
        temperatures = (self.options.temperature_student, self.options.temperature_teacher)
        student, teacher = (
            ops.merged_chunks(side.scores(), side.token, side.chunk, last, block.chunks, heat).exp()
            if self.options.alignment == "chunks"
            else ops.tempered(ops.rows_of(side.scores(), last), heat).softmax(-1)
            for side, last, heat in zip(sides, rows.T, temperatures, strict=True)
        )
        distance = ops.sorted_l1(student, teacher, self.options.top)
        return {"uld": (distance * _shares(block, rows)).sum()}


def _paired_rows(alignment: str, block: Block) -> Tensor:
    """Student and teacher row of every pair (of a chunk: its last rows), [P, 2]."""
    if alignment == "positions":
        if block.pairs is None:
            raise TypeError("uld pairs rows by position and this block has no pairs")
        return block.pairs
    return ops.last_row_pairs(block.student.chunk, block.taught().chunk, block.chunks)


def _shares(block: Block, rows: Tensor) -> Tensor:
    """1 / (number of pairs of the pair's document in the whole batch), [P]."""
    document = block.student.document[rows[:, 0]]
    return 1 / block.document_chunks[document]


METHOD = ULD
