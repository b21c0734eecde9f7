"""One cell from request to result: content hashes, baselines, training, evaluation, one JSON.

A result is written after all that it tells of, and only weights that are to be kept come after it.
The same request again finds it, or resumes from the newest checkpoint. A result stays until another
one takes its place. While a process works in a cell's folder, no other one does.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.utils import logging as hf_logging

from ctdbench import results
from ctdbench.distill import models, processes, train
from ctdbench.distill.corpus import Corpus, load_corpus, training_order
from ctdbench.distill.examples import build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.precision import resolve
from ctdbench.distill.saving import check_savable
from ctdbench.distill.setting import Setting, balancing, pair_tables, save_modules
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.view import Guide
from ctdbench.errors import RunError, UserError
from ctdbench.evaluate import (
    EvaluationRequest,
    evaluate,
    on_running_text,
)
from ctdbench.evaluate.divergence import Taught
from ctdbench.launch import kept
from ctdbench.launch.content import (
    ENGINE_VERSION,
    content,
    decontaminated,
    sees_micro_batches,
    teacher_name,
)
from ctdbench.launch.lock import exclusive, is_locked
from ctdbench.launch.provenance import now, provenance, without_private
from ctdbench.method import create
from ctdbench.spec import ModelSpec, RunSpec, TrainSpec


def run_cell(
    spec: RunSpec,
    store: Path,
    *,
    track: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The cell's result; `was_done` says whether it was there before.

    The baselines `start` and `teacher` are evaluated once a pair and evaluation settings.
    track: the tracker of accelerate's that gets the metrics, too. Raises UserError and its kin,
    RunError where another process computes the cell; a run that failed after its start leaves a
    result with status "failed".
    """
    corpus, notes = decontaminated(load_corpus(spec.train.corpus, spec.eval.data), spec)
    cell = Cell(spec, store, corpus, notes)
    found = finished(cell.folder, keeps_model=spec.train.keep_model)
    if found is not None:
        return {**found, "was_done": True}
    check(spec, corpus)
    # Autocast is the harness's own. Others wait for as long as the first process evaluates.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[patience],
        log_with=track,
        project_dir=cell.folder / results.TRACKING,
    )
    processes.check(accelerator)
    if accelerator.num_processes > 1 and sees_micro_batches(spec):
        raise UserError(
            f"method {spec.method}: its loss sees micro-batches whole, and processes cut others",
            "train it in one process, or choose options by which it sees the global batch",
        )
    hf_logging.disable_progress_bar()  # a bar for every file loaded hides the ones that matter
    with exclusive(cell.folder) if accelerator.is_main_process else nullcontext():
        found = results.finished(cell.folder, keeps_model=spec.train.keep_model)
        (found,) = broadcast_object_list([found])  # by now, by another process
        if found is not None:
            return {**found, "was_done": True}
        return {**_compute(cell, accelerator, progress=progress), "was_done": False}


def _compute(cell: Cell, accelerator: Accelerator, *, progress: bool) -> results.Result:
    """The baselines that are missing, then the cell."""
    spec, pair = cell.spec, LoadedPair(cell.spec, accelerator.device)
    method = create(spec.method, spec.options)
    for teacher in pair.teachers:
        method.check(pair_tables(pair.student, teacher, spec.train.template))
    if spec.train.keep_model:
        check_savable(pair.student)
    if method.needs.text != "teacher":
        _check_text(cell, pair)
    if accelerator.is_main_process:
        names = results.baselines(len(spec.pair.teachers))
        baselines = [_baseline(cell, name) for name in names]
        # One that another process evaluates comes last: by then it may be done.
        for baseline in sorted(baselines, key=lambda each: is_locked(each.folder)):
            _evaluate_baseline(baseline, pair, progress=progress)
    accelerator.wait_for_everyone()
    return cell.run(pair, accelerator, progress=progress)


def finished(folder: Path, *, keeps_model: bool = False) -> results.Result | None:
    """As `results.finished`, rid of what a process killed right after the result left.

    Checkpoints that the cell's weights are still to come of stay, whoever asks.
    """
    found = results.finished(folder, keeps_model=keeps_model)
    if found is not None and is_locked(folder):
        with suppress(UserError), exclusive(folder):
            if not kept.are_due(folder):
                shutil.rmtree(folder / results.CHECKPOINTS, ignore_errors=True)
    return found


def check(spec: RunSpec, corpus: Corpus) -> None:
    """What can be said of a request before the first model is loaded is said now."""
    method = create(spec.method, spec.options)
    balancing(spec, method)
    if method.needs.bytes == "beam" and spec.train.template == "chat":
        raise UserError("method.bytes: beam reads plain text", "set train.template=plain")
    training_order(corpus, spec.seed, spec.train.budget, spec.train.document_bytes)


