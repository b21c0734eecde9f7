"""ALM: Approximate Likelihood Matching (arXiv 2503.20083).

Both sides give every chunk a likelihood, and the loss compares the two numbers:
    log P(c) = sum of the log-probabilities of the chunk's own tokens
    P'(c)    = P(c) * b(c),   b(c) = mass, in the row after the chunk, of the tokens that start a
               new pretoken: first byte space, newline or tab, and all specials.
b removes the bias that a chunk's last token may go on differently on the two sides. A chunk whose
teacher b(c) <= gamma is merged with what follows until b > gamma: log-probabilities add, b is that
of the last. What is left at a document's end is a group too, so a text without any boundary
(Chinese) is one. With p = log P'_T / tau - 1e-6 and q = log P'_S / tau - 1e-6 of a group
    binary_ce (default):  -( e^p q + (1 - e^p) log(1 - e^q) ),
mean over the groups of the global batch; tau = 100, gamma = 0.1. The student's part of it is the
binarised forward KL; its floor is the teacher's entropy, not 0.
    + hidden_weight * mean over chunks and channels of (h_S - h_T)^2 / (mean over chunks of h_T^2),
h the last-layer state that has read the chunk, the student's through a linear projection where the
widths differ. Chunks are not merged there.

The row after a chunk may be missing, at the end of a document or of a piece cut from one: b = 1 on
both sides there, and the chunk has no state. Pure ALM by default (`ce_weight` 0). Several terms
(CE, the state term) are balanced by gradmag, as in the paper, unless train.balance says otherwise.

Public code (bminixhofer/tokenkit, `compute_alm_loss`): the other divergences, debias = eos (b is
the mass of the end token instead, for merging, too), weights and normalisers below. Its `abs_exp`
is one of the two branches of the total variation, `tvd` is both. Its normaliser is wrong when
chunks merge before the tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ctdbench import ops, pieces
from ctdbench.errors import UserError
from ctdbench.method import (
    Method,
    MethodOptions,
    Needs,
    PairInfo,
    PairTables,
    Rows,
    Scalars,
    SideName,
    Term,
    Trainable,
)

META = {
    "title": "ALM: likelihoods of chunks, debiased at pretoken boundaries",
    "paper": "2503.20083",
    "year": 2025,
    "needs": ["teacher logits"],
    "cost": "one softmax a side",
    "ce": False,  # as published
    "floor": "minimum",
    "exceptions": {
        "floor if hidden_projection=always": "the projection of the states starts at random",
    },
}

EPSILON = 1e-6  # keeps log-probabilities off 0; subtracted, as in the public code
FLOOR = -100.0  # of log b: a vocabulary may have no boundary
BOUNDARIES = (b" ", b"\n", b"\t")
TOKEN, MASS, STATE = 0, 1, 2  # columns of the scalars


class ALMOptions(MethodOptions):
    """Options of `alm`; the defaults are the paper's."""

    ce_weight: float = Field(
        0.0, ge=0, description="Weight of cross-entropy on the student's own tokens."
    )
    weight: float = Field(1.0, ge=0, description="Weight of the likelihood term.")
    hidden_weight: float = Field(0.0, ge=0, description="Weight of the state term (0: none).")
    tau: float = Field(100.0, gt=0, description="Divisor of log-likelihoods.")
    gamma: float | None = Field(
        0.1,
        gt=0,
        lt=1,
        description="Merge chunks until the teacher's b exceeds it; none: no merging.",
    )
    debias: Literal["boundary", "eos", "none"] = Field(
        "boundary",
        description="What b is: the boundary mass or p(end); none: the former, for merging alone.",
    )
    divergence: Literal[
        "binary_ce",
        "reverse_binary_kl",
        "tvd",
        "abs_exp",
        "abs",
        "binary_kl_temp_limit",
        "joschu_k2",
        "joschu_k3",
        "renyi",
    ] = Field("binary_ce", description="How the two likelihoods of a group are compared.")
    renyi_alpha: float = Field(2.0, gt=1, description="Order of the Renyi divergence.")
    chunk_weight: Literal["one", "tokens", "log1p_tokens"] = Field(
        "one", description="Weight of a group by its n teacher tokens: 1, n or log(1 + n)."
    )
    normalizer: Literal["chunks", "tokens"] = Field(
        "chunks", description="Divide by the number of groups, or of their teacher tokens."
    )
    hidden_distance: Literal["l2", "l1", "l2_channelwise", "l1_channelwise"] = Field(
        "l2_channelwise",
        description="Squared or absolute difference, divided by the teacher's mean of the same, "
        "over all channels or each one's.",
    )
    hidden_projection: Literal["auto", "always"] = Field(
        "auto", description="Project the student's states if widths differ, or always."
    )


