"""The cells of a published table: a recipe, at a scale, as requests. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctdbench import registry
from ctdbench.launch.grid import key_of
from ctdbench.recipes import Measure, Recipe, Row, Scale, Setting, Training
from ctdbench.spec import RunSpec, format_bytes

CPU_BUDGET = 200_000


@dataclass(frozen=True)
class Ask:
    """What the user may change of a recipe. budget: bytes of text; seeds: how many, from 0 on.

    corpus: reference of the text, instead of the recipe's. data_dir: folder of the tasks' data.
    """

    scale: Scale = "paper"
    budget: int | None = None
    limit: int | None = None
    seeds: int = 1
    corpus: str | None = None
    data_dir: Path | None = None


@dataclass(frozen=True)
class PlannedRow:
    """A row and its cells by seed; none for a baseline or for what ctdbench does not have."""

    setting: Setting
    name: str
    row: Row
    specs: tuple[RunSpec, ...]

    @property
    def title(self) -> str:
        """Setting and method, as the table shows them."""
        return f"{self.setting.label}: {self.name}"

    @property
    def absent(self) -> str:
        """Why there is neither a cell nor a baseline; empty where there is."""
        has_one = self.specs or self.row.baseline
        return "" if has_one else self.row.missing or "no pair of this design here"


@dataclass(frozen=True)
class Plan:
    """The cells of a table at a scale."""

    recipe: Recipe
    ask: Ask
    measures: tuple[Measure, ...]
    rows: tuple[PlannedRow, ...]

    @property
    def cells(self) -> dict[str, RunSpec]:
        """Every cell once, by what identifies the request: rows may share one."""
        return {key_of(spec): spec for row in self.rows for spec in row.specs}

    @property
    def titles(self) -> dict[str, str]:
        """Pair, rows and seed of every cell."""
        rows: dict[str, list[str]] = defaultdict(list)
        for row in self.rows:
            for spec in row.specs:
                rows[key_of(spec)].append(row.title)
        return {
            key: f"{spec.pair.name}, {' = '.join(rows[key])}, seed {spec.seed}"
            for key, spec in self.cells.items()
        }

    @property
    def by_pair(self) -> dict[str, RunSpec]:
        """One cell of each pair, enough to check what a pair needs."""
        return {spec.pair.name: spec for spec in self.cells.values()}

    def here(self, setting: Setting) -> dict[str, Any]:
        """What the cells of a setting have in place of what the recipe states, by its name there.

        Empty for a setting without cells.
        """
        rows = [row for row in self.rows if row.setting.name == setting.name and row.specs]
        if not rows:
            return {}
        own = _as_stated(rows[0].specs[0], self.recipe.training_of(setting))
        for row in rows:
            own |= {f"{row.name} {name}": one for name, one in row.specs[0].options.items()}
        stated = self.recipe.stated(setting).items()
        return {name: own[name] for name, one in stated if own.get(name, one.value) != one.value}

    def resolved(self, resolve: Callable[[RunSpec], RunSpec]) -> Plan:
        """The plan with all options of every method (`request.resolve_options`)."""
        rows = [replace(row, specs=tuple(map(resolve, row.specs))) for row in self.rows]
        return replace(self, rows=tuple(rows))


def plan(recipe: Recipe, ask: Ask) -> Plan:
    """What to run; raises UserError for a setting that no cell can have."""
    measures = recipe.measures(ask.scale, data=ask.data_dir is not None)
    tasks = tuple(dict.fromkeys(measure.runs.task for measure in measures if measure.runs))
    rows = [
        PlannedRow(setting, name, row, tuple(_specs(recipe, setting, row, ask, tasks)))
        for setting in recipe.settings
        for name, row in setting.rows.items()
    ]
    return Plan(recipe, ask, measures, tuple(rows))


def _specs(
    recipe: Recipe, setting: Setting, row: Row, ask: Ask, tasks: tuple[str, ...]
) -> Iterator[RunSpec]:
    name = setting.pair_at(ask.scale)
    if row.method is None or name is None:
        return
    pair = registry.load_pair(name)
    training = recipe.training_of(setting)
    if ask.scale == "paper":
        pair = training.applied(pair)
    options = row.options_at(ask.scale).items()
    request = {
        "method": row.method,
        "pair": pair,
        "options": {option: stated.value for option, stated in options},
        "train": _train(recipe, setting, ask),
        "eval": {
            "tasks": tasks,
            "limit": ask.limit,
            "data_dir": str(ask.data_dir) if ask.data_dir else None,
        },
    }
    for seed in range(ask.seeds):
        yield registry.validate(RunSpec, {**request, "seed": seed}, recipe.name)


def _as_stated(spec: RunSpec, recipe: Training) -> dict[str, Any]:
    """A cell's settings under the names that recipes have for them."""
    train, lora = spec.train, spec.pair.lora
    own: dict[str, Any] = {
        "pair": spec.pair.name,
        "data": train.corpus,
        "trained": "lora" if lora else "all",
        "learning rate": train.learning_rate or spec.pair.learning_rate,
        "batch documents": train.batch_documents,
        "template": train.template,
    }
    if lora:
        own |= {"lora rank": lora.rank, "lora alpha": lora.alpha, "lora targets": lora.targets}
        own["lora embeddings"] = lora.train_embeddings
    if train.budget != recipe.budget:
        own["steps"] = f"{format_bytes(train.budget)} of text"
    if train.document_bytes != recipe.document_bytes:
        own["document tokens"] = f"{train.document_bytes} bytes"
    return own


def _train(recipe: Recipe, setting: Setting, ask: Ask) -> dict[str, Any]:
    """Fields of `TrainSpec`; at CPU scale everything but text and budget is the default."""
    if ask.scale == "cpu":
        return {"corpus": ask.corpus or "embedded", "budget": ask.budget or CPU_BUDGET}
    training = recipe.training_of(setting)
    stated = training.stated()
    names = ("learning_rate", "batch_documents", "template")
    chosen = {name: stated[name].value for name in names if name in stated}
    return {
        **chosen,
        "corpus": ask.corpus or stated["data"].value,
        "budget": ask.budget or training.budget,
        "document_bytes": training.document_bytes,
    }
