"""`mined` against DSKD's numbers, against its formula row by row, and what must change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden_rows import check_gradient, closed_form, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rows import Case, picked, reversed_documents
from random_texts import graph_size, made, text_case, text_cases
from test_edit_distance import slow_distance, slow_time_warp
from torch import Tensor

from ctdbench.method import Block, Method, PairTables, Rows, bare, probe, probe_gradient

GOLDEN = golden("mined")
LOGITS = ("lowest", "largest", "nearest")
# every token has one nearest partner, and no two the same: no choice by id
PLAIN = [b"", b"a", b"bc", b" def", b"ghij", b"klmno", b"\xc3\xa9\xc3\xa9"]
OTHER = [b"", b"a", b"bcx", b" def", b"ghi", b"klmnop", b"\xc3\xa9\xc3"]


def mined(**options: Any) -> Method:
    return made("mined", **options)


def block_of(student: Rows, teacher: Rows, pair: PairTables, pairs: Tensor) -> Block:
    return Block(student, teacher, 0, torch.zeros(1).long(), pairs, None, pair)


def pairs_of(method: Method, case: Case) -> Tensor:
    return method.pairs(bare(case.student), bare(case.teacher), case.pair)


# --- the authors' numbers -------------------------------------------------------------------------


def golden_case(inputs: dict[str, Any]) -> Case:
    rows, words = [], []
    for side in ("student", "teacher"):
        labels = torch.tensor(inputs[f"{side}_labels"])
        documents, length = labels.shape
        place = torch.arange(length).repeat(documents)
        logits = closed_form(inputs[f"{side}_logits"])
        rows.append(
            Rows(
                logits=logits.flatten(0, 1),
                token=labels.clamp(min=-1).flatten(),
                chunk=torch.full((documents * length,), -1),
                supervised=(labels >= 0).flatten(),
                document=torch.arange(documents).repeat_interleave(length),
                byte_start=place,
                byte_end=place + 1,
                input=torch.tensor(inputs[f"{side}_input_ids"]).flatten(),
            )
        )
        marker = inputs[f"{side}_space_marker"]
        vocabulary = inputs[f"{side}_vocab"]
        words.append([b"" if w == "<e>" else w.replace(marker, " ").encode() for w in vocabulary])
    return Case(rows[0], rows[1], PairTables.build(*words, special_pairs=[(0, 0)]), [])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_mined_reproduces_the_authors_numbers(case: dict[str, Any]) -> None:
    inputs, expected, rate = GOLDEN["inputs"][case["input"]], case["expected"], case["options"]
    rows = golden_case(inputs)
    assert rows.pair.edit_map.tolist() == inputs["teacher_to_student_id"]
    weights = {"ce_weight": 1 - rate["kd_rate"], "kd_weight": rate["kd_rate"]}
    method = mined(temperature=rate["kd_temperature"], **weights)
    values, gradient = probe_gradient(method, rows.student, rows.teacher, rows.pair)
    count = rate["batch_denom"]
    assert values["loss"] == pytest.approx(expected["total"], rel=1e-5)
    assert values["kl"] == pytest.approx(expected["kd"] / count, rel=1e-5)
    assert values["ce"] == pytest.approx(expected["ce"] / count, rel=1e-5)
    check_gradient(gradient, expected["grad_total"], inputs["student_logits"]["shape"])
    found = np.where(rows.student.supervised, "one_hot", "none").astype(object)
    found[pairs_of(method, rows)[:, 0]] = "transfer"
    assert found.tolist() == [target for row in expected["row_target"] for target in row]


# --- the formula ----------------------------------------------------------------------------------


def scored_rows(rows: Rows, document: int) -> list[int]:
    scored = rows.supervised & (rows.token >= 0) & (rows.document == document)
    found: list[int] = torch.nonzero(scored)[:, 0].tolist()
    return found


def slow_symbols(words: Sequence[bytes], token: int, role: object) -> list[object]:
    """A token as what the edit distance compares: bytes, or a symbol for a special."""
    if token >= 0 and words[token]:
        return list(words[token].replace(b" ", b""))
    return ["start" if token < 0 else role]


def slow_map(words: Sequence[bytes], others: Sequence[bytes], roles: dict[int, int]) -> list[int]:
    """The lowest of the nearest others; -1 for specials without a role and for repeated tokens."""
    found = []
    for token, word in enumerate(words):
        near = [(slow_distance(word, other), k) for k, other in enumerate(others) if other]
        repeated = word in words[:token]
        found.append(roles.get(token, -1) if not word else -1 if repeated else min(near)[1])
    return found


def slow_maps(pair: PairTables) -> tuple[list[int], list[int]]:
    own, taught = pair.student_vocabulary, pair.teacher_vocabulary
    roles = {t: s for s, t in pair.special_pairs}
    return slow_map(taught, own, roles), slow_map(own, taught, dict(pair.special_pairs))


def slow_pairs(case: Case, logit: str) -> list[tuple[int, int]]:
    own, taught = case.pair.student_vocabulary, case.pair.teacher_vocabulary
    to_student, to_teacher = slow_maps(case.pair)
    partners = {s: ("role", s) for s, _ in case.pair.special_pairs}
    partners_taught = {t: ("role", s) for s, t in case.pair.special_pairs}
    student, teacher = case.student.inputs().tolist(), case.teacher.inputs().tolist()
    found: list[tuple[int, int]] = []
    for document in case.student.document.unique().tolist():
        rows, others = scored_rows(case.student, document), scored_rows(case.teacher, document)
        if not rows or not others:
            continue
        spelled = [
            slow_symbols(own, student[r], partners.get(student[r], ("own", student[r])))
            for r in rows
        ]
        targets = [
            slow_symbols(taught, teacher[r], partners_taught.get(teacher[r], ("their", teacher[r])))
            for r in others
        ]
        path = slow_time_warp([[slow_distance(a, b) for b in spelled] for a in targets])
        for place, row in enumerate(rows):
            aligned = [others[i] for i, j in path if j == place]
            read, heard = student[row], teacher[aligned[0]]
            if read < 0 or heard < 0:
                same = read == heard
            else:
                same = (
                    to_teacher[read] == heard if logit == "nearest" else to_student[heard] == read
                )
            if len(aligned) == 1 and same:
                found.append((row, aligned[0]))
    return found


def slow_target(pair: PairTables, scores: list[float], logit: str) -> list[float]:
    to_student, to_teacher = slow_maps(pair)
    target = []
    for v in range(len(pair.student_vocabulary)):
        mapped = [w for w, own in enumerate(to_student) if own == v]
        if logit == "nearest":
            mapped = [to_teacher[v]] if to_teacher[v] >= 0 else []
        values = [scores[w] for w in mapped] or [-1e5]
        target.append(max(values) if logit == "largest" else values[0])
    return target


def slow_mined(case: Case, logits: Tensor, logit: str, temperature: float) -> Tensor:
    """The mean over scored rows, in float64, with whole target vectors."""
    pairs = dict(slow_pairs(case, logit))
    losses = []
    for document in case.student.document.unique().tolist():
        for row in scored_rows(case.student, document):
            if row in pairs:
                scores = case.teacher.scores()[pairs[row]].double().tolist()
                target = torch.tensor(slow_target(case.pair, scores, logit), dtype=torch.float64)
            else:
                target = torch.full_like(logits[row], -1e5)
                target[case.student.token[row]] = 100.0
            q = (target / temperature).softmax(-1)
            p = (logits[row] / temperature).softmax(-1)
            losses.append(sum(a * (a.log() - b.log()) for a, b in zip(q, p, strict=True) if a > 0))
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def misread(rows: Rows, seed: int) -> Rows:
    """Rows that have read anything: no token, either special, two of the words."""
    generator = torch.Generator().manual_seed(seed)
    return replace(rows, input=torch.randint(-1, 4, rows.token.shape, generator=generator))


@pytest.mark.parametrize("logit", LOGITS)
@settings(max_examples=20, deadline=None)
@given(text_cases(), st.sampled_from([1.0, 2.0, 5.0]), st.booleans())
def test_mined_is_its_definition(
    logit: str, case: Case, temperature: float, anything: bool
) -> None:
    if anything:
        case = replace(case, student=misread(case.student, 1), teacher=misread(case.teacher, 2))
    method = mined(logit=logit, temperature=temperature, kd_weight=1.0, ce_weight=0.0)
    found = sorted(map(tuple, pairs_of(method, case).tolist()))
    assert found == sorted(slow_pairs(case, logit))
    leaf = case.student.scores().double().requires_grad_()
    expected = slow_mined(case, leaf, logit, temperature)
    values, gradient = probe_gradient(method, case.student, case.teacher, case.pair)
    assert values["kl"] == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    assert values["loss"] == pytest.approx(values["kl"])
    (taken,) = torch.autograd.grad(expected, leaf)
    np.testing.assert_allclose(gradient, taken.numpy(), rtol=1e-4, atol=1e-6)


def simple_rows(words: Sequence[bytes], tokens: list[list[int]], seed: int, first: int = 0) -> Rows:
    """Documents of these tokens; the first `first` of each are a prompt."""
    token = torch.tensor([v for document in tokens for v in document], dtype=torch.long)
    place = torch.tensor([k for document in tokens for k in range(len(document))], dtype=torch.long)
    document = torch.repeat_interleave(torch.tensor([len(ids) for ids in tokens]))
    logits = torch.randn(len(token), len(words), generator=torch.Generator().manual_seed(seed))
    nothing = torch.full_like(token, -1)
    return Rows(2 * logits, token, nothing, place >= first, document, place, place + 1)


def plain_case(seed: int = 0) -> Case:
    """Tokens that map one to one; here and there a token more on a side."""
    generator = np.random.default_rng(seed)
    own = [generator.integers(0, len(PLAIN), size).tolist() for size in (8, 1, 5)]
    taught = [[*ids[:3], *ids[2:]] for ids in own]
    pair = PairTables.build(PLAIN, OTHER, [(0, 0)])
    sides = (simple_rows(PLAIN, own, seed, 1), simple_rows(OTHER, taught, seed + 1, 1))
    return Case(*sides, pair, [[] for _ in own])


def test_a_space_in_front_costs_nothing() -> None:
    """Rows read " now" and "now"; neither is the other's map if both sides have both."""
    own, taught = [b" now", b"now", b"x"], [b"now", b"x"]
    student, teacher = simple_rows(own, [[0, 2, 2]], 0), simple_rows(taught, [[0, 1, 1]], 0)
    pair = PairTables.build(own, taught)
    found = mined().pairs(student, teacher, pair).tolist()
    assert found == [[0, 0], [2, 2]]  # row 1 read " now", which "now" does not map to
    found = mined(logit="nearest").pairs(student, teacher, pair).tolist()
    assert found == [[0, 0], [1, 1], [2, 2]]


