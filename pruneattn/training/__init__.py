"""Training: options and recipes, the training loop, the keep-rate schedule, and the state of a run on disk."""
