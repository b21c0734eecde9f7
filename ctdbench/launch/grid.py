"""A grid: rows, pairs and seeds, as cells; and how a row finds its learning rate.

A row is a method as tables show it: `bld`, `bld[path]` (the option that its META calls `row`),
`gold+ce` (cross-entropy at weight 1 beside it), `bld[path]+ce`. Rows that differ in more come from
a YAML file:

    pairs: [smol-mistral]
    seeds: 3                       # of every row: 0, 1, 2; or a list
    train: {corpus: gsm8k, budget: 300kB}
    eval: {tasks: [bpb_heldout, teacher_jsd, piqa]}
    rows:
      - sft
      - {row: bld[path], seeds: [0], options: {kl_weight: 0.2}, train: {balance: ratio}}
    tuning:                        # every row on its own; its trials are in no table
      field: train.learning_rate
      values: [3.0e-5, 1.0e-4, 3.0e-4]
      seed: 1000
      select: bpb_heldout.bpb
      eval: {limit: 50}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ctdbench import registry
from ctdbench.errors import UserError
from ctdbench.evaluate.task_files import item_sources
from ctdbench.report.tables import Column
from ctdbench.spec import EvalSpec, Frozen, RunSpec, TrainSpec

ROW = re.compile(r"(?P<method>.*?)(\[(?P<value>.*)\])?(?P<ce>\+ce)?", re.DOTALL)
SECTIONS = {"train": "train", "method": "options"}  # of a tuned field -> of a request
Build = Callable[[Mapping[str, Any]], RunSpec]  # `request.build_spec`: a request's fields -> a cell


def parse_seeds(value: Any) -> tuple[int, ...]:
    """3 -> 0, 1, 2; [4, 5] or "4,5" -> those; raises ValueError otherwise."""
    stated = value.split(",") if isinstance(value, str) and "," in value else value
    try:
        if isinstance(stated, list | tuple):
            seeds = tuple(int(seed) for seed in stated if str(seed).strip())
        else:
            seeds = tuple(range(int(stated)))
    except (TypeError, ValueError):
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"{value!r} is neither a number of seeds nor a list of different ones")
    return seeds


def parse_row(text: str) -> tuple[str, dict[str, Any]]:
    """`bld[path]+ce` -> (bld, its options); raises UserError for what no method answers to."""
    known = registry.methods()
    if text in known:
        return text, {}
    match = ROW.fullmatch(text)
    assert match is not None  # it matches anything
    info = registry.pick(match["method"], known, "method")
    options: dict[str, Any] = {}
    if match["value"] is not None:
        if not info.meta.get("row"):
            raise UserError(
                f"row {text!r}: method {info.name} has no variants with names of their own",
                "state its options in a grid file",
            )
        options[str(info.meta["row"])] = registry.parse_yaml(match["value"], f"row {text!r}")
    return info.name, options | ({"ce_weight": 1.0} if match["ce"] else {})


Seeds = Annotated[tuple[int, ...], BeforeValidator(parse_seeds)]
Fields = dict[str, Any]


class GridRow(Frozen):
    """A row: its notation, what it states beyond it, and the seeds that are its own."""

    row: str
    label: str = ""
    options: Fields = Field(default_factory=dict)
    train: Fields = Field(default_factory=dict)
    seeds: Seeds | None = None

    @property
    def title(self) -> str:
        """What a person calls the row."""
        return self.label or self.row


class Tuning(Frozen):
    """How every row picks one field's value: trial cells of one seed, of which the best counts.

    field: `train.FIELD` or `method.OPTION`. select: TASK.METRIC that decides. train, eval: what the
    trials change of the final settings. They evaluate `select`'s task alone unless told otherwise,
    and of held-out documents the validation part, which no table is about.
    """

    field: str = Field("train.learning_rate", pattern=r"^(train|method)\.\w+$")
    values: tuple[bool | int | float | str, ...] = Field(min_length=2)
    seed: int = Field(ge=0)
    select: str = Field(pattern=r"^[^.]+\.[^.]+$")
    train: Fields = Field(default_factory=dict)
    eval: Fields = Field(default_factory=dict)

    @property
    def column(self) -> Column:
        """What decides."""
        return Column(*self.select.split("."))

    def chosen(self, value: Any) -> dict[str, Fields]:
        """The value as fields of a request."""
        section, _, name = self.field.partition(".")
        return {SECTIONS[section]: {name: value}}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _rows(value: Any) -> Any:
    return [{"row": entry} if isinstance(entry, str) else entry for entry in _listed(value)]


class Grid(Frozen):
    """Every row on every pair with every seed."""

    title: str = ""
    pairs: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(min_length=1)
    rows: Annotated[tuple[GridRow, ...], BeforeValidator(_rows)] = Field(min_length=1)
    seeds: Seeds = (0,)
    train: Fields = Field(default_factory=dict)
    eval: Fields = Field(default_factory=dict)
    tuning: Tuning | None = None

    @model_validator(mode="after")
    def _check(self) -> Grid:
        titles = [row.title for row in self.rows]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"rows: {twice[0]} stands there twice; give one a label")
        if self.tuning and any(self.tuning.seed in self.seeds_of(row) for row in self.rows):
            raise ValueError("tuning.seed: the seeds of the final cells have to be fresh ones")
        return self

    def seeds_of(self, row: GridRow) -> tuple[int, ...]:
        """Its own, else the grid's."""
        return row.seeds or self.seeds


