"""Which losses a tap can influence, read from the jaxpr: do examples influence each other's losses?

An activity of one example that moves the losses of others (batch norm in training, a contrastive
loss) must be credited with those losses, or its estimate is biased. This module follows axes of the
taps (the examples, or parts of them) through the equations up to the losses, all in one pass over them. A
value has a label for every followed axis:

* None: it does not depend on the tap.
* Digits: some axis of the value has the entries of the examples; each entry depends on its own
  example only. (The axis may be longer: after a reshape [B, T] -> [B T], T consecutive entries
  belong to one example. The examples may lie on several axes: after [6] -> [2, 3], on two.)
* `Mixed`: it depends on several examples, or the equation cannot be read.

"Depends" is meant in terms of derivatives: nothing passes a `stop_gradient` or an integer.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.jaxpr import _compat
from lfg_jax.jaxpr._compat import Literal, bind
from lfg_jax.jaxpr.dependence_rules import Digit, Label, Mixed, join, moved, unread
from lfg_jax.jaxpr.interpreter import Interpreter, inner_jaxprs, opened

# The followed axes that have a label, as the bits of a number. Most values have one label for all.
Labels = dict[Label, int]

_IN_PLACE = ('optimization_barrier', 'device_put')  # each output is an input


class Influence:
  """Follows axes of taps.

  Attributes:
    interpreter: what counts as a tap.
  """

  def __init__(self, interpreter: Interpreter) -> None:
    self.interpreter = interpreter
    self._derivatives: dict[int, Any] = {}

  def of(self, jaxpr: Any, axes: Sequence[Sequence[tuple[int, int]]]) -> list[list[list[Label]]]:
    """The labels of every output.

    Args:
      axes: for each tap, the axes to follow, of the tap as the function sees it (without scanned
        axes), and their sizes.

    Returns:
      For every output and tap, the labels of its axes.
    """
    numbers = itertools.count()
    bits = [[1 << next(numbers) for _ in own] for own in axes]
    seeds: list[Labels] = [
      {(Digit(*axis),): bit for axis, bit in zip(own, of_tap, strict=True)}
      for own, of_tap in zip(axes, bits, strict=True)
    ]
    outs = self._jaxpr(jaxpr, [{} for _ in opened(jaxpr).invars], seeds)
    one = lambda labels, bit: next((label for label, own in labels.items() if own & bit), None)
    return [[[one(labels, bit) for bit in of_tap] for of_tap in bits] for labels in outs]

  def _jaxpr(self, jaxpr: Any, ins: Sequence[Labels], seeds: list[Labels]) -> list[Labels]:
    inner = opened(jaxpr)
    env: dict[Any, Labels] = {v: {} for v in inner.constvars}
    env.update(zip(inner.invars, ins, strict=True))
    read = lambda v: {} if isinstance(v, Literal) else env[v]
    for eqn in inner.eqns:
      count = self.interpreter.count(eqn)
      own, seeds = seeds[:count], seeds[count:]
      before = [read(v) for v in eqn.invars]
      labels = self._equation(eqn, before, own) if own or any(before) else [{}] * len(eqn.outvars)
      env.update(
        (v, each if _has_derivative(v) else {}) for v, each in zip(eqn.outvars, labels, strict=True)
      )
    return [read(v) for v in inner.outvars]

  def _equation(self, eqn: Any, ins: list[Labels], seeds: list[Labels]) -> list[Labels]:
    name, outs = eqn.primitive.name, len(eqn.outvars)
    if self.interpreter.is_visited(eqn):
      return [_joined('a scan', [seeds[0], ins[0]])]
    if name == 'stop_gradient':
      return [{}] * outs
    unknown = unread(eqn)
    enter = None if unknown else self._entered(name)
    if enter:
      return enter(eqn, ins, seeds)
    if seeds:  # what comes out may depend on the taps inside in any way
      ins = [_mapped(_joined(name, [*ins, *seeds]), lambda _: Mixed(unknown or name, False))]
      return ins * outs
    return [_combined(ins, lambda labels: moved(eqn, labels))] * outs

  def _entered(self, name: str) -> Callable | None:
    own = {
      'scan': self._scan,
      'while': self._while,
      'cond': self._cond,
      'custom_jvp_call': self._own_derivative,
      'custom_linear_solve': self._linear_solve,
      'custom_vjp_call': self._call,
      **dict.fromkeys((*_compat.CALLS, *_compat.REMAT), self._call),
      **dict.fromkeys(_IN_PLACE, lambda eqn, ins, seeds: ins),
    }
    return own.get(name)

  def _call(self, eqn: Any, ins: list[Labels], seeds: list[Labels]) -> list[Labels]:
    return self._jaxpr(inner_jaxprs(eqn)[0], ins, seeds)

  def _own_derivative(self, eqn: Any, ins: list[Labels], seeds: list[Labels]) -> list[Labels]:
    """A function with its own derivative rule: what counts is the rule, not the value."""
    moves, moved = ([_has_derivative(v) for v in side] for side in (eqn.invars, eqn.outvars))
    if id(eqn) not in self._derivatives:
      self._derivatives[id(eqn)] = _derivative(eqn, moves, moved)
    tangents = list(itertools.compress(ins, moves))
    labels = self._jaxpr(self._derivatives[id(eqn)], [{} for _ in ins] + tangents, seeds)
    remaining = iter(labels)
    return [next(remaining) if m else {} for m in moved]

  def _linear_solve(self, eqn: Any, ins: list[Labels], seeds: list[Labels]) -> list[Labels]:
    """The solver tells where b goes. A matrix that moves moves b, says the derivative."""
    lengths, solve = eqn.params['const_lengths'], eqn.params['jaxprs'].solve
    if any(ins[: sum(lengths)]):
      return self._own_derivative(eqn, ins, seeds)
    constants: list[Labels] = [{} for _ in range(lengths.solve)]
    return self._jaxpr(solve, [*constants, *ins[sum(lengths) :]], seeds)

  def _scan(self, eqn: Any, ins: list[Labels], seeds: list[Labels]) -> list[Labels]:
    """Inside, the scanned axis has the number -1; the numbers of scans around it go down."""
    constants, carried = _compat.scan_counts(eqn.params)
    around = [_renumbered(labels, lambda a: a - (a < 0)) for labels in ins[: constants + carried]]
    scanned = [_renumbered(labels, lambda a: a - 1) for labels in ins[constants + carried :]]

    def body(carry: list[Labels]) -> list[Labels]:
      return self._jaxpr(eqn.params['jaxpr'], [*around[:constants], *carry, *scanned], seeds)

    after = lambda labels: _mapped(
      labels, lambda label: Mixed('scan', True) if -1 in _axes(label) else label
    )
    carry = _fixed_point(lambda carry: [*map(after, body(carry)[:carried])], around[constants:])
    outs = [_renumbered(labels, lambda a: a + (a < 0)) for labels in carry]
    return outs + [_renumbered(labels, lambda a: a + 1) for labels in body(carry)[carried:]]

  def _while(self, eqn: Any, ins: list[Labels], seeds: list[Labels]) -> list[Labels]:
    first, second = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
    consts, carry = ins[first : first + second], ins[first + second :]
    body = lambda carry: self._jaxpr(eqn.params['body_jaxpr'], [*consts, *carry], seeds)
    return _fixed_point(body, carry)

  def _cond(self, eqn: Any, ins: list[Labels], seeds: list[Labels]) -> list[Labels]:
    outs = []
    for branch in eqn.params['branches']:
      count = len(self.interpreter.find(branch))
      own, seeds = seeds[:count], seeds[count:]
      outs.append(self._jaxpr(branch, ins[1:], own))
    return [_joined('cond', labels) for labels in zip(*outs, strict=True)]


def _derivative(eqn: Any, moves: list[bool], moved: list[bool]) -> Any:
  """The jaxpr of an equation's derivative, of its inputs and the tangents of those that move."""
  shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]

  def derivative(values: list, tangents: list) -> list:
    def of_moving(*moving: jax.Array) -> list:
      remaining = iter(moving)
      ins = [next(remaining) if m else value for m, value in zip(moves, values, strict=True)]
      return list(itertools.compress(bind(eqn, ins), moved))

    return jax.jvp(of_moving, tuple(itertools.compress(values, moves)), tuple(tangents))[1]

  return jax.make_jaxpr(derivative)(shapes, list(itertools.compress(shapes, moves)))


