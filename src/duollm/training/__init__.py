"""Training: one loop, its optimiser, checkpoints and processes; and the training of the duo model."""
