"""Documents on both sides: what is paired, what is supervised, what is refused; real tokenizers."""

from __future__ import annotations

import copy
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from wheel_tokenizers import real_documents, wheel_token_bytes, wheel_tokenizer

from ctdbench.distill import examples
from ctdbench.distill.corpus import Document, Segment
from ctdbench.distill.examples import AlignedSide, Example, build_example, build_examples, render
from ctdbench.distill.models import Side, Specials
from ctdbench.distill.setting import pair_tables
from ctdbench.errors import UserError
from ctdbench.text.token_bytes import NotLossless

PAIRS = [("mistral", "smollm2"), ("llama3", "qwen"), ("qwen", "mistral")]
every_pair = pytest.mark.parametrize("names", PAIRS, ids="-".join)
few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def side(name: str, **changed: Any) -> Any:
    """A side without a model; `changed` overrides special tokens by role."""
    own = wheel_tokenizer(name)
    specials = {**vars(Specials.of(own)), **changed}
    return Side(None, own, wheel_token_bytes(name), Specials(**specials))


def both(names: Sequence[str]) -> tuple[Any, Any]:
    return side(names[0]), side(names[1])


def plain(*texts: str, complete: bool = True) -> Document:
    return Document(tuple(Segment(text) for text in texts), complete)


def question(prompt: str, answer: str) -> Document:
    return Document((Segment(prompt, "user", False), Segment(answer, "assistant")))


def chunk_bytes(found: Example, own: AlignedSide) -> list[bytes]:
    """What each chunk's tokens cover of the text."""
    pieces = [b""] * found.chunks
    starts, ends = own.sequence.byte_start, own.sequence.byte_end
    for chunk, start, end in zip(own.chunk, starts, ends, strict=True):
        if chunk >= 0:
            pieces[chunk] += found.text[start:end]
    return pieces


def spelled(own: AlignedSide, mask: Any, text: bytes) -> bytes:
    spans = zip(own.sequence.byte_start[mask], own.sequence.byte_end[mask], strict=True)
    return b"".join(text[start:end] for start, end in spans)


def supervised_text(found: Example, own: AlignedSide) -> bytes:
    return spelled(own, own.supervised, found.text)


def check(found: Example) -> None:
    """What holds of every example, whatever the text and the template."""
    pieces = [chunk_bytes(found, own) for own in (found.student, found.teacher)]
    assert pieces[0] == pieces[1]
    for own in (found.student, found.teacher):
        inside = own.chunk[own.chunk >= 0]
        assert (np.diff(inside) >= 0).all()
        assert set(inside) == set(range(found.chunks))
        assert own.supervised[own.chunk >= 0].all()
        assert own.chunk[0] == -1  # nothing predicts it
        widths = own.sequence.byte_end - own.sequence.byte_start
        frame = ~own.sequence.is_text
        assert not widths[frame].any()
        assert not own.supervised[frame & (np.arange(len(frame)) != own.sequence.end)].any()
        assert spelled(own, slice(None), found.text) == found.text


texts = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    st.lists(
        st.sampled_from(["naïve ", "  ", "\n", "你好", "12 345", "_x", "👍🏽", "\t", "the"])
    ).map("".join),
)


@every_pair
@few
@given(segments=st.lists(st.tuples(texts, st.booleans()), min_size=1, max_size=3))
def test_any_document_is_partitioned_or_refused(
    names: tuple[str, str], segments: list[tuple[str, bool]]
) -> None:
    parts = tuple(Segment(text, "user", supervised) for text, supervised in segments if text)
    if not parts:
        return
    document = Document(parts)
    try:
        found = build_example(document, *both(names))
    except NotLossless:
        return
    check(found)
    assert found.text == document.text.encode()
    allowed = {place for start, end in document.supervised_spans() for place in range(start, end)}
    for own in (found.student, found.teacher):
        spans = zip(own.sequence.byte_start, own.sequence.byte_end, strict=True)
        for (start, end), supervised, is_text in zip(
            spans, own.supervised, own.sequence.is_text, strict=True
        ):
            if is_text and end > start:
                assert supervised == (set(range(start, end)) <= allowed)


