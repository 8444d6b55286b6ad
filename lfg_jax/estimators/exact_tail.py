"""Another estimator up to a boundary, and the exact gradient after it.

Suppose everything before some activity y, the boundary, influences the losses through y alone, and
the exact signal s = ∂L/∂y is cheap. Then forward derivatives can stop at y: along any tangent, the
losses' derivative is s·dy. In the LocalMixer, y is the output of a block's last linear layer; only
a norm, a ReLU and the local head follow.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators._types import GradFn, Losses, LossFn, PyTree, objective
from lfg_jax.estimators.control_variates import Learned
from lfg_jax.jaxpr.tapped import Tapped, bind, detach, record
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.promotion import upcast

Estimator = Callable[..., GradFn]


def exact_tail(
  fun: LossFn,
  learned: Learned | None = None,
  *,
  estimator: Estimator,
  is_boundary: Callable[[str], bool],
) -> GradFn:
  """`estimator` up to the boundary taps; the exact gradient after them.

  Reverse mode goes from the losses to the boundary, and gives the exact signal there. The
  estimator's forward derivatives stop at the boundary, which saves the computation after it.

  Args:
    learned: a control variate that learns, cut at the same boundary.
    estimator: `(fun, learned) -> grad_fn`.
    is_boundary: whether a tap belongs to the boundary, by name.

  >>> from lfg_jax.estimators.feedback import backprop
  >>> from lfg_jax.jaxpr.taps import tap
  >>> loss = lambda w, x: ((tap(x @ w['a'], 'y') * w['b']).sum(-1) ** 2, {})
  >>> w, x = {'a': jnp.ones((2, 2)), 'b': jnp.ones(2)}, jnp.eye(2)
  >>> exact = exact_tail(loss, estimator=lambda fun, _: backprop(fun), is_boundary='y'.__eq__)
  >>> jax.tree.leaves(exact(w, jax.random.key(0), x)[1])[1].tolist()
  [8.0, 8.0]
  """

  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, dict], PyTree]:
    tapped = Tapped(fun, params, *args)
    taps = {name: tap for name, tap in tapped.taps.items() if is_boundary(name)}

    def from_boundary(point: tuple[PyTree, dict], *args: Any) -> tuple[Losses, dict]:
      return tapped.evaluate(detach, point[1], point[0], *args)[0]

    zeros = {name: jnp.zeros(tap.shape, tap.dtype) for name, tap in taps.items()}
    behind_and_signal = jax.value_and_grad(objective(from_boundary), has_aux=True)
    (_, (losses, aux)), (behind, signal) = behind_and_signal((params, zeros), *args)

    cut = functools.partial(_up_to, taps, signal, losses.shape)
    own = learned and Learned(
      learned.weights, cut(functools.partial(Tapped, learned.loss)), _size_B(taps, signal)
    )
    (_, own_aux), before = estimator(cut(lambda *_: tapped), own)(params, key, *args)
    return (losses, {**aux, **own_aux}), jax.tree.map(jnp.add, behind, before)

  return run


def _up_to(
  taps: dict[str, Tap],
  signal: dict[str, jax.Array],
  shape: tuple[int, ...],
  trace: Callable[..., Tapped],
) -> LossFn:
  """The losses s·y with s fixed: before the boundary, they have the true losses' derivatives.

  Where the true losses' shape [B, P, G] has an axis of size 1, the parts of y are summed over it.
  """
  uncut = tuple(axis for axis, size in enumerate(shape) if size == 1)

  def record_boundary(eqn: Any, ins: list, given: bool | None) -> tuple[list, Any]:
    return record(eqn, ins, None) if given else (bind(eqn, ins), None)

  def fun(*args: Any) -> tuple[jax.Array, dict]:
    here = dict.fromkeys(taps, True)
    _, records = trace(*args).evaluate(record_boundary, here, *args)

    def one(name: str, tap: Tap) -> jax.Array:
      dot = upcast(signal[name]) * upcast(records[name])
      dot = dot.sum(tuple(range(tap.local_axes, tap.ndim)))
      return dot.sum(uncut, keepdims=True) if uncut else dot

    return functools.reduce(jnp.add, [one(name, tap) for name, tap in taps.items()]), {}

  return fun


def _size_B(taps: dict[str, Tap], signal: dict[str, jax.Array]) -> jax.Array:
  """|s|² of every example."""
  squares = [
    jnp.square(upcast(signal[name])).sum(tuple(range(1, tap.ndim))) for name, tap in taps.items()
  ]
  return functools.reduce(jnp.add, squares)
