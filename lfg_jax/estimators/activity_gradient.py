"""Activity perturbation for any JAX function: `value_and_activity_grad`, like `jax.value_and_grad`
plus a key.

The perturbed activities are those named with `lfg_jax.tap`, or the outputs of layers marked with
`lfg_jax.mark`. Forward derivatives give every tap a signal, an unbiased estimate of its gradient.
The reverse sweep runs only from tap to tap. Because it is linear in the signals, *any* choice of
taps gives an unbiased estimate of the parameters' gradient; the choice decides how far reverse mode
reaches. With a tap on every layer, each layer is differentiated by itself. With no taps, it would
be backprop.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators import activity
from lfg_jax.estimators._arguments import Static, bind, explained, with_aux
from lfg_jax.estimators._types import total
from lfg_jax.jaxpr.dependence import Influence
from lfg_jax.jaxpr.dependence_rules import Digit, Label, Mixed, join
from lfg_jax.jaxpr.tapped import Tapped
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.promotion import upcast
from lfg_jax.tangents import distributions
from lfg_jax.tangents.derivatives import Derivative, recomputed_jvp
from lfg_jax.tangents.sampling import Sampling

PyTree = Any
Taps = str | Collection[str] | Callable[[str], bool] | None


def value_and_activity_grad(
  fun: Callable,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  *,
  distribution: distributions.Distribution | str = distributions.rademacher,
  num_tangents: int = 1,
  chunk: int | None = None,
  combine: str = 'mean',
  shared: bool = False,
  joint: bool = True,
  num_tangents_by_tap: Mapping[str, int] | None = None,
  taps: Taps = None,
  control_variate: Callable[..., Mapping[str, jax.Array]] | None = None,
  mixes_examples: bool | None = None,
  checkpoint_names: bool = False,
  axis_name: str | None = None,
  derivative: Derivative | None = None,
) -> Callable:
  """The objective and an estimate of its gradient, from forward derivatives at the taps of `fun`.

  The objective is the sum of all losses divided by the number B of examples: the mean of losses
  [B], but T times the mean of losses [B, T] of tokens. For that mean, return `losses / T`; with a
  mask, `losses * mask * (B / mask.sum())`. `fun` is traced once, as with `jax.jit`.

  Args:
    fun: returns losses, one array or a pytree of arrays, with examples on the first axis; with
      `has_aux`, a pair of losses and anything.
    argnums: which positional arguments (pytrees of real floating-point arrays) to differentiate.
    has_aux: see `jax.grad`; aux comes from the unperturbed evaluation.
    distribution: the distribution of tangents, for each tap and example; one of `distributions`, or its name.
    num_tangents: number of tangents, K.
    chunk: how many tangents are in memory at once; None: all. Every chunk re-evaluates the
      computation after the taps. A chunk of one needs no `vmap`.
    combine: 'mean', or with `joint=False` also 'projection'; see `sampling.combine`.
    shared: one tangent for the whole batch instead of an independent one for every example.
    joint: whether all taps are perturbed at once, or one by one; see `activity.activity_perturbation`.
    num_tangents_by_tap: with `joint=False`, numbers of tangents by tap name; other taps have `num_tangents`.
    taps: which taps to perturb: names, or a predicate of a name; None: all. The others let the
      exact signal pass. A name stands for all calls with it, `name_1` for the second call.
    control_variate: with `joint=False`, `(activities, *args, **kwargs) -> {name: h}`: guesses of the
      objective's gradient at some taps, from the activities {name: value}, examples first. The
      estimate is unbiased whatever the guess; see `control_variates`.
    mixes_examples: whether an activity may influence the losses of other examples, as before batch
      norm in training; it is then credited with the losses of the whole batch. None: read this
      from the function's equations, for every tap; see `jaxpr.dependence`.
    checkpoint_names: whether values named with `jax.ad_checkpoint.checkpoint_name` are taps too.
    axis_name: in shard_map, the mesh axis over which the batch is sharded. The mean over devices
      of value and gradient is then the same on any number of devices.
    derivative: `derivatives.finite_difference(ε)`, one-sided or two-sided, in place of exact forward
      derivatives; the estimate is then as far off as the differences are.

  Returns:
    `(*args, key, **kwargs) -> (value, gradient)`, or `((value, aux), gradient)`; gradients are like
    those of `jax.grad`. `key` is for the tangents. If `fun` also has a required parameter `key`, it
    gets its own key, split from this one. To choose that key, pass it by position or bind it:
    `functools.partial(fun, key=...)`.

  Raises:
    ValueError: there is no tap, or none with a given name; a tap cannot be reached; a tap or loss
      has no example axis; the equations do not reveal whether examples mix; options contradict
      each other.
    TypeError: an argument or a loss is not real floating-point, or the computation after a tap has
      no forward derivative.

  >>> from lfg_jax import tap
  >>> def losses(w, x, y):
  ...   h = tap(jnp.tanh(x @ w['hidden']), 'hidden')
  ...   return (h @ w['out'] - y) ** 2
  >>> w, x = {'hidden': jnp.ones((3, 4)), 'out': jnp.ones(4)}, jnp.eye(8, 3)
  >>> value, gradient = value_and_activity_grad(losses)(w, x, jnp.zeros(8), key=jax.random.key(0))
  >>> jax.tree.map(jnp.shape, gradient)
  {'hidden': (3, 4), 'out': (4,)}
  """
  sampling = Sampling(distribution, num_tangents, shared, axis_name, chunk, combine)
  for number in (num_tangents_by_tap or {}).values():
    sampling._replace(num_tangents=number).check()
  activity.check_options(sampling, joint, bool(num_tangents_by_tap), bool(control_variate))

  def run(*args: Any, key: jax.Array, **kwargs: Any) -> tuple[Any, PyTree]:
    of_point, point, key = bind(fun, argnums, key, args, kwargs)
    static = Static()
    tapped = Tapped(
      _mean_losses(of_point, has_aux, static), point, checkpoint_names=checkpoint_names
    )
    perturbed = perturbed_taps(tapped, taps, num_tangents_by_tap)
    credited(tapped, perturbed, mixes_examples)

    def of_activities(activities: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
      return control_variate(activities, *args, **kwargs) if control_variate else {}

    estimator = activity.activity_perturbation(
      of_point,
      sampling=sampling,
      derivative=derivative or recomputed_jvp,
      joint=joint,
      num_tangents_of=_num_tangents_of(tapped, num_tangents, num_tangents_by_tap)
      if num_tangents_by_tap
      else None,
      is_perturbed=perturbed.__contains__,
      control_variate=of_activities if control_variate else None,
      redraw=True,
      trace=lambda *_: tapped,
    )
    try:
      (losses, aux), gradient = estimator(point, key)
    except (TypeError, NotImplementedError) as error:
      raise explained(error, lambda: tapped.jaxpr) from error
    value = total(losses)
    gradient = gradient[0] if isinstance(argnums, int) else gradient
    return ((value, static.join(aux['arrays'])) if has_aux else value), gradient

  return run


def _mean_losses(of_point: Callable, has_aux: bool, static: Static) -> Callable:
  """`point -> (losses divided by the number of examples, arrays of aux)`."""

  def fun(point: tuple) -> tuple[PyTree, dict]:
    losses, aux = with_aux(of_point(point), has_aux)
    batch = _batch(losses)
    return jax.tree.map(lambda loss: upcast(loss) / batch, losses), {'arrays': static.split(aux)}

  return fun


def _num_tangents_of(
  tapped: Tapped, num_tangents: int, num_tangents_by_tap: Mapping[str, int]
) -> Callable[[str], int]:
  """A tap's number of tangents: its own, that of all calls with its name, or `num_tangents`."""
  return lambda name: num_tangents_by_tap.get(
    name, num_tangents_by_tap.get(tapped.call_names[name], num_tangents)
  )


