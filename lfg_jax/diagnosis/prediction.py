"""The squared error that theory predicts for a gradient estimate of a given function.

*Perturbed weights.* The error relative to |g|² is `distribution.excess(d, K)`, with d parameters.

*Perturbed activities.* Let g_u be the gradient of one unit of a tap: an example or, with more
`local_axes`, a part of one. Let ε_u be the error of the unit's signal, and A_u the local derivative
through which the signal reaches the parameters. Units have independent tangents, so the error is
Σ_u E|A_u ε_u|². If A_uᵀ A_u = c_u I, it is Σ_u c_u E|ε_u|², where `variance.predicted_taps` knows
E|ε_u|². A linear layer with input x_u is such a map, with c_u = |x_u|², plus 1 with a bias; two
random signals for every unit tell whether a function has such maps only. With others, such as a
norm with parameters, the error depends on more than the distribution's `excess`, and nothing is predicted.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax.diagnosis import tap_shifts
from lfg_jax.diagnosis.influence import Declared
from lfg_jax.diagnosis.tap_shifts import Call, TapShifts
from lfg_jax.estimators.feedback import reverse_with_signals
from lfg_jax.jaxpr.tapped import record
from lfg_jax.tangents import distributions, variance

_AT_ONCE = 32  # units that are probed before the next look at what was found


def predicted_error(
  call: Call, options: Mapping[str, Any], gradient: list[jax.Array]
) -> float | None:
  """E|x - g|²/|g|² of the estimate x of a gradient g; None: there is no prediction.

  Args:
    call: the function and its arguments; its own options are not used.
    options: of `value_and_activity_grad` or, with 'perturb': 'weights', `value_and_forward_grad`.
    gradient: leaves of g.
  """
  options = dict(options)
  distribution = distributions.as_distribution(
    options.get('distribution', distributions.rademacher)
  )
  num_tangents = options.get('num_tangents', 1)
  square = sum(float(jnp.sum(jnp.square(leaf))) for leaf in gradient)
  if options.get('combine', 'mean') != 'mean' or not square:
    return None
  if options.pop('perturb', 'activities') == 'weights':
    return distribution.excess(sum(leaf.size for leaf in gradient), num_tangents)
  function = tap_shifts.with_tap_shifts(call._replace(options=options))
  joint = options.get('joint', True)
  if options.get('shared') or any(tap.scanned or not tap.credited for tap in function.taps):
    return None
  leading = {tap.shape[: tap.credited] for tap in function.taps}
  gains = _gains(function) if len(leading) == 1 or not joint else None
  if gains is None or (joint and _overlap(gains)):
    return None
  own, calls = options.get('num_tangents_by_tap') or {}, function.tapped.call_names
  numbers = [own.get(tap.name, own.get(calls[tap.name], num_tangents)) for tap in function.taps]
  dims, norms = [tap.dimensions for tap in function.taps], _norms(function)
  errors = variance.predicted_taps(distribution, numbers, dims, norms, joint=joint)
  each = (np.sum(gain.sum(-1) * error) for gain, error in zip(gains, errors, strict=True))
  return float(sum(each)) / square


def _units(tap: Declared) -> int:
  return math.prod(tap.shape[: tap.credited])


def _norms(function: TapShifts) -> list[Any]:
  """|g_u - h_u|² of every unit of every tap, where h is the control variate, if there is one."""
  signals = function.exact()[: len(function.taps)]
  control_variate, h = function.options.get('control_variate'), {}
  if control_variate:
    h = control_variate(function.tapped.evaluate(record, {}, function.point)[1])
  residual = [g - h.get(t.name, 0) for t, g in zip(function.taps, signals, strict=True)]
  return [
    np.asarray(jnp.square(r).reshape(_units(tap), -1).sum(1), np.float64)
    for tap, r in zip(function.taps, residual, strict=True)
  ]


def _gains(function: TapShifts) -> list[np.ndarray] | None:
  """For every tap, [U, leaves]: c_u of every unit, by leaf of the gradient; None: there is no c_u."""
  random, gains = np.random.default_rng(0), []
  for tap in function.taps:
    units, probe, parts = _units(tap), _probe(function, tap), []
    two = random.standard_normal((2, units, math.prod(tap.shape) // units)).astype(np.float32)
    for first in range(0, units, _AT_ONCE):
      ids = np.arange(first, first + _AT_ONCE) % units
      one, other = (np.asarray(probe(v, ids)) for v in two)
      if not np.allclose(one, other, rtol=1e-3, atol=1e-5 * one.max()):
        return None
      parts.append(one)
    gains.append(np.concatenate(parts)[:units].astype(np.float64))
  return gains


def _probe(function: TapShifts, tap: Declared) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
  """`(v [U, D], units [n]) -> [n, leaves]`: |A_u v_u|²/|v_u|² by leaf of the gradient."""
  nothing = {other.name: jnp.zeros(other.shape, other.dtype) for other in function.taps}

  def pull(signal: jax.Array) -> list[jax.Array]:
    given = {**nothing, tap.name: signal.reshape(tap.shape).astype(tap.dtype)}
    return jax.tree.leaves(reverse_with_signals(function.tapped, given, function.point)[1])

  @jax.jit
  def run(v_UxD: jax.Array, units: jax.Array) -> jax.Array:
    without = pull(jnp.zeros_like(v_UxD))  # the gradient that does not come from this tap

    def of_unit(unit: jax.Array) -> jax.Array:
      moved = pull(jnp.where(jnp.arange(len(v_UxD))[:, None] == unit, v_UxD, 0))
      squares = [jnp.square(m - w).sum() for m, w in zip(moved, without, strict=True)]
      return jnp.stack(squares) / jnp.square(v_UxD[unit]).sum()

    return jax.lax.map(of_unit, units)

  return run


def _overlap(gains: list[np.ndarray]) -> bool:
  """Whether a leaf hears from two taps: their errors, if joint, are then not independent."""
  return bool((np.sum([(gain > 0).any(0) for gain in gains], axis=0) > 1).any())
