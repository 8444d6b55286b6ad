"""Guesses of a tap's gradient: control variates that take noise out of a forward gradient and leave no bias.

Let g be the gradient at a tap, and h a guess of it that is known before the tangent u is drawn. Then

    h + ((g - h)·u) u        has the mean  h + (g - h) = g,  whatever h is,

because E[u uᵀ] = 1 and h does not depend on u. What is left to chance is a forward gradient of g - h: the squared
error is `law.excess(d, K)` · |g - h|² in place of `excess(d, K)` · |g|², and K passes share one guess. The derivative
along u, which the estimator has anyway, is g·u; only h·u is new. A perfect guess makes one pass exact, no guess
(h = 0) is the plain forward gradient, and a bad one (|g - h| > |g|) costs variance, never bias.

The condition that matters is independence. An estimator calls a guess before it draws tangents and gives it no key;
a guess that finds the tangents by other means is biased, which `tests/test_guesses.py` shows.

**A learned guess.** `feedback` sends the exact signal that arrives at the tap behind (at the last tap of a block, where
only a norm and the local head lie between it and the loss) one layer back, as feedback alignment does: through a
matrix F in place of the layer's transposed kernel, with norms and ReLU differentiated exactly. F is learned by
regression on the forward gradient itself. With the residual r = ((g - h)·u) u, which has the mean g - h,

    ∂/∂F  ½ Σ_b |g_b - h_b(F)|² / |s_b|²   is, on average,   - Σ_b r_b · ∂h_b/∂F / |s_b|²,

so that no kernel is ever read or transposed. (s_b, an example's exact signal, makes all examples equal: signals
shrink by orders of magnitude as an example is learnt.) h is linear in F and equals g at F = Wᵀ. There r is zero, and
with it the noise of the regression: what keeps F from Wᵀ is only that W moves. Nøkland's and Bacho & Chu's (FDFA, arXiv
2212.07282) feedback is used as the signal, and biased; here it is quiet *and* unbiased.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from lfg_jax.taps import Tap

PyTree = Any
Path = tuple[str, ...]
_LEAST = 1e-30    # squared signals below are of padding, or of a head that is still zero


class Known(NamedTuple):
  """What is known before tangents are drawn.

  Attributes:
    loss_fn: an `estimators.LossFn`.
    params: its parameters.
    taps: every tap, with its value at the unperturbed point.
    args: the further arguments of loss_fn.
  """
  loss_fn: Any
  params: PyTree
  taps: dict[Path, Tap]
  args: tuple[Any, ...]


# `(weights, known) -> {tap: h}`, h of the tap's shape. Taps that are missing have no guess. `weights` is what the
# guess learns by regression, or {}.
Guess = Callable[[PyTree, Known], Mapping[Path, jax.Array]]


def feedback(weights: PyTree, known: Known) -> dict[Path, jax.Array]:
  """What feedback alignment sends to every tap: the cotangent there, through `weights` in place of kernels.

  A layer without feedback weights would use its kernel, so a tap counts as guessed only if all layers between it and
  the loss have some; see `of_taps`.

  Args:
    weights: the collection `feedback` of the model: for a layer its matrix, under the name 'kernel'.
  """
  def objective(shift: dict[Path, jax.Array]) -> jax.Array:
    losses, _ = known.loss_fn(known.params, {'perturbation': unflatten_dict(shift), 'feedback': weights}, *known.args)
    return sum((leaf.sum() for leaf in jax.tree.leaves(losses)), jnp.float32(0))
  return jax.grad(objective)({path: jnp.zeros_like(tap.value) for path, tap in known.taps.items()})


def of_taps(guess: Guess, is_guessed: Callable[[Path], bool]) -> Guess:
  """`guess`, of some taps only.

  >>> everything = lambda weights, known: {('a',): jnp.zeros(2), ('b',): jnp.ones(2)}
  >>> list(of_taps(everything, lambda path: path[-1] == 'b')({}, None))
  [('b',)]
  """
  return lambda weights, known: {path: h for path, h in guess(weights, known).items() if is_guessed(path)}


def corrected(guessed: jax.Array, residual: jax.Array) -> jax.Array:
  """h + ((g - h)·u) u.

  On CPUs in a loop of two halves, so that it is written out: otherwise XLA repeats all that leads to h and u in each
  of the four fused loops that read the sum, which costs a fifth of a training step. (It drops optimization barriers
  before it fuses.)
  """
  if guessed.size % 2 or jax.default_backend() != 'cpu':
    return guessed + residual
  halves = guessed.reshape(2, -1), residual.reshape(2, -1)
  return jax.lax.map(lambda pair: pair[0] + pair[1], halves).reshape(guessed.shape)


def regression(pull: Callable[[dict[Path, jax.Array]], tuple[PyTree]], guessed: Mapping[Path, jax.Array],
               residual: Mapping[Path, jax.Array], taps: Mapping[Path, Tap], size_B: jax.Array | None) -> PyTree:
  """Gradient by the guess's weights of ½ Σ_b |g_b - h_b|² / |s_b|², on average over tangents.

  The sum is over examples: its scale is that of their number, which Adam does not see.

  Args:
    pull: the transposed derivative of the guess by its weights, from `jax.vjp`.
    guessed: h.
    residual: for the same taps, ((g - h)·u) u.
    size_B: |s_b|²; None: 1.
  """
  def cotangent(path: Path, h: jax.Array) -> jax.Array:
    if size_B is None:
      return -residual[path].astype(h.dtype)
    weight_B = jnp.where(size_B > _LEAST, 1 / jnp.maximum(size_B, _LEAST), 0)
    return -(residual[path] * weight_B.reshape(-1, *[1] * (taps[path].ndim - 1))).astype(h.dtype)
  (gradient,) = pull({path: cotangent(path, h) for path, h in guessed.items()})
  return gradient
