"""What a table says: rows that compare, columns, and what may be claimed of each number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctdbench import results
from ctdbench.report import grouping
from ctdbench.spec import EvalSpec, TrainSpec, format_bytes

if TYPE_CHECKING:
    from ctdbench.report.significance import Share, Standing

LOWER_IS_BETTER = ("bpb", "bits", "jsd", "perplexity")


@dataclass(frozen=True)
class Column:
    """A task's headline metric."""

    task: str
    metric: str

    @property
    def lower_is_better(self) -> bool:
        """Whether less is better, as for bits per byte."""
        return self.metric.startswith(LOWER_IS_BETTER)


@dataclass(frozen=True)
class Difference:
    """From the reference row: value, and its own 95 % interval and p.

    p_holm: p adjusted for all differences of the table. claimed: whether it may be called
    different: p_holm at most 5 % and seeds enough to rank.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    claimed: bool = False


@dataclass(frozen=True)
class Score:
    """Mean over seeds with its 95 % interval, and what it means in the table.

    rank: 1 for the best row and all that are tied with it; None where it is not told (baselines,
    fewer than three seeds). floor: not better than a guesser.
    """

    value: float
    low: float | None = None
    high: float | None = None
    delta: Difference | None = None
    share: Share | None = None
    rank: int | None = None
    floor: bool = False

    @property
    def best(self) -> bool:
        """Whether no other row is better for sure."""
        return self.rank == 1


@dataclass(frozen=True)
class RowCost:
    """What a row's training took, means over seeds; None where it was not recorded.

    device: "GPU" or "CPU"; device_seconds: of all GPUs, or processor time. Both times are of the
    steps, the teacher's share included where its states were not kept beforehand; flops always
    count it.
    """

    device: str
    device_seconds: float | None
    seconds: float | None
    peak_memory_bytes: float | None
    text_bytes: float | None
    student_tokens: float | None
    teacher_tokens: float | None
    flops: float | None


@dataclass(frozen=True)
class Row:
    """One method with one setting, over its seeds; or a baseline, which cost nothing."""

    label: str
    method: str
    seeds: tuple[int, ...]
    options: Mapping[str, Any]
    cells: tuple[str, ...]
    scores: Mapping[Column, Score]
    cost: RowCost | None

    @property
    def is_baseline(self) -> bool:
        """Whether it was not trained here."""
        return results.is_baseline(self.method)


@dataclass(frozen=True)
class Table:
    """Rows that compare: teacher, start, then the methods.

    reference: label of the row that differences are from: `sft`, or `start` where there is none.
    standings: of the columns in which rows are ranked. number: among tables of the same title.
    """

    pair: str
    setting: Mapping[str, Any]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    reference: str | None
    standings: Mapping[Column, Standing]
    notes: tuple[str, ...]
    number: int = 1

    @property
    def title(self) -> str:
        """The pair, and every setting that is not the default one."""
        defaults = {**TrainSpec().identity(), **grouping.evaluation_setting(EvalSpec().identity())}
        shown = ("corpus", "budget", "limit", "limits", "tasks")
        changed = [
            f"{name} {value}"
            for name, value in self.setting.items()
            if name not in shown and value != defaults.get(name)
        ]
        limit = self.setting["limit"]
        parts = [f"{format_bytes(self.setting['budget'])} of {self.setting['corpus']} text"]
        parts += [f"{limit} items a task"] if limit else []
        for task, items in self.setting.get("limits", {}).items():
            parts.append(f"{items or 'all'} items of {task}")
        number = f" ({self.number})" if self.number > 1 else ""
        return f"{self.pair}: {', '.join(parts + changed)}{number}"
