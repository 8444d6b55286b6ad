"""Evaluation of a jaxpr that reaches into it for its taps: records them, perturbs them, replaces
their cotangents.

Taps are visited inside `jit`, `scan`, `remat` and `cond`. A tap in a scan is one tap, with the
scanned axis in front. Every call site has taps of its own, although JAX may share one jaxpr between
calls. Equations without a tap are bound as they are, so that functions with rules of their own keep
them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from lfg_jax.estimators.primitive import tap_p
from lfg_jax.estimators.taps import Tap, inject

# Primitives that are entered, by the names that JAX has had for them.
_CALLS = ('jit', 'pjit', 'closed_call', 'core_call')
_REMAT = ('remat2', 'remat', 'checkpoint')
_ENTERED = (*_CALLS, *_REMAT, 'scan', 'cond')

# `(z, active or None, given or None) -> (z, record)`; a record is a pytree of arrays.
Visit = Callable[[jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]


class Named(NamedTuple):
  """A tap of a jaxpr: its name, and shapes as `taps.Tap` has them."""
  name: str
  tap: Tap


class Walk(NamedTuple):
  """How a jaxpr is walked through.

  Attributes:
    checkpoint_names: whether values named by `jax.ad_checkpoint.checkpoint_name` are taps too.
  """
  checkpoint_names: bool = False

  def is_tap(self, eqn: Any) -> bool:
    if eqn.primitive is tap_p:
      return True
    return (self.checkpoint_names and eqn.primitive.name == 'name'
            and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating))

  def find(self, jaxpr: Any) -> list[Named]:
    """The taps of a jaxpr, in the order of evaluation.

    Raises:
      ValueError: a tap is inside a primitive that cannot be entered.
    """
    return [named for eqn in opened(jaxpr).eqns for named in self.find_in(eqn)]

  def find_in(self, eqn: Any) -> list[Named]:
    """The taps of one equation."""
    if self.is_tap(eqn):
      aval = eqn.outvars[0].aval
      shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
      local_axes = eqn.params.get('local_axes', 1)
      return [Named(eqn.params['name'], Tap(shape, len(shape.shape), local_axes))]
    found = [named for inner in inner_jaxprs(eqn) for named in self.find(inner)]
    name = eqn.primitive.name
    if found and name not in _ENTERED:
      raise ValueError(f'tap {found[0].name!r} is inside {name}; allowed: jit, scan, cond, '
                       f'checkpoint and vmap, or a tap on what comes out of {name}')
    if name == 'scan':
      return [Named(n, _scanned(t, eqn.params['length'])) for n, t in found]
    return found

  def run(self, jaxpr: Any, args: Sequence[Any], given: Sequence[Any], visit: Visit
          ) -> tuple[list, list]:
    """Evaluates a jaxpr.

    Args:
      given: for every tap what `visit` is handed, a pytree of arrays or None; in a scan with the
        scanned axis in front.
      visit: what is done at a tap.

    Returns:
      The outputs, and the record of every tap.
    """
    inner = opened(jaxpr)
    env = dict(zip(inner.constvars, getattr(jaxpr, 'consts', ()), strict=True))
    env.update(zip(inner.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    given, records = list(given), []
    for eqn in inner.eqns:
      count = len(self.find_in(eqn))
      own, given = given[:count], given[count:]
      ins = [read(v) for v in eqn.invars]
      # What the equation was traced under (matmul precision, a mesh, …) holds for it here too.
      with eqn.ctx.manager:
        outs, own_records = self._equation(eqn, ins, own, visit) if count else (_bind(eqn, ins), [])
      env.update(zip(eqn.outvars, outs, strict=True))
      records += own_records
    return [read(v) for v in inner.outvars], records

  def _equation(self, eqn: Any, ins: list, given: list, visit: Visit) -> tuple[list, list]:
    """An equation that is a tap or holds some."""
    name, params = eqn.primitive.name, eqn.params
    if self.is_tap(eqn):
      z, *active = ins if eqn.primitive is tap_p else _bind(eqn, ins)
      z, record = visit(z, active[0] if active else None, given[0])
      return [z], [record]
    if name == 'scan':
      return self._scan(params, ins, given, visit)
    if name == 'cond':
      return self._cond(params['branches'], ins, given, visit)
    (jaxpr,) = inner_jaxprs(eqn)
    body = lambda ins, given: self.run(jaxpr, ins, given, visit)
    if name in _REMAT:
      prevent = params['prevent_cse']    # in recent versions of JAX one for each input
      prevent = prevent if isinstance(prevent, bool) else any(prevent)
      body = jax.checkpoint(body, prevent_cse=prevent, policy=params['policy'])
    return body(ins, given)

  def _scan(self, params: dict, ins: list, given: list, visit: Visit) -> tuple[list, list]:
    """What is given goes in with the scanned inputs, records come out with the scanned outputs."""
    constants, carried = params['num_consts'], params['num_carry']
    consts, ins = ins[:constants], ins[constants:]
    init, xs = ins[:carried], ins[carried:]

    def body(carry: list, x: tuple[list, list]) -> tuple[list, tuple[list, list]]:
      outs, records = self.run(params['jaxpr'], [*consts, *carry, *x[0]], x[1], visit)
      return outs[:carried], (outs[carried:], records)

    options = {name: params[name] for name in ('length', 'reverse', 'unroll')}
    carry, (ys, records) = jax.lax.scan(body, init, (xs, given), **options)
    return [*carry, *ys], records

  def _cond(self, branches: Sequence[Any], ins: list, given: list, visit: Visit
            ) -> tuple[list, list]:
    """The taps of a branch that is not taken have a record of zero, and influence nothing."""
    index, *ins = ins
    counts = [len(self.find(branch)) for branch in branches]
    starts = [sum(counts[:n]) for n in range(len(branches))]

    def one(branch: Any, start: int, count: int) -> Callable:
      return lambda ins, given: self.run(branch, ins, given[start:start + count], visit)
    each = [one(*parts) for parts in zip(branches, starts, counts, strict=True)]
    shapes = [jax.eval_shape(branch, ins, given)[1] for branch in each]

    def padded(taken: int) -> Callable:
      def run(ins: list, given: list) -> tuple[list, list]:
        outs, own = each[taken](ins, given)
        records = [own if n == taken else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
                   for n, shape in enumerate(shapes)]
        return outs, [record for branch in records for record in branch]
      return run
    return jax.lax.switch(index, [padded(n) for n in range(len(branches))], ins, given)


def _scanned(tap: Tap, length: int) -> Tap:
  shape = jax.ShapeDtypeStruct((length, *tap.value.shape), tap.value.dtype)
  return Tap(shape, tap.ndim, tap.local_axes)


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
      found.append(str(opened(inner[0]).debug_info.func_name) if inner else 'unknown')
    else:
      found += [name for one in inner for name in backward_only(one)]
  return list(dict.fromkeys(found))


def _bind(eqn: Any, ins: list) -> list:
  params = eqn.primitive.get_bind_params(eqn.params)
  if isinstance(params, tuple):    # the form before jax 0.10.1: functions apart
    functions, params = params
    outs = eqn.primitive.bind(*functions, *ins, **params)
  else:
    outs = eqn.primitive.bind(*ins, **params)
  return outs if eqn.primitive.multiple_results else [outs]


# --- what is done at a tap
# --------------------------------------------------------------------------------------


def record(z: jax.Array, active: jax.Array | None, given: Any) -> tuple[jax.Array, jax.Array]:
  """Records its value."""
  del active, given
  return z, z


def perturb(z: jax.Array, active: jax.Array | None, given: Any) -> tuple[jax.Array, None]:
  """Adds what is given."""
  del active
  return z if given is None else z + given.astype(z.dtype), None


def replace_cotangent(z: jax.Array, active: jax.Array | None, given: Any) -> tuple[jax.Array, None]:
  """Replaces the cotangent by the signal that is given."""
  if given is None:
    return z, None
  return inject(z, (given if active is None else jnp.where(active, given, 0)).astype(z.dtype)), None
