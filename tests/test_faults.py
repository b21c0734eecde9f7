"""The faults of public implementations, one section each, in the order of their list.

A section has the fault as a tiny function and shows that what is here gives another result. What
must hold of any text, method or block size is tested elsewhere; every section says where.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fault_tools import byte_cuts, bytes_per_row, checked, equal_places, example_of, token_texts
from harness_setup import batch_of, examples, float64, float64_side, gradients, make_step
from random_rows import Case, case_of
from random_texts import made, text_case
from test_alm import long_document, slow_alm
from test_examples import chunk_bytes, plain, question, side
from test_p_kl import numeral_tables, numerals
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from wheel_tokenizers import wheel_token_bytes, wheel_tokenizer

from ctdbench.distill.batches import collate
from ctdbench.distill.examples import build_example, build_examples, render
from ctdbench.method import Rows, probe, probe_gradient
from ctdbench.text.alignment import align
from ctdbench.text.token_bytes import NotLossless, TokenBytes

Names = tuple[str, str]
Cuts = set[tuple[int, int]]
LLAMA_QWEN, LLAMA_MISTRAL = ("llama3", "qwen"), ("llama3", "mistral")

# --- 1. Character offsets: several tokens inside one character have one span ----------------------
# Any text: test_token_bytes.py::test_chunks_of_any_text.


def pairs_by_character(names: Names, text: str) -> Cuts:
    """The fault: tokens are paired that have the same span of characters."""
    options = {"return_offsets_mapping": True, "add_special_tokens": False}
    return equal_places(*(wheel_tokenizer(n)(text, **options)["offset_mapping"] for n in names))


def test_1_character_offsets_cannot_tell_the_tokens_of_one_character_apart() -> None:
    """Llama 3 has four tokens in the hieroglyph, Qwen three, of which the last two are equal."""
    first, second = token_texts(LLAMA_QWEN, "x𓀀y")
    assert first == [b"x", b"\xf0", b"\x93", b"\x80", b"\x80", b"y"]
    assert second == [b"x", b"\xf0\x93", b"\x80", b"\x80", b"y"]
    assert byte_cuts(LLAMA_QWEN, "x𓀀y") == {(1, 1), (3, 2), (4, 3), (5, 4), (6, 5)}
    inside = {(i, j) for i in (2, 3, 4, 5) for j in (2, 3, 4)}
    assert pairs_by_character(LLAMA_QWEN, "x𓀀y") == {(1, 1), *inside, (6, 5)}
    example_of(LLAMA_QWEN, "x𓀀龘y")


# --- 2. The row after a token, times the token's own probability; the first token lost ------------
# By formula: every method's `slow_` restatement; test_gold.py::test_gold_reads_the_row_before_..

MERGING = ("gold", "uld", "simct", "p-kl", "h-kl")  # rows into chunks
OPTIONS: dict[str, dict[str, Any]] = {"uld": {"alignment": "chunks"}}


def observed(rows: Rows, chunk: list[int]) -> Tensor:
    """The fault: every row of a chunk is the one after its token."""
    after = rows.scores().softmax(-1)[1:]
    came = [after[row, rows.token[row]] for row in chunk[:-1]]
    return after[chunk[-1]] * torch.tensor([1.0, *came]).prod()


@pytest.mark.parametrize("name", MERGING)
def test_2_a_chunk_reads_the_rows_that_predict_its_tokens(name: str) -> None:
    """Two models that differ in the very first prediction alone: the fault sees no difference."""
    case = case_of([[(1, 1), (2, 2)], [(1, 1)]], one_tokenizer=True)
    first = case.chunks[0][0][0][0]
    logits = case.student.scores().clone()
    logits[first] = 3 * logits[first].flip(0)
    teacher = replace(case.student, logits=logits)
    sides = (case.student, teacher, case.pair)
    values, gradient = probe_gradient(name, *sides, ce_weight=0.0, **OPTIONS.get(name, {}))
    assert abs(values["loss"]) > 1e-3
    assert np.abs(gradient[first]).max() > 1e-4
    assert not gradient[(case.student.chunk < 0).numpy()].any()  # rows before the first chunks
    for own, _ in case.chunks[0]:
        assert torch.equal(observed(case.student, own), observed(teacher, own))


def test_2_the_first_supervised_token_is_not_lost() -> None:
    """Its row is at the prompt's last token; the fault shifts within the answer."""
    found = build_example(question("Say a number", " Seven is one."), *map(side, LLAMA_QWEN))
    rows = batch_of([found]).student
    answer = rows.token[rows.supervised].tolist()
    words = wheel_token_bytes("llama3").vocabulary
    assert b"".join(words[token] for token in answer) == b"\n Seven is one."
    faulty = found.student.sequence.ids[found.student.supervised][1:]
    assert answer[1:] == faulty.tolist()
    assert words[rows.ids.flatten()[rows.position[rows.supervised][0]]] == b" number"


