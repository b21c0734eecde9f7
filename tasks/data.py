"""Data sets of the tasks: from `--data-dir` where it is given, else from the hub; never a fallback.

lm-eval calls a task's `custom_dataset` with the task's `metadata` as keyword arguments: `hub`,
`config` and `revision` name the data set on the hub, `files` the original files (split -> path
under the data folder). Rows of the original files are mapped to the hub's schema, so that one
prompt template serves both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from ctdbench.errors import UserError
from ctdbench.evaluate.hub_data import commit

Row = dict[str, Any]
Splits = Mapping[str, Dataset]
PYDOC_CHARACTERS = 2000


def gsm8k(**source: Any) -> Splits:
    """`question`, `answer` (ends in `#### number`): the original file has the hub's schema."""
    return _splits(source, lambda row: {key: row[key] for key in ("question", "answer")})


def piqa(**source: Any) -> Splits:
    """`goal`, `sol1`, `sol2`, `label` from MosaicML's packaging (`query`, `choices`, `gold`)."""
    return _splits(source, piqa_row)


def agieval_zh(**source: Any) -> Splits:
    """`query`, `choices`, `gold` (a list), without the items that have no gold answer at all."""
    splits = _splits(source, agieval_row)
    return {
        name: split.select([index for index, gold in enumerate(split["gold"]) if gold])
        for name, split in splits.items()
    }


def rows(**source: Any) -> Splits:
    """The rows as they are, of any data set on the hub or of files: for tasks of one's own."""
    return _splits(source, dict)


def embedded(files: Mapping[str, str], config_source: str, **_: Any) -> Splits:
    """Items in JSONL files beside the task file, which may be anyone's."""
    folder = Path(config_source).parent
    return {split: Dataset.from_list(_read(folder / name)) for split, name in files.items()}


def heldout(heldout: Sequence[str] = (), **_: Any) -> Splits:
    """The held-out documents of the training corpus, handed over by the runner."""
    return {"test": Dataset.from_list([{"text": text} for text in heldout])}


def pydoc(**_: Any) -> Splits:
    """Python's language reference as the interpreter ships it: topics cut to 2,000 characters."""
    from pydoc_data.topics import topics

    texts = [_first_lines(topics[name]) for name in sorted(topics)]
    return {"test": Dataset.from_list([{"text": text} for text in texts if len(text) > 500])}


def piqa_row(row: Row) -> Row:
    """A row of MosaicML's file in the hub's schema; `query` is "Question: {goal}\\n"."""
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {
        "goal": goal,
        "sol1": row["choices"][0],
        "sol2": row["choices"][1],
        "label": row["gold"],
    }


def agieval_row(row: Row) -> Row:
    """A raw AGIEval row with its zero-shot prompt (arXiv 2304.06364, appendix), as the hub has it.

    `label` is a letter, a list of letters, or several letters in one string ("AD", "A B D").
    """
    options = row["options"]
    letters = [letter for letter in row["label"] if "A" <= letter < chr(ord("A") + len(options))]
    query = (
        f"{row['passage'] or ''}问题：{row['question']} 选项：{' '.join(options)}\n"
        f"答案：从A到{chr(ord('A') + len(options) - 1)}, 我们应选择"
    )
    return {
        "query": query,
        "choices": options,
        "gold": [ord(letter) - ord("A") for letter in letters],
    }


def _splits(source: Mapping[str, Any], to_hub_row: Callable[[Row], Row]) -> Splits:
    if source.get("data_dir") is None or not source.get("files"):
        pinned = commit(source["hub"], source.get("revision"))
        return dict(load_dataset(source["hub"], source.get("config"), revision=pinned))
    folder = Path(source["data_dir"])
    splits = {}
    for split, name in source["files"].items():
        try:
            rows = [to_hub_row(row) for row in _read(folder / name)]
        except (KeyError, TypeError, IndexError) as error:
            hint = "give the original file of this benchmark"
            raise UserError(
                f"{folder / name} has rows of another schema ({error!r})", hint
            ) from error
        splits[split] = Dataset.from_list(rows)
    return splits


def _read(path: Path) -> list[Row]:
    try:
        # Not splitlines(): a string in JSON may hold U+2028, which it would cut at.
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "check --data-dir") from None
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON Lines ({error})", "give one JSON object a line"
        ) from error


def _first_lines(text: str) -> str:
    """The whole lines within the first `PYDOC_CHARACTERS` characters."""
    total = 0

    def fits(line: str) -> bool:
        nonlocal total
        total += len(line)
        return total <= PYDOC_CHARACTERS

    return "".join(takewhile(fits, text.splitlines(keepends=True)))
