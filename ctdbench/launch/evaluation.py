"""Evaluate what is there: a cell's student, a model by its reference, or several averaged.

A cell is evaluated as its result was made, unless asked otherwise: the same tasks, held-out
documents, teachers and settings, so a kept student gives the scores of its result again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import PartialState
from transformers.utils import logging as hf_logging

from ctdbench import registry, results
from ctdbench.distill import models, references
from ctdbench.distill.corpus import load_corpus
from ctdbench.distill.models import Side
from ctdbench.errors import UserError
from ctdbench.evaluate import (
    Evaluation,
    EvaluationRequest,
    available_tasks,
    check_tasks,
    evaluate,
)
from ctdbench.evaluate.ensemble import Average, Ensemble, require_one_vocabulary
from ctdbench.launch import kept
from ctdbench.launch.cell import LoadedPair
from ctdbench.launch.content import decontaminated
from ctdbench.results import Result
from ctdbench.spec import EvalSpec, ModelSpec, RunSpec


def evaluate_existing(
    names: Sequence[str],
    store: Path,
    changes: Mapping[str, Any],
    *,
    average: Average = "probabilities",
    trust_remote_code: bool = False,
) -> Evaluation:
    """Scores of a cell (how its id starts) or of a model (`dir:`, `hub:`, ...); nothing is stored.

    Several names: of their average, which takes one vocabulary. changes: fields of EvalSpec that
    are not to be those of the first cell, or the defaults. Raises UserError and its kin.
    """
    subjects = [_subject(name, store, trust_remote_code) for name in names]
    settings = _settings(subjects, changes)
    hf_logging.disable_progress_bar()
    device = PartialState().device
    sides = [subject.load(device) for subject in subjects]
    model = sides[0].model
    if len(sides) > 1:
        require_one_vocabulary([side.tokenizer for side in sides], names)
        model = Ensemble([s.model for s in sides], len(sides[0].tokens.vocabulary), average)
    return evaluate(_request(model, sides[0].tokenizer, subjects[0], settings, device))


@dataclass(frozen=True)
class Subject:
    """What a name stands for: a finished cell, or a model by its reference."""

    name: str
    trust_remote_code: bool
    folder: Path | None = None
    result: Result | None = None

    @cached_property
    def spec(self) -> RunSpec | None:
        """Of a cell; remote code runs only if it is allowed here and now."""
        if self.result is None:
            return None
        stated = {**self.result["spec"], "trust_remote_code": self.trust_remote_code}
        return RunSpec.model_validate(stated)

    def load(self, device: torch.device) -> Side:
        """The model with its tokenizer, on the device."""
        side = self._load(device)
        side.model.to(device)
        return side

    def _load(self, device: torch.device) -> Side:
        if self.spec is None or self.result is None or self.folder is None:
            named = ModelSpec(model=self.name)
            return models.load_side(named, trust_remote_code=self.trust_remote_code)
        if results.is_baseline(self.spec.method):
            return LoadedPair(self.spec, device).baseline(self.spec.method)
        return kept.load(self.folder, self.result, trust_remote_code=self.trust_remote_code)


def _subject(name: str, store: Path, trust_remote_code: bool) -> Subject:
    if name.partition(":")[0] in get_args(references.Kind):
        references.require(references.parse(name))
        return Subject(name, trust_remote_code)
    found = results.find(store)
    folder = results.named(found, name, store)
    return Subject(name, trust_remote_code, folder, found[folder])


def _settings(subjects: Sequence[Subject], changes: Mapping[str, Any]) -> EvalSpec:
    """Those of the first cell with the changes; tasks that nothing is there for are left out."""
    spec = subjects[0].spec
    stated = spec.eval if spec else EvalSpec()
    tasks = changes.get("tasks")
    fields = {**stated.model_dump(), **changes, "points": 1}
    extra = tuple(Path(name).expanduser() for name in fields["task_files"])
    needs = {info.name: info.needs for info in available_tasks(extra)}
    unmet = {"teacher"} if len(subjects) > 1 else set()
    unmet |= {"teacher", "heldout"} if spec is None else set()
    if tasks is None:
        fields["tasks"] = [task for task in stated.tasks if needs.get(task) not in unmet]
    elif lacking := [task for task in tasks if needs.get(task) in unmet]:
        raise UserError(f"task {lacking[0]} needs a single cell, for its texts and teachers")
    if tasks is not None:  # the cell's own limits are for its own tasks
        fields["limit"] = changes.get("limit")
    limits = {} if changes.keys() & {"limit", "tasks"} else fields["limits"]
    fields["limits"] = {task: limits[task] for task in fields["tasks"] if task in limits}
    settings = registry.validate(EvalSpec, fields, "evaluate")
    check_tasks(settings.tasks, settings.data, settings.extra_tasks)
    return settings


def _request(
    model: Any, tokenizer: Any, first: Subject, settings: EvalSpec, device: torch.device
) -> EvaluationRequest:
    needs = {info.name: info.needs for info in available_tasks(settings.extra_tasks)}
    needed = {needs[task] for task in settings.tasks}
    pair = LoadedPair(first.spec, device) if first.spec and "teacher" in needed else None
    return EvaluationRequest.of(
        settings,
        student=model,
        tokenizer=tokenizer,
        teachers=[(side.model, side.tokenizer) for side in pair.teachers] if pair else (),
        readers=[(pair.student.model, pair.student.tokenizer)] if pair else (),
        heldout=_held_out(first, settings) if needed & {"heldout", "teacher"} else (),
    )


def _held_out(first: Subject, settings: EvalSpec) -> list[str]:
    """The documents that the cell was evaluated on; raises UserError if its text has changed."""
    assert first.spec is not None
    assert first.result is not None
    corpus = load_corpus(first.spec.train.corpus, settings.data)
    stated = first.spec.eval.model_copy(update={"data_dir": settings.data_dir})
    corpus, _ = decontaminated(corpus, first.spec.model_copy(update={"eval": stated}))
    if corpus.fingerprint != first.result["content"]["corpus"]:
        raise UserError(
            f"cell {first.name}: the text of {corpus.name} is not what it was",
            "leave out bpb_heldout and the teacher's tasks",
        )
    return [document.text for document in corpus.held_out_part(settings.held_out)]
