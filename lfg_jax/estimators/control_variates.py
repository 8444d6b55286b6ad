"""Control variates of a tap's gradient: they remove noise from a forward gradient and add no bias.

Let g be the gradient at a tap, and h a control variate of it, made before the tangent u is drawn. Then

    h + ((g - h)·u) u        has the mean  h + (g - h) = g,  whatever h is,

because E[u uᵀ] = I and h does not depend on u (h is a control variate). Only g - h is estimated by
a forward gradient: the squared error is `distribution.excess(d, K)` · |g - h|² instead of
`excess(d, K)` · |g|², and K tangents share one control variate. The derivative g·u is measured anyway; only h·u
is new. A perfect one makes one tangent exact. None, h = 0, is the plain forward gradient. A bad
guess, |g - h| > |g|, adds variance, but never bias.

The control variate must not depend on the tangent. An estimator calls it before drawing tangents, and gives
it no key. A control variate that obtains the tangents by other means makes the estimate biased, as
`tests/estimators/test_control_variates.py` shows.

**A learned control variate.** `Learned` carries the exact signal s from the end of a block one layer back, as
feedback alignment does: through a matrix F in place of the layer's transposed kernel, with norms
and ReLU differentiated exactly. F is learned by regression on the forward gradient itself. The
residual r = ((g - h)·u) u has the mean g - h, so on average

    ∂/∂F  ½ Σ_b |g_b - h_b(F)|² / |s_b|²   =   - Σ_b r_b · ∂h_b/∂F / |s_b|².

This neither reads nor transposes a kernel. (Dividing by |s_b|² gives all examples equal weight:
signals shrink by orders of magnitude as an example is learned.) h is linear in F and equals g at
F = Wᵀ. There r vanishes, and with it the noise of the regression; only the motion of W keeps F away
from Wᵀ.

Related work: feedback alignment (Lillicrap et al. 2016) uses fixed matrices for the signal; FDFA
(Bacho and Chu 2022, arXiv 2212.07282) learns them from forward gradients. Both signals are biased.
Weight mirrors (Akrout et al. 2019) learn Wᵀ from noise. Used as a control variate, feedback of any quality
gives an unbiased estimate.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.estimators._types import total
from lfg_jax.jaxpr.tapped import Tapped, perturb
from lfg_jax.jaxpr.taps import Tap

PyTree = Any
_LEAST = 1e-30  # smaller squared signals come from padding, or from a head that is still zero


# `{tap: activity} -> {tap: h}`, where h has the tap's shape; a missing tap has no control variate.
ControlVariate = Callable[[Mapping[str, jax.Array]], Mapping[str, jax.Array]]


class Learned(NamedTuple):
  """A control variate that learns: the signals that feedback alignment sends to the taps.

  Attributes:
    weights: the matrices through which signals go back, in place of kernels.
    loss: `(weights, params, *args) -> (losses, aux)`: the loss function, whose reverse sweep goes
      through these matrices. A layer without one uses its kernel, so a tap's control variate is free of
      backprop only if all layers between the tap and the loss have one.
    size_B: what each example's squared error is divided by; None: 1.
  """

  weights: PyTree
  loss: Callable[..., tuple[Any, dict[str, Any]]]
  size_B: jax.Array | None = None


def cotangents(
  learned: Learned, weights: PyTree, names: Sequence[str], params: PyTree, *args: Any
) -> dict[str, jax.Array]:
  """The control_variate: what arrives at the named taps in the reverse sweep."""
  tapped = Tapped(learned.loss, weights, params, *args)

  def of_shift(shift: dict[str, jax.Array]) -> jax.Array:
    (losses, _), _ = tapped.evaluate(perturb, shift, weights, params, *args)
    return total(losses)

  taps = {name: tapped.taps[name] for name in names}
  return jax.grad(of_shift)({name: jnp.zeros(tap.shape, tap.dtype) for name, tap in taps.items()})


def corrected(h: jax.Array, residual: jax.Array) -> jax.Array:
  """h + ((g - h)·u) u.

  On CPUs, the sum is a loop over two halves, which forces XLA to store it. Otherwise XLA, which
  drops optimization barriers before fusion, would recompute everything that leads to h and u in
  each of the four loops that read the sum: a fifth of a training step.
  """
  if h.size % 2 or jax.default_backend() != 'cpu':
    return h + residual
  halves = h.reshape(2, -1), residual.reshape(2, -1)
  return jax.lax.map(lambda pair: pair[0] + pair[1], halves).reshape(h.shape)


def regression(
  pull: Callable[[dict[str, jax.Array]], tuple[PyTree]],
  h: Mapping[str, jax.Array],
  residual: Mapping[str, jax.Array],
  taps: Mapping[str, Tap],
  size_B: jax.Array | None,
) -> PyTree:
  """Gradient of ½ Σ_b |g_b - h_b|² / |s_b|² with respect to the control variate's weights, on average.

  It is a sum over examples, so its scale depends on their number; Adam is insensitive to that.

  Args:
    pull: the transposed derivative of the control variate with respect to its weights, from `jax.vjp`.
    h: h.
    residual: ((g - h)·u) u, for the same taps.
    size_B: |s_b|²; None: 1.
  """

  def cotangent(name: str, h: jax.Array) -> jax.Array:
    if size_B is None:
      return -residual[name].astype(h.dtype)
    weight_B = jnp.where(size_B > _LEAST, 1 / jnp.maximum(size_B, _LEAST), 0)
    weight = weight_B.reshape(-1, *[1] * (taps[name].ndim - 1))
    return -(residual[name] * weight).astype(h.dtype)

  (gradient,) = pull({name: cotangent(name, h) for name, h in h.items()})
  return gradient
