"""Examples on disk, made by several processes where the text is long.

They depend on the documents, the tokenizers and the template alone, so all methods of a grid share
them, and no run after the first one tokenizes or aligns. A folder of the cache has the documents'
arrays and the SHA-256 of that file, so that what a disk has spoiled is made anew.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from ctdbench import atomic
from ctdbench.cache import cache_dir
from ctdbench.distill import encoded_file
from ctdbench.distill.corpus import Document
from ctdbench.distill.encoded import Encoded, encode
from ctdbench.distill.examples import SHARD_CHARACTERS, Example, collect, shards
from ctdbench.distill.references import fingerprint
from ctdbench.distill.rendering import Renderer, Template
from ctdbench.errors import RunError

if TYPE_CHECKING:
    from ctdbench.distill.models import Side

VERSION = 1  # of the file's format, and of how documents are rendered and aligned
ARRAYS, DIGEST = "documents.arrow", "sha256"
WORKERS = "CTDBENCH_WORKERS"  # in the environment: the processes of a run that states none
LONG_TEXT = 32_000_000  # characters; for less, the tokenizers' own threads do as well

_renderers: Sequence[Renderer] = ()  # of a worker process


def cached_examples(
    documents: Sequence[Document],
    student: Side,
    teachers: Sequence[Side],
    template: Template = "plain",
    *,
    workers: int | None = None,
    progress: bool = False,
) -> tuple[list[Example], dict[str, int]]:
    """`build_examples` with its arrays on disk, where they are kept by content.

    workers: processes for a long text; default: one a core, or what a launcher shares out.
    """
    if not documents:
        return [], {}
    sides = (student, *teachers)
    renderers = [Renderer.of(side, template, documents) for side in sides]
    folder = cache_dir() / "examples" / _key(documents, renderers)
    if not _intact(folder):
        shutil.rmtree(folder, ignore_errors=True)
        with atomic.new_folder(folder) as temporary:
            encoded = _encoded(documents, renderers, workers or _cores())
            encoded_file.write(temporary / ARRAYS, _counted(encoded, documents, shown=progress))
            digest = fingerprint(temporary / ARRAYS)
            (temporary / DIGEST).write_text(digest, encoding="ascii")
    encoded = encoded_file.read(folder / ARRAYS)
    return collect(documents, encoded, template, [side.positions for side in sides])


def _key(documents: Sequence[Document], renderers: Sequence[Renderer]) -> str:
    """Of all that the arrays depend on. A chat template counts as what it puts around the text."""
    import tokenizers

    frames = [
        [(shape, [part.ids.tolist() for part in frame.parts], frame.tail) for shape, frame in r]
        for r in (renderer.frames.items() for renderer in renderers)
    ]
    sides = [renderer.tokens.digest for renderer in renderers]
    made = [VERSION, SHARD_CHARACTERS, tokenizers.__version__, renderers[0].template]
    digest = hashlib.sha256(json.dumps([made, sides, frames]).encode())
    for document in documents:
        digest.update(json.dumps(vars(document), default=vars).encode())
    return digest.hexdigest()


def _intact(folder: Path) -> bool:
    try:
        return fingerprint(folder / ARRAYS) == (folder / DIGEST).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _encoded(
    documents: Sequence[Document], renderers: Sequence[Renderer], workers: int
) -> Iterator[Encoded]:
    """Every shard, in order. Processes are spawned: threads of torch and of the tokenizers make a
    forked one hang."""
    size = sum(len(segment.text) for document in documents for segment in document.segments)
    if workers == 1 or size < LONG_TEXT:
        yield from (encode(shard, renderers) for shard in shards(documents))
        return
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start, (renderers,)) as pool:
            yield from pool.map(_work, shards(documents))
    except BrokenProcessPool as error:
        raise RunError(
            "a process that tokenizes the corpus ended early", "free memory, or set train.workers=1"
        ) from error


def _cores() -> int:
    """This run's share of them, where a launcher runs several."""
    share = os.environ.get(WORKERS, "")
    if share.isdigit() and int(share):
        return int(share)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(renderers: Sequence[Renderer]) -> None:
    global _renderers
    _renderers = renderers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is killed leaves no process behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(documents: Sequence[Document]) -> Encoded:
    return encode(documents, _renderers)


def _counted(
    encoded: Iterable[Encoded], documents: Sequence[Document], *, shown: bool
) -> Iterator[Encoded]:
    """The shards, with a progress bar."""
    from tqdm import tqdm

    label = "tokenizing"
    with tqdm(total=len(documents), desc=label, unit="doc", delay=2, disable=not shown) as bar:
        for part, shard in zip(encoded, shards(documents), strict=True):
            yield part
            bar.update(len(shard))
