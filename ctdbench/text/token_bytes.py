"""Which bytes each token stands for, and which bytes of a document each of its tokens covers.

Character offsets cannot say this: a character is often split over several tokens. So every token
id is mapped to its bytes once, spans are running sums of their lengths, and an encoding counts only
if the bytes of its tokens, joined, are the document's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctdbench.errors import UserError

Int64Array = NDArray[np.int64]
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SENTENCEPIECE_STAGES = {"Metaspace", "ByteFallback", "Replace"}


class NotLossless(ValueError):
    """A document whose tokens do not spell its bytes; the message says where they first differ."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """A tokenized document; all arrays are int64 [n].

    ids: token ids, without BOS and EOS.
    byte_start, byte_end: half-open spans in the document's UTF-8 bytes; they tile it in order.
    The dummy space that SentencePiece puts in front has no byte: a lone prefix token is [0, 0].
    """

    ids: Int64Array
    byte_start: Int64Array
    byte_end: Int64Array


@dataclass(frozen=True)
class Refusal:
    """A document of a batch that cannot be encoded without loss, and why, in one line."""

    reason: str


class TokenBytes:
    """The bytes of every token of a fast tokenizer (byte-level BPE or SentencePiece-like).

    tokenizer: a transformers fast tokenizer, or a `tokenizers.Tokenizer`. It is copied: truncation,
    padding and the treatment of special tokens are set on the copy only.

    vocabulary: index = token id, length = largest id + 1; b"" for special tokens and for ids that
    no token has. Added tokens that are not special have their bytes.
    digest: SHA-256 of the tokenizer's whole description: vocabulary, merges, how it splits.

    Raises UserError for a tokenizer of another kind (WordPiece): its tokens do not spell the text.
    """

    vocabulary: list[bytes]
    digest: str

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        description = backend.to_str()
        self.digest = hashlib.sha256(description.encode()).hexdigest()
        self._backend = type(backend).from_str(description)
        self._backend.no_truncation()
        self._backend.no_padding()
        # A document that spells "<|im_end|>" is text about the token, not the token.
        self._backend.encode_special_tokens = True
        self.vocabulary = _vocabulary(self._backend)
        self._length = np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))

    def __reduce__(self) -> tuple[type[TokenBytes], tuple[Any]]:
        """A pickled tokenizer forgets how it treats special tokens, so it is set up anew."""
        return TokenBytes, (self._backend,)

    def without_specials_from(self, size: int) -> TokenBytes:
        """The same without ids from `size` on, none of which stands for text."""
        cut = copy.copy(self)
        cut.vocabulary = self.vocabulary[:size]
        return cut

    def encode(self, text: str | bytes) -> Encoding:
        """Tokenize one document, with no BOS or EOS.

        Raises NotLossless where the text is not valid UTF-8 or the tokens do not spell it.
        """
        string, data = _both_forms(text)
        return self._spans(self._backend.encode(string, add_special_tokens=False).ids, data)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding | Refusal]:
        """`encode` for many documents on all cores; a refused document becomes a `Refusal`."""
        results: list[Encoding | Refusal] = [Refusal("")] * len(texts)
        valid: list[tuple[int, str, bytes]] = []
        for index, text in enumerate(texts):
            try:
                valid.append((index, *_both_forms(text)))
            except NotLossless as error:
                results[index] = Refusal(str(error))
        strings = [string for _, string, _ in valid]
        encoded = self._backend.encode_batch_fast(strings, add_special_tokens=False)
        for (index, _, data), tokens in zip(valid, encoded, strict=True):
            try:
                results[index] = self._spans(tokens.ids, data)
            except NotLossless as error:
                results[index] = Refusal(str(error))
        return results

    def puts_a_space(self) -> bool:
        """Whether the tokenizer puts a space of its own before every text: SentencePiece does."""
        return b"".join(self.vocabulary[index] for index in self.encode("a").ids) == b" a"

    def _spans(self, ids: list[int], data: bytes) -> Encoding:
        spelled = b"".join(map(self.vocabulary.__getitem__, ids))
        prefix = int(len(spelled) == len(data) + 1 and spelled.startswith(b" "))
        if spelled[prefix:] != data:
            raise NotLossless(_difference(spelled, data))
        array = np.array(ids, dtype=np.int64)
        end = np.maximum(np.cumsum(self._length[array]) - prefix, 0)
        start = np.concatenate([np.zeros(min(1, len(end)), np.int64), end[:-1]])
        return Encoding(array, start, end)


def _both_forms(text: str | bytes) -> tuple[str, bytes]:
    try:
        if isinstance(text, str):
            return text, text.encode("utf-8")
        return text.decode("utf-8"), text
    except UnicodeDecodeError as error:
        raise NotLossless(f"the document is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise NotLossless(f"the text has a lone surrogate at character {error.start}") from None


def _difference(spelled: bytes, data: bytes) -> str:
    if spelled.startswith(b" ") and not data.startswith(b" "):
        spelled = spelled[1:]
    common = min(len(spelled), len(data))
    unequal = np.frombuffer(spelled, np.uint8, common) != np.frombuffer(data, np.uint8, common)
    at = int(unequal.argmax()) if unequal.any() else common
    return (
        f"the tokens do not spell the text from byte {at} on: {spelled[at : at + 8]!r} for "
        f"{data[at : at + 8]!r} (a normaliser changed it, or a token is unknown)"
    )


def _vocabulary(backend: Any) -> list[bytes]:
    byte_level = _is_byte_level(backend)
    fallback = bool(getattr(backend.model, "byte_fallback", False))
    unknown = getattr(backend.model, "unk_token", None)
    added = backend.get_added_tokens_decoder()
    tokens = backend.get_vocab(with_added_tokens=True)
    vocabulary = [b""] * (max(tokens.values(), default=-1) + 1)
    alphabet = _byte_alphabet()
    for token, index in tokens.items():
        if index in added:
            if not added[index].special:
                vocabulary[index] = (token if byte_level else token.replace("▁", " ")).encode()
        elif token == unknown:
            continue
        elif byte_level:
            vocabulary[index] = _from_alphabet(token, alphabet)
        else:
            vocabulary[index] = _from_piece(token, fallback)
    return vocabulary


def _is_byte_level(backend: Any) -> bool:
    stages = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    # A stage's state is its JSON; that of the whole tokenizer takes seconds to parse.
    states = (json.loads(stage.__getstate__()) for stage in stages if stage is not None)
    kinds = {kind for state in states for kind in _kinds(state)}
    if "ByteLevel" in kinds:
        return True
    if kinds & _SENTENCEPIECE_STAGES:
        return False
    raise UserError(
        f"the tokenizer ({type(backend.model).__name__}) is neither byte-level BPE nor "
        "SentencePiece-like",
        "only tokenizers whose tokens spell the text can be aligned by bytes",
    )


def _kinds(stage: dict[str, Any]) -> Iterator[str]:
    """The types of a pipeline stage and of the stages inside it."""
    yield stage["type"]
    for key in ("normalizers", "pretokenizers", "decoders"):
        for part in stage.get(key, ()):
            yield from _kinds(part)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


def _from_alphabet(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # some files spell a few tokens as plain text
        return token.encode("utf-8")


def _from_piece(piece: str, fallback: bool) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece) if fallback else None
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode("utf-8")
