"""Read a table's rows back out of each format that is made for people.

Rows come by label in the terminal's notation, tasks in order and then costs: score with `*` and
`~`, half of the interval, difference with `!`, share of the gap.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Element(dict[str, str | None]):
    """Attributes of a cell and its text, bold and marks in the terminal's notation."""

    text = ""


class Page(HTMLParser):
    """The rows of all tables, head included; checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[Element]] = []
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("br", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(Element(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "strong":
            self.rows[-1][-1].text += "*"

    def handle_data(self, data: str) -> None:
        if "tr" in self.open:
            self.rows[-1][-1].text += data


def read_terminal(text: str, labels: list[str]) -> dict[str, str]:
    lines = text.splitlines()
    starts = {label: len(label) for label in labels}
    return {
        label: " ".join(li[end:] for li in lines if li.startswith(label) and li[end:][:2] == "  ")
        for label, end in starts.items()
    }


def read_markdown(text: str, labels: list[str]) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    cells = {row[0]: " ".join(row[1:]) for row in rows}
    plain = {label: re.sub(r"\*\*(.+?)\*\*", r"\1*", cells[label]) for label in labels}
    return {label: line.replace("\\~", "~") for label, line in plain.items()}


def read_latex(text: str, labels: list[str]) -> dict[str, str]:
    plain = re.sub(r"\\textbf\{(.+?)\}", r"\1*", text)
    for tex, sign in (("$-$", "-"), (r"\%", "%"), (r"\textasciitilde{}", "~"), (r"\_", "_")):
        plain = plain.replace(tex, sign)
    lines = [line[:-2].split(" & ") for line in plain.splitlines() if line.endswith(r" \\")]
    read = {}
    for (label, *cells), (under, *below) in zip(lines, [*lines[1:], ["end"]], strict=True):
        beside = [""] * len(cells) if under else [re.sub(r"\{\\\w+ ", "", part) for part in below]
        pairs = zip(cells, beside, strict=True) if label else ()
        read[label] = " ".join(part for pair in pairs for part in pair)
    return {label: read[label] for label in labels}


def read_html(text: str, labels: list[str]) -> dict[str, str]:
    rows = {row[0].text: row[1:] for row in Page(text).rows}
    return {label: " ".join(cell.text for cell in rows[label]) for label in labels}


READERS = {
    "terminal": read_terminal,
    "markdown": read_markdown,
    "latex": read_latex,
    "html": read_html,
}
