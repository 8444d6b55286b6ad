"""The signals at a stage's taps, exact and estimated, and how far they are apart.

`exact` and `recording` take the place of a stage's usual estimator; see `losses.blockwise`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators._types import GradFn, LossFn
from lfg_jax.estimators.control_variates import Learned, cotangents
from lfg_jax.estimators.exact_tail import Estimator
from lfg_jax.estimators.feedback import backprop
from lfg_jax.jaxpr.tapped import Tapped, perturb
from lfg_jax.jaxpr.taps import tap
from lfg_jax.local.staged import in_block
from lfg_jax.models.mixer import TAPS
from lfg_jax.models.sizes import Run

PyTree = Any


def exact(fun: LossFn, learned: Learned) -> GradFn:
  """An estimator that returns, for a stage, the exact 'gradient' and 'signal', and 'taps'.

  'taps' has three squared norms for every tap, where g is the tap's signal: |g|² ('own'), |g - h|²
  with the learned control variate h ('residual'), and 'by_group'. The last is the sum over groups of the |g|²
  that belongs to the losses of that group alone; it disturbs the other taps if all are perturbed
  jointly.
  """

  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple, PyTree]:
    out, grads = backprop(fun)(params, key, *args)
    tapped = Tapped(fun, params, *args)
    taps = {name: tap for name, tap in tapped.taps.items() if in_block(name) in TAPS}
    of_loss = Learned({}, lambda _, *args: fun(*args))
    signal, control_variate = (
      cotangents(g, g.weights, list(taps), params, *args) for g in (of_loss, learned)
    )
    zeros = {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in taps.items()}

    def of_group(group: jax.Array) -> PyTree:
      losses = lambda shift: tapped.evaluate(perturb, shift, params, *args)[0][0]
      return jax.tree.map(_square, jax.grad(lambda shift: losses(shift)[..., group].sum())(zeros))

    by_group = jax.vmap(of_group)(jnp.arange(out[0].shape[-1]))
    norms = {
      in_block(name): {
        'own': _square(g),
        'residual': _square(g - control_variate[name]),
        'by_group': by_group[name].sum(),
      }
      for name, g in signal.items()
    }
    signal = {in_block(name): g for name, g in signal.items()}
    return out, {'last': {'gradient': grads['last'], 'signal': signal, 'taps': norms}}

  return run


def recording(estimator: Estimator) -> Estimator:
  """An estimator that returns, for a stage, the estimated 'gradient' and every tap's 'signal'.

  A tap's signal is the gradient with respect to a shift of the activity just before the tap.
  """

  def shift_before(eqn: Any, ins: list, shift: jax.Array) -> tuple[list, None]:
    z = ins[0]
    if 'active' in eqn.params['further']:  # inactive entries get no signal, the shift all of it
      z = jnp.where(ins[1], z, jax.lax.stop_gradient(z))
    return [tap(z + shift, eqn.params['name'], local_axes=eqn.params['local_axes'])], None

  def shifted(trace: Callable[..., Tapped], first: tuple, params: PyTree, *args: Any) -> tuple:
    inner = (*first, params['own'], *args)
    return trace(*inner).evaluate(shift_before, params['shift'], *inner)[0]

  def of_loss(fun: LossFn, learned: Learned | None) -> GradFn:
    def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple, PyTree]:
      taps = Tapped(fun, params, *args).taps
      shift = {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in taps.items()}
      moved = functools.partial(shifted, functools.partial(Tapped, fun), ())
      control_variate = learned and learned._replace(
        loss=lambda weights, *rest: shifted(
          functools.partial(Tapped, learned.loss), (weights,), *rest
        )
      )
      out, grads = estimator(moved, control_variate)({'own': params, 'shift': shift}, key, *args)
      signal = {in_block(name): g for name, g in grads['shift'].items()}
      return out, {'last': {'gradient': grads['own']['last'], 'signal': signal}}

    return run

  return of_loss


def errors(run: Run, layer: str, drawn: PyTree, exact: PyTree) -> dict[str, jax.Array]:
  """Errors of one draw, as means over blocks.

  They are the relative squared errors of the kernel's gradient and of the signal, and the cosine of
  the kernel's gradient.
  """
  flat = lambda leaf: leaf.reshape(leaf.shape[0] if run.spec.stacked else 1, -1)
  dot = lambda a, b: (flat(a) * flat(b)).sum(1)
  grad, truth = drawn['gradient'][layer]['kernel'], exact['gradient'][layer]['kernel']
  tap = f'after_{layer}'
  signal, true_signal = drawn['signal'][tap], exact['signal'][tap]
  relative = lambda a, b: (dot(a - b, a - b) / dot(b, b)).mean()
  cosine = dot(grad, truth) / jnp.sqrt(dot(grad, grad) * dot(truth, truth))
  return {
    'relative_error': relative(grad, truth),
    'cosine': cosine.mean(),
    'signal_error': relative(signal, true_signal),
  }


def _square(x: jax.Array) -> jax.Array:
  return jnp.square(x).sum()
