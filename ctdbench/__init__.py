"""Cross-tokenizer distillation: many methods, one harness, one evaluation, honest tables."""

__version__ = "0.1.0"
