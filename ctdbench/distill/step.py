"""One optimisation step's gradient, streamed over blocks of rows.

No [tokens x vocabulary] tensor is ever whole. The body runs forward once; then, block by block, the
head gives logits for both sides, the method its terms, and `autograd.grad` their gradient with
respect to (states, head, extra modules). One backward through the wrapped network closes the step,
which is what lets DDP and FSDP2 synchronise: a backward per block would not.
Under FSDP2 processes meet at every layer, so all of them run equally many micro-batches.

A loss is a sum over its count in the *global* batch. Counts follow from tokens and chunks alone, so
they are known, over all micro-batches and processes, before the first gradient is taken. Balancing
by ratio or gradmag knows its weights only after the last block: it keeps one gradient per term, and
the graphs of all micro-batches until one backward at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctdbench.distill import balance, fused, processes
from ctdbench.distill.batches import Batch
from ctdbench.distill.global_batch import counts_in_advance, reduced
from ctdbench.distill.precision import autocast
from ctdbench.distill.teacher import Teacher
from ctdbench.distill.view import CE, Guide, Network, Terms, View
from ctdbench.errors import RunError
from ctdbench.method import Method, PairTables, Scalars, Term
from ctdbench.rows import checked

Balance = Literal["fixed", "ratio", "gradmag"]
ALL = "loss"  # the one gradient that fixed weights need


@dataclass(frozen=True)
class StepReport:
    """What a step computed over the global batch: loss, every term as its mean, their weights."""

    loss: float
    terms: dict[str, float]
    weights: dict[str, float]


@dataclass(frozen=True)
class _Sums:
    """Every term's total and count over the blocks of a step so far."""

    totals: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass
class _Gradients:
    """Gradients of several parts of the loss: of one micro-batch's states, and of the head.

    hidden: part -> [B * L, d]. head: part -> one tensor for every head parameter; it runs on over
    the micro-batches.
    """

    states: Tensor
    head: defaultdict[str, list[Tensor]]
    hidden: dict[str, Tensor] = field(default_factory=dict)

    def add(self, part: str, position: Tensor, found: Sequence[Tensor | None]) -> None:
        """What autograd found for (states at `position`, *head)."""
        if part not in self.hidden:
            self.hidden[part] = torch.zeros_like(self.states)
        if found[0] is not None:
            self.hidden[part].index_add_(0, position, found[0])
        for total, gradient in zip(self.head[part], found[1:], strict=True):
            if gradient is not None:
                total.add_(gradient)

    def surrogate(self, weights: Mapping[str, float]) -> Tensor:
        """What has this gradient with respect to the states; differentiable."""
        hidden = torch.zeros_like(self.states)
        for part, gradient in self.hidden.items():
            hidden.add_(gradient, alpha=weights.get(part, 0.0))
        return (self.states * hidden).sum()


