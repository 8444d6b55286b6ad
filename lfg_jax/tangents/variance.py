"""The variance of forward gradients: predicted, measured, and minimised for a given cost.

Let g_n = ∂L_n/∂W be the gradient of example n's loss with respect to a p × q matrix. Let V be the
variance of g_n over examples and S the squared true gradient E[g]², both averaged over entries. For
a batch of N examples, an entry of the estimate then has the variance (Ren et al. 2023, Table 1, for
normal tangents and K = 1, where e = d + 1)

| | tangents shared by the batch | independent |
|---|---|---|
| weights, d = p q | (1 + e) V/N + e S | (1 + e) V/N + e S/N |
| activities, d = q | (1 + e) V/N + e S | (1 + e) V/N + e S/N |

with e = `distribution.excess(d, K)`, the squared error of K tangents relative to |g|² (see `distributions`).

*Proof.* Given the gradient g to which a set of tangents is applied, the estimate is unbiased with
squared error e |g|². *Weights, shared:* g is the batch mean ḡ = (1/N) Σ g_n, with
E|ḡ|² = p q (V/N + S). The variance is that of ḡ, p q V/N, plus e E|ḡ|². *Weights, independent:* the
estimate is the mean of N independent ones, each with variance
p q V + e E|g_n|² = p q (V + e (V + S)). *Activities:* g_n = x_n δ_nᵀ. The estimate x_n (δ_n·u) uᵀ
applies u, of d = q dimensions, to every row of g_n; if shared by the batch, to every row of ḡ. Sum
over the p rows. ∎

A control variate h of g (see `control_variates`) that leaves the fraction r = E|g - h|² / E|g|² multiplies e by r: the
tangents are applied to g - h, and h adds no variance. In `predicted_taps`, `norms` are then
|g_i - h_i|².
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lfg_jax.tangents.distributions import Distribution, as_distribution

PyTree = Any
ESTIMATORS = ('weight', 'activity')


def predicted(
  estimator: str,
  distribution: Distribution | str,
  num_tangents: int,
  *,
  shared: bool,
  batch: int,
  p: int,
  q: int,
  V: float,
  S: float,
  left: float = 1.0,
) -> float:
  """Variance per entry of the estimated gradient of a linear layer; see the module's table.

  Args:
    estimator: 'weight' or 'activity'.
    p, q: fan-in and fan-out.
    V: mean variance over examples of an entry of the per-example gradient.
    S: mean squared entry of the true gradient.
    left: fraction of the squared gradient that a control variate leaves; 1: no control variate.

  Raises:
    ValueError: an unknown estimator.

  >>> from lfg_jax.tangents.distributions import normal
  >>> predicted('activity', normal, 1, shared=False, batch=16, p=2, q=8, V=4., S=2.)    # (q+2)/N V + (q+1)/N S
  3.625
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f'estimator is {estimator!r}; allowed: {", ".join(ESTIMATORS)}')
  e = left * as_distribution(distribution).excess(
    p * q if estimator == 'weight' else q, num_tangents
  )
  return (1 + e) * V / batch + e * S / (1 if shared else batch)


def predicted_taps(
  distribution: Distribution | str,
  num_tangents: Sequence[int],
  dims: Sequence[int],
  norms: Sequence[float],
  *,
  joint: bool,
) -> list[float]:
  """Squared error of each tap's signal for one example (patch, group).

  With separate taps, tap i has excess(d_i, K_i) |g_i|². With K joint tangents, every other tap j adds
  (d_i/K) |g_j|².

  Args:
    num_tangents: K_i for every tap; if joint, all the same.
    dims: d_i, the perturbed dimensions that influence one loss.
    norms: |g_i|², the squared gradients of that loss.

  >>> from lfg_jax.tangents.distributions import hadamard
  >>> predicted_taps(hadamard, [4, 4], [4, 4], [1., 2.], joint=False)
  [0.0, 0.0]
  >>> predicted_taps(hadamard, [4, 4], [4, 4], [1., 2.], joint=True)
  [2.0, 1.0]
  """
  others = [(sum(norms) - own) * joint for own in norms]
  return [
    as_distribution(distribution).excess(d, K) * own + d / K * other
    for K, d, own, other in zip(num_tangents, dims, norms, others, strict=True)
  ]