@every_pair
@few
@given(data=st.data(), template=st.sampled_from(["plain", "chat"]))
def test_documents_in_a_row_are_as_each_by_itself(
    names: tuple[str, str], data: st.DataObject, template: Any
) -> None:
    """Whichever are refused, empty, cut off or without a chunk, and wherever shards end."""
    parts = st.lists(st.tuples(texts | st.just(""), st.booleans()), min_size=1, max_size=2)
    drawn = data.draw(st.lists(st.tuples(parts, st.booleans()), max_size=5))
    given = [
        Document(
            tuple(Segment(t, r, s) for (t, s), r in zip(p, ("user", "assistant"), strict=False)),
            complete,
        )
        for p, complete in drawn
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "SHARD_CHARACTERS", data.draw(st.sampled_from([1, 30, 10**6])))
        found, _ = build_examples(given, *both(names), template)
    alone = [example for document in given for example in by_itself(document, names, template)]
    assert len(found) == len(alone)
    for one, other in zip(found, alone, strict=True):
        check(one)
        assert one.document == other.document
        for mine, theirs in ((one.student, other.student), (one.teacher, other.teacher)):
            assert columns(mine) == columns(theirs)


def by_itself(document: Document, names: tuple[str, str], template: Any) -> list[Example]:
    try:
        found = build_example(document, *both(names), template)
    except NotLossless:
        return []
    return [found] if found.chunks else []


def columns(own: AlignedSide) -> list[Any]:
    """All that an aligned side holds, as lists."""
    sequence = own.sequence
    arrays = (sequence.ids, sequence.byte_start, sequence.byte_end, sequence.is_text)
    return [sequence.end, *(array.tolist() for array in (*arrays, own.chunk, own.supervised))]


def test_work_does_not_loop_over_tokens() -> None:
    """As many calls for a book as for a line, and memory in proportion to the text."""
    sides = both(PAIRS[0])
    line = "The quick brown fox, naïve as ever, jumps over 13 dogs.\n"
    calls, peaks = [], []
    for copies in (1, 400, 3_200):
        document = plain(line * copies)
        calls.append(counted_calls(lambda d=document: build_example(d, *sides)))
        tracemalloc.start()
        build_example(document, *sides)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert calls[0] == calls[1] == calls[2] > 0
    assert peaks[2] < 8.5 * peaks[1]


