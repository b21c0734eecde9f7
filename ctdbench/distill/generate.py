"""Text that a model generates: prompts from a file of templates, answers in batches."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ctdbench import atomic
from ctdbench.distill.references import PROMPTS
from ctdbench.distill.rendering import chat_text
from ctdbench.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; recorded with every generated corpus."""

    seed: int = 0
    temperature: float = 0.8
    top_k: int = 50
    max_new_tokens: int = 320
    batch_size: int = 96


def prompts(seed: int, path: Path = PROMPTS) -> list[tuple[str, str]]:
    """(kind, prompt) for every kind of the file, shuffled within and interleaved across kinds."""
    kinds = yaml.safe_load(path.read_text(encoding="utf-8"))
    shuffled = []
    for kind, entry in kinds.items():
        filled = [text for template in entry["templates"] for text in _fill(template, entry)]
        order = random.Random(
            f"{seed}/{kind}"
        )  # by name: a new kind leaves the others' order alone
        order.shuffle(filled)
        shuffled.append([(kind, text) for text in filled])
    rounds = itertools.zip_longest(*shuffled)
    return [entry for one_each in rounds for entry in one_each if entry is not None]


def _fill(template: str, fields: dict[str, list[str]]) -> Iterator[str]:
    names = sorted({name for _, name, _, _ in string.Formatter().parse(template) if name})
    for values in itertools.product(*(fields[name] for name in names)):
        yield template.format(**dict(zip(names, values, strict=True)))


def answers(
    model: Any, tokenizer: Any, questions: Sequence[str], sampling: Sampling
) -> list[tuple[str, bool]]:
    """(answer, whether the model ended it by itself) for one batch of questions, in order.

    The random state is derived from the seed and the questions, so that a batch gives the same
    text whatever was generated before it.
    """
    rendered = [_render(tokenizer, question) for question in questions]
    inputs = tokenizer(
        rendered,
        return_tensors="pt",
        padding=True,
        pad_to_multiple_of=64,  # the same few shapes in every batch: kernels are built once
        padding_side="left",
        add_special_tokens=False,
    ).to(model.device)
    digest = hashlib.sha256("\0".join([str(sampling.seed), *questions]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            do_sample=False,
            logits_processor=[_TopKSampler(sampling)],
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, inputs["input_ids"].shape[1] :]
    ended = (output == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return list(zip(texts, ended, strict=True))


class _TopKSampler:
    """Draws a token among the `top_k` likeliest and rules out all others.

    The library's own sampler draws over the whole vocabulary, a quarter of a small model's time.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] -> 0 at the drawn token, -inf elsewhere."""
        best = scores.topk(min(self.sampling.top_k, scores.shape[-1]), dim=-1)
        probabilities = (best.values.float() / self.sampling.temperature).softmax(-1)
        drawn = best.indices.gather(1, torch.multinomial(probabilities, 1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _render(tokenizer: Any, question: str) -> str:
    """The prompt in the model's own chat template; a base model gets the question and a newline."""
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}{question}\n"
    turn = [{"role": "user", "content": question}]
    return chat_text(tokenizer, turn, add_generation_prompt=True)


def generate_corpus(
    model: Any, tokenizer: Any, target_bytes: int, sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Documents (kind, segments, complete) until their text holds `target_bytes` bytes.

    An answer that runs in circles, or is nearly empty, is dropped.
    """
    size = 0
    for batch in prompt_batches(sampling):
        for document in answer_batch(model, tokenizer, batch, sampling):
            size += sum(len(segment["text"].encode("utf-8")) for segment in document["segments"])
            yield document
        if size >= target_bytes:
            return
    raise UserError(f"the prompts are used up after {size} bytes", "ask for less, or add prompts")


def prompt_batches(sampling: Sampling) -> list[list[tuple[str, str]]]:
    """All prompts in the batches they are answered in; a batch's text depends on no other batch."""
    pending = prompts(sampling.seed)
    return [
        pending[start : start + sampling.batch_size]
        for start in range(0, len(pending), sampling.batch_size)
    ]


def answer_batch(
    model: Any, tokenizer: Any, batch: Sequence[tuple[str, str]], sampling: Sampling
) -> list[dict[str, Any]]:
    """The documents of one batch of (kind, prompt)."""
    found = answers(model, tokenizer, [text for _, text in batch], sampling)
    return [
        _document(kind, question, answer.strip(), complete=ended)
        for (kind, question), (answer, ended) in zip(batch, found, strict=True)
        if len(answer.strip()) >= 80 and not _repeats(answer)
    ]


def _document(kind: str, question: str, answer: str, *, complete: bool) -> dict[str, Any]:
    segments = [
        {"text": question, "role": "user", "supervised": False},
        {"text": answer, "role": "assistant", "supervised": True},
    ]
    return {"kind": kind, "segments": segments, "complete": complete}


def _repeats(text: str) -> bool:
    """Whether some run of eight words occurs three times or more."""
    words = text.split()
    runs = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    return bool(runs) and max(map(runs.count, set(runs))) >= 3


def write_corpus(
    path: Path, documents: Sequence[dict[str, Any]], author: str, sampling: Sampling
) -> None:
    """Documents as gzipped JSONL, byte for byte the same for the same documents.

    Beside it, `NAME.json` records the author (a model reference), the sampling and the size.
    """
    texts = [segment["text"] for document in documents for segment in document["segments"]]
    record = {
        "author": author,
        "prompts": PROMPTS.name,
        "sampling": {**asdict(sampling), "precision": "bfloat16"},
        "documents": len(documents),
        "bytes": sum(len(text.encode("utf-8")) for text in texts),
    }
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    atomic.write_bytes(path, gzip.compress(lines.encode("utf-8"), mtime=0))
    beside = path.with_name(path.name.removesuffix(".gz").removesuffix(".jsonl") + ".json")
    atomic.write_bytes(beside, (json.dumps(record, indent=1) + "\n").encode())
