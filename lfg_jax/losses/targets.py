"""What losses must know of the examples."""

from typing import NamedTuple

import jax


class Targets(NamedTuple):
  """A pytree with all that a loss must know of the examples.

  Attributes:
    label_B: integer classes; contrastive losses do not look at them.
    weight_B: of each example in the objective; sums to 1 over the global batch.
  """
  label_B: jax.Array
  weight_B: jax.Array
