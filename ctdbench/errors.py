"""The one exception a user sees: a single line that names the culprit and what to try next."""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be served.

    message: one line that names the field or file at fault.
    hint: one line with what to try next; may be empty.
    exit_code: 2 for a bad request, 3 for a failed preflight, 1 for a failed run, 143 on SIGTERM.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class PreflightError(UserError):
    """Something that the run needs (a model, a tokenizer, data) cannot be had on this machine."""

    exit_code = 3


class RunError(UserError):
    """The run started and failed (a loss that is not finite, a worker that died)."""

    exit_code = 1


class Terminated(RunError):
    """The run was asked to stop by SIGTERM and wrote a checkpoint first; no failure."""

    exit_code = 143
