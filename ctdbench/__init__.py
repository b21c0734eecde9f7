"""ctdbench: many cross-tokenizer distillation methods, one harness, one evaluation, honest tables."""

__version__ = "0.1.0"