# --- 3. A backward that allocates all of [rows x vocabulary] for every chunk ----------------------
# In the step, by blocks: test_step.py::test_no_tensor_of_tokens_by_vocabulary_exists (`bld` too,
# which reads no logits). No method loops over chunks: `check_graph`, `graph_size` in their tests.


def chunk_by_chunk(case: Case) -> None:
    """The fault: every row that is picked by itself has a gradient as large as all rows."""
    leaf = case.student.scores().clone().requires_grad_()
    rows = [leaf[own[-1]].softmax(-1).square().sum() for part in case.chunks for own, _ in part]
    torch.autograd.grad(torch.stack(rows).sum(), leaf)


@pytest.mark.parametrize("name", [*MERGING, "kd", "strict", "alm", "bpm", "escd"])
def test_3_memory_of_a_backward_is_linear_in_the_rows(name: str) -> None:
    """Eight times the rows: as many bytes a row, where the fault has several times as many."""

    def compute(case: Case) -> None:
        teacher = replace(case.teacher, token=case.student.token) if name == "kd" else case.teacher
        probe_gradient(made(name, **OPTIONS.get(name, {})), case.student, teacher, case.pair)

    few, many = (bytes_per_row(compute, count, one_tokenizer=name == "kd") for count in (4, 32))
    assert many < 1.25 * few
    few, many = (bytes_per_row(chunk_by_chunk, count) for count in (4, 32))
    assert many > 3 * few


# --- 4. A newline in the text taken for one of the chat template ----------------------------------
# Real text: test_examples.py::test_real_text_is_covered_whole.


def up_to_a_newline(names: Names, text: str) -> bytes:
    """The fault: a side's tokens end at the first one that is nothing but newlines."""
    sides = token_texts(names, text)
    stops = [next(i for i, word in enumerate(own) if word.strip(b"\n") == b"") for own in sides]
    cuts = {i for i, j in byte_cuts(names, text) if i <= stops[0] and j <= stops[1]}
    return b"".join(sides[0][: max(cuts, default=0)])


@pytest.mark.parametrize("names", [LLAMA_QWEN, LLAMA_MISTRAL, ("mistral", "qwen")], ids="-".join)
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_4_newlines_of_the_text_are_text(names: Names, template: Any) -> None:
    """Templates have newlines of their own; those of an answer are aligned, and none is lost."""
    answer = "One then\ntwo,\n\nthree\n\n\n- four.\n"
    document = question("Count:\n", answer)
    found = checked(names, build_example(document, *map(side, names), template))
    assert b"".join(chunk_bytes(found, found.student)).endswith(answer.encode())
    faulty = up_to_a_newline(names, "a" + answer)
    assert faulty == b"aOne then"


# --- 5. A tokenizer that normalises: spans of another text than the document ----------------------
# Any text: test_token_bytes.py::test_chunks_of_any_text.


def spans_of_another_text(name: str, text: str) -> list[int]:
    """The fault: ends are sums of the tokens' lengths, whatever the document has there."""
    ids = wheel_tokenizer(name)(text, add_special_tokens=False)["input_ids"]
    words = wheel_token_bytes(name).vocabulary
    return np.cumsum([len(words[index]) for index in ids]).tolist()


