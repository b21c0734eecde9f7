"""What a machine has that a run could need; imports torch only to ask for an accelerator."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ctdbench import __version__, registry, request
from ctdbench.cache import cache_dir
from ctdbench.distill import references
from ctdbench.errors import PreflightError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm-eval", "tokenizers")
PROBE = references.parse("hub:HuggingFaceTB/SmolLM2-135M-Instruct")


def findings() -> Iterator[tuple[str, str]]:
    """(what, finding), one line each; never raises for what is merely absent."""
    yield "ctdbench", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package)
    yield "processor", _processor()
    yield "memory", f"{_memory() / 2**30:.1f} GiB"
    yield "accelerator", _accelerator()
    yield "bf16", _bfloat16()
    for reference in _wheels():
        yield reference.name, _wheel(reference)
    yield "hub", _hub()
    yield "cache", _cache()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"missing; pip install {package}"


def _processor() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} cores, {platform.machine()}"


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _accelerator() -> str:
    try:
        import torch
    except ImportError:
        return "unknown without torch"
    if not torch.cuda.is_available():
        return "none; training runs on the processor"
    gpu = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"


def _bfloat16() -> str:
    """Processors without these instructions emulate bfloat16, slower than float32."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "unknown"
    native = sorted(words & {"avx512_bf16", "amx_bf16", "bf16"})
    return f"native ({', '.join(native)})" if native else "emulated"


def _wheels() -> list[references.Reference]:
    """The distinct wheel: references of the shipped pairs."""
    pairs = [registry.load_pair(name) for name in registry.pair_files()]
    texts = {text for pair in pairs for text in request.references_of(pair)}
    parsed = [references.parse(text) for text in sorted(texts)]
    return [reference for reference in parsed if reference.kind == "wheel"]


def _wheel(reference: references.Reference) -> str:
    try:
        references.require(reference)
    except PreflightError as error:
        return f"missing; {error.hint}"
    return "there"


def _hub() -> str:
    try:
        references.require(PROBE)
    except PreflightError:
        return "not reachable; hub: references work for what is cached, wheel: and dir: always"
    return "reachable"


def _cache() -> str:
    folder = cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return f"{folder}, {shutil.disk_usage(existing).free / 2**30:.0f} GiB free"