def counted_calls(function: Callable[[], object]) -> int:
    """Calls of functions, built-in ones included."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@every_pair
def test_real_text_is_covered_whole(names: tuple[str, str]) -> None:
    """No text token is lost between the sides, the newline and the first one included."""
    found, skipped = build_examples(map(plain, filter(None, real_documents()[::40])), *both(names))
    assert len(found) > 40
    assert set(skipped) <= {"not spelled byte for byte by a tokenizer"}
    for example in found:
        check(example)
        joined = b"".join(chunk_bytes(example, example.student))
        if wheel_tokenizer(names[0]).bos_token and wheel_tokenizer(names[1]).bos_token:
            assert joined == example.text
        else:
            assert example.text.endswith(joined)


def test_a_bos_on_one_side_only_drops_the_first_chunk_on_both() -> None:
    document = plain("The fox jumps over it.")
    with_bos = build_example(document, side("llama3"), side("smollm2"))
    without = build_example(document, side("llama3"), side("smollm2", bos=None))
    assert chunk_bytes(without, without.student) == chunk_bytes(with_bos, with_bos.student)[1:]
    check(without)


def test_the_end_tokens_are_a_chunk_of_their_own() -> None:
    student, teacher = both(("mistral", "smollm2"))
    found = build_example(plain("It ends."), student, teacher)
    for own, specials in (
        (found.student, student.specials),
        (found.teacher, teacher.specials),
    ):
        assert own.sequence.ids[own.chunk == found.chunks - 1].tolist() == [specials.eos]
        assert own.supervised[-1]
    cut = build_example(plain("It ends.", complete=False), student, teacher)
    assert cut.chunks == found.chunks - 1
    lone = build_example(plain("It ends."), student, side("smollm2", eos=None))
    assert lone.chunks == cut.chunks
    assert lone.student.supervised[-1]  # the student still learns to end


@every_pair
def test_prompts_are_not_supervised_and_answers_are(names: tuple[str, str]) -> None:
    found = build_example(question("What is four and three", "It is 7.\nYes, 7."), *both(names))
    check(found)
    for own in (found.student, found.teacher):
        assert supervised_text(found, own) == b"\nIt is 7.\nYes, 7."


def test_a_token_over_prompt_and_answer_is_not_supervised() -> None:
    """`:\\n\\n` is one token of qwen; the prompt's colon is not to be learnt."""
    straddling = question("Answer:", "\nIt is 7.")
    found = build_example(straddling, side("qwen"), side("llama3"))
    assert supervised_text(found, found.student) == b"It is 7."
    assert supervised_text(found, found.teacher) == b"It is 7."
    check(found)
    trained = b"".join(chunk_bytes(found, found.student))
    assert b":" not in trained
    assert trained.endswith(b"It is 7.")


@pytest.mark.parametrize("answer", ["\nseven", " seven", "你好"])
def test_a_lone_sentencepiece_prefix_belongs_to_what_follows(answer: str) -> None:
    student = side("mistral")
    found = build_example(plain(answer), student, side("smollm2"))
    assert (found.student.sequence.byte_end == 0).sum() >= 1
    check(found)
    assert b"".join(chunk_bytes(found, found.student)) == answer.encode()
    prompt = build_example(question(answer, "yes"), student, side("smollm2"))
    prefix = 1  # after BOS
    assert prompt.student.sequence.is_text[prefix]
    assert not prompt.student.supervised[prefix]


def test_a_changed_document_is_refused_and_counted() -> None:
    decomposed = plain("cafe\u0301 au lait")
    found, skipped = build_examples([decomposed, plain("tea")], side("llama3"), side("qwen"))
    assert len(found) == 1
    assert skipped == {"not spelled byte for byte by a tokenizer": 1}


def test_a_document_without_a_predicted_chunk_is_counted() -> None:
    bare = [side("qwen", bos=None, eos=None), side("smollm2", bos=None, eos=None)]
    found, skipped = build_examples([plain("the")], *bare)
    assert not found
    assert skipped == {"no chunk that both sides predict": 1}
    unsupervised = Document((Segment("prompt", "user", supervised=False),))
    assert build_examples([unsupervised], *both(PAIRS[0]))[0] == []


@pytest.mark.parametrize("short", [0, 1])
def test_a_document_longer_than_a_models_positions_is_counted(short: int) -> None:
    """Of either side, and to the token: one that has just as many is trained on."""
    text = plain("one two three four five six seven eight")
    whole = build_example(text, *both(PAIRS[0]))
    lengths = [len(one.chunk) for one in (whole.student, whole.teacher)]
    for room, kept in ((0, 1), (-1, 0)):
        sides = [side(name) for name in PAIRS[0]]
        config = LlamaConfig(max_position_embeddings=lengths[short] + room)
        sides[short] = replace(sides[short], model=SimpleNamespace(config=config))
        found, skipped = build_examples([text, plain("tea")], *sides)
        assert len(found) == 1 + kept
        assert sum(skipped.values()) == 1 - kept
    assert next(iter(skipped)).startswith("longer than a model's positions")


