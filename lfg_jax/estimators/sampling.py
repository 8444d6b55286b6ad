"""How many tangents are drawn, how many at once, and how their derivatives are combined."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.estimators import tangents
from lfg_jax.estimators.parts import WHOLE, Part
from lfg_jax.estimators.tangents import Passes

PyTree = Any
COMBINATIONS = ('mean', 'projection')


class Sampling(NamedTuple):
  """How tangents are drawn and combined.

  Attributes:
    law: of the tangents of all passes together, from `tangents`.
    passes: number of tangents, K; they share one primal evaluation.
    shared: one tangent for the whole batch, or an independent one for every example.
    axis_name: mesh axis the batch is sharded over, so that noise follows the example's global position.
    chunk: how many passes are in memory at once (the largest divisor of `passes` not above it); None: all. What
      the derivatives need of the primal is then kept, as backprop would keep it, for the next chunk.
    combine: 'mean', or 'projection'; see `combine`.
    part: which part of this device's share of the batch is given.
    rows: so many consecutive rows of the batch share a tangent, as the two views of an example may.
  """
  law: tangents.Law = tangents.rademacher
  passes: int = 1
  shared: bool = False
  axis_name: str | None = None
  chunk: int | None = None
  combine: str = 'mean'
  part: Part = WHOLE
  rows: int = 1

  @property
  def at_once(self) -> int:
    """Passes of one chunk."""
    limit = min(self.chunk or self.passes, self.passes)
    return max(n for n in range(1, limit + 1) if self.passes % n == 0)

  def check(self) -> None:
    """Raises ValueError for a combination that makes no sense."""
    if self.combine not in COMBINATIONS:
      raise ValueError(f'combine is {self.combine!r}; allowed: {", ".join(COMBINATIONS)}')
    if self.passes < 1 or (self.chunk is not None and self.chunk < 1):
      raise ValueError(f'passes={self.passes}, chunk={self.chunk}; allowed: 1 or more')
    if self.combine == 'projection' and self.at_once < self.passes:
      raise ValueError(f"combine='projection' needs all {self.passes} tangents at once; allowed: chunk=None")


def after(key: jax.Array, x: PyTree) -> jax.Array:
  """A key for what must not be drawn before x is known; the same one whatever x is.

  XLA draws early and keeps what it has drawn. An optimization barrier does not stop it on CPUs,
  where barriers are dropped before operations are put in order. A zero that is computed from x
  does: no compiler sees that a number of 16 bits is less than 65537.
  """
  leaves = jax.tree.leaves(x)
  if not leaves:
    return jax.random.fold_in(key, 0)
  first = jax.lax.bitcast_convert_type(leaves[0].astype(jnp.float32).ravel()[0], jnp.uint32)
  return jax.random.fold_in(key, (first >> 16) // 65537)


def each_chunk(part: Callable[[Passes], PyTree], sampling: Sampling) -> PyTree:
  """part(passes) for all passes, [K, ...], a chunk after the other."""
  total, count = sampling.passes, sampling.at_once
  if count == total:
    return part(Passes(total))
  chunks = jax.lax.map(lambda first: part(Passes(total, first, count)), jnp.arange(0, total, count))
  return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), chunks)


def sum_over_chunks(part: Callable[[Passes], PyTree], sampling: Sampling) -> PyTree:
  """Σ part(passes) over chunks of passes, one after the other: memory does not grow with their number."""
  total, count = sampling.passes, sampling.at_once
  if count == total:
    return part(Passes(total))

  def add(so_far: PyTree, first: jax.Array) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, so_far, part(Passes(total, first, count))), None

  # Not zeros: under shard_map it varies over the mesh as the others do.
  first_part = part(Passes(total, 0, count))
  return jax.lax.scan(add, first_part, jnp.arange(count, total, count))[0]


def combine(kind: str, slope_K: jax.Array, u_K: jax.Array, passes: int, axes: int = 1) -> jax.Array:
  """The estimate Σ_k a_k u_k from the derivatives along the tangents.

  'mean': a_k = (g·u_k) / K, unbiased. 'projection': the point of the tangents' span nearest to g, a = (UᵀU)⁻¹ Uᵀg
  (Flügel et al. 2024, arXiv 2410.17764). Of all combinations of these tangents it has the least error, but it is too
  short: for tangents of uniform direction E[estimate] = (K/d) g, since the mean of a projection on K of d
  dimensions is K/d, and its squared error is (1 - K/d) |g|². Times d/K it is unbiased, and is the mean
  over passes of the law `haar`. (An optimizer with a rate of its own for every parameter, as Adam, does not see
  the scale; SGD does.)

  Args:
    slope_K: [K, ...] derivatives g·u_k, with size 1 in the last `axes` axes.
    u_K: [K, ...] tangents.
    passes: K, of all chunks.
    axes: how many last axes the perturbed dimensions have.
  """
  if kind == 'mean':
    return (slope_K * u_K).sum(0) / passes
  u_DxK = jnp.moveaxis(u_K.reshape(*u_K.shape[:u_K.ndim - axes], -1), 0, -1)
  slope = jnp.moveaxis(slope_K.reshape(*slope_K.shape[:slope_K.ndim - axes]), 0, -1)
  # With U = W S Vᵀ the projection W Wᵀ g is W S⁻¹ Vᵀ (Uᵀ g); passes may repeat each other, then some of S are zero.
  w, s, v = jnp.linalg.svd(u_DxK, full_matrices=False)
  inverse = jnp.where(s > s.max(-1, keepdims=True) * jnp.finfo(s.dtype).eps * max(u_DxK.shape[-2:]), 1 / s, 0)
  along = inverse * jnp.einsum('...mk,...k->...m', v, slope)
  return jnp.einsum('...dm,...m->...d', w, along).reshape(*along.shape[:-1], *u_K.shape[u_K.ndim - axes:])
