"""Numbers as a reader meets them: rounded alike in every format, with their units."""

from __future__ import annotations

from ctdbench.report.tables import Column

ABSENT = "–"
PERCENT = ("acc", "exact_match", "f1", "mc1", "mc2", "prompt_level", "inst_level")
DIVERGENCE = "jsd"  # of a trained student a few hundredths: one digit more than the others


def is_percent(column: Column) -> bool:
    """Whether a column is told in percent, its differences in points."""
    return column.metric.startswith(PERCENT)


def metric(column: Column) -> str:
    """`acc % ↑`: name, unit, and where better is."""
    unit = " %" if is_percent(column) else ""
    return f"{column.metric}{unit} {'↓' if column.lower_is_better else '↑'}"


def number(value: float, column: Column, *, sign: str = "") -> str:
    """A score, an interval or a difference in the column's unit; sign "+": always with its sign."""
    if is_percent(column):
        return _fixed(100 * value, 1, sign)
    if abs(value) >= 100:
        return _fixed(value, 1, sign)
    return _fixed(value, 4 if column.metric.startswith(DIVERGENCE) else 3, sign)


def percent(share: float) -> str:
    """0.6842 -> `68%`."""
    return f"{_fixed(100 * share, 0)}%"


def significant(value: float) -> str:
    """Three significant digits, or all before the point: `0.0213`, `5.90`, `1,234`."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def count(value: float) -> str:
    """5442 -> `5.44k`, 0 -> `0`."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{significant(value / scale)}{unit}"
    return f"{value:.0f}"


def _fixed(value: float, digits: int, sign: str = "") -> str:
    # Adding 0.0 makes the -0.0 of what is just below nothing a plain 0.
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"