def test_the_end_takes_the_ends_logit_where_it_pads_as_well() -> None:
    """The student's end (id 0) pads; the teacher has a pad of its own, of a lower id (0) than its
    end (1). So in SmolLM2 and Gemma."""
    own, taught = [b"", b"a"], [b"", b"", b"a"]
    pair = PairTables.build(own, taught, [(0, 1), (0, 0)])
    logits = torch.tensor([[7.0, 1.0, 2.0]])
    teacher = replace(simple_rows(taught, [[2]], 0), logits=logits)
    block = block_of(simple_rows(own, [[1]], 0), teacher, pair, torch.tensor([[0, 0]]))
    for logit in ("lowest", "largest", "nearest"):
        target = mined(logit=logit)._mapping(block)(torch.tensor([0]))
        assert target.tolist() == [[1.0, 2.0]], logit


def test_only_specials_of_the_same_role_are_alike() -> None:
    """Both sides read: a special, then "a". Of one role the special's rows are paired."""
    words = [b"", b"", b"a"]
    rows = simple_rows(words, [[0, 2, 2]], 0)
    other = simple_rows(words, [[1, 2, 2]], 0)
    for roles, expected in (([(0, 1)], [[0, 0], [1, 1], [2, 2]]), ([(0, 0)], [[0, 0], [2, 2]])):
        pair = PairTables.build(words, words, roles)
        assert mined().pairs(rows, other, pair).tolist() == expected


