"""Tokens by class, the critical ones that two vocabularies share, and the loss that fits them."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctdbench.text.vocabulary import Integers, ids_by_bytes

CLASSES = (
    "digits",
    "letters",
    "punctuation",
    "whitespace",
    "CJK",
    "other text",
    "part of a character",
)
LEAST_COMMON = 0.5  # a critical class with a smaller common share falls outside
LEAST_TEXT = 0.01  # of the text, for a class that X-Token does not audit to matter
_ASCII = re.compile(
    rb"(?P<whitespace>\s+)| ?(?:(?P<digits>[0-9]+)|(?P<letters>[A-Za-z]+)"
    rb"|(?P<punctuation>[!-/:-@\[-`{-~]+))"
)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass(frozen=True)
class CriticalClass:
    """Tokens of the student's vocabulary whose loss would hurt, and how many are common.

    possible: how many such tokens there can be; None for an open class. text_share: their share of
    the student's tokens in the text. audited: X-Token counts this class.
    """

    name: str
    possible: int | None
    student: int
    common: int
    text_share: float
    audited: bool


@dataclass(frozen=True)
class Recommendation:
    """One of X-Token's two losses, and why, in one line."""

    method: Literal["p-kl", "h-kl"]
    reason: str


def token_class(token: bytes) -> str:
    """One of `CLASSES`; a space in front of digits, letters or punctuation does not count."""
    ascii_only = _ASCII.fullmatch(token)
    if ascii_only is not None:
        return str(ascii_only.lastgroup)
    try:
        return "CJK" if _CJK.search(token.decode("utf-8")) else "other text"
    except UnicodeDecodeError:
        return "part of a character"


def critical_classes(
    student_vocabulary: Sequence[bytes],
    teacher_vocabulary: Sequence[bytes],
    student_ids: Integers,
) -> tuple[CriticalClass, ...]:
    """The critical classes of a student's vocabulary; student_ids [n]: its tokens of the text.

    Numerals are plain: b"07" counts, b" 07" does not. Punctuation is a single ASCII mark, plain or
    after a space. X-Token's Table 8 counts 13 one-digit numerals and 88 marks for Llama 3, without
    saying which.
    """
    ids, shared = ids_by_bytes(student_vocabulary), set(teacher_vocabulary)
    counts = np.bincount(student_ids, minlength=len(student_vocabulary))
    classes = []
    for name, possible, tokens in _classes(ids):
        used = counts[np.array([ids[token] for token in tokens], dtype=np.int64)].sum()
        classes.append(
            CriticalClass(
                name=name,
                possible=possible,
                student=len(tokens),
                common=len(shared.intersection(tokens)),
                text_share=float(used / max(counts.sum(), 1)),
                audited=possible is not None,
            )
        )
    return tuple(classes)


def recommend(classes: Iterable[CriticalClass]) -> Recommendation:
    """Which of X-Token's losses fits two vocabularies (arXiv 2605.21699, the audit of Table 8).

    H-KL keeps the common vocabulary apart and suppresses what lies outside it, so it is right where
    the critical classes are common (Llama with Phi-4-mini: all numerals are). P-KL has no partition
    and is right where a critical class that the student has falls outside (Llama with Qwen: of the
    numerals with two or three digits none is common). The paper tells this by its two pairs and
    gives no threshold. Ours: a class falls outside if less than half of it is common. Numerals and
    punctuation always count, as in the paper; CJK and whitespace, which it does not audit, where
    they are at least 1 % of the student's tokens in the text.
    """
    outside = [found for found in classes if found.common < LEAST_COMMON * found.student]
    hurt = [found for found in outside if found.audited or found.text_share >= LEAST_TEXT]
    if hurt:
        reason = f"h-kl would suppress what lies outside the common vocabulary: {_told(hurt)}"
        return Recommendation("p-kl", reason)
    spared = f"; outside, but hardly in this text: {_told(outside)}" if outside else ""
    return Recommendation("h-kl", f"the critical tokens of this text are common{spared}")


def _told(classes: Iterable[CriticalClass]) -> str:
    return ", ".join(
        f"{found.name} ({found.common:,} of {found.student:,} common)" for found in classes
    )


def _classes(
    vocabulary: Collection[bytes],
) -> Iterator[tuple[str, int | None, list[bytes]]]:
    """Name, possible number and tokens of each critical class of a vocabulary."""
    marks = string.punctuation.encode("ascii")
    closed = {
        f"{digits}-digit numerals": [b"%0*d" % (digits, value) for value in range(10**digits)]
        for digits in (1, 2, 3)
    }
    closed["punctuation"] = [lead + bytes([mark]) for lead in (b"", b" ") for mark in marks]
    for name, listed in closed.items():
        yield name, len(listed), [token for token in listed if token in vocabulary]
    by_class: dict[str, list[bytes]] = {"CJK": [], "whitespace": []}
    for token in vocabulary:
        by_class.get(token_class(token), []).append(token)
    for name, tokens in by_class.items():
        yield name, None, tokens
