"""A stand-in for a method that says what it was given and what it returned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ctdbench.launch.conformance.cases import picked
from ctdbench.method import Block, Method, Needs, PairInfo, Rows, Term, Trainable


class Failed(Exception):
    """A check that found what must not be; the message says what."""


class Skipped(Exception):
    """A check that has nothing to say of a method; the message says why."""


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
        return self.method.prepare(teacher if self.real is None else picked(teacher, self.real))

    def terms(self, block: Block, modules: Mapping[str, nn.Module]) -> dict[str, Term]:
        if not self.needs.teacher_logits:
            block = replace(block, teacher=None)
        self.block = block
        self.returned = self.method.terms(block, modules)
        for name, term in self.returned.items():
            if not (isinstance(name, str) and isinstance(term, Term)):
                raise Failed(f"terms() gives {type(term).__name__} for {name!r}, and not a Term")
        return self.returned
