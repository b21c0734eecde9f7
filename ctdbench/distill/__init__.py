"""The distillation harness: models, documents, batches, the streamed step, the training loop."""
