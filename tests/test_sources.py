"""What a run trains on: the teacher's text, and what the student writes while it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness_setup import (
    guides_of,
    llama_side,
    parameters_of,
    run_spec,
    setting_of,
    teacher_of,
    train_once,
)
from torch import Tensor

from ctdbench import registry
from ctdbench.distill import rollouts, sources, train
from ctdbench.distill import setting as setup
from ctdbench.distill.corpus import Corpus, Document, Segment, shuffled
from ctdbench.distill.sources import OnPolicy, training_examples
from ctdbench.errors import UserError
from ctdbench.labels import row_label
from ctdbench.method import create

SHORT = {"generated_tokens": 6, "prompt_bytes": 12, "budget": 700}
TALKATIVE = {"generated_tokens": 40, "prompt_bytes": 12, "budget": 60}
Continued = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path / "cache"))


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / train.METRICS).read_text().splitlines()]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_seqkd_trains_on_what_the_teacher_writes(tmp_path: Path) -> None:
    spec = run_spec("seqkd", **TALKATIVE)
    setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
    parts = (spec, setting.corpus, setting.method, setting.student, setting.teachers)
    examples, _ = training_examples(*parts, Accelerator(cpu=True), progress=False)
    order = shuffled(setting.corpus, 0)
    heads = [rollouts.prompt(document, 12).text for document in order]
    sizes = [len(example.text) for example in examples]
    assert sum(sizes[:-1]) < spec.train.budget <= sum(sizes)  # bytes of what the teacher wrote
    written = [example.document for example in examples]
    assert all(document.text.startswith(tuple(heads)) for document in written)
    assert not {d.text for d in written} & {d.text for d in order}
    assert all(d.segments[-1].supervised and not d.segments[0].supervised for d in written)
    _, report = train_once(spec, tmp_path / "run")
    assert report.text_bytes == sum(len(example.text) for example in examples)


def test_a_teacher_that_cannot_fill_the_budget_is_told(tmp_path: Path) -> None:
    spec = run_spec("seqkd", **{**SHORT, "budget": 10**6})
    with pytest.raises(UserError, match=r"train.budget: the teacher wrote \d+ bytes"):
        train_once(spec, tmp_path)


def test_the_student_writes_its_share_of_the_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    real: Continued = rollouts.continued

    def counted(side: Any, prompts: Any, *rest: Any, stream: str, **options: Any) -> list[Any]:
        asked.append((stream, len(prompts)))
        return real(side, prompts, *rest, stream=stream, **options)

    monkeypatch.setattr(sources.rollouts, "continued", counted)
    _, none = train_once(run_spec("gold", **SHORT), tmp_path / "none")
    assert not asked
    assert none.generated == {}
    _, every = train_once(run_spec("gold", on_policy=1.0, **SHORT), tmp_path / "all")
    assert [stream for stream, _ in asked] == [f"step {n}" for n in range(every.steps)]
    documents = sum(count for _, count in asked)
    assert sum(every.generated.values()) == documents
    assert every.generated["on-policy"] > documents / 2
    assert every.text_bytes != none.text_bytes  # what was read, not what the corpus holds
    asked.clear()
    _, some = train_once(run_spec("gold", on_policy=0.4, **SHORT), tmp_path / "some")
    assert 0 < sum(some.generated.values()) < documents


def test_the_training_student_writes_and_not_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's text comes from the weights of that step."""
    heads: list[Tensor] = []
    real: Continued = rollouts.continued

    def seen(side: Any, *rest: Any, **options: Any) -> list[Any]:
        heads.append(side.model.get_output_embeddings().weight.detach().clone())
        return real(side, *rest, **options)

    monkeypatch.setattr(sources.rollouts, "continued", seen)
    for lora in (False, True):
        heads.clear()
        train_once(run_spec("sft", lora=lora, on_policy=1.0, **SHORT), tmp_path / str(lora))
        assert len(heads) > 1
        assert not torch.equal(heads[0], heads[-1])


def test_a_killed_on_policy_run_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = run_spec("strict", on_policy=0.7, checkpoint_every=1, **{**SHORT, "budget": 1500})
    whole, wanted = train_once(spec, tmp_path / "whole")
    expected = parameters_of(whole)
    stop = setup.derived_seed("step", spec.seed, 1)
    real = torch.manual_seed

    def killed(seed: int) -> Any:
        if seed == stop:
            raise KeyboardInterrupt
        return real(seed)

    monkeypatch.setattr(torch, "manual_seed", killed)
    with pytest.raises(KeyboardInterrupt):
        train_once(spec, tmp_path / "cut")
    monkeypatch.setattr(torch, "manual_seed", real)
    again, report = train_once(spec, tmp_path / "cut")
    assert report.generated == wanted.generated
    assert equal(parameters_of(again), expected)
    assert [line["loss"] for line in losses(tmp_path / "cut")] == [
        line["loss"] for line in losses(tmp_path / "whole")
    ]


