"""The training loop, and the parts of a run: checkpoints, output directory, mirror, metrics, processes."""
