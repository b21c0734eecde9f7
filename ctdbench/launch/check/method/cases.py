"""Random aligned rows of both sides, and the changes to them that the conformance checks make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ctdbench.distill.batches import SideBatch
from ctdbench.distill.blocks import all_rows, position_pairs
from ctdbench.distill.corpus import Document
from ctdbench.distill.models import Side
from ctdbench.distill.view import bare_rows
from ctdbench.launch.check.method.pair import Pair, batch_of
from ctdbench.method import Needs, PairTables, Rows

EVERYTHING = 10**9  # rows or chunks, more than there are
PADDING = {"student": 2, "teacher": 5}  # rows a document
Place = Literal["before", "after"]


@dataclass(frozen=True)
class Case:
    """Rows of both sides with all that a method can ask for.

    pairs: [P, 2] by position. real: the teacher's rows that are no padding; None for all of them.
    """

    student: Rows
    teacher: Rows
    tables: PairTables
    pairs: Tensor
    real: Tensor | None = None

    def given(self, needs: Needs) -> Case:
        """Copies of the rows, without the states and tables that the method does not ask for."""
        student = _given(self.student, states=needs.hidden, tables=needs.embeddings)
        teacher = _given(self.teacher, states=needs.teacher_hidden, tables=needs.embeddings)
        return replace(self, student=student, teacher=teacher)


def make_case(pair: Pair, found: Sequence[Document], needs: Needs, seed: int = 0) -> Case:
    """Random float32 states, and logits that the models' heads read from them."""
    batch = batch_of(pair.student, pair.teacher, found)
    draw = torch.Generator().manual_seed(seed)
    student = _random_rows(batch.student, pair.student, draw)
    teacher = _random_rows(batch.teacher, pair.teacher, draw)
    pairs = position_pairs(batch, needs.skip_last_student_token)
    return Case(student, teacher, pair.tables, pairs)


def _random_rows(rows: SideBatch, side: Side, draw: torch.Generator) -> Rows:
    hidden = 2 * torch.randn(len(rows.token), side.width, generator=draw)
    made = whole(rows, side.model, hidden, hidden)
    assert made.embedding is not None
    assert made.head is not None
    made = replace(made, embedding=made.embedding.float(), head=made.head.float())
    return with_states(made, hidden, len(side.tokens.vocabulary))


def whole(rows: SideBatch, model: Any, hidden: Tensor, logits: Tensor) -> Rows:
    """All rows of one side of a batch, with these states and logits and the model's tables."""
    (block,) = all_rows(rows, EVERYTHING, EVERYTHING)
    return replace(
        bare_rows(rows, block.student, block),
        logits=logits,
        hidden=hidden,
        embedding=model.get_input_embeddings().weight.detach(),
        head=model.get_output_embeddings().weight.detach(),
    )


def with_states(rows: Rows, states: Tensor, columns: int) -> Rows:
    """The rows with other states [R, d], and the logits that the head reads from them."""
    assert rows.head is not None
    return replace(rows, hidden=states, logits=states @ rows.head[:columns].T)


def twins(case: Case) -> Case:
    """Student = teacher: the student's rows on both sides (of a pair with one tokenizer)."""
    return replace(case, teacher=case.student)


def reordered(case: Case) -> tuple[Case, Tensor]:
    """The last document first; and the new place of every student row, [R]."""
    orders = [
        torch.sort(rows.document, descending=True, stable=True).indices
        for rows in (case.student, case.teacher)
    ]
    student, teacher = (
        numbered(replace(taken, document=rows.document.max() - taken.document))
        for rows, order in zip((case.student, case.teacher), orders, strict=True)
        for taken in [picked(rows, order)]
    )
    return _moved(case, student, teacher, *map(torch.argsort, orders))


def padded(case: Case, where: Place) -> tuple[Case, Tensor]:
    """With rows that are no one's; and the new place of every student row, [R].

    before: in front of every document, as a longer prompt is. after: behind all of them, in a
    document that has nothing else, for the row behind a chunk is one that its model predicts.
    """
    own, taught = case.tables.student_special[0], case.tables.teacher_special[0]
    student, student_place = _padded(case.student, where, own, PADDING["student"])
    teacher, teacher_place = _padded(case.teacher, where, taught, PADDING["teacher"])
    moved, place = _moved(case, student, teacher, student_place, teacher_place)
    return replace(moved, real=teacher_place), place


def _padded(rows: Rows, where: Place, special: int, count: int) -> tuple[Rows, Tensor]:
    documents = 1 + int(rows.document.max())
    owners = torch.arange(documents) if where == "before" else torch.tensor([documents])
    owners = owners.repeat_interleave(count)
    draw = torch.Generator().manual_seed(count)
    extra = picked(rows, torch.zeros_like(owners))
    zero, nothing = torch.zeros_like(owners), torch.full_like(owners, -1)
    extra = replace(
        extra,
        logits=9 * torch.randn(extra.scores().shape, generator=draw),
        hidden=9 * torch.randn((len(owners), states(rows).shape[1]), generator=draw),
        token=zero + special if where == "before" else nothing,
        input=zero + special,
        chunk=nothing,
        supervised=zero.bool(),
        document=owners,
        byte_start=zero,
        byte_end=zero,
    )
    order = torch.sort(torch.cat([owners, rows.document]), stable=True).indices
    return picked(_joined(extra, rows), order), torch.argsort(order)[len(owners) :]


