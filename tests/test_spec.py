"""Requests: parsing, and an identity that hashes all that can change a result and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ctdbench.spec import (
    EvalSpec,
    Frozen,
    Lora,
    ModelSpec,
    PairSpec,
    RunSpec,
    TeacherSpec,
    TrainSpec,
    check_name,
    format_bytes,
    is_identity,
    parse_bytes,
)

STUDENT = ModelSpec(model="hub:a/student")
PAIR = PairSpec(name="pair", student=STUDENT, teachers=(TeacherSpec(model="hub:a/teacher"),))
RUN = RunSpec(method="bld", pair=PAIR, options={"kl_weight": 0.1})

# Another value for every field; a new field has to be entered here, in one list or the other.
CHANGES_THE_RESULT: list[tuple[type[Frozen], dict[str, Any]]] = [
    (
        Lora,
        {"rank": 8, "alpha": 8, "targets": ("k_proj",), "train_embeddings": False},
    ),
    (
        ModelSpec,
        {
            "model": "hub:a/other",
            "tokenizer": "hub:a/other",
            "layers": 3,
            "start": "first_byte",
            "add_subwords": True,
        },
    ),
    (TeacherSpec, {"weight": 0.5}),
    (
        PairSpec,
        {
            "name": "other",
            "student": ModelSpec(model="hub:a/s2"),
            "teachers": (TeacherSpec(model="hub:a/t2"),),
            "lora": Lora(),
            "learning_rate": 3e-4,
        },
    ),
    (
        TrainSpec,
        {
            "corpus": "gsm8k",
            "budget": 7,
            "learning_rate": 3e-4,
            "embedding_learning_rate": 3e-4,
            "weight_decay": 0.1,
            "warmup": 0.2,
            "clip": 2.0,
            "batch_documents": 8,
            "document_bytes": 99,
            "template": "chat",
            "precision": "float32",
            "balance": "ratio",
            "on_policy": 0.5,
            "prompt_bytes": 9,
            "generated_tokens": 9,
            "generation_temperature": 0.5,
        },
    ),
    (
        EvalSpec,
        {
            "tasks": ("gsm8k",),
            "limit": 3,
            "limits": {"bpb_heldout": 3},
            "held_out": "validation",
            "batch_size": 2,
            "precision": "bfloat16",
        },
    ),
    (
        RunSpec,
        {
            "method": "sft",
            "pair": PAIR.model_copy(update={"learning_rate": 1.0}),
            "seed": 1,
            "options": {"kl_weight": 0.2},
            "train": TrainSpec(budget=8),
            "eval": EvalSpec(limit=4),
            "trust_remote_code": True,
        },
    ),
]
RUNTIME: dict[type[Frozen], dict[str, Any]] = {
    PairSpec: {"title": "words"},
    TrainSpec: {
        "micro_batch": 2,
        "block_rows": 8,
        "compile": True,
        "teacher_cache": None,
        "workers": 2,
        "checkpoint_every": 0,
        "keep_model": True,
    },
    EvalSpec: {"task_files": ("mine.yaml",), "data_dir": "somewhere", "points": 4},
}


def run_with(model: type[Frozen], field: str, value: Any) -> RunSpec:
    """RUN with one field changed, wherever in it that model sits."""
    update = {field: value}
    pair = PAIR.model_copy(update={"lora": Lora()})
    if model is RunSpec:
        return RUN.model_copy(update=update)
    if model is PairSpec:
        return RUN.model_copy(update={"pair": PAIR.model_copy(update=update)})
    if model is ModelSpec:
        student = STUDENT.model_copy(update=update)
        return RUN.model_copy(update={"pair": PAIR.model_copy(update={"student": student})})
    if model is TeacherSpec:
        teachers = (PAIR.teachers[0].model_copy(update=update),)
        return RUN.model_copy(update={"pair": PAIR.model_copy(update={"teachers": teachers})})
    if model is Lora:
        changed = pair.model_copy(update={"lora": Lora().model_copy(update=update)})
        return RUN.model_copy(update={"pair": changed})
    section = "train" if model is TrainSpec else "eval"
    return RUN.model_copy(update={section: getattr(RUN, section).model_copy(update=update)})


def test_every_field_is_one_or_the_other() -> None:
    for model, changes in CHANGES_THE_RESULT:
        listed = {*changes, *RUNTIME.get(model, {})}
        inherited = set(model.__base__.model_fields) if model is TeacherSpec else set()  # type: ignore[union-attr]
        assert listed | inherited == set(model.model_fields), model.__name__
        assert set(RUNTIME.get(model, {})) == {
            name for name, field in model.model_fields.items() if not is_identity(field)
        }


def test_what_changes_the_result_changes_the_id() -> None:
    with_lora = RUN.model_copy(update={"pair": PAIR.model_copy(update={"lora": Lora()})})
    ids = [RUN.cell_id({}), with_lora.cell_id({})]
    for model, changes in CHANGES_THE_RESULT:
        for field, value in changes.items():
            if (model, field) != (PairSpec, "lora"):
                ids.append(run_with(model, field, value).cell_id({}))
    assert len(set(ids)) == len(ids)


def test_runtime_settings_leave_the_id_alone() -> None:
    for model, changes in RUNTIME.items():
        for field, value in changes.items():
            assert run_with(model, field, value).cell_id({}) == RUN.cell_id({}), field


def test_content_is_part_of_the_id_and_its_order_is_not() -> None:
    first = RUN.cell_id({"corpus": "a", "model": "b"})
    assert first == RUN.cell_id({"model": "b", "corpus": "a"})
    assert len({first, RUN.cell_id({}), RUN.cell_id({"corpus": "b", "model": "a"})}) == 3


def test_a_spec_survives_its_own_json() -> None:
    again = RunSpec.model_validate(RUN.model_dump(mode="json"))
    assert again == RUN
    assert again.cell_id({}) == RUN.cell_id({})


@given(size=st.integers(1, 10**13))
def test_a_number_of_bytes_is_itself(size: int) -> None:
    assert parse_bytes(size) == parse_bytes(f"{size}B") == size


@given(
    thousands=st.integers(1, 9999),
    unit=st.sampled_from([("kB", 10**3), ("MB", 10**6), ("GB", 10**9)]),
)
def test_units_are_decimal_and_formatting_comes_back(thousands: int, unit: tuple[str, int]) -> None:
    name, scale = unit
    assert parse_bytes(f"{thousands}{name}") == parse_bytes(f"{thousands} {name.lower()}")
    assert parse_bytes(format_bytes(thousands * scale)) == thousands * scale


@pytest.mark.parametrize(
    "text", ["", "kB", "-3", "1e5", "3 TB", "3kBB", "0", "0.1B", None, "nan", "5"]
)
def test_what_is_no_amount_of_bytes(text: Any) -> None:
    with pytest.raises(ValueError, match=r"bytes|no unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "change",
    [{"budget": 0}, {"learning_rate": 0}, {"warmup": 1}, {"block_rows": 1}, {"lr": 1}],
)
def test_training_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainSpec.model_validate(change)


def test_requests_are_frozen() -> None:
    with pytest.raises(ValidationError):
        RUN.seed = 3  # type: ignore[misc]


def test_names_are_slugs() -> None:
    assert check_name("llama-phi+llama3b", "pair") == "llama-phi+llama3b"
