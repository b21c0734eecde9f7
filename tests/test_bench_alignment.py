"""Alignment's throughput: what is timed is what training does, on all of the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness_setup import tokenizer

from ctdbench.distill.models import Side
from ctdbench.distill.tokenizers import Specials
from ctdbench.launch.bench import alignment
from ctdbench.text.token_bytes import TokenBytes

TEXT = "the fox jumps over 42 naïve dogs\n" * 60


def side(name: str) -> Any:
    own = tokenizer(name)
    return Side(None, own, TokenBytes(own), Specials.of(own))


def test_every_size_is_measured_and_shown() -> None:
    found = alignment.alignment_throughput(
        side("student"), side("teacher"), TEXT, (100, 1_000), repeats=1
    )
    assert [row.document_bytes for row in found] == [100, 1_000]
    assert all(row.aligned > 0 and row.examples > 0 for row in found)
    rows = json.loads(alignment.render("tiny", found, "json"))["throughput"]
    assert rows[1]["examples"] == found[1].examples
    lines = alignment.render("tiny", found, "terminal").splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["100", "1,000"]


def test_all_of_the_text_is_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(alignment, "align", lambda *sides: ends.extend(side[-1] for side in sides))
    text = alignment._spelled([side("student"), side("teacher")], TEXT, 100)
    text.align()
    assert sum(ends) == 2 * len(TEXT.encode())
    assert text.size == len(TEXT.encode()) / 1e6
