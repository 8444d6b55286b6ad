"""Blocks on different devices, which work on consecutive batches at the same time.

In reading order: `packing`, `partition`, `stage_work`, `pipeline_plan`, `pipeline`.
"""
