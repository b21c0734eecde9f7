"""`inspect`: what it finds on the tiny pair and on real tokenizers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from wheel_tokenizers import wheel_file

from ctdbench import registry
from ctdbench.distill import inspection, models, tiny
from ctdbench.distill.inspection import inspect_pair
from ctdbench.errors import PreflightError, UserError
from ctdbench.report.inspection import WIDTH, render_inspection
from ctdbench.spec import PairSpec
from ctdbench.text.diagnostics import Findings
from ctdbench.text.token_bytes import TokenBytes

TINY = registry.load_pair("tiny")
TEXT = "How many apples do 12 boys have?\nEvery boy has 3 apples, so 12 x 3 = 36 apples.\n"


@pytest.fixture(scope="module")
def found() -> Findings:
    """The tiny pair on some of the embedded text."""
    return inspect_pair(TINY, size=4000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def no_model(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a model was loaded")


def test_only_tokenizers_are_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", no_model)
    (teacher,) = inspect_pair(TINY, file).teachers
    assert teacher.probability is None
    with pytest.raises(AssertionError, match="a model was loaded"):
        inspect_pair(TINY, file, load_models=True)


def test_the_numbers_are_the_tokenizers_own(file: Path) -> None:
    (teacher,) = inspect_pair(TINY, file).teachers
    sides = [TokenBytes(tiny.make_tokenizer(tiny.SIZES[name][0])) for name in tiny.SIZES]
    own, taught = (side.encode(TEXT) for side in sides)
    assert (teacher.text.documents, teacher.text.bytes) == (1, len(TEXT))
    assert teacher.text.student_tokens == len(own.ids)
    assert teacher.text.teacher_tokens == len(taught.ids)
    assert teacher.chunks.chunks == len({*own.byte_end.tolist()} & {*taught.byte_end.tolist()})
    student, other = (set(side.vocabulary) - {b""} for side in sides)
    assert sum(part.common for part in teacher.vocabulary.values()) == len(student & other)
    assert sum(part.teacher_only for part in teacher.vocabulary.values()) == len(other - student)
    inside = [sides[1].vocabulary[token] in student for token in taught.ids]
    assert teacher.frequency.common == pytest.approx(np.mean(inside))
    assert teacher.frequency.common <= teacher.frequency.projected <= 1
    assert teacher.teacher_ids == len(sides[1].vocabulary)
    assert len(student & other) <= teacher.columns <= teacher.teacher_ids


def test_probability_is_the_models_mean_prediction(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "resolve", lambda *_: "float32")
    (teacher,) = inspect_pair(TINY, file, load_models=True).teachers
    tokenizer, model = (load("tiny:teacher") for load in (models.load_tokenizer, models.load_model))
    tokens = TokenBytes(tokenizer)
    student = TokenBytes(models.load_tokenizer("tiny:student"))
    ids = [tokenizer.bos_token_id, *tokens.encode(TEXT).ids, tokenizer.eos_token_id]
    with torch.no_grad():
        mean = model(torch.tensor([ids])).logits[0, :-1].softmax(-1).mean(0)
    roles = [getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")]
    own = {*student.vocabulary} - {b""}
    common = {i for i, token in enumerate(tokens.vocabulary) if token in own}
    expected = float(mean[sorted(common | {*roles})].sum())
    assert teacher.probability is not None
    assert teacher.probability.common == pytest.approx(expected, abs=1e-5)
    # Every token of this student is one of the teacher's, so W reaches the common ones alone.
    assert teacher.probability.projected == pytest.approx(expected, abs=1e-5)
    assert teacher.probability != teacher.frequency


def test_the_text_is_cut_as_a_run_cuts_it(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 40_000)
    (teacher,) = inspect_pair(TINY, path, size=100_000).teachers
    assert 100_000 <= teacher.text.bytes < 100_768
    assert teacher.text.documents == pytest.approx(100_000 / 768, rel=0.02)
    assert teacher.text.refusal == ""


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    rows = [{"text": "one apple"}, {"text": "two apples"}, {"text": "one apple"}, {"other": "no"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    (teacher,) = inspect_pair(TINY, path).teachers
    assert (teacher.text.documents, teacher.text.bytes) == (2, 19)


def test_every_teacher_has_findings_of_its_own(file: Path) -> None:
    pair = PairSpec.model_validate(
        {
            "name": "two",
            "student": {"model": "tiny:student"},
            "teachers": [{"model": "tiny:teacher"}, {"model": "tiny:student"}],
        }
    )
    first, second = inspect_pair(pair, file).teachers
    assert (first.teacher, second.teacher) == ("tiny:teacher", "tiny:student")
    assert first.chunks.one_to_one < 1
    assert second.chunks.one_to_one == second.chunks.one_to_one_bytes == 1
    assert second.frequency.common == pytest.approx(1)


def test_a_tokenizer_of_its_own_stands_for_the_models(file: Path) -> None:
    pair = PairSpec.model_validate(
        {
            "name": "bytes",
            "student": {"model": "tiny:student", "tokenizer": "bytes:256"},
            "teachers": [{"model": "tiny:teacher"}],
        }
    )
    findings = inspect_pair(pair, file)
    assert findings.student == "bytes:256"
    assert findings.teachers[0].text.student_tokens == len(TEXT)


def normalising(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's tokenizer composes characters, as Qwen's does."""
    load = models.load_tokenizer

    def loaded(reference: str, **trust: bool) -> Any:
        tokenizer = load(reference, **trust)
        if reference == "tiny:teacher":
            tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", loaded)


