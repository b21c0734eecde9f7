"""Checks of the loss: each takes a bench and returns what it found, or raises `Failed`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ctdbench.launch.check.findings import Failed, Skipped
from ctdbench.launch.check.method import cases
from ctdbench.launch.check.method.bench import BLOCK_ROWS, Bench, Outcome, Values
from ctdbench.launch.check.method.cases import Case
from ctdbench.launch.check.method.pair import Pair, documents, long_documents, make_pair
from ctdbench.method import mean, total_loss

Check = Callable[[Bench], str]
TOLERANCE = 1e-4  # relative, of float32 sums in another order
ZERO = 1e-5  # a mean below which it is rounding
PERTURBATIONS = (0.03, 0.3, 3.0)  # of the student's states
DIRECTIONS = 8
WORDS = 600  # of the long document, some 3,000 tokens
STEPS = 5
SIGNED = "zero, no minimum"  # a floor of META: terms that are negative for some students


# --- student = teacher ----------------------------------------------------------------------------


def floor(bench: Bench) -> str:
    """Where student = teacher on one tokenizer, the terms are zero, or at least at a minimum."""
    declared, _, reason = str(bench.meta.get("floor", "")).partition(":")
    if not bench.outcome.called.terms:
        raise Skipped("it has no terms of its own")
    if declared == "none":
        raise Skipped(reason.strip() or "META says none, and no reason")
    pair = make_pair(one_tokenizer=True)
    case = cases.twins(cases.make_case(pair, documents(), bench.needs))
    outcome = bench.evaluate(case)
    name, largest = max(
        ((name, abs(float(mean(term).detach()))) for name, term in outcome.called.terms.items()),
        key=lambda entry: entry[1],
    )
    zero = f"zero (within {largest:.0e})" if largest else "zero"
    if largest >= ZERO and declared.startswith("zero"):
        raise Failed(f"{name} is {largest:.3g} where student = teacher, and not zero")
    if declared == SIGNED:
        return f"{zero}; no minimum: {reason.strip()}"
    least = _own_loss(bench, outcome)
    _minimum(bench, case, least, "none" if largest >= ZERO else SIGNED)
    what = f"a minimum, {least:.4g}" if largest >= ZERO or declared == "minimum" else zero
    return f"{what}; no less for {DIRECTIONS * len(PERTURBATIONS)} other students"


def _minimum(bench: Bench, case: Case, least: float, otherwise: str) -> None:
    """No student near by or far off has a smaller loss than the teacher itself.

    otherwise: what META may say of a method that is meant to be different.
    """
    draw = torch.Generator().manual_seed(5)
    states = cases.states(case.student)
    columns = case.student.scores().shape[1]
    for size in PERTURBATIONS:
        for _ in range(DIRECTIONS):
            moved = states + size * torch.randn(states.shape, generator=draw)
            student = cases.with_states(case.student, moved, columns)
            loss = _own_loss(bench, bench.evaluate(replace(case, student=student)))
            if not loss >= least - ZERO * (1 + abs(least)):
                raise Failed(
                    f"the terms are {least:.6g} where student = teacher and {loss:.6g} for another "
                    f'student: is a sign wrong? If it is meant, META "floor": "{otherwise}: REASON"'
                )


def _own_loss(bench: Bench, outcome: Outcome) -> float:
    return float(total_loss(bench.method, None, outcome.called.terms).detach())


# --- unchanged by ---------------------------------------------------------------------------------


def padding(bench: Bench) -> str:
    """Rows that are no one's change nothing and get no gradient."""
    gaps = []
    for where in ("before", "after"):
        case, place = cases.padded(bench.case, where)
        outcome = bench.evaluate(case)
        own = torch.zeros(len(case.student.token), dtype=torch.bool)
        own[place] = True
        leaked = {f"{name} of padding": g[~own] for name, g in outcome.student.items()}
        expected = _all(bench.outcome) | {name: g * 0 for name, g in leaked.items()}
        found = outcome.called.means() | {n: g[place] for n, g in outcome.student.items()} | leaked
        try:
            gaps.append(_gap(found, expected, f"with rows {where} the documents"))
        except Failed as error:
            rule = "rows with chunk -1 or supervised False must not count"
            raise Failed(f"{error}; {rule}") from None
    return f"before and after the documents: {_within(*gaps)}"


def order(bench: Bench) -> str:
    """The order of documents changes nothing."""
    case, place = cases.reordered(bench.case)
    outcome = bench.evaluate(case)
    found = outcome.called.means() | {n: g[place] for n, g in outcome.student.items()}
    return f"the last document first: {_within(_gap(found, _all(bench.outcome), 'reversed'))}"


def student_ids(bench: Bench) -> str:
    """The numbering of the student's vocabulary (and of the teacher's, if it is the same)."""
    one = bench.pair.one_tokenizer
    return _renumbered(bench, make_pair(one_tokenizer=one, student_ids=1))


def teacher_ids(bench: Bench) -> str:
    """The numbering of the teacher's vocabulary."""
    if bench.pair.one_tokenizer:
        raise Skipped("the two sides share a tokenizer")
    return _renumbered(bench, make_pair(teacher_ids=1))


