"""Gradient estimators for any JAX function, independent of models, data and trainer.

In reading order: `signature`, `tangents`, `sampling`, `derivatives`; `weight` (equation 3); `taps`,
`walk`, `traced`, `activity` (equation 4), `guesses`, `boundary`, `feedback`; the transformations
`forward_gradient` and `activity_gradient`, with `calls`, `mixing`, `mixing_rules` and `marks`;
`variance` (Table 1), `guided`.
"""

from lfg_jax.estimators import (
  activity,
  boundary,
  derivatives,
  feedback,
  guesses,
  guided,
  linear_layer,
  sampling,
  tangents,
  taps,
  traced,
  variance,
  weight,
)

__all__ = [
  'activity',
  'boundary',
  'derivatives',
  'feedback',
  'guesses',
  'guided',
  'linear_layer',
  'sampling',
  'tangents',
  'taps',
  'traced',
  'variance',
  'weight',
]
