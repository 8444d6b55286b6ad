"""Estimators of gradients, for any JAX function.

In reading order: `_types`, `_arguments`; `control_variates`, `feedback`, `weight` (equation 3),
`activity` (equation 4), `exact_tail`; the transformations `forward_gradient`, `activity_gradient`
and `marks`; `linear_layer`, whose variance is known.
"""

from lfg_jax.estimators import (
  activity,
  control_variates,
  exact_tail,
  feedback,
  linear_layer,
  weight,
)

__all__ = ['activity', 'control_variates', 'exact_tail', 'feedback', 'linear_layer', 'weight']
