"""What a loss needs to know about the examples."""

from typing import NamedTuple

import jax


class Targets(NamedTuple):
  """A pytree with everything that a loss needs to know about the examples.

  Attributes:
    label_B: integer classes; contrastive losses ignore them.
    weight_B: each example's weight in the objective; sums to 1 over the global batch.
  """

  label_B: jax.Array
  weight_B: jax.Array
