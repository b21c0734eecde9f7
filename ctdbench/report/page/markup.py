"""HTML that cannot be injected into: a plain string is escaped wherever it goes.

What comes from a store (names of models, outputs, notes, labels) is anybody's text. Only `element`
makes markup, and only markup is left as it is.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from urllib.parse import quote


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | int | float | None | Iterable["Content"]
Attribute = str | int | float | bool | None


def element(name: str, /, *content: Content, **attributes: Attribute) -> Markup:
    """`<name ...>content</name>`. `class_` is class, `data_value` is data-value.

    An attribute that is None or False is left out, one that is True has no value.
    """
    return Markup(f"<{name}{_attributes(attributes)}>{joined(content)}</{name}>")


def void(name: str, /, **attributes: Attribute) -> Markup:
    """An element that has no content and no end tag, such as meta."""
    return Markup(f"<{name}{_attributes(attributes)}>")


def joined(content: Content) -> Markup:
    """All parts in order, those that are no markup escaped; None is nothing."""
    if isinstance(content, Markup):
        return content
    if content is None:
        return Markup()
    if isinstance(content, str | int | float):
        return Markup(html.escape(str(content)))
    return Markup("".join(map(joined, content)))


def anchor(kind: str, name: str | int) -> str:
    """An id: a name from a store may hold anything, an id no spaces."""
    return f"{kind}-{quote(str(name), safe='')}"


def link(target: str, *content: Content) -> Markup:
    """To an id of this page."""
    return element("a", *content, href=f"#{target}")


def _attributes(attributes: dict[str, Attribute]) -> str:
    told = []
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is True:
            told.append(f" {name}")
        elif value is not None and value is not False:
            told.append(f' {name}="{html.escape(str(value))}"')
    return "".join(told)
