"""`bpm` against its definition, one row and one token at a time, and against enumeration."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import Case, check_invariants
from random_texts import END, graph_size, made, text_case, text_cases, with_gradient
from torch import Tensor

from ctdbench import prefix_ops
from ctdbench.method import PairTables, Rows, probe, probe_gradient

Masses = dict[int | None, float]


def slow_row(case: Case, r: int, drop: bool = True) -> tuple[Masses, set[int]] | None:
    """The teacher's masses by student token (None: the residual class) and the tokens that it can
    reach, at student row r; None for a row that is left out."""
    words, taught = case.pair.student_vocabulary, case.pair.teacher_vocabulary
    token = words[int(case.student.token[r])]
    if int(case.student.chunk[r]) < 0 or (drop and token and not token.strip(b" \t")):
        return None
    end = int(case.student.byte_end[r])
    found = governing(case, int(case.student.chunk[r]), end - len(token))
    if found is None:
        return None
    row, k = found
    word = int(case.teacher.token[row])
    chances = probabilities(case.teacher, row)
    fitting = [v for v, w in enumerate(taught) if k == 0 or (w and w.startswith(taught[word][:k]))]
    whole = sum(chances[v] for v in fitting)
    masses: Masses = {}
    for v in fitting:
        cell = cell_of(case.pair, v, k)
        masses[cell] = masses.get(cell, 0.0) + chances[v] / whole
    reached = {cell for cell in masses if cell is not None}
    if end > int(case.teacher.byte_end[row]):
        own, came = chances[word] / whole, row
        while end > int(case.teacher.byte_end[came + 1]):
            came += 1
            own *= probabilities(case.teacher, came)[int(case.teacher.token[came])]
        rest = token[len(token) - (end - int(case.teacher.byte_end[came])) :]
        later = probabilities(case.teacher, came + 1)
        own *= sum(later[v] for v, w in enumerate(taught) if w.startswith(rest))
        masses[cell_of(case.pair, word, k)] -= own
        reached.add(int(case.student.token[r]))
        masses[int(case.student.token[r])] = masses.get(int(case.student.token[r]), 0.0) + own
    return masses, reached


def governing(case: Case, chunk: int, begin: int) -> tuple[int, int] | None:
    """The teacher row whose token a student token starts in, and how many bytes come before."""
    for row in range(len(case.teacher.token) - 1, -1, -1):
        length = len(case.pair.teacher_vocabulary[int(case.teacher.token[row])])
        start = int(case.teacher.byte_end[row]) - length
        inside = begin == start if length == 0 else start <= begin < start + length
        if int(case.teacher.chunk[row]) == chunk and inside:
            return row, begin - start
    return None


def probabilities(rows: Rows, row: int) -> list[float]:
    chances: list[float] = rows.scores()[row].double().softmax(-1).tolist()
    return chances


def cell_of(pair: PairTables, word: int, k: int) -> int | None:
    """phi of a teacher token's bytes after k of them."""
    rest = pair.teacher_vocabulary[word][k:]
    if not pair.teacher_vocabulary[word]:
        return next((s for s, t in pair.special_pairs if t == word), None)
    fitting = [u for u, own in enumerate(pair.student_vocabulary) if own and rest.startswith(own)]
    return max(fitting, key=lambda u: (len(pair.student_vocabulary[u]), -u), default=None)


def slow_bpm(case: Case, beta: float | None, drop: bool) -> tuple[float, int]:
    """Mean divergence and number of rows."""
    losses = []
    for r in range(len(case.student.token)):
        found = slow_row(case, r, drop)
        if found is None:
            continue
        masses, reached = found
        chances = probabilities(case.student, r)
        others = sum(chance for u, chance in enumerate(chances) if u not in reached)
        cells = [(masses.get(u, 0.0), chances[u]) for u in reached]
        losses.append(slow_divergence([*cells, (masses.get(None, 0.0), others)], beta))
    return sum(losses) / max(len(losses), 1), len(losses)


def slow_divergence(cells: list[tuple[float, float]], beta: float | None) -> float:
    def term(a: float, b: float) -> float:
        return a * math.log(a / b) if a > 0 else 0.0

    if beta is None:
        return sum(term(t, p) for t, p in cells)
    mixed = [(t, p, beta * t + (1 - beta) * p) for t, p in cells]
    return sum(beta * term(t, m) + (1 - beta) * term(p, m) for t, p, m in mixed)


