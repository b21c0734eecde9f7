"""A stand-in for a method that says what it was given and what it returned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ctdbench.launch.check.method.cases import picked
from ctdbench.method import (
    Block,
    Method,
    Needs,
    PairInfo,
    PairTables,
    Rows,
    SideName,
    Term,
    Trainable,
)
from ctdbench.rows import checked


class Watched:
    """Stands in for a method: keeps the block that it was given and the terms that it returned.

    modules: used instead of new ones. real: the rows that `prepare` may see; padding has no row
    there, in the harness. Byte distributions by `beam`, which needs a model and writes a cache,
    become those of `mixed`: rows of the same kind.
    """

    def __init__(
        self,
        method: Method,
        modules: Mapping[str, nn.Module] | None = None,
        real: Tensor | None = None,
    ) -> None:
        self.method = method
        self.given = modules
        self.real = real
        self.block: Block | None = None
        self.returned: dict[str, Term] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    @property
    def needs(self) -> Needs:
        needs = self.method.needs
        return replace(needs, bytes="mixed") if needs.bytes == "beam" else needs

    def modules(self, pair: PairInfo) -> dict[str, Trainable]:
        if self.given is None:
            return self.method.modules(pair)
        return {name: Trainable(module) for name, module in self.given.items()}

    def prepare(self, teacher: Rows) -> Tensor:
        rows = teacher if self.real is None else picked(teacher, self.real)
        with _naming_empty(teacher=rows):
            return self.method.prepare(rows)

    def scalars(
        self, rows: Rows, side: SideName, pair: PairTables, modules: Mapping[str, nn.Module]
    ) -> Tensor:
        with _naming_empty(**{side: rows}):
            return self.method.scalars(rows, side, pair, modules)

    def counts(self, block: Block) -> Mapping[str, Tensor] | None:
        with _naming_empty(student=block.student, teacher=block.teacher):
            return self.method.counts(block)

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        if not self.needs.teacher_logits:
            block = replace(block, teacher=None)
        self.block = block
        with _naming_empty(student=block.student, teacher=block.teacher):
            self.returned = checked(self.method.terms(block, modules))
        return self.returned


@contextmanager
def _naming_empty(**sides: Rows | None) -> Iterator[None]:
    """What is raised within gets a note of the side that has no rows."""
    try:
        yield
    except Exception as error:
        empty = [name for name, rows in sides.items() if rows is not None and not len(rows.token)]
        if empty:
            error.add_note(f"with no rows on the {' and the '.join(empty)}'s side")
        raise
