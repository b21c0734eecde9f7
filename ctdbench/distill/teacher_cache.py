"""A teacher's last hidden states on disk, so that a grid of cells pays its body once.

States are kept by the tokens of a document, whatever corpus or order it came in. The head is not
run here: logits are made block by block from the stored states, as from live ones. Where only the
head reads them, under bfloat16 autocast, they are stored in bfloat16, in which it multiplies
anyway; else in float32. So what is made of a stored state is bit-equal to what was stored.

FOLDER/<digest>.safetensors holds `states` [n, d], `keys` [k, 32] (SHA-256 of every document's
tokens) and `ends` [k] (of its rows). Files are memory-mapped and only ever added.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctdbench import atomic
from ctdbench.cache import cache_dir
from ctdbench.distill.batches import SideBatch, bucket
from ctdbench.distill.models import CONVERSION_VERSION
from ctdbench.distill.precision import casts_kept
from ctdbench.errors import RunError
from ctdbench.method import Needs

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ctdbench.distill.teacher import Teacher

FORMAT = 1
SHARD_BYTES = 256_000_000
DOCUMENTS_AT_A_TIME = 16  # on a GPU
IntArray = NDArray[np.int64]


class _Place(NamedTuple):
    file: Any
    start: int
    stop: int


class StoredStates:
    """The stored states of one teacher in one precision on one kind of device."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Opens what is there; unreadable files count as absent."""
        self.folder = folder
        self.dtype = dtype
        self._places: dict[bytes, _Place] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._open(path)

    @classmethod
    def of(cls, teacher: Teacher, needs: Needs, device: torch.device) -> StoredStates:
        """The store of a teacher: by its content, precision, device and the code that ran it."""
        import transformers

        halved = teacher.precision == "bfloat16" and not needs.teacher_hidden
        dtype = torch.bfloat16 if halved else torch.float32
        versions = [torch.__version__, transformers.__version__, CONVERSION_VERSION, FORMAT]
        settings = [teacher.identity, teacher.precision, str(dtype), device.type]
        named = json.dumps([*settings, *versions])
        folder = cache_dir() / "states" / hashlib.sha256(named.encode()).hexdigest()
        return cls(folder, dtype)

    def __contains__(self, ids: IntArray) -> bool:
        return _key(ids) in self._places

    def size(self, tokens: int, width: int) -> int:
        """Bytes on disk that so many states take."""
        return tokens * width * self.dtype.itemsize

    def read(self, batch: SideBatch, width: int) -> Tensor | None:
        """States of a padded batch, [B * L, d] float32 with zeros for padding; None where one of
        its documents is not stored."""
        lengths = batch.mask.sum(1).tolist()
        ids = batch.ids.cpu().numpy()
        keys = [_key(row[:length]) for row, length in zip(ids, lengths, strict=True)]
        if any(key not in self._places for key in keys):
            return None
        out = torch.zeros(*batch.ids.shape, width)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            place = self._places[key]
            out[row, :length] = place.file.get_slice("states")[place.start : place.stop]
        return out.flatten(0, 1).to(batch.ids.device)

    def write(self, documents: Sequence[IntArray], states: Sequence[Tensor]) -> None:
        """Add documents' tokens [n] with their states [n, d]; all of them, or none."""
        keys = b"".join(map(_key, documents))
        path = self.folder / f"{hashlib.sha256(keys).hexdigest()[:32]}.safetensors"
        tensors = {
            "states": torch.cat([part.to("cpu", self.dtype) for part in states]),
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, 32),
            "ends": torch.tensor([len(ids) for ids in documents]).cumsum(0),
        }
        with atomic.new_file(path) as temporary:
            save_file(tensors, temporary)
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            keys, ends = file.get_tensor("keys").numpy(), file.get_tensor("ends").tolist()
        except Exception:  # cut short or not ours: its documents are computed anew
            return
        for key, start, stop in zip(keys, [0, *ends[:-1]], ends, strict=True):
            self._places[key.tobytes()] = _Place(file, start, stop)


def store_states(
    teacher: Teacher,
    documents: Sequence[IntArray],
    needs: Needs,
    limit: int,
    accelerator: Accelerator,
    *,
    progress: bool = False,
) -> None:
    """Give a teacher its stored states, computing those of `documents` (tokens, [n]) it lacks.

    Each process computes its share. The teacher stays live if all of them take more than `limit`
    bytes, or the missing ones more than half of the free disk, or where they cannot be written. On
    a CPU every document runs alone, so that what is stored does not depend on what was missing.
    """
    device = accelerator.device
    store = StoredStates.of(teacher, needs, device)
    known = sorted({_key(ids): ids for ids in documents}.values(), key=len)
    if not _fits(store, known, teacher.side.width, limit):
        return
    share = known[accelerator.process_index :: accelerator.num_processes]
    missing = [ids for ids in share if ids not in store]
    shown = progress and bool(missing) and accelerator.is_main_process
    with suppress(RunError):  # the disk is full: what is there stays, and training can go on
        _compute(store, teacher, missing, device, shown=shown)
    accelerator.wait_for_everyone()
    store = StoredStates.of(teacher, needs, device)  # with what the others computed
    if all(ids in store for ids in known):
        teacher.stored = store


def _fits(store: StoredStates, documents: Sequence[IntArray], width: int, limit: int) -> bool:
    """The first process decides for all: disks and clocks may differ."""
    missing = sum(len(ids) for ids in documents if ids not in store)
    is_small = store.size(sum(map(len, documents)), width) <= limit
    has_room = store.size(missing, width) <= _free(cache_dir()) // 2
    (decided,) = broadcast_object_list([is_small and has_room])
    return bool(decided)


def _compute(
    store: StoredStates,
    teacher: Teacher,
    documents: Sequence[IntArray],
    device: torch.device,
    *,
    shown: bool,
) -> None:
    """Run the teacher over documents and write shards; those of like length come together."""
    from tqdm import tqdm

    together = 1 if device.type == "cpu" else DOCUMENTS_AT_A_TIME
    ids: list[IntArray] = []
    states: list[Tensor] = []
    with (
        casts_kept(teacher.side.model, teacher.precision),
        tqdm(total=len(documents), desc="teacher", unit="doc", disable=not shown) as bar,
    ):
        for start in range(0, len(documents), together):
            group = documents[start : start + together]
            ids += group
            states += _states(teacher, group, device)
            last = start + together >= len(documents)
            if last or store.size(sum(map(len, ids)), teacher.side.width) > SHARD_BYTES:
                store.write(ids, states)
                ids, states = [], []
            bar.update(len(group))


def _states(teacher: Teacher, group: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """The states of a few documents, [n, d] each."""
    ids = np.full((len(group), bucket(max(map(len, group)))), teacher.side.specials.pad or 0)
    mask = np.zeros_like(ids)
    for row, own in enumerate(group):
        ids[row, : len(own)] = own
        mask[row, : len(own)] = 1
    states = teacher.live(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
    return [states[row, : len(own)] for row, own in enumerate(group)]


def _key(ids: IntArray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype=np.int64).tobytes()).digest()


def _free(folder: Path) -> int:
    """Bytes free where the folder is, or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free