class Step:
    """Computes gradients of a method's loss on a global batch; the optimizer is the caller's."""

    def __init__(
        self,
        network: nn.Module,
        teacher: Teacher | None,
        method: Method,
        tables: PairTables,
        *,
        accelerator: Accelerator,
        others: Sequence[Guide] = (),
        weight: float = 1.0,
        precision: str = "float32",
        block_rows: int = 512,
        balancing: Balance = "fixed",
        compiled: bool = False,
    ) -> None:
        """network: a `Network`, wrapped by `accelerator.prepare` or not. weight: the teacher's.

        others: further teachers; batches then carry `Batch.others`. compiled: run the method's
        terms through torch.compile, and cross-entropy by fused kernels where nothing else wants
        logits and they are at hand. Raises UserError where gradmag has no parameters to take its
        norms on.
        """
        self.wrapped = network
        self.network: Network = accelerator.unwrap_model(network)
        self.guides = [Guide(teacher, tables, weight=weight), *others]
        self.method = method
        self.accelerator = accelerator
        self.precision = precision
        self.block_rows = block_rows
        self.balancing = balancing
        self._may_fuse = compiled
        self._terms = _compiled(method.terms) if compiled else method.terms
        if balancing == "gradmag":
            balance.last_layer(self.network.model)

    @property
    def teacher(self) -> Teacher | None:
        """The first teacher."""
        return self.guides[0].teacher

    @property
    def tables(self) -> PairTables:
        """The tables of the student and the first teacher."""
        return self.guides[0].tables

    def gradients(self, batches: Sequence[Batch], *, idle: bool = False) -> StepReport:
        """Add the gradient of the global batch, of which `batches` are this process's share.

        idle: this process has no document of the batch; it runs along on a borrowed one whose
        loss does not count. Raises RunError for a loss that is not finite.
        """
        processes.gather(self.network)
        views = [self._views(batch, idle=idle) for batch in batches]
        views += [self._views(batches[0], idle=True) for _ in range(self._missing(len(batches)))]
        every = [view for group in views for view in group]
        counts = counts_in_advance(every, self.method.needs, self.accelerator)
        sums, fuses = _Sums(), self._fuses(counts)
        for view in every:
            view.fused = fuses
        if self.balancing == "fixed":
            weights = {name: self._weight(name) for name in counts}
            for index, group in enumerate(views):
                processes.gather(self.network)
                with self._sync(index == len(views) - 1):
                    parts = self._stream(group, counts, sums, self._no_head(), weights)
                    self._backward([parts], {ALL: 1.0})
            return self._report(counts, sums, weights)
        return self._balanced(views, counts, sums)

    def _balanced(
        self, views: Sequence[Sequence[View]], counts: dict[str, float], sums: _Sums
    ) -> StepReport:
        """All micro-batches forward, one gradient per term; one backward when weights are known."""
        head = self._no_head()
        parts = []
        for index, group in enumerate(views):
            with self._sync(index == len(views) - 1):
                parts.append(self._stream(group, counts, sums, head, None))
        weights = self._balancing_weights(self._means(counts, sums), parts)
        self._backward(parts, weights)
        return self._report(counts, sums, weights)

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over processes with the last micro-batch only.

        With every one where they are sharded: a whole gradient is what FSDP2 has no room for.
        """
        if last or processes.is_sharded(self.network):
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.wrapped)  # type: ignore[no-any-return]

    def _fuses(self, counts: Mapping[str, float]) -> bool:
        """Whether cross-entropy is all there is and can do without logits."""
        if not self._may_fuse or counts.keys() != {CE} or processes.is_sharded(self.network):
            return False
        return fused.can_fuse(self.network.model, self.accelerator.device, self.precision)

    def _missing(self, own: int) -> int:
        """How many micro-batches another process has more, where that matters."""
        if not processes.is_sharded(self.network):
            return 0
        counts = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device))
        return int(counts.max()) - own

    def _views(self, batch: Batch, *, idle: bool) -> list[View]:
        laid = (batch, *batch.others)
        return [
            View(
                each,
                guide,
                self.network,
                self.method,
                self.precision,
                self.block_rows,
                self._terms,
                idle,
            )
            for each, guide in zip(laid, self.guides, strict=True)
        ]

    # --- gradients ----------------------------------------------------------------------------

    def _no_head(self) -> defaultdict[str, list[Tensor]]:
        parameters = self.network.head_parameters()
        return defaultdict(lambda: [torch.zeros_like(parameter) for parameter in parameters])

    def _stream(
        self,
        views: Sequence[View],
        counts: Mapping[str, float],
        sums: _Sums,
        head: defaultdict[str, list[Tensor]],
        weights: Mapping[str, float] | None,
    ) -> _Gradients:
        """One forward of both bodies, then the blocks.

        weights: of the terms; None keeps the gradient of each term apart.
        """
        texts = views[0].batch.student
        with autocast(texts.ids.device, self.precision):
            hidden = self.wrapped(texts.ids, texts.mask)
        parts = _Gradients(hidden, head)
        for view in views:
            if not view.blocks:
                continue
            view.load()
            slopes = self._slopes(view, hidden.detach(), counts, sums)
            for rows in view.blocks:
                position = view.batch.student.position[rows.student]
                leaf = hidden.detach()[position].requires_grad_()
                student = view.student_rows(rows, leaf)
                shares = self._shares(view.block_terms(rows, student), counts, sums)
                if slopes:
                    values = view.method_scalars(student, "student")
                    shares |= {n: (values * slopes[n][rows.student]).sum() for n in slopes}
                self._differentiate(shares, leaf, position, parts, weights)
                del student, shares  # their graph would live on beside the next block's
            view.unload()
        return parts

    def _differentiate(
        self,
        shares: Mapping[str, Tensor],
        leaf: Tensor,
        position: Tensor,
        parts: _Gradients,
        weights: Mapping[str, float] | None,
    ) -> None:
        """Add the gradients of a block's shares, weighted together or each by itself."""
        wanted = {name: share for name, share in shares.items() if self._weight(name)}
        if weights is not None:
            weighted = [share * weights[name] for name, share in shares.items()]
            wanted = {ALL: torch.stack([leaf.sum() * 0.0, *weighted]).sum()}
        inputs = [leaf, *self.network.head_parameters()]
        for name, share in wanted.items():
            if share.requires_grad:
                apart = weights is None
                found = torch.autograd.grad(share, inputs, retain_graph=apart, allow_unused=True)
                parts.add(name, position, found)

    def _slopes(
        self, view: View, hidden: Tensor, counts: Mapping[str, float], sums: _Sums
    ) -> dict[str, Tensor]:
        """Kind "scalars": gradient of every term's share with respect to the scalars, [R, m].

        The scalars are collected without a graph, so merging chunks over any distance costs no
        memory; the blocks then compute them once more, with one.
        """
        if view.scalars is None:
            return {}
        position = view.batch.student.position
        with torch.no_grad():
            parts = [
                view.method_scalars(
                    view.student_rows(rows, hidden[position[rows.student]]), "student"
                )
                for rows in view.blocks
            ]
        values = torch.cat(parts).requires_grad_()
        student = Scalars(values, view.bare())
        terms = checked(self.method.combine(student, view.scalars, view.totals))
        named = {name + view.guide.suffix: term for name, term in terms.items()}
        zero = values.sum() * 0.0
        return {
            name: torch.autograd.grad(share + zero, values, retain_graph=True)[0]
            for name, share in self._shares(named, counts, sums).items()
        }

    def _shares(
        self, terms: Mapping[str, Term], counts: Mapping[str, float], sums: _Sums
    ) -> dict[str, Tensor]:
        """The terms' shares of their global means; notes totals and counts in `sums`."""
        scale = self.accelerator.num_processes  # DDP averages over processes
        shares = {}
        for name, term in terms.items():
            sums.totals[name] += float(term.total.detach())
            sums.counts[name] += float(term.count)
            if counts.get(name, 0.0) > 0:
                shares[name] = term.total * (scale / counts[name])
        return shares

    def _backward(self, parts: Sequence[_Gradients], weights: Mapping[str, float]) -> None:
        """One backward through the wrapped network, for all the states at hand."""
        surrogate = torch.stack([part.surrogate(weights) for part in parts]).sum()
        found = parts[0].head
        if not found:
            found[ALL]  # an idle process: zeros, for DDP waits for every parameter
        for name, gradients in found.items():
            for parameter, gradient in zip(self.network.head_parameters(), gradients, strict=True):
                surrogate = surrogate + (parameter * gradient).sum() * weights.get(name, 0.0)
        surrogate.backward()  # type: ignore[no-untyped-call]

    # --- weights ------------------------------------------------------------------------------

    def _weight(self, name: str) -> float:
        """A term's weight by the method and its teacher."""
        if name == CE:
            return self.method.options.ce_weight
        base, mark, number = name.partition("@")
        guide = next(guide for guide in self.guides if guide.suffix == mark + number)
        return self.method.weights().get(base, 1.0) * guide.weight

    def _balancing_weights(
        self, means: Mapping[str, float], parts: Sequence[_Gradients]
    ) -> dict[str, float]:
        own = {name: self._weight(name) for name in means}
        if self.balancing == "ratio":
            terms = {name: value for name, value in means.items() if name != CE}
            return {CE: 1.0, **balance.ratio(means.get(CE, 0.0), terms, own)}
        weighted = [name for name, weight in own.items() if weight]
        return dict.fromkeys(means, 0.0) | balance.gradmag(self._norms(weighted, parts), own)

    def _norms(self, names: Iterable[str], parts: Sequence[_Gradients]) -> dict[str, float]:
        """Norm of each term's gradient over the global batch on the last layer's parameters."""
        size, layer = self.accelerator.num_processes, balance.last_layer(self.network.model)
        norms = {}
        for name in names:
            surrogate = torch.stack([part.surrogate({name: 1.0}) for part in parts]).sum()
            with processes.kept_whole(self.network):
                found = torch.autograd.grad(surrogate, layer, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [
                    (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
                    for parameter, gradient in zip(layer, found, strict=True)
                ]
            )
            if size > 1:
                flat = self.accelerator.reduce(flat, reduction="sum")
            norms[name] = float(flat.norm()) / size
        return norms

    # --- the report ---------------------------------------------------------------------------

    def _means(self, counts: Mapping[str, float], sums: _Sums) -> dict[str, float]:
        """Every term's mean; a count of `Method.totals` that is no term's does not appear."""
        totals = reduced({CE: 0.0, **sums.totals}, self.accelerator)
        return {
            name: total / counts[name] if counts.get(name) else 0.0
            for name, total in totals.items()
        }

    def _report(
        self, counts: dict[str, float], sums: _Sums, weights: Mapping[str, float]
    ) -> StepReport:
        seen = reduced(sums.counts, self.accelerator)
        if self.method.needs.kind == "scalars":  # whose totals may hold more than counts
            counts = {name: count for name, count in counts.items() if name in seen}
        _check_counts(counts, seen)
        means = self._means(counts, sums)
        loss = sum(weights.get(name, 0.0) * value for name, value in means.items())
        if not math.isfinite(loss):
            raise RunError(f"the loss is not finite ({means})", "lower train.learning_rate")
        return StepReport(loss, means, {name: weights.get(name, 0.0) for name in means})


def _compiled(terms: Terms) -> Terms:
    """What the compiler cannot take runs as it is."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(terms, dynamic=True)  # block sizes vary


def _check_counts(expected: Mapping[str, float], seen: Mapping[str, float]) -> None:
    """What was divided by is what `terms` said; a method that counts by its logits is refused."""
    for name in expected.keys() | seen.keys():
        told, found = expected.get(name, 0.0), seen.get(name, 0.0)
        if abs(found - told) > 1e-4 * (1 + abs(found)):
            raise RunError(
                f"method term {name!r} counts {found:g} in terms() but {told:g} in advance",
                "a count must follow from tokens and chunks alone, and counts() must agree",
            )
