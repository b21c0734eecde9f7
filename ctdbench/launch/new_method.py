"""`ctdbench new-method NAME`: a method that runs as it is, and its test, for a person to change."""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from os.path import lexists
from pathlib import Path

from ctdbench import atomic, registry
from ctdbench.errors import UserError
from ctdbench.spec import BASELINE, check_name

NAME, STEM = "new-method", "new_method"  # as they stand in the templates


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """The method's file and its test's, both written or neither.

    Raises UserError for a name that is none or is taken, and where either file is there already.
    """
    stem = _stem(name)
    method, test = folder / f"{stem}.py", folder / f"test_{stem}.py"
    for path in (method, test):
        if lexists(path):  # a link to nothing, too
            raise UserError(f"{path} is there already", "give another name, or another --out")
    if find_spec(stem) is not None:  # where tests run, their folder comes before Python's own
        raise UserError(f"{stem}.py would hide Python's module {stem}", "give it another name")
    with atomic.new_file(method) as first, atomic.new_file(test) as second:
        first.write_text(_filled(f"{STEM}.py", name, stem), encoding="utf-8")
        second.write_text(_filled(f"test_{STEM}.py", name, stem), encoding="utf-8")
    return method, test


def _stem(name: str) -> str:
    """The name as that of a Python file; raises UserError for one that would be in the way."""
    stem = check_name(name, "method").replace("-", "_")
    if name != stem.replace("_", "-") or not stem.isidentifier():
        raise UserError(
            f"method {name!r} is no name of a Python file", "use letters, digits and hyphens"
        )
    if name in registry.methods() or BASELINE.fullmatch(name):
        raise UserError(f"there is a method {name!r} already", "give it another name")
    return stem


def _filled(template: str, name: str, stem: str) -> str:
    text = (resources.files("ctdbench.templates") / template).read_text(encoding="utf-8")
    return text.replace(NAME, name).replace(STEM, stem)
