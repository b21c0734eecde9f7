"""The commit at which a data set of the hub is read: one for a cell's id and for its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ctdbench.evaluate.task_files import Config, leaf_configs

HUB_TIMEOUT_SECONDS = 5
CARD = "README.md"


def commits(
    task: str, configs: Mapping[str, Config], data_dir: Path | None = None
) -> dict[str, str]:
    """Data set on the hub -> its commit, of those that a task reads; unknown ones are left out.

    From `data_dir` come the tasks that declare files, and no others.
    """
    metadata = [leaf.get("metadata") or {} for leaf in leaf_configs(task, configs)]
    found = {
        data["hub"]: commit(data["hub"], data.get("revision"))
        for data in metadata
        if data.get("hub") and (data_dir is None or not data.get("files"))
    }
    return {name: sha for name, sha in found.items() if sha is not None}


@cache
def commit(dataset: str, revision: str | None = None) -> str | None:
    """Of the files in the local cache, as for models, else of the hub; None where neither tells.

    revision: branch, tag or commit; default: the main branch. Whoever loads the data says what
    keeps them from being had.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = try_to_load_from_cache(dataset, CARD, repo_type="dataset", revision=revision)
    if not isinstance(found, str):
        try:  # which notes in the cache what the branch stands for
            found = hf_hub_download(
                dataset,
                CARD,
                repo_type="dataset",
                revision=revision,
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
        except Exception:  # no network, no access, no card
            return None
    return Path(found).parent.name