def test_documents_that_a_tokenizer_changes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalising(monkeypatch)
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("cafe\u0301", "tea")))
    findings = inspect_pair(TINY, path)
    text = findings.teachers[0].text
    assert (text.documents, text.refused_by_student, text.refused_by_teacher) == (1, 0, 1)
    shown = render_inspection(findings, "terminal")
    assert "documents refused: 0 by the student's tokenizer, 1 by the teacher's" in shown
    path.write_text(json.dumps({"text": "cafe\u0301"}))
    with pytest.raises(UserError, match="no document is spelled by both tokenizers"):
        inspect_pair(TINY, path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("absent.txt", None, "is no file"),
        ("empty.txt", b"", "is empty"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 at byte 3"),
        ("bad.jsonl", b"{", "no usable document"),
    ],
)
def test_a_text_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as raised:
        inspect_pair(TINY, tmp_path / name)
    assert name in str(raised.value)


def test_a_pair_that_cannot_be_had_fails_the_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PreflightError, match=r"meta-llama/.* is not in the local cache"):
        inspect_pair(registry.load_pair("llama-qwen"))


def test_json_holds_all_findings(found: Findings) -> None:
    data = json.loads(render_inspection(found, "json"))
    (teacher,) = data["teachers"]
    assert data["pair"] == "tiny"
    assert teacher["chunks"]["by_size"]["1:1"] > 0
    assert (
        teacher["vocabulary"]["digits"]["common"] == found.teachers[0].vocabulary["digits"].common
    )
    assert teacher["critical"][0] == {
        "name": "1-digit numerals",
        "possible": 10,
        "student": 10,
        "common": 10,
        "text_share": pytest.approx(found.teachers[0].critical[0].text_share),
        "audited": True,
    }
    assert teacher["recommendation"]["method"] == "h-kl"
    assert teacher["probability"] is None


def test_the_terminal_shows_the_same_in_columns(found: Findings) -> None:
    shown = render_inspection(found, "terminal")
    lines = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    (teacher,) = found.teachers
    assert max(map(len, shown.splitlines())) <= WIDTH
    counts = [teacher.text.student_tokens, teacher.text.teacher_tokens]
    assert lines["tokens"][1:] == [f"{count:,}" for count in counts]
    assert lines["1 of student"][3] == f"{100 * teacher.chunks.one_to_one:.1f}%"
    assert lines["1-digit numerals"][2:6] == ["10", "of", "10", "10"]
    assert lines["digits"][1:] == ["0", "9", "11"]
    assert "of X-Token's two losses: h-kl rather than p-kl, because" in shown
    reached = f"{teacher.columns:,} of {teacher.teacher_ids:,}"
    assert lines["teacher tokens that P-KL's projection reaches"][-3:] == reached.split()
    assert lines["token pairs of H-KL"][-1] == f"{teacher.relaxed_pairs:,}"
    assert "by probability" not in shown
    assert "documents refused" not in shown


def test_an_unknown_format_is_a_bad_request(found: Findings) -> None:
    with pytest.raises(UserError, match="did you mean json"):
        render_inspection(found, "jsno")


@pytest.mark.slow
def test_the_embedded_pair_shares_single_digits() -> None:
    for name in ("mistral", "smollm2"):
        wheel_file(name)  # skips where its wheel is not installed
    (teacher,) = inspect_pair(registry.load_pair("smol-mistral")).teachers
    numerals = teacher.critical[:3]
    assert [(found.student, found.common) for found in numerals] == [(10, 10), (0, 0), (0, 0)]
    assert teacher.chunks.one_to_one > 0.9
    assert teacher.text.refusal == ""
    assert teacher.recommendation.method == "h-kl"
    assert "CJK" in teacher.recommendation.reason
