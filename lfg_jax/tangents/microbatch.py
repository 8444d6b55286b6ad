"""A batch processed in microbatches, whose activities stay in the processor's cache.

The gradients of the microbatches add up. On a CPU, a norm or a ReLU does so little arithmetic that its
time is the time to move data. In M/8/16, an activity of 64 examples takes 8 MiB and comes from main
memory; that of 8 examples takes 1 MiB and stays in a core's cache, where passes over it are two to
five times faster. Temporaries shrink with the microbatch. The price is one addition of all gradients per
microbatch. GPUs want the whole batch at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
# For one activity; several are in use, and a core's cache has 1-2 MiB.
CACHE_BYTES = 2**20
Microbatch = tuple[jax.Array | int, int]  # (index of the microbatch, number of microbatches)
WHOLE: Microbatch = (0, 1)


def number_of_microbatches(examples: int, micro_batch: int, bytes_per_example: int) -> int:
  """How many equal microbatches to make.

  Args:
    examples: number in the batch, on this device.
    micro_batch: the most examples in a microbatch, rounded down to a divisor of `examples`; 0: as many as
      fit in the cache on a CPU, all elsewhere.
    bytes_per_example: size of one activity.

  >>> number_of_microbatches(64, 16, 2**17)
  4
  """
  if micro_batch:
    return examples // _divisor(examples, micro_batch)
  if jax.default_backend() != 'cpu':
    return 1
  most = max(CACHE_BYTES // bytes_per_example, 1)
  size = _divisor(examples, most)
  # Parts much smaller would waste what they save.
  return examples // size if 2 * size > min(most, examples) else 1


def _divisor(number: int, most: int) -> int:
  """The largest divisor that is not above `most`."""
  return next(size for size in range(min(most, number), 0, -1) if number % size == 0)


def sum_over_microbatches(
  gradient: Callable[[Microbatch, PyTree], PyTree], batch: PyTree, microbatches: int
) -> PyTree:
  """The sum of `gradient(microbatch, its share of the batch)` over microbatches, one at a time.

  >>> sum_over_microbatches(lambda microbatch, x: (x**2).sum(), jnp.arange(4.), 2).item()
  14.0
  """
  return sum_and_join(lambda *args: (gradient(*args), None), batch, microbatches)[0]


def sum_and_join(
  gradient: Callable[[Microbatch, PyTree], tuple[PyTree, PyTree]], batch: PyTree, microbatches: int
) -> tuple[PyTree, PyTree]:
  """Like `sum_over_microbatches`; concatenates a second result of `gradient`, one row per example.

  >>> total, rows = sum_and_join(lambda microbatch, x: ((x**2).sum(), x + 1), jnp.arange(4.), 2)
  >>> total.item(), rows.tolist()
  (14.0, [1.0, 2.0, 3.0, 4.0])
  """
  if microbatches == 1:
    return gradient(WHOLE, batch)
  shares = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)

  def add(total: PyTree, numbered: tuple[jax.Array, PyTree]) -> tuple[PyTree, PyTree]:
    index, share = numbered
    term, rows = gradient((index, microbatches), share)
    return jax.tree.map(jnp.add, total, term), rows

  shapes = jax.eval_shape(
    lambda shares: gradient((0, microbatches), jax.tree.map(lambda x: x[0], shares))[0], shares
  )
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, rows = jax.lax.scan(add, zeros, (jnp.arange(microbatches), shares))
  return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