def credited(tapped: Tapped, perturbed: Collection[str], mixes_examples: bool | None) -> None:
  """Finds the axis of the examples of these taps, and sets `local_axes` to 0 where examples mix.

  Raises:
    ValueError: a tap has no such axis, influences other parts of its example contrary to its
      `local_axes`, or the equations do not reveal it.
  """
  batch, losses = _batch(tapped.shape[0]), jax.tree.leaves(tapped.shape[0])
  asked = {
    name: mixes_examples is None and tap.local_axes > 0 and name in perturbed
    for name, tap in tapped.taps.items()
  }
  followed = [_followed(tap, batch) if asked[name] else [] for name, tap in tapped.taps.items()]
  labels = Influence(tapped.interpreter).of(tapped.jaxpr, followed) if any(followed) else []
  for n, (name, tap) in enumerate(tapped.taps.items()):
    reached = {axis: [of[n][m] for of in labels] for m, (axis, _) in enumerate(followed[n])}
    if name in perturbed:
      tap, front = _placed(name, tap, batch, reached, losses) if asked[name] else (tap, None)
      tap = tap._replace(local_axes=0) if mixes_examples else tap
      shape = tap.shape[tap.scanned :]
      if front is None and batch in (shape[:1] if mixes_examples is False else shape):
        front = shape.index(batch)
      if front is None or len(shape) < front + tap.local_axes:
        raise ValueError(
          f'tap {name!r} has shape {shape} and local_axes={tap.local_axes}; allowed: {batch}, the '
          'number of examples, on its first axis (or, with mixes_examples=None, on one that leads '
          'to the first axis of the losses), and that many axes from there'
        )
      tapped.taps[name] = tap.with_front(front)


