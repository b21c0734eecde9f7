"""Small random batches of two sides, and what must hold for any method that compares chunks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ctdbench.method import Block, Method, PairTables, Rows, mean

# "a", "b", "c" and the end tokens are common; id 6 of the student is a hole, id 7 a special
STUDENT = [b"", b"a", b"b", b"ab", b"c", b"bc", b"", b""]
TEACHER = [b"x", b"", b"b", b"a", b"abc", b"c", b"y"]
ENDS = ((0, 1),)
SHARED = [(1, 3), (2, 2), (4, 5), (0, 1)]
Sizes = list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Case:
    """A batch: rows of both sides, and per document the rows of every chunk on each side."""

    student: Rows
    teacher: Rows
    pair: PairTables
    chunks: list[list[tuple[list[int], list[int]]]]

    @property
    def block(self) -> Block:
        """The whole batch as one block, with the largest logits of `Needs.prepare`."""
        counts = [len(document) for document in self.chunks]
        tables = (torch.tensor(counts, dtype=torch.long), None, None, self.pair)
        largest = self.teacher.scores().amax(0)
        return Block(self.student, self.teacher, sum(counts), *tables, largest)

    def part(self, start: int, stop: int) -> Block:
        """The block of the chunks start..stop-1; rows outside chunks are in the first one."""
        sides = []
        for rows in (self.student, self.teacher):
            inside = (rows.chunk >= start) & (rows.chunk < stop)
            taken = picked(rows, torch.nonzero(inside | ((rows.chunk < 0) & (start == 0)))[:, 0])
            moved = torch.where(taken.chunk >= 0, taken.chunk - start, -1)
            sides.append(replace(taken, chunk=moved))
        return replace(self.block, student=sides[0], teacher=sides[1], chunks=stop - start)


def sizes() -> st.SearchStrategy[Sizes]:
    """Documents of chunks of 1 to 3 rows a side, short ones more often."""
    count = st.sampled_from([1, 1, 2, 3])
    return st.lists(st.lists(st.tuples(count, count), max_size=4), min_size=1, max_size=3)


@st.composite
def cases(draw: st.DrawFn, *, one_tokenizer: bool = False) -> Case:
    """Random cases; with `one_tokenizer` both sides have the student's, and the same tokens."""
    return case_of(draw(sizes()), draw(st.integers(0, 99)), one_tokenizer=one_tokenizer)


def case_of(documents: Sizes, seed: int = 0, *, one_tokenizer: bool = False) -> Case:
    """A case of these chunk sizes, with random logits and tokens."""
    generator = torch.Generator().manual_seed(seed)
    if one_tokenizer:
        documents = [[(own, own) for own, _ in chunks] for chunks in documents]
    vocabularies = (STUDENT, STUDENT if one_tokenizer else TEACHER)
    student, teacher = (
        _rows([[chunk[side] for chunk in chunks] for chunks in documents], len(words), generator)
        for side, words in enumerate(vocabularies)
    )
    if one_tokenizer:
        teacher = replace(teacher, token=student.token)
    ends = ((0, 0),) if one_tokenizer else ENDS
    pair = PairTables.build(*vocabularies, ends)
    first = [0, *itertools.accumulate(map(len, documents))]
    numbered = [
        [(_rows_of(student, c), _rows_of(teacher, c)) for c in range(start, start + len(chunks))]
        for start, chunks in zip(first, documents, strict=False)
    ]
    return Case(student, teacher, pair, numbered)


def _rows_of(rows: Rows, chunk: int) -> list[int]:
    found: list[int] = torch.nonzero(rows.chunk == chunk)[:, 0].tolist()
    return found


def _rows(documents: list[list[int]], columns: int, generator: torch.Generator) -> Rows:
    """One row outside every chunk, then the chunks' rows, for every document."""
    chunk: list[int] = []
    document: list[int] = []
    for index, widths in enumerate(documents):
        first = 1 + max(chunk, default=-1)
        chunk += [-1, *(first + c for c, width in enumerate(widths) for _ in range(width))]
        document += [index] * (1 + sum(widths))
    place = torch.arange(len(chunk))
    return Rows(
        logits=2 * torch.randn(len(chunk), columns, generator=generator),
        token=torch.randint(columns, (len(chunk),), generator=generator),
        chunk=torch.tensor(chunk),
        supervised=torch.ones(len(chunk)).bool(),
        document=torch.tensor(document),
        byte_start=place,
        byte_end=place + 1,
    )


def picked(rows: Rows, index: Tensor) -> Rows:
    """Some of the rows, in this order."""
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return Rows(**{name: None if value is None else value[index] for name, value in values.items()})