def test_chinese_without_spaces_is_cut_into_chunks() -> None:
    text = "从前有座山，山里有座庙，庙里有个老和尚在讲故事。"
    for names in PAIRS:
        found = build_example(plain(text), *both(names))
        check(found)
        assert found.chunks > 5


def test_specials_in_the_text_are_text() -> None:
    text = "write <|im_end|> or </s> or <|begin_of_text|>"
    for names in PAIRS:
        found = build_example(plain(text), *both(names))
        specials = wheel_tokenizer(names[0]).all_special_ids
        inner = found.student.sequence.ids[found.student.sequence.is_text]
        assert not set(inner.tolist()) & set(specials)


# --- chat templates ---


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_chat_is_what_the_tokenizers_own_template_gives(name: str) -> None:
    document = question("Hi there?", "Yes, naïve\none: 你好.")
    own = side(name)
    turns = [{"role": part.role, "content": part.text} for part in document.segments]
    expected = own.tokenizer.apply_chat_template(turns)["input_ids"]
    sequence = render(document, own, "chat")
    assert sequence.ids.tolist() == expected
    assert sequence.ids[sequence.end] == own.specials.eos


def chat_side(template: str, **changed: Any) -> Any:
    """SmolLM2's side with another template."""
    own = side("smollm2", **changed)
    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.chat_template = template
    return replace(own, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "closing", ["<|im_end|>\n", "<|im_end|><|endoftext|>"], ids=["gemma", "phi"]
)
def test_an_answer_ends_with_the_special_of_its_template(closing: str) -> None:
    """It need not be EOS, nor the last one."""
    turn = "{{ '<|im_start|>' + m['role'] + m['content'] + '" + closing + "' }}"
    of = side("smollm2").tokenizer.convert_tokens_to_ids
    other = chat_side("{% for m in messages %}" + turn + "{% endfor %}", eos=of("<|endoftext|>"))
    own = side("mistral")
    found = build_example(question("Who?", "I."), other, own, "chat")
    parts = found.student, found.teacher
    last = [part.sequence.ids[part.chunk == found.chunks - 1].tolist() for part in parts]
    assert last == [[of("<|im_end|>")], [own.specials.eos]]
    assert all(part.supervised[part.sequence.end] for part in parts)
    assert pair_tables(other, own, "chat").end_pair == (of("<|im_end|>"), own.specials.eos)
    assert pair_tables(other, own, "plain").end_pair == (other.specials.eos, own.specials.eos)


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day() -> None:
    """Llama 3.2's takes the date from `date_string` or `strftime_now`."""
    day = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    turns = "{% endif %}{{ date_string + strftime_now(' %j') }}{% for m in messages %}"
    own = chat_side(f"{day}{turns}{{{{ m['content'] + eos_token }}}}{{% endfor %}}")
    sequence = render(question("Who?", "I."), own, "chat")
    assert own.tokenizer.decode(sequence.ids) == "26 Jul 2024 208Who?<|im_end|>I.<|im_end|>"


@every_pair
@few
@given(prompt=texts.filter(str.strip), answer=texts.filter(str.strip))
def test_each_side_has_its_own_template_over_the_same_bytes(
    names: tuple[str, str], prompt: str, answer: str
) -> None:
    try:
        found = build_example(question(prompt, answer), *both(names), "chat")
    except NotLossless:
        return
    check(found)
    assert found.text == (prompt + answer).encode()
    for own in (found.student, found.teacher):
        assert supervised_text(found, own) == answer.encode()
    assert b"".join(chunk_bytes(found, found.student)) == answer.encode()


def test_a_template_that_cannot_show_the_document_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match=r"train\.template") as caught:
        render(plain("text"), side("mistral"), "chat")
    assert "\n" not in str(caught.value)
    forgetful = chat_side("{{ messages[-1]['content'] }}")
    with pytest.raises(UserError, match="leaves a segment out"):
        render(question("a", "b"), forgetful, "chat")
