"""mkdocs: the generated pages beside the written ones, and folders in the navigation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from generate import pages
from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
GENERATED = pages()


def on_config(config: Any) -> Any:
    """A folder of the navigation (`methods/`) stands for its pages, the index first."""
    known = {*GENERATED, *(path.relative_to(HERE).as_posix() for path in HERE.rglob("*.md"))}
    for entry in config.nav:
        for title, target in entry.items():
            if target.endswith("/"):
                inside = sorted(page for page in known if page.startswith(target))
                entry[title] = sorted(inside, key=lambda page: not page.endswith("index.md"))
    return config


def on_files(files: Any, config: Any) -> Any:
    """The generated pages beside those of the folder."""
    for path, text in GENERATED.items():
        files.append(File.generated(config, path, content=text))
    return files