class _Groups(NamedTuple):
    """The chunks that both sides have rows of, M of them, merged into G groups."""

    chunk: Tensor  # [M] their ids
    group: Tensor  # [M] the group of each
    last: Tensor  # [G] the last chunk of each group, as an index into the M
    after: Tensor  # [M, 2] the rows after each chunk, student's and teacher's; -1: not on both
    tokens: Tensor  # [G] teacher tokens
    chunks: int  # in the whole batch


class ALM(Method):
    """Binary divergence of debiased chunk likelihoods, merged up to the teacher's boundaries."""

    Options = ALMOptions
    options: ALMOptions
    balance = "gradmag"

    @property
    def needs(self) -> Needs:
        """A few numbers of every row; the states of both sides for the state term."""
        hidden = self.options.hidden_weight > 0
        return Needs(kind="scalars", hidden=hidden, teacher_hidden=hidden)

    def check(self, pair: PairTables) -> None:
        """Raises UserError for debias=eos where a side has no end token."""
        if self.options.debias == "eos" and pair.end_pair is None:
            raise UserError(
                "method.debias: eos needs an end token on both sides", "use method.debias=boundary"
            )

    def weights(self) -> Mapping[str, float]:
        """Of `alm` and `hidden`."""
        return {"alm": self.options.weight, "hidden": self.options.hidden_weight}

    def modules(self, pair: PairInfo) -> dict[str, Trainable]:
        """`projection`: the student's states to the teacher's width, if the state term needs it."""
        widths = (pair.student_width, pair.teacher_width)
        always = self.options.hidden_projection == "always"
        if not self.options.hidden_weight or (widths[0] == widths[1] and not always):
            return {}
        return {"projection": Trainable(nn.Linear(*widths))}

    def scalars(
        self, rows: Rows, side: SideName, pair: PairTables, modules: Mapping[str, nn.Module]
    ) -> Tensor:
        """log p(token), log b (the boundary mass; debias=eos: p(end)), the state: [R, m]."""
        logits = rows.scores()
        if self.options.debias == "eos" and pair.end_pair:
            mass = torch.tensor([pair.end_pair[side == "teacher"]], device=logits.device)
        else:
            mass = _boundary_ids(pair, side, logits.device)
        parts = pieces.by_rows(torch.arange(len(logits), device=logits.device), logits.shape[1])

        def masses(number: int, logits: Tensor) -> Tensor:
            return _masses(logits.float(), rows.token[parts[number]], mass)

        values = pieces.rowwise(masses, parts, logits)
        if not self.options.hidden_weight:
            return values
        return torch.cat([values, _states(rows, side, modules)], 1)

    def totals(self, student: Rows, teacher: Scalars) -> dict[str, Tensor]:
        """`alm`: groups, or their tokens. `hidden`: chunks; `hidden_scale`: sums per channel."""
        groups = self._groups(student, teacher)
        found = self._counts(groups)
        if self.options.hidden_weight > 0:
            states = self._end_states(teacher, groups, 1)
            found["hidden_scale"] = states.abs().pow(self._power).sum(0)
        return found

    def combine(
        self, student: Scalars, teacher: Scalars, totals: Mapping[str, Tensor]
    ) -> dict[str, Term]:
        """`alm`, and with hidden_weight > 0 `hidden`."""
        groups = self._groups(student.rows, teacher)
        sides = (student, teacher)
        q, p = (self._likelihoods(side, groups, k) for k, side in enumerate(sides))
        losses = DIVERGENCES[self.options.divergence](p, q, self.options)
        found = {"alm": (WEIGHTS[self.options.chunk_weight](groups.tokens) * losses).sum()}
        if self.options.hidden_weight > 0:
            own, taught = (self._end_states(side, groups, k) for k, side in enumerate(sides))
            scale = totals["hidden_scale"] / totals["hidden"].clamp(min=1)
            if not self.options.hidden_distance.endswith("channelwise"):
                scale = scale.mean()
            quotients = (own - taught).abs().pow(self._power) / (scale + 1e-8)
            found["hidden"] = quotients.sum() / own.shape[1]
        counts = self._counts(groups)
        return {name: Term(total, counts[name]) for name, total in found.items()}

    def _groups(self, student: Rows, teacher: Scalars) -> _Groups:
        """A group ends where the teacher's b exceeds gamma and at a document's end."""
        sides = (student, teacher.rows)
        chunks = 1 + max((int(side.chunk.max()) for side in sides if len(side.chunk)), default=-1)
        last = torch.stack([ops.last_rows(side.chunk, chunks) for side in sides], 1)
        chunk = torch.nonzero((last >= 0).all(1)).squeeze(1)
        last = last[chunk]
        after = torch.stack([_next_rows(side, last[:, k]) for k, side in enumerate(sides)], 1)
        after = torch.where((after >= 0).all(1, keepdim=True), after, -1)
        document = student.document[last[:, 0]]
        closes = nn.functional.pad(document[1:], (0, 1), value=-1) != document
        least = -math.inf if self.options.gamma is None else math.log(self.options.gamma)
        closes |= (after[:, 1] < 0) | (teacher.values[after[:, 1], MASS] > least)
        group = closes.cumsum(0) - closes.long()
        sizes = torch.bincount(teacher.rows.chunk[teacher.rows.chunk >= 0], minlength=chunks)
        tokens = ops.segment_sum(sizes[chunk], group, int(closes.sum()))
        return _Groups(chunk, group, torch.nonzero(closes).squeeze(1), after, tokens, chunks)

    def _likelihoods(self, side: Scalars, groups: _Groups, index: int) -> Tensor:
        """log P' of every group on one side, [G] float64."""
        inside = side.rows.chunk >= 0
        came = side.values[inside, TOKEN].double()
        chunk = ops.segment_sum(came, side.rows.chunk[inside], groups.chunks)
        likelihood = ops.segment_sum(chunk[groups.chunk], groups.group, len(groups.last))
        if self.options.debias == "none":
            return likelihood
        after = groups.after[groups.last, index]
        return likelihood + torch.where(after >= 0, side.values[after, MASS].double(), 0.0)

    def _end_states(self, side: Scalars, groups: _Groups, index: int) -> Tensor:
        """The states that have read a chunk, of all chunks that have one: [E, d] float64."""
        after = groups.after[groups.after[:, 0] >= 0, index]
        return side.values[after, STATE:].double()

    def _counts(self, groups: _Groups) -> dict[str, Tensor]:
        by_tokens = self.options.normalizer == "tokens"
        counts = {"alm": groups.tokens.sum() if by_tokens else groups.tokens.count_nonzero()}
        if self.options.hidden_weight > 0:
            counts["hidden"] = (groups.after[:, 0] >= 0).sum()
        return counts

    @property
    def _power(self) -> int:
        return 2 if self.options.hidden_distance.startswith("l2") else 1


