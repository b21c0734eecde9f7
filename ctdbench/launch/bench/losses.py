"""What a method's loss costs on given predictions of both sides, with no model at all.

A loss is all that a method makes of a block: what it has to know beforehand (pairs of rows, the
teacher's byte distributions, `Method.prepare`), its terms, and cross-entropy where that has a
weight. Its gradient is that of the student's logits, of its states where the method reads them, and
of the method's modules. The bare cost is the softmax of both sides and cross-entropy's gradient on
the student's; cross-entropy's forward is the student's softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctdbench import ops
from ctdbench.distill.blocks import pairs_per_document, position_pairs
from ctdbench.distill.precision import autocast, resolve
from ctdbench.errors import UserError
from ctdbench.launch.bench.costs import BARE, Candidate, Costs, machine, measure
from ctdbench.launch.bench.inputs import WIDTH, Inputs, make_inputs
from ctdbench.launch.grid import parse_row
from ctdbench.method import (
    Block,
    Method,
    Needs,
    PairInfo,
    PairTables,
    bare,
    create,
    cross_entropy,
    total_loss,
)

ONE = f"{BARE}, one vocabulary"


class Loss:
    """A differentiable function whose forward and backward are called in turns."""

    def __init__(self, function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
        self.function = function
        self.inputs = inputs
        self.value: Tensor | None = None

    def forward(self) -> None:
        """Leaves the loss, and with it its graph."""
        self.value = self.function()

    def backward(self) -> None:
        """Uses up what `forward` left."""
        value, self.value = self.value, None
        assert value is not None
        torch.autograd.grad(value, self.inputs, allow_unused=True)

    def candidate(self, name: str, base: str = "") -> Candidate:
        """Both, to be measured. base: name of the bare cost, by default its own."""
        return Candidate(name, {"forward": self.forward, "backward": self.backward}, base or name)


def bench_losses(
    names: Sequence[str],
    sizes: tuple[int, int],
    rows: int,
    repeats: int = 7,
    *,
    progress: bool = False,
) -> Costs:
    """Costs of methods' losses on so many rows of both sides; sizes: of the two vocabularies.

    names: as rows of a table, such as `bld[path]` (`grid.parse_row`). A method that refuses two
    vocabularies gets the student's on both sides.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve("auto", device)
    inputs = {BARE: make_inputs(sizes, rows, device)}
    methods = {name: create(*parse_row(name)) for name in names}
    alone = [name for name, method in methods.items() if refusal(method, inputs[BARE].tables)]
    if alone:
        inputs[ONE] = make_inputs(sizes, rows, device, one_vocabulary=True)
    refused = {name: refusal(methods[name], inputs[ONE].tables) for name in alone}
    candidates = [bare_loss(given, precision).candidate(base) for base, given in inputs.items()]
    for name, method in methods.items():
        if not refused.get(name):
            base = ONE if name in alone else BARE
            candidates.append(method_loss(method, inputs[base], precision).candidate(name, base))
    setting = {"vocabularies": "{} x {}".format(*sizes), "rows": rows}
    return Costs(
        "losses",
        {**setting, **machine(device, precision)},
        measure(candidates, repeats, progress=progress),
        {name: reason for name, reason in refused.items() if reason},
    )


def refusal(method: Method, tables: PairTables) -> str:
    """Why the method does not serve a pair; "" where it does."""
    try:
        method.check(tables)
    except UserError as error:
        return str(error)
    return ""


def bare_loss(given: Inputs, precision: str) -> Loss:
    """Softmax of both sides and cross-entropy on the student's."""
    student, teacher = given.student, given.teacher

    def loss() -> Tensor:
        with autocast(teacher.token.device, precision):
            teacher.scores().softmax(-1)
            return nn.functional.cross_entropy(student.scores(), student.token)

    return Loss(loss, [student.scores()])


def method_loss(method: Method, given: Inputs, precision: str) -> Loss:
    """A method's loss on one block of everything, with new modules."""
    device = given.student.token.device
    extras = method.modules(PairInfo(WIDTH, WIDTH, given.tables))
    modules = {name: extra.module.to(device) for name, extra in extras.items()}
    assert given.student.hidden is not None
    leaves = [given.student.scores(), given.student.hidden]

    def loss() -> Tensor:
        with autocast(device, precision):
            ce = cross_entropy(given.student) if method.options.ce_weight else None
            return total_loss(method, ce, method.terms(make_block(method, given), modules))

    return Loss(loss, [*leaves, *nn.ModuleDict(modules).parameters()])


def make_block(method: Method, given: Inputs) -> Block:
    """One block of all rows, with what the method asks for."""
    needs, batch = method.needs, given.batch
    pairs = None
    if needs.pairing == "positions":
        pairs = position_pairs(batch, needs.skip_last_student_token)
    elif needs.pairing == "own":
        pairs = method.pairs(bare(given.student), bare(given.teacher), given.tables)
    with torch.no_grad():
        return Block(
            student=given.student,
            teacher=given.teacher if needs.teacher_logits else None,
            chunks=int(batch.document_chunks.sum()),
            document_chunks=(
                batch.document_chunks if pairs is None else pairs_per_document(batch, pairs)
            ),
            pairs=pairs,
            bytes=_byte_distributions(needs, given) if needs.bytes else None,
            pair=given.tables,
            batch=method.prepare(given.teacher) if needs.prepare else None,
        )


def _byte_distributions(needs: Needs, given: Inputs) -> Tensor:
    """[N, 257]. The beam needs a model; what it makes is like what `mixed` does."""
    rows = given.teacher
    return ops.byte_distributions(
        given.tables.teacher_trie,
        rows.scores().softmax(-1),
        rows.token,
        rows.byte_end - rows.byte_start,
        rows.document,
        estimator="path" if needs.bytes == "path" else "mixed",
        end_bin=needs.end_bin,
    )
