"""Commands as a Slurm job array: a script that a person can read, change and submit by hand."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctdbench.distill.example_cache import WORKERS
from ctdbench.errors import UserError
from ctdbench.launch.local import BAR_SECONDS, GRACE_SECONDS, Job
from ctdbench.results import CHECKPOINTS

OPTION = re.compile(r"(?:--)?(?P<name>[a-z][a-z0-9-]+)(?:=(?P<value>.+))?")
OWN = ("array", "chdir", "dependency", "job-name", "open-mode", "output", "requeue", "no-requeue")

TEMPLATE = """\
#!/bin/bash
# Cells of a ctdbench sweep, one an array task; a requeued one goes on from its newest checkpoint.
# The sweep submits the first cell of a pair ahead of the others, which share its baselines; of
# cells submitted by hand, all at once, the others wait while the first evaluates them.
{directives}

exit_code={folder}/"$SLURM_ARRAY_TASK_ID".exit
rm -f -- "$exit_code"
export TQDM_MININTERVAL={bar_seconds}
for threads in OMP_NUM_THREADS RAYON_NUM_THREADS {workers}; do
  export "$threads=${{!threads:-$SLURM_CPUS_ON_NODE}}"
done

# anew PATH...: remove what an earlier computation left, but not what came before a requeue.
anew() {{
  [ -n "$SLURM_RESTART_COUNT" ] || rm -rf -- "$@"
}}

# cell LOG COMMAND...: run it, pass SIGTERM on to it, leave its exit code.
cell() {{
  local log=$1 task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID found child code
  shift
  checkpoints() {{ ls -- "${{log%/*}}/{checkpoints}" 2>/dev/null; }}
  exec >>"$log" 2>&1 </dev/null
  found=$(checkpoints)
  "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null' TERM
  wait "$child"
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait
  wait "$child"
  code=$?
  # Stopped by the time limit, with more than it began with: back into the queue. A task that was
  # cancelled or requeued is no longer RUNNING.
  if [ "$code" = 143 ] && [ "$(checkpoints)" != "$found" ] &&
    [ "$(squeue --noheader --jobs="$task" --format=%T)" = RUNNING ]; then
    trap '' TERM
    scontrol requeue "$task" && exit "$code"
  fi
  echo "$code" >"$exit_code"
  exit "$code"
}}

case $SLURM_ARRAY_TASK_ID in
{cases}
esac
"""


@dataclass(frozen=True)
class Script:
    """An array's name, equal for equal jobs and options; the folder of all that belongs to it."""

    name: str
    folder: Path
    text: str

    @property
    def path(self) -> Path:
        """Where the text is kept."""
        return self.folder / "array.sh"


def render(
    jobs: Sequence[Job], folder: Path, options: Sequence[str] = (), at_once: int | None = None
) -> Script:
    """A script whose task `i` is the job `i`.

    folder: of all arrays of a store. options: as for `parse`. at_once: how many tasks may run at a
    time.
    """
    stated = parse(options)
    cases = "\n".join(line for number, job in enumerate(jobs) for line in _case(number, job))
    here = str(Path.cwd())
    identity = repr((here, stated, at_once, cases))
    name = "ctdbench-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
    own = folder.absolute() / name
    directives: dict[str, str | None] = {
        "job-name": name,
        "array": f"0-{len(jobs) - 1}" + (f"%{at_once}" if at_once else ""),
        "requeue": None,
        "signal": f"B:TERM@{GRACE_SECONDS:.0f}",
        "chdir": here,
        "output": str(own).replace("%", "%%") + "/%a.txt",
        "open-mode": "append",
        **stated,
    }
    text = TEMPLATE.format(
        directives="\n".join(_directive(*item) for item in directives.items()),
        folder=shlex.quote(str(own)),
        bar_seconds=BAR_SECONDS,
        workers=WORKERS,
        checkpoints=CHECKPOINTS,
        cases=cases,
    )
    return Script(name, own, text)


def parse(options: Sequence[str]) -> dict[str, str | None]:
    """Values of sbatch's options by name (None: it has no value) from NAME=VALUE or NAME.

    Raises UserError for what is neither, and for what the script states itself.
    """
    found: dict[str, str | None] = {}
    for option in options:
        match = OPTION.fullmatch(option)
        if match is None:
            raise UserError(f"--slurm-option {option}", "write NAME=VALUE: partition=gpu")
        if match["name"] in OWN:
            hint = "--jobs limits how many run at a time" if match["name"] == "array" else ""
            raise UserError(f"--slurm-option {match['name']}: the sweep states it itself", hint)
        found[match["name"]] = match["value"]
    return found


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}")


def _case(number: int, job: Job) -> Iterator[str]:
    yield f"  {number}) # {' '.join(job.title.split())}"
    if job.stale:
        yield f"    anew {shlex.join(map(str, job.stale))}"
    yield f"    cell {shlex.join([str(job.log), *job.command])}"
    yield "    ;;"
