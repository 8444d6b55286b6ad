"""Is the credit right, and how noisy is the estimate: `lfg_jax.diagnose`.

In reading order: `influence`, `bias_test`, `tap_shifts`, `report`, `diagnosing`.
"""
