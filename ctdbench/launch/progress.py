"""What a person sees of several commands at once: a line each, on a terminal alive."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.live import Live

TAIL_BYTES = 4096
INVISIBLE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[^\x20-\x7e\u00a0-\uffff]")


class Display:
    """On a terminal the newest line of every log, redrawn; elsewhere what starts and ends."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._live: Live | None = None
        self._shown = ""
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream, markup=False, highlight=False)
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()

    def started(self, title: str) -> None:
        """A line for where nothing is redrawn."""
        if self._live is None:
            self.say(f"{title}: started")

    def say(self, line: str) -> None:
        """A line that stays. Cells go on where nobody listens any more."""
        with suppress(OSError):
            if self._live is not None:
                self._live.console.print(line)
            else:
                print(line, file=self.stream, flush=True)

    def show(self, logs: Mapping[str, Path]) -> None:
        """The newest line of every log, by title."""
        if self._live is None:
            return
        from rich.text import Text

        shown = "\n".join(f"{title}: {last_line(log)}" for title, log in logs.items())
        if shown != self._shown:
            self._shown = shown
            with suppress(OSError):
                self._live.update(Text(shown, overflow="ellipsis", no_wrap=True), refresh=True)


def last_line(log: Path) -> str:
    """What was written last, without what would command the terminal; "" for nothing yet."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(stream.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:  # not there yet, or a file server in trouble
        return ""
    lines = [INVISIBLE.sub("", line).strip() for line in re.split(r"[\r\n]", text)]
    return next(filter(None, reversed(lines)), "")