def test_an_answer_that_cannot_be_used_leaves_the_corpuss_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = run_spec("sft", on_policy=1.0, **SHORT)
    setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
    parts = (spec, setting.corpus, setting.method, setting.student, setting.teachers)
    examples, _ = training_examples(*parts, Accelerator(cpu=True), progress=False)
    monkeypatch.setattr(
        sources.rollouts, "continued", lambda side, prompts, *rest, **_: [None] * len(prompts)
    )
    writer = OnPolicy.of(
        spec, setting.student, setting.student.model, setting.teachers, torch.device("cpu")
    )
    assert writer.examples(examples[:3], 0) == (examples[:3], {"on-policy without text": 3})
    monkeypatch.undo()
    monkeypatch.setattr(writer.teachers[0].model.config, "max_position_embeddings", 4)
    found = writer.examples(examples[:3], 0)
    assert found == (examples[:3], {"on-policy longer than a model's positions": 3})


def test_a_piece_within_an_answer_goes_on_or_stays() -> None:
    tail = Document((Segment("the answer goes on for a while", "assistant"),))
    given = rollouts.prompt(tail, 12)
    answer = rollouts._answer(" and on", given)
    assert Document((*given.segments, answer)).text == "the answer and on"
    assert answer.role == "assistant"
    plain = run_spec("sft", on_policy=1.0, **SHORT)
    chat = run_spec("sft", on_policy=1.0, template="chat", **SHORT)
    setting = setting_of(plain, llama_side("student"), llama_side("teacher"))
    for spec, chosen in ((plain, True), (chat, False)):
        parts = (spec, setting.student, setting.student.model, setting.teachers)
        assert OnPolicy.of(*parts, torch.device("cpu"))._is_chosen(tail) == chosen


def test_the_teachers_prompts_are_whole_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of pieces, and though cutting loses the newlines between segments."""
    question = Segment("What is it?", "user", supervised=False)
    answers = [Segment(f"{n} " + "word " * 40, "assistant") for n in range(4)]
    corpus = Corpus("qa", tuple(Document((question, answer)) for answer in answers), (), {})
    spec = run_spec("seqkd", document_bytes=64, **TALKATIVE)
    setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
    asked: list[Document] = []

    def written(side: Any, prompts: Any, *rest: Any, **_: Any) -> Any:
        asked.extend(prompts)
        return [Document((question, answers[0]))], {}

    monkeypatch.setattr(sources.rollouts, "teacher_text", written)
    parts = (spec, corpus, setting.teacher)
    found, counts = sources.teacher_documents(*parts, progress=False)
    assert [document.text for document in asked] == ["What is it?"]
    assert counts == {"prompt that another document has": 3}
    assert max(document.size for document in found) <= 64


def test_several_teachers_read_what_the_student_writes(tmp_path: Path) -> None:
    student = llama_side("student", tie_word_embeddings=True)
    spec = run_spec("p-kl", {"vocab_topk": 64}, on_policy=1.0, **SHORT)
    setting = setting_of(spec, student, llama_side("teacher"))
    second = llama_side("student")
    setting = replace(setting, others=guides_of(student, [second], [0.5]))
    _, report = train.train(spec, setting, tmp_path, Accelerator(cpu=True), progress=False)
    lines = losses(tmp_path)
    assert {"kl", "kl@2", "weight kl@2"} <= lines[0].keys()
    assert report.teacher_tokens > report.student_tokens
    assert len(setting.teachers) == 2


def test_rows_say_who_wrote_the_text() -> None:
    def label(method: str, **settings: Any) -> str:
        spec = run_spec(method, **settings).model_dump(mode="json")
        return row_label(spec, registry.methods())

    assert label("gold") == "gold (off-policy)"
    assert label("gold", on_policy=0.5) == "gold (on-policy 0.5)"
    assert label("uld") == "uld"
    assert label("uld", on_policy=0.5) == "uld on_policy=0.5"
    assert label("p-kl", balance="fixed") == "p-kl balance=fixed"


def test_a_learned_projection_is_kept_with_the_cell(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    spec = run_spec("p-kl", {"projection": "learned", "vocab_topk": 64}, budget=400)
    student = llama_side("student")
    setting = setting_of(spec, student, llama_side("teacher"))
    network, report = train.train(spec, setting, tmp_path, Accelerator(cpu=True), progress=False)
    setup.save_modules(spec, setting, network, tmp_path)
    assert 0 < report.setup["projection"]["mass"] <= 1
    assert report.setup["balance"] == "ratio"
    assert report.setup["rendering"] == {"student": "plain", "teacher": "plain"}
    kept = load_file(tmp_path / setup.MODULES)
    assert list(kept) == ["projection.log_weights"]
    start = create("p-kl", spec.options).modules(
        setup.PairInfo(student.width, setting.teacher.side.width, setting.tables)
    )["projection"]
    assert not torch.equal(kept["projection.log_weights"], start.module.log_weights)
    assert teacher_of(setting.teacher.side).columns == setting.teacher.columns


def test_modules_that_are_dropped_are_not_saved(tmp_path: Path) -> None:
    spec = run_spec("bld", {"bytes": "path"}, budget=400)
    setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
    network, _ = train.train(spec, setting, tmp_path, Accelerator(cpu=True), progress=False)
    setup.save_modules(spec, setting, network, tmp_path)
    assert not (tmp_path / setup.MODULES).exists()
