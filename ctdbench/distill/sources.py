"""What a run trains on: the corpus's documents, the teacher's text, or what the student writes.

Whatever the source, order and prompts are the corpus's. The teacher writes until its text fills the
budget, from as many prompts as that takes. What the student writes stands for a document, and may
be shorter or longer than it: there the budget counts the corpus's bytes, and the cost of a cell
says what was trained on.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from ctdbench.distill import rollouts
from ctdbench.distill.corpus import Corpus, Document, cut, shuffled, training_order, within
from ctdbench.distill.example_cache import cached_examples
from ctdbench.distill.examples import Example, build_examples
from ctdbench.distill.models import Side
from ctdbench.distill.precision import resolve
from ctdbench.distill.teacher import Teacher
from ctdbench.errors import UserError
from ctdbench.method import Method
from ctdbench.spec import RunSpec, TrainSpec

TEACHER_SEED = 0  # its text is made once, as a data set is, and not anew for every seed of a run


def decoding(settings: TrainSpec, seed: int) -> rollouts.Decoding:
    """How a run's text is generated."""
    return rollouts.Decoding(
        temperature=settings.generation_temperature,
        max_new_tokens=settings.generated_tokens,
        seed=seed,
    )


def training_examples(
    spec: RunSpec,
    corpus: Corpus,
    method: Method,
    student: Side,
    teachers: Sequence[Teacher],
    accelerator: Accelerator,
    *,
    progress: bool,
) -> tuple[list[Example], dict[str, int]]:
    """The run's examples in order, and how many documents were left out, by reason.

    Raises UserError if none is left.
    """
    settings = spec.train
    counts: dict[str, int] = {}
    if method.needs.text == "teacher":
        with accelerator.main_process_first():  # the others find what the first one cached
            documents, counts = teacher_documents(spec, corpus, teachers[0], progress=progress)
    else:
        documents = training_order(corpus, spec.seed, settings.budget, settings.document_bytes)
    with accelerator.main_process_first():
        examples, skipped = cached_examples(
            documents,
            student,
            [teacher.side for teacher in teachers],
            settings.template,
            workers=settings.workers,
            progress=progress,
        )
    skipped |= counts
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(f"corpus {corpus.name} leaves nothing to train on ({reasons})")
    return examples, skipped


def teacher_documents(
    spec: RunSpec, corpus: Corpus, teacher: Teacher, *, progress: bool
) -> tuple[list[Document], dict[str, int]]:
    """The teacher's continuations of the corpus's prompts, in order, up to the budget's bytes.

    Raises UserError if all prompts together do not fill the budget.
    """
    settings, chosen = spec.train, decoding(spec.train, TEACHER_SEED)
    order = shuffled(corpus, spec.seed)  # whole documents: a piece may lack its question
    prompts = list(dict.fromkeys(rollouts.prompt(d, settings.prompt_bytes) for d in order))
    counts = Counter({"prompt that another document has": len(order) - len(prompts)})
    asked, found, size = 0, list[Document](), 0
    while size < settings.budget and asked < len(prompts):
        # As many more as the texts so far let expect, so that few are written for nothing.
        missing = (settings.budget - size) * asked / size if size else 0.0
        more = prompts[asked : asked + max(chosen.batch_size, math.ceil(missing))]
        texts, skipped = rollouts.teacher_text(
            teacher.side,
            more,
            chosen,
            template=settings.template,
            identity=teacher.identity,
            precision=teacher.precision,
            progress=progress,
        )
        asked += len(more)
        found += texts
        size += sum(text.size for text in texts)
        counts += Counter(skipped)
    if size < settings.budget:
        raise UserError(
            f"train.budget: the teacher wrote {size} bytes for all prompts of {corpus.name}",
            "ask for a smaller --budget",
        )
    pieces = [piece for text in found for piece in cut(text, settings.document_bytes)]
    return within(pieces, settings.budget), dict(+counts)


@dataclass
class OnPolicy:
    """Replaces some documents' text by what the student writes at that step.

    Which documents, and what is drawn, follows from the seed, the step and the document alone: not
    from micro-batches or processes. Plain text goes on from where its prompt ends; with a chat
    template a document needs a question, and a piece that begins within an answer stays as it is.
    """

    spec: RunSpec
    student: Side
    teachers: Sequence[Side]
    precision: str

    @classmethod
    def of(
        cls, spec: RunSpec, student: Side, model: Any, teachers: Sequence[Teacher], device: Any
    ) -> OnPolicy:
        """model: the student as it is trained, adapters included."""
        sides = [teacher.side for teacher in teachers]
        precision = resolve(spec.train.precision, device)
        return cls(spec, replace(student, model=model), sides, precision)

    def examples(self, batch: Sequence[Example], step: int) -> tuple[list[Example], dict[str, int]]:
        """The step's examples, and how many the student wrote or failed to write.

        The corpus's own text stays where the student wrote none.
        """
        chosen = [index for index in range(len(batch)) if self._is_chosen(batch[index].document)]
        if not chosen:
            return list(batch), {}
        settings = self.spec.train
        answers = rollouts.continued(
            self.student,
            [rollouts.prompt(batch[index].document, settings.prompt_bytes) for index in chosen],
            decoding(settings, self.spec.seed),
            template=settings.template,
            stream=f"step {step}",
            precision=self.precision,
        )
        made, counts = list(batch), Counter[str]()
        for index, answer in zip(chosen, answers, strict=True):
            found, outcome = self._example(answer)
            counts[outcome] += 1
            made[index] = found or made[index]
        return made, dict(counts)

    def _is_chosen(self, document: Document) -> bool:
        share, first = self.spec.train.on_policy, document.segments[0].role
        if self.spec.train.template == "chat" and first == "assistant":
            return False
        draw = random.Random(f"ctdbench/on-policy/{self.spec.seed}/{document.text}").random()
        return draw < share

    def _example(self, answer: Document | None) -> tuple[Example | None, str]:
        """And what is counted: "on-policy", or why the corpus's own text stays."""
        if answer is None:
            return None, "on-policy without text"
        template = self.spec.train.template
        found, skipped = build_examples(
            [answer], self.student, self.teachers[0], template, self.teachers[1:]
        )
        if found:
            return found[0], "on-policy"
        (reason,) = skipped
        return None, f"on-policy {reason.partition(' (')[0]}"  # without what helps a corpus
