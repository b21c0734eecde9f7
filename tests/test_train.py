"""The training loop: same trajectories however a batch is split, resume, schedule, failures."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness_setup import (
    IDS,
    METHODS,
    documents,
    float64,
    float64_side,
    llama_side,
    parameters_of,
    run_spec,
    setting_of,
    train_once,
)
from torch import Tensor, nn

from ctdbench.distill import checkpoint, sources, train
from ctdbench.distill import setting as setup
from ctdbench.distill.corpus import Corpus
from ctdbench.distill.examples import build_examples
from ctdbench.errors import RunError, UserError
from ctdbench.method import Block, Method, MethodOptions, Needs, PairInfo, Term, Trainable

TIMES = {"seconds"}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Every step's line, without how long it took."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in lines
    ]


@pytest.mark.parametrize(("name", "options"), METHODS, ids=IDS)
@float64()
def test_micro_batches_change_no_trajectory(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """1 x accumulate 8 = 8 x 1 = those of like length, over several optimiser steps."""
    losses, ends = [], []
    for size, rows in ((8, 512), (1, 8), (None, 64)):
        folder = tmp_path / str(size)
        spec = run_spec(name, options, micro_batch=size, block_rows=rows)
        network, report = train_once(spec, folder, float64_side("student"), float64_side("teacher"))
        assert report.steps >= 3
        losses.append([line["loss"] for line in metrics(folder)])
        ends.append(parameters_of(network))
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)
    for other, end in zip(losses[1:], ends[1:], strict=True):
        assert other == pytest.approx(losses[0], rel=1e-6)
        for key, value in end.items():
            torch.testing.assert_close(value, ends[0][key], rtol=0, atol=5e-6, msg=key)


# --- checkpoints ---


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    own = train.MetricsFile.write

    def write(self: Any, values: dict[str, Any]) -> None:
        own(self, values)
        if values["step"] == step:
            raise Killed

    monkeypatch.setattr(train.MetricsFile, "write", write)


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are taken from here on."""
    own, taken = train.schedule, list[int]()

    def schedule(step: int, steps: int, warmup: float) -> float:
        taken.append(step)
        return own(step, steps, warmup)

    monkeypatch.setattr(train, "schedule", schedule)
    return taken


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_killed_run_resumes_to_the_same_bits(
    lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lora": lora, "batch_documents": 2, "checkpoint_every": 2}
    spec = run_spec("bld", **settings)
    whole, report = train_once(spec, tmp_path / "whole")
    assert report.steps > 6
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            train_once(spec, tmp_path / "killed")
    assert len(metrics(tmp_path / "killed")) == 5
    kept = sorted((tmp_path / "killed" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-0000002", "step-0000004"]
    taken = record_steps(monkeypatch)
    resumed, again = train_once(spec, tmp_path / "killed")
    assert taken == list(range(4, report.steps))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert (again.steps, again.student_tokens, again.flops) == (
        report.steps,
        report.student_tokens,
        report.flops,
    )
    expected = parameters_of(whole)
    for key, value in parameters_of(resumed).items():
        assert torch.equal(value, expected[key]), key


def two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Path]]:
    spec = run_spec("bld", batch_documents=2, checkpoint_every=1)
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            train_once(spec, tmp_path)
    return spec, sorted((tmp_path / "checkpoints").iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_truncated_newest_checkpoint_falls_back(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, kept = two_checkpoints(tmp_path / "broken", monkeypatch)
    assert [path.name for path in kept] == ["step-0000002", "step-0000003"]
    truncate(kept[1] / file)
    network, _ = train_once(spec, tmp_path / "broken")
    whole, _ = train_once(spec, tmp_path / "whole")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    expected = parameters_of(whole)
    assert all(torch.equal(value, expected[k]) for k, value in parameters_of(network).items())


def test_a_fallback_keeps_two_checkpoints(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    for step in (50, 100):
        checkpoint.save(tmp_path, network, optimizer, {"step": step})
    truncate(tmp_path / "step-0000100" / "state.json")
    assert checkpoint.load(tmp_path, network, optimizer) == {"step": 50}
    checkpoint.save(tmp_path, network, optimizer, {"step": 60})
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["step-0000050", "step-0000060"]


def test_no_readable_checkpoint_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, kept = two_checkpoints(tmp_path, monkeypatch)
    for path in kept:
        truncate(path / "tensors.safetensors")
    with pytest.raises(RunError, match="step-0000003 cannot be read") as caught:
        train_once(spec, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = two_checkpoints(tmp_path, monkeypatch)
    wider = llama_side("student", hidden_size=48, num_attention_heads=2)
    with pytest.raises(RunError, match="cannot be read"):
        train_once(spec, tmp_path, student=wider)


def test_checkpoints_hold_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, kept = two_checkpoints(tmp_path, monkeypatch)
    for folder in kept:
        assert {path.name for path in folder.iterdir()} == {"tensors.safetensors", "state.json"}
        data = (folder / "tensors.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        names = json.loads(data[8 : 8 + size])
        assert any(name.startswith("exp_avg_sq:extra.heads") for name in names)
        json.loads((folder / "state.json").read_text())


def test_a_killed_save_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = run_spec("sft", batch_documents=2, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train_once(spec, tmp_path)
    assert checkpoint._all(tmp_path / "checkpoints") == []
    train_once(spec, tmp_path)


# --- what a method may do ---


class Custom(Method):
    """A method whose terms are given by a subclass; it asks for nothing."""

    def __init__(self) -> None:
        super().__init__(MethodOptions())

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logits=False, hidden=True)

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        hidden = block.student.hidden
        assert hidden is not None
        return {"own": Term(self.total(hidden), block.student.supervised.sum())}

    def total(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class Noisy(Custom):
    """Draws at random, as dropout would."""

    def total(self, hidden: Tensor) -> Tensor:
        return (hidden * torch.rand(hidden.shape)).square().sum()


class NotANumber(Custom):
    def total(self, hidden: Tensor) -> Tensor:
        return hidden.sum() * torch.nan


class InfiniteGradient(Custom):
    def total(self, hidden: Tensor) -> Tensor:
        return (hidden - hidden.detach()).abs().sqrt().sum()


class OwnRate(Custom):
    def modules(self, pair: PairInfo) -> dict[str, Trainable]:
        return {"scale": Trainable(nn.Linear(pair.student_width, 1), learning_rate=0.5)}

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        total = modules["scale"](block.student.hidden).square().sum()
        return {"own": Term(total, block.student.supervised.sum())}


def train_custom(method: Method, folder: Path, **settings: Any) -> train.Network:
    spec = run_spec("sft", batch_documents=2, **settings)
    setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
    own = setup.Setting(setting.student, setting.teacher, method, setting.tables, setting.corpus)
    return train.train(spec, own, folder, Accelerator(cpu=True), progress=False)[0]


def test_a_method_that_draws_at_random_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_custom(Noisy(), tmp_path / "whole", checkpoint_every=2)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            train_custom(Noisy(), tmp_path / "killed", checkpoint_every=2)
    torch.rand(7)
    resumed = train_custom(Noisy(), tmp_path / "killed", checkpoint_every=2)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    expected = parameters_of(whole)
    assert all(torch.equal(value, expected[k]) for k, value in parameters_of(resumed).items())


@pytest.mark.parametrize(
    ("method", "what"), [(NotANumber(), "loss"), (InfiniteGradient(), "gradient")]
)
def test_what_is_not_finite_stops_the_run(method: Method, what: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"the {what} is not finite") as caught:
        train_custom(method, tmp_path, checkpoint_every=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def test_modules_have_their_own_rate_and_clipping(tmp_path: Path) -> None:
    spec = run_spec("sft")
    setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
    own = setup.Setting(setting.student, setting.teacher, OwnRate(), setting.tables, setting.corpus)
    network, optimizer = setup.build_network(spec, own)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(network.parameters()))
    assert {rates[id(p)] for p in network.extra["scale"].parameters()} == {0.5}
    assert {rates[id(p)] for p in network.model.parameters()} == {1e-2}
    train_custom(OwnRate(), tmp_path)


def test_embeddings_of_a_new_tokenizer_learn_faster() -> None:
    spec = run_spec("sft", lora=True)
    moved = spec.pair.student.model_copy(update={"tokenizer": "tiny:teacher"})
    spec = spec.model_copy(update={"pair": spec.pair.model_copy(update={"student": moved})})
    student = llama_side("student", tie_word_embeddings=True)
    _, optimizer = setup.build_network(spec, setting_of(spec, student, llama_side("teacher")))
    body, tables = optimizer.param_groups
    assert tables["lr"] == pytest.approx(10 * body["lr"])
    assert [p is student.model.get_input_embeddings().weight for p in tables["params"]] == [True]


# --- schedule, seeds, corpus ---


def test_the_rate_rises_then_falls_and_is_never_zero() -> None:
    for steps, warmup in ((1, 0.1), (10, 0.1), (50, 0.3), (7, 0.0)):
        rates = [train.schedule(step, steps, warmup) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        top = rates.index(max(rates))
        assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
        if steps > 1:
            assert max(rates) == 1
            assert top == math.ceil(steps * warmup)


def test_a_start_does_not_depend_on_what_ran_before() -> None:
    starts = []
    for _ in range(2):
        torch.rand(5)
        spec = run_spec("bld", lora=True)
        setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
        starts.append(parameters_of(setup.build_network(spec, setting)[0]))
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items())


def test_a_corpus_that_leaves_nothing_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    spec = run_spec("sft")
    setting = setting_of(spec, llama_side("student"), llama_side("teacher"))
    silent = tuple(
        type(document)(tuple(type(part)(part.text, "user", False) for part in document.segments))
        for document in documents(60)
    )
    own = setup.Setting(
        setting.student,
        setting.teacher,
        setting.method,
        setting.tables,
        Corpus("c", silent, (), {}),
    )
    with pytest.raises(UserError, match="no chunk that both sides predict"):
        train.train(spec, own, tmp_path, Accelerator(cpu=True), progress=False)


def test_the_report_counts_what_was_trained_on(tmp_path: Path) -> None:
    network, report = train_once(run_spec("uld"), tmp_path)
    assert report.text_bytes >= 2000
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, report.steps + 1))
    assert lines[-1]["text_bytes"] == report.text_bytes
    assert set(lines[0]) >= {"loss", "ce", "uld"}
    size = sum(p.numel() for p in network.model.parameters())
    assert report.flops > 6 * size * report.student_tokens


@pytest.mark.parametrize(
    ("method", "taught"), [("sft", False), ("seqkd", True), ("uld", True), ("bld", True)]
)
def test_only_the_teachers_tokens_are_counted_as_such(
    method: str, taught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = (documents(48), {})
    monkeypatch.setattr(sources, "teacher_documents", lambda *_, **__: texts)
    _, report = train_once(run_spec(method), tmp_path)
    found, _ = build_examples(documents(48), llama_side("student"), llama_side("teacher"))
    own, teachers = (
        sum(len(side.chunk) for side in sides)
        for sides in zip(*((each.student, each.teacher) for each in found), strict=True)
    )
    assert report.student_tokens > 0
    assert (report.teacher_tokens > 0) == taught
    if method == "seqkd":  # all of the text that the teacher wrote
        assert (report.student_tokens, report.teacher_tokens) == (own, teachers)


def test_a_resumed_run_knows_the_memory_that_was_taken_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = run_spec("sft", batch_documents=2, checkpoint_every=2)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        patch.setattr(train, "peak_memory", lambda: 10**15)
        with pytest.raises(Killed):
            train_once(spec, tmp_path)
    monkeypatch.setattr(train, "peak_memory", lambda: 10**3)
    _, report = train_once(spec, tmp_path)
    assert report.peak_memory_bytes == 10**15


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone can reset it")
def test_peak_memory_is_that_since_the_reset() -> None:
    train.reset_peak_memory()
    with mmap.mmap(-1, 500_000_000) as held:  # no memory that the process had kept from before
        held.write(bytes(500_000_000))
        peak = train.peak_memory()
    train.reset_peak_memory()
    assert train.peak_memory() < peak - 400_000_000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone has it")
def test_peak_memory_leaves_out_what_was_freed_before() -> None:
    train.reset_peak_memory()
    held = [b"x" * 100_000 for _ in range(3000)]  # each too small for a mapping of its own
    pin = b"x" * 100_000  # behind it nothing is given back by itself
    before = train.peak_memory()
    del held
    train.reset_peak_memory()
    assert train.peak_memory() < before - 250_000_000
    assert len(pin) == 100_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells it")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    code = "from ctdbench.distill.train import peak_memory; print(peak_memory())"
    with mmap.mmap(-1, 1_500_000_000) as held:
        held.write(bytes(1_500_000_000))
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 50_000_000 < int(found.stdout) < 1_500_000_000
