"""A method on the bench of the conformance checks: called alone on rows, and through a step."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctdbench.distill import setting as setup
from ctdbench.distill.batches import Batch
from ctdbench.distill.blocks import position_pairs
from ctdbench.distill.corpus import Corpus, Document, Segment
from ctdbench.distill.precision import autocast
from ctdbench.distill.step import Step
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.view import CE, Network
from ctdbench.errors import UserError
from ctdbench.launch.check.method.cases import EVERYTHING, Case, make_case, states, whole
from ctdbench.launch.check.method.pair import (
    TEXTS,
    Pair,
    batch_of,
    documents,
    make_pair,
    tables_of,
    tiny_sides,
)
from ctdbench.launch.check.method.watched import Watched
from ctdbench.method import (
    Block,
    Method,
    PairInfo,
    Rows,
    Term,
    create,
    cross_entropy,
    mean,
    probe,
    total_loss,
)
from ctdbench.spec import RunSpec

Values = dict[str, Tensor]
CPU = torch.device("cpu")
BLOCK_ROWS = 8


@dataclass(frozen=True)
class Called:
    """What a method returned for rows, cross-entropy beside it, and the loss of both."""

    block: Block
    terms: Mapping[str, Term]
    ce: Term
    loss: Tensor

    def means(self) -> Values:
        """Of cross-entropy and all terms."""
        return {name: mean(t).detach() for name, t in {CE: self.ce, **self.terms}.items()}


@dataclass(frozen=True)
class Outcome:
    """What a method made of rows, and the gradients of its loss.

    student: with respect to the student's logits [R, V] and, where the method reads them, states
    [R, d]. teacher: the same of the teacher's. changed: inputs that were modified in place.
    """

    called: Called
    modules: Mapping[str, nn.Module]
    student: Values
    teacher: Values
    changed: list[str]


class Bench:
    """A method with its options, the pair that it serves, and what the checks ask of both."""

    def __init__(self, spec: RunSpec) -> None:
        """spec: a cell on the pair `tiny` with the method's resolved options."""
        self.spec = spec
        self.method = create(spec.method, spec.options)
        stated = getattr(sys.modules[type(self.method).__module__], "META", {})
        self.meta: Mapping[str, Any] = stated if isinstance(stated, dict) else {}
        self.needs = Watched(self.method).needs

    @cached_property
    def refusal(self) -> str:
        """Why the method does not serve two tokenizers; "" where it does."""
        try:
            self.method.check(make_pair().tables)
        except UserError as error:
            return error.message
        except Exception:  # it is called again, by the checks, and fails them
            return ""
        return ""

    @cached_property
    def pair(self) -> Pair:
        """Two tokenizers, or one where the method serves no other."""
        return make_pair(one_tokenizer=bool(self.refusal))

    @cached_property
    def case(self) -> Case:
        """Random rows of a few documents."""
        return make_case(self.pair, documents(), self.needs)

    @cached_property
    def outcome(self) -> Outcome:
        """What the method makes of `case`."""
        return self.evaluate(self.case)

    def evaluate(self, case: Case, *, noise: bool = True, precision: str = "float32") -> Outcome:
        """The method on one block of everything; noise: its modules as after some training."""
        widths = states(case.student).shape[1], states(case.teacher).shape[1]
        modules = self.modules(PairInfo(*widths, case.tables), noise=noise)
        case = case.given(self.needs)
        student, own = _tracked(case.student)
        teacher, taught = _tracked(case.teacher)
        case = replace(case, student=student, teacher=teacher)
        before = _versions(case)
        with autocast(CPU, precision):
            called = self._call(case, modules)
        after = _versions(case)
        return Outcome(
            called,
            modules,
            _gradients(called.loss, own),
            _gradients(called.loss, taught),
            [name for name, version in before.items() if after[name] != version],
        )

    def _call(self, case: Case, modules: Mapping[str, nn.Module]) -> Called:
        watched = Watched(self.method, modules, case.real)
        pairs = case.pairs if self.needs.pairing == "positions" else None
        torch.manual_seed(0)
        probe(cast(Method, watched), case.student, case.teacher, case.tables, pairs=pairs)
        assert watched.block is not None
        ce = cross_entropy(case.student)
        loss = total_loss(self.method, ce, watched.returned)
        return Called(watched.block, watched.returned, ce, loss)

    def modules(self, pair: PairInfo, *, noise: bool) -> dict[str, nn.Module]:
        """The method's modules, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            modules = {name: extra.module for name, extra in self.method.modules(pair).items()}
            for parameter in nn.ModuleDict(modules).parameters() if noise else ():
                nn.init.normal_(parameter, std=0.3)  # what starts at zero would hide mistakes
        return modules

    # --- through the streamed step ------------------------------------------------------------

    @cached_property
    def dtype(self) -> torch.dtype:
        """float64, where only the order of sums differs; float32 for a method that mixes both."""
        try:
            self._streamed(self.batches(apart=True)[:1], EVERYTHING, torch.float64)
        except RuntimeError as error:
            if re.search("dtype|Double", str(error)):
                return torch.float32
        return torch.float64

    @cached_property
    def whole(self) -> Values:
        """`streamed` with one batch in one block."""
        return self.streamed(self.batches())

    @cached_property
    def cut(self) -> Values:
        """`streamed` with one batch in small blocks."""
        return self.streamed(self.batches(), BLOCK_ROWS)

    def batches(self, *, apart: bool = False) -> list[Batch]:
        """The documents in one batch, or each in its own."""
        parts = [[document] for document in documents()] if apart else [documents()]
        return [batch_of(self.pair.student, self.pair.teacher, part) for part in parts]

    def streamed(self, batches: Sequence[Batch], block_rows: int = EVERYTHING) -> Values:
        """Means of the terms and gradients of all parameters, by the harness."""
        return self._streamed(batches, block_rows, self.dtype)

    def _streamed(self, batches: Sequence[Batch], block_rows: int, dtype: torch.dtype) -> Values:
        with _default(dtype):
            step = self._step(block_rows, dtype)
            step.network.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            report = step.gradients(batches)
        found = {name: torch.tensor(value) for name, value in report.terms.items()}
        named = step.network.named_parameters()
        return found | {name: p.grad.clone() for name, p in named if p.grad is not None}

    def unstreamed(self) -> Values:
        """The same of all documents, with full logits, one graph and one backward."""
        (batch,) = self.batches()
        with _default(self.dtype):
            step = self._step(EVERYTHING, self.dtype)
            network, teacher = step.network, step.teacher
            assert teacher is not None
            hidden = network(batch.student.ids, batch.student.mask)[batch.student.position]
            taught = teacher.hidden(batch.teacher)[batch.teacher.position]
            case = Case(
                whole(batch.student, network.model, hidden, network.logits(hidden)),
                whole(batch.teacher, teacher.side.model, taught, teacher.logits(taught)),
                step.tables,
                position_pairs(batch, self.needs.skip_last_student_token),
            )
            called = self._call(case.given(self.needs), dict(network.extra.items()))
            return called.means() | _gradients(called.loss, dict(network.named_parameters()))

    def _step(self, block_rows: int, dtype: torch.dtype) -> Step:
        pair = make_pair(one_tokenizer=self.pair.one_tokenizer, dtype=dtype)
        widths = pair.student.width, pair.teacher.width
        modules = self.modules(PairInfo(*widths, pair.tables), noise=True)
        columns = len(pair.student.tokens.vocabulary)
        return Step(
            Network(pair.student.model, columns, modules).to(dtype),
            Teacher(pair.teacher, pair.tables.teacher_trie, "float32", identity="check"),
            cast(Method, Watched(self.method)),
            pair.tables,
            accelerator=Accelerator(cpu=True),
            block_rows=block_rows,
        )

    @property
    def weighted(self) -> bool:
        """Whether the method has terms of its own that count."""
        weights = self.method.weights()
        return any(weights.get(name, 1.0) for name in self.outcome.called.terms)

    def trained(self, steps: int) -> list[float]:
        """The loss before every step and after the last, on the pair `tiny` and one batch.

        Of the method's own terms alone, where it has any: cross-entropy falls whatever they do.
        """
        method = self.method
        if self.weighted:
            method = type(method)(method.options.model_copy(update={"ce_weight": 0.0}))
        student, teacher = tiny_sides(one_tokenizer=self.pair.one_tokenizer)
        student = replace(student, model=copy.deepcopy(student.model))
        tables = tables_of(student, teacher)
        texts = tuple(Document((Segment(text),)) for text in TEXTS)
        live = Teacher(teacher, tables.teacher_trie, "float32", identity="check")
        watched = cast(Method, Watched(method))
        setting = setup.Setting(student, live, watched, tables, Corpus("check", texts, (), {}))
        network, optimizer = setup.build_network(self.spec, setting)
        step = Step(network, live, watched, tables, accelerator=Accelerator(cpu=True))
        batch = batch_of(student, teacher, texts)
        losses = []
        for _ in range(steps):
            losses.append(step.gradients([batch]).loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [*losses, step.gradients([batch]).loss]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Quotients of counts in this precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tracked(rows: Rows) -> tuple[Rows, Values]:
    """The rows with logits and states that are not leaves, and the leaves that they come from."""
    leaves = {"logits": rows.scores().detach().requires_grad_()}
    if rows.hidden is not None:
        leaves["hidden"] = rows.hidden.detach().requires_grad_()
    return replace(rows, **{name: leaf.clone() for name, leaf in leaves.items()}), leaves


def _versions(case: Case) -> dict[str, int]:
    """How often each tensor of the rows was modified in place."""
    return {
        f"{side}.{name}": value._version
        for side, rows in (("student", case.student), ("teacher", case.teacher))
        for name, value in vars(rows).items()
        if isinstance(value, Tensor)
    }


def _gradients(loss: Tensor, inputs: Values) -> Values:
    found = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(inputs.items(), found, strict=True)
    }
