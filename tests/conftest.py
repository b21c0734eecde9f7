"""Settings for every test: no network, quiet tokenizers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A test that fails here fails everywhere; `make test-all` looks for new examples every time.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("searching", deadline=None)
settings.load_profile("repeatable")

# Before anything imports huggingface_hub or datasets, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is computed once is kept in a folder of the module's own, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTDBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
