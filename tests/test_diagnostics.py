"""Chunks of a text, vocabularies by class, critical tokens, and the loss they speak for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bpe_tokenizer, byte_tokenizer
from wheel_tokenizers import wheel_token_bytes

from ctdbench.errors import UserError
from ctdbench.text.critical_tokens import (
    CLASSES,
    CriticalClass,
    critical_classes,
    recommend,
    token_class,
)
from ctdbench.text.diagnostics import (
    Chunk,
    Overlap,
    align_text,
    chunk_statistics,
    chunked_sentence,
    text_statistics,
    vocabulary_overlap,
)
from ctdbench.text.token_bytes import Encoding, NotLossless, Refusal, TokenBytes
from ctdbench.text.vocabulary import exact_matches

NONE = np.zeros(0, np.int64)
Part = Encoding | Refusal


def encoding(ends: Sequence[int], *, prefix: bool = False) -> Encoding:
    """Tokens that end there; with `prefix` a lone one of no byte in front. Ids are all 7."""
    end = np.array([0, *ends] if prefix else ends, dtype=np.int64)
    start = np.append(0, end[:-1])
    return Encoding(np.full(len(end), 7), start, end)


@st.composite
def documents(draw: st.DrawFn) -> list[tuple[Encoding, Encoding]]:
    """Up to four documents, cut at random on both sides, with a lone prefix or without."""
    found = []
    for size in draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)):
        inner = st.sets(st.integers(1, size - 1)) if size > 1 else st.just(set[int]())
        sides = [encoding([*sorted(draw(inner)), size], prefix=draw(st.booleans())) for _ in "st"]
        found.append((sides[0], sides[1]))
    return found


def slow_chunks(student: Encoding, teacher: Encoding) -> list[tuple[int, int, int]]:
    """Tokens of the student, tokens of the teacher and bytes of every chunk of a document."""
    common = sorted({*student.byte_end.tolist()} & {*teacher.byte_end.tolist()} - {0})
    found = []
    for start, end in zip([0, *common], common, strict=False):
        inside = [
            sum(start <= first < end for first in side.byte_start) for side in (student, teacher)
        ]
        found.append((*inside, end - start))
    return found


@settings(max_examples=80, deadline=None)
@given(documents())
def test_chunk_statistics_are_their_definition(pairs: list[tuple[Encoding, Encoding]]) -> None:
    chunks = [chunk for pair in pairs for chunk in slow_chunks(*pair)]
    found = chunk_statistics(align_text([s for s, _ in pairs], [t for _, t in pairs]))
    single = [width for own, taught, width in chunks if own == taught == 1]
    size = {1: "1", 2: "2"}
    sizes = Counter(f"{size.get(own, '3+')}:{size.get(taught, '3+')}" for own, taught, _ in chunks)
    assert found.chunks == len(chunks)
    assert found.one_to_one == pytest.approx(len(single) / len(chunks))
    assert found.one_to_one_bytes == pytest.approx(sum(single) / sum(w for *_, w in chunks))
    assert found.longest_bytes == max(width for *_, width in chunks)
    assert {name: count for name, count in found.by_size.items() if count} == sizes
    assert sum(found.by_size.values()) == found.chunks


def test_a_refused_document_counts_for_neither_side() -> None:
    own: list[Part] = [encoding([2, 5]), Refusal("not UTF-8"), encoding([3]), Refusal("two")]
    taught: list[Part] = [encoding([5]), encoding([4]), Refusal("changed"), Refusal("three")]
    found = text_statistics(own, taught)
    assert (found.documents, found.bytes, found.student_tokens, found.teacher_tokens) == (
        1,
        5,
        2,
        1,
    )
    assert (found.refused_by_student, found.refused_by_teacher) == (2, 2)
    assert found.refusal == "not UTF-8"


def test_a_megabyte_takes_a_moment() -> None:
    draw = np.random.default_rng(0)
    sides: list[list[Encoding]] = [[], []]
    for _ in range(1300):
        for side in sides:
            cuts = np.append(np.flatnonzero(draw.random(767) < 0.25) + 1, 768)
            side.append(encoding(cuts.tolist()))
    start = time.process_time()
    found = chunk_statistics(align_text(*sides))
    assert time.process_time() - start < 2
    assert found.chunks > 10_000


SENTENCE = "The fox paid 1234567 for 我们 & the dog."


def test_a_sentence_in_chunks_is_the_sentence_on_both_sides() -> None:
    student, teacher = TokenBytes(bpe_tokenizer()), TokenBytes(byte_tokenizer())
    chunks = chunked_sentence(student, teacher, SENTENCE)
    for side in ("student", "teacher"):
        pieces = [piece for chunk in chunks for piece in getattr(chunk, side)]
        assert b"".join(pieces) == SENTENCE.encode()
        assert all(pieces)
    # Bytes cut everywhere, so every chunk is one of the student's tokens.
    assert all(chunk.student == (b"".join(chunk.teacher),) for chunk in chunks)
    assert chunked_sentence(teacher, student, SENTENCE) == [
        Chunk(chunk.teacher, chunk.student) for chunk in chunks
    ]
    assert chunked_sentence(student, teacher, "") == []
    with pytest.raises(UserError, match="lone surrogate at character 4"):
        chunked_sentence(student, teacher, "The \udce9")


def test_a_sentence_of_real_tokenizers() -> None:
    llama, qwen = wheel_token_bytes("llama3"), wheel_token_bytes("qwen")
    chunks = chunked_sentence(llama, qwen, "It costs 201 euros")
    assert Chunk((b"201",), (b"2", b"0", b"1")) in chunks
    assert Chunk((b" costs",), (b" costs",)) in chunks
    mistral = chunked_sentence(wheel_token_bytes("mistral"), llama, "It costs 201 euros")
    assert Chunk((b"2", b"0", b"1"), (b"201",)) in mistral
    assert mistral[0].student[0].startswith(b"I")  # its dummy space is no part of the text
    with pytest.raises(NotLossless):
        chunked_sentence(llama, qwen, "cafe\u0301")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b"201", "digits"),
        (b" 7", "digits"),
        (b"the", "letters"),
        (b" The", "letters"),
        (b"#!/", "punctuation"),
        (b" (", "punctuation"),
        (b" ", "whitespace"),
        (b"\r\n\t", "whitespace"),
        ("我们".encode(), "CJK"),
        (" ひ".encode(), "CJK"),
        ("한".encode(), "CJK"),
        ("né".encode(), "other text"),
        (b"x1", "other text"),
        (b"  x", "other text"),
        (b"):\n", "other text"),
        ("٣".encode(), "other text"),
        ("我".encode()[:2], "part of a character"),
        (b"\xff", "part of a character"),
    ],
)
def test_classes_of_tokens(token: bytes, expected: str) -> None:
    assert token_class(token) == expected
    assert expected in CLASSES


def test_overlap_counts_byte_strings_once() -> None:
    student = [b"", b"1", b"a", b"a", b" b", b"\xe6", "我".encode(), b"\n"]
    teacher = [b"1", b"12", b" b", b"", b"\xe6", b"c", b"\t"]
    found = vocabulary_overlap(student, teacher)
    assert tuple(found) == CLASSES
    assert found["digits"] == Overlap(student_only=0, teacher_only=1, common=1)
    assert found["letters"] == Overlap(1, 1, 1)
    assert found["whitespace"] == Overlap(1, 1, 0)
    assert found["CJK"] == Overlap(1, 0, 0)
    assert found["punctuation"] == Overlap(0, 0, 0)
    assert sum(part.common for part in found.values()) == len(exact_matches(student, teacher))


def named(classes: Sequence[CriticalClass]) -> dict[str, CriticalClass]:
    return {found.name: found for found in classes}


def test_critical_classes_count_the_students_tokens() -> None:
    #          0   1     2      3     4      5      6     7                8     9
    student = [b"", b"1", b" 1", b"07", b"007", b"!", b" !", "我".encode(), b"\n", b"1"]
    teacher = [b"1", b"2", b"07", b" !", b"", b"\n"]
    found = named(critical_classes(student, teacher, np.array([1, 1, 3, 7, 2, 8, 8, 8])))
    assert found["1-digit numerals"] == CriticalClass("1-digit numerals", 10, 1, 1, 0.25, True)
    assert found["2-digit numerals"] == CriticalClass("2-digit numerals", 100, 1, 1, 0.125, True)
    assert found["3-digit numerals"] == CriticalClass("3-digit numerals", 1000, 1, 0, 0.0, True)
    assert found["punctuation"] == CriticalClass("punctuation", 64, 2, 1, 0.0, True)
    assert found["CJK"] == CriticalClass("CJK", None, 1, 0, 0.125, False)
    assert found["whitespace"] == CriticalClass("whitespace", None, 1, 1, 0.375, False)


def test_llama_and_qwen_share_single_digits_alone() -> None:
    llama, qwen = (wheel_token_bytes(name).vocabulary for name in ("llama3", "qwen"))
    found = named(critical_classes(llama, qwen, NONE))
    counted = {name: (kind.student, kind.common) for name, kind in found.items()}
    assert counted["1-digit numerals"] == (10, 10)
    assert counted["2-digit numerals"] == (100, 0)
    assert counted["3-digit numerals"] == (1000, 0)
    assert counted["punctuation"] == (64, 64)
    advice = recommend(found.values())
    assert advice.method == "p-kl"
    assert "2-digit numerals (0 of 100 common), 3-digit" in advice.reason
    assert "punctuation" not in advice.reason


def table_8(*common: int) -> list[CriticalClass]:
    """X-Token's audit of Llama 3.2: its classes, their sizes, and how many of them are common."""
    names = ("1-digit numerals", "2-digit numerals", "3-digit numerals", "punctuation")
    rows = zip(names, (13, 100, 1000, 88), common, strict=True)
    return [CriticalClass(name, size, size, kept, 0.0, True) for name, size, kept in rows]


def test_the_audit_of_the_paper_leads_to_the_papers_losses() -> None:
    qwen, phi = recommend(table_8(13, 0, 0, 88)), recommend(table_8(13, 100, 1000, 88))
    assert (qwen.method, phi.method) == ("p-kl", "h-kl")
    assert "\n" not in qwen.reason + phi.reason
    assert recommend(table_8(13, 100, 499, 88)).method == "p-kl"
    assert recommend(table_8(13, 100, 500, 88)).method == "h-kl"


def test_a_class_that_the_student_lacks_decides_nothing() -> None:
    empty = CriticalClass("3-digit numerals", 1000, 0, 0, 0.0, True)
    assert recommend([empty]).method == "h-kl"


def test_cjk_counts_where_the_text_has_it() -> None:
    english = CriticalClass("CJK", None, 1939, 89, 0.001, False)
    chinese = CriticalClass("CJK", None, 1939, 89, 0.4, False)
    assert recommend([english]).method == "h-kl"
    assert "hardly in this text: CJK (89 of 1,939 common)" in recommend([english]).reason
    assert recommend([chinese]).method == "p-kl"
