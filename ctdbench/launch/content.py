"""What a cell's names stand for: its text without leaks, and hashes of all that its id rests on."""

from __future__ import annotations

from dataclasses import replace

from ctdbench import registry, results
from ctdbench.distill import references
from ctdbench.distill.corpus import Corpus
from ctdbench.evaluate import shared_ngrams, task_content, task_texts
from ctdbench.method import create
from ctdbench.spec import ModelSpec, RunSpec

ENGINE_VERSION = 2  # raised when a change to the engine changes numbers


def decontaminated(corpus: Corpus, spec: RunSpec) -> tuple[Corpus, list[str]]:
    """The corpus without what would let an evaluation measure memory, and notes of what went.

    Training documents that share a 13-gram with an item of a requested task are left out, and then
    held-out documents that share one with what is left to train on.
    """
    notes = []
    train_split = list(corpus.train)
    for task in spec.eval.tasks:
        items = task_texts(task, spec.eval.data, spec.eval.extra_tasks)
        leaked = shared_ngrams(items, (document.text for document in train_split)).documents
        if leaked:
            notes.append(f"{len(leaked)} training documents left out: a 13-gram of {task}")
            train_split = [d for index, d in enumerate(train_split) if index not in leaked]
    held_out = [document.text for document in corpus.held_out]
    known = shared_ngrams(held_out, (document.text for document in train_split)).items
    if known:
        notes.append(f"{len(known)} held-out documents left out: a 13-gram of the training split")
    kept = tuple(d for index, d in enumerate(corpus.held_out) if index not in known)
    return replace(corpus, train=tuple(train_split), held_out=kept), notes


def content(spec: RunSpec, corpus: Corpus) -> dict[str, str]:
    """Hashes of everything that the spec names and that can change the result."""
    pair = spec.pair
    named = {"corpus": corpus.fingerprint, "engine": str(ENGINE_VERSION)}
    sides: dict[str, ModelSpec] = {"student": pair.student}
    sides |= {teacher_name(index): side for index, side in enumerate(pair.teachers)}
    for role, side in sides.items():
        parts = [side.model, *([side.tokenizer] if side.tokenizer else [])]
        found = [references.content(references.parse(text)) for text in parts]
        named[role] = "+".join(found)
    if not results.is_baseline(spec.method):
        named["method"] = _method_code(spec.method)
    if sees_micro_batches(spec):
        whole = spec.train.batch_documents
        named["method:micro_batch"] = str(min(spec.train.micro_batch or whole, whole))
    tasks = task_content(spec.eval.tasks, spec.eval.data, spec.eval.extra_tasks)
    return named | {f"task:{name}": digest for name, digest in tasks.items()}


def sees_micro_batches(spec: RunSpec) -> bool:
    """Whether the loss depends on which documents share a micro-batch."""
    if results.is_baseline(spec.method):
        return False
    return create(spec.method, spec.options).needs.prepare == "microbatch"


def teacher_name(index: int) -> str:
    """What a result calls the teacher at `index`."""
    return results.baselines(index + 1)[index]


def _method_code(name: str) -> str:
    info = registry.methods()[name]
    parts = [references.known_fingerprint(info.file)] if info.file is not None else []
    if (point := info.entry_point) is not None:
        parts.append(f"{point.value}@{point.dist.version if point.dist else 'unknown'}")
    return "+".join(parts)