def _check_text(cell: Cell, pair: LoadedPair) -> None:
    """Raise UserError, before anything is evaluated, where no document can be trained on."""
    asked, skipped = cell.spec.train, Counter[str]()
    first, *others = pair.teachers
    for document in training_order(cell.corpus, cell.spec.seed, asked.budget, asked.document_bytes):
        found, reasons = build_examples([document], pair.student, first, asked.template, others)
        if found:
            return
        skipped.update(reasons)
    told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    raise UserError(f"corpus {asked.corpus} leaves nothing to train on ({told})")


class LoadedPair:
    """All sides of a pair, each loaded once. Training changes the student in place."""

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device

    @cached_property
    def student(self) -> Side:
        """The student as the pair starts it."""
        return self._load(self.spec.pair.student)

    @cached_property
    def teachers(self) -> list[Side]:
        """The teachers, in the pair's order."""
        return [self._load(spec) for spec in self.spec.pair.teachers]

    def baseline(self, method: str) -> Side:
        """The side that a baseline's name stands for."""
        if method == results.START:
            return self.student
        return self.teachers[int(method.partition("-")[2] or 1) - 1]

    def _load(self, spec: ModelSpec) -> Side:
        side = models.load_side(spec, trust_remote_code=self.spec.trust_remote_code)
        side.model.to(self.device)
        return side