def _masses(logits: Tensor, token: Tensor, ids: Tensor) -> Tensor:
    """log p of the token (0: none came) and of all `ids` together, [R, 2]."""
    norm = logits.logsumexp(-1)
    came = logits.gather(1, token.clamp(min=0)[:, None]).squeeze(1) - norm
    mass = (logits.index_select(1, ids).logsumexp(-1) - norm).clamp(FLOOR, 0.0)
    return torch.stack([torch.where(token >= 0, came, 0.0), mass], 1)


def _boundary_ids(pair: PairTables, side: SideName, device: torch.device) -> Tensor:
    """Tokens that start a pretoken, and specials."""
    own = side == "student"
    trie = pair.student_trie if own else pair.teacher_trie
    order = ops.trie_tensors(trie, device).order
    special = torch.tensor(pair.student_special if own else pair.teacher_special, device=device)
    starting = [order[slice(*trie.interval(byte))] for byte in BOUNDARIES]
    return torch.cat([*starting, special.long()])


def _states(rows: Rows, side: SideName, modules: Mapping[str, nn.Module]) -> Tensor:
    if rows.hidden is None:
        raise TypeError("alm's state term reads states; set Needs(hidden=.., teacher_hidden=..)")
    if side == "teacher" or "projection" not in modules:
        return rows.hidden.float()
    projection = modules["projection"]
    return projection(rows.hidden.to(next(projection.parameters()).dtype)).float()


