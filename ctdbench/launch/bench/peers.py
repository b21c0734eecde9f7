"""Our losses and estimators beside public implementations of the same, in one run.

    make bench-peers
    .venv-peers/bin/python -m ctdbench.launch.bench.peers --only gold,uld --repeats 3 --rows 64

Both sides get the same tensors or the same model, are timed in turns and compared by their medians;
what they compute is compared, too. Columns: `ratio` is their time over ours, `memory` our extra
peak memory over theirs, `divergence` that of our estimate over that of theirs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from ctdbench.errors import UserError
from ctdbench.launch.bench import peers_genlm, peers_nemo, peers_trl
from ctdbench.launch.bench.peers_comparison import Comparison, Settings, table

Part = Callable[[Settings], list[Comparison]]

PARTS: Mapping[str, Part] = {
    "gold": peers_trl.compare_gold,
    "uld": peers_trl.compare_uld,
    "xtoken": peers_nemo.compare,
    "beam": peers_genlm.compare,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m ctdbench.launch.bench.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", help=f"comma-separated: {', '.join(PARTS)}")
    for name, value in vars(Settings()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    given = vars(parser.parse_args(arguments))
    only, settings = given.pop("only"), Settings(**given)
    try:
        found = [each for part in _chosen(only) for each in part(settings)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(found))
    return 0


def _chosen(only: str | None) -> list[Part]:
    names = only.split(",") if only else list(PARTS)
    for name in names:
        if name not in PARTS:
            raise UserError(f"--only {name}: there is no such part", f"use {', '.join(PARTS)}")
    return [PARTS[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
