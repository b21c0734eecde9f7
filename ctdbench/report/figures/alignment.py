"""One sentence as two tokenizers cut it, one above the other, with its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from ctdbench.report.figures import style
from ctdbench.report.figures.style import Look
from ctdbench.text.diagnostics import Chunk, chunked_sentence
from ctdbench.text.token_bytes import NotLossless, TokenBytes

MONO = "DejaVu Sans Mono"  # comes with matplotlib
LETTER = 0.0502  # inches: its width at 6 points
AROUND = 0.8  # letters: space around a piece
NAMES, TOP, BOX, LINE = 0.5, 0.08, 0.17, 0.58  # inches: the sides' names; margin; a box; a line
RULER = 10  # bytes from tick to tick
HUES = (style.BLUE, style.ORANGE)
PALE, STRONG = 0.18, 0.55


@style.styled
def alignment(student: TokenBytes, teacher: TokenBytes, sentence: str) -> Figure | str:
    """Chunks in alternating colours, strong where they are not one token on either side."""
    try:
        chunks = chunked_sentence(student, teacher, sentence)
    except NotLossless as error:
        return f"the sentence is not spelled by both tokenizers: {error}"
    if not chunks:
        return "the sentence is empty"
    widths = [_byte_widths(chunk) for chunk in chunks]
    lines = _lines([sum(width) for width in widths], (style.PAGE - NAMES) / LETTER - 1)
    longest = max(sum(sum(widths[index]) for index in line) for line in lines)
    needed = NAMES + LETTER * (longest + 1)
    inches = next(size for size in (style.COLUMN, style.PAGE, needed) if size >= needed)
    note = style.wrap(_remark(chunks), inches)
    height = TOP + LINE * len(lines) + 0.1 * (note.count("\n") + 1) + 0.05
    figure = Figure((inches, height))
    figure.set_label("A sentence as the student's and the teacher's tokenizer cut it")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-NAMES / LETTER, inches / LETTER - NAMES / LETTER), ylim=(height, 0))
    axes.set_axis_off()
    offset = 0
    for number, line in enumerate(lines):
        offset = _draw_line(axes, TOP + LINE * number, offset, line, chunks, widths)
    axes.text(1 - NAMES / LETTER, height - 0.05, note, va="bottom", fontsize=style.SMALL)
    return figure


def readable(piece: bytes) -> str:
    """A token's bytes as text: a space as ␣, what is no character or has no glyph escaped."""
    glyphs = get_font(findfont(FontProperties(family=MONO)))
    text = piece.decode("utf-8", errors="backslashreplace").replace(" ", "␣")
    return "".join(
        letter
        if letter.isprintable() and glyphs.get_char_index(ord(letter))
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _byte_widths(chunk: Chunk) -> list[float]:
    """In letters, of each byte of the chunk: as much as its piece needs on the wider side."""
    sides = [
        [
            (len(readable(piece)) + AROUND) / len(piece)
            for piece in pieces
            for _ in range(len(piece))
        ]
        for pieces in (chunk.student, chunk.teacher)
    ]
    return [max(both) for both in zip(*sides, strict=True)]


def _lines(widths: Sequence[float], room: float) -> list[list[int]]:
    """Chunk numbers by line; a chunk that is wider than the room has a line of its own."""
    lines: list[list[int]] = [[]]
    used = 0.0
    for index, width in enumerate(widths):
        if lines[-1] and used + width > room:
            lines.append([])
            used = 0.0
        lines[-1].append(index)
        used += width
    return lines


def _draw_line(
    axes: Axes,
    top: float,
    offset: int,
    line: Sequence[int],
    chunks: Sequence[Chunk],
    widths: Sequence[Sequence[float]],
) -> int:
    """Returns the byte offset at which the line ends; it begins at `offset`."""
    edges = [0.0, *accumulate(width for index in line for width in widths[index])]
    for name, height in (("student", top), ("teacher", top + BOX)):
        axes.text(-1, height + BOX / 2, name, ha="right", va="center", fontsize=style.SMALL)
        at = 0
        for index in line:
            chunk = chunks[index]
            alpha = PALE if is_one_to_one(chunk) else STRONG
            for piece in chunk.student if name == "student" else chunk.teacher:
                ends = edges[at], edges[at + len(piece)]
                _box(axes, ends, height, readable(piece), (HUES[index % 2], alpha))
                at += len(piece)
    _ruler(axes, top + 2 * BOX, offset, edges)
    return offset + len(edges) - 1


def _box(
    axes: Axes, ends: tuple[float, float], top: float, text: str, colour: tuple[str, float]
) -> None:
    left, right = ends
    look: Look = {"facecolor": colour, "edgecolor": style.PAPER, "linewidth": 0.8}
    axes.add_patch(Rectangle((left, top), right - left, BOX, **look))
    letters: Look = {"family": MONO, "fontsize": style.SMALL, "parse_math": False}
    axes.text((left + right) / 2, top + BOX / 2, text, ha="center", va="center", **letters)


def _ruler(axes: Axes, top: float, offset: int, edges: Sequence[float]) -> None:
    """The bytes of the document, which both sides lie over."""
    axes.plot([edges[0], edges[-1]], [top + 0.02] * 2, color=style.GREY, lw=0.5)
    for byte in range(-(-offset // RULER) * RULER, offset + len(edges), RULER):
        x = edges[byte - offset]
        axes.plot([x, x], [top + 0.02, top + 0.05], color=style.GREY, lw=0.5)
        small: Look = {
            "ha": "center",
            "va": "top",
            "fontsize": style.SMALL - 1,
            "color": style.GREY,
        }
        axes.text(x, top + 0.06, str(byte), **small)


def is_one_to_one(chunk: Chunk) -> bool:
    """Whether it is one token on either side."""
    return len(chunk.student) == len(chunk.teacher) == 1


def _remark(chunks: Sequence[Chunk]) -> str:
    single = sum(map(is_one_to_one, chunks))
    return (
        f"Colours alternate from chunk to chunk. Pale: one token on either side ({single} of "
        f"{len(chunks)} chunks). Strong: more. The ruler counts bytes."
    )
