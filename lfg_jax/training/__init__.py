"""From a config to a trained network.

In reading order: `optimizers`, `rules`, `config`, `update`, `pipeline`, `step_functions`, `hosts`,
`run`, `train`, `main`; beside them `prepare_data` and `cost`.
"""