def test_the_largest_logit_may_be_that_of_a_token_with_other_bytes() -> None:
    """By lowest id the twin " team" has to stand back behind " teac"."""
    own, taught = [b" team", b"x"], [b" teac", b" team", b"x"]
    rows = simple_rows(own, [[1, 1]], 0)
    teacher = replace(
        simple_rows(taught, [[2, 2]], 0), logits=torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    )
    pair = PairTables.build(own, taught)
    block = block_of(rows, teacher, pair, torch.tensor([[0, 0], [1, 1]]))
    expected = {"lowest": [1.0, 5.0], "largest": [3.0, 5.0], "nearest": [3.0, 3.0]}
    for logit, values in expected.items():
        target = torch.tensor([[value, 2.0] for value in values]) / 2
        q, p = target.softmax(-1), (rows.scores() / 2).softmax(-1)
        found = mined(logit=logit).terms(block, {})["kl"]
        assert float(found.total) == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-5)


# --- invariants -----------------------------------------------------------------------------------


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("logit", LOGITS)
def test_the_order_of_documents_changes_nothing(logit: str) -> None:
    case, method = plain_case(), mined(logit=logit)
    moved = reversed_documents(case)
    expected = probe(method, case.student, case.teacher, case.pair)
    same(probe(method, moved.student, moved.teacher, moved.pair), expected)


