"""What methods cost, against the least that distillation can: a loss alone, and a training step."""
