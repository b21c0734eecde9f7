"""Encoded documents as an Arrow file: a record batch for each shard, a row for each document.

Lists are stored as they are in memory, so what is read are views of the memory-mapped file. It is
in Arrow's streaming format, which `datasets.Dataset.from_file` reads as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctdbench.distill.encoded import Encoded, PairColumns, SideColumns
from ctdbench.distill.rendering import IntArray, TokenColumns

SEQUENCE = ("ids", "byte_start", "byte_end", "is_text")


def write(path: Path, shards: Iterable[Encoded]) -> None:
    """Write shards as they come; at least one."""
    import pyarrow as pa  # datasets brings it

    batches = map(_record_batch, shards)
    first = next(batches)
    with pa.ipc.new_stream(str(path), first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def read(path: Path) -> Iterator[Encoded]:
    """The shards, as views of the file."""
    import pyarrow as pa

    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        for batch in reader:
            yield _encoded(batch)


def _record_batch(part: Encoded) -> Any:
    """Columns `0.ids`, ... are the student's, `1.` those of its first teacher."""
    import pyarrow as pa

    columns = {"place": pa.array(part.place)}
    own = part.sides[0].tokens.sizes
    for number, side in enumerate(part.sides):
        sizes = side.tokens.sizes
        columns[f"{number}.end"] = pa.array(side.tokens.end)
        columns[f"{number}.supervised"] = _lists(side.supervised, sizes)
        for name in SEQUENCE:
            columns[f"{number}.{name}"] = _lists(getattr(side.tokens, name), sizes)
    for number, pair in enumerate(part.pairs, start=1):
        sizes = part.sides[number].tokens.sizes
        columns[f"{number}.chunks"] = pa.array(pair.chunks)
        columns[f"{number}.student_chunk"] = _lists(pair.student, own)
        columns[f"{number}.teacher_chunk"] = _lists(pair.teacher, sizes)
    return pa.record_batch(columns)


def _lists(values: NDArray[Any], sizes: IntArray) -> Any:
    """An array of lists; truth values as bytes, since Arrow's own are bits."""
    import pyarrow as pa

    offsets = np.append(0, np.cumsum(sizes)).astype(np.int32)
    stored = values.view(np.uint8) if values.dtype == np.bool_ else values
    return pa.ListArray.from_arrays(offsets, pa.array(stored))


def _encoded(batch: Any) -> Encoded:
    sides, pairs = [], []
    for number in range(sum(name.endswith(".ids") for name in batch.schema.names)):
        sizes = np.diff(batch.column(f"{number}.ids").offsets.to_numpy()).astype(np.int64)
        end = batch.column(f"{number}.end").to_numpy()
        sequence = [_values(batch, f"{number}.{name}") for name in SEQUENCE]
        tokens = TokenColumns(sizes, end, *sequence)
        sides.append(SideColumns(tokens, _values(batch, f"{number}.supervised")))
    for number in range(1, len(sides)):
        own, taught = (_values(batch, f"{number}.{side}_chunk") for side in ("student", "teacher"))
        pairs.append(PairColumns(own, taught, batch.column(f"{number}.chunks").to_numpy()))
    return Encoded(batch.column("place").to_numpy(), tuple(sides), tuple(pairs))


def _values(batch: Any, name: str) -> NDArray[Any]:
    """The values of all lists in a row."""
    stored = batch.column(name).flatten().to_numpy()
    return stored.view(np.bool_) if stored.dtype == np.uint8 else stored
