"""Is the credit right, and how noisy is the estimate: `lfg_jax.diagnose`. Which estimate is better:
`lfg_jax.compare`.

In reading order: `influence`, `bias_test`, `tap_shifts`, `report`, `diagnosing`, `prediction`,
`comparison`.
"""
