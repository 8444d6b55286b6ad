"""Derivatives of a function along tangents: by `jax.jvp`, or by finite differences.

All have the form `derivative(fn, x, in_chunks) -> along`, where `along(v)` is the derivative of
everything that `fn` returns, at x along v. `in_chunks` says that `along` will be called for several
chunks of tangents, one after the other.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.jaxpr import _compat
from lfg_jax.jaxpr.interpreter import Interpreter

PyTree = Any
Along = Callable[[PyTree], PyTree]
Derivative = Callable[[Callable[[PyTree], PyTree], PyTree, bool], Along]


def along_each(along: Along, v_K: PyTree) -> PyTree:
  """along(v) for K tangents, [K, ...]. One tangent needs no `vmap`: not everything has a rule for it.

  >>> along_each(lambda v: 3 * v, jax.numpy.ones(1)).tolist()
  [3.0]
  """
  if jax.tree.leaves(v_K)[0].shape[0] > 1:
    return jax.vmap(along)(v_K)
  return jax.tree.map(
    lambda d: d[None], along(jax.tree.map(lambda v: jax.lax.squeeze(v, [0]), v_K))
  )


def jvp_derivative(fn: Callable[[PyTree], PyTree], x: PyTree, in_chunks: bool = False) -> Along:
  """Exact, by `jax.jvp`; for several chunks by `jax.linearize`, which stores what they share.

  >>> jvp_derivative(lambda x: x ** 3, 2.0)(1.0).item()
  12.0
  """
  if in_chunks:
    return jax.linearize(fn, x)[1]
  return lambda v: jax.jvp(fn, (x,), (v,))[1]


def recomputed_jvp(fn: Callable[[PyTree], PyTree], x: PyTree, in_chunks: bool = False) -> Along:
  """Exact, by `jax.jvp`. Every chunk evaluates `fn` again, and nothing is stored in between."""

  def along(v: PyTree) -> PyTree:
    # The barrier makes the evaluation depend on the chunk. Otherwise XLA would move it out of the
    # loop and store all of it.
    start, v = jax.lax.optimization_barrier((x, v)) if in_chunks else (x, v)
    return jax.jvp(fn, (start,), (v,))[1]

  return along


def finite_difference(step: float = 1e-3, *, two_sided: bool = False) -> Derivative:
  """(fn(x + εv) - fn(x)) / ε, the classical baseline; it does not differentiate `fn`.

  Values behind `jax.lax.stop_gradient` stay as they are at x, as with `jax.jvp`. Functions with
  their own derivative rule are evaluated as they are.

  Args:
    step: ε. The result is off by O(ε), two-sided by O(ε²), and by rounding divided by ε.
    two_sided: (fn(x + εv) - fn(x - εv)) / 2ε. Along ±1 tangents this is SPSA (Spall 1992), along
      normal ones the antithetic estimate of evolution strategies (Salimans et al. 2017).

  Raises:
    ValueError: `step` is not positive and finite, or an argument or result has fewer digits than
      float32: rounding would hide the difference.

  >>> f = lambda x: x * jax.lax.stop_gradient(x)
  >>> round(finite_difference(1e-2)(f, 3.0, False)(1.0).item(), 3)
  3.0
  >>> one, two = (finite_difference(0.5, two_sided=both)(jnp.square, 3.0) for both in (False, True))
  >>> one(1.0).item(), two(1.0).item()
  (6.5, 6.0)
  """
  if not 0 < step < math.inf:
    raise ValueError(f'the step of finite differences is {step!r}; allowed: more than 0, finite')

  def derivative(fn: Callable[[PyTree], PyTree], x: PyTree, in_chunks: bool = False) -> Along:
    del in_chunks
    jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(x)
    _check_digits((x, shape))
    treedef, count = jax.tree.structure(shape), len(_GUARDS.find(jaxpr))
    start, guarded = _GUARDS.run(jaxpr, jax.tree.leaves(x), [None] * count, _record)

    def moved(v: PyTree, by: float) -> list:
      there = jax.tree.map(lambda x, v: x + by * v, x, v)
      return _GUARDS.run(jaxpr, jax.tree.leaves(there), guarded, _put_back)[0]

    def along(v: PyTree) -> PyTree:
      before, width = (moved(v, -step), 2 * step) if two_sided else (start, step)
      differences = [(e - s) / width for e, s in zip(moved(v, step), before, strict=True)]
      return jax.tree.unflatten(treedef, differences)

    return along

  return derivative


def _check_digits(values: PyTree) -> None:
  for leaf in jax.tree.leaves(values):
    if jnp.finfo(jnp.result_type(leaf)).bits < 32:
      raise ValueError(
        f'finite differences of {jnp.result_type(leaf)}, whose rounding hides them; allowed: float32 '
        'or float64'
      )


_GUARDS = Interpreter(
  lambda eqn: eqn.primitive.name == 'stop_gradient',
  lambda eqn, name: (
    f'a stop_gradient is inside {name}, where finite differences cannot keep its '
    'value; allowed: jit, scan, cond, checkpoint and vmap, or derivatives by '
    'jax.jvp'
  ),
  _compat.OWN_RULES,
)


def _record(eqn: Any, ins: list, given: Any) -> tuple[list, jax.Array]:
  del given
  (value,) = _compat.bind(eqn, ins)
  return [value], value


def _put_back(eqn: Any, ins: list, given: jax.Array) -> tuple[list, None]:
  del eqn, ins
  return [given], None