def test_5_decomposed_text_is_refused_not_paired_askew() -> None:
    """Qwen composes e and its accent to two bytes, Llama 3 keeps all three: the fault pairs the
    two with "é1", and "123" with "234"."""
    text = "e\u0301123456"
    with pytest.raises(NotLossless, match="a normaliser changed it"):
        wheel_token_bytes("qwen").encode(text)
    for names in (LLAMA_QWEN, LLAMA_QWEN[::-1]):
        found, skipped = build_examples([plain(text), plain("é123456")], *map(side, names))
        assert skipped == {"not spelled byte for byte by a tokenizer": 1}
        checked(names, found[0])
    faulty = align(*(spans_of_another_text(name, text) for name in LLAMA_QWEN))
    assert faulty.student_chunk.tolist() == [0, 0, 1, -1]  # e, the accent | 123 | 456
    assert faulty.teacher_chunk.tolist() == [0, 0, 1, 1, 1, -1, -1]  # é, 1 | 2, 3, 4 | 5, 6


# --- 6. Tokens matched by rules about strings -----------------------------------------------------
# Any text: test_token_bytes.py::test_chunks_of_any_text. Shared tokens: test_vocabulary.py.


def unmarked(piece: str) -> str:
    """The fault: a token is what stands behind the markers of a space, and behind underscores."""
    return piece.lstrip("Ġ▁_")


def spaced(piece: str) -> str:
    """The fault: markers become spaces, everything else is the text itself."""
    return piece.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("<0x0A>", "\n")


def string_cuts(names: Names, text: str, rule: Callable[[str], str]) -> Cuts:
    """Ends of chunks where the tokens' strings, joined, are equal (but for a dummy space)."""
    joined = []
    for name in names:
        ids = wheel_token_bytes(name).encode(text).ids.tolist()
        pieces = [rule(piece) for piece in wheel_tokenizer(name).convert_ids_to_tokens(ids)]
        pieces[0] = pieces[0].removeprefix(" ")
        joined.append(["".join(pieces[:end]) for end in range(1, len(pieces) + 1)])
    return equal_places(*joined)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x  =        1", unmarked),
        ("_x = __init__(_name)", unmarked),
        ("a\tb\t\tc", spaced),
        ("a naïve café", spaced),
        ("é𓀀é", spaced),
    ],
    ids=["space runs", "leading underscore", "tabs", "naïve", "byte fallback"],
)
def test_6_strings_do_not_say_what_tokens_spell(text: str, rule: Callable[[str], str]) -> None:
    """Byte-level BPE (Llama 3) and SentencePiece (Mistral), either one as the student."""
    assert string_cuts(LLAMA_MISTRAL, text, rule) != byte_cuts(LLAMA_MISTRAL, text)
    for names in (LLAMA_MISTRAL, LLAMA_MISTRAL[::-1]):
        found = example_of(names, text)
        assert found.chunks > 2
        assert b"".join(chunk_bytes(found, found.student)) == text.encode()
    simple = (LLAMA_MISTRAL, "a plain line")
    assert string_cuts(*simple, spaced) == byte_cuts(*simple)


# --- 7. BOS on one side, specials in text, padding, columns past the vocabulary -------------------
# More in test_examples.py (BOS, specials), test_step.py (padding), test_models.py (columns).


def test_7_a_bos_on_one_side_leaves_out_what_only_one_side_predicts() -> None:
    """Qwen has none, so nothing predicts its first token; the fault keeps that chunk."""
    text = "The fox jumps."
    found = example_of(LLAMA_QWEN, text)
    assert b"".join(chunk_bytes(found, found.student)) == b" fox jumps."
    faulty = align(*(wheel_token_bytes(name).encode(text).byte_end for name in LLAMA_QWEN))
    predicted = [faulty.student_chunk, faulty.teacher_chunk[1:]]  # a row for all but token 0
    assert [set(chunk) for chunk in predicted] == [{0, 1, 2, 3}, {1, 2, 3}]
    batch = batch_of([found])
    for rows in (batch.student, batch.teacher):  # three chunks of text and the end tokens
        assert rows.chunk[rows.chunk >= 0].tolist() == [0, 1, 2, 3]


