"""Random tangents: how they are drawn, how many, and how large the error of an estimate is.

In reading order: `microbatch`, `distributions`, `sampling`, `derivatives`, `variance` (Table 1),
`guided`.
"""

from lfg_jax.tangents import derivatives, distributions, guided, sampling, variance

__all__ = ['derivatives', 'distributions', 'guided', 'sampling', 'variance']
