"""What `ctdbench inspect` found, as aligned text or JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest

from ctdbench.errors import UserError
from ctdbench.registry import suggestion
from ctdbench.spec import format_bytes
from ctdbench.text.critical_tokens import CriticalClass
from ctdbench.text.diagnostics import SIZES, Findings, Overlap, TeacherFindings

WIDTH = 100
GAP = "  "
OTHER_LOSS = {"h-kl": "p-kl", "p-kl": "h-kl"}  # of X-Token's two
Line = Sequence[str]


def render_inspection(findings: Findings, name: str) -> str:
    """The findings in the format of that name; raises UserError for an unknown one."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}", suggestion(name, FORMATS))
    return FORMATS[name](findings)


def terminal(findings: Findings) -> str:
    """Aligned tables, a section for each teacher."""
    head = f"{findings.pair}: {findings.text}"
    sections = (_section(findings.student, found) for found in findings.teachers)
    return "\n".join([head, *sections])


def as_json(findings: Findings) -> str:
    """All numbers; shares as fractions."""
    return json.dumps(asdict(findings), indent=1, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Findings], str]] = {"terminal": terminal, "json": as_json}


def _section(student: str, found: TeacherFindings) -> str:
    sides = f"student: {student}\nteacher: {found.teacher}"
    tables = (_text, _chunks, _vocabulary, _critical, _mass)
    blocks = [_aligned(table(found)) for table in tables]
    advice = found.recommendation
    choice = f"{advice.method} rather than {OTHER_LOSS[advice.method]}"
    told = f"of X-Token's two losses: {choice}, because {advice.reason}"
    blocks += [_wrapped(told)]
    return "\n\n".join([sides, *_refusals(found), *blocks]) + "\n"


def _refusals(found: TeacherFindings) -> list[str]:
    text = found.text
    if not text.refusal:
        return []
    counts = f"{text.refused_by_student} by the student's tokenizer"
    counts += f", {text.refused_by_teacher} by the teacher's"
    return [_wrapped(f"documents refused: {counts}; the first one: {text.refusal}")]


def _text(found: TeacherFindings) -> Iterator[Line]:
    text = found.text
    tokens = text.student_tokens, text.teacher_tokens
    yield f"{format_bytes(text.bytes)} in {text.documents:,} documents", "student", "teacher"
    yield "tokens", *(f"{count:,}" for count in tokens)
    yield "bytes a token", *(f"{text.bytes / count:.2f}" for count in tokens)


def _chunks(found: TeacherFindings) -> Iterator[Line]:
    chunks = found.chunks
    yield f"{chunks.chunks:,} chunks", *(f"{size} of teacher" for size in SIZES)
    for own in SIZES:
        counts = (chunks.by_size[f"{own}:{taught}"] for taught in SIZES)
        yield f"{own} of student", *(_percent(count / chunks.chunks) for count in counts)
    yield "text in 1:1 chunks", _percent(chunks.one_to_one_bytes)
    yield "longest chunk", f"{chunks.longest_bytes:,} bytes"


def _vocabulary(found: TeacherFindings) -> Iterator[Line]:
    yield "tokens of the vocabularies", "student only", "teacher only", "common"
    rows = {name: _counts(overlap) for name, overlap in found.vocabulary.items()}
    own, taught, common = (sum(column) for column in zip(*rows.values(), strict=True))
    for name, counts in {**rows, "all": (own, taught, common)}.items():
        yield name, *(f"{count:,}" for count in counts)
    yield "common share", _percent(common / (own + common)), _percent(common / (taught + common))


def _counts(overlap: Overlap) -> tuple[int, int, int]:
    return overlap.student_only, overlap.teacher_only, overlap.common


def _critical(found: TeacherFindings) -> Iterator[Line]:
    yield "critical tokens", "student has", "common", "of its text"
    for kind in found.critical:
        yield kind.name, _has(kind), f"{kind.common:,}", _percent(kind.text_share)


def _has(kind: CriticalClass) -> str:
    return f"{kind.student:,}" + (f" of {kind.possible:,}" if kind.possible is not None else "")


def _mass(found: TeacherFindings) -> Iterator[Line]:
    yield "the teacher's mass", "in common tokens", "reached by P-KL's projection"
    measured = {"by frequency in the text": found.frequency, "by probability": found.probability}
    for name, mass in measured.items():
        if mass is not None:
            yield name, _percent(mass.common), _percent(mass.projected)
    reached = f"{found.columns:,} of {found.teacher_ids:,}"
    yield "teacher tokens that P-KL's projection reaches", "", reached
    yield "token pairs of H-KL", f"{found.relaxed_pairs:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=GAP)


def _aligned(lines: Iterable[Line]) -> str:
    """Lines of cells as columns, the first one flush left; short lines are filled up."""
    columns = list(zip_longest(*lines, fillvalue=""))
    padded = []
    for index, column in enumerate(columns):
        width = max(map(len, column))
        pad = str.ljust if index == 0 else str.rjust
        padded.append([pad(cell, width) for cell in column])
    return "\n".join(GAP.join(line).rstrip() for line in zip(*padded, strict=True))
