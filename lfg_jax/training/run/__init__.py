"""A run's folder: checkpoints, metrics, curves, summary.

In reading order: `metrics`, `workdir`, `clock`, `checkpoints`, `warm_start`, `plots`, `summary`;
`results`, for programs that measure.
"""
