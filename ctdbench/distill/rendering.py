"""Documents as tokens of one side: their text, and what the side's template puts around it.

Special tokens and the tokens of a chat template have no bytes, so both sides lie over the same
bytes whatever template each of them uses. Many documents at once are one row of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from ctdbench.distill.corpus import SEPARATOR, Document
from ctdbench.errors import UserError
from ctdbench.text.token_bytes import Encoding, NotLossless, Refusal, TokenBytes

if TYPE_CHECKING:
    from ctdbench.distill.models import Side

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Template = Literal["plain", "chat"]
Spelled = list[Encoding]  # the pieces of text of one document
# Some templates (Llama 3.2's) print today's date, but runs must not depend on when they run. They
# name this one for where there is no clock.
DAY = datetime(2024, 7, 26)
DATE_CODES = [*"aAbBcdDeFHIjmMpSTuwxXyY", "-d", "-m"]


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One document on one side, specials included; every array is [n].

    ids, byte_start, byte_end: int64. is_text: bool, the token stands for text of the document.
    end: position of the token that ends the document, -1 where it has none.
    """

    ids: IntArray
    byte_start: IntArray
    byte_end: IntArray
    is_text: BoolArray
    end: int


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """The sequences of D documents in a row of n tokens.

    sizes [D]: tokens of each. end [D] and the rest, [n]: as in `TokenSequence`.
    """

    sizes: IntArray
    end: IntArray
    ids: IntArray
    byte_start: IntArray
    byte_end: IntArray
    is_text: BoolArray

    def sequences(self) -> Iterator[tuple[slice, TokenSequence]]:
        """Where each one is in the row, and its arrays as views."""
        stops = np.cumsum(self.sizes).tolist()
        for start, stop, end in zip([0, *stops[:-1]], stops, self.end.tolist(), strict=True):
            at = slice(start, stop)
            arrays = (self.ids[at], self.byte_start[at], self.byte_end[at], self.is_text[at])
            yield at, TokenSequence(*arrays, end)


class Shape(NamedTuple):
    """What of a document its frame depends on; in plain text, roles do not show."""

    roles: tuple[str, ...]
    complete: bool


class Frame(NamedTuple):
    """The tokens before, between and after a document's pieces of text; they have no bytes.

    tail: how many there are from the one that ends the document on, 0 for none.
    """

    parts: tuple[Encoding, ...]
    tail: int


@dataclass(frozen=True)
class Renderer:
    """How a side writes documents of these shapes. It has no model: any process can have one."""

    tokens: TokenBytes
    template: Template
    frames: Mapping[Shape, Frame]

    @classmethod
    def of(cls, side: Side, template: Template, documents: Iterable[Document]) -> Renderer:
        """For documents like these; UserError where a chat template cannot render one of them."""
        shapes = dict.fromkeys(_shape(document, template) for document in documents)
        frames = {shape: _frame(side, template, shape) for shape in shapes}
        return cls(side.tokens, template, frames)

    def spell(self, documents: Sequence[Document]) -> list[Spelled | Refusal]:
        """Every document's pieces of text, or why the tokenizer cannot spell them."""
        pieces = [_pieces(document, self.template) for document in documents]
        encodings = iter(self.tokens.encode_batch(list(chain.from_iterable(pieces))))
        return [_all_or_none(list(islice(encodings, len(texts)))) for texts in pieces]

    def columns(self, documents: Sequence[Document], spelled: Sequence[Spelled]) -> TokenColumns:
        """The documents' tokens: their pieces within their frames, in turns."""
        frames = [self.frames[_shape(document, self.template)] for document in documents]
        laid = [list(_in_turns(*pair)) for pair in zip(frames, spelled, strict=True)]
        parts = list(chain.from_iterable(laid))
        counts, lengths = _lengths(laid), _lengths([part.ids for part in parts])
        first = np.repeat(starts(counts), counts)  # part of each part's document
        sizes = np.array([part.byte_end[-1] if len(part.ids) else 0 for part in parts], np.int64)
        offset = np.repeat(starts(sizes) - starts(sizes)[first], lengths)
        tokens = np.add.reduceat(lengths, starts(counts))
        tail = np.array([frame.tail for frame in frames], np.int64)
        return TokenColumns(
            tokens,
            np.where(tail > 0, tokens - tail, -1),
            _joined([part.ids for part in parts]),
            _joined([part.byte_start for part in parts]) + offset,
            _joined([part.byte_end for part in parts]) + offset,
            np.repeat((np.arange(len(parts)) - first) % 2 == 1, lengths),
        )


def render(document: Document, side: Side, template: Template) -> TokenSequence:
    """The document's tokens on one side.

    plain: BOS, the text, and the end token of a complete document. chat: the side's own chat
    template around each segment; a tokenizer without one separates segments by a newline.

    Raises NotLossless if the tokenizer cannot spell it.
    """
    ((_, sequence),) = rendered(document, side, template).sequences()
    return sequence