def _followed(tap: Tap, batch: int) -> list[tuple[int, int]]:
  """Axes of a tap that may be those of the examples or of declared parts, and their sizes."""
  shape = tap.shape[tap.scanned :]
  parts = len(shape) if tap.is_auto else tap.local_axes
  places = {a + n for a, size in enumerate(shape) if size == batch for n in range(parts)}
  return [(axis, size) for axis, size in enumerate(shape) if axis in places and size > 1]


def _placed(
  name: str, tap: Tap, batch: int, reached: dict[int, list[Label]], losses: list[Any]
) -> tuple[Tap, int | None]:
  """The tap with the local axes that the equations show, and its axis of the examples."""
  shape = tap.shape[tap.scanned :]
  places = [axis for axis, size in enumerate(shape) if size == batch]
  causes = {axis: _cause(reached.get(axis, []), losses, 0, batch) for axis in places}
  front = next((axis for axis in places if causes[axis] is None), None)
  refuse = lambda cause: ValueError(
    f'whether tap {name!r} influences the losses of other examples cannot be read '
    f'from {cause}; allowed: mixes_examples=True if it does, False if it does not'
  )
  if front is None:
    if places and not causes[places[0]].is_known:
      raise refuse(causes[places[0]].cause)
    return tap._replace(local_axes=0) if places else tap, None
  for n, axis in enumerate(
    range(front + 1, len(shape) if tap.is_auto else front + tap.local_axes), 1
  ):
    labels = reached.get(axis, [])
    cause = _cause(labels, losses, n, shape[axis] if axis < len(shape) else 0)
    if tap.is_auto:
      if cause or not any(label for label in labels) or all(loss.ndim <= n for loss in losses):
        break
      tap = tap._replace(local_axes=n + 1)
    elif cause and not cause.is_known:
      raise refuse(cause.cause)
    elif cause:
      raise ValueError(
        f'tap {name!r} has local_axes={tap.local_axes}, but {cause.cause} mixes '
        f'its axis {axis}; allowed: local_axes={n}'
      )
  return tap, front


def _cause(labels: list[Label], losses: list[Any], axis: int, size: int) -> Any:
  """What keeps an axis of a tap from being this axis of the losses, a `Mixed`; None: nothing."""
  causes: list[Label] = []
  for label, loss in zip(labels, losses, strict=False):
    is_own = loss.shape[axis : axis + 1] == (size,) and label == (Digit(axis, size),)
    if label is not None and not is_own and loss.shape[axis : axis + 1] not in ((), (1,)):
      causes.append(label if isinstance(label, Mixed) else Mixed('an axis that is moved', True))
  return join('', causes)


def perturbed_taps(
  tapped: Tapped, chosen: Taps, num_tangents_by_tap: Mapping[str, int] | None
) -> list[str]:
  """Names of the perturbed taps."""
  names = {*tapped.taps, *tapped.call_names.values()}
  if not names:
    raise ValueError(
      'the function has no tap; allowed: lfg_jax.tap in it, or layers that lfg_jax.mark marks'
    )
  if isinstance(chosen, str):
    chosen = {chosen}
  asked = set() if chosen is None or callable(chosen) else set(chosen)
  for unknown in sorted((asked | set(num_tangents_by_tap or {})) - names):
    raise ValueError(f'there is no tap {unknown!r}; allowed: {", ".join(sorted(names))}')
  if chosen is None:
    perturbed = list(tapped.taps)
  elif callable(chosen):
    perturbed = [name for name in tapped.taps if chosen(name)]
  else:
    perturbed = [name for name in tapped.taps if {name, tapped.call_names[name]} & asked]
  for name in perturbed:
    if 0 in tapped.taps[name].shape:
      raise ValueError(f'tap {name!r} has shape {tapped.taps[name].shape}; allowed: some entries')
  return perturbed


def _batch(losses: PyTree) -> int:
  """Number of examples in an array of losses, or in several."""
  leaves = jax.tree_util.tree_leaves_with_path(losses)
  for path, leaf in leaves:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      raise TypeError(
        f'loss {jax.tree_util.keystr(path)} is {type(leaf).__name__}; allowed: '
        'arrays with a loss for every example, or with has_aux=True a pair of '
        'losses and anything'
      )
  shapes = [leaf.shape for _, leaf in leaves]
  if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
    raise ValueError(
      f'losses have the shapes {shapes}; allowed: the same number of examples on '
      'the first axis of all (for a pair of losses and anything, has_aux=True)'
    )
  if 0 in shapes[0]:
    raise ValueError(f'losses have the shapes {shapes}; allowed: one example or more')
  for path, leaf in leaves:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(
        f'loss {jax.tree_util.keystr(path)} has dtype {leaf.dtype}; allowed: real floating-point'
      )
  return shapes[0][0]
