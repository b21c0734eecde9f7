"""A figure of matplotlib as markup of the page, whose security policy allows no inline style."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from ctdbench.report.page.markup import Markup

DECLARATION = re.compile(r"\s*([a-z-]+)\s*:\s*([^;]+?)\s*(?:;|$)")
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # and not allowed in XML


def inline(svg: str, label: str) -> Markup:
    """The drawing with presentation attributes for styles, and a label for who cannot see it."""
    root = ElementTree.fromstring(UNPRINTABLE.sub("", svg))
    for element in root.iter():
        element.tag = _local(element.tag)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            element.attrib |= (
                dict(DECLARATION.findall(value)) if name == "style" else {_local(name): value}
            )
    root.attrib |= {"role": "img", "aria-label": label}
    for size in ("width", "height"):  # the page's style sheet says how large it is
        root.attrib.pop(size, None)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    """Without the name space, which HTML knows: `{http://www.w3.org/1999/xlink}href` -> `href`."""
    return name.rpartition("}")[2]
