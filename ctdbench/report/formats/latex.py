"""LaTeX with booktabs: a fragment to `\\input`; pdflatex and any class take it as it stands."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ctdbench.report.formats.columns import (
    Cell,
    CostColumn,
    ScoreColumn,
    cost_columns,
    row_label,
    score_columns,
)
from ctdbench.report.tables import Table

_PREAMBLE = r"% Made by ctdbench. The document needs \usepackage{booktabs,graphicx}." + "\n"
_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "−": "$-$",
        "×": r"$\times$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "→": r"$\rightarrow$",
        "λ": r"$\lambda$",
        "–": r"\textendash{}",
        "…": r"\ldots{}",
    }
)
_TABLE = r"""
\begin{table*}[t]
  \centering
  \caption{%(caption)s}
  \label{%(label)s}
  \footnotesize
  \sbox0{%%
%(tabular)s%%
  }%%
  \ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi
%(notes)s\end{table*}
"""
_NOTES = r"""  \begin{flushleft}
    \footnotesize
%s
  \end{flushleft}
"""


def render(tables: Sequence[Table]) -> str:
    """One `table*` each, shrunk to the line where it is wider, with a label and notes below."""
    labels = _labels(tables)
    return _PREAMBLE + "".join(_table(table, next(labels)) for table in tables)


def escape(text: str) -> str:
    """Text of one line; a character that pdflatex cannot set becomes its code point, `U+4E2D`."""
    plain = " ".join(text.split()).translate(_TEX)
    plain = re.sub("-(?=-)", "-{}", plain)  # two hyphens would be set as a dash
    return re.sub(r"[^ -~]", lambda match: f"U+{ord(match[0]):04X}", plain)


def _labels(tables: Sequence[Table]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for table in tables:
        seen[table.pair] += 1
        number = seen[table.pair]
        yield f"tab:{table.pair}" + (f"-{number}" if number > 1 else "")


def _table(table: Table, label: str) -> str:
    notes = "\n".join(rf"    {escape(note)}\par" for note in table.notes)
    return _TABLE % {
        "caption": escape(table.title),
        "label": label,
        "tabular": "\n".join(_tabular(table)),
        "notes": _NOTES % notes if notes else "",
    }


def _tabular(table: Table) -> list[str]:
    """Lines; every column has three of head and two a row; a line that is empty is left out."""
    names = [text for row in table.rows for text in (escape(row_label(row)), "")]
    columns = [["method", "", "", *names]]
    columns += map(_scores, score_columns(table))
    columns += map(_costs, cost_columns(table))
    return [
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"\toprule",
        *_lines([column[:3] for column in columns]),
        r"\midrule",
        *_lines([column[3:] for column in columns]),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _lines(columns: Sequence[Sequence[str]]) -> list[str]:
    return [rf"{' & '.join(line)} \\" for line in zip(*columns, strict=True) if any(line)]


def _scores(scores: ScoreColumn) -> list[str]:
    task, metric, beside = map(escape, scores.head)
    cells = [text for cell in scores.cells for text in _cell(scores, cell)]
    return [task, metric, _small(beside), *cells]


def _costs(cost: CostColumn) -> list[str]:
    return [
        *map(escape, cost.head),
        "",
        *(part for text in cost.texts for part in (escape(text), "")),
    ]


def _cell(scores: ScoreColumn, cell: Cell) -> tuple[str, str]:
    value = _number(cell.value)
    value = rf"\textbf{{{value}}}" if cell.best else value
    value += escape("~") if cell.floor else ""
    value += rf" $\pm$ {cell.half}" if cell.half else ""
    return value, _small(_number(scores.beside(cell)))


def _number(text: str) -> str:
    """With a minus instead of a hyphen."""
    return escape(text.replace("-", "−"))


def _small(text: str) -> str:
    return rf"{{\scriptsize {text}}}" if text else ""
