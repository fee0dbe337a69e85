"""One training run: start, loop, checkpoints, metrics, end."""
