"""Recipes of published tables, one YAML each: what was trained on what, and who says so.

Every setting names its source: `paper` (stated there) or `ours` (the paper, as far as it could be
read, does not say; chosen here). Numbers are in results/papers, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from ctdbench import registry
from ctdbench.spec import Frozen, Lora, PairSpec

Value = TypeVar("Value")
Scale = Literal["paper", "cpu"]
Source = Literal["paper", "ours"]
NO_TASK = "no such task here"


class Sourced(Frozen, Generic[Value]):
    """A setting and who chose it."""

    value: Value
    source: Source
    note: str = ""


class Training(Frozen):
    """How the cells of a setting were trained; what is absent is ctdbench's default, so ours."""

    data: Sourced[str] | None = Field(None, description="Name of the text.")
    trained: Sourced[Literal["all", "lora"]] | None = None
    lora_rank: Sourced[int] | None = None
    lora_alpha: Sourced[int] | None = None
    lora_targets: Sourced[tuple[str, ...]] | None = None
    lora_embeddings: Sourced[bool] | None = None
    learning_rate: Sourced[float] | None = None
    steps: Sourced[int] | None = None
    batch_documents: Sourced[int] | None = None
    document_tokens: Sourced[int] | None = Field(None, description="Length, in student tokens.")
    bytes_per_token: Sourced[float] | None = None
    template: Sourced[Literal["plain", "chat"]] | None = None

    def stated(self) -> dict[str, Sourced[Any]]:
        """Every setting that the recipe has, by name."""
        return {name: value for name, value in self if value is not None}

    def over(self, other: Training) -> Training:
        """This on top of `other`, setting by setting."""
        return Training.model_validate({**dict(other), **self.stated()})

    @property
    def document_bytes(self) -> int:
        """Bytes of text in a document of full length."""
        assert self.document_tokens is not None
        assert self.bytes_per_token is not None
        return round(self.document_tokens.value * self.bytes_per_token.value)

    @property
    def budget(self) -> int:
        """Bytes of text in all steps, if every document has full length."""
        assert self.steps is not None
        assert self.batch_documents is not None
        return self.steps.value * self.batch_documents.value * self.document_bytes

    def applied(self, pair: PairSpec) -> PairSpec:
        """The pair with what is trained here: all of it, LoRA, or, unstated, as the pair has it."""
        if self.trained is None:
            return pair
        if self.trained.value == "all":
            return pair.model_copy(update={"lora": None})
        stated = {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "targets": self.lora_targets,
            "train_embeddings": self.lora_embeddings,
        }
        chosen = {name: setting.value for name, setting in stated.items() if setting is not None}
        return pair.model_copy(update={"lora": Lora.model_validate(chosen)})


class OurTask(Frozen):
    """A task of ctdbench and the metric that is set beside the paper's."""

    task: str
    metric: str
    shots: int | None = None


class Column(Frozen):
    """A task of the paper's table, and ours for it.

    shots: what the paper evaluates with, where it says so. items: of the task, for the standard
    error of an accuracy that the paper prints without one. stand_in: an embedded task of the same
    form, where the data is not at hand. note: why nothing runs.
    """

    task: str
    metric: str = "acc"
    shots: int | None = None
    items: int | None = None
    runs: OurTask | None = None
    stand_in: OurTask | None = None
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """A column of the side by side: the paper's column, what runs here for it, and a remark."""

    column: Column | None
    runs: OurTask | None
    note: str = ""