def _has_derivative(v: Any) -> bool:
  return jnp.issubdtype(getattr(v.aval, 'dtype', jnp.int32), jnp.inexact)


def _fixed_point(body: Callable[[list[Labels]], list[Labels]], carry: list[Labels]) -> list[Labels]:
  """Labels of a loop's carry. They only go from None to an axis to `Mixed`, so this terminates."""
  while True:
    after = [_joined('scan', pair) for pair in zip(carry, body(carry), strict=True)]
    if after == carry:
      return carry
    carry = after


def _combined(ins: Iterable[Labels], rule: Callable[[tuple[Label, ...]], Label]) -> Labels:
  """The rule's label for all followed axes, evaluated once for those with the same labels."""
  ins = list(ins)
  classes: dict[tuple[Label, ...], int] = {(): functools.reduce(operator.or_, _bits(ins), 0)}
  for labels in ins:
    parts: dict[tuple[Label, ...], int] = {}
    for before, bits in classes.items():
      for label, own in labels.items():
        if bits & own:
          parts[*before, label] = bits & own
          bits &= ~own
      if bits:
        parts[*before, None] = bits
    classes = parts
  out: Labels = {}
  for before, bits in classes.items():
    label = rule(before)
    out[label] = out.get(label, 0) | bits
  return out


def _bits(ins: Sequence[Labels]) -> Iterable[int]:
  return (bits for labels in ins for bits in labels.values())


def _joined(name: str, ins: Sequence[Labels]) -> Labels:
  return _combined(ins, lambda labels: join(name, labels))


def _mapped(labels: Labels, to: Callable[[Label], Label]) -> Labels:
  return _combined([labels], lambda label: to(label[0]))


def _renumbered(labels: Labels, to: Callable[[int], int]) -> Labels:
  digits = lambda label: tuple(d._replace(axis=to(d.axis)) for d in label)
  return _mapped(labels, lambda label: label if isinstance(label, Mixed) else digits(label))


def _axes(label: Label) -> list[int]:
  return [] if label is None or isinstance(label, Mixed) else [digit.axis for digit in label]
