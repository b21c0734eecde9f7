"""Text that a model writes: prompts, each side's own template, where answers end."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bpe_tokenizer, tiny_model
from tokenizers import normalizers
from wheel_tokenizers import wheel_token_bytes, wheel_tokenizer
from writing_sides import (
    CHATML,
    GREEDY,
    INST,
    PROMPTS,
    QUESTIONS,
    author,
    eos,
    question,
    said,
    scripted,
    side,
)

from ctdbench.distill import rollouts
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import build_example
from ctdbench.distill.models import Side
from ctdbench.distill.rollouts import continued, prompt, rendering
from ctdbench.distill.tokenizers import Specials
from ctdbench.errors import UserError


def test_the_prompt_of_a_question_is_the_question() -> None:
    asked = question("Why?")
    assert prompt(question("Why?", "So."), 2) == asked
    supervised = Document((Segment("Why?", "user"), Segment("So.", "assistant")))
    assert prompt(supervised, 2) == asked
    system = (Segment("Be brief.", "system", False), *question("Why?", "So.").segments)
    more = (*system, Segment("And?", "user", False), Segment("Well.", "assistant"))
    assert prompt(Document(more), 2).segments == system[:2]


def test_the_prompt_of_plain_text_ends_before_a_space() -> None:
    document = Document((Segment("The quick brown fox jumps over it."),))
    assert prompt(document, 12) == Document((Segment("The quick", "text", False),), False)
    assert prompt(document, 1000).text == "The quick brown"  # half at most
    assert prompt(Document((Segment("a"),)), 12).text == "a"


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), st.integers(1, 80))
def test_the_prompt_of_plain_text_is_its_beginning(text: str, size: int) -> None:
    found = prompt(Document((Segment(text),)), size)
    assert text.startswith(found.text)
    assert 0 < len(found.text.encode()) <= max(4, min(size, len(text.encode()) // 2))
    assert not any(segment.supervised for segment in found.segments)


# --- templates ---


@pytest.mark.parametrize("template", [CHATML, INST])
def test_a_chat_model_reads_its_own_generation_prompt(template: str) -> None:
    own = side(template)
    turn = [{"role": "user", "content": QUESTIONS[0]}]
    text = own.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    opening = author(own, template="chat")._opening(PROMPTS[0])
    assert own.tokenizer.decode(opening) == text
    assert rendering(own, "chat") == "chat template"
    assert rendering(own, "plain") == "plain"


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_a_real_chat_model_reads_its_own_generation_prompt(name: str) -> None:
    own: Any = wheel_side(name)
    turn = [{"role": "user", "content": "Naïve, 你好?"}]
    expected = own.tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert rollouts._chat(question("Naïve, 你好?"), own) == expected


def wheel_side(name: str) -> Any:
    own = wheel_tokenizer(name)
    return SimpleNamespace(
        model=None, tokenizer=own, tokens=wheel_token_bytes(name), specials=Specials.of(own)
    )


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_base_model_gets_plain_text(template: Any) -> None:
    own = side()
    assert rendering(own, template) == "plain"
    opening = author(own, template=template)._opening(PROMPTS[0])
    assert own.tokenizer.decode(opening) == f"<bos>{QUESTIONS[0]}\n"
    assert said(scripted(own, "Yes.", eos(own)), template) == question(QUESTIONS[0], "Yes.")


@pytest.mark.parametrize("template", [None, CHATML, INST])
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_training_reads_the_answer_after_what_it_was_written_after(
    template: str | None, kind: Any
) -> None:
    own, other = side(template), side(INST)
    written = said(scripted(own, "Yes."), kind)
    assert written is not None
    sequence = build_example(written, own, other, kind).student
    opening = author(own, template=kind)._opening(PROMPTS[0])
    assert sequence.sequence.ids[: len(opening)].tolist() == opening


def test_plain_text_goes_on_as_text() -> None:
    own = side()
    start = prompt(Document((Segment("The quick brown fox jumps over it."),)), 12)
    found = continued(scripted(own, "dog."), [start], GREEDY, template="plain", stream="s")[0]
    assert found is not None
    assert [segment.role for segment in found.segments] == ["text", "text"]
    assert found.supervised_spans() == [(len("The quick"), found.size)]


def test_a_template_that_cannot_show_a_prompt_is_an_error_of_one_line() -> None:
    start = prompt(Document((Segment("The quick brown fox."),)), 12)
    with pytest.raises(UserError, match=r"train\.template"):
        continued(side(INST), [start], GREEDY, template="chat", stream="s")


@pytest.mark.parametrize("name", ["mistral", "smollm2"])
def test_the_space_that_sentencepiece_adds_is_not_part_of_an_answer(name: str) -> None:
    own = wheel_side(name)
    ids = [*own.tokens.encode("Yes, 7.").ids.tolist(), own.specials.eos]
    found = author(own, template="chat")._document(PROMPTS[0], ids)
    assert found == question(QUESTIONS[0], "Yes, 7.")
    again = build_example(found, own, own, "chat").student
    assert again.sequence.ids[again.supervised].tolist() == ids


# --- ends ---


def test_an_answer_ends_at_eos_or_at_the_end_of_its_turn() -> None:
    own = side(CHATML)
    end = own.tokenizer.convert_tokens_to_ids("<|end|>")
    expected = question(QUESTIONS[0], "Yes.")
    for stop in (end, eos(own)):
        assert said(scripted(own, "Yes.", stop, "More."), "chat") == expected
    cut = Document(expected.segments, complete=False)
    assert said(scripted(own, "Yes.", end, "More."), "plain") == cut  # no end of plain text
    start = own.tokenizer.convert_tokens_to_ids("<|start|>")
    assert said(scripted(own, "Yes.", start, "More."), "chat") == cut


def test_an_answer_that_is_too_long_is_cut_and_not_complete() -> None:
    own = side()
    shorter = replace(GREEDY, max_new_tokens=2)
    found = said(scripted(own, "again and again", eos(own)), decoding=shorter)
    assert found is not None
    assert not found.complete
    assert "again and again".startswith(found.segments[-1].text)


def test_both_sides_end_tokens_are_paired() -> None:
    own, other = side(), side(INST)
    document = said(scripted(own, "Yes.", eos(own)))
    assert document is not None
    found = build_example(document, own, other)
    for aligned, specials in ((found.student, own.specials), (found.teacher, other.specials)):
        assert aligned.sequence.ids[aligned.chunk == found.chunks - 1].tolist() == [specials.eos]
        assert aligned.supervised[-1]


@pytest.mark.parametrize("tail", [b"\xe6\x88", b"\xf0\x9f\x91", b"\xc3", b"\xff"])
def test_an_unfinished_character_is_cut_off(tail: bytes) -> None:
    own = side()
    longer = replace(GREEDY, max_new_tokens=24)
    found = said(scripted(own, "Yes 我", tail, eos(own)), decoding=longer)
    assert found == Document(question(QUESTIONS[0], "Yes 我").segments, complete=False)


def test_what_is_no_text_is_no_answer() -> None:
    own = side()
    for script in ([eos(own)], [" \n", eos(own)], [b"\xc3", eos(own)]):
        assert said(scripted(own, *script)) is None


def test_prompts_that_the_model_cannot_read_have_no_answer() -> None:
    for context, answered in ((16, False), (64, True)):
        found = said(scripted(side(max_position_embeddings=context), "Yes."))
        assert (found is not None) == answered
    own = bpe_tokenizer()
    own.backend_tokenizer.normalizer = normalizers.NFC()
    composing = Side.of(tiny_model(own).eval(), own)
    asked = [question("cafe\u0301"), PROMPTS[0]]
    first, second = continued(
        scripted(composing, "Yes."), asked, GREEDY, template="plain", stream="s"
    )
    assert first is None
    assert second is not None
