"""`ctdbench check METHOD`: what every method must hold, one line a finding.

    ok       padding: before and after the documents: the same within 2e-07
    FAIL     counts: kl counts 12.0 in terms(), 13.0 in advance
    skipped  floor: byte heads of its own

A method's META may say what the checks have to know of it:
floor       what its terms are where student = teacher: "zero"; "minimum" (such as a cross-entropy
            with the teacher); or "none: REASON". Without it zero is tried, then minimum.
exceptions  {CHECK: REASON} for what changes the loss by construction; "CHECK if OPTION=VALUE" for a
            variant that does.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ctdbench import registry
from ctdbench.launch.conformance import checks, contract
from ctdbench.launch.conformance.bench import Bench
from ctdbench.launch.conformance.checks import Check
from ctdbench.launch.conformance.watched import Failed, Skipped
from ctdbench.method import Needs
from ctdbench.spec import RunSpec

Status = Literal["ok", "FAIL", "skipped"]
FLOORS = ("zero", "minimum", "none")


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
        raise Failed("META is no literal, so `ctdbench list` cannot read it without an import")
    _check_declared(stated)
    paper = f"arXiv {stated['paper']}" if stated.get("paper") else stated.get("url")
    return ", ".join(str(part) for part in (paper, stated.get("year")) if part) or "complete"


def _check_declared(stated: Mapping[str, Any]) -> None:
    kind, _, reason = str(stated.get("floor", "zero")).partition(":")
    if kind not in FLOORS or (kind == "none") != bool(reason.strip()):
        raise Failed('META floor: "zero", "minimum" or "none: REASON"')
    for key, why in _exceptions(stated).items():
        if key.partition(" if ")[0] not in names() or not str(why).strip():
            raise Failed(
                f"META exceptions: {key!r} is no check with a reason; {', '.join(names())}"
            )


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


@dataclass(frozen=True)
class Finding:
    """What one check found, on one line."""

    group: str
    name: str
    status: Status
    text: str


def names() -> list[str]:
    """Names of all checks."""
    return [name for group in CHECKS.values() for name in group]


def check(bench: Bench) -> Iterator[Finding]:
    """Every check on a method, in order; what breaks one check fails it and no other."""
    for group, members in CHECKS.items():
        for name, run_check in members.items():
            yield Finding(group, name, *_outcome(bench, name, run_check))


def run(spec: RunSpec, say: Callable[[str], None]) -> bool:
    """Say the report line by line as it comes; whether every check passed.

    spec: a cell on the pair `tiny` with the method's resolved options.
    """
    bench = Bench(spec)
    for line in heading(bench):
        say(line)
    found: list[Finding] = []
    for finding in check(bench):
        if not found or found[-1].group != finding.group:
            say(f"\n{finding.group}")
        say(f"  {finding.status:<7}  {finding.name}: {finding.text}")
        found.append(finding)
    say("\n" + verdict(found))
    return not any(finding.status == "FAIL" for finding in found)


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


def verdict(found: Iterable[Finding]) -> str:
    """`17 of 17 checks passed, 1 skipped`."""
    statuses = [finding.status for finding in found]
    skipped = statuses.count("skipped")
    ran = len(statuses) - skipped
    rest = f", {skipped} skipped" if skipped else ""
    return f"{statuses.count('ok')} of {ran} checks passed{rest}"


def _outcome(bench: Bench, name: str, run_check: Check) -> tuple[Status, str]:
    reason = _exception(bench, name)
    if reason:
        return "skipped", reason
    try:
        return "ok", run_check(bench)
    except Skipped as found:
        return "skipped", str(found)
    except Failed as found:
        return "FAIL", str(found)
    except Exception as error:  # a plugin may raise anything; the other checks go on
        return "FAIL", _one_line(error, inspect.getsourcefile(type(bench.method)) or "")


def _exception(bench: Bench, name: str) -> str:
    """Why META excepts the method, with its options, from a check; "" where it does not."""
    options = bench.method.options.model_dump()
    for key, reason in _exceptions(bench.meta).items():
        excepted, _, condition = key.partition(" if ")
        option, _, value = condition.partition("=")
        if excepted == name and (not option or str(options.get(option)) == value):
            return str(reason)
    return ""


def _exceptions(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    found = stated.get("exceptions", {})
    return found if isinstance(found, dict) else {"": ""}  # what is no mapping, names no check


def _one_line(error: Exception, file: str) -> str:
    """The error, and the line of the method's own file that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = f" ({Path(file).name} line {frames[-1].lineno})" if frames else ""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}{where}"