class Cell:
    """A spec, the folder that holds its result, and the content that identifies it."""

    def __init__(
        self,
        spec: RunSpec,
        store: Path,
        corpus: Corpus,
        notes: Sequence[str],
    ) -> None:
        self.spec = spec
        self.store = store
        self.corpus = corpus
        self.notes = notes
        self.content = content(spec, corpus)
        self.id = spec.cell_id(self.content)
        self.folder = results.cell_dir(store, spec.pair.name, spec.method, self.id)
        self.provenance = provenance()  # of the code that runs, not of what it became meanwhile
        self.taught: Taught | None = {} if spec.eval.points > 1 else None

    def run(self, pair: LoadedPair, accelerator: Accelerator, *, progress: bool) -> results.Result:
        """Train, evaluate, write the result; what breaks on the way is recorded and raised.

        Weights are kept once the result of their training is there: were they there before, they
        would lie beside the result of an earlier one.
        """
        if accelerator.is_main_process:  # of an attempt that failed
            if results.finished(self.folder) is None:
                (self.folder / results.RESULT).unlink(missing_ok=True)
            kept.discard(self.folder)
        try:
            if self.spec.train.keep_model and accelerator.is_main_process:
                kept.announce(self.folder)
            student, cost = self._train(pair, accelerator, progress=progress)
            if accelerator.is_main_process:
                if progress:
                    print(f"evaluating {self.spec.method}", file=sys.stderr)
                self.evaluate(student, pair, cost)
                if self.spec.train.keep_model:
                    kept.keep(student, self.folder)
        except Exception as error:
            if accelerator.is_main_process and getattr(error, "exit_code", 1) == 1:
                self.record_failure(error)
            raise
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(self.folder / results.CHECKPOINTS, ignore_errors=True)
        return results.read_result(self.folder / results.RESULT)

    def _train(
        self, pair: LoadedPair, accelerator: Accelerator, *, progress: bool
    ) -> tuple[Side, dict[str, Any]]:
        """The trained student as it would be exported (merged, float32), and what it cost."""
        precision = resolve(self.spec.train.precision, accelerator.device)
        first, *others = [
            self._guide(pair, index, precision) for index in range(len(pair.teachers))
        ]
        assert first.teacher is not None
        method = create(self.spec.method, self.spec.options)
        setting = Setting(
            pair.student, first.teacher, method, first.tables, self.corpus, tuple(others)
        )
        score = partial(self._score, pair=pair)
        network, report = train.train(
            self.spec, setting, self.folder, accelerator, score=score, progress=progress
        )
        if accelerator.is_main_process:
            save_modules(self.spec, setting, network, self.folder)
        exported = models.merged(network.model).float().eval()
        return replace(pair.student, model=exported), asdict(report)

    def _guide(self, pair: LoadedPair, index: int, precision: str) -> Guide:
        """The teacher at `index` with its tables."""
        side, stated = pair.teachers[index], self.spec.pair.teachers[index]
        tables = pair_tables(pair.student, side, self.spec.train.template)
        drawn = {name: value for name, value in stated.identity().items() if name != "weight"}
        identity = json.dumps(
            [self.content[teacher_name(index)], ENGINE_VERSION, drawn], sort_keys=True
        )
        teacher = Teacher(side, tables.teacher_trie, precision, identity)
        suffix = f"@{index + 1}" if index else ""
        return Guide(teacher, tables, suffix, stated.weight)

    def evaluate(self, student: Side, pair: LoadedPair, cost: dict[str, Any]) -> None:
        """Evaluate a side as the student and write the cell: samples first, the result last."""
        started = time.monotonic()
        evaluation = evaluate(self._request(student, pair, self.spec.eval.tasks))
        cost = {**cost, "eval_seconds": time.monotonic() - started}
        setup = cost.pop("setup", {})
        result = self._result("done", self.notes, cost)
        result["provenance"]["training"] = setup
        result |= {"scores": evaluation.scores, "stderr": evaluation.stderr}  # type: ignore[typeddict-item]
        if points := self._points():
            result["points"] = points
        result["provenance"]["versions"] |= evaluation.versions
        result["provenance"]["evaluation"] = evaluation.settings
        for task, rows in evaluation.samples.items():
            results.write_jsonl_atomic(self.folder / "samples" / f"{task}.jsonl", rows)
        results.write_json_atomic(self.folder / results.RESULT, without_private(result))

    def _score(self, model: nn.Module, pair: LoadedPair) -> dict[str, float]:
        """Of a student on the way, "task.metric" -> value."""
        student = replace(pair.student, model=model)
        tasks = on_running_text(self.spec.eval.tasks, self.spec.eval.extra_tasks)
        scores = evaluate(self._request(student, pair, tasks)).scores if tasks else {}
        return {f"{task}.{name}": value for task in scores for name, value in scores[task].items()}

    def _request(self, student: Side, pair: LoadedPair, tasks: Sequence[str]) -> EvaluationRequest:
        settings = self.spec.eval
        return EvaluationRequest.of(
            settings,
            student=student.model,
            tokenizer=student.tokenizer,
            tasks=tasks,
            teachers=[(teacher.model, teacher.tokenizer) for teacher in pair.teachers],
            readers=[(pair.student.model, pair.student.tokenizer)],
            heldout=[d.text for d in self.corpus.held_out_part(settings.held_out)],
            taught=self.taught,
        )

    def _points(self) -> list[results.Point]:
        """Scores on the way, as training logged them."""
        path = self.folder / results.METRICS
        tasks = on_running_text(self.spec.eval.tasks, self.spec.eval.extra_tasks)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found: list[results.Point] = []
        for row in map(json.loads, lines):
            scores = {name: row[name] for name in row if name.partition(".")[0] in tasks}
            if scores:
                found.append({"text_bytes": row["text_bytes"], "scores": scores})
        return found

    def record_failure(self, error: Exception) -> None:
        """Write the result of a cell that broke: its reason alone. A cell that is done stays so."""
        if results.finished(self.folder) is not None:
            return
        line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        result = without_private(self._result("failed", [line], {}))
        with suppress(RunError):  # a full disk is what may have broken the run
            results.write_json_atomic(self.folder / results.RESULT, result)

    def _result(self, status: str, notes: Sequence[str], cost: Mapping[str, Any]) -> results.Result:
        return {
            "version": 1,
            "id": self.id,
            "status": status,  # type: ignore[typeddict-item]
            "spec": self.spec.model_dump(mode="json"),  # type: ignore[typeddict-item]
            "content": self.content,
            "scores": {},
            "stderr": {},
            "cost": cost,  # type: ignore[typeddict-item]
            "provenance": {**self.provenance, "created": now()},
            "notes": list(notes),
        }


def _baseline(cell: Cell, method: str) -> Cell:
    """The untrained student (`start`) or a teacher, as the cell is evaluated."""
    neutral = TrainSpec(corpus=cell.spec.train.corpus)
    spec = cell.spec.model_copy(
        update={"method": method, "seed": 0, "options": {}, "train": neutral}
    )
    return Cell(spec, cell.store, cell.corpus, cell.notes)


def _evaluate_baseline(baseline: Cell, pair: LoadedPair, *, progress: bool) -> None:
    """Once for all cells beside it."""
    if finished(baseline.folder) is not None:
        return
    method = baseline.spec.method

    def wait() -> None:
        print(f"waiting for another process that evaluates {method}", file=sys.stderr)

    with exclusive(baseline.folder, waiting=wait):
        if results.finished(baseline.folder) is None:
            if progress:
                print(f"evaluating {method} of {baseline.spec.pair.name}", file=sys.stderr)
            baseline.evaluate(pair.baseline(method), pair, {})