def test_7_specials_beyond_ascii_have_no_bytes_and_their_spelling_is_text() -> None:
    """The fault reads a special's name as if it were a token's, or finds it in a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: rank for rank, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = ["<｜end▁of▁sentence｜>", "<é>"]  # DeepSeek's, and one that the alphabet can spell
    tokenizer.add_special_tokens(names)
    ids = [tokenizer.token_to_id(name) for name in names]
    found, text = TokenBytes(tokenizer), f"é {names[0]} {names[1]}"
    assert [found.vocabulary[index] for index in ids] == [b"", b""]
    encoding = found.encode(text)
    assert encoding.byte_end.tolist() == list(range(1, len(text.encode()) + 1))
    assert not set(ids) & set(encoding.ids.tolist())
    assert set(ids) <= set(tokenizer.encode(text).ids)


def test_7_padding_is_in_no_chunk() -> None:
    """Padded with the end token: the fault takes every such id for the end of a document."""
    sides = float64_side("student"), float64_side("teacher")
    found = examples(*sides, count=5)
    end = sides[0].specials.eos
    batch = collate(found, end, end)
    rows, ended = batch.student, sum(example.student.sequence.end >= 0 for example in found)
    assert int((rows.ids == end).sum()) > ended
    assert int(((rows.token == end) & (rows.chunk >= 0)).sum()) == ended
    alone = [collate([example], end, end) for example in found]
    assert len(rows.token) == sum(len(one.student.token) for one in alone)
    assert batch.document_chunks.tolist() == [int(one.document_chunks[0]) for one in alone]


@pytest.mark.parametrize("name", ["sft", "gold", "alm"])
def test_7_columns_past_the_vocabulary_have_no_mass(name: str) -> None:
    """The heads' rows that no token has, made large: the fault's softmax gives them all it has."""
    sides = {"student": float64_side("student"), "teacher": float64_side("teacher")}
    step = make_step(name, **sides)
    batch = batch_of(examples(**sides, count=3))
    before, _ = gradients(step, [batch])
    hidden = step.network(batch.student.ids, batch.student.mask).detach()
    with torch.no_grad():
        for own in sides.values():
            own.model.get_output_embeddings().weight[len(own.tokens.vocabulary) :] *= 100
        faulty = step.network.model.get_output_embeddings()(hidden).softmax(-1)
    assert faulty[:, step.network.columns :].sum(1).max() > 0.5
    assert gradients(step, [batch])[0].loss == pytest.approx(before.loss, rel=1e-6)


# --- 8. Merged chunks taken off the count twice; nothing left to divide by ------------------------
# Any document, by formula and against the authors: test_alm.py.


def twice_subtracted(chunks: int, groups: int) -> int:
    """The fault: what was merged is subtracted from a number that it is no longer in."""
    return groups - (chunks - groups)


def test_8_merged_chunks_are_counted_once() -> None:
    """The loss is the mean over what is left after merging."""
    case = text_case(11, [9, 9, 9])
    expected, groups = slow_alm(case, 0.5, "boundary", 100.0)
    assert 1 < groups < case.block.chunks
    term = made("alm", gamma=0.5).terms(case.block, {})["alm"]
    assert int(term.count) == groups
    found = probe(made("alm", gamma=0.5), case.student, case.teacher, case.pair)
    assert found["alm"] == pytest.approx(expected, rel=1e-5)
    faulty = float(term.total) / twice_subtracted(case.block.chunks, groups)
    assert faulty != pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("length", [2, 50])
def test_8_a_document_that_merges_into_one_chunk_has_a_loss(length: int) -> None:
    """The fault divides by 0 (two chunks), or by less than that."""
    student, teacher, pair = long_document(length)
    teacher = replace(teacher, logits=2 * teacher.scores())
    assert int(made("alm").terms(Case(student, teacher, pair, []).block, {})["alm"].count) == 1
    values, gradient = probe_gradient(made("alm"), student, teacher, pair)
    assert values["alm"] > 0
    assert 0 < np.abs(gradient).max() < np.inf
    assert twice_subtracted(length, 1) <= 0


# --- 9. The mean of micro-batches' means ----------------------------------------------------------
# Several steps: test_train.py::test_micro_batches_change_no_trajectory; every method:
# test_step_methods.py::test_accumulation_leaves_the_gradient_unchanged.


@pytest.mark.parametrize("name", ["sft", "uld", "gold", "p-kl", "bpm", "alm"])
@float64()
def test_9_accumulation_leaves_the_loss_and_gradient_unchanged(name: str) -> None:
    """Eight documents at once, one at a time, or one and seven, of which the fault is the mean."""
    sides = {"student": float64_side("student"), "teacher": float64_side("teacher")}
    step, found = make_step(name, **sides), examples(**sides, count=8)
    report, whole = gradients(step, [batch_of(found)])
    uneven = [batch_of(found[:1]), batch_of(found[1:])]
    for batches in ([batch_of([example]) for example in found], uneven):
        again, parts = gradients(step, batches)
        assert again.loss == pytest.approx(report.loss, rel=1e-6)
        for key, gradient in whole.items():
            torch.testing.assert_close(parts[key], gradient, rtol=1e-4, atol=1e-7)
    faulty = np.mean([gradients(step, [part])[0].loss for part in uneven])
    assert faulty != pytest.approx(report.loss, rel=1e-4)


# --- 10. The teacher scored under the student's chat template -------------------------------------
# Any chat: test_examples.py::test_each_side_has_its_own_template_over_the_same_bytes.


def borrowed(teacher: Any, student: Any) -> Any:
    """The fault: the teacher's tokens in the student's template."""
    tokenizer = copy(teacher.tokenizer)
    tokenizer.chat_template = student.tokenizer.chat_template
    return replace(teacher, tokenizer=tokenizer)


@pytest.mark.parametrize("names", [("smollm2", "mistral"), ("mistral", "smollm2")], ids="-".join)
def test_10_each_side_reads_its_own_chat_template(names: Names) -> None:
    """ChatML for SmolLM2, [INST] for Mistral; the answer's chunks are the same bytes."""
    document = question("Name a colour.", "Blue,\nI think.")
    turns = [{"role": part.role, "content": part.text} for part in document.segments]
    student, teacher = map(side, names)
    found = checked(names, build_example(document, student, teacher, "chat"))
    own = teacher.tokenizer.apply_chat_template(turns)["input_ids"]
    assert found.teacher.sequence.ids.tolist() == own
    assert b"".join(chunk_bytes(found, found.teacher)) == b"Blue,\nI think."
    assert render(document, borrowed(teacher, student), "chat").ids.tolist() != own


