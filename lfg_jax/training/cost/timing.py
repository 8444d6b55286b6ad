"""Time and memory of jitted functions, for programs that compare algorithms.

Other work on the machine slows down everything beside it. So the functions that are compared take
turns, repetition by repetition, together with a matrix product that measures the machine's own
rate. Ratios are then reliable even where times are not.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Name = TypeVar('Name', bound=Hashable)


def interleaved(
  functions: Mapping[Name, Callable[[], Any]], repetitions: int
) -> dict[Name, list[float]]:
  """Seconds of each repetition of each function.

  The functions take turns. One call of each before the first repetition is not counted.

  >>> sorted(interleaved({'a': lambda: jnp.ones(3), 'b': lambda: jnp.zeros(3)}, 2))
  ['a', 'b']
  """
  seconds: dict[Name, list[float]] = {name: [] for name in functions}
  for repetition in range(-1, repetitions):
    for name, function in functions.items():
      begin = time.perf_counter()
      jax.block_until_ready(function())
      if repetition >= 0:
        seconds[name].append(time.perf_counter() - begin)
  return seconds


def median_ms(seconds: Sequence[float]) -> float:
  """Median of times in seconds, converted to milliseconds.

  >>> median_ms([0.001, 0.5, 0.002])
  2.0
  """
  return 1e3 * statistics.median(seconds)


def one_ms(function: Callable[[], Any], repetitions: int = 3) -> float:
  """Median time of one function, in milliseconds.

  >>> one_ms(lambda: jnp.ones(3)) > 0
  True
  """
  return median_ms(interleaved({'': function}, repetitions)[''])


def temporaries(compiled: jax.stages.Compiled) -> int:
  """Bytes that a compiled function needs besides its arguments and results; 0: unknown."""
  analysis = compiled.memory_analysis()
  return int(analysis.temp_size_in_bytes) if analysis else 0


def matmul(dtype: Any = jnp.float32) -> tuple[Callable[[], jax.Array], int]:
  """A call that multiplies two square matrices, and its number of operations.

  The matrices are large enough to show the machine's matmul rate.
  """
  size = 1024 if jax.default_backend() == 'cpu' else 8192
  a, b = (
    jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0))
  )
  product = jax.jit(jnp.matmul)
  return lambda: product(a, b), 2 * size**3
