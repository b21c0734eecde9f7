"""Checks of the contract: what a method returns, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ctdbench.launch.check.findings import Failed
from ctdbench.launch.check.method.bench import Bench
from ctdbench.launch.check.method.cases import make_case
from ctdbench.launch.check.method.pair import documents
from ctdbench.method import Block, Rows, Scalars, Term, bare, mean, total_loss

TOLERANCE = 1e-4  # of counts, which may be sums of fractions


def options(bench: Bench) -> str:
    """Every option is described, none can be changed, nothing unknown is accepted."""
    model = type(bench.method.options)
    silent = [n for n, f in model.model_fields.items() if not (f.description or "").strip()]
    if silent:
        raise Failed(f"{', '.join(silent)}: no description; write Field(.., description=..)")
    config = model.model_config
    if not config.get("frozen") or config.get("extra") != "forbid":
        raise Failed("they are not frozen, or take unknown names; derive them from MethodOptions")
    return f"{len(model.model_fields)}, each described"


def terms(bench: Bench) -> str:
    """Every term is a finite scalar with a finite count, and something can be learned from them."""
    found = bench.outcome.called.terms
    if not found:
        return "none of its own: cross-entropy alone"
    for name, term in found.items():
        for part, value in (("total", term.total), ("count", term.count)):
            if not torch.isfinite(value):
                raise Failed(f"the {part} of {name} is not finite: {value}")
        if term.count.requires_grad:
            raise Failed(f"the count of {name} has a gradient; it must follow from tokens alone")
    if not total_loss(bench.method, None, found).requires_grad:
        raise Failed("no gradient reaches the student or a module")
    return ", ".join(
        f"{name} {float(mean(t).detach()):.3g} over {float(t.count):g}" for name, t in found.items()
    )


def counts(bench: Bench) -> str:
    """The counts are known before any logits of the student's are, and are those of `terms`."""
    called = bench.outcome.called
    told = _told(bench, called.block)
    if told is not None:
        _same_counts(told, called.terms, f"in {_teller(bench)}")
    drawn = make_case(bench.pair, documents(), bench.needs, seed=1)
    other = bench.evaluate(replace(bench.case, student=drawn.student)).called.terms
    found = {name: term.count for name, term in other.items()}
    other_logits = "with other student logits; a count must not depend on them"
    _same_counts(found, called.terms, other_logits)
    known = "known" if told is not None else "none told; the harness asks terms() on zeros, known"
    return f"{known} without the student's logits"


def _teller(bench: Bench) -> str:
    return "totals()" if bench.needs.kind == "scalars" else "counts()"


def _told(bench: Bench, block: Block) -> Mapping[str, Tensor] | None:
    """What the method says of its counts in advance; None where it leaves that to the harness."""
    if bench.needs.kind == "blocks":
        teacher = None if block.teacher is None else _unread(block.teacher)
        return bench.method.counts(
            replace(block, student=_unread(block.student), teacher=teacher, bytes=None)
        )
    taught = block.taught()
    with torch.no_grad():
        values = bench.method.scalars(taught, "teacher", block.pair, bench.outcome.modules)
    totals = bench.method.totals(bare(block.student), Scalars(values, bare(taught)))
    missing = bench.outcome.called.terms.keys() - totals.keys()
    if missing:
        raise Failed(f"totals() leaves out {', '.join(sorted(missing))}")
    return {name: totals[name] for name in bench.outcome.called.terms}


def _unread(rows: Rows) -> Rows:
    return replace(rows, logits=None, hidden=None)


def _same_counts(told: Mapping[str, Tensor], found: Mapping[str, Term], when: str) -> None:
    for name in sorted(told.keys() | found.keys()):
        said = float(told[name]) if name in told else None
        counted = float(found[name].count) if name in found else None
        if said is None or counted is None or abs(said - counted) > TOLERANCE * (1 + abs(counted)):
            one, other = ("nothing" if n is None else f"{n:g}" for n in (counted, said))
            raise Failed(f"{name} counts {one} in terms(), {other} {when}")


def weights(bench: Bench) -> str:
    """Weights are numbers, and those that count are of terms that exist."""
    stated, found = bench.method.weights(), bench.outcome.called.terms
    for name, weight in stated.items():
        if weight and name not in found:
            raise Failed(f"{name} has weight {weight:g} and is no term; {_names(found)}")
    named = [f"{name} {stated.get(name, 1.0):g}" for name in found]
    return ", ".join([f"ce {bench.method.options.ce_weight:g}", *named])


def _names(found: Mapping[str, object]) -> str:
    return f"there are: {', '.join(found)}" if found else "there are none"


def teacher(bench: Bench) -> str:
    """No gradient reaches the teacher."""
    for name, gradient in bench.outcome.teacher.items():
        if gradient.abs().max() > 0:
            read = "scores()" if name == "logits" else name
            cure = f"use block.taught().{read}.detach()"
            raise Failed(f"a gradient reaches the teacher's {name}; {cure}")
    return "no gradient reaches it"


def inputs(bench: Bench) -> str:
    """The rows are as they were."""
    if bench.outcome.changed:
        raise Failed(f"modified in place: {', '.join(bench.outcome.changed)}")
    return "none is modified in place"
