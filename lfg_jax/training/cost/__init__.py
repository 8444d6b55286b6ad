"""What a program costs: as measured, and as its compiled text says.

In reading order: `timing`, `profiling`, `hlo`, `dry_run`.
"""