@pytest.mark.parametrize("logit", LOGITS)
def test_padding_changes_nothing(logit: str) -> None:
    case, method = plain_case(), mined(logit=logit)
    expected = probe(method, case.student, case.teacher, case.pair)
    for before, after in ((0, 3), (2, 0)):
        sides = [padded(rows, before, after) for rows in (case.student, case.teacher)]
        same(probe(method, *sides, case.pair), expected)


def padded(rows: Rows, before: int, after: int) -> Rows:
    """Rows that are no one's around every document, with large logits."""
    index, fill = [], []
    for document in rows.document.unique().tolist():
        inside = torch.nonzero(rows.document == document)[:, 0].tolist()
        index += [*[inside[0]] * before, *inside, *[inside[-1]] * after]
        fill += [*[True] * before, *[False] * len(inside), *[True] * after]
    extra = torch.tensor(fill)
    wider = picked(rows, torch.tensor(index))
    return replace(
        wider,
        logits=torch.where(extra[:, None], 50.0, wider.scores()),
        token=torch.where(extra, -1, wider.token),
        supervised=wider.supervised & ~extra,
    )


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_other_ids_change_nothing_where_no_map_is_a_tie(side: str, logit: str) -> None:
    case, method = plain_case(), mined(logit=logit)
    words = {"student": list(PLAIN), "teacher": list(OTHER)}
    order = np.random.default_rng(2).permutation(len(PLAIN))
    place = np.argsort(order)
    rows: Rows = getattr(case, side)
    moved = replace(rows, logits=rows.scores()[:, order], token=torch.from_numpy(place)[rows.token])
    words[side] = [words[side][old] for old in order]
    roles = (place[0], 0) if side == "student" else (0, place[0])
    pair = PairTables.build(words["student"], words["teacher"], [roles])
    sides = {"student": case.student, "teacher": case.teacher, side: moved}
    expected = probe(method, case.student, case.teacher, case.pair)
    same(probe(method, sides["student"], sides["teacher"], pair), expected)


@pytest.mark.parametrize("logit", LOGITS)
@settings(max_examples=10, deadline=None)
@given(text_cases())
def test_blocks_add_up_and_counts_need_no_logits(logit: str, case: Case) -> None:
    """As the harness cuts them: pairs, then the other supervised rows without a teacher's row."""
    method = mined(logit=logit)
    pairs = pairs_of(method, case)
    whole = method.terms(block_of(case.student, case.teacher, case.pair, pairs), {})["kl"]
    loose = case.student.supervised.index_fill(0, pairs[:, 0], False).nonzero()[:, 0]
    for rows in (1, 2, 5):
        blocks = []
        for part in pairs.split(rows):
            local = torch.arange(len(part))[:, None].expand(-1, 2)
            sides = (picked(case.student, part[:, 0]), picked(case.teacher, part[:, 1]))
            blocks.append(block_of(*sides, case.pair, local))
        nothing = picked(case.teacher, loose[:0])
        for part in loose.split(rows):
            alone = picked(case.student, part)
            blocks.append(block_of(alone, nothing, case.pair, loose.new_empty(0, 2)))
        terms = [method.terms(block, {})["kl"] for block in blocks]
        total = sum(float(term.total) for term in terms)
        assert total == pytest.approx(float(whole.total), rel=1e-5, abs=1e-5)
        assert sum(int(term.count) for term in terms) == int(whole.count)
        for block, term in zip(blocks, terms, strict=True):
            student, teacher = bare(block.student), bare(block.taught())
            counts = method.counts(replace(block, student=student, teacher=teacher))
            assert counts is not None
            assert int(counts["kl"]) == int(term.count)


