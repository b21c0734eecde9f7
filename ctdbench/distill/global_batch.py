"""What has to be known over the global batch, all micro-batches and processes, before the first
gradient is taken: counts of terms, and what a method prepares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from ctdbench.distill.view import CE, View
from ctdbench.method import Needs

Number = TypeVar("Number", float, Tensor)


def reduced(values: Mapping[str, Number], accelerator: Accelerator) -> dict[str, Number]:
    """Sums over all processes; every process knows every name."""
    if accelerator.num_processes == 1:
        return dict(values)
    from accelerate.utils import gather_object

    merged: dict[str, Number] = {}
    for entry in gather_object([dict(values)]):
        for name, value in entry.items():
            merged[name] = value + merged[name] if name in merged else value
    return merged


def counts_in_advance(
    views: Sequence[View], needs: Needs, accelerator: Accelerator
) -> dict[str, float]:
    """Counts of all terms; the views learn what the method has to know of the whole batch."""
    if needs.prepare or needs.kind == "scalars":
        for view in views:
            view.load_states()
    by_guide: defaultdict[str, list[View]] = defaultdict(list)
    for view in views:
        by_guide[view.guide.suffix].append(view)
    if needs.kind == "scalars":
        for own in by_guide.values():
            _share_totals(own, accelerator)
    if needs.prepare:
        for own in by_guide.values():
            _share_prepared(own, needs, accelerator)
    local: defaultdict[str, float] = defaultdict(float, {CE: 0.0})
    for view in views:
        for name, count in view.counts().items():
            local[name] += count
    counts = reduced(local, accelerator)
    for suffix, own in by_guide.items():
        for name, total in own[0].totals.items():
            if not total.ndim:
                counts[name + suffix] = float(total)
    return counts


def _share_totals(views: Sequence[View], accelerator: Accelerator) -> None:
    """The totals of one teacher's scalars, over all processes."""
    sums: dict[str, Tensor] = {}
    for view in views:
        if view.idle:
            continue
        view.load_scalars()
        for name, total in view.own_totals().items():
            sums[name] = total + sums[name] if name in sums else total
    # Objects come back on the device of the process that they were made on.
    gathered = reduced({name: total.cpu() for name, total in sums.items()}, accelerator)
    totals = {name: total.to(accelerator.device) for name, total in gathered.items()}
    for view in views:
        view.totals = totals


def _share_prepared(views: Sequence[View], needs: Needs, accelerator: Accelerator) -> None:
    """What the method prepares of one teacher's views; "batch": the same for all of them."""
    for view in views:
        view.prepared = view.prepare()
    if needs.prepare == "batch":
        stacked = torch.stack([view.prepared for view in views if view.prepared is not None])
        join = torch.amax if needs.reduce == "max" else torch.sum
        whole = join(accelerator.gather(join(stacked, dim=0)[None]), dim=0)
        for view in views:
            view.prepared = whole
