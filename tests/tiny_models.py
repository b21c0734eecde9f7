"""Tokenizers trained on the spot and tiny random models, for tests of what reads a model."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again, until the dog wakes up.\n" * 3,
    "Ein Häuschen am Fluß; 我们应选择 42 + 17 = 59. The dog, the fox and the numbers 1234567.",
    "Once <bos> upon a time there was a tokenizer that the fox could not spell.",
]


def bpe_tokenizer(*, bos: bool = True, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts; with `adds_bos` its post-processor puts BOS in front."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}


def recurrent_model(kind: str, tokenizer: Any) -> Any:
    """A random model of a published architecture with recurrent layers, some or all of them."""
    import transformers

    attention = {
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64,
    }  # fmt: skip
    own = {
        "Mamba": {},
        "FalconH1": FALCON_H1,
        "Lfm2": {"full_attn_idxs": [1]},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, **own, **(attention if own else {}),
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tiny_model(tokenizer: Any, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(tokenizer) + 5,  # padded, as real models are
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,  # far from uniform, so that a mistake shows
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **options}))