def rendered(document: Document, side: Side, template: Template) -> TokenColumns:
    """`render` as a row of one document."""
    renderer = Renderer.of(side, template, [document])
    (spelled,) = renderer.spell([document])
    if isinstance(spelled, Refusal):
        raise NotLossless(spelled.reason)
    return renderer.columns([document], [spelled])


def end_token(side: Side, template: Template) -> int | None:
    """The id that ends a document: EOS, or what the side's chat template puts behind an answer.

    None where there is neither; UserError where the template renders no question with its answer.
    """
    frame = _frame(side, template, Shape(("user", "assistant"), complete=True))
    return int(frame.parts[-1].ids[-frame.tail]) if frame.tail else None


def chat_text(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:
    """Turns in the tokenizer's own chat template, to which it is always `DAY`."""
    template = _undated(tokenizer.get_chat_template())
    options |= {"chat_template": template, "tokenize": False}
    return str(tokenizer.apply_chat_template(turns, **options))


def supervised_spans(document: Document, template: Template) -> list[tuple[int, int]]:
    """Byte spans that are supervised: of the plain text, or of the segments joined by nothing."""
    if template == "plain":
        return document.supervised_spans()
    spans, start = [], 0
    for segment in document.segments:
        end = start + len(segment.text.encode("utf-8"))
        if segment.supervised:
            spans.append((start, end))
        start = end
    return spans


def content(document: Document, template: Template) -> bytes:
    """The bytes that both sides lie over."""
    return "".join(_pieces(document, template)).encode("utf-8")


def starts(sizes: IntArray) -> IntArray:
    """Where each part of so many entries begins in all of them joined."""
    return np.cumsum(sizes) - sizes


def _pieces(document: Document, template: Template) -> list[str]:
    if template == "plain":
        return [document.text]
    return [segment.text for segment in document.segments]


def _shape(document: Document, template: Template) -> Shape:
    roles = () if template == "plain" else tuple(segment.role for segment in document.segments)
    return Shape(roles, document.complete)


def _all_or_none(encodings: Sequence[Encoding | Refusal]) -> Spelled | Refusal:
    refused = [encoding for encoding in encodings if isinstance(encoding, Refusal)]
    return refused[0] if refused else [e for e in encodings if isinstance(e, Encoding)]


def _in_turns(frame: Frame, pieces: Spelled) -> Iterator[Encoding]:
    yield frame.parts[0]
    for piece, after in zip(pieces, frame.parts[1:], strict=True):
        yield piece
        yield after


def _lengths(arrays: Sequence[Any]) -> IntArray:
    return np.array(list(map(len, arrays)), dtype=np.int64)


def _joined(arrays: Sequence[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _frame(side: Side, template: Template, shape: Shape) -> Frame:
    bos, eos, vocabulary = side.specials.bos, side.specials.eos, side.tokens.vocabulary
    if template == "plain":
        after = [] if eos is None or not shape.complete else [eos]
        parts = [[] if bos is None else [bos], after]
    else:
        parts = [_ids(side, text) for text in _wrappers(side, shape.roles)]
    closing = parts[-1] if shape.complete else []
    # A chat template may end turns by a special of its own, with EOS behind it or not at all.
    ends = [at for at, token in enumerate(closing) if token == eos or not vocabulary[token]]
    return Frame(tuple(map(_without_bytes, parts)), len(closing) - ends[0] if ends else 0)


def _ids(side: Side, text: str) -> list[int]:
    return list(side.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _without_bytes(ids: list[int]) -> Encoding:
    nowhere = np.zeros(len(ids), dtype=np.int64)
    return Encoding(np.array(ids, dtype=np.int64), nowhere, nowhere)


def _wrappers(side: Side, roles: tuple[str, ...]) -> list[str]:
    """What the side's template puts before, between and after segments of these roles."""
    tokenizer = side.tokenizer
    if tokenizer.chat_template is None:
        between = [SEPARATOR] * (len(roles) - 1)
        return [tokenizer.bos_token or "", *between, tokenizer.eos_token or ""]
    marks = [f"segment{index}marker" for index in range(len(roles))]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = chat_text(tokenizer, turns)
    except TemplateError as error:
        raise _bad_template(roles, str(error)) from error
    wrappers = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise _bad_template(roles, "it leaves a segment out or moves it")
        wrappers.append(before)
    return [*wrappers, rest]


def _undated(template: str) -> str:
    """The template with a clock of its own: what transformers hands to it is no function."""
    if "strftime_now" not in template:
        return template
    codes = [f"|replace('%{code}', '{DAY.strftime('%' + code)}')" for code in DATE_CODES]
    macro = "{% macro strftime_now(format) %}{{ format" + "".join(codes) + " }}{% endmacro +%}"
    return macro + template


def _bad_template(roles: tuple[str, ...], reason: str) -> UserError:
    return UserError(
        f"train.template: a chat template cannot render a document of roles {list(roles)}: "
        f"{reason}",
        "use train.template=plain",
    )
