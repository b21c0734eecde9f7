"""What `ctdbench bench` measures: functions in turns, memory, losses on made-up rows, steps."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ctdbench import registry, request
from ctdbench.cli import app
from ctdbench.distill.teacher import Teacher
from ctdbench.launch.bench import costs, end_to_end, inputs, losses
from ctdbench.launch.bench.measure import Timing, extra_peak_bytes, interleaved
from ctdbench.method import Method, MethodOptions, Needs, Term, create
from ctdbench.spec import RunSpec
from ctdbench.text.alignment import align

CPU = torch.device("cpu")
BARE = ("bare", "bare, micro-batches")
SIZES = (1500, 1100)
ROWS = 150
COLUMN = 1 << 24  # floats of 64 MiB: a kernel counts pages core by core and may be some MiB off
memory = pytest.mark.skipif(
    not (torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()),
    reason="Linux alone tells peak memory",
)


@pytest.fixture(scope="module")
def given() -> inputs.Inputs:
    return inputs.make_inputs(SIZES, ROWS, CPU)


# --- measure ----------------------------------------------------------------------------------


def test_functions_run_in_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert list(timings) == ["a", "b"]
    for timing in timings.values():
        assert 0 <= timing.low <= timing.median <= timing.high


def test_the_collector_rests_while_functions_are_timed_and_works_again_after() -> None:
    import gc

    seen: list[bool] = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, 2)
    assert seen == [False] * 3
    assert gc.isenabled()


def extra_peaks() -> tuple[int, int]:
    def peak() -> None:
        np.ones(COLUMN, np.float32)  # freed at once
        first, second = torch.ones(2 * COLUMN), np.ones(3 * COLUMN, np.float32)
        del first, second

    peak()
    held = torch.ones(COLUMN)  # does not count
    found = extra_peak_bytes(peak), extra_peak_bytes(lambda: None)
    del held
    return found


@memory
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator does not see NumPy")
def test_peak_memory_counts_torch_and_numpy_and_what_was_freed_meanwhile() -> None:
    # In a process of its own: after hundreds of other tests it once counted a block more.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        some, none = fresh.submit(extra_peaks).result()
    assert some == pytest.approx(5 * 4 * COLUMN, rel=0.02)
    assert none < 1 << 20


# --- the made-up rows ---------------------------------------------------------------------------


def test_inputs_have_the_sizes_asked_for(given: inputs.Inputs) -> None:
    for rows, size in zip((given.student, given.teacher), SIZES, strict=True):
        assert rows.scores().shape == (ROWS, size)
    vocabularies = given.tables.student_vocabulary, given.tables.teacher_vocabulary
    assert tuple(map(len, vocabularies)) == SIZES
    for vocabulary in vocabularies:
        filled = [token for token in vocabulary if token]
        assert len(set(filled)) == len(filled)
        assert {bytes([value]) for value in range(256)} <= set(filled)
    assert len(given.tables.shared) == min(SIZES) // 2 + 256 + 2


def test_both_sides_spell_the_same_documents_in_chunks_that_alignment_finds(
    given: inputs.Inputs,
) -> None:
    batch, spelled = given.batch, []
    vocabularies = given.tables.student_vocabulary, given.tables.teacher_vocabulary
    for rows, vocabulary in zip((given.student, given.teacher), vocabularies, strict=True):
        texts = [b"", b""]
        for token, document in zip(rows.token.tolist(), rows.document.tolist(), strict=True):
            texts[document] += vocabulary[token]
        spelled.append(texts)
    assert spelled[0] == spelled[1] == list(batch.texts)
    sizes = torch.stack(
        [torch.bincount(rows.chunk, minlength=1) for rows in (given.student, given.teacher)]
    )
    assert set(map(tuple, sizes.T.tolist())) == {(1, 1), (1, 2), (2, 1), (1, 3), (3, 1)}
    first = [rows.document == 0 for rows in (given.student, given.teacher)]
    ends = [
        rows.byte_end[mask][:-1].numpy()  # the end token has no bytes
        for rows, mask in zip((given.student, given.teacher), first, strict=True)
    ]
    found = align(*ends)
    assert found.student_chunk.tolist() == given.student.chunk[first[0]][:-1].tolist()
    assert found.teacher_chunk.tolist() == given.teacher.chunk[first[1]][:-1].tolist()


def test_one_vocabulary_is_the_students_on_both_sides() -> None:
    made = inputs.make_inputs(SIZES, 10, CPU, one_vocabulary=True)
    assert made.tables.student_vocabulary == made.tables.teacher_vocabulary
    assert torch.equal(made.student.token, made.teacher.token)
    assert made.teacher.scores().shape == (10, SIZES[0])


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_every_methods_loss_has_a_gradient(name: str, given: inputs.Inputs) -> None:
    method = create(name)
    if losses.refusal(method, given.tables):
        given = inputs.make_inputs(SIZES, ROWS, CPU, one_vocabulary=True)
    loss = losses.method_loss(method, given, "float32")
    loss.forward()
    assert loss.value is not None
    assert torch.isfinite(loss.value)
    (slope,) = torch.autograd.grad(loss.value, given.student.scores(), retain_graph=True)
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0
    loss.backward()
    assert loss.value is None


class Whole(Method):
    """Looks at the blocks that it gets."""

    def terms(self, block, modules):  # type: ignore[no-untyped-def]
        self.block = block
        return {"zero": Term(block.student.scores().sum() * 0, torch.tensor(1))}


def test_a_block_holds_all_rows_and_what_the_method_asks_for(given: inputs.Inputs) -> None:
    method = Whole(MethodOptions())
    losses.method_loss(method, given, "float32").forward()
    block = method.block
    assert block.chunks == int(block.document_chunks.sum()) == int(given.student.chunk.max()) + 1
    assert block.pairs is None
    assert block.bytes is None
    taught = losses.make_block(create("bld"), given)
    assert taught.teacher is None
    assert taught.bytes is not None
    assert taught.bytes.shape == (given.batch.size, 257)
    torch.testing.assert_close(taught.bytes.sum(1), torch.ones(given.batch.size))
    paired = losses.make_block(create("uld"), given)
    assert paired.pairs is not None
    assert len(paired.pairs) == int(paired.document_chunks.sum())


@memory
def test_losses_are_measured_by_ratio_and_one_vocabulary_against_its_own_bare_cost() -> None:
    found = losses.bench_losses(["kd", "uld"], SIZES, 20, repeats=1)
    by_name = {cost.name: cost for cost in found.costs}
    assert by_name.keys() == {"bare", losses.ONE, "kd", "uld"}
    assert by_name["bare"].ratio == by_name[losses.ONE].ratio == 1
    assert by_name["kd"].base == losses.ONE
    assert [cost.ratio for cost in found.costs] == sorted(cost.ratio for cost in found.costs)
    uld, bare = (sum(t.median for t in by_name[n].phases.values()) for n in ("uld", "bare"))
    assert by_name["uld"].ratio == uld / bare
    assert list(by_name["uld"].phases) == ["forward", "backward"]
    assert found.refused == {}


# --- steps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage() -> end_to_end.Stage:
    return end_to_end.set_stage(spec("bld"), documents=2)


def bare_step(stage: end_to_end.Stage) -> costs.Candidate:
    return end_to_end.bare_step(stage, stage.batches(len(stage.examples), Needs()))


def spec(method: str) -> RunSpec:
    return request.resolve_options(request.build_spec({"method": method, "pair": "tiny"}))


def test_a_step_leaves_the_student_as_it_was(stage: end_to_end.Stage) -> None:
    before = [parameter.clone() for parameter in stage.network.parameters()]
    candidates = [bare_step(stage), end_to_end.method_step(stage, spec("bld"), "bld")]
    for candidate in candidates:
        candidate.run()
        assert len(stage.optimizer.state)  # it did step
        for old, parameter in zip(before, stage.network.parameters(), strict=True):
            assert torch.equal(old, parameter)
            assert parameter.grad is None


def test_the_bare_step_takes_the_gradient_that_cross_entropy_alone_has(
    stage: end_to_end.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[torch.Tensor]] = []

    def note(*optimizers: torch.optim.Optimizer) -> None:
        found.append([p.grad.clone() for p in stage.network.parameters() if p.grad is not None])
        stage.network.zero_grad(set_to_none=True)

    monkeypatch.setattr(end_to_end, "_update", note)
    train = stage.spec.train.model_copy(update={"precision": "float32"})
    plain = replace(stage, spec=stage.spec.model_copy(update={"train": train}))
    bare_step(plain).run()
    end_to_end.method_step(plain, spec("sft"), "sft").run()
    bare, ours = found
    for left, right in zip(bare, ours, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)


@memory
def test_a_method_that_refuses_the_pair_is_named_with_its_reason(
    stage: end_to_end.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "set_stage", lambda *_: stage)
    found = end_to_end.bench_steps({"kd": spec("kd"), "sft": spec("sft")}, documents=2, repeats=1)
    assert {cost.name for cost in found.costs} == {*BARE, "sft"}
    assert "tokenizers differ" in found.refused["kd"]
    assert "kd is not measured" in costs.render(found, "terminal")


@memory
def test_cached_steps_read_the_teacher_from_disk_and_bare_ones_never_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[int] = []
    live = Teacher.live

    def counted(self: Teacher, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        return live(self, ids, mask)

    monkeypatch.setenv("CTDBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(Teacher, "live", counted)
    found = end_to_end.bench_steps({"alm": spec("alm")}, documents=2, repeats=1, cached=True)
    assert calls == [1, 1]  # once a document, before anything is measured
    assert found.setting["teacher states"] == "stored"


# --- what is shown ------------------------------------------------------------------------------


def test_the_table_shows_milliseconds_ratio_and_megabytes() -> None:
    phases = {"forward": Timing(0.25, 0.2, 0.3), "backward": Timing(0.5, 0.5, 0.5)}
    shown = costs.Costs("losses", {"rows": 3}, [costs.Cost("uld", phases, 1.5, 2_500_000)])
    lines = costs.render(shown, "terminal").splitlines()
    assert lines[:2] == ["losses", "rows 3"]
    assert lines[-2].split() == ["forward", "ms", "backward", "ms", "ratio", "extra", "MB"]
    assert lines[-1].split() == ["uld", "250.0", "500.0", "1.50", "2.5"]
    (cost,) = json.loads(costs.render(shown, "json"))["costs"]
    assert cost["milliseconds"]["forward"] == {"median": 250.0, "low": 200.0, "high": 300.0}
    assert (cost["name"], cost["ratio"], cost["extra_bytes"]) == ("uld", 1.5, 2_500_000)


@memory
def test_the_command_measures_steps_on_a_pair() -> None:
    flags = ["--methods", "gold", "--documents", "1", "--repeats", "1", "--format", "json"]
    done = CliRunner().invoke(app, ["bench", "--end-to-end", "tiny", *flags])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {cost["name"] for cost in found["costs"]} == {*BARE, "gold"}
    assert found["setting"]["teacher states"] == "live"
    assert found["setting"]["documents"] == 1
    assert found["setting"]["student tokens"] > 0


@memory
def test_the_command_measures_losses() -> None:
    rows = {"gold", "gold+ce", "bld[path]"}
    flags = ["--vocabulary", "1100,1500", "--rows", "9", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "--methods", ",".join(sorted(rows)), *flags])
    assert done.exit_code == 0, done.output
    assert {line.split()[0] for line in done.stdout.splitlines()[4:]} == {"bare", *rows}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--vocabulary", "32000"], "--vocabulary 32000"),
        (["--vocabulary", "32000,99"], "from 1024 on"),
        (["--methods", "gold,ulds"], "did you mean uld"),
        (["--end-to-end", "tinny"], "did you mean tiny"),
    ],
)
def test_a_mistake_is_named_on_one_line(flags: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *flags])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert said in line
