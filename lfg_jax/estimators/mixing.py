"""Which losses a tap can influence, read from the jaxpr: do examples influence each other's losses?

An activity of one example that moves the losses of others (batch norm in training, a contrastive
loss) must be credited with those losses, or its estimate is biased. This module follows one axis of
the taps (the examples, or parts of them) through the equations up to the losses. Each value has a
label:

* None: it does not depend on the taps.
* An int: the axis along which its entries belong to the examples; each entry depends on its own
  example only. (The axis may be longer: after a reshape [B, T] -> [B T], T consecutive entries
  belong to one example.)
* `Mixed`: it depends on several examples, or the primitive is unknown.

"Depends" is meant in terms of derivatives: nothing passes a `stop_gradient` or an integer.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from lfg_jax.estimators.mixing_rules import Label, Mixed, join, moved
from lfg_jax.estimators.walk import Walk, bind, inner_jaxprs, opened, scan_counts

# fmt: off
_CALLS = ('jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'remat', 'checkpoint',
          'custom_vjp_call')
# fmt: on


class Influence(NamedTuple):
  """Follows one axis of some taps.

  Attributes:
    walk: what counts as a tap.
    axis, size: the followed axis, of the taps as the function sees them (without scanned axes).
  """

  walk: Walk
  axis: int
  size: int

  def of(self, jaxpr: Any, seeds: Sequence[bool]) -> list[Label]:
    """Labels of the outputs of a jaxpr; `seeds` says for each tap whether to follow it."""
    return self._jaxpr(jaxpr, [None] * len(opened(jaxpr).invars), list(seeds))

  def _jaxpr(self, jaxpr: Any, ins: Sequence[Label], seeds: list[bool]) -> list[Label]:
    inner = opened(jaxpr)
    env: dict[Any, Label] = dict.fromkeys(inner.constvars)
    env.update(zip(inner.invars, ins, strict=True))
    read = lambda v: None if isinstance(v, Literal) else env[v]
    for eqn in inner.eqns:
      count = len(self.walk.find_in(eqn))
      own, seeds = seeds[:count], seeds[count:]
      labels = self._equation(eqn, [read(v) for v in eqn.invars], own)
      env.update(
        (v, label if _has_derivative(v) else None)
        for v, label in zip(eqn.outvars, labels, strict=True)
      )
    return [read(v) for v in inner.outvars]

  def _equation(self, eqn: Any, ins: list[Label], seeds: list[bool]) -> list[Label]:
    name, outs = eqn.primitive.name, len(eqn.outvars)
    if self.walk.is_visited(eqn):
      return [self.axis if seeds[0] else ins[0]]
    if name == 'stop_gradient' or not (any(seeds) or any(label is not None for label in ins)):
      return [None] * outs
    if name == 'scan':
      return self._scan(eqn.params, ins, seeds)
    if name == 'while':
      return self._while(eqn.params, ins)
    if name == 'cond':
      return self._cond(eqn.params['branches'], ins[1:], seeds)
    if name in _CALLS:
      return self._jaxpr(inner_jaxprs(eqn)[0], ins, seeds)
    if name == 'custom_jvp_call':
      return self._own_derivative(eqn, ins)
    if name == 'optimization_barrier':
      return ins
    mixed = next((label for label in ins if isinstance(label, Mixed)), None)
    return [mixed or moved(eqn, ins, self.size)] * outs

  def _own_derivative(self, eqn: Any, ins: list[Label]) -> list[Label]:
    """A function with its own derivative rule: what counts is the rule, not the value."""
    moves = [_has_derivative(v) for v in eqn.invars]
    moved = [_has_derivative(v) for v in eqn.outvars]
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]

    def derivative(values: list, tangents: list) -> list:
      def of_moving(*moving: jax.Array) -> list:
        remaining = iter(moving)
        outs = bind(
          eqn, [next(remaining) if m else value for m, value in zip(moves, values, strict=True)]
        )
        return list(itertools.compress(outs, moved))

      return jax.jvp(of_moving, tuple(itertools.compress(values, moves)), tuple(tangents))[1]

    jaxpr = jax.make_jaxpr(derivative)(shapes, list(itertools.compress(shapes, moves)))
    labels = iter(self._jaxpr(jaxpr, [None] * len(ins) + list(itertools.compress(ins, moves)), []))
    return [next(labels) if m else None for m in moved]

  def _scan(self, params: dict, ins: list[Label], seeds: list[bool]) -> list[Label]:
    constants, carried = scan_counts(params)
    consts, ins = ins[:constants], ins[constants:]
    carry, xs = ins[:carried], ins[carried:]
    inside = [Mixed('scan', True) if x == 0 else x - 1 if isinstance(x, int) else x for x in xs]
    body = lambda carry: self._jaxpr(params['jaxpr'], [*consts, *carry, *inside], seeds)
    carry = _fixed_point(lambda carry: body(carry)[:carried], carry)
    return carry + [y + 1 if isinstance(y, int) else y for y in body(carry)[carried:]]

  def _while(self, params: dict, ins: list[Label]) -> list[Label]:
    first, second = params['cond_nconsts'], params['body_nconsts']
    consts, carry = ins[first : first + second], ins[first + second :]
    body = lambda carry: self._jaxpr(params['body_jaxpr'], [*consts, *carry], [])
    return _fixed_point(body, carry)

  def _cond(self, branches: Sequence[Any], ins: list[Label], seeds: list[bool]) -> list[Label]:
    outs = []
    for branch in branches:
      count = len(self.walk.find(branch))
      own, seeds = seeds[:count], seeds[count:]
      outs.append(self._jaxpr(branch, ins, own))
    return [join('cond', labels) for labels in zip(*outs, strict=True)]


def _has_derivative(v: Any) -> bool:
  return jnp.issubdtype(getattr(v.aval, 'dtype', jnp.int32), jnp.inexact)


def _fixed_point(body: Callable[[list[Label]], list[Label]], carry: list[Label]) -> list[Label]:
  """Labels of a loop's carry. They only go from None to an axis to `Mixed`, so this terminates."""
  while True:
    after = [join('scan', pair) for pair in zip(carry, body(carry), strict=True)]
    if after == carry:
      return carry
    carry = after
