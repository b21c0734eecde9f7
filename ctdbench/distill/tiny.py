"""Models of the pair `tiny`: two-layer random Llamas with tokenizers trained on the spot.

They make the whole harness run in seconds, for tests and for plugin authors. Weights and tokenizers
follow from a fixed seed and the embedded prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctdbench.distill.generate import prompts

SIZES = {"student": (384, 32), "teacher": (512, 48)}  # name -> vocabulary, width
SPECIAL = ["<unk>", "<bos>", "<eos>", "<pad>"]
DOCUMENTS = 2000


def make(name: str, folder: Path) -> None:
    """Save model and tokenizer called `name` (a key of SIZES) to `folder`."""
    tokenizer = make_tokenizer(SIZES[name][0])
    make_model(tokenizer, SIZES[name][1]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of that size, trained on the embedded prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for _, text in prompts(0)[:DOCUMENTS]], trainer)
    roles = {f"{role}_token": f"<{role}>" for role in ("unk", "bos", "eos", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def make_model(tokenizer: Any, width: int) -> Any:
    """A random Llama of two layers in float32, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).float().eval()
