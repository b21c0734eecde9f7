"""Fast tokenizers from the single file that a wheel or a model release ships.

Every route here is exact against its reference library (sentencepiece, tiktoken, mistral_common;
`tests/test_tokenizers.py`). Several shorter ones are silently wrong: transformers does not map the
pre-tokenizer of SmolLM2's GGUF, and `LlamaTokenizer(vocab_file=...)` on a Mistral SentencePiece
file yields a vocabulary of three tokens.

A file is recognised by its content, never by its name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from ctdbench.errors import UserError

SUPPORTED = (
    "supported: GGUF (SmolLM2, Gemma), Mistral SentencePiece, tekken.json, "
    "Llama 3 tokenizer.model, qwen.tiktoken"
)
# What tokenizers disagree about: spaces in front, digits, accents, emoji, apostrophes, line ends.
PROBE = " Two  spaces,\n\ttabs; 1234567 + 3.5 = naïve Häuschen — 我们应选择 👍🏽 don't I'LL\n\n"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Mistral 7B Instruct v0.2 and v0.3. It reads "[INST] text[/INST]" in the papers; the space is the
# dummy prefix that the tokenizer puts in front of every stretch of text between control tokens.
MISTRAL_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant') }}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Specials:
    """Ids of the special tokens by role; None where a tokenizer has none."""

    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Specials:
        """The roles as the tokenizer states them."""
        return cls(
            *(getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk"))
        )

    def pairs(self, other: Specials) -> list[tuple[int, int]]:
        """(own id, other's id) for every role that both sides fill; the end first.

        Where one id has two roles, whoever wants one to one keeps its first: texts must end.
        """
        both = [
            (getattr(self, role), getattr(other, role)) for role in ("eos", "bos", "pad", "unk")
        ]
        return [(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]


def build_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that one file holds, with the special tokens of its family set by role.

    With `add_special_tokens=True` it puts BOS in front where the family has one, never EOS.
    Costs up to 20 s (merges are derived from the vocabulary): save it once and reload that.

    Raises UserError for a file that is none of the supported formats.
    """
    if not path.is_file():
        raise UserError(f"tokenizer file {path} does not exist", SUPPORTED)
    with path.open("rb") as file:
        head = file.read(256)
    if head.startswith(b"GGUF"):
        return _from_gguf(path)
    if head.lstrip().startswith(b"{"):
        return _from_tekken(path)
    if head.startswith(
        b"\n"
    ):  # protobuf: field 1, length-delimited, opens every SentencePiece file
        return _from_sentencepiece(path)
    if _is_tiktoken_line(head.split(b"\n")[0]):
        return _from_tiktoken(path)
    raise UserError(f"{path} is not a tokenizer file that is known here", SUPPORTED)


def probe_ids(backend: Tokenizer) -> list[int]:
    """The ids of `PROBE`, without BOS and EOS."""
    ids: list[int] = backend.encode(PROBE, add_special_tokens=False).ids
    return ids


def spell_alike(tokenizer: Any, path: Path) -> bool:
    """Whether a fast tokenizer cuts a text as the file tokenizer.json at `path`."""
    return probe_ids(tokenizer.backend_tokenizer) == probe_ids(Tokenizer.from_file(str(path)))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of the 256 bytes (id = byte) and `<bos>`, `<eos>`, `<pad>`, `<unk>` behind them.

    Spells every text; `<unk>` never occurs and is there for those who ask for its id.
    """
    alphabet = bytes_to_unicode()
    backend = Tokenizer(BPE({alphabet[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    roles = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}
    _add_special(backend, list(roles.values()))
    return _wrap(backend, **roles)


def _wrap(
    backend: Tokenizer,
    *,
    bos: str | None,
    eos: str,
    pad: str | None = None,
    unk: str | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad or eos,
        unk_token=unk,
        add_bos_token=bos is not None,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _add_special(backend: Tokenizer, tokens: list[str]) -> None:
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])


# --- GGUF: SmolLM2 and Gemma -------------------------------------------------------------------


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    from transformers.integrations.gguf import get_gguf_tokenizer

    architecture, fields, config = get_gguf_tokenizer(str(path))
    pre_tokenizer = fields.get("pre_tokenizer_type")
    if pre_tokenizer == "smollm":
        backend = _smollm_backend(architecture, fields)
        # The file names <|im_start|> as BOS; documents were separated by <|endoftext|> in
        # pre-training, and with that in front text costs fewer bits.
        bos = "<|endoftext|>"
    elif architecture.startswith("gemma") and fields["tokenizer_type"] == "llama":
        # The file spells tokens of spaces with real spaces, every other one with the marker.
        pieces = [token.replace(" ", "▁") for token in fields["tokens"]]
        backend = _sentencepiece_backend(pieces, fields["scores"], fields["token_type"], prefix="")
        bos = config["bos_token"]
    else:
        kind = f"{architecture}, pre-tokenizer {pre_tokenizer}"
        raise UserError(f"the GGUF tokenizer of {path} ({kind}) was never verified", SUPPORTED)
    tokens = fields["tokens"]
    roles = {role: fields.get(f"{role}_token_id") for role in ("pad", "unk")}
    return _wrap(
        backend,
        bos=bos,
        eos=config["eos_token"],
        chat_template=config.get("chat_template"),
        **{role: None if index is None else tokens[index] for role, index in roles.items()},
    )


def _smollm_backend(architecture: str, fields: dict[str, Any]) -> Tokenizer:
    """transformers leaves GPT-2's splitting here; the model was trained on single digits."""
    from transformers.integrations.gguf import convert_gguf_tokenizer

    backend: Tokenizer = convert_gguf_tokenizer(architecture, fields)[0]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return backend


# --- SentencePiece BPE: Mistral v1 to v7, and the vocabulary in Gemma's GGUF ---------------------


class _Kind(IntEnum):
    """Types of pieces, numbered alike in SentencePiece's protobuf and in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a SentencePiece model ({error})", SUPPORTED) from error
    ids = range(model.vocab_size())
    pieces = [model.id_to_piece(index) for index in ids]
    if pieces[:3] != ["<unk>", "<s>", "</s>"] or not any(map(model.is_byte, ids)):
        raise UserError(f"{path} is not a Mistral SentencePiece model", SUPPORTED)
    kinds = [_kind(model, index) for index in ids]
    scores = [model.get_score(index) for index in ids]
    backend = _sentencepiece_backend(pieces, scores, kinds, prefix="▁")
    template = MISTRAL_CHAT_TEMPLATE if "[INST]" in pieces else None
    return _wrap(backend, bos="<s>", eos="</s>", unk="<unk>", chat_template=template)


def _kind(model: Any, index: int) -> _Kind:
    tests = {_Kind.UNKNOWN: model.is_unknown, _Kind.CONTROL: model.is_control}
    tests |= {_Kind.UNUSED: model.is_unused, _Kind.BYTE: model.is_byte}
    return next((kind for kind, test in tests.items() if test(index)), _Kind.NORMAL)


def _sentencepiece_backend(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], prefix: str
) -> Tokenizer:
    """SentencePiece's BPE with byte fallback, as merges; `prefix` is the dummy space or empty."""
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = _merges_from_pieces(pieces, scores, kinds)
    backend = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend(prefix)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = (_Kind.CONTROL, _Kind.UNKNOWN)
    _add_special(backend, [p for p, kind in zip(pieces, kinds, strict=True) if kind in special])
    # User-defined pieces are cut out of the normalised text first, the longest one that fits.
    defined = [p for p, kind in zip(pieces, kinds, strict=True) if kind == _Kind.USER_DEFINED]
    backend.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in defined])
    return backend


