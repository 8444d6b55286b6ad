"""From a config to a trained network.

In reading order: `optimizers`, `rules`, `update`, `pipeline`, `step_functions`, `cost`; `configs`,
`command_line`; `hosts`, `run`; `train`, `main`, `prepare_data`.
"""
