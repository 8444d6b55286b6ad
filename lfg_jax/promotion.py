"""Promotion of dtypes and ranks, whose silent form users may forbid (`JAX_NUMPY_DTYPE_PROMOTION=strict`)."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def allowed() -> Iterator[None]:
  """For calls of other libraries, which rely on it."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


def upcast(x: jax.Array) -> jax.Array:
  """x in float32, if its numbers are shorter: sums of thousands of them need the digits.

  >>> upcast(jnp.ones(2, jnp.bfloat16)).dtype
  dtype('float32')
  """
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