def allocate(
  distribution: Distribution | str,
  dims: Sequence[int],
  norms: Sequence[float],
  costs: Sequence[float],
  budget: float,
) -> list[int]:
  """Numbers of tangents for taps perturbed one by one, of the least error for a cost.

  They minimise Σ excess(d_i, K_i) |g_i|² subject to Σ c_i K_i ≤ budget.

  If excess = a_i/K_i (all distributions while K ≤ d, up to a constant), the minimum over real numbers has
  K_i ∝ √(a_i |g_i|² / c_i), by setting the derivative of the Lagrangian to zero. For whole numbers,
  start with one tangent each, and keep adding the pass that reduces the error most per cost while it
  fits. For equal costs this is optimal, since the terms are convex; for unequal costs, nearly so.

  Args:
    norms: |g_i|², squared gradients.
    costs: c_i of one tangent, in units of `budget`.

  Raises:
    ValueError: the budget is too small for one tangent each.

  >>> from lfg_jax.tangents.distributions import hadamard
  >>> allocate(hadamard, dims=[32, 32], norms=[1., 1.], costs=[4., 1.], budget=40.)
  [6, 16]
  """
  num_tangents, left, excess = (
    [1] * len(dims),
    budget - sum(costs),
    as_distribution(distribution).excess,
  )
  if left < 0:
    raise ValueError(
      f'budget is {budget}; allowed: {sum(costs)}, the cost of one tangent for each tap, or more'
    )

  def gain(i: int) -> float:
    d, K = dims[i], num_tangents[i]
    return (excess(d, K) - excess(d, K + 1)) * norms[i] / costs[i]

  heap = [(-gain(i), i) for i in range(len(dims))]
  heapq.heapify(heap)
  while heap:
    negative, i = heapq.heappop(heap)
    if negative < 0 and costs[i] <= left:
      num_tangents[i] += 1
      left -= costs[i]
      heapq.heappush(heap, (-gain(i), i))
  return num_tangents


class Measured(NamedTuple):
  """Statistics over independent draws of an estimate, computed without storing the draws.

  Attributes:
    draws: number of draws.
    mean: of the estimate, a tree.
    variance: of every entry, a tree.
    squared_error: mean over draws of the mean over entries of (estimate - truth)², for the whole tree.
    squared_error_se: its standard error.
    cosine: mean over draws of the cosine of the angle between estimate and truth.
  """

  draws: int
  mean: PyTree
  variance: PyTree
  squared_error: jax.Array
  squared_error_se: jax.Array
  cosine: jax.Array

  def squared_z(self, truth: PyTree) -> PyTree:
    """((mean - truth) / (standard error))² of every entry.

    The standard error includes rounding, so an exact estimate counts as unbiased.
    """

    def squares(mean: jax.Array, variance: jax.Array, truth: jax.Array) -> jax.Array:
      rounding = 16 * jnp.finfo(mean.dtype).eps * jnp.abs(truth).max()
      return (mean - truth) ** 2 / jnp.maximum(
        variance / self.draws + rounding**2, jnp.finfo(mean.dtype).tiny
      )

    return jax.tree.map(squares, self.mean, self.variance, truth)

  def bias_z(self, truth: PyTree) -> jax.Array:
    """Root of the mean of `squared_z` over all entries: 1 without bias."""
    z2 = jax.tree.leaves(self.squared_z(truth))
    return jnp.sqrt(sum(z.sum() for z in z2) / sum(z.size for z in z2))


class _Moments(NamedTuple):
  """Count, mean and sum of squared deviations of a tree, merged as in Welford and Chan et al."""

  size: jax.Array
  mean: PyTree
  squares: PyTree

  @classmethod
  def of(cls, values_N: PyTree) -> '_Moments':
    mean = jax.tree.map(lambda x: x.mean(0), values_N)
    squares = jax.tree.map(lambda x, m: ((x - m) ** 2).sum(0), values_N, mean)
    return cls(jnp.float32(jax.tree.leaves(values_N)[0].shape[0]), mean, squares)

  def merge(self, other: '_Moments') -> '_Moments':
    size = self.size + other.size
    part = other.size / size
    mean = jax.tree.map(lambda a, b: a + (b - a) * part, self.mean, other.mean)
    squares = jax.tree.map(
      lambda sa, sb, a, b: sa + sb + (b - a) ** 2 * self.size * part,
      self.squares,
      other.squares,
      self.mean,
      other.mean,
    )
    return _Moments(size, mean, squares)

  def over_devices(self, axis: str) -> '_Moments':
    """Merges those of all devices, which have equal counts."""
    mean = jax.lax.pmean(self.mean, axis)
    squares = jax.tree.map(
      lambda s, m, all_: s + self.size * (m - all_) ** 2, self.squares, self.mean, mean
    )
    return _Moments(jax.lax.psum(self.size, axis), mean, jax.lax.psum(squares, axis))


def measure(
  estimate: Callable[[jax.Array], PyTree],
  truth: PyTree,
  key: jax.Array,
  draws: int,
  *,
  at_once: int = 100,
  mesh: Mesh | None = None,
) -> Measured:
  """Mean, variance and squared error of `estimate(key)` over keys, by Welford's recurrence.

  `at_once` draws are vmapped and determine the memory.

  Args:
    truth: what to compare the estimate with, of the same structure.
    draws: rounded down to whole chunks of `at_once` on every device.
    mesh: has one axis, over which the draws are divided; None: one device.

  Raises:
    ValueError: fewer draws than one chunk on every device, or fewer than two.

  >>> exact = measure(lambda key: jnp.ones(3), jnp.zeros(3), jax.random.key(0), 200)
  >>> exact.draws, exact.variance.tolist(), float(exact.squared_error)
  (200, [0.0, 0.0, 0.0], 1.0)
  """
  devices = mesh.size if mesh else 1
  chunks = draws // (at_once * devices)
  if chunks < 1 or draws < 2:
    raise ValueError(
      f'draws is {draws}; allowed: at_once x devices = {at_once * devices} or more, and 2 or more'
    )

  of_key = lambda key: _compared(estimate(key), truth)
  # Jitted, so that what asks for its shapes and the scan share one trace.
  chunk = jax.jit(lambda key: _Moments.of(jax.vmap(of_key)(jax.random.split(key, at_once))))

  def on_one(key: jax.Array) -> _Moments:
    shapes = jax.eval_shape(chunk, key)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    merged = lambda so_far, key: (so_far.merge(chunk(key)), None)
    return jax.lax.scan(merged, nothing, jax.random.split(key, chunks))[0]

  if mesh:
    axis = mesh.axis_names[0]
    own_key = lambda key: jax.random.fold_in(key, jax.lax.axis_index(axis))
    run = jax.shard_map(
      lambda key: on_one(own_key(key)).over_devices(axis),
      mesh=mesh,
      in_specs=P(),
      out_specs=P(),
      check_vma=False,
    )
  else:
    run = on_one
  count, mean, squares = jax.jit(run)(key)
  n = round(float(count))
  variance, error_variance, _ = jax.tree.map(lambda s: s / (n - 1), squares)
  return Measured(n, mean[0], variance, mean[1], jnp.sqrt(error_variance / n), mean[2])


def _compared(value: PyTree, truth: PyTree) -> tuple[PyTree, jax.Array, jax.Array]:
  """A value, its mean squared error over all entries, and its cosine with the truth."""
  dot = lambda a, b: sum(
    jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
  error = jax.tree.map(jnp.subtract, value, truth)
  norm = jnp.sqrt(dot(value, value) * dot(truth, truth))
  entries = sum(leaf.size for leaf in jax.tree.leaves(truth))
  return value, dot(error, error) / entries, dot(value, truth) / jnp.where(norm > 0, norm, 1)
