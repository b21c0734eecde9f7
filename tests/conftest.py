"""Settings for every test: no network, quiet tokenizers."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub or datasets, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
