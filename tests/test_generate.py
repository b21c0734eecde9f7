"""Generated text: prompts, sampling that depends on nothing but its batch, the embedded corpus."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ctdbench.distill import generate, models
from ctdbench.distill.corpus import EMBEDDED, load_corpus
from ctdbench.distill.generate import Sampling

SHORT = Sampling(max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return models.load_model("tiny:teacher"), models.load_tokenizer("tiny:teacher")


def test_prompts_are_distinct_and_interleaved() -> None:
    found = generate.prompts(0)
    assert len({text for _, text in found}) == len(found)
    assert len({kind for kind, _ in found[:6]}) == 6
    assert not [text for _, text in found if "{" in text]


def test_the_order_of_prompts_follows_the_seed() -> None:
    assert generate.prompts(0) == generate.prompts(0)
    assert generate.prompts(0)[:50] != generate.prompts(1)[:50]


def test_a_batch_is_the_same_whatever_was_generated_before(tiny: tuple[Any, Any]) -> None:
    questions = ["Why is the sky blue?", "What is 3 + 4?", "Tell a story."]
    first = generate.answers(*tiny, questions, SHORT)
    generate.answers(*tiny, ["Something else?"], SHORT)
    assert generate.answers(*tiny, questions, SHORT) == first
    other_seed = Sampling(seed=1, max_new_tokens=6, batch_size=3)
    assert generate.answers(*tiny, questions, other_seed) != first


def test_only_the_likeliest_tokens_are_drawn(tiny: tuple[Any, Any]) -> None:
    greedy = Sampling(top_k=1, max_new_tokens=6)
    drawn = generate.answers(*tiny, ["What is 3 + 4?"], greedy)
    model, tokenizer = tiny
    inputs = tokenizer(
        f"{tokenizer.bos_token}What is 3 + 4?\n", return_tensors="pt", add_special_tokens=False
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert drawn[0][0] == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_that_runs_in_circles_is_told() -> None:
    assert generate._repeats("one two three four five six seven eight " * 3)
    assert not generate._repeats("one two three four five six seven eight " * 2)


def test_the_same_documents_are_the_same_file(tmp_path: Path) -> None:
    documents = [{"kind": "k", "segments": [{"text": "höher"}], "complete": True}]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        generate.write_corpus(tmp_path / name, documents, "tiny:teacher", SHORT)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["bytes"] == 6
    assert record["sampling"]["seed"] == 0


def test_the_embedded_corpus_is_what_its_record_says() -> None:
    record = json.loads(EMBEDDED.with_name("corpus.json").read_text())
    rows = [json.loads(line) for line in gzip.decompress(EMBEDDED.read_bytes()).splitlines()]
    texts = [segment["text"] for row in rows for segment in row["segments"]]
    assert record["documents"] == len(rows)
    assert record["bytes"] == sum(len(text.encode()) for text in texts) >= 1_500_000
    assert min(Counter(row["kind"] for row in rows).values()) >= 25
    prompts = {text for _, text in generate.prompts(record["sampling"]["seed"])}
    assert {row["segments"][0]["text"] for row in rows} <= prompts
    corpus = load_corpus("embedded")
    assert corpus.skipped == {}
    assert 0.02 < len(corpus.held_out) / len(rows) < 0.09
