"""Tables to draw, and what a figure of matplotlib holds."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from example_results import example
from example_store import HEADLINE, write_store
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from tokenizers import Tokenizer, models, pre_tokenizers

from ctdbench import report, results
from ctdbench.report.tables import Column, Row, RowCost, Score, Table
from ctdbench.text.token_bytes import TokenBytes

BPB, ACC = Column("bpb_heldout", "bpb"), Column("piqa", "acc")
WIDE_COLUMNS = (BPB, ACC, Column("arithmetic_word", "exact_match"), *(
    Column(f"a_rather_long_task_{n}", "acc_bytes") for n in "ab"
))  # fmt: skip
SETTING = {"corpus": "gsm8k", "budget": 900_000, "limit": None}
SENTENCE = "In naïve 2345 $x$ 你 costs $5"
STEP = 1000  # bytes of text


def stored_table(folder: Path) -> tuple[Table, dict[str, Path]]:
    """The table of a new store and its cells: four methods, one with one seed, on three tasks."""
    write_store(folder, tasks=("bpb_heldout", "teacher_jsd", "piqa"))
    found = results.find(folder, status=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTDBENCH_CACHE", str(folder / "cache"))
        (table,) = report.comparison(found, HEADLINE)
    return table, {result["id"]: path for path, result in found.items()}


def row(
    label: str,
    values: Mapping[Column, float],
    *,
    seeds: int = 3,
    seconds: float | None = 600.0,
    device: str = "CPU",
    best: bool = False,
) -> Row:
    """A row of that label; each interval reaches 5 % of the value below and 10 % above it."""
    baseline = label in ("teacher", "start")
    scores = {
        column: Score(value, 0.95 * value, 1.1 * value, rank=1 if best else 2)
        for column, value in values.items()
    }
    cost = RowCost(device, seconds, seconds, None, None, None, None, None)
    cells = tuple(f"{label} {seed}" for seed in range(seeds))
    method = label.split("[")[0].split()[0]
    return Row(label, method, tuple(range(seeds)), {}, cells, scores, None if baseline else cost)


def table_of(rows: Sequence[Row], columns: Sequence[Column] = (BPB, ACC)) -> Table:
    return Table("llama-qwen", SETTING, tuple(columns), tuple(rows), None, {}, ())


def wide_table() -> Table:
    """15 methods with long names on 5 tasks, GPU-hours from 0.1 to 20."""
    draw = random.Random(5)
    labels = [f"method-{n:02}" for n in range(12)]
    labels += ["bld[beam]", "sft (seqkd)", "gold (on-policy 0.5) learning_rate=0.0003"]
    rows = [
        row(
            label,
            {column: draw.uniform(0.4, 0.9) for column in WIDE_COLUMNS},
            seconds=360 * 200 ** draw.random(),
            device="GPU",
            seeds=1 if number == 4 else 3,
        )
        for number, label in enumerate(labels)
    ]
    ends = [row(name, dict.fromkeys(WIDE_COLUMNS, v)) for name, v in (("teacher", 1), ("start", 0))]
    return table_of([*ends, *rows], WIDE_COLUMNS)


def write_log(
    folder: Path, losses: Sequence[float | None], *, tokens: int = 250, size: int = STEP
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, ce in enumerate(losses, start=1):
        line = {"step": step, "text_bytes": step * size, "student_tokens": step * tokens}
        lines.append(json.dumps(line | ({"loss": 1.0} if ce is None else {"ce": ce})))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def logs(tmp_path: Path, table: Table, steps: int = 100) -> dict[str, Path]:
    """A log a cell; one nat a token, and a tenth more for each seed. A result with the row's scores
    and half way twice as much, and a tenth more for each seed."""
    folders = {}
    for table_row in table.rows:
        for seed, cell in enumerate(table_row.cells):
            folders[cell] = tmp_path / cell
            write_log(folders[cell], [1 + 0.1 * seed] * steps)
            write_points(folders[cell], table_row, seed)
    return folders


def write_points(folder: Path, table_row: Row, seed: int) -> None:
    ends = {column: score.value for column, score in table_row.scores.items()}
    scores: dict[str, dict[str, float | None]] = {c.task: {c.metric: ends[c]} for c in ends}
    result = example(table_row.method, scores, seed=seed, budget=100 * STEP)
    half = {f"{c.task}.{c.metric}": ends[c] * (2 + 0.1 * seed) for c in ends}
    result["points"] = [{"text_bytes": 50 * STEP, "scores": dict(half)}]
    results.write_json_atomic(folder / results.RESULT, result)


def drawn(figure: Figure | str) -> Figure:
    assert isinstance(figure, Figure), figure
    return figure


def line(axes: Axes, label: str) -> Line2D:
    (found,) = (found for found in axes.get_lines() if found.get_label() == label)
    return found


def xy(found: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*found.get_data(), strict=True)]


def words(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    return " ".join(" ".join(texts).split())


def assert_inside(figure: Figure) -> None:
    """No text is cut off, and no two tick labels of an axis run into each other."""
    figure.draw_without_rendering()
    page = figure.bbox.padded(1)
    shown = {axis: shown_ticks(axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)}
    hidden = {t for axis in shown for t in axis.get_ticklabels(which="both")}
    hidden -= {text for texts in shown.values() for text in texts}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text() and text not in hidden:
            box = text.get_window_extent()
            assert page.containsx(box.x0), text
            assert page.containsx(box.x1), text
            assert page.containsy(box.y0), text
            assert page.containsy(box.y1), text
    for texts in shown.values():
        found = [text.get_window_extent() for text in texts]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(found))


def shown_ticks(axis: Axis) -> list[Text]:
    """Labels of the ticks inside the axis' limits: matplotlib draws no others."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [t.label1 for t in ticks if t.label1.get_visible() and t.label1.get_text()]


def token_bytes(*merges: str) -> TokenBytes:
    """Byte-level BPE with these merges, two parts of GPT-2's spelling each."""
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return TokenBytes(backend)


STUDENT = token_bytes("2 3", "23 4", "c o", "co s", "cos t", "Ã ¯")
TEACHER = token_bytes("2 3", "4 5", "c o", "s t", "co st", "ä ½")