# --- Numerals: what a loss on common tokens does to those that the teacher spells otherwise -------
# By formula: test_gold.py::test_gold_pushes_down_numbers_..; `h-kl`: test_p_kl.py.


def test_numerals_are_suppressed_by_gold_and_taught_by_p_kl() -> None:
    """Llama 3 has tokens for all numbers of two and three digits, Qwen for single digits only.

    Ten predictions: the teacher knows the first digit, the student that a number comes. GOLD lowers
    every number of several digits, the right ones too; P-KL raises those that begin rightly.
    """
    sizes = [len(wheel_token_bytes(name).encode("201").ids) for name in LLAMA_QWEN]
    assert sizes == [1, 3]
    pair = numeral_tables()
    ids = {word: index for index, word in enumerate(pair.student_vocabulary)}
    words = [word for digits in (2, 3) for word in numerals(digits)]
    several = [ids[word] for word in words]
    assert not set(several) & set(pair.shared[:, 0].tolist())
    place = torch.arange(10)
    student, teacher = torch.zeros(10, len(ids)), torch.zeros(10, len(pair.teacher_vocabulary))
    student[:, several] = 10.0
    teacher[place, [pair.teacher_vocabulary.index(b"%d" % digit) for digit in range(10)]] = 16.0
    sides = [
        Rows(scores, place, place, place >= 0, place * 0, place, place + 1)
        for scores in (student, teacher)
    ]
    _, gold = probe_gradient("gold", *sides, pair, unmatched_weight=0.0)
    _, p_kl = probe_gradient("p-kl", *sides, pair, ce_weight=0.0)
    right = np.array([[word[:1] == b"%d" % digit for word in words] for digit in range(10)])
    assert right.sum() == 1100
    assert (gold[:, several] > 0).all()
    assert (p_kl[:, several][right] < 0).all()
    assert p_kl[:, several][~right].mean() > 0