class Row(Frozen):
    """A row of the paper's table: a method with options, a baseline of the pair, or neither."""

    method: str | None = None
    baseline: Literal["start", "teacher"] | None = None
    missing: str = Field("", description="Why ctdbench has no such row.")
    options: dict[str, Sourced[Any]] = Field(default_factory=dict)
    cpu_options: dict[str, Any] = Field(
        default_factory=dict, description="Options that differ at CPU scale."
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> Row:
        if sum(map(bool, (self.method, self.baseline, self.missing))) != 1:
            raise ValueError("a row has a method, a baseline or the reason why it is missing")
        return self

    def options_at(self, scale: Scale) -> dict[str, Sourced[Any]]:
        """The options that are run."""
        own = self.cpu_options if scale == "cpu" else {}
        changed = {name: Sourced[Any](value=value, source="ours") for name, value in own.items()}
        return {**self.options, **changed}


class Base(Frozen):
    """The row that gains are counted from at CPU scale."""

    setting: str
    method: str


class Setting(Frozen):
    """A group of rows that share models and training. name: as in results/papers."""

    name: str
    label: str
    pair: Sourced[str] | None = None
    cpu: str | None = Field(None, description="The embedded pair of the same design.")
    base: Base
    training: Training = Training()
    rows: dict[str, Row]

    def pair_at(self, scale: Scale) -> str | None:
        """Name of the pair that is run."""
        if scale == "cpu":
            return self.cpu
        return self.pair.value if self.pair else None


class Recipe(Frozen):
    """A table of a paper."""

    name: str
    title: str
    paper: str
    arxiv: str
    table: str
    training: Training
    columns: tuple[Column, ...] = Field(min_length=1)
    settings: tuple[Setting, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    cpu_notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        for setting in self.settings:
            self.base_row(setting)
            stated = self.training_of(setting).stated()
            for name in ("data", "steps", "batch_documents", "document_tokens", "bytes_per_token"):
                if name not in stated:
                    raise ValueError(f"setting {setting.label}: training has no {name}")
        return self

    def training_of(self, setting: Setting) -> Training:
        """What the setting states, on top of what the whole table has in common."""
        return setting.training.over(self.training)

    def base_row(self, setting: Setting) -> Row:
        """The base row of a setting; raises ValueError if it is no baseline of a pair."""
        rows = {
            (one.name, method): row for one in self.settings for method, row in one.rows.items()
        }
        row = rows.get((setting.base.setting, setting.base.method))
        if row is None or row.baseline is None:
            raise ValueError(f"setting {setting.label}: base {setting.base.method} is no baseline")
        return row

    def measures(self, scale: Scale, *, data: bool) -> tuple[Measure, ...]:
        """The columns at a scale. data: whether the tasks' files are at hand (at CPU scale)."""
        if scale == "paper" or data:
            return tuple(Measure(column, column.runs, _remark(column)) for column in self.columns)
        standing = [Measure(column, column.stand_in, _stand_in(column)) for column in self.columns]
        return (*standing, *(Measure(None, task) for task in WITHOUT_DATA))

    def stated(self, setting: Setting, *, training: bool = True) -> dict[str, Sourced[Any]]:
        """What the recipe says of a setting by name, the rows' options last.

        training: also the pair and how it is trained.
        """
        told: dict[str, Sourced[Any]] = {}
        if training:
            told |= {"pair": setting.pair} if setting.pair else {}
            stated = self.training_of(setting).stated()
            told |= {name.replace("_", " "): one for name, one in stated.items()}
        for method, row in setting.rows.items():
            options = {**row.options_at("cpu"), **row.options}
            told |= {f"{method} {name}": one for name, one in options.items()}
        return told


WITHOUT_DATA = (
    OurTask(task="teacher_jsd", metric="jsd"),
    OurTask(task="bpb_heldout", metric="bpb"),
)


def names() -> list[str]:
    """Names of the recipes."""
    return sorted(_files())


def load(name: str) -> Recipe:
    """The recipe of that name; raises UserError with the nearest others."""
    return read(registry.pick(name, _files(), "table"))


def read(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    raw = {"name": path.stem, **registry.read_yaml(path)}
    raw.pop("shared", None)  # a place for YAML anchors
    return registry.validate(Recipe, raw, f"recipe {path.stem}")


def _files() -> dict[str, Path]:
    folder = Path(str(resources.files(__name__)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _remark(column: Column) -> str:
    """What a reader has to know of our side of a column."""
    if column.runs is None:
        return column.note or NO_TASK
    here = column.runs.shots
    if column.shots is None:
        return f"ours {column.runs.metric}, {here}-shot; the paper does not say, as far as read"
    if column.shots != here:
        return f"the paper {column.shots}-shot, ours {column.runs.metric}, {here}-shot"
    return f"both {here}-shot, ours {column.runs.metric}"


def _stand_in(column: Column) -> str:
    if column.stand_in is not None:
        return f"ours is {column.stand_in.task}, embedded: {column.task} needs --data-dir"
    if column.runs is not None:
        return f"{column.runs.task} needs --data-dir, and nothing embedded stands in"
    return column.note or NO_TASK


def told(stated: Mapping[str, Sourced[Any]], source: Source, here: Mapping[str, Any]) -> list[str]:
    """The settings from that source as lines. here: what is run in place of what is stated."""
    return [_told(name, one, here) for name, one in stated.items() if one.source == source]


def _told(name: str, stated: Sourced[Any], here: Mapping[str, Any]) -> str:
    remarks = [stated.note] if stated.note else []
    remarks += [f"here: {_shown(here[name])}"] if name in here else []
    return f"{name} {_shown(stated.value)}" + (f" ({'; '.join(remarks)})" if remarks else "")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
