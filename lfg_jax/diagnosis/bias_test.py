"""Statistics of many draws of an estimate: how noisy it is, and whether it is biased.

One draw says nothing about bias: a noisy estimate and a biased one have the same small cosine. The
mean of N draws does reveal a bias, if it is farther from the truth g than its own noise explains.
Two tests examine it. A bias is reported if either test exceeds `SIGMAS` standard deviations. (That
is one false alarm in a million; a diagnosis makes two tests for every tap and every leaf.)

*Along the gradient.* The scale x·g/|g|² has mean 1. Its standard error comes from the draws.
This test is the more sensitive one for a signal that is too long or too short. The scale is skewed:
with few tangents it is nearly χ² of one degree. Then a mean over 200 draws is more than 5 standard
errors too small once in 6,000 times, not in a million, because draws without a rare large value
have a small standard error too. The first-order correction for skewness γ, z + γ z²/(3√N) (Johnson
1978), in a form that never falls as z grows, makes this once in 100,000 times.

*In any direction.* Over pairs n ≠ m of draws with errors e = x - g, the mean of e_n·e_m is an
unbiased estimate of |bias|², since different draws have independent noise. Without bias, its
variance is 2 tr Σ²/N², where Σ is the covariance of a draw, and its distribution is that of a
weighted sum of χ². Pearson's approximation by one χ² with ν = (tr Σ²)³/(tr Σ³)² degrees of freedom
matches three moments; Wilson and Hilferty's cube root then converts it to standard deviations.
Half-differences of draws, which have zero mean, give the traces: h and h' are independent with
covariance Σ, so E(h·h')² = tr Σ², and around triples E (h·h')(h'·h'')(h''·h) = tr Σ³.

All numbers are relative to g.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax.promotion import upcast

SIGMAS = 5.0
_ZERO = 1e-6  # a leaf with this small a share of the whole gradient is zero up to rounding


class Draws(NamedTuple):
  """Statistics of N draws for G groups: each leaf, then all leaves that belong together.

  Attributes:
    along: [N, G] e·g/|g|².
    squares: [N, G] |e|²/|g|².
    bias: [G] |bias|²/|g|², unbiased (it may be negative).
    traces: [2, G] tr Σ² and tr Σ³, for errors relative to |g|.
    is_zero: [G] whether g is zero; errors are then relative to the gradient of all leaves.
  """

  along: np.ndarray
  squares: np.ndarray
  bias: np.ndarray
  traces: np.ndarray
  is_zero: np.ndarray


class Accuracy(NamedTuple):
  """An estimate compared with the true gradient, for each number of tangents K of a diagnosis.

  Attributes:
    name: of a tap, or of a leaf of the differentiated arguments.
    cosine: for every K, E[x·g] / √(E|x|² |g|²).
    cosine_se: its standard error.
    error: for every K, E|x - g|² / |g|².
    error_se: its standard error.
    limit: c in the distribution cos(K) = c/√(1 + a/K - b), the cosine in the limit of many tangents; below
      1, the estimate's mean does not point along the gradient.
    noise: a, fitted.
    orthogonal: b, fitted for distributions of orthogonal tangents (where it is about 1), else 0.
    scale: E[x·g]/|g|² for the largest K; 1 without bias.
    scale_se: its standard error.
    bias: |E[x] - g|/|g| for the largest K, with the contribution of noise subtracted.
    sigmas: of the two tests for bias, along the gradient and in any direction.
    visible: the smallest bias, relative to |g|, that the second test would detect.
    is_zero: whether the gradient is zero; then little can be said.
  """

  name: str
  cosine: np.ndarray
  cosine_se: np.ndarray
  error: np.ndarray
  error_se: np.ndarray
  limit: float
  noise: float
  orthogonal: float
  scale: float
  scale_se: float
  bias: float
  sigmas: tuple[float, float]
  visible: float
  is_zero: bool

  @property
  def is_biased(self) -> bool:
    return max(abs(self.sigmas[0]), self.sigmas[1]) > SIGMAS

  @property
  def is_finite(self) -> bool:
    return math.isfinite(self.scale) and math.isfinite(self.bias)

  @property
  def verdict(self) -> str:
    """In words."""
    if not self.is_finite:
      return 'not finite'
    if self.is_zero:
      return 'the gradient is zero here' + ', its estimate is not' * self.is_biased
    if self.error[-1] < 1e-9:
      return 'exact'
    if not self.is_biased:
      return f'no bias above {self.visible:.1%}'
    return f'biased by {max(self.bias, abs(self.scale - 1)):.1%}'

  def cosine_at(self, K: np.ndarray) -> np.ndarray:
    """The fitted distribution."""
    squared = np.maximum(1 + self.noise / K - self.orthogonal, 1e-12)
    return np.minimum(self.limit / np.sqrt(squared), 1)


def sample(
  estimate: Callable[[jax.Array], list[jax.Array]],
  truth: list[jax.Array],
  key: jax.Array,
  draws: int,
  at_once: int,
  together: Sequence[bool],
) -> Draws:
  """Statistics of `estimate(key)` over independent keys, one draw at a time.

  Args:
    estimate: returns an estimate of every leaf of `truth`.
    draws: rounded up to whole chunks.
    at_once: how many draws are kept and compared with each other; even, and at least 6.
    together: for every leaf, whether it belongs to the last group, which has several leaves.
  """
  collect = Collector.of(truth, together)
  keys = jax.random.split(key, (-(-draws // at_once), at_once))

  def chunk(total: list[jax.Array], keys: jax.Array) -> tuple[list[jax.Array], Part]:
    return collect.add(total, jax.lax.map(estimate, keys))

  total, parts = jax.jit(lambda keys: jax.lax.scan(chunk, collect.nothing, keys))(keys)
  return collect.draws(total, parts)


class Part(NamedTuple):
  """Statistics of n draws for G groups; all parts have the same n.

  Attributes:
    along: [G, n], as in `Draws`.
    squares: [G, n], as in `Draws`.
    traces: [2, G], as in `Draws`.
  """

  along: jax.Array
  squares: jax.Array
  traces: jax.Array


class Collector(NamedTuple):
  """Collects statistics of draws, part by part.

  Attributes:
    truth: the true value of every leaf.
    units: [L] what errors of a leaf are relative to: its norm, or that of all if its own is zero.
    shares: [L] squared units relative to the whole; 0 for leaves that do not belong to it.
    is_zero: [L + 1] whether each leaf, and the whole, is zero.
  """

  truth: list[jax.Array]
  units: jax.Array
  shares: jax.Array
  is_zero: np.ndarray

  @classmethod
  def of(cls, truth: list[jax.Array], together: Sequence[bool]) -> 'Collector':
    norms = [jnp.linalg.norm(upcast(t)) for t in truth]
    whole = jnp.sqrt(sum(norm**2 for norm, is_in in zip(norms, together, strict=True) if is_in))
    unit_of_all = jnp.where(whole > 0, whole, 1)
    units = jnp.stack([jnp.where(norm > _ZERO * whole, norm, unit_of_all) for norm in norms])
    shares = jnp.where(jnp.asarray(together), (units / unit_of_all) ** 2, 0)
    is_zero = [*(float(norm) <= _ZERO * float(whole) for norm in norms), float(whole) == 0]
    return cls(truth, units, shares, np.array(is_zero))

  @property
  def nothing(self) -> list[jax.Array]:
    """The sum of the errors of no draws."""
    return [jnp.zeros(t.size) for t in self.truth]

  def add(self, total: list[jax.Array], values: list[jax.Array]) -> tuple[list[jax.Array], Part]:
    """Adds n draws [n, ...] of every leaf to the sum of errors; n is even, and at least 6."""
    errors = [
      ((upcast(x) - t[None]) / unit).reshape(len(x), -1)
      for x, t, unit in zip(values, self.truth, self.units, strict=True)
    ]
    along = jnp.stack(
      [e @ (t / unit).ravel() for e, t, unit in zip(errors, self.truth, self.units, strict=True)]
    )
    # One product gives all inner products. Those of half-differences follow from it, up to a rounding
    # that is small where bias does not exceed noise a thousandfold.
    grams = jnp.stack([jnp.matmul(e, e.T, precision='highest') for e in errors])
    squares = jnp.diagonal(grams, axis1=1, axis2=2)
    halved = (grams[:, ::2] - grams[:, 1::2]) / math.sqrt(2)
    halved = self._with_all((halved[..., ::2] - halved[..., 1::2]) / math.sqrt(2))
    total = [so_far + e.sum(0) for so_far, e in zip(total, errors, strict=True)]
    return total, Part(self._with_all(along), self._with_all(squares), _traces(halved))

  def draws(self, total: list[jax.Array], parts: Part) -> Draws:
    """The statistics of all draws, from the parts [C, ...]."""
    squared = self._with_all(jnp.stack([jnp.square(t).sum() for t in total]))
    along, squares, traces = (np.asarray(x, np.float64) for x in parts)
    flat = lambda x_CxGxn: np.moveaxis(x_CxGxn, 1, 2).reshape(-1, x_CxGxn.shape[1])
    along, squares = flat(along), flat(squares)
    N = len(along)
    bias = (np.asarray(squared, np.float64) - squares.sum(0)) / (N * (N - 1))
    return Draws(along, squares, bias, traces.mean(0), self.is_zero)

  def _with_all(self, x_L: jax.Array) -> jax.Array:
    return jnp.concatenate([x_L, jnp.tensordot(self.shares, x_L, 1)[None]])


def _traces(gram_Gxmxm: jax.Array) -> jax.Array:
  """[2, G] tr Σ² and tr Σ³ from inner products of m independent vectors."""
  m = gram_Gxmxm.shape[-1]
  others = gram_Gxmxm * (1 - jnp.eye(m))[None]
  pairs, triples = m * (m - 1), m * (m - 1) * (m - 2)
  cube = jnp.einsum('gij,gjk,gki->g', others, others, others)
  return jnp.stack([jnp.square(others).sum((1, 2)) / pairs, cube / triples])


def rounding(leaves: list[jax.Array]) -> list[float]:
  """Errors of the mean that rounding explains, relative to each leaf and to all together."""
  least = 16 * float(jnp.finfo(jnp.float32).eps)
  eps = [max(float(jnp.finfo(leaf.dtype).eps), least) for leaf in leaves]
  return [*eps, max(eps)]


def accuracies(
  names: Sequence[str],
  num_tangents: Sequence[int],
  draws: Sequence[Draws],
  rounding: Sequence[float],
  *,
  is_orthogonal: bool,
) -> list[Accuracy]:
  """The accuracy of every group, from the draws for every K.

  Args:
    rounding: for every group, the error of the mean relative to |g| that rounding explains.
    is_orthogonal: whether to fit b too.
  """
  K = np.asarray(num_tangents)
  return [
    _accuracy(name, K, [_group(d, n) for d in draws], floor, is_orthogonal)
    for n, (name, floor) in enumerate(zip(names, rounding, strict=True))
  ]


def _group(draws: Draws, n: int) -> Draws:
  return Draws(*(x[..., n] for x in draws))


def _accuracy(
  name: str, K: np.ndarray, draws: list[Draws], floor: float, is_orthogonal: bool
) -> Accuracy:
  cosine, cosine_se = np.transpose([_cosine(d) for d in draws])
  error, error_se = np.transpose([_mean(d.squares) for d in draws])
  last = draws[-1]
  along, scale_se = _mean(last.along)
  length = 1 + 2 * along + max(float(last.bias), along**2)  # |E[x]|², at least its part along g
  limit = (1 + along) / math.sqrt(max(length, 1e-12))
  noise, orthogonal = _fit(K, cosine, cosine_se, limit, is_orthogonal)
  any_direction, visible = _any_direction(last, floor)
  sigmas = (_along(last.along, floor), any_direction)
  bias = math.sqrt(np.maximum(last.bias, 0))
  return Accuracy(
    name,
    cosine,
    cosine_se,
    error,
    error_se,
    limit,
    noise,
    orthogonal,
    1 + along,
    scale_se,
    bias,
    sigmas,
    visible,
    bool(last.is_zero),
  )


def _mean(x_N: np.ndarray) -> tuple[float, float]:
  """Mean and its standard error."""
  return float(x_N.mean()), float(x_N.std(ddof=1) / math.sqrt(x_N.size))


def _along(x_N: np.ndarray, floor: float) -> float:
  """The mean in standard deviations, without the effect of skewness; `floor` is for rounding."""
  mean, se = _mean(x_N)
  wide = math.hypot(se, floor)
  third = float(((x_N - mean) ** 3).mean()) / x_N.size**2  # γ/√N times the standard error cubed
  z = mean / wide
  change = third / wide**3 * z / 3
  return z * (1 + change) if change > 0 else z / (1 - change)


def _cosine(draws: Draws) -> tuple[float, float]:
  """Cosine, and its standard error by first-order propagation."""
  if draws.is_zero:
    return math.nan, math.nan
  dot_N = 1 + draws.along
  square_N = 1 + 2 * draws.along + draws.squares
  dot, square = dot_N.mean(), max(square_N.mean(), 1e-30)
  cosine = dot / math.sqrt(square)
  change_N = dot_N / math.sqrt(square) - cosine * square_N / (2 * square)
  return float(cosine), _mean(change_N)[1]


def _fit(
  K: np.ndarray, cosine: np.ndarray, se: np.ndarray, limit: float, is_orthogonal: bool
) -> tuple[float, float]:
  """a and b of (c/cos(K))² - 1 = a/K - b, by weighted least squares."""
  if not np.isfinite(cosine).all():
    return math.nan, 0.0
  safe = np.maximum(np.abs(cosine), 1e-6)
  y = (limit / safe) ** 2 - 1
  weight = 1 / ((y + 1) * np.maximum(se, 1e-5) / safe)

  def solve(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(columns * weight[:, None], y * weight, rcond=None)[0]

  orthogonal = 0.0
  if is_orthogonal and K.size > 1:
    orthogonal = float(np.clip(solve(np.stack([1 / K, -np.ones(K.size)], 1), y)[1], 0, 1))
  return float(solve(1 / K[:, None], y + orthogonal)[0]), orthogonal


def _any_direction(draws: Draws, floor: float) -> tuple[float, float]:
  """The squared bias in standard deviations, and the smallest bias that reaches `SIGMAS`."""
  N, (second, third) = draws.squares.size, draws.traces
  spread = math.hypot(math.sqrt(2 * max(second, 0)) / N, floor**2)
  freedom = float(np.clip(second**3 / max(third, 1e-30) ** 2, 1, 1e6))
  width = math.sqrt(2 / (9 * freedom))
  chi2 = max(1 + float(draws.bias - floor**2) / spread * math.sqrt(2 / freedom), 0)  # over ν
  sigmas = (chi2 ** (1 / 3) - 1 + width**2) / width
  needed = ((1 - width**2 + SIGMAS * width) ** 3 - 1) / math.sqrt(2 / freedom)
  return float(sigmas), math.sqrt(max(needed * spread + floor**2, 0))
