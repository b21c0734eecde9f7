"""Reports: finished cells as tables, figures and a page. Nothing here imports torch."""

from __future__ import annotations

from ctdbench.report.comparison import comparison
from ctdbench.report.formats import FORMATS, SUFFIXES, render
from ctdbench.report.grouping import comparable
from ctdbench.report.tables import Column, Row, Score, Table

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Column",
    "Row",
    "Score",
    "Table",
    "comparable",
    "comparison",
    "render",
]
