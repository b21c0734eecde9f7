"""`escd` against its definition, group by group, and on a case by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from random_rows import Case, check_invariants
from random_texts import graph_size, made, text_case, text_cases, with_gradient
from test_bpm import governing, probabilities, rows_of, slow_divergence, slow_row

from ctdbench.method import PairTables, mean, probe, probe_gradient


def slow_escd(case: Case) -> tuple[list[float], list[float]]:
    """The divergence of every row where both sides start, the completion of every other one."""
    matched, completed = [], []
    words = case.pair.student_vocabulary
    for r in range(len(case.student.token)):
        found = slow_row(case, r)
        if found is None:
            continue
        begin = int(case.student.byte_end[r]) - len(words[int(case.student.token[r])])
        governed = governing(case, int(case.student.chunk[r]), begin)
        assert governed is not None
        row, emitted = governed
        if emitted:
            completed.append(slow_completion(case, r, row, emitted))
            continue
        masses, reached = found
        chances = probabilities(case.student, r)
        others = sum(chance for u, chance in enumerate(chances) if u not in reached)
        cells = [(masses.get(u, 0.0), chances[u]) for u in reached]
        matched.append(slow_divergence([*cells, (masses.get(None, 0.0), others)], None))
    return matched, completed


def slow_completion(case: Case, r: int, row: int, emitted: int) -> float:
    own, taught = case.pair.student_vocabulary, case.pair.teacher_vocabulary
    prefix = taught[int(case.teacher.token[row])][:emitted]
    events = {
        v: word
        for v, word in enumerate(taught)
        if word.startswith(prefix) and len(word) > emitted and word not in own
    }
    shortest = {
        word
        for word in events.values()
        if not any(word != other and word.startswith(other) for other in events.values())
    }
    chances, total = probabilities(case.teacher, row), 0.0
    for start in shortest:
        mass = sum(chances[v] for v, word in events.items() if word.startswith(start))
        completing = [u for u, word in enumerate(own) if word.startswith(start[emitted:])]
        if completing:
            student = probabilities(case.student, r)
            total -= mass * math.log(sum(student[u] for u in completing))
    return total


@settings(max_examples=40, deadline=None)
@given(text_cases())
def test_escd_is_its_definition(case: Case) -> None:
    found = probe(
        made("escd", completion_weight=0.3, weight=2.0), case.student, case.teacher, case.pair
    )
    matched, completed = slow_escd(case)
    expected = [sum(losses) / max(len(losses), 1) for losses in (matched, completed)]
    assert found["bpm"] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    assert found["completion"] == pytest.approx(expected[1], rel=1e-5, abs=1e-7)
    assert found["loss"] == pytest.approx(2 * expected[0] + 0.3 * expected[1], rel=1e-5, abs=1e-6)
    terms = made("escd").terms(case.block, {})
    assert [int(term.count) for term in terms.values()] == [len(matched), len(completed)]


def test_escd_by_hand() -> None:
    """Text "abc", one teacher token that the student spells a|b|c. After "a" the teacher may be in
    "ab", "abc" or "abx" (one event, "ab") or in "ac"; the student has "ac" itself, so that one is
    no event. After "ab": "abc" and "abx", which no student token completes."""
    student = [b"", b"a", b"b", b"c", b"ac", b"bcc"]
    teacher = [b"", b"abc", b"ab", b"abx", b"ac", b"c", b"a"]
    own = rows_of([1, 2, 3], [1, 1, 1], [0, 0, 0], len(student))
    taught = rows_of([1], [3], [0], len(teacher))
    pair = PairTables.build(student, teacher, [(0, 0)], [0], [0])
    q = taught.scores()[0].double().softmax(-1).tolist()
    p = own.scores().double().softmax(-1).tolist()
    after_a = -(q[1] + q[2] + q[3]) * math.log(p[1][2] + p[1][5])
    after_ab = -q[1] * math.log(p[2][3])
    found = probe(made("escd"), own, taught, pair)
    assert found["completion"] == pytest.approx((after_a + after_ab) / 2, rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(text_cases())
def test_escd_invariants(case: Case) -> None:
    check_invariants(made("escd"), case)


@settings(max_examples=10, deadline=None)
@given(text_cases(one_tokenizer=True))
def test_one_tokenizer_has_no_event_to_complete(case: Case) -> None:
    twin = replace(case.teacher, logits=case.student.logits)
    found = probe(made("escd"), case.student, twin, case.pair)
    same = probe(made("bpm"), case.student, twin, case.pair)
    assert found["completion"] == 0
    assert found["bpm"] == pytest.approx(same["bpm"])


def test_completion_leaves_the_split_to_the_student() -> None:
    """Moving mass between two tokens that complete the same bytes costs nothing."""
    student = [b"", b"a", b"b", b"bc"]
    teacher = [b"", b"ab"]
    own = rows_of([1, 2], [1, 1], [0, 0], len(student))
    taught = rows_of([1], [2], [0], len(teacher))
    pair = PairTables.build(student, teacher, [(0, 0)], [0], [0])
    _, gradient = probe_gradient(made("escd"), own, taught, pair)
    p = own.scores()[1].softmax(-1)
    ratio = gradient[1, 2] / gradient[1, 3]
    assert ratio == pytest.approx(float(p[2] / p[3]), rel=1e-5)
    assert gradient[1, 2] < 0 < gradient[1, 1]


def test_extreme_logits_are_finite() -> None:
    case = text_case(3, [9, 9, 9])
    own = replace(case.student, logits=case.student.scores() * 300)
    taught = replace(case.teacher, logits=case.teacher.scores() * -300)
    values, gradient = probe_gradient(made("escd"), own, taught, case.pair)
    assert math.isfinite(values["loss"])
    assert np.isfinite(gradient).all()


def test_nothing_loops_over_rows_or_documents() -> None:
    sizes = []
    for count in (2, 20):
        block, _ = with_gradient(text_case(1, [6] * count))
        terms = made("escd").terms(block, {})
        sizes.append(graph_size(sum(mean(term) for term in terms.values())))
    assert sizes[0] == sizes[1]
