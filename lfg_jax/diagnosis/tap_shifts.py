"""A function with a zero shift before every tap, which turns signals into gradients.

The gradient with respect to a shift before a tap is the signal that the tap receives. So
`value_and_activity_grad` of this function gives the estimates of all signals, `jax.grad` the exact
signals, and its derivatives along a shift show what a tap influences. This is all that `diagnose`
needs to know about a function.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.diagnosis.influence import Declared
from lfg_jax.estimators._arguments import bind, with_aux
from lfg_jax.estimators.activity_gradient import credited, perturbed_taps, value_and_activity_grad
from lfg_jax.jaxpr._compat import bind as bind_equation
from lfg_jax.jaxpr.dependence import Influence
from lfg_jax.jaxpr.tapped import Tapped

PyTree = Any


def _shift(eqn: Any, ins: list, given: jax.Array | None) -> tuple[list, None]:
  """Adds a shift before a tap, and leaves the tap in place."""
  if given is None:
    return bind_equation(eqn, ins), None
  # Where the signal goes.
  moved = (
    {0, 1 + eqn.params['further'].index('source')}
    if ('source' in eqn.params.get('further', ()))
    else {0}
  )
  ins = [x + given.astype(x.dtype) if n in moved else x for n, x in enumerate(ins)]
  return bind_equation(eqn, ins), None


class TapShifts(NamedTuple):
  """A function of shifts before its taps and of its differentiated arguments.

  Attributes:
    tapped: the function of the differentiated arguments.
    point: their values.
    taps: the perturbed taps.
    options: of `value_and_activity_grad`.
  """

  tapped: Tapped
  point: PyTree
  taps: list[Declared]
  options: dict[str, Any]

  @property
  def losses(self) -> PyTree:
    """Shapes of what the function returns."""
    return self.tapped.shape[0]

  def __call__(self, shifts: list[jax.Array], point: PyTree) -> PyTree:
    """The losses."""
    given = {t.name: x for t, x in zip(self.taps, shifts, strict=True)}
    return self.tapped.evaluate(_shift, given, point)[0][0]

  @property
  def zeros(self) -> list[jax.Array]:
    """Shifts of zero."""
    return [jnp.zeros((*t.scanned, *t.shape), t.dtype) for t in self.taps]

  def derivative(self, point: PyTree, shifts: list[jax.Array]) -> dict[str, jax.Array]:
    """Derivatives [n, ...] of the losses, by name, along n shifts of every tap."""
    losses = lambda shifts: jax.tree.leaves(self(shifts, point))
    along = lambda u: jax.jvp(losses, (self.zeros,), (u,))[1]
    return dict(zip(named(self.losses, 'the losses'), jax.lax.map(along, shifts), strict=True))

  def exact(self) -> list[jax.Array]:
    """The gradient with respect to the shifts, then to the leaves of the point."""
    batch = jax.tree.leaves(self.losses)[0].shape[0]
    objective = lambda *x: sum(jnp.sum(loss) for loss in jax.tree.leaves(self(*x))) / batch
    return jax.tree.leaves(jax.jit(jax.grad(objective, (0, 1)))(self.zeros, self.point))

  def estimate(self, num_tangents: int) -> Callable[[jax.Array], list[jax.Array]]:
    """`key -> estimate` of what `exact` returns."""
    step = value_and_activity_grad(self.__call__, (0, 1), num_tangents=num_tangents, **self.options)
    return lambda key: jax.tree.leaves(step(self.zeros, self.point, key=key)[1])


class Call(NamedTuple):
  """A call of `value_and_activity_grad(fun, argnums, has_aux, **options)` and of its result."""

  fun: Callable
  argnums: int | Sequence[int]
  has_aux: bool
  options: dict[str, Any]
  args: tuple
  key: jax.Array
  kwargs: dict[str, Any]


def with_tap_shifts(call: Call) -> TapShifts:
  """The function that the call differentiates, with shifts, at the call's arguments."""
  options, args, kwargs = call.options, call.args, call.kwargs
  of_point, point, _ = bind(call.fun, call.argnums, call.key, args, kwargs)

  def of_losses(point: tuple) -> tuple[PyTree, dict]:
    return with_aux(of_point(point), call.has_aux)[0], {}

  tapped = Tapped(of_losses, point, checkpoint_names=options.get('checkpoint_names', False))
  perturbed = perturbed_taps(tapped, options.get('taps'), options.get('num_tangents_by_tap'))
  declared = dict(tapped.taps)
  credited(tapped, perturbed, options.get('mixes_examples'))
  control_variate = options.get('control_variate')
  if control_variate is not None:
    options = {
      **options,
      'control_variate': lambda activities, *_: control_variate(activities, *args, **kwargs),
    }
  point = point[0] if isinstance(call.argnums, int) else point
  reaches = dict(zip(tapped.taps, _reached(tapped), strict=True))
  taps = [
    Declared(
      name,
      tap.shape[tap.scanned :],
      tap.shape[: tap.scanned],
      tap.dtype,
      declared[name].local_axes,
      tap.local_axes,
      reaches[name],
    )
    for name, tap in tapped.taps.items()
    if name in perturbed
  ]
  return TapShifts(tapped, point, taps, options)


def accepted(call: Call) -> tuple[Call, str | None]:
  """A call that `value_and_activity_grad` accepts, and why it refuses the given one, if it does.

  Raises:
    ValueError, TypeError: like `value_and_activity_grad`, if it refuses `mixes_examples=False` too.
  """

  def check(call: Call) -> None:
    step = value_and_activity_grad(call.fun, call.argnums, call.has_aux, **call.options)
    jax.eval_shape(lambda: step(*call.args, key=call.key, **call.kwargs)[1])

  try:
    check(call)
    return call, None
  except ValueError as error:
    as_declared = call._replace(options={**call.options, 'mixes_examples': False})
    if call.options.get('mixes_examples') is not None:
      raise
    try:
      check(as_declared)
    except ValueError:
      raise error from None
    return as_declared, str(error)


def named(tree: PyTree, whole: str) -> dict[str, Any]:
  """Leaves by path; a tree that is a single leaf is called `whole`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/') or whole: leaf for path, leaf in leaves
  }


def _reached(tapped: Tapped) -> list[tuple[str, ...]]:
  """For every tap, the names of the losses that it can influence, by the equations."""
  axes = [[(tap.front, tap.shape[tap.scanned])] for tap in tapped.taps.values()]
  labels = Influence(tapped.interpreter).of(tapped.jaxpr, axes)
  losses = named(tapped.shape[0], 'the losses')
  return [
    tuple(loss for loss, of in zip(losses, labels, strict=False) if of[n][0] is not None)
    for n in range(len(axes))
  ]