@pytest.mark.parametrize("logit", LOGITS)
def test_a_student_that_is_the_teacher_has_no_loss_but_its_temperature(logit: str) -> None:
    tokens = [[1, 2, 2, 2, 0, 3, 4, 4], [5], [6, 6, 0]]
    rows = simple_rows(PLAIN, tokens, 0)
    pair = PairTables.build(PLAIN, PLAIN, [(0, 0)])
    method = mined(logit=logit)
    assert method.pairs(rows, rows, pair).tolist() == [[k, k] for k in range(len(rows.token))]
    values, gradient = probe_gradient(method, rows, rows, pair, ce_weight=0.0)
    assert values["kl"] == pytest.approx(0, abs=1e-6)
    values, gradient = probe_gradient(mined(logit=logit, ce_weight=0.0), rows, rows, pair)
    assert np.abs(gradient).max() < 1e-6


@pytest.mark.parametrize("logit", LOGITS)
def test_targets_are_not_the_models_own_logits(logit: str) -> None:
    """A public implementation writes targets into the student's logits."""
    case, method = plain_case(), mined(logit=logit)
    before = [rows.scores().clone() for rows in (case.student, case.teacher)]
    leaf = case.student.scores().requires_grad_()
    teacher = replace(case.teacher, logits=case.teacher.scores().requires_grad_())
    block = block_of(case.student, teacher, case.pair, pairs_of(method, case))
    method.terms(block, {})["kl"].total.backward()
    torch.testing.assert_close(leaf.detach(), before[0], rtol=0, atol=0)
    torch.testing.assert_close(teacher.scores().detach(), before[1], rtol=0, atol=0)
    assert leaf.grad is not None
    assert teacher.scores().grad is None


@pytest.mark.parametrize("logit", LOGITS)
def test_empty_and_short_documents_are_finite(logit: str) -> None:
    method = mined(logit=logit)
    pair = PairTables.build(PLAIN, OTHER, [(0, 0)])
    shapes: list[tuple[list[list[int]], list[list[int]]]] = [
        ([[]], [[]]),
        ([[1]], [[]]),
        ([[]], [[1]]),
        ([[1]], [[1]]),
        ([[1] * 700], [[2] * 900]),
        ([[], [0], [1, 2]], [[1], [], [2]]),
    ]
    for own, taught in shapes:
        sides = simple_rows(PLAIN, own, 0), simple_rows(OTHER, taught, 1)
        values, gradient = probe_gradient(method, *sides, pair)
        assert np.isfinite(list(values.values())).all()
        assert np.isfinite(gradient).all()
        coarse = [replace(rows, logits=rows.scores().bfloat16()) for rows in sides]
        assert np.isfinite(list(probe(method, *coarse, pair).values())).all()


@pytest.mark.parametrize("scale", [300.0, -300.0])
def test_extreme_logits_are_finite(scale: float) -> None:
    case = text_case(3, [9, 9, 9])
    student = replace(case.student, logits=case.student.scores() * scale)
    for logit in LOGITS:
        values, gradient = probe_gradient(mined(logit=logit), student, case.teacher, case.pair)
        assert np.isfinite(values["kl"])
        assert np.isfinite(gradient).all()


def test_nothing_loops_over_rows_or_documents() -> None:
    sizes = []
    for count in (2, 20):
        case = text_case(1, [6] * count)
        rows = replace(case.student, logits=case.student.scores().clone().requires_grad_())
        pairs = pairs_of(mined(), case)
        assert len(pairs)
        block = block_of(rows, case.teacher, case.pair, pairs)
        sizes.append(graph_size(mined().terms(block, {})["kl"].total))
    assert sizes[0] == sizes[1]


def test_a_block_needs_pairs() -> None:
    case = plain_case()
    block = replace(block_of(case.student, case.teacher, case.pair, torch.empty(0, 2)), pairs=None)
    with pytest.raises(TypeError, match="no pairs"):
        mined().terms(block, {})
