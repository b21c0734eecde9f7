"""The teacher's text: made once, resumed after an interruption, made again where it is broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from writing_sides import (
    PROMPTS,
    QUESTIONS,
    SHORT,
    eos,
    question,
    scripted,
    side,
)

from ctdbench.distill import rollouts
from ctdbench.distill.corpus import load_corpus
from ctdbench.distill.models import Side
from ctdbench.distill.rollouts import continued, teacher_text


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path))
    return tmp_path / "generated"


@dataclass
class Log:
    """The prompts that a model was given, in order; `stop` interrupts it after so many."""

    texts: list[str]
    stop: int = 99


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log, original = Log([]), rollouts._Author.written

    def written(self: Any, model: Any, openings: Any, texts: Sequence[str]) -> Any:
        if len(log.texts) >= log.stop:
            raise KeyboardInterrupt
        log.texts.extend(texts)
        return original(self, model, openings, texts)

    monkeypatch.setattr(rollouts._Author, "written", written)
    return log


TEACHER = replace(SHORT, batch_size=2, max_new_tokens=16, seed=4)


def written_by(own: Side, texts: Sequence[str] = QUESTIONS, **changed: Any) -> Any:
    settings = {"template": "plain", "identity": "me", "decoding": TEACHER, **changed}
    return teacher_text(own, [question(text) for text in texts], **settings)


def test_the_teachers_text_is_made_once(cache: Path, log: Log) -> None:
    first, skipped = written_by(side())
    assert sorted(log.texts) == sorted(QUESTIONS)
    made = continued(side(), PROMPTS, TEACHER, template="plain", stream="teacher")
    assert first == [document for document in made if document]
    assert skipped == {"no answer by the teacher": 5 - len(first)}
    log.texts.clear()
    assert written_by(side()) == (first, skipped)
    assert written_by(side(), QUESTIONS[:1])[0] == first[:1]
    assert log.texts == []
    written_by(side(), [*QUESTIONS, "One more?"])
    assert log.texts == ["One more?"]


def test_the_cache_says_how_it_was_made_and_is_a_corpus(cache: Path) -> None:
    documents, _ = written_by(side())
    (folder,) = cache.iterdir()
    assert json.loads((folder / "settings.json").read_text()) == {
        "format": rollouts.FORMAT_VERSION,
        "teacher": "me",
        "template": "plain",
        "rendering": "plain",
        "precision": "float32",
        "decoding": {"seed": 4, "temperature": 1.0, "top_k": 0, "max_new_tokens": 16},
    }
    corpus = load_corpus(f"jsonl:{folder}")
    assert set(corpus.train + corpus.held_out) == set(documents)


def test_what_changes_a_text_has_a_folder_of_its_own(cache: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"identity": "you"},
        {"template": "chat"},
        {"precision": "bfloat16"},
        {"decoding": replace(TEACHER, seed=5)},
        {"decoding": replace(TEACHER, top_k=3)},
        {"decoding": replace(TEACHER, temperature=0.5)},
        {"decoding": replace(TEACHER, max_new_tokens=7)},
    ]
    for count, change in enumerate([{}, *changes], start=1):
        written_by(side(), QUESTIONS[-1:], **change)
        assert len(list(cache.iterdir())) == count
    written_by(side(), QUESTIONS[-1:], decoding=replace(TEACHER, batch_size=9))
    assert len(list(cache.iterdir())) == count


def test_an_interrupted_generation_goes_on(
    cache: Path, log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log.stop = 4
    with pytest.raises(KeyboardInterrupt):
        written_by(side())
    assert len(log.texts) == 4
    log.stop = 99
    found = written_by(side())
    assert sorted(log.texts) == sorted(QUESTIONS)  # each of them once
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "other"))
    assert written_by(side()) == found


@pytest.mark.parametrize("harm", ["truncated", "garbage", "edited", "empty", "foreign"])
def test_a_broken_shard_is_made_again(cache: Path, log: Log, harm: str) -> None:
    expected = written_by(side())
    shards = sorted(cache.glob("*/*.jsonl"))
    assert len(shards) == 3
    data = shards[0].read_bytes()
    lost = [json.loads(line)["segments"][0]["text"] for line in data.splitlines()]
    row = json.loads(data.splitlines()[-1])
    row["segments"][-1]["text"] += "!"
    broken = {
        "truncated": data[: len(data) - 20],
        "garbage": b"\xff\x00{" * 9,
        "edited": data.splitlines()[0] + b"\n" + json.dumps(row).encode(),
        "empty": b"",
        "foreign": b'[1]\n3\n{"segments": [{"colour": 1}], "complete": true}\n',
    }
    shards[0].write_bytes(broken[harm])
    log.texts.clear()
    assert written_by(side()) == expected
    assert log.texts == lost[-1 if harm in ("truncated", "edited") else 0 :]
    log.texts.clear()
    assert written_by(side()) == expected
    assert log.texts == []


def test_documents_without_an_answer_are_counted_and_not_asked_for_again(
    cache: Path, log: Log
) -> None:
    silent = scripted(side(), eos(side()))
    expected: Any = ([], {"no answer by the teacher": 5, "prompt that another document has": 1})
    assert written_by(silent, [*QUESTIONS, QUESTIONS[0]]) == expected
    log.texts.clear()
    assert written_by(silent, [*QUESTIONS, QUESTIONS[0]]) == expected
    assert log.texts == []


def test_progress_is_shown_with_throughput(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written_by(side())
    assert capfd.readouterr().err == ""
    written_by(side(), [*QUESTIONS, "One more?"], progress=True)
    shown = capfd.readouterr().err
    assert "6/6" in shown
    assert "tok/s" in shown
