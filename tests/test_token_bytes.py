"""Token bytes and spans: made-up tokenizers for the corner cases, real ones for everything else."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from wheel_tokenizers import (
    AWKWARD,
    NAMES,
    real_documents,
    wheel_token_bytes,
    wheel_tokenizer,
)

from ctdbench.errors import UserError
from ctdbench.text.alignment import align
from ctdbench.text.token_bytes import Encoding, NotLossless, Refusal, TokenBytes

PAIRS = [("smollm2", "mistral"), ("llama3", "qwen"), ("tekken", "gemma"), ("mistral", "llama3")]
# Literal "▁" is how SentencePiece writes a space, so its tokenizers cannot tell the two apart.
SENTENCEPIECE = {"mistral", "gemma"}
PARTS = st.one_of(
    st.sampled_from([*AWKWARD, " ", "  ", "\n", "\t", "\r\n", " " * 20, "<|im_end|>", "</s>"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20),
    st.integers(0, 10**9).map(str),
)
TEXTS = st.lists(PARTS, max_size=6).map("".join)


def check_spans(token_bytes: TokenBytes, text: str) -> Encoding:
    """Spans tile the document, and each one holds its token's bytes (less the dummy space)."""
    data = text.encode("utf-8")
    encoding = token_bytes.encode(text)
    bounds = np.concatenate([[0], encoding.byte_end])
    np.testing.assert_array_equal(encoding.byte_start, bounds[:-1])
    assert bounds[-1] == len(data)
    spans = zip(encoding.ids, encoding.byte_start, encoding.byte_end, strict=True)
    for position, (token, start, end) in enumerate(spans):
        spelled = token_bytes.vocabulary[token]
        assert data[start:end] == spelled or (position == 0 and b" " + data[start:end] == spelled)
    return encoding


def lossy(name: str, text: str) -> bool:
    """Whether the tokenizer, as its makers made it, cannot spell the text."""
    if name == "qwen":
        return normalizers.NFC().normalize_str(text) != text
    if name == "smollm2":  # its alphabet lacks bytes that its training text did not have
        single = {token for token in wheel_token_bytes(name).vocabulary if len(token) == 1}
        return any(bytes([byte]) not in single for byte in text.encode("utf-8"))
    return name in SENTENCEPIECE and "▁" in text


@pytest.mark.parametrize("name", NAMES)
def test_spans_tile_real_text(name: str) -> None:
    token_bytes = wheel_token_bytes(name)
    for text in real_documents()[::7]:
        if not lossy(name, text):
            check_spans(token_bytes, text)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_chunks_of_any_text(student: str, teacher: str) -> None:
    sides = wheel_token_bytes(student), wheel_token_bytes(teacher)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def check(text: str) -> None:
        for name in (student, teacher):
            if lossy(name, text):
                with pytest.raises(NotLossless):
                    wheel_token_bytes(name).encode(text)
                return
        ends = [check_spans(side, text).byte_end for side in sides]
        first, second = (end[end > 0] for end in ends)
        alignment = align(first, second)
        cuts = sorted(set(first.tolist()) & set(second.tolist()))
        assert alignment.chunks == len(cuts)
        assert (cuts[-1] if cuts else 0) == len(text.encode("utf-8"))  # both sides end together
        for side, chunk in (
            (first, alignment.student_chunk),
            (second, alignment.teacher_chunk),
        ):
            # Each side's tokens of chunk c cover exactly the bytes between cut c-1 and cut c.
            assert chunk.tolist() == [sum(cut < end for cut in cuts) for end in side]
            assert [side[chunk == c].max() for c in range(len(cuts))] == cuts

    check()


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_one_by_one(name: str) -> None:
    token_bytes = wheel_token_bytes(name)
    documents = [*AWKWARD, *real_documents()[:200:10], "", "lone \ud800 surrogate", "a ▁ b"]
    for text, result in zip(documents, token_bytes.encode_batch(documents), strict=True):
        if isinstance(result, Refusal):
            with pytest.raises(NotLossless, match=re.escape(result.reason)):
                token_bytes.encode(text)
            continue
        expected = token_bytes.encode(text)
        for field in ("ids", "byte_start", "byte_end"):
            np.testing.assert_array_equal(getattr(result, field), getattr(expected, field))
            assert getattr(result, field).dtype == np.int64


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_spells_what_the_tokenizer_decodes(name: str) -> None:
    """Compared with the backend's own decoder on every token that is valid UTF-8 by itself."""
    tokenizer, vocabulary = wheel_tokenizer(name), wheel_token_bytes(name).vocabulary
    assert len(vocabulary) == max(tokenizer.get_vocab().values()) + 1
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert all(vocabulary[index] == b"" for index in special)
    assert all(vocabulary[i] for i in range(len(vocabulary)) if i not in special)
    for index in range(0, len(vocabulary), 97):
        text = vocabulary[index].decode("utf-8", "replace")
        if index in special or "\ufffd" in text:
            continue
        # The token between two others, so that no leading space is stripped.
        anchor = wheel_token_bytes(name).encode("x").ids.tolist()
        assert tokenizer.decode([*anchor, index, *anchor]).strip() == f"x{text}x" or (
            name in SENTENCEPIECE
            and tokenizer.decode([*anchor, index]) == tokenizer.decode(anchor) + text
        )


