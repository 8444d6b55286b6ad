"""How many tangents to draw, how many at once, and how to combine their derivatives."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.tangents import distributions
from lfg_jax.tangents.distributions import Chunk
from lfg_jax.tangents.microbatch import WHOLE, Microbatch

PyTree = Any
COMBINATIONS = ('mean', 'projection')


class Sampling(NamedTuple):
  """How tangents are drawn and combined.

  Attributes:
    distribution: of the tangents, one of `distributions` or its name.
    num_tangents: number of tangents, K; they share one primal evaluation.
    shared: whether the whole batch shares one tangent, or every example has an independent one.
    axis_name: mesh axis over which the batch is sharded; noise follows the example's global place.
    chunk: how many tangents are in memory at once; None: all. 7 tangents in chunks of 4 run as 3 and 4.
      With several chunks, what the derivatives need of the primal is stored, as in backprop.
    combine: 'mean' or 'projection'; see `combine`.
    microbatch: which part of this device's share of the batch is given.
    rows: how many consecutive rows of the batch share a tangent (2: both views of an example).
  """

  distribution: distributions.Distribution | str = distributions.rademacher
  num_tangents: int = 1
  shared: bool = False
  axis_name: str | None = None
  chunk: int | None = None
  combine: str = 'mean'
  microbatch: Microbatch = WHOLE
  rows: int = 1

  @property
  def at_once(self) -> int:
    """Number of tangents in one chunk."""
    return min(self.chunk or self.num_tangents, self.num_tangents)

  def check(self) -> None:
    """Raises ValueError for an unknown distribution or options that contradict each other."""
    distributions.as_distribution(self.distribution)
    if self.combine not in COMBINATIONS:
      raise ValueError(f'the combination is {self.combine!r}; allowed: {", ".join(COMBINATIONS)}')
    if self.num_tangents < 1 or (self.chunk is not None and self.chunk < 1):
      raise ValueError(f'num_tangents={self.num_tangents}, chunk={self.chunk}; allowed: 1 or more')
    if self.combine == 'projection' and self.at_once < self.num_tangents:
      raise ValueError(
        f'a projection needs all {self.num_tangents} tangents at once; allowed: chunk=None'
      )


def tangent_key(key: jax.Array) -> jax.Array:
  """A threefry key: from it, the same numbers are drawn every time, whatever `vmap` has mapped.

  Tangents are drawn twice, where the losses' derivatives are measured and where they are used.
  Under `vmap`, a key of another generator ('rbg', 'unsafe_rbg') may give two draws different
  numbers, and then the estimate's mean is not the gradient. A threefry key is returned as it is.

  Raises:
    ValueError: there are several keys.

  >>> key = tangent_key(jax.random.key(0, impl='rbg'))
  >>> str(jax.random.key_impl(key))
  'threefry2x32'
  """
  if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
    key = jax.random.wrap_key_data(key)
  if key.ndim:
    raise ValueError(f'key has shape {key.shape}; allowed: one key, or jax.vmap over several')
  if jax.random.key_impl(key) == 'threefry2x32':
    return key
  words = jax.random.key_data(key).ravel().astype(jnp.uint32)
  return functools.reduce(jax.random.fold_in, words, jax.random.key(0, impl='threefry2x32'))


def after(key: jax.Array, x: PyTree) -> jax.Array:
  """A key for numbers that must not be drawn before x is known; its value does not depend on x.

  XLA would draw early and keep the numbers. An optimization barrier does not prevent that on CPUs,
  where barriers are dropped before operations are scheduled. A zero computed from x does: no
  compiler knows that a 16-bit number is less than 65537.
  """
  leaves = jax.tree.leaves(x)
  if not leaves:
    return jax.random.fold_in(key, 0)
  first = jax.lax.bitcast_convert_type(leaves[0].astype(jnp.float32).ravel()[0], jnp.uint32)
  return jax.random.fold_in(key, (first >> 16) // 65537)


def each_chunk(part: Callable[[Chunk], PyTree], sampling: Sampling) -> PyTree:
  """part(chunk) for all tangents, [K, ...], one chunk at a time; what is left over comes first."""
  total, count = sampling.num_tangents, sampling.at_once
  if count == total:
    return part(Chunk(total))
  rest = total % count
  starts = jnp.arange(rest, total, count)
  chunks = jax.lax.map(lambda first: part(Chunk(total, first, count)), starts)
  whole = jax.tree.map(lambda x: x.reshape(total - rest, *x.shape[2:]), chunks)
  join = lambda *parts: jnp.concatenate(parts)
  return jax.tree.map(join, part(Chunk(total, 0, rest)), whole) if rest else whole


def sum_over_chunks(part: Callable[[Chunk], PyTree], sampling: Sampling) -> PyTree:
  """Σ part(chunk), one chunk of tangents at a time: memory does not grow with their number."""
  total, count = sampling.num_tangents, sampling.at_once
  if count == total:
    return part(Chunk(total))

  def add(so_far: PyTree, first: jax.Array) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, so_far, part(Chunk(total, first, count))), None

  # Not zeros: under shard_map, the sum must vary over the mesh as the parts do.
  first = total % count or count
  return jax.lax.scan(add, part(Chunk(total, 0, first)), jnp.arange(first, total, count))[0]


def combine(
  kind: str, slope_K: jax.Array, u_K: jax.Array, num_tangents: int, axes: int = 1
) -> jax.Array:
  """The estimate Σ_k a_k u_k from the derivatives along the tangents.

  'mean': a_k = (g·u_k) / K, unbiased. 'projection': the point in the tangents' span nearest to g,
  a = (UᵀU)⁻¹ Uᵀg (Flügel et al. 2024, arXiv 2410.17764). Among all combinations of these tangents
  it has the least error, but it is too short: for uniformly random directions,
  E[estimate] = (K/d) g, since the mean projection onto K of d dimensions is K/d. Its squared error
  is (1 - K/d) |g|². Multiplied by d/K it is unbiased, and equals the mean over tangents of the distribution
  `haar`. (An optimizer with a rate per parameter, such as Adam, is insensitive to the scale; SGD is
  not.)

  Args:
    slope_K: [K, ...] derivatives g·u_k, with size 1 in the last `axes` axes.
    u_K: [K, ...] tangents.
    num_tangents: K, over all chunks.
    axes: how many trailing axes hold the perturbed dimensions.
  """
  if kind == 'mean':
    return (slope_K * u_K).sum(0) / num_tangents
  u_DxK = jnp.moveaxis(u_K.reshape(*u_K.shape[: u_K.ndim - axes], -1), 0, -1)
  slope = jnp.moveaxis(slope_K.reshape(*slope_K.shape[: slope_K.ndim - axes]), 0, -1)
  # With U = W S Vᵀ, the projection W Wᵀ g is W S⁻¹ Vᵀ (Uᵀ g). If tangents repeat, some of S are zero.
  w, s, v = jnp.linalg.svd(u_DxK, full_matrices=False)
  inverse = jnp.where(
    s > s.max(-1, keepdims=True) * jnp.finfo(s.dtype).eps * max(u_DxK.shape[-2:]), 1 / s, 0
  )
  along = inverse * jnp.einsum('...mk,...k->...m', v, slope)
  return jnp.einsum('...dm,...m->...d', w, along).reshape(
    *along.shape[:-1], *u_K.shape[u_K.ndim - axes :]
  )