def renumbered(case: Case, old: Pair, new: Pair) -> Case:
    """The same tokens under the ids that they have in the new pair."""
    student = _renumbered(case.student, old.student, new.student)
    teacher = _renumbered(case.teacher, old.teacher, new.teacher)
    return replace(case, student=student, teacher=teacher, tables=new.tables)


def new_ids(old: Side, new: Side) -> Tensor:
    """[V] the new id of every old one."""
    known = new.tokenizer.get_vocab()
    return torch.tensor([known[t] for t in old.tokenizer.convert_ids_to_tokens(range(len(known)))])


def _renumbered(rows: Rows, old: Side, new: Side) -> Rows:
    place = new_ids(old, new)
    order = torch.argsort(place)
    assert rows.input is not None
    assert rows.embedding is not None
    assert rows.head is not None
    return replace(
        rows,
        logits=rows.scores()[:, order],
        token=place[rows.token],
        input=place[rows.input],
        embedding=torch.cat([rows.embedding[order], rows.embedding[len(order) :]]),
        head=torch.cat([rows.head[order], rows.head[len(order) :]]),
    )


def limited(case: Case, chunks: int, of: Sequence[int]) -> Case:
    """With the first few chunks (of pairs: rows) only of the documents named."""
    student = numbered(_limited(case.student, chunks, of))
    teacher = numbered(_limited(case.teacher, chunks, of))
    owner = case.student.document[case.pairs[:, 0]]
    kept = torch.ones_like(owner, dtype=torch.bool)
    for document in of:
        inside = owner == document
        kept &= ~inside | (inside.cumsum(0) <= chunks)
    return replace(case, student=student, teacher=teacher, pairs=case.pairs[kept])


def _limited(rows: Rows, chunks: int, of: Sequence[int]) -> Rows:
    chunk = rows.chunk.clone()
    for document in of:
        own = rows.chunk[(rows.document == document) & (rows.chunk >= 0)]
        late = torch.isin(chunk, own.unique()[chunks:]) & (rows.document == document)
        chunk[late] = -1
    return replace(rows, chunk=chunk)


def unsupervised(case: Case) -> Case:
    """Nothing but prompts."""
    everywhere = range(1 + int(case.student.document.max()))
    bare = limited(case, 0, everywhere)
    student, teacher = (
        replace(rows, supervised=torch.zeros_like(rows.supervised))
        for rows in (bare.student, bare.teacher)
    )
    return replace(bare, student=student, teacher=teacher)


def one_hot(case: Case, seed: int = 2) -> Case:
    """Logits that leave one token of every row all of the mass."""
    draw = torch.Generator().manual_seed(seed)
    sides = []
    for rows in (case.student, case.teacher):
        likely = torch.randint(rows.scores().shape[1], (len(rows.token), 1), generator=draw)
        sides.append(replace(rows, logits=torch.zeros_like(rows.scores()).scatter(1, likely, 1e4)))
    return replace(case, student=sides[0], teacher=sides[1])


def coarse(case: Case) -> Case:
    """Logits and states in bfloat16."""
    student, teacher = (
        replace(rows, logits=rows.scores().bfloat16(), hidden=states(rows).bfloat16())
        for rows in (case.student, case.teacher)
    )
    return replace(case, student=student, teacher=teacher)


def numbered(rows: Rows) -> Rows:
    """Chunks numbered 0, 1, .. in the order of the rows."""
    chunk = rows.chunk.clone()
    inside = chunk >= 0
    chunk[inside] = chunk[inside].unique_consecutive(return_inverse=True)[1]
    return replace(rows, chunk=chunk)


def picked(rows: Rows, index: Tensor) -> Rows:
    """Some of the rows, in this order."""
    return replace(rows, **{name: value[index] for name, value in _by_row(rows).items()})


def _joined(first: Rows, second: Rows) -> Rows:
    others = _by_row(second)
    return replace(
        second, **{name: torch.cat([value, others[name]]) for name, value in _by_row(first).items()}
    )


def _by_row(rows: Rows) -> dict[str, Tensor]:
    """The fields that have an entry for every row."""
    tables = ("embedding", "head")
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return {n: value for n, value in values.items() if value is not None and n not in tables}


def _moved(
    case: Case, student: Rows, teacher: Rows, student_place: Tensor, teacher_place: Tensor
) -> tuple[Case, Tensor]:
    own, taught = case.pairs.T
    pairs = torch.stack([student_place[own], teacher_place[taught]], 1)
    return replace(case, student=student, teacher=teacher, pairs=pairs), student_place


def _given(rows: Rows, *, states: bool, tables: bool) -> Rows:
    left_out = {"hidden": not states, "embedding": not tables, "head": not tables}
    values = ((field.name, getattr(rows, field.name)) for field in fields(rows))
    kept: dict[str, Any] = {
        name: None if value is None or left_out.get(name) else value.clone()
        for name, value in values
    }
    return Rows(**kept)


def states(rows: Rows) -> Tensor:
    """The states [R, d] that all rows here have."""
    assert rows.hidden is not None
    return rows.hidden