@pytest.mark.parametrize("name", NAMES)
def test_specials_in_raw_text_are_text(name: str) -> None:
    tokenizer, token_bytes = wheel_tokenizer(name), wheel_token_bytes(name)
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special][:40]
    text = "a " + " b".join(special) + "c"
    before = tokenizer(text).input_ids
    encoding = check_spans(token_bytes, text)
    assert not set(encoding.ids.tolist()) & set(tokenizer.convert_tokens_to_ids(special))
    assert tokenizer(text).input_ids == before
    assert set(before) >= set(tokenizer.convert_tokens_to_ids(special))


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_characters_split_over_tokens(name: str) -> None:
    encoding = check_spans(wheel_token_bytes(name), "x𓀀龘\U00020000")
    inside = {2, 3, 4, 6, 7, 9, 10, 11}  # offsets inside the three characters
    assert set(encoding.byte_end.tolist()) & inside


def test_byte_fallback_tokens_beside_latin1_text() -> None:
    encoding = check_spans(wheel_token_bytes("mistral"), "é𓀀é")
    vocabulary = wheel_token_bytes("mistral").vocabulary
    assert [vocabulary[i] for i in encoding.ids[1:5]] == [b"\xf0", b"\x93", b"\x80", b"\x80"]


def test_sentencepiece_prefix_has_no_byte() -> None:
    token_bytes = wheel_token_bytes("mistral")
    hello = token_bytes.encode("Hello")
    assert (hello.byte_start.tolist(), hello.byte_end.tolist()) == ([0], [5])
    assert token_bytes.vocabulary[hello.ids[0]] == b" Hello"
    chinese = token_bytes.encode("你好")  # no piece "▁你": the prefix stands alone
    assert (chinese.byte_start[0], chinese.byte_end[0]) == (0, 0)
    assert chinese.byte_end.tolist() == [0, 3, 6]
    spaces = token_bytes.encode("  x")
    assert spaces.byte_end[-1] == 3


def test_qwen_refuses_decomposed_text() -> None:
    token_bytes = wheel_token_bytes("qwen")
    check_spans(token_bytes, "plain café")
    with pytest.raises(NotLossless, match="from byte 9 on"):
        token_bytes.encode("plain cafe\u0301")


def test_refuses_what_is_not_utf8() -> None:
    token_bytes = wheel_token_bytes("smollm2")
    assert token_bytes.encode("né".encode()).byte_end[-1] == 3
    with pytest.raises(NotLossless, match="not UTF-8 at byte 2"):
        token_bytes.encode(b"ab\xff")
    with pytest.raises(NotLossless, match="surrogate at character 1"):
        token_bytes.encode("a\udfff")


def sentencepiece_like(**options: object) -> Tokenizer:
    pieces = ["<unk>", "<s>", "▁", "a", "b", "▁a", "<0xC3>", "<0xA9>"]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", "a")],
        unk_token="<unk>",
        **options,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def test_byte_pieces_count_only_with_byte_fallback() -> None:
    with_fallback = TokenBytes(sentencepiece_like(byte_fallback=True))
    assert with_fallback.vocabulary[:2] == [b"", b""]
    assert with_fallback.vocabulary[6] == b"\xc3"
    assert with_fallback.encode("é").byte_end.tolist() == [0, 1, 2]
    without = TokenBytes(sentencepiece_like())
    assert without.vocabulary[6] == b"<0xC3>"
    with pytest.raises(NotLossless, match="from byte 2 on"):
        without.encode("baé")  # an unknown token has no bytes


def test_added_tokens_holes_and_truncation() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 9}, []))  # with holes
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken("né x", special=False)])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=5)
    token_bytes = TokenBytes(tokenizer)
    added = tokenizer.token_to_id("né x")
    assert token_bytes.vocabulary[6:9] == [b""] * 3
    assert token_bytes.vocabulary[added] == "né x".encode()
    assert token_bytes.vocabulary[tokenizer.token_to_id("<end>")] == b""
    assert token_bytes.encode("abné xc").ids.tolist() == [0, 1, added, 9]
    assert tokenizer.truncation["max_length"] == 1
    assert not tokenizer.encode_special_tokens


def test_a_token_outside_the_byte_alphabet_is_its_own_text() -> None:
    """Some files spell a few tokens as plain text: a line feed has no place in the alphabet."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "\n\n": 1, "你": 2, "Ċ": 3}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert TokenBytes(tokenizer).vocabulary == [b"a", b"\n\n", "你".encode(), b"\n"]


def test_wordpiece_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="WordPiece"):
        TokenBytes(tokenizer)


def test_text_imports_nothing_heavy() -> None:
    code = (
        "import sys, ctdbench.text.token_bytes, ctdbench.text.alignment;"
        "print(*{'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
