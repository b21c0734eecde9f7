"""The report: one HTML file that opens offline, whatever a store holds.

Nothing is loaded from anywhere, and the page's security policy allows only its own style sheet and
script, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from ctdbench import atomic
from ctdbench.errors import UserError
from ctdbench.report.page.cells import cells
from ctdbench.report.page.header import TITLE, header
from ctdbench.report.page.markup import Markup, element, void
from ctdbench.report.page.material import Material
from ctdbench.report.page.missing import missing
from ctdbench.report.page.sections import sections
from ctdbench.results import Result

__all__ = ["html", "write"]


def write(found: Mapping[Path, Result], headline: Mapping[str, str] | None, out: Path) -> None:
    """Write the report on the cells found, by their folders (`<store>/<pair>/<method>/<id>`).

    headline: the metric to show of a task; by default a task's first. Raises UserError for a
    folder that does not exist, or no cells, RunError for a file that cannot be written.
    """
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist", "make it first, or name another")
    if out.is_dir():
        raise UserError(f"{out} is a folder", "name a file in it")
    text = html(found, headline)
    atomic.write_bytes(out, text.encode(errors="replace"))  # half a surrogate pair


def html(found: Mapping[Path, Result], headline: Mapping[str, str] | None = None) -> str:
    """The text of the report; raises UserError where there are no cells or a file is broken."""
    if not found:
        raise UserError("no results to report on", "ctdbench run makes some")
    material = Material(found, headline)
    style, script = (_own(name) for name in ("page.css", "page.js"))
    head = element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        element("title", f"{TITLE}: {material.store}"),
        element("style", style),
    )
    main = element("main", *sections(material), missing(material), cells(material))
    body = element("body", header(material), main, element("script", script))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _own(name: str) -> Markup:
    return Markup(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """Nothing but the page's own style and script, and no place to send anything to."""
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
