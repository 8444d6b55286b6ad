"""Silent promotion of dtypes and ranks, which users may forbid (`JAX_NUMPY_DTYPE_PROMOTION=strict`)."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def allowed() -> Iterator[None]:
  """For calls of other libraries, which rely on it."""
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield
