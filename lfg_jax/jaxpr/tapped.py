"""A loss function as a jaxpr: its taps, and its value with some action at each tap."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.jaxpr._compat import CHECKPOINT_NAME, bind
from lfg_jax.jaxpr.interpreter import Found, Interpreter, Visit
from lfg_jax.jaxpr.taps import Tap, inject, inject_at, tap_p

PyTree = Any


class Tapped:
  """`fun(*args)`, traced once.

  Attributes:
    jaxpr: of `fun`, as a function of the leaves of `args`.
    taps: all taps by name, in order of evaluation. Calls with the same name are numbered: `h`,
      `h_1`, ….
    call_names: for each tap, the name with which `tap` was called.

  >>> from lfg_jax.jaxpr.taps import tap
  >>> double = Tapped(lambda x: tap(2 * x, 'double') ** 2, jnp.ones(3))
  >>> double.taps['double'].shape
  (3,)
  >>> double.evaluate(perturb, {'double': jnp.ones(3)}, jnp.ones(3))[0].tolist()
  [9.0, 9.0, 9.0]
  """

  def __init__(self, fun: Callable, *args: Any, checkpoint_names: bool = False) -> None:
    self.jaxpr, self.shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    self.interpreter = _WITH_CHECKPOINT_NAMES if checkpoint_names else _TAPS
    found = self.interpreter.find(self.jaxpr)
    names = _unique([one.eqn.params['name'] for one in found])
    self.taps = {name: _tap(one) for name, one in zip(names, found, strict=True)}
    self.call_names = {name: one.eqn.params['name'] for name, one in zip(names, found, strict=True)}

  def evaluate(
    self, visit: Visit, given: Mapping[str, Any], *args: Any
  ) -> tuple[Any, dict[str, Any]]:
    """What `fun` returns for `args` (of the traced shapes), and the record of every tap.

    Args:
      visit: the action at a tap, one of the functions below.
      given: what `visit` is given at each tap; None where missing.
    """
    of_taps = [jax.tree.map(tap.inside, given.get(name)) for name, tap in self.taps.items()]
    outs, records = self.interpreter.run(self.jaxpr, jax.tree.leaves(args), of_taps, visit)
    out = jax.tree.unflatten(jax.tree.structure(self.shape), outs)
    named = zip(self.taps.items(), records, strict=True)
    return out, {name: jax.tree.map(tap.outside, record) for (name, tap), record in named}


def without_taps(fun: Callable) -> Callable:
  """`fun`, whose taps no estimator finds: it is differentiated exactly.

  >>> from lfg_jax.jaxpr.taps import tap
  >>> Tapped(without_taps(lambda x: tap(x, 'x') ** 2), jnp.ones(3)).taps
  {}
  """
  return lambda *args: Tapped(fun, *args).evaluate(perturb, {}, *args)[0]


def keep(eqn: Any, ins: list, given: Any) -> tuple[list, None]:
  """Leaves the tap in place for another estimator."""
  del given
  return bind(eqn, ins), None


def record(eqn: Any, ins: list, given: Any) -> tuple[list, jax.Array]:
  """Records the activity."""
  del given
  z = _activity(eqn, ins)
  return [z], z


def perturb(eqn: Any, ins: list, given: jax.Array | None) -> tuple[list, None]:
  """Adds what is given. `jax.jvp` with respect to it tells how the activity moves the losses."""
  z = _activity(eqn, ins)
  return [z if given is None else z + given.astype(z.dtype)], None


def detach(eqn: Any, ins: list, given: jax.Array | None) -> tuple[list, None]:
  """Like `perturb`, but nothing before the tap has a gradient through it."""
  if given is None:
    return [_activity(eqn, ins)], None
  return perturb(eqn, [jax.lax.stop_gradient(x) for x in ins], given)


def replace_cotangent(eqn: Any, ins: list, given: jax.Array | None) -> tuple[list, None]:
  """Replaces the cotangent that arrives at the tap in the reverse sweep with the given signal."""
  z = _activity(eqn, ins)
  if given is None:
    return [z], None
  further = dict(zip(eqn.params.get('further', ()), ins[1:], strict=False))
  signal = jnp.where(further['active'], given, 0) if 'active' in further else given
  signal = signal.astype(z.dtype)
  if 'source' in further:
    return [inject_at(further['source'], z, signal)], None
  return [inject(z, signal)], None


def _activity(eqn: Any, ins: list) -> jax.Array:
  return ins[0] if eqn.primitive is tap_p else bind(eqn, ins)[0]


def _is_tap(eqn: Any) -> bool:
  return eqn.primitive is tap_p


def _is_tap_or_checkpoint_name(eqn: Any) -> bool:
  return _is_tap(eqn) or (
    eqn.primitive.name == CHECKPOINT_NAME and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
  )


def _refused(eqn: Any, primitive: str) -> str:
  return (
    f'tap {eqn.params["name"]!r} is inside {primitive}; allowed: jit, scan, cond, '
    f'checkpoint and vmap, or a tap on what comes out of {primitive}'
  )


_TAPS = Interpreter(_is_tap, _refused)
_WITH_CHECKPOINT_NAMES = Interpreter(_is_tap_or_checkpoint_name, _refused)


def _tap(found: Found) -> Tap:
  aval = found.eqn.outvars[0].aval
  declared = found.eqn.params.get('local_axes', 1)
  is_auto = declared == 'auto'
  shape = (*found.lengths, *aval.shape)
  return Tap(shape, aval.dtype, aval.ndim, 1 if is_auto else declared, is_auto)


def _unique(names: list[str]) -> list[str]:
  """The names, with numbers appended to repeated ones.

  >>> _unique(['h', 'h_1', 'h', 'h'])
  ['h', 'h_1', 'h_2', 'h_3']
  """
  unique, given, counts = {}, set(names), collections.Counter()  # type: ignore[var-annotated]
  for name in names:
    new = name
    while new in unique or (counts[name] and new in given):
      counts[name] += 1
      new = f'{name}_{counts[name]}'
    unique[new] = None
  return list(unique)