@settings(max_examples=40, deadline=None)
@given(text_cases(), st.sampled_from([None, 0.5, 0.2]), st.booleans())
def test_bpm_is_its_definition(case: Case, beta: float | None, drop: bool) -> None:
    options: dict[str, Any] = {"drop_whitespace": drop}
    if beta is not None:
        options |= {"divergence": "jsd", "beta": beta}
    method = made("bpm", **options)
    found = probe(method, case.student, case.teacher, case.pair)
    expected, rows = slow_bpm(case, beta, drop)
    assert found["bpm"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert int(method.terms(case.block, {})["bpm"].count) == rows
    assert found["loss"] == pytest.approx(found["bpm"])


# --- the teacher's masses -------------------------------------------------------------------------


def masses_of(case: Case) -> tuple[prefix_ops.Starts, Tensor]:
    starts = prefix_ops.token_starts(case.block, drop_whitespace=False)
    return starts, prefix_ops.teacher_masses(case.block, starts)[0]


@settings(max_examples=20, deadline=None)
@given(text_cases())
def test_masses_sum_to_one_and_keep_the_next_byte(case: Case) -> None:
    """However the teacher's mass is moved between student tokens, it stays with their first byte:
    the student can spell every byte, so the sums over a first byte are the teacher's own."""
    starts, masses = masses_of(case)
    torch.testing.assert_close(masses.sum(1), torch.ones(len(masses)), rtol=1e-5, atol=1e-6)
    assert (masses >= 0).all()
    own, taught = case.pair.student_vocabulary, case.pair.teacher_vocabulary
    for row, first, emitted in zip(masses, starts.first, starts.emitted, strict=True):
        teacher_row, k = int(starts.rows[first]), int(emitted)
        chances = probabilities(case.teacher, teacher_row)
        prefix = taught[int(case.teacher.token[teacher_row])][:k]
        whole = sum(c for c, w in zip(chances, taught, strict=True) if w.startswith(prefix))
        found, expected = Counter(), Counter()
        for word, mass in zip(own, row[:-1].tolist(), strict=True):
            found[word[:1]] += mass
        for word, chance in zip(taught, chances, strict=True):
            if word.startswith(prefix) and len(word) > k:
                expected[word[k : k + 1]] += chance / whole
        for byte, mass in expected.items():
            assert found[byte] == pytest.approx(mass, rel=1e-4, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999))
def test_the_chain_product_is_a_lower_bound_of_the_enumeration(seed: int) -> None:
    """A teacher whose rows are all alike can be enumerated: all ways to spell a token's bytes, the
    last token of a way perhaps longer. The own cell holds the way that came, and where there is no
    other, all there is."""
    case = text_case(seed, [9, 9])
    logits = case.teacher.scores()[:1].expand(len(case.teacher.token), -1)
    case = replace(case, teacher=replace(case.teacher, logits=logits))
    starts, masses = masses_of(case)
    chances = probabilities(case.teacher, 0)
    for p in torch.nonzero((starts.last > starts.first) & (starts.emitted == 0))[:, 0].tolist():
        token = int(case.student.token[starts.student[p]])
        exact, ways = enumerated(case.pair, chances, case.pair.student_vocabulary[token])
        assert float(masses[p, token]) <= exact * (1 + 1e-4)
        if ways == 1:
            assert float(masses[p, token]) == pytest.approx(exact, rel=1e-4)


def enumerated(pair: PairTables, chances: list[float], text: bytes) -> tuple[float, int]:
    """The probability that the teacher's bytes start with `text`, and in how many ways."""
    words = [(w, c) for w, c in zip(pair.teacher_vocabulary, chances, strict=True) if w]

    @cache
    def spelled(rest: bytes) -> tuple[float, int]:
        ending = [c for w, c in words if w.startswith(rest)]
        total, ways = sum(ending), int(bool(ending))
        for word, chance in words:
            if len(word) < len(rest) and rest.startswith(word):
                later = spelled(rest[len(word) :])
                total, ways = total + chance * later[0], ways + later[1]
        return total, ways

    return spelled(text)


