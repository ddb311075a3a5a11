"""The training step, optimizers, checkpoints and initial values."""
