"""Evaluates a jaxpr while visiting some of its equations, to record or replace them.

Equations are visited inside `jit`, `scan`, `remat` and `cond`. An equation in a scan is visited
once; everything recorded there or handed in has the scanned axis in front. Every call has its own
equations, although JAX may share one jaxpr between calls. All other equations are bound as they
are, so functions with their own derivative rules keep them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.jaxpr import _compat
from lfg_jax.jaxpr._compat import ClosedJaxpr, Jaxpr, Literal, bind

_ENTERED = (*_compat.CALLS, *_compat.REMAT, 'scan', 'cond')

# `(equation, its inputs, given) -> (its outputs, record)`; a record is a pytree of arrays.
Visit = Callable[[Any, list, Any], tuple[list, Any]]


class Found(NamedTuple):
  """An equation, and the lengths of the scans around it, outermost first."""

  eqn: Any
  lengths: tuple[int, ...] = ()


class Interpreter(NamedTuple):
  """Which equations to visit.

  Attributes:
    is_visited: whether to visit an equation.
    refused: `(equation, primitive) -> message` of the ValueError for an equation inside a primitive
      that cannot be entered.
    ignored: names of primitives inside which equations are not visited.
  """

  is_visited: Callable[[Any], bool]
  refused: Callable[[Any, str], str]
  ignored: tuple[str, ...] = ()

  def find(self, jaxpr: Any) -> list[Found]:
    """All visited equations, in order of evaluation.

    Raises:
      ValueError: one is inside a primitive that cannot be entered.
    """
    return [found for eqn in opened(jaxpr).eqns for found in self.find_in(eqn)]

  def find_in(self, eqn: Any) -> list[Found]:
    """The equation itself if visited, or the visited ones inside it."""
    if self.is_visited(eqn):
      return [Found(eqn)]
    name = eqn.primitive.name
    if name in self.ignored:
      return []
    found = [one for inner in inner_jaxprs(eqn) for one in self.find(inner)]
    if found and name not in _ENTERED:
      raise ValueError(self.refused(found[0].eqn, name))
    if name == 'scan':
      return [Found(one.eqn, (eqn.params['length'], *one.lengths)) for one in found]
    return found

  def count(self, eqn: Any) -> int:
    """How many equations are visited in this one."""
    return len(self.find_in(eqn))

  def run(
    self, jaxpr: Any, args: Sequence[Any], given: Sequence[Any], visit: Visit
  ) -> tuple[list, list]:
    """Evaluates a jaxpr.

    Args:
      given: what `visit` is given for every visited equation, a pytree of arrays or None; in a
        scan, with the scanned axis in front.
      visit: the action at a visited equation.

    Returns:
      The outputs, and the record of every visited equation.
    """
    inner = opened(jaxpr)
    env = dict(zip(inner.constvars, getattr(jaxpr, 'consts', ()), strict=True))
    env.update(zip(inner.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    given, records = list(given), []
    for eqn in inner.eqns:
      count = self.count(eqn)
      own, given = given[:count], given[count:]
      ins = [read(v) for v in eqn.invars]
      with _compat.traced_context(eqn):
        outs, own_records = self._equation(eqn, ins, own, visit) if count else (bind(eqn, ins), [])
      env.update(zip(eqn.outvars, outs, strict=True))
      records += own_records
    return [read(v) for v in inner.outvars], records

  def _equation(self, eqn: Any, ins: list, given: list, visit: Visit) -> tuple[list, list]:
    """An equation that is visited or contains visited ones."""
    name, params = eqn.primitive.name, eqn.params
    if self.is_visited(eqn):
      outs, record = visit(eqn, ins, given[0])
      return outs, [record]
    if name == 'scan':
      return self._scan(params, ins, given, visit)
    if name == 'cond':
      return self._cond(params['branches'], ins, given, visit)
    (jaxpr,) = inner_jaxprs(eqn)
    body = lambda ins, given: self.run(jaxpr, ins, given, visit)
    if name in _compat.REMAT:
      prevent = _compat.prevents_cse(params)
      body = jax.checkpoint(body, prevent_cse=prevent, policy=params['policy'])
    return body(ins, given)

  def _scan(self, params: dict, ins: list, given: list, visit: Visit) -> tuple[list, list]:
    """`given` goes in with the scanned inputs; records come out with the scanned outputs."""
    constants, carried = _compat.scan_counts(params)
    consts, ins = ins[:constants], ins[constants:]
    init, xs = ins[:carried], ins[carried:]

    def body(carry: list, x: tuple[list, list]) -> tuple[list, tuple[list, list]]:
      outs, records = self.run(params['jaxpr'], [*consts, *carry, *x[0]], x[1], visit)
      return outs[:carried], (outs[carried:], records)

    options = {name: params[name] for name in ('length', 'reverse', 'unroll')}
    carry, (ys, records) = jax.lax.scan(body, init, (xs, given), **options)
    return [*carry, *ys], records

  def _cond(
    self, branches: Sequence[Any], ins: list, given: list, visit: Visit
  ) -> tuple[list, list]:
    """Equations in a branch that is not taken have a zero record and no influence."""
    index, *ins = ins
    counts = [len(self.find(branch)) for branch in branches]
    starts = [sum(counts[:n]) for n in range(len(branches))]

    def one(branch: Any, start: int, count: int) -> Callable:
      return lambda ins, given: self.run(branch, ins, given[start : start + count], visit)

    each = [one(*parts) for parts in zip(branches, starts, counts, strict=True)]
    shapes = [jax.eval_shape(branch, ins, given)[1] for branch in each]

    def padded(taken: int) -> Callable:
      def run(ins: list, given: list) -> tuple[list, list]:
        outs, own = each[taken](ins, given)
        records = [
          own if n == taken else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
          for n, shape in enumerate(shapes)
        ]
        return outs, [record for branch in records for record in branch]

      return run

    return jax.lax.switch(index, [padded(n) for n in range(len(branches))], ins, given)


def opened(jaxpr: Any) -> Jaxpr:
  """A jaxpr without its constants."""
  return getattr(jaxpr, 'jaxpr', jaxpr)


def inner_jaxprs(eqn: Any) -> list[Any]:
  """All jaxprs among an equation's parameters."""
  is_jaxpr = lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
  return list(filter(is_jaxpr, jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)))


def backward_only(jaxpr: Any) -> list[str]:
  """Names of the functions in a jaxpr that have a `custom_vjp`."""
  found = []
  for eqn in opened(jaxpr).eqns:
    inner = inner_jaxprs(eqn)
    if eqn.primitive.name.startswith('custom_vjp_call'):
      found.append(_compat.function_name(opened(inner[0])) if inner else 'unknown')
    else:
      found += [name for one in inner for name in backward_only(one)]
  return list(dict.fromkeys(found))