def _next_rows(rows: Rows, index: Tensor) -> Tensor:
    """The row after each row [M] in the same document, -1 where there is none."""
    after = (index + 1).clamp(max=max(len(rows.document) - 1, 0))
    same = (after > index) & (rows.document[after] == rows.document[index])
    return torch.where(same, after, -1)


# --- divergences of log-likelihoods, p of the teacher and q of the student, [G] float64 -----------


def _tempered(p: Tensor, q: Tensor, options: ALMOptions) -> tuple[Tensor, Tensor]:
    return p / options.tau - EPSILON, q / options.tau - EPSILON


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without cancellation."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def _binary_ce(p: Tensor, q: Tensor, options: ALMOptions) -> Tensor:
    p, q = _tempered(p, q, options)
    return -(p.exp() * q - p.expm1() * _log1mexp(q))


def _reverse_binary_kl(p: Tensor, q: Tensor, options: ALMOptions) -> Tensor:
    p, q = _tempered(p, q, options)
    return q.exp() * (q - p) - q.expm1() * (_log1mexp(q) - _log1mexp(p))


def _abs_exp(p: Tensor, q: Tensor, options: ALMOptions) -> Tensor:
    p, q = _tempered(p, q, options)
    return (p.exp() - q.exp()).abs()


def _temperature_limit(p: Tensor, q: Tensor, options: ALMOptions) -> Tensor:
    """tau times the binary KL as tau goes to infinity."""
    p, q = p - EPSILON, q - EPSILON
    return p - q + p * ((-q).log() - (-p).log())


def _k3(p: Tensor, q: Tensor, options: ALMOptions) -> Tensor:
    ratio = (p - q) / options.tau
    return ratio.expm1() - ratio


def _renyi(p: Tensor, q: Tensor, options: ALMOptions) -> Tensor:
    p, q, order = p - EPSILON, q - EPSILON, options.renyi_alpha
    rest = order * _log1mexp(p) + (1 - order) * _log1mexp(q)
    return torch.logaddexp(order * p + (1 - order) * q, rest) / (order - 1)


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor, ALMOptions], Tensor]] = {
    "binary_ce": _binary_ce,
    "reverse_binary_kl": _reverse_binary_kl,
    "tvd": lambda p, q, options: 2 * _abs_exp(p, q, options),
    "abs_exp": _abs_exp,
    "abs": lambda p, q, options: (p - q).abs(),
    "binary_kl_temp_limit": _temperature_limit,
    "joschu_k2": lambda p, q, options: ((p - q) / options.tau).square() / 2,
    "joschu_k3": _k3,
    "renyi": _renyi,
}
WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "tokens": Tensor.double,
    "log1p_tokens": Tensor.log1p,
}

METHOD = ALM
