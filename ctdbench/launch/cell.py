"""One cell from request to result: content hashes, baselines, training, evaluation, one JSON.

A result is written last. The same request again finds it, or resumes from the newest checkpoint.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ctdbench import __version__, registry, results
from ctdbench.distill import models, references, train
from ctdbench.distill.corpus import Corpus, load_corpus
from ctdbench.distill.models import Side
from ctdbench.distill.precision import resolve
from ctdbench.distill.teacher import Teacher
from ctdbench.errors import UserError
from ctdbench.evaluate import (
    EvaluationRequest,
    evaluate,
    shared_ngrams,
    task_content,
    task_texts,
)
from ctdbench.method import create
from ctdbench.spec import ModelSpec, RunSpec, TrainSpec

ENGINE_VERSION = 1  # raised when a change to the engine changes numbers
PACKAGES = ("torch", "transformers", "peft", "accelerate", "lm-eval", "datasets", "tokenizers")
SEQUENCE_LEVEL = "the corpus is the teacher's own text: sft here is sequence-level distillation"


def run_cell(
    spec: RunSpec, store: Path, *, data_dir: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """The cell's result; `was_done` says whether it was there before.

    The baselines `start` and `teacher` are evaluated once a pair and evaluation settings. Raises
    UserError and its kin; a run that failed after its start leaves a result with status "failed".
    """
    if len(spec.pair.teachers) != 1:
        raise UserError(f"pair {spec.pair.name}: teachers: one teacher is supported", "name one")
    _check_method(spec)
    corpus = load_corpus(spec.train.corpus, data_dir)
    cell = Cell(spec, store, corpus, data_dir, progress)
    found = results.finished(cell.folder)
    if found is not None:
        return {**found, "was_done": True}
    for method in results.BASELINES:
        baseline(cell, method)
    return {**cell.run(), "was_done": False}


class Cell:
    """A spec with what it names, loaded as it is needed."""

    def __init__(
        self, spec: RunSpec, store: Path, corpus: Corpus, data_dir: Path | None, progress: bool
    ) -> None:
        self.spec = spec
        self.store = store
        self.corpus = corpus
        self.data_dir = data_dir
        self.progress = progress
        self.content = content(spec, corpus, data_dir)
        self.id = spec.cell_id(self.content)
        self.folder = results.cell_dir(store, spec.pair.name, spec.method, self.id)

    def run(self) -> results.Result:
        """Train, evaluate, write the result; a failure is written as such and raised."""
        accelerator = Accelerator()
        try:
            student, cost = self._train(accelerator)
            if not accelerator.is_main_process:
                return results.read_result(self._wait(accelerator))
            result = self.evaluate(student, cost, [])
        except Exception as error:
            self._record_failure(error)
            raise
        accelerator.wait_for_everyone()
        shutil.rmtree(self.folder / train.CHECKPOINTS, ignore_errors=True)
        return result

    def _wait(self, accelerator: Accelerator) -> Path:
        accelerator.wait_for_everyone()
        return self.folder / "result.json"

    def _train(self, accelerator: Accelerator) -> tuple[Side, dict[str, Any]]:
        """The trained student as it would be exported (merged, float32), and what it cost."""
        method = create(self.spec.method, self.spec.options)
        student = self.side(self.spec.pair.student)
        teacher_side = self.side(self.spec.pair.teachers[0])
        tables = train.pair_tables(student, teacher_side)
        device = accelerator.device
        teacher_side.model.to(device)
        precision = resolve(self.spec.train.precision, device)
        identity = self.content["teacher"]
        teacher = Teacher(teacher_side, tables.teacher_trie, precision, identity)
        setting = train.Setting(student, teacher, method, tables, self.corpus)
        network, report = train.train(
            self.spec, setting, self.folder, accelerator, progress=self.progress
        )
        exported = replace(student, model=models.merged(network.model).float().eval())
        return exported, asdict(report)

    def side(self, spec: ModelSpec) -> Side:
        """Load a side of the pair."""
        return models.load_side(spec, trust_remote_code=self.spec.trust_remote_code)

    def evaluate(self, student: Side, cost: dict[str, Any], notes: Sequence[str]) -> results.Result:
        """Evaluate a side as the student and write the cell."""
        started = time.monotonic()
        spec = self.spec.eval
        heldout, shared = self._held_out()
        teacher = self.side(self.spec.pair.teachers[0])
        if student.model.device != teacher.model.device:
            teacher.model.to(student.model.device)
        evaluation = evaluate(
            EvaluationRequest(
                student=student.model,
                tokenizer=student.tokenizer,
                tasks=spec.tasks,
                teachers=[(teacher.model, teacher.tokenizer)],
                limit=spec.limit,
                batch_size=spec.batch_size,
                data_dir=self.data_dir,
                heldout=heldout,
                precision=spec.precision,
            )
        )
        notes = [*notes, *self._notes(shared)]
        cost = {**cost, "eval_seconds": time.monotonic() - started}
        cost["peak_memory_bytes"] = train.peak_memory()
        result = self._result("done", notes, cost)
        result["scores"], result["stderr"] = evaluation.scores, evaluation.stderr  # type: ignore[typeddict-item]
        result["provenance"] |= {"versions": {**_versions(), **evaluation.versions}}
        result["provenance"] |= {"evaluation": evaluation.settings}
        for task, rows in evaluation.samples.items():
            results.write_jsonl_atomic(self.folder / "samples" / f"{task}.jsonl", rows)
        results.write_json_atomic(self.folder / "result.json", result)
        return result

    def _held_out(self) -> tuple[list[str], int]:
        """Held-out texts that share no 13-gram with the training split, and how many did."""
        texts = [document.text for document in self.corpus.held_out]
        leaked = shared_ngrams(texts, (document.text for document in self.corpus.train)).items
        return [text for index, text in enumerate(texts) if index not in leaked], len(leaked)

    def _notes(self, shared_held_out: int) -> list[str]:
        notes = [
            f"held-out documents left out for a 13-gram shared with the corpus: {shared_held_out}"
        ]
        corpus = [document.text for document in self.corpus.train]
        for task in self.spec.eval.tasks:
            shared = shared_ngrams(task_texts(task, self.data_dir), corpus).items
            if shared:
                notes.append(f"{task}: {len(shared)} items share a 13-gram with the corpus")
        if self.corpus.generated_by_teacher:
            notes.append(SEQUENCE_LEVEL)
        return notes

    def _record_failure(self, error: Exception) -> None:
        line = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        results.write_json_atomic(self.folder / "result.json", self._result("failed", [line], {}))

    def _result(self, status: str, notes: Sequence[str], cost: Mapping[str, Any]) -> results.Result:
        return {
            "version": 1,
            "id": self.id,
            "status": status,  # type: ignore[typeddict-item]
            "spec": self.spec.model_dump(mode="json"),
            "content": self.content,
            "scores": {},
            "stderr": {},
            "cost": cost,  # type: ignore[typeddict-item]
            "provenance": provenance(),
            "notes": list(notes),
        }


def baseline(cell: Cell, method: str) -> None:
    """Evaluate the untrained student (`start`) or the `teacher`, once for all cells beside it."""
    neutral = TrainSpec(corpus=cell.spec.train.corpus)
    spec = cell.spec.model_copy(
        update={"method": method, "seed": 0, "options": {}, "train": neutral}
    )
    own = Cell(spec, cell.store, cell.corpus, cell.data_dir, cell.progress)
    if results.finished(own.folder) is not None:
        return
    model = spec.pair.student if method == "start" else spec.pair.teachers[0]
    own.evaluate(own.side(model), {}, [])


def content(spec: RunSpec, corpus: Corpus, data_dir: Path | None) -> dict[str, str]:
    """Hashes of everything that the spec names and that can change the result."""
    pair = spec.pair
    named = {"corpus": corpus.fingerprint, "engine": str(ENGINE_VERSION)}
    sides = {"student": pair.student, "teacher": pair.teachers[0]}
    for role, side in sides.items():
        parts = [side.model, *([side.tokenizer] if side.tokenizer else [])]
        found = [references.content(references.parse(text)) for text in parts]
        named[role] = "+".join(found)
    if spec.method not in results.BASELINES:
        named["method"] = _method_code(spec.method)
    tasks = task_content(spec.eval.tasks, data_dir)
    return named | {f"task:{name}": digest for name, digest in tasks.items()}


def _method_code(name: str) -> str:
    info = registry.methods()[name]
    if info.file is not None:
        return references.fingerprint(info.file)
    point = info.entry_point
    assert point is not None
    return f"{point.value}@{point.dist.version if point.dist else 'unknown'}"


def _check_method(spec: RunSpec) -> None:
    """Whatever the method can say about its options is said before the first expensive second."""
    method = create(spec.method, spec.options)
    if method.needs.bytes == "beam" and spec.train.template == "chat":
        raise UserError("method.bytes: beam reads plain text", "set train.template=plain")


def provenance() -> dict[str, Any]:
    """Versions, hardware and the state of the code; no paths, no names of people or hosts."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": _versions(),
        "hardware": _hardware(),
        "git": _git(),
    }


def _versions() -> dict[str, str]:
    found = {"ctdbench": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in PACKAGES}


def _hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "gpus": gpus,
    }


def _git() -> dict[str, Any] | None:
    """Commit of the clone that the engine runs from, and whether it was changed; None in a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commands = (("rev-parse", "HEAD"), ("status", "--porcelain"))
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(status)}
