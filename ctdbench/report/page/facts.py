"""Names and values, as every part of the page lists them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ctdbench.report.page.markup import Content, Markup, element

Fact = tuple[Content, Content]


def listed(facts: Iterable[Fact]) -> Markup | None:
    """A list of names and what is told of each; None without any."""
    rows = [element("div", element("dt", name), element("dd", told)) for name, told in facts]
    return element("dl", *rows) if rows else None


def titled(heading: str, content: Content) -> Markup | None:
    """Content under a heading of a cell's section; None without any."""
    return element("section", element("h4", heading), content) if content else None


def lists(heading: str, data: Mapping[str, Any]) -> Iterator[Markup | None]:
    """A titled list of what a mapping holds, and one of each mapping in it; no empty values."""
    inner = {name: found for name, found in data.items() if isinstance(found, Mapping)}
    plain = {name: found for name, found in data.items() if name not in inner}
    told = {name: found for name, found in plain.items() if found not in (None, [], "")}
    yield titled(heading, listed((name, value(found)) for name, found in told.items()))
    for name, found in inner.items():
        yield from lists(f"{heading}, {name}", found)


def value(found: Any) -> Markup:
    """A stored value: a number in full for machines, rounded for people; else as text or JSON."""
    if isinstance(found, int | float) and not isinstance(found, bool):
        text = f"{found:.6g}" if isinstance(found, float) else f"{found:,}"
        return element("span", text, class_="number", data_value=repr(found))
    if isinstance(found, list) and all(isinstance(part, str) for part in found):
        found = ", ".join(found)
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return element("code", "none" if found is None else text)