def _renumbered(bench: Bench, new: Pair) -> str:
    # As they start, for modules may have parameters by token.
    before = bench.evaluate(bench.case, noise=False)
    outcome = bench.evaluate(cases.renumbered(bench.case, bench.pair, new), noise=False)
    place = cases.new_ids(bench.pair.student, new.student)
    found = _all(outcome)
    found["logits"] = found["logits"][:, place]
    return f"shuffled: {_within(_gap(found, _all(before), 'renumbered'))}"


def block_size(bench: Bench) -> str:
    """How the harness cuts a batch into blocks changes neither loss nor gradient."""
    return _stepped(bench, bench.cut, bench.whole, f"blocks of {BLOCK_ROWS} rows")


def micro_batches(bench: Bench) -> str:
    """How the harness cuts a batch into micro-batches changes neither loss nor gradient."""
    found = bench.streamed(bench.batches(apart=True))
    return _stepped(bench, found, bench.whole, "one document each")


def _stepped(bench: Bench, found: Values, expected: Values, what: str) -> str:
    tolerance = TOLERANCE if bench.dtype == torch.float64 else 10 * TOLERANCE
    precision = str(bench.dtype).removeprefix("torch.")
    return f"{what}: {_within(_gap(found, expected, what, tolerance))}, in {precision}"


# --- finite ---------------------------------------------------------------------------------------


def no_chunk(bench: Bench) -> str:
    """A document without chunks among others, nothing but such, nothing supervised."""
    everywhere = range(len(documents()))
    _finite(bench.evaluate(cases.limited(bench.case, 0, [1])), "one document without chunks")
    _finite(bench.evaluate(cases.limited(bench.case, 0, everywhere)), "no document has a chunk")
    _finite(bench.evaluate(cases.unsupervised(bench.case)), "no row is supervised")
    return "one document without, none with any, nothing supervised"


def one_chunk(bench: Bench) -> str:
    """Documents of one chunk."""
    _finite(bench.evaluate(cases.limited(bench.case, 1, range(len(documents())))), "one chunk")
    return "every document"


def long_document(bench: Bench) -> str:
    """Thousands of rows in one document."""
    case = cases.make_case(bench.pair, long_documents(WORDS), bench.needs)
    _finite(bench.evaluate(case), "a long document")
    return f"{len(case.student.token)} rows on the student's side"


def half_precision(bench: Bench) -> str:
    """Logits and states in bfloat16, under autocast."""
    _finite(bench.evaluate(cases.coarse(bench.case), precision="bfloat16"), "bfloat16")
    return "logits and states"


def extreme_logits(bench: Bench) -> str:
    """One token has all of the mass; the student's and the teacher's differ."""
    _finite(bench.evaluate(cases.one_hot(bench.case)), "one-hot rows")
    return "one token has all of the mass"


def _finite(outcome: Outcome, what: str) -> None:
    for name, value in _all(outcome).items():
        if not torch.isfinite(value).all():
            kind = "gradient of the student's " if value.ndim else ""
            raise Failed(f"{what}: {kind}{name} is not finite")


# --- gradient and training ------------------------------------------------------------------------


def streaming(bench: Bench) -> str:
    """The step's gradient, taken block by block, is that of the loss on everything at once."""
    return _stepped(bench, bench.cut, bench.unstreamed(), "the step's gradient, and autograd's")


def training(bench: Bench) -> str:
    """A few steps on the pair `tiny` lower what the method adds to cross-entropy, if anything."""
    losses = bench.trained(STEPS)
    what = "the terms go" if bench.weighted else "cross-entropy goes"
    told = f"{what} from {losses[0]:.4g} to {losses[-1]:.4g}"
    if not losses[-1] < losses[0]:
        raise Failed(f"{told} in {STEPS} steps, trained on nothing else")
    return told


# --- equality -------------------------------------------------------------------------------------


def _all(outcome: Outcome) -> Values:
    return outcome.called.means() | outcome.student


def _gap(found: Values, expected: Values, what: str, tolerance: float = TOLERANCE) -> float:
    """The largest relative difference; raises Failed where it is more than rounding.

    Means are compared each by itself, gradients as parts of one.
    """
    sizes = [float(value.abs().max()) for value in expected.values() if value.ndim]
    scale = max([1e-6, *sizes])
    worst = 0.0
    for name in sorted(expected.keys() | found.keys()):
        some = found.get(name, expected.get(name))
        assert some is not None
        one, other = (values.get(name, some * 0) for values in (found, expected))
        size = scale if some.ndim else max(float(other.abs()), 1e-2)
        gap = float((one - other).abs().max()) / size
        if not gap <= tolerance:
            raise Failed(f"{what}: {_difference(name, one, other, gap)}")
        worst = max(worst, gap)
    return worst


def _difference(name: str, one: Tensor, other: Tensor, gap: float) -> str:
    if one.ndim:
        return f"the gradient of {name} differs by {gap:.1g} of the largest"
    return f"{name} is {float(one):.6g}, not {float(other):.6g}"


def _within(*gaps: float) -> str:
    return f"the same within {max(gaps):.0e}" if max(gaps) else "exactly the same"
