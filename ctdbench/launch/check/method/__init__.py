"""`ctdbench check METHOD`: what every method must hold, one line a finding.

    ok       padding: before and after the documents: the same within 2e-07
    FAIL     counts: kl counts 12.0 in terms(), 13.0 in advance
    skipped  floor: byte heads of its own

A method's META may say what the checks have to know of it:
floor       what its terms are where student = teacher: "zero", and no less for any other student;
            "zero, no minimum: REASON" where some students have less; "minimum" (such as a
            cross-entropy with the teacher); "none: REASON". Without it zero is tried, then minimum.
exceptions  {CHECK: REASON} for what changes the loss by construction; "CHECK if OPTION=VALUE" for a
            variant that does. Only `floor` and the group "unchanged by" have exceptions.

A block may have no rows on a side: of a document without chunks there is cross-entropy alone, and
`terms`, `counts`, `scalars` and `prepare` are called with what is left. A maximum or a mean of
nothing is what breaks there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from ctdbench import registry
from ctdbench.launch.check.findings import Failed, Finding, found_by, tell
from ctdbench.launch.check.method import checks, contract
from ctdbench.launch.check.method.bench import Bench
from ctdbench.launch.check.method.checks import Check
from ctdbench.method import Needs
from ctdbench.spec import RunSpec

FLOORS = {"zero": False, checks.SIGNED: True, "minimum": False, "none": True}  # with a reason?
EXCUSABLE = ("student = teacher", "unchanged by")  # groups: any other check holds of all methods


def meta(bench: Bench) -> str:
    """META is complete, literal, and names checks that exist."""
    stated = bench.meta
    baseline = not bench.needs.teacher  # cross-entropy alone has no paper
    wrong = [
        key for key in ("title", "cost") if not (isinstance(stated.get(key), str) and stated[key])
    ]
    if not isinstance(stated.get("needs"), list):
        wrong.append("needs (a list)")
    if not (stated.get("paper") or stated.get("url") or baseline):
        wrong.append("paper (arXiv number) or url")
    if not (isinstance(stated.get("year"), int) or baseline):
        wrong.append("year")
    if wrong:
        raise Failed(f"META lacks {', '.join(wrong)}")
    listed = registry.methods()[bench.spec.method]
    if listed.file is not None and dict(listed.meta) != dict(stated):
        raise Failed(
            f"META is no literal in {listed.file.name}, so `ctdbench list` cannot read it without "
            "an import"
        )
    _check_declared(stated, bench.method.options.model_dump())
    paper = f"arXiv {stated['paper']}" if stated.get("paper") else stated.get("url")
    return ", ".join(str(part) for part in (paper, stated.get("year")) if part) or "complete"


def _check_declared(stated: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    if (row := stated.get("row")) is not None and row not in list(options):
        raise Failed(f"META row: {row!r} is no option; there are: {', '.join(options)}")
    kind, _, reason = str(stated.get("floor", "zero")).partition(":")
    if kind not in FLOORS or FLOORS[kind] != bool(reason.strip()):
        allowed = (f'"{name}: REASON"' if why else f'"{name}"' for name, why in FLOORS.items())
        raise Failed(f"META floor must be one of {', '.join(allowed)}")
    exceptions = stated.get("exceptions", {})
    checks_named = f"checks: {', '.join(_excusable())}"
    if not isinstance(exceptions, dict):
        raise Failed(f"META exceptions must be {{CHECK: REASON}}; {checks_named}")
    for key, why in exceptions.items():
        name, condition, option, equals = _parts(key)
        if name not in _excusable() or not str(why or "").strip():
            raise Failed(f"META exceptions: {key!r} is no such check with a reason; {checks_named}")
        if condition and not (option in options and equals):
            known = ", ".join(options)
            raise Failed(f"META exceptions: {key!r} names no OPTION=VALUE; options: {known}")


CHECKS: Mapping[str, Mapping[str, Check]] = {
    "contract": {
        "META": meta,
        "options": contract.options,
        "terms": contract.terms,
        "counts": contract.counts,
        "weights": contract.weights,
        "teacher": contract.teacher,
        "inputs": contract.inputs,
    },
    "student = teacher": {"floor": checks.floor},
    "unchanged by": {
        "padding": checks.padding,
        "document order": checks.order,
        "student ids": checks.student_ids,
        "teacher ids": checks.teacher_ids,
        "block size": checks.block_size,
        "micro-batches": checks.micro_batches,
    },
    "finite": {
        "no chunk": checks.no_chunk,
        "one chunk": checks.one_chunk,
        "long documents": checks.long_document,
        "bfloat16": checks.half_precision,
        "one-hot logits": checks.extreme_logits,
    },
    "gradient": {"streaming": checks.streaming},
    "training": {"five steps": checks.training},
}


def names() -> list[str]:
    """Names of all checks."""
    return [name for group in CHECKS.values() for name in group]


def check(bench: Bench) -> Iterator[Finding]:
    """Every check on a method, in order; what breaks one check fails it and no other.

    A failure that reads like an earlier one is `as CHECK`.
    """
    seen: dict[str, str] = {}
    for group, members in CHECKS.items():
        for name, run_check in members.items():
            finding = _finding(bench, group, name, run_check)
            if finding.status == "FAIL":
                earlier = seen.setdefault(finding.text, name)
                noted = _noted(finding.crash, finding.text)
                finding = replace(finding, text=noted if earlier == name else f"as {earlier}")
            yield finding


def run(spec: RunSpec, say: Callable[[str], None], *, debug: bool = False) -> bool:
    """Say the report line by line as it comes; whether every check passed.

    spec: a cell on the pair `tiny` with the method's resolved options. debug: with the traceback
    of the first crash.
    """
    bench = Bench(spec)
    for line in heading(bench):
        say(line)
    return tell(check(bench), say, debug=debug)


def heading(bench: Bench) -> list[str]:
    """The method, what it needs, the options that are not its defaults, the pair it is run on."""
    given = [
        f"{field.name}={getattr(bench.needs, field.name)}"
        for field in fields(Needs)
        if getattr(bench.needs, field.name) != field.default
    ]
    method = type(bench.method)
    options = bench.method.options.model_dump(exclude_defaults=True)
    needs = bench.meta.get("needs")
    told = {
        "needs": ", ".join(map(str, needs or [])) if isinstance(needs, list) else str(needs or ""),
        "asks for": ", ".join(given) or "teacher_logits=True",
        "options": ", ".join(f"{name}={value}" for name, value in options.items()),
        "pair": bench.refusal and f"one tokenizer, for {bench.refusal}",
    }
    title = str(bench.meta.get("title", method.__name__))
    lines = [f"  {key}: {text}" for key, text in told.items() if text]
    return [f"{bench.spec.method}  {title}", *lines]


def _finding(bench: Bench, group: str, name: str, run_check: Check) -> Finding:
    reason = _exception(bench, name)
    if reason:
        return Finding(group, name, "skipped", reason)
    file = inspect.getsourcefile(type(bench.method)) or ""
    return found_by(group, name, lambda: run_check(bench), file)


def _exception(bench: Bench, name: str) -> str:
    """Why META excepts the method, with its options, from a check; "" where it does not."""
    options = bench.method.options.model_dump()
    stated = bench.meta.get("exceptions")
    for key, reason in stated.items() if isinstance(stated, dict) else ():
        excepted, condition, option, value = _parts(key)
        holds = not condition or (option in options and str(options[option]) == value)
        if excepted == name and name in _excusable() and holds:
            return str(reason or "")
    return ""


def _parts(key: object) -> tuple[str, str, str, str]:
    """`CHECK if OPTION=VALUE` -> (CHECK, `OPTION=VALUE`, OPTION, VALUE)."""
    name, _, condition = str(key).partition(" if ")
    option, _, value = condition.partition("=")
    return name, condition, option, value


def _excusable() -> list[str]:
    return [name for group in EXCUSABLE for name in CHECKS[group]]


def _noted(crash: Exception | None, text: str) -> str:
    """The failure, behind what `Watched` notes of the rows that the method crashed on."""
    return ": ".join([*getattr(crash, "__notes__", []), text])