def terms(method: Method, block: Block) -> dict[str, float]:
    """Every term as its mean."""
    return {name: float(mean(term)) for name, term in method.terms(block, {}).items()}


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    """Equal but for the rounding of sums in another order."""
    assert set(found) == set(expected)
    for name, value in found.items():
        assert abs(value - expected[name]) < 1e-5 * (1 + abs(expected[name])), (name, value)


def check_invariants(method: Method, case: Case) -> None:
    """The order of documents, the numbering of a vocabulary, and blocks change nothing; counts
    need no logits; bfloat16 and blocks without chunks are finite."""
    expected = terms(method, case.block)
    same(terms(method, reversed_documents(case).block), expected)
    same(terms(method, renumbered(case).block), expected)
    check_blocks(method, case)
    check_counts(method, case.block)
    halves = [
        replace(side, logits=side.scores().bfloat16()) for side in (case.student, case.teacher)
    ]
    coarse = terms(method, replace(case.block, student=halves[0], teacher=halves[1]))
    empty = terms(method, replace(case.part(0, 0), chunks=0))
    assert all(torch.isfinite(torch.tensor(value)) for value in coarse.values())
    assert empty == dict.fromkeys(expected, 0.0)


def reversed_documents(case: Case) -> Case:
    """The last document first, chunks renumbered."""
    documents = len(case.chunks)
    chunks = case.block.chunks
    moved = []
    starts = torch.tensor([0] + [len(c) for c in case.chunks]).cumsum(0)
    for rows in (case.student, case.teacher):
        order = torch.sort(documents - 1 - rows.document, stable=True).indices
        taken = picked(rows, order)
        start, stop = starts[taken.document], starts[taken.document + 1]
        chunk = torch.where(taken.chunk >= 0, chunks - stop + taken.chunk - start, -1)
        moved.append(replace(taken, chunk=chunk, document=documents - 1 - taken.document))
    return Case(moved[0], moved[1], case.pair, case.chunks[::-1])


def renumbered(case: Case) -> Case:
    """Other ids for the same tokens: the teacher's, or both sides' if they are one tokenizer."""
    words = list(case.pair.teacher_vocabulary)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(7))
    place = torch.argsort(order)
    new_words = [words[int(old)] for old in order]
    one_tokenizer = words == list(case.pair.student_vocabulary)
    renamed = [
        replace(rows, logits=rows.scores()[:, order], token=place[rows.token])
        for rows in (case.student, case.teacher)[0 if one_tokenizer else 1 :]
    ]
    ends = [
        (int(place[s]) if one_tokenizer else s, int(place[t])) for s, t in case.pair.special_pairs
    ]
    student_words = new_words if one_tokenizer else case.pair.student_vocabulary
    pair = PairTables.build(student_words, new_words, ends)
    return Case(renamed[0] if one_tokenizer else case.student, renamed[-1], pair, case.chunks)


def check_blocks(method: Method, case: Case) -> None:
    """Totals and counts of two blocks add up, wherever the batch is cut."""
    ends = list(itertools.accumulate(map(len, case.chunks)))
    cuts = ends if method.needs.whole_documents else range(case.block.chunks + 1)
    whole = method.terms(case.block, {})
    for cut in cuts:
        parts = [method.terms(case.part(*span), {}) for span in ((0, cut), (cut, ends[-1]))]
        for name, term in whole.items():
            total = sum(float(part[name].total) for part in parts)
            assert abs(total - float(term.total)) < 1e-5 * (1 + abs(total)), (name, cut)
            count = sum(float(part[name].count) for part in parts)
            assert abs(count - float(term.count)) < 1e-5, (name, cut)


def check_counts(method: Method, block: Block) -> None:
    """`counts` agrees with `terms`, and sees no logits."""
    bare = replace(
        block,
        student=replace(block.student, logits=None),
        teacher=replace(block.taught(), logits=None),
    )
    counts = method.counts(bare)
    assert counts is not None
    found = {name: float(term.count) for name, term in method.terms(block, {}).items()}
    assert {name: float(count) for name, count in counts.items()} == found


def check_graph(method: Method, *, one_tokenizer: bool = False) -> None:
    """Forty chunks need no more operations than four: nothing loops over chunks or documents."""
    nodes = []
    for documents in (2, 20):
        case = case_of([[(1, 1), (2, 1)]] * documents, one_tokenizer=one_tokenizer)
        leaf = case.student.scores().clone().requires_grad_()
        block = replace(case.block, student=replace(case.student, logits=leaf))
        total = torch.stack([term.total for term in method.terms(block, {}).values()]).sum()
        nodes.append(_nodes(total.grad_fn))
    assert nodes[0] == nodes[1]


def _nodes(root: Any) -> int:
    seen, pending = set(), [root]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return len(seen)
