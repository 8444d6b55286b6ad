"""Guided tangents: distributions that draw along given directions.

A guide may be a local gradient, a momentum buffer, or upstream weights. It spans a space of M
dimensions, with the projection P. Let g be the gradient.

| distribution | estimate, on average | squared error, K tangents |
|---|---|---|
| `along(guide)` | P g: biased, but a descent direction | (1 - cos²) · g², with no noise |
| `mixed(guide)` | g: unbiased | excess(d - M, K - M) · (1 - cos²) · g² |
| `within(guide)` | P g: unbiased if g is in the span | excess(M, K) · cos² · g² + (1 - cos²) · g² |
| a control variate h of g, with any distribution (`control_variates`) | g: unbiased | excess(d, K) · (g - h)² |

Here g² = |g|², and cos is the cosine of the angle between g and the guide's span. All distributions compose
with `forward_grad`; flatten a guide for a tree of parameters with `jax.flatten_util.ravel_pytree`.
Guides may be traced: a jitted step can make a distribution from the optimizer's state. A guide must not
depend on the tangents' key. A guide only gives the gradient's direction, and costs tangents. A control variate
also gives its length, and costs none: at the best length it leaves (1 - cos²) · g².

*Proofs.* Let Q be an orthonormal basis of the span, P = Q Qᵀ. `along`: the K = M tangents are √M q_m,
so the mean of (g·u) u is Σ (g·q_m) q_m = P g, and g·P g = |P g|² ≥ 0 (Fournier et al. 2023,
arXiv 2306.06968, with guides from local losses). `mixed`: M tangents are √K q_m, the others
√(K/(K-M)) (1 - P) v with E[v vᵀ] = 1. The mean over all K of (g·u) u is
P g + (1/(K-M)) Σ ((1-P) g·v) (1-P) v, on average P g + (1 - P)² g = g. The noise is that of a
forward gradient in d - M dimensions, if the distribution of v is invariant under rotations (`normal`; the
excess is then that of `normal`). `within`: u = Q ε with E[ε εᵀ] = 1 has E[u uᵀ] = P. An activity's
gradient is Wᵀ δ, where W are the weights of the layer above and δ is any vector, so it lies in the
span of W's rows. If W has fewer rows than columns, a control variate from upstream weights (arXiv 2511.03110)
in this form is unbiased, and its error grows only with the number of rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.tangents.distributions import Chunk, Distribution, as_distribution, normal


def _basis(guide_MxD: jax.Array, dtype: Any) -> jax.Array:
  """Orthonormal rows [M, D] of the same span; they are as orthonormal as the dtype allows."""
  wide = functools.reduce(jnp.promote_types, (guide_MxD.dtype, dtype), jnp.float32)
  return jnp.linalg.qr(guide_MxD.T.astype(wide))[0].T.astype(dtype)


def _check(guide_MxD: jax.Array, d: int) -> None:
  if guide_MxD.ndim != 2 or guide_MxD.shape[1] != d or guide_MxD.shape[0] > d:
    raise ValueError(
      f'the guide has shape {guide_MxD.shape}; allowed: (M, {d}) with M linearly independent rows'
    )


def along(guide_MxD: jax.Array) -> Distribution:
  """Only the guide's directions; K must be M. Biased: the estimate is P g.

  >>> guide = jnp.array([[3., 4.]])
  >>> u = along(guide).draw(jax.random.key(0), Chunk(1), (), 2, jnp.float32)
  >>> [round(x, 3) for x in u[0].tolist()] in ([0.6, 0.8], [-0.6, -0.8])
  True
  """

  def draw(key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any) -> jax.Array:
    del key
    _check(guide_MxD, d)
    if chunk.total != len(guide_MxD):
      raise ValueError(
        f'{chunk.total} tangents along a guide of {len(guide_MxD)} directions; allowed: as many'
      )
    rows_K = math.sqrt(chunk.total) * _basis(guide_MxD, dtype)[chunk.ids_K]
    return jnp.broadcast_to(rows_K.reshape(-1, *[1] * len(shape), d), (len(rows_K), *shape, d))

  return Distribution(draw, lambda d, K: max(1 - K / d, 0))


def mixed(guide_MxD: jax.Array) -> Distribution:
  """M tangents along the guide; the other K - M are normal in the rest of the space. Unbiased.

  With one guide direction of cosine c to the gradient and one more pass, the squared error falls
  from that of two normal tangents, (d + 1)/2 |g|², to d (1 - c²) |g|². So a guide pays above
  c² = 1/2, and sooner with more tangents.
  """

  def draw(key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any) -> jax.Array:
    _check(guide_MxD, d)
    M, K = len(guide_MxD), chunk.total
    if K <= M:
      raise ValueError(
        f'{K} tangents for a guide of {M} directions; allowed: more, the others are random'
      )
    basis_MxD = _basis(guide_MxD, dtype)
    v = normal.draw(key, chunk, shape, d, dtype)
    rest = math.sqrt(K / (K - M)) * (v - (v @ basis_MxD.T) @ basis_MxD)
    ids_K = chunk.ids_K.reshape(-1, *[1] * (len(shape) + 1))
    fixed = math.sqrt(K) * jnp.take(basis_MxD, jnp.minimum(chunk.ids_K, M - 1), axis=0)
    return jnp.where(ids_K < M, fixed.reshape(-1, *[1] * len(shape), d), rest)

  # For a gradient in a random direction: E[1 - cos²] = 1 - M/d.
  M = len(guide_MxD)
  return Distribution(draw, lambda d, K: normal.excess(d - M, K - M) * (1 - M / d))


def within(guide_MxD: jax.Array, distribution: Distribution | str = normal) -> Distribution:
  """Tangents of another distribution inside the guide's span. Unbiased only for gradients in the span."""
  M, inner = len(guide_MxD), as_distribution(distribution)

  def draw(key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any) -> jax.Array:
    _check(guide_MxD, d)
    return inner.draw(key, chunk, shape, M, dtype) @ _basis(guide_MxD, dtype)

  return Distribution(draw, lambda d, K: inner.excess(M, K) * M / d + 1 - M / d)
