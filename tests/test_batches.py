"""Padded batches and the blocks they are cut into."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from harness_setup import batch_of, examples, llama_side
from hypothesis import given, settings
from hypothesis import strategies as st

from ctdbench.distill.batches import BUCKETS, Batch, bucket, micro_batches
from ctdbench.distill.blocks import pairs_per_document, plan_blocks, position_pairs
from ctdbench.distill.examples import Example
from ctdbench.method import Needs


@pytest.fixture(scope="module")
def found() -> list[Example]:
    return examples(llama_side("student"), llama_side("teacher"), count=7)


@pytest.fixture(scope="module")
def batch(found: list[Example]) -> Batch:
    return batch_of(found)


def test_rows_are_the_tokens_after_the_first_in_document_order(
    found: list[Example], batch: Batch
) -> None:
    place = 0
    for index, example in enumerate(found):
        size = len(example.student.chunk) - 1
        rows = slice(place, place + size)
        assert batch.student.token[rows].tolist() == example.student.sequence.ids[1:].tolist()
        assert (
            batch.student.byte_end[rows].tolist() == example.student.sequence.byte_end[1:].tolist()
        )
        assert (batch.student.document[rows] == index).all()
        place += size
    assert place == len(batch.student.token)


def test_examples_of_one_padded_length_come_together_and_in_order(found: list[Example]) -> None:
    groups = micro_batches(found, None, Accelerator(cpu=True), Needs())
    lengths = [{bucket(len(example.student.chunk)) for example in group} for group in groups]
    assert len(groups) > 1
    assert lengths == [{length} for length in sorted(set.union(*lengths))]
    places = [[found.index(example) for example in group] for group in groups]
    assert sorted(place for group in places for place in group) == list(range(len(found)))
    assert all(group == sorted(group) for group in places)


@pytest.mark.parametrize(
    ("size", "needs", "sizes"),
    [(3, Needs(), [3, 3, 1]), (None, Needs(prepare="microbatch"), [7])],
    ids=["as asked for", "a method that looks at all of it"],
)
def test_examples_come_together_whatever_their_length(
    size: int | None, needs: Needs, sizes: list[int], found: list[Example]
) -> None:
    groups = micro_batches(found, size, Accelerator(cpu=True), needs)
    assert [len(group) for group in groups] == sizes
    assert [example for group in groups for example in group] == found


def test_chunk_ids_run_over_the_batch(found: list[Example], batch: Batch) -> None:
    assert batch.document_chunks.tolist() == [example.chunks for example in found]
    for side in (batch.student, batch.teacher):
        inside = side.chunk[side.chunk >= 0]
        assert torch.equal(inside.unique(), torch.arange(int(batch.document_chunks.sum())))
        counted = [
            len(side.chunk[(side.document == d) & (side.chunk >= 0)].unique()) for d in range(7)
        ]
        assert counted == batch.document_chunks.tolist()


def test_both_sides_of_a_chunk_cover_the_same_bytes(batch: Batch) -> None:
    for chunk in range(int(batch.document_chunks.sum())):
        spans = []
        for side in (batch.student, batch.teacher):
            rows = side.chunk == chunk
            spans.append((int(side.byte_start[rows].min()), int(side.byte_end[rows].max())))
        assert spans[0] == spans[1]


def test_texts_joined_are_addressed_by_first_bytes(batch: Batch) -> None:
    joined = b"".join(batch.texts)
    assert batch.size == len(joined)
    for start, text in zip(batch.first_bytes().tolist(), batch.texts, strict=True):
        assert joined[start : start + len(text)] == text


@given(length=st.integers(1, 10_000))
@settings(deadline=None)
def test_buckets_hold_what_they_are_for(length: int) -> None:
    size = bucket(length)
    assert size >= length
    assert size in BUCKETS or size % 1024 == 0
    assert len({bucket(n) for n in range(1, 5000)}) < 20


NEEDS = [
    Needs(),
    Needs(teacher_logits=False),
    Needs(teacher_logits=False, bytes="path"),
    Needs(pairing="positions"),
    Needs(pairing="positions", skip_last_student_token=True),
    Needs(pairing="documents"),
]


@given(block_rows=st.integers(1, 400), needs=st.sampled_from(NEEDS))
@settings(max_examples=60, deadline=None)
def test_blocks_hold_every_supervised_row_once(batch: Batch, block_rows: int, needs: Needs) -> None:
    pairs = None
    if needs.pairing == "positions":
        pairs = position_pairs(batch, needs.skip_last_student_token)
    blocks = plan_blocks(batch, needs, block_rows, pairs)
    rows = torch.cat([block.student for block in blocks])
    assert len(rows.unique()) == len(rows)
    supervised = batch.student.supervised.nonzero()[:, 0]
    assert torch.equal(rows.sort().values, supervised)
    for block in blocks:
        size = len(block.student) + len(block.teacher)
        alone = block.chunks == 1 or len(batch.student.document[block.student].unique()) == 1
        assert 0 < size <= block_rows or alone or block_rows == 1


@pytest.mark.parametrize("block_rows", [1, 60, 10_000])
def test_documents_come_whole_with_all_supervised_rows(batch: Batch, block_rows: int) -> None:
    blocks = plan_blocks(batch, Needs(pairing="documents"), block_rows)
    for block in blocks:
        for side, rows in ((batch.student, block.student), (batch.teacher, block.teacher)):
            inside = torch.isin(side.document, batch.student.document[block.student])
            assert torch.equal(rows, (side.supervised & inside).nonzero()[:, 0])
    stops = [block.first_chunk + block.chunks for block in blocks]
    assert [block.first_chunk for block in blocks] == [0, *stops[:-1]]
    assert stops[-1] == int(batch.document_chunks.sum())


@pytest.mark.parametrize("block_rows", [1, 7, 30, 1000])
def test_a_chunk_is_never_cut(batch: Batch, block_rows: int) -> None:
    blocks = [block for block in plan_blocks(batch, Needs(), block_rows) if block.chunks]
    assert [block.first_chunk for block in blocks] == [
        0,
        *(block.first_chunk + block.chunks for block in blocks[:-1]),
    ]
    for block in blocks:
        for side, rows in ((batch.student, block.student), (batch.teacher, block.teacher)):
            first, stop = block.first_chunk, block.first_chunk + block.chunks
            expected = ((side.chunk >= first) & (side.chunk < stop)).nonzero()[:, 0]
            assert torch.equal(rows, expected)
    for block, following in pairwise(blocks):  # the next chunk would not have fitted
        ids = following.first_chunk
        more = int((batch.student.chunk == ids).sum() + (batch.teacher.chunk == ids).sum())
        assert len(block.student) + len(block.teacher) + more > block_rows


@pytest.mark.parametrize("block_rows", [1, 30, 100, 1000])
def test_a_document_is_not_cut_where_a_method_asks_for_it_whole(
    batch: Batch, block_rows: int
) -> None:
    blocks = plan_blocks(batch, Needs(whole_documents=True), block_rows)
    ends = batch.document_chunks.cumsum(0).tolist()
    stops = [block.first_chunk + block.chunks for block in blocks if block.chunks]
    assert stops[-1] == ends[-1]
    assert set(stops) <= set(ends)
    for first, block in zip([0, *stops], blocks, strict=False):
        documents = sum(first < end <= first + block.chunks for end in ends)
        size = len(block.student) + len(block.teacher)
        assert size <= block_rows or documents == 1


def test_pairs_are_the_kth_supervised_tokens(found: list[Example], batch: Batch) -> None:
    for skip in (False, True):
        expected, counts = [], []
        first = [0, 0]
        for example in found:
            sides = (example.student, example.teacher)
            rows = [
                [start + i - 1 for i in range(1, len(side.chunk)) if side.supervised[i]]
                for start, side in zip(first, sides, strict=True)
            ]
            kept = rows[0][:-1] if skip else rows[0]
            expected += list(zip(kept, rows[1], strict=False))
            counts.append(min(len(kept), len(rows[1])))
            first = [start + len(side.chunk) - 1 for start, side in zip(first, sides, strict=True)]
        pairs = position_pairs(batch, skip)
        assert [tuple(pair) for pair in pairs.tolist()] == expected
        assert pairs_per_document(batch, pairs).tolist() == counts
