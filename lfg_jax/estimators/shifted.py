"""A function with a shift of zero before every tap: its signals are gradients.

The gradient with respect to a shift before a tap is the signal that the tap receives. So the
estimate of all signals is `value_and_activity_grad` of this function, the exact ones are `jax.grad`
of it, and its derivatives along a shift tell what a tap influences. All that `diagnose` needs to
know of a function is in this module.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from lfg_jax.estimators.activity_gradient import value_and_activity_grad
from lfg_jax.estimators.calls import bind, with_aux
from lfg_jax.estimators.mixing import Influence
from lfg_jax.estimators.primitive import tap
from lfg_jax.estimators.probing import Declared
from lfg_jax.estimators.walk import Walk

PyTree = Any


@flax.struct.dataclass
class _Shift:
  """What is added before a tap, and what the tap is called."""
  value: jax.Array
  name: str = flax.struct.field(pytree_node=False)
  local_axes: int = flax.struct.field(pytree_node=False)


def _shift_and_tap(z: jax.Array, active: jax.Array | None, given: _Shift | None
                   ) -> tuple[jax.Array, None]:
  """Visit of a walk; a tap that is given nothing is no tap any more."""
  if given is None:
    return z, None
  z = z + given.value.astype(z.dtype)
  return tap(z, given.name, local_axes=given.local_axes, active=active), None


class Shifted(NamedTuple):
  """A function of shifts before its taps, and of its differentiated arguments.

  Attributes:
    walk, jaxpr: the function.
    losses: what it returns, a tree of shapes.
    point: the differentiated arguments.
    names: of every tap of the jaxpr; None for those that are not perturbed.
    taps: those that are perturbed.
    options: of `value_and_activity_grad`.
  """
  walk: Walk
  jaxpr: Any
  losses: PyTree
  point: PyTree
  names: list[str | None]
  taps: list[Declared]
  options: dict[str, Any]

  def __call__(self, shifts: list[jax.Array], point: PyTree) -> PyTree:
    """The losses."""
    shift = {t.name: _Shift(x, t.name, t.local_axes)
             for t, x in zip(self.taps, shifts, strict=True)}
    given = [None if name is None else shift[name] for name in self.names]
    outs, _ = self.walk.run(self.jaxpr, jax.tree.leaves(point), given, _shift_and_tap)
    return jax.tree.unflatten(jax.tree.structure(self.losses), outs)

  @property
  def zeros(self) -> list[jax.Array]:
    """Shifts of zero."""
    return [jnp.zeros((*t.scanned, *t.shape), t.dtype) for t in self.taps]

  def derivative(self, point: PyTree, shifts: list[jax.Array]) -> dict[str, jax.Array]:
    """Derivatives [n, ...] of the losses, by name, along n shifts of every tap."""
    losses = lambda shifts: jax.tree.leaves(self(shifts, point))
    along = lambda u: jax.jvp(losses, (self.zeros,), (u,))[1]
    return dict(zip(named(self.losses, 'the losses'), jax.vmap(along)(shifts), strict=True))

  def exact(self) -> list[jax.Array]:
    """The gradient with respect to the shifts, then to the leaves of the point."""
    batch = jax.tree.leaves(self.losses)[0].shape[0]
    objective = lambda *x: sum(jnp.sum(loss) for loss in jax.tree.leaves(self(*x))) / batch
    return jax.tree.leaves(jax.jit(jax.grad(objective, (0, 1)))(self.zeros, self.point))

  def estimate(self, num_tangents: int) -> Callable[[jax.Array], list[jax.Array]]:
    """`key -> ` the estimate of what `exact` returns."""
    step = value_and_activity_grad(self.__call__, (0, 1), passes=num_tangents, **self.options)
    return lambda key: jax.tree.leaves(step(self.zeros, self.point, key=key)[1])


def shifted(fun: Callable, argnums: int | Sequence[int], has_aux: bool, options: dict, args: tuple,
            key: jax.Array, kwargs: dict) -> Shifted:
  """The function that `value_and_activity_grad` differentiates, at these arguments."""
  of_point, point, _ = bind(fun, argnums, key, args, kwargs)
  of_leaves = lambda point: with_aux(of_point(point), has_aux)[0]
  jaxpr, losses = jax.make_jaxpr(of_leaves, return_shape=True)(point)
  walk = Walk(options.get('checkpoint_names', False))
  names = _chosen([name for name, _ in walk.find(jaxpr)], options.get('taps'))
  guess, mixes_examples = options.get('guess'), options.get('mixes_examples')
  own = {name: x for name, x in options.items() if name not in ('taps', 'checkpoint_names')}
  if guess is not None:
    own['guess'] = lambda activities, *_: guess(activities, *args, **kwargs)
  point = point[0] if isinstance(argnums, int) else point
  taps = [_declared(walk, jaxpr, list(named(losses, 'the losses')), n, name, mixes_examples)
          for n, name in enumerate(names) if name is not None]
  return Shifted(walk, jaxpr, losses, point, names, taps, own)


def accepted(fun: Callable, argnums: int | Sequence[int], has_aux: bool, options: dict, args: tuple,
             key: jax.Array, kwargs: dict) -> tuple[dict, str | None]:
  """Options that `value_and_activity_grad` accepts for a call, and why not these (None: it does).

  Raises:
    ValueError, TypeError: as `value_and_activity_grad`, with `mixes_examples=False` too.
  """
  def check(options: dict) -> None:
    step = value_and_activity_grad(fun, argnums, has_aux, **options)
    jax.eval_shape(lambda: step(*args, key=key, **kwargs)[1])

  try:
    check(options)
    return options, None
  except ValueError as error:
    as_declared = {**options, 'mixes_examples': False}
    if options.get('mixes_examples') is not None:
      raise
    try:
      check(as_declared)
    except ValueError:
      raise error from None
    return as_declared, str(error)


def named(tree: PyTree, whole: str) -> dict[str, Any]:
  """Leaves by path; a tree that is one leaf is called `whole`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/') or whole: leaf
          for path, leaf in leaves}


def _declared(walk: Walk, jaxpr: Any, losses: list[str], number: int, name: str,
              mixes_examples: bool | None) -> Declared:
  """Tap `number` of the jaxpr."""
  found = walk.find(jaxpr)
  of_tap = found[number].tap
  scanned = of_tap.value.ndim - of_tap.ndim
  shape = of_tap.value.shape[scanned:]
  seeds = [n == number for n in range(len(found))]
  labels = Influence(walk, 0, shape[0]).of(jaxpr, seeds)
  is_read_to_mix = shape[0] > 1 and any(label not in (None, 0) for label in labels)
  mixes = is_read_to_mix if mixes_examples is None else mixes_examples
  reaches = tuple(loss for loss, label in zip(losses, labels, strict=True) if label is not None)
  return Declared(name, shape, of_tap.value.shape[:scanned], of_tap.value.dtype, of_tap.local_axes,
                  0 if mixes else of_tap.local_axes, reaches)


def _chosen(names: list[str], taps: Any) -> list[str | None]:
  """Unique names, as `value_and_activity_grad` gives them; None for taps that are not perturbed."""
  unique: list[str] = []
  for name in names:
    count, own = 0, name
    while own in unique or (count and own in names):
      count += 1
      own = f'{name}_{count}'
    unique.append(own)
  if taps is None:
    return [*unique]
  if callable(taps):
    return [name if taps(name) else None for name in unique]
  asked = {taps} if isinstance(taps, str) else set(taps)
  return [own if {own, name} & asked else None for own, name in zip(unique, names, strict=True)]
