"""A run's folder: checkpoints, metrics, curves, summary."""
