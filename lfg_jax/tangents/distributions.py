"""Distributions of tangents: the distributions of the random directions of forward gradients.

K tangents along u_1 … u_K estimate a gradient g in d dimensions by (1/K) Σ_k (g·u_k) u_k. This is
unbiased if E[u uᵀ] = I, which every distribution here satisfies exactly. The squared error is
`excess · |g|²`, with a factor that depends on the distribution's fourth moments:

| distribution | drawn as | excess for K tangents |
|---|---|---|
| `normal` | independent N(0, 1) entries | (d + 1) / K |
| `rademacher` | independent ±1 entries | (d - 1) / K |
| `sphere` | uniform on the sphere of radius √d | (d - 1) / K |
| `coordinate` | ±√d times K different unit vectors | d/K - 1 |
| `haar` | √d times K columns of a uniform rotation | d/K - 1 |
| `hadamard` | K rows of a Hadamard matrix, columns with random signs | d/K - 1 |

*Independent tangents.* E[(g·u)² |u|²] = Σ_ij g_i² E[u_i² u_j²] = (d - 1 + κ) |g|² for independent
entries of fourth moment κ (3 for normal ones; 1 for ±1, the smallest possible at unit variance).
Subtract |g|² and divide by K. On the sphere |u|² = d, so E[(g·u)² |u|²] = d |g|².

*Orthogonal tangents.* If u_k·u_l = d δ_kl, then |(1/K) Σ (g·u_k) u_k|² = (d/K²) Σ (g·u_k)², with mean
(d/K) |g|². With K = d, the estimate is g itself. Beyond that, a new orthogonal set begins: whole
sets add no error, and the r = K mod d tangents of the last set add r (d - r) / K².

*Blocks.* Let u have independent parts, each orthogonal over the tangents by itself. Part i has d_i
dimensions; g_i and u_ki are its parts of the gradient and of the tangents. Part j adds noise of
(1/K²) Σ_kl E[(g_j·u_kj)(g_j·u_lj)] E[u_ki·u_li] = (d_i/K) |g_j|² to part i of the estimate, as only
terms with k = l remain. Summed over all parts, the factor is (d_1 + d_2 + …)/K - 1 again. So
orthogonality in parts is as good as in the whole, as long as K does not exceed the smallest part.
Hence `hadamard` works for every d, in blocks of the largest power of two that divides d (1 if d is
odd: then it is `rademacher`).

An example's noise is keyed by its position in the *global* batch, so the update is the same on any
number of devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax import user_files
from lfg_jax.errors import one_of
from lfg_jax.tangents.microbatch import WHOLE, Microbatch


class Chunk(NamedTuple):
  """Some tangents of an estimate: `size` (None: all) of `total`, from number `first` (may be traced).

  A distribution draws each tangent alike, whether it draws all of them or a chunk.
  """

  total: int
  first: int | jax.Array = 0
  size: int | None = None

  @property
  def ids_K(self) -> jax.Array:
    """Numbers of these tangents."""
    return self.first + jnp.arange(self.total if self.size is None else self.size)

  def of(self, x_K: jax.Array) -> jax.Array:
    """The rows of these tangents among those of all."""
    if self.size is None:
      return x_K
    return jax.lax.dynamic_slice_in_dim(x_K, self.first, self.size)


class Distribution(NamedTuple):
  """A distribution of tangents with E[u uᵀ] = I.

  Attributes:
    draw: `(key, chunk, shape, d, dtype) -> [K, *shape, d]`: for every index of `shape`, an
      independent set of K tangents in d dimensions; those within a set may depend on each other.
    excess: `(d, K) -> E|estimate - g|² / |g|²` for the mean over K tangents.
  """

  draw: Callable[[jax.Array, Chunk, tuple[int, ...], int, Any], jax.Array]
  excess: Callable[[int, int], float]


def draw_signs(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """±1 with equal probability, 32 from every random word.

  >>> sorted(set(draw_signs(jax.random.key(0), (3, 50)).ravel().tolist()))
  [-1.0, 1.0]
  """
  size = math.prod(shape)
  words_W = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
  bits_Wx32 = (words_W[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
  return (1 - 2 * bits_Wx32.astype(jnp.int8)).astype(dtype).ravel()[:size].reshape(shape)


def _in_float32(draw: Callable) -> Callable:
  """Draws in float32, then rounds. Normal numbers drawn from fewer bits would lack tails."""

  def rounded(
    key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any
  ) -> jax.Array:
    return draw(key, chunk, shape, d, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

  return rounded


def _each_pass(draw_one: Callable[[jax.Array, tuple[int, ...], Any], jax.Array]) -> Callable:
  """Independent tangents, each with its own key."""

  def draw(key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any) -> jax.Array:
    return jax.vmap(lambda k: draw_one(k, (*shape, d), dtype))(fold_in_all(key, chunk.ids_K))

  return draw


def _draw_sphere(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  x = jax.random.normal(key, shape, dtype)
  return x * (math.sqrt(shape[-1]) / jnp.linalg.norm(x, axis=-1, keepdims=True))


def _take(sets_SxdxD: jax.Array, chunk: Chunk, d: int) -> jax.Array:
  """Tangent k of sets [S, *shape, m, D]: row k mod d of set k // d, as [K, *shape, D]."""

  def one(k: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(sets_SxdxD[k // d], k % d, axis=-2, keepdims=False)

  return jax.vmap(one)(chunk.ids_K)


def _draw_coordinate(
  key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any
) -> jax.Array:
  order_key, sign_key = jax.random.split(key)
  sets = -(-chunk.total // d)
  order_SxD = jnp.argsort(jax.random.uniform(order_key, (sets, *shape, d)), axis=-1)
  chosen_K = _take(order_SxD[..., None], chunk, d)
  sign_K = _take(draw_signs(sign_key, (sets, *shape, d), dtype)[..., None], chunk, d)
  return math.sqrt(d) * sign_K * jax.nn.one_hot(chosen_K[..., 0], d, dtype=dtype)


def _draw_haar(
  key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any
) -> jax.Array:
  """Q of a normal matrix's QR decomposition; uniform if the diagonal of R is made positive."""
  sets, size = -(-chunk.total // d), min(chunk.total, d)
  q, r = jnp.linalg.qr(jax.random.normal(key, (sets, *shape, d, size), dtype))
  signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(dtype)
  return math.sqrt(d) * _take(jnp.swapaxes(q * signs[..., None, :], -1, -2), chunk, d)


def _draw_hadamard(
  key: jax.Array, chunk: Chunk, shape: tuple[int, ...], d: int, dtype: Any
) -> jax.Array:
  """u_kj = s_j (-1)^(number of bits that k and j share): Sylvester's matrix.

  One draw of signs s serves a whole set.
  """
  size, ids_K = d & -d, chunk.ids_K
  odd_KxD = jax.lax.population_count((ids_K % size)[:, None] & jnp.arange(d)[None]) & 1
  rows = (1 - 2 * odd_KxD).astype(dtype).reshape(-1, *[1] * len(shape), d)
  draw_set = lambda number: draw_signs(jax.random.fold_in(key, number), (*shape, d), dtype)
  return rows * (draw_set(0)[None] if chunk.total <= size else jax.vmap(draw_set)(ids_K // size))


def _orthogonal_excess(d: int, num_tangents: int, block: int | None = None) -> float:
  block = block or d
  rest = num_tangents % block
  return rest * (block - rest) / num_tangents**2 + (d - block) / num_tangents


normal = Distribution(_in_float32(_each_pass(jax.random.normal)), lambda d, K: (d + 1) / K)
rademacher = Distribution(_each_pass(draw_signs), lambda d, K: (d - 1) / K)
sphere = Distribution(_in_float32(_each_pass(_draw_sphere)), lambda d, K: (d - 1) / K)
coordinate = Distribution(_draw_coordinate, _orthogonal_excess)
haar = Distribution(_in_float32(_draw_haar), _orthogonal_excess)
hadamard = Distribution(_draw_hadamard, lambda d, K: _orthogonal_excess(d, K, d & -d))

DISTRIBUTIONS = {
  'normal': normal,
  'rademacher': rademacher,
  'sphere': sphere,
  'coordinate': coordinate,
  'haar': haar,
  'hadamard': hadamard,
}


def as_distribution(distribution: Distribution | str) -> Distribution:
  """A distribution, or the one with this name.

  Raises:
    ValueError: it is neither.

  >>> as_distribution('sphere') is sphere
  True
  """
  if isinstance(distribution, str):
    one_of('distribution', distribution, DISTRIBUTIONS)
    return DISTRIBUTIONS[distribution]
  if not isinstance(distribution, Distribution):
    raise ValueError(
      f'distribution is {distribution!r}; allowed: a distributions.Distribution, or one of {", ".join(DISTRIBUTIONS)}'
    )
  return distribution


def find(name: str, module: str | None = None) -> Distribution:
  """A distribution by name, or from a file.

  Args:
    name: one of `DISTRIBUTIONS`.
    module: a Python file with your own `distribution`; None: the distribution with that name.

  Raises:
    ValueError, UserError: there is no such distribution or file, or the file's distribution violates E[u uᵀ] = I, so
      that estimates would be biased.

  >>> find('sphere') is sphere
  True
  """
  if module is None:
    one_of('estimator.distribution', name, DISTRIBUTIONS)
    return DISTRIBUTIONS[name]
  distribution: Distribution = user_files.load(
    'estimator.module', module, ('distribution',)
  ).distribution
  _check(f'estimator.module {module}', distribution)
  return distribution


@functools.cache
def _check(
  what: str, distribution: Distribution, d: int = 4, num_tangents: int = 2, draws: int = 4096
) -> None:
  """Raises ValueError unless E[u uᵀ] = I, as far as this many draws can tell."""
  with user_files.mistakes(what):
    draw = lambda key: distribution.draw(key, Chunk(num_tangents), (), d, jnp.float32)
    u_NxKxD = jax.vmap(draw)(jax.random.split(jax.random.key(0, impl='threefry2x32'), draws))
  if u_NxKxD.shape != (draws, num_tangents, d):
    raise ValueError(
      f'{what}: distribution draws {u_NxKxD.shape[1:]} for {num_tangents} tangents in {d} dimensions; '
      f'allowed: {(num_tangents, d)}'
    )
  products_NxDxD = jnp.einsum('nki,nkj->nij', u_NxKxD, u_NxKxD) / num_tangents
  error_DxD = products_NxDxD.std(0) / draws**0.5
  if not (jnp.abs(products_NxDxD.mean(0) - jnp.eye(d)) <= 6 * error_DxD + 1e-4).all():
    mean = jnp.trace(products_NxDxD.mean(0)) / d
    raise ValueError(
      f'{what}: entries of its tangents have mean squares of {mean:.2f}, or move '
      'together; allowed: E[u uᵀ] = 1, or estimates would be biased'
    )


def like_tree(distribution: Distribution | str, key: jax.Array, tree: Any, chunk: Chunk) -> Any:
  """Tangents [K, ...] for every leaf of `tree`, in its dtype; independent between leaves.

  >>> v = like_tree(rademacher, jax.random.key(0), {'a': jnp.zeros(3), 'b': jnp.zeros((2, 2))}, Chunk(5))
  >>> v['b'].shape
  (5, 2, 2)
  """
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(key, max(len(leaves), 1))

  def draw(key: jax.Array, leaf: jax.Array) -> jax.Array:
    if not leaf.size:
      return jnp.zeros((len(chunk.ids_K), *leaf.shape), leaf.dtype)
    return (
      as_distribution(distribution)
      .draw(key, chunk, (), leaf.size, leaf.dtype)
      .reshape(-1, *leaf.shape)
    )

  return jax.tree.unflatten(treedef, [draw(k, leaf) for k, leaf in zip(keys, leaves, strict=False)])


def example_ids(batch: int, axis_name: str | None, microbatch: Microbatch = WHOLE) -> jax.Array:
  """int32 [batch]: global positions of the examples in one of this device's microbatches."""
  index, count = microbatch
  device = jax.lax.axis_index(axis_name) if axis_name else 0
  return (device * count + index) * batch + jnp.arange(batch)


def fold_in_all(key: jax.Array, ids_N: jax.Array) -> jax.Array:
  """[N] keys, one for every id."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, ids_N)