@dataclass(frozen=True)
class GridCell:
    """A cell and what a person calls it."""

    title: str
    spec: RunSpec

    @property
    def key(self) -> str:
        """Equal for equal requests."""
        return key_of(self.spec)


@dataclass(frozen=True)
class Line:
    """A row on a pair; `spec` is its first cell, before tuning."""

    title: str
    spec: RunSpec
    seeds: tuple[int, ...]
    tuning: Tuning | None = None

    @property
    def trials(self) -> list[GridCell]:
        """A cell for each value to try; none without tuning."""
        if self.tuning is None:
            return []
        task, field = self.tuning.column.task, self.tuning.field
        return [
            GridCell(f"{self.title}, trial {field}={value}", self._trial(self.tuning, value, task))
            for value in self.tuning.values
        ]

    def finals(self, value: Any = None) -> list[GridCell]:
        """The cells of the table. value: of the tuned field; None leaves it as stated."""
        found = {} if self.tuning is None or value is None else self.tuning.chosen(value)
        return [
            GridCell(f"{self.title}, seed {seed}", changed(self.spec, {**found, "seed": seed}))
            for seed in self.seeds
        ]

    def resolved(self, resolve: Callable[[RunSpec], RunSpec]) -> Line:
        """With all options of the method (`request.resolve_options`)."""
        return replace(self, spec=resolve(self.spec))

    def _trial(self, tuning: Tuning, value: Any, task: str) -> RunSpec:
        chosen = tuning.chosen(value)
        train = {"keep_model": False, **tuning.train, **chosen.pop("train", {})}
        evaluation = {"tasks": (task,), "limits": {}, "points": 1, **tuning.eval}
        evaluation["held_out"] = "validation"
        changes = {"seed": tuning.seed, "train": train, "eval": evaluation, **chosen}
        return changed(self.spec, changes)


def changed(spec: RunSpec, changes: Mapping[str, Any]) -> RunSpec:
    """The spec with other values; train, eval and options field by field."""
    sections = {
        name: registry.validate(model, {**dict(getattr(spec, name)), **changes[name]}, name)
        for name, model in (("train", TrainSpec), ("eval", EvalSpec))
        if name in changes
    }
    options = {**spec.options, **changes.get("options", {})}
    fields = {**dict(spec), **changes, **sections, "options": options}
    return registry.validate(RunSpec, fields, "grid")


def read(path: Path) -> Grid:
    """The grid in a YAML file; raises UserError naming what is wrong with it."""
    return registry.validate(Grid, registry.read_yaml(path), str(path))


def lines(grid: Grid, build: Build, over: Mapping[str, Fields]) -> list[Line]:
    """The grid row by row. over: train and eval from the command line, which win.

    Raises UserError for an unknown name or a setting that no cell can have.
    """
    found = [
        Line(f"{pair}, {row.title}", spec, grid.seeds_of(row), grid.tuning)
        for pair in grid.pairs
        for row in grid.rows
        for spec in [build(_request(grid, row, pair, over))]
    ]
    if grid.tuning is not None:
        _check_selection(grid.tuning.column.task, found[0].spec.eval)  # all lines have the same
    return found


def _check_selection(task: str, table: EvalSpec) -> None:
    """Settings are not chosen on documents that the table then reports on."""
    if table.held_out == "validation":
        raise UserError(
            "eval.held_out: the validation part is what tuning chooses on",
            "leave it out: trials take the validation part, the table takes the test part",
        )
    sources = item_sources(table.extra_tasks)
    own = registry.pick(task, sources, "task")
    for other in table.tasks:
        if own & sources.get(other, set()):
            where = "" if other == task else f" in {other}"
            raise UserError(
                f"tuning.select: the table is about the same items of {task}{where}",
                "select by bpb_heldout or teacher_jsd, or by items that the table does not have",
            )


def _request(grid: Grid, row: GridRow, pair: str, over: Mapping[str, Fields]) -> Fields:
    method, options = parse_row(row.row)
    return {
        "method": method,
        "pair": pair,
        "seed": grid.seeds_of(row)[0],
        "options": {**options, **row.options},
        "train": {**grid.train, **row.train, **over.get("train", {})},
        "eval": {**grid.eval, **over.get("eval", {})},
    }


def all_rows() -> list[str]:
    """Every method that there is, as published."""
    return sorted(registry.methods())


def key_of(spec: RunSpec) -> str:
    """Equal for equal requests. (A cell's id knows text in files by its content alone.)"""
    return spec.model_dump_json()


def unique(cells: Iterable[GridCell]) -> list[GridCell]:
    """Every cell once, under the first of its titles: rows may share one."""
    return list({cell.key: cell for cell in reversed(list(cells))}.values())[::-1]
