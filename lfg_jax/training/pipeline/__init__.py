"""Blocks on different devices, on consecutive batches at the same time."""
