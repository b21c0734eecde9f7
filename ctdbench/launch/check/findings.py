"""What checks find, one line each, whatever is checked; one that breaks fails alone.

ok       padding: before and after the documents: the same within 2e-07
FAIL     counts: kl counts 12.0 in terms(), 13.0 in advance
skipped  floor: byte heads of its own
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ctdbench.errors import UserError

Status = Literal["ok", "FAIL", "skipped"]


class Failed(Exception):
    """A check that found what must not be; the message says what."""


class Skipped(Exception):
    """A check that has nothing to say of its subject; the message says why."""


@dataclass(frozen=True)
class Finding:
    """What one check found, on one line; and what was raised, if that ended the check."""

    group: str
    name: str
    status: Status
    text: str
    crash: Exception | None = field(default=None, compare=False)


def found_by(group: str, name: str, check: Callable[[], str], file: str = "") -> Finding:
    """What the check returns or raises. file: a crash names the line of it that it came through."""
    try:
        return Finding(group, name, "ok", check())
    except Skipped as reason:
        return Finding(group, name, "skipped", str(reason))
    except Failed as reason:
        return Finding(group, name, "FAIL", str(reason))
    except UserError as error:
        return Finding(group, name, "FAIL", str(error), error)
    except Exception as error:  # a stranger's code may raise anything; the other checks go on
        return Finding(group, name, "FAIL", _one_line(error, file), error)


def tell(findings: Iterable[Finding], say: Callable[[str], None], *, debug: bool = False) -> bool:
    """Say the findings as they come, and the verdict; whether every check passed.

    debug: with the traceback of the first crash.
    """
    found: list[Finding] = []
    for finding in findings:
        if not found or found[-1].group != finding.group:
            say(f"\n{finding.group}")
        say(f"  {finding.status:<7}  {finding.name}: {finding.text}")
        if debug and finding.crash is not None:
            say("".join(traceback.format_exception(finding.crash)))
            debug = False
        found.append(finding)
    say("\n" + verdict(found))
    return not any(finding.status == "FAIL" for finding in found)


def verdict(found: Iterable[Finding]) -> str:
    """`17 of 17 checks passed, 1 skipped`."""
    statuses = [finding.status for finding in found]
    skipped = statuses.count("skipped")
    rest = f", {skipped} skipped" if skipped else ""
    return f"{statuses.count('ok')} of {len(statuses) - skipped} checks passed{rest}"


def _one_line(error: Exception, file: str) -> str:
    """The error, and the line of the file that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = f" ({Path(file).name} line {frames[-1].lineno})" if frames else ""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}{where}"