def _merges_from_pieces(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces; SentencePiece joins by the score of the whole.

    Only normal pieces take part: "<", "bos>" in a text must not become the control token <bos>.
    """
    normal = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _Kind.NORMAL}
    ranked = [
        (-score, index, piece[:cut], piece[cut:])
        for index, (piece, score) in enumerate(zip(pieces, scores, strict=True))
        if piece in normal
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ranked, key=itemgetter(0, 1))]


# --- tekken: Mistral's byte-level BPE ------------------------------------------------------------


def _from_tekken(path: Path) -> PreTrainedTokenizerFast:
    from transformers.integrations.mistral import convert_tekken_tokenizer

    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        config["pattern"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is JSON but not a tekken tokenizer", SUPPORTED) from error
    # An empty template, because None would make one up from mistral_common. Only the backend is
    # kept: the object around it remembers the file's path and would write it into its config.
    backend = convert_tekken_tokenizer(str(path), chat_template="").backend_tokenizer
    return _wrap(backend, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")


# --- tiktoken: Llama 3 and Qwen ------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranks:
    """What a file of tiktoken ranks leaves out, known by the family."""

    pattern: str
    special: tuple[str, ...]  # in id order, behind the ranks
    bos: str | None
    eos: str
    nfc: bool


_LLAMA3_NAMED = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
_LLAMA3 = _Ranks(
    pattern=_WORDS + r"\p{N}{1,3}" + _REST,
    special=_LLAMA3_NAMED + tuple(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    nfc=False,
)
# The three specials that all of Qwen 1 to 3 share; their ids are the same in each.
_QWEN = _Ranks(
    pattern=_WORDS + r"\p{N}" + _REST,
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    bos=None,
    eos="<|endoftext|>",
    nfc=True,
)
_FAMILY_BY_RANKS = {128_000: _LLAMA3, 151_643: _QWEN}


def _is_tiktoken_line(line: bytes) -> bool:
    token, _, rank = line.strip().partition(b" ")
    return bool(token) and rank.isdigit()


def _from_tiktoken(path: Path) -> PreTrainedTokenizerFast:
    ranks = sum(1 for line in path.read_bytes().splitlines() if line)
    family = _FAMILY_BY_RANKS.get(ranks)
    if family is None:
        # Another vocabulary has another splitting pattern: a guess would be silently wrong.
        known = "128,000 (Llama 3) and 151,643 (Qwen)"
        raise UserError(f"{path} has {ranks:,} tiktoken ranks, known are {known}", SUPPORTED)
    backend = TikTokenConverter(
        vocab_file=str(path), pattern=family.pattern, extra_special_tokens=list(family.special)
    ).converted()
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    return _wrap(backend, bos=family.bos, eos=family.eos)
