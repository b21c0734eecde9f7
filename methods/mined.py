"""MinED: logits by minimum edit distance (FuseLLM, arXiv 2401.10491; DSKD, arXiv 2406.17328).

Vocabularies: every teacher token w maps to m(w), the student's token at the least edit distance
(equal bytes first; of several the lowest id; specials by role, one to one, the end first, those
without a partner nowhere).
A student token takes the logit of the lowest teacher id that maps to it, -1e5 without one:
    q[v] = z_T[min {w: m(w) = v}].
Sequences: the tokens *read* by the scored rows of both sides of a document are aligned by dynamic
time warping, where two tokens cost their edit distance without spaces. A special counts as one
symbol of its own that only a special of the same role shares; so does the start of a document.
A student row with exactly one teacher row, whose token maps to the one that it read, takes
    KL( softmax(q / T) || softmax(z_S / T) ),
every other scored row the same with the label as a target (100 there, -1e5 elsewhere: one-hot, so
-log softmax(z_S / T)[label]); so does a row that predicts the space which one side's SentencePiece
alone puts before a text. The mean over all scored rows counts; T = 2, no T^2 factor,
    L = 0.5 CE + 0.5 KL.

logit = lowest (default, DSKD's code): as above, even if v has a byte-equal twin of higher id: of
SmolLM2's tokens it is " teac" that gives Mistral's " team" its logit (3 % of their common tokens).
logit = largest (the paper and FuseLLM's code, without its cut to the teacher's top tokens): the
largest logit of all w with m(w) = v.
logit = nearest (tokenkit): the map goes the other way. v takes the logit of the teacher token at
the least distance from v, and a row is taught where the teacher read the token that is nearest to
the student's. (tokenkit aligns by bytes, and asks for nothing of the tokens read.)

Distances are over bytes, where the public codes have the characters of token strings. Maps break
ties by id, so that other ids for the same vocabulary can change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.method import Block, Method, MethodOptions, Needs, PairTables, Rows, Term
from ctdbench.text.edit_distance import levenshtein, time_warp
from ctdbench.text.vocabulary import Integers

META = {
    "title": "MinED: logits by minimum edit distance, rows by time warping",
    "paper": "2401.10491",
    "year": 2024,
    "needs": ["teacher logits", "vocabulary map"],
    "cost": "two softmaxes, vocabulary map",
    "floor": "zero",
    "exceptions": {
        "student ids": "of several nearest tokens the lowest id counts",
        "teacher ids": "of several nearest tokens the lowest id counts",
    },
}

ABSENT = -1e5  # logit of a student token that no teacher token maps to
START, NOWHERE = -1, -2  # no token read yet; a token without a counterpart


class MinEDOptions(MethodOptions):
    """Options of `mined`; the defaults are those of DSKD's code."""

    ce_weight: float = Field(
        0.5, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    kd_weight: float = Field(0.5, ge=0, description="Weight of the KL.")
    temperature: float = Field(
        2.0, gt=0, le=100, description="Softmax temperature; the KL does not count its square."
    )
    logit: Literal["lowest", "largest", "nearest"] = Field(
        "lowest",
        description="A student token's logit: of the teacher tokens that map to it the lowest "
        "id's (DSKD) or the largest (FuseLLM), or its nearest teacher token's (tokenkit).",
    )


class MinED(Method):
    """KL to mapped teacher logits where the rows fit, to the label elsewhere."""

    Options = MinEDOptions
    options: MinEDOptions

    @property
    def needs(self) -> Needs:
        """Teacher logits, with rows paired by `pairs`."""
        return Needs(pairing="own")

    def weights(self) -> Mapping[str, float]:
        """Of the one term."""
        return {"kl": self.options.kd_weight}

    def pairs(self, student: Rows, teacher: Rows, pair: PairTables) -> Tensor:
        """Student and teacher rows that fit, [P, 2], document by document."""
        scored, taught = student.scored(), teacher.scored()
        own_read, taught_read = student.inputs(), teacher.inputs()
        found = [student.token.new_empty(0, 2)]
        for document in student.document[scored].unique().tolist():
            own_rows = torch.nonzero(scored & (student.document == document))[:, 0]
            rows = torch.nonzero(taught & (teacher.document == document))[:, 0]
            own_ids, ids = own_read[own_rows].cpu().numpy(), taught_read[rows].cpu().numpy()
            places = torch.from_numpy(self._fitting(own_ids, ids, pair)).to(rows.device)
            found.append(torch.stack([own_rows[places[:, 0]], rows[places[:, 1]]], 1))
        return torch.cat(found)

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        """`kl`: the sum over scored rows, nats, and their number."""
        if block.pairs is None:
            raise TypeError("mined pairs rows and this block has no pairs")
        student, (rows, taught) = block.student, block.pairs.T
        partner = torch.full_like(student.token, -1).index_copy(0, rows, taught)
        scored, logits = torch.nonzero(student.scored())[:, 0], student.scores()
        parts = pieces.by_rows(scored, logits.shape[1] + block.taught().scores().shape[1])
        mapped = self._mapping(block)

        def kl(number: int, scores: Tensor) -> dict[str, Tensor]:
            part = parts[number]
            return {"kl": self._total(scores, student.token[part], partner[part], mapped)}

        return {"kl": Term(pieces.summed(kl, parts, logits)["kl"], student.scored().sum())}

    def counts(self, block: Block) -> Mapping[str, Tensor]:
        """Scored rows."""
        return {"kl": block.student.scored().sum()}

    def _total(
        self, logits: Tensor, token: Tensor, partner: Tensor, mapped: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Sum over rows [R]: to the label, or to the teacher's row `partner` where that is not -1.

        mapped: q's logits from the numbers of teacher rows [P], [P, V_S] in memory of its own.
        """
        heat = self.options.temperature
        logits = ops.tempered(logits.float(), heat)
        alone, taught = (torch.nonzero(which)[:, 0] for which in (partner < 0, partner >= 0))
        labels = token[alone]
        total = nn.functional.cross_entropy(ops.rows_of(logits, alone), labels, reduction="sum")
        if not len(taught):
            return total
        target = mapped(partner[taught]).div_(heat)
        logits = ops.rows_of(logits, taught)
        return total + ops.forward_kl(logits, target.softmax(-1), target.log_softmax(-1)).sum()

    def _mapping(self, block: Block) -> Callable[[Tensor], Tensor]:
        """What takes the logits of teacher rows to the student's tokens, see `_total`."""
        logits, pair = block.taught().scores().detach(), block.pair
        if self.options.logit == "largest":
            student = pair.edit_map.to(logits.device)
            known = torch.nonzero(student >= 0)[:, 0]

            def largest(rows: Tensor) -> Tensor:
                targets = logits.new_full((len(rows), len(pair.student_vocabulary)), ABSENT).float()
                values = logits[rows].index_select(1, known).float()
                return targets.scatter_reduce_(1, student[known].expand_as(values), values, "amax")

            return largest
        source = self._sources(pair).to(logits.device)
        absent = torch.nonzero(source < 0)[:, 0]
        source = source.clamp(min=0)
        return lambda rows: (
            logits[rows].index_select(1, source).float().index_fill_(1, absent, ABSENT)
        )

    def _sources(self, pair: PairTables) -> Tensor:
        """The teacher token whose logit each student token takes, [V_S]; -1: none."""
        if self.options.logit == "nearest":
            return pair.reverse_edit_map
        student = pair.edit_map
        mapped = torch.nonzero(student >= 0)[:, 0]
        nothing = student.new_full((len(pair.student_vocabulary),), len(student))
        lowest = nothing.scatter_reduce(0, student[mapped], mapped, "amin")
        return torch.where(lowest < len(student), lowest, -1)

    def _fitting(self, own: Integers, taught: Integers, pair: PairTables) -> Integers:
        """Rows of a document that fit, given what they read: student's and teacher's, [P, 2]."""
        own_ids, own = np.unique(own, return_inverse=True)
        ids, taught = np.unique(taught, return_inverse=True)
        same = self._same(own_ids, ids, pair)
        cost = _costs(
            _texts(own_ids, pair.student_vocabulary), _texts(ids, pair.teacher_vocabulary), same
        )
        path = time_warp(cost[taught[:, None], own])
        once = np.bincount(path[:, 1])[path[:, 1]] == 1
        row, own_row = path[once].T
        return np.stack([own_row, row], 1)[same[taught[row], own[own_row]]]

    def _same(self, own: Integers, taught: Integers, pair: PairTables) -> NDArray[np.bool_]:
        """Whether a teacher token maps to a student token, [n_T, n_S] (nearest: the reverse)."""
        if self.options.logit == "nearest":
            return taught[:, None] == _mapped(own, pair.reverse_edit_map)
        return _mapped(taught, pair.edit_map)[:, None] == own


def _mapped(ids: Integers, table: Tensor) -> Integers:
    """Where the ids map to; START stays what it is."""
    found = table.numpy()[ids.clip(min=0)]
    return np.where(ids < 0, START, np.where(found < 0, NOWHERE, found))


def _texts(ids: Integers, vocabulary: Sequence[bytes]) -> list[bytes]:
    """The tokens' bytes; b"" for specials and for START."""
    return [vocabulary[index] if index >= 0 else b"" for index in ids.tolist()]


def _costs(own: list[bytes], taught: list[bytes], same: NDArray[np.bool_]) -> Integers:
    """Edit distances [n_T, n_S] without spaces; what has no bytes is one symbol, shared if same."""
    spelled = [[text.replace(b" ", b"") for text in texts] for texts in (taught, own)]
    rows, columns = (np.array([max(1, len(text)) for text in texts], int) for texts in spelled)
    symbols = [np.array([not text for text in texts], bool) for texts in (taught, own)]
    beside = np.where(same, 0, np.maximum(rows[:, None], columns))
    return np.where(symbols[0][:, None] | symbols[1], beside, levenshtein(*spelled))


METHOD = MinED
