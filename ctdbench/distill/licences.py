"""What licence a model or tokenizer comes under, as its own metadata states it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from ctdbench.distill.references import HUB_TIMEOUT_SECONDS, Reference


def licence(reference: Reference) -> str | None:
    """A line such as `Apache-2.0`; None where nothing is stated or what states it cannot be had."""
    if reference.kind == "wheel":
        return _of_wheel(reference.name)
    if reference.kind == "hub":
        return _of_hub(reference)
    if reference.kind == "dir":
        return _of_card(Path(reference.name).expanduser() / "README.md")
    return "Apache-2.0"  # made by ctdbench itself


def _of_wheel(distribution: str) -> str | None:
    try:
        stated = metadata.metadata(distribution).json
    except metadata.PackageNotFoundError:
        return None
    return _line(stated.get("license_expression") or stated.get("license"))


def _of_hub(reference: Reference) -> str | None:
    """From the cached model card, else from the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(reference.name, "README.md", revision=reference.revision)
    if isinstance(cached, str):
        return _of_card(Path(cached))
    try:
        found = HfApi().model_info(
            reference.name, revision=reference.revision, timeout=HUB_TIMEOUT_SECONDS
        )
    except Exception:  # any failure of network or authorisation: it is told that nothing is known
        return None
    return _line(found.card_data.get("license") if found.card_data else None)


def _of_card(path: Path) -> str | None:
    from huggingface_hub import metadata_load

    stated = (metadata_load(path) if path.is_file() else None) or {}
    return _line(stated.get("license_name") or stated.get("license"))


def _line(stated: object) -> str | None:
    """The first line of what is stated; some put the whole text there."""
    return str(stated).strip().partition("\n")[0] or None if stated else None
