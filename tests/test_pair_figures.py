"""Figures of a pair: both tokenizations of a sentence, and what the vocabularies share."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from example_figures import (
    SENTENCE,
    STUDENT,
    TEACHER,
    assert_inside,
    drawn,
    words,
)
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ctdbench.report import figures
from ctdbench.report.figures import style
from ctdbench.report.figures.alignment import readable
from ctdbench.text.diagnostics import vocabulary_overlap
from ctdbench.text.token_bytes import TokenBytes


def boxes(figure: Figure) -> list[tuple[float, float, float, str, float]]:
    """left, top, width, hue and opacity of every piece, in the order drawn."""
    return [
        (
            *patch.get_xy(),
            patch.get_width(),
            to_hex(patch.get_facecolor()),
            patch.get_facecolor()[3],
        )
        for patch in figure.axes[0].patches
        if isinstance(patch, Rectangle)
    ]


def test_alignment_lays_both_sides_over_the_same_bytes() -> None:
    figure = drawn(figures.alignment(STUDENT, TEACHER, SENTENCE))
    pieces = [t for t in figure.axes[0].texts if t.get_fontfamily() == ["DejaVu Sans Mono"]]
    found = boxes(figure)
    assert len(pieces) == len(found)
    sides = [[box for box in found if box[1] == top] for top in sorted({box[1] for box in found})]
    assert len(sides) == 2
    spans = [[(box[0], round(box[0] + box[2], 6)) for box in side] for side in sides]
    for side, tokens in zip(spans, (STUDENT, TEACHER), strict=True):
        assert len(side) == len(tokens.encode(SENTENCE).ids)
        assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(side))
    assert spans[0][-1][1] == spans[1][-1][1]
    assert not any(text.get_parse_math() for text in pieces)  # "$x$" is no formula here


def test_alignment_is_pale_where_it_is_one_to_one() -> None:
    figure = drawn(figures.alignment(STUDENT, TEACHER, "a 2345"))
    opacity = {
        text.get_text(): round(box[4], 2)
        for text, box in zip(
            [t for t in figure.axes[0].texts if t.get_fontfamily() == ["DejaVu Sans Mono"]],
            boxes(figure),
            strict=True,
        )
    }
    assert opacity["a"] == opacity["␣"] < opacity["234"] == opacity["45"]
    assert "2 of 3 chunks" in words(figure)
    hues = [box[3] for box in boxes(figure)]
    assert hues[:3] == [style.BLUE, style.ORANGE, style.BLUE]


def test_pieces_are_readable_and_never_boxes() -> None:
    assert readable(b" a\n") == "␣a\\n"
    assert readable("ï".encode()) == "ï"
    assert readable(b"\xc3") == "\\xc3"
    assert readable("你".encode()) == "\\u4f60"
    assert readable(b"\xe4\xbd") == "\\xe4\\xbd"
    assert "\\xe4\\xbd" in words(drawn(figures.alignment(STUDENT, TEACHER, SENTENCE)))


def test_a_long_sentence_takes_more_lines_and_no_more_width() -> None:
    one = drawn(figures.alignment(STUDENT, TEACHER, "short"))
    many = drawn(figures.alignment(STUDENT, TEACHER, "a longer sentence " * 8))
    assert one.get_figwidth() == style.COLUMN
    assert many.get_figwidth() == style.PAGE
    assert many.get_figheight() > 1.5 * one.get_figheight()
    assert_inside(many)


def test_what_cannot_be_aligned_has_a_reason() -> None:
    assert "empty" in str(figures.alignment(STUDENT, TEACHER, ""))
    backend = Tokenizer(models.BPE())
    backend.add_tokens(["a"])
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reason = figures.alignment(STUDENT, TokenBytes(backend), "A")
    assert "do not spell the text from byte 0 on" in str(reason)


def test_overlap_shows_shares_and_counts() -> None:
    figure = drawn(figures.overlap(STUDENT, TEACHER))
    (axes,) = figure.axes
    known = vocabulary_overlap(STUDENT.vocabulary, TEACHER.vocabulary)
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["all", *(name for name, c in known.items() if any(vars(c).values()))]
    for height, name in enumerate(names[1:], start=1):
        counts = (known[name].student_only, known[name].common, known[name].teacher_only)
        bars = [container[height] for container in _parts(axes, len(names))]
        assert [bar.get_width() for bar in bars] == pytest.approx(np.array(counts) / sum(counts))
        assert [bar.get_x() for bar in bars] == pytest.approx(
            np.r_[0, np.cumsum(counts)[:2]] / sum(counts)
        )
        written = [t.get_text() for t in axes.texts if t.get_position()[1] == height]
        assert written == [f"{count:,}" for count in counts]
    assert all(head in words(figure) for head in ("only student", "common", "only teacher"))


def _parts(axes: Axes, lines: int) -> list[list[Rectangle]]:
    """Bars by part and line."""
    bars = [container[0] for container in axes.containers]
    return [[bars[3 * number + part] for number in range(lines)] for part in range(3)]


def test_draw_pair_names_its_files_after_the_pair(tmp_path: Path) -> None:
    made = figures.draw_pair(STUDENT, TEACHER, SENTENCE, tmp_path, "tiny", ("svg",))
    assert made == {
        "alignment": [tmp_path / "tiny-alignment.svg"],
        "overlap": [tmp_path / "tiny-overlap.svg"],
    }
    for path in tmp_path.iterdir():
        ElementTree.parse(path)
    again = figures.draw_pair(STUDENT, TEACHER, "", tmp_path, "none", ("svg",))
    assert again["alignment"] == "the sentence is empty"
