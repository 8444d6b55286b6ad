"""The learning rules of the paper's tables, as compositions of an estimator and an objective.

In reading order: `rules`, `checks`, `estimators`, `flop`, `composition`, `algorithms`.
"""