def test_bpm_by_hand() -> None:
    """Text "abc": the student spells ab|c, the teacher a|bc."""
    student = [b"", b"a", b"b", b"ab", b"c"]
    teacher = [b"", b"a", b"bc", b"abd", b"b", b"cab"]
    own = rows_of([3, 4, 0], [2, 1, 0], [0, 0, 1], len(student))
    taught = rows_of([1, 2, 0], [1, 2, 0], [0, 0, 1], len(teacher))
    pair = PairTables.build(student, teacher, [(0, 0)], [0], [0])
    case = Case(own, taught, pair, [])
    p, q = (taught.scores()[k].double().softmax(-1).tolist() for k in (0, 1))
    chain = p[1] * (q[2] + q[4])  # "a", then what starts with "b"
    expected = [
        [p[0], p[1] - chain, p[2] + p[4], p[3] + chain, p[5], 0],
        # inside "bc" after "b", where "b" itself is in the residual class
        [0, 0, 0, 0, q[2] / (q[2] + q[4]), q[4] / (q[2] + q[4])],
    ]
    masses = masses_of(case)[1]
    found = masses[:2].double()
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)
    ends = taught.scores()[2].softmax(-1)
    assert float(masses[2, 0]) == pytest.approx(float(ends[0]))  # stop mass to the stop token


def rows_of(tokens: list[int], widths: list[int], chunk: list[int], columns: int) -> Rows:
    end = torch.tensor(widths).cumsum(0)
    generator = torch.Generator().manual_seed(columns)
    return Rows(
        logits=torch.randn(len(tokens), columns, generator=generator),
        token=torch.tensor(tokens),
        chunk=torch.tensor(chunk),
        supervised=torch.ones(len(tokens)).bool(),
        document=torch.zeros(len(tokens)).long(),
        byte_start=end - torch.tensor(widths),
        byte_end=end,
    )


# --- invariants and edges -------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(text_cases(), st.sampled_from(["forward_kl", "jsd"]))
def test_bpm_invariants(case: Case, divergence: str) -> None:
    check_invariants(made("bpm", divergence=divergence), case)


@settings(max_examples=15, deadline=None)
@given(text_cases(one_tokenizer=True), st.sampled_from(["forward_kl", "jsd"]))
def test_a_student_that_is_the_teacher_has_no_loss(case: Case, divergence: str) -> None:
    logits = case.student.scores().clone()
    words = list(case.pair.student_vocabulary)
    twice = [v for v, word in enumerate(words) if word and words.index(word) < v]
    logits[:, twice] = -100.0  # ids with equal bytes are one token to `bpm`
    twin, own = (replace(rows, logits=logits) for rows in (case.teacher, case.student))
    method = made("bpm", divergence=divergence)
    values, gradient = probe_gradient(method, own, twin, case.pair)
    assert values["bpm"] == pytest.approx(0, abs=1e-5)
    assert np.abs(gradient).max() < 1e-5


def test_rows_of_spaces_are_dropped() -> None:
    words = [b"", b"a", b" ", b"\t ", b" a", b"\n"]
    own = rows_of([1, 2, 3, 4, 5, 0], [1, 1, 2, 2, 1, 0], [0, 1, 2, 3, 4, 5], len(words))
    pair = PairTables.build(words, words, [(END, END)], [END], [END])
    block = Case(own, own, pair, []).block
    assert prefix_ops.token_starts(block, drop_whitespace=True).student.tolist() == [0, 3, 4, 5]
    assert prefix_ops.token_starts(block, drop_whitespace=False).student.tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_extreme_logits_are_finite(divergence: str) -> None:
    """Chances that are 0 in float32 on either side, and a student without a residual class."""
    case = text_case(3, [9, 9, 9])
    method = made("bpm", divergence=divergence)
    for scale in (300.0, -300.0):
        own = replace(case.student, logits=case.student.scores() * scale)
        taught = replace(case.teacher, logits=case.teacher.scores().flip(1) * scale)
        values, gradient = probe_gradient(method, own, taught, case.pair)
        assert math.isfinite(values["bpm"])
        assert np.isfinite(gradient).all()
    words = [b"", b"a"]
    rows = rows_of([1, 1, 0], [1, 1, 0], [0, 1, 2], 2)
    other = replace(rows, logits=torch.randn(3, 3))
    pair = PairTables.build(words, [*words, b""], [(0, 0)])  # a special that only the teacher has
    values, gradient = probe_gradient(method, rows, other, pair)
    assert 0 < values["bpm"] < 30
    assert np.isfinite(gradient).all()


def test_nothing_loops_over_rows_or_documents() -> None:
    sizes = []
    for count in (2, 20):
        block, _ = with_gradient(text_case(1, [6] * count))
        sizes.append(graph_size(made("bpm").terms(block, {})["bpm"].total))
    assert sizes[0] == sizes[1]
