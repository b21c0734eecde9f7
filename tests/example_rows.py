"""Two small documents as rows of a student and a teacher, for the tests of methods."""

from __future__ import annotations

import torch
from torch import Tensor

from ctdbench.method import Block, Method, PairInfo, PairTables, Rows

# documents "abab\xc3\xa9" and "baa"; the student has a dummy prefix on the second
STUDENT = [b"", b"a", b"b", b"ab", b"\xc3", b"\xa9", b" ba", b"abab\xc3\xa9b", b" ", b""]
TEACHER = [b"", b"ab", b"a", b"b", b"\xc3\xa9", b"ba", b"aba", b" b", b""]
PAIR = PairTables.build(STUDENT, TEACHER)
WIDTH = 6


def spans(tokens: list[int], widths: list[int], documents: list[int]) -> dict[str, Tensor]:
    starts = [
        sum(w for w, d in zip(widths[:r], documents[:r], strict=True) if d == documents[r])
        for r in range(len(tokens))
    ]
    ends = [start + width for start, width in zip(starts, widths, strict=True)]
    return {
        "token": torch.tensor(tokens),
        "document": torch.tensor(documents),
        "byte_start": torch.tensor(starts),
        "byte_end": torch.tensor(ends),
    }


def two_sides(seed: int = 0) -> tuple[Rows, Rows]:
    """Student and teacher rows; the first chunk of document 1 is a prompt, the last row an end."""
    generator = torch.Generator().manual_seed(seed)
    student = Rows(
        logits=torch.randn(9, len(STUDENT), generator=generator),
        chunk=torch.tensor([0, 1, 1, 2, 2, -1, 3, -1, -1]),
        supervised=torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0]).bool(),
        hidden=torch.randn(9, WIDTH, generator=generator),
        **spans([3, 1, 2, 4, 5, 0, 6, 1, -1], [2, 1, 1, 1, 1, 0, 2, 1, 0], [0] * 6 + [1] * 3),
    )
    teacher = Rows(
        logits=torch.randn(7, len(TEACHER), generator=generator),
        chunk=torch.tensor([0, 1, 2, -1, 3, 3, -1]),
        supervised=torch.ones(7).bool(),
        **spans([1, 1, 4, 0, 3, 2, -1], [2, 2, 2, 0, 1, 1, 0], [0] * 4 + [1] * 3),
    )
    return student, teacher


def head_weights(slots: int = 10, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "heads.weight": torch.randn(slots, 260, WIDTH, generator=generator),
        "heads.bias": torch.randn(slots, 260, generator=generator),
    }


def block_of(student: Rows, teacher: Rows | None, distributions: Tensor | None = None) -> Block:
    chunks = 1 + int(student.chunk.max()) if len(student.chunk) else 0
    documents = torch.tensor([3, 1])
    return Block(student, teacher, chunks, documents, torch.zeros(0, 2).long(), distributions, PAIR)


def byte_heads(method: Method) -> torch.nn.Module:
    """The heads of `bld` with weights as after some training; they start at zero."""
    heads = method.modules(PairInfo(WIDTH, WIDTH, PAIR))["heads"].module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return heads
