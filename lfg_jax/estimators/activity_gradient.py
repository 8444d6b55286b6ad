"""Activity perturbation for any JAX function: `value_and_activity_grad`, as `jax.value_and_grad`
plus a key.

The activities that are perturbed are those that the function names by `lfg_jax.tap`, or the outputs
of the layers that `lfg_jax.mark` marks. Forward derivatives give every tap a signal, an unbiased
estimate of its gradient, and the reverse sweep goes from tap to tap only. *Any* choice of taps
gives an unbiased estimate of the parameters' gradient, since the sweep is linear in the signals; it
decides how far reverse mode reaches. With a tap on every layer, each is differentiated by itself.
With none it would be backprop.
"""

import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lfg_jax.estimators import estimators, tangents
from lfg_jax.estimators.calls import Static, bind, explained, with_aux
from lfg_jax.estimators.guesses import Known, Path
from lfg_jax.estimators.mixing import Influence, Mixed
from lfg_jax.estimators.passes import Sampling, recomputed_jvp
from lfg_jax.estimators.taps import Tap
from lfg_jax.estimators.walk import Walk, perturb, record, replace_cotangent

PyTree = Any
Taps = str | Collection[str] | Callable[[str], bool] | None


def value_and_activity_grad(
    fun: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
    law: tangents.Law = tangents.rademacher, passes: int = 1, chunk: int | None = None,
    combination: str = 'mean', shared: bool = False, separate: bool = False,
    tap_passes: Mapping[str, int] | None = None, taps: Taps = None,
    guess: Callable[..., Mapping[str, jax.Array]] | None = None, mixes_examples: bool | None = None,
    checkpoint_names: bool = False, axis_name: str | None = None) -> Callable:
  """The mean loss and the estimate of its gradient, from forward derivatives at the taps of `fun`.

  The objective is the sum of all losses divided by the number of examples. `fun` is traced once, as
  by `jax.jit`.

  Args:
    fun: returns losses, an array or a pytree of several, with examples on the first axis; with
      `has_aux` a pair of losses and anything.
    argnums: which positional arguments (pytrees of real floating-point arrays) to differentiate.
    has_aux: see `jax.grad`; aux is that of the unperturbed evaluation.
    law: of the tangents of each tap and example.
    passes: number of tangents, K.
    chunk: how many are in memory at once (rounded down to a divisor of `passes`); None: all. Every
      chunk evaluates what follows the taps again.
    combination: 'mean', or with `separate` 'projection'; see `passes.combine`.
    shared: one tangent for the whole batch instead of an independent one for every example.
    separate: whether each tap is perturbed by itself; see `estimators.activity_perturbation`.
    tap_passes: with `separate`, numbers of passes for taps of these names; others have `passes`.
    taps: names of taps, or a predicate of a name: those that are perturbed; None: all. The others
      let the exact signal pass. A name stands for all calls with it, `name_1` for its second call.
    guess: with `separate`, `(activities, *args, **kwargs) -> {name: h}`: guesses of the objective's
      gradient at some taps from the activities {name: value}. Whatever it guesses, the estimate is
      unbiased; see `guesses`.
    mixes_examples: whether an activity may influence the losses of other examples, as before batch
      norm in training; it is then credited with the losses of the whole batch. None: read from the
      function's equations, for every tap; see `mixing`.
    checkpoint_names: whether values named by `jax.ad_checkpoint.checkpoint_name` are taps too.
    axis_name: mesh axis the batch is sharded over, in shard_map. The mean over devices of value and
      gradient is then the same on any number of devices.

  Returns:
    `(*args, key, **kwargs) -> (value, gradient)`, or `((value, aux), gradient)`; gradients as
    `jax.grad` has them. `key` is for the tangents. If `fun` has a required parameter `key` too, it
    gets a key of its own, split from this one; to choose it, give it by position, or bind it:
    `functools.partial(fun, key=...)`.

  Raises:
    ValueError: there is no tap, or none of a given name; a tap is where it cannot be reached; a tap
      or loss has no axis of examples; whether examples mix cannot be read; options do not fit
      together.
    TypeError: an argument or a loss is not real floating-point, or what follows a tap has no
      forward derivative.

  >>> from lfg_jax import tap
  >>> def losses(w, x, y):
  ...   h = tap(jnp.tanh(x @ w['hidden']), 'hidden')
  ...   return (h @ w['out'] - y) ** 2
  >>> w, x = {'hidden': jnp.ones((3, 4)), 'out': jnp.ones(4)}, jnp.eye(8, 3)
  >>> value, gradient = value_and_activity_grad(losses)(w, x, jnp.zeros(8), key=jax.random.key(0))
  >>> jax.tree.map(jnp.shape, gradient)
  {'hidden': (3, 4), 'out': (4,)}
  """
  sampling = Sampling(law, passes, shared, axis_name, chunk, combination)
  estimators.check_activity_options(sampling, separate, tap_passes, guess)

  def run(*args: Any, key: jax.Array, **kwargs: Any) -> tuple[Any, PyTree]:
    of_point, point, key = bind(fun, argnums, key, args, kwargs)
    loss_fn = _Traced(of_point, point, has_aux, Walk(checkpoint_names))
    perturbed = _perturbed(loss_fn, taps, tap_passes)
    loss_fn.credit(perturbed, mixes_examples)

    def of_known(weights: PyTree, known: Known) -> dict[Path, jax.Array]:
      del weights
      assert guess is not None
      paths = {path[-1]: path for path in known.taps}
      guessed = guess({path[-1]: t.value for path, t in known.taps.items()}, *args, **kwargs)
      return {paths.get(name, (name,)): h for name, h in guessed.items()}

    estimator = estimators.activity_perturbation(
        loss_fn, sampling=sampling, derivative=recomputed_jvp, separate=separate,
        tap_passes=tap_passes, is_perturbed=perturbed.__contains__,
        guess=of_known if guess else None)
    try:
      (losses, aux), gradient = estimator(point, key)
    except TypeError as error:
      raise explained(error, lambda: loss_fn.jaxpr) from error
    value = estimators.total(losses)
    gradient = gradient[0] if isinstance(argnums, int) else gradient
    return ((value, loss_fn.static.join(aux['arrays'])) if has_aux else value), gradient
  return run


class _Traced:
  """A function as an `estimators.LossFn`: its losses divided by the number of examples, by way of
  its jaxpr.

  Attributes:
    jaxpr: of the function of the differentiated arguments.
    taps: shapes of the taps by path, (number, name), in the order of evaluation.
    batch: number of examples.
    static: what is no array in aux.
  """

  guess_weights: PyTree = {}    # noqa: RUF012    (never changed)
  size_B: jax.Array | None = None

  def __init__(self, of_point: Callable, point: tuple, has_aux: bool, walk: Walk) -> None:
    self._walk, self.static = walk, Static()

    def flat(point: tuple) -> tuple[PyTree, list[jax.Array]]:
      losses, aux = with_aux(of_point(point), has_aux)
      _batch(losses)
      return losses, self.static.split(aux)

    self.jaxpr, (shapes, _) = jax.make_jaxpr(flat, return_shape=True)(point)
    self.batch, self._shapes = _batch(shapes), jax.tree.leaves(shapes)
    self._treedef = jax.tree.structure(shapes)
    found = walk.find(self.jaxpr)
    self.taps: dict[Path, Tap] = {}
    names = {name for name, _ in found}
    taken: set[str] = set()
    for n, (name, tap) in enumerate(found):
      unique, count = name, 0
      while unique in taken or (count and unique in names):
        count += 1
        unique = f'{name}_{count}'
      taken.add(unique)
      self.taps[f'{n:06d}', unique] = tap
    self.first_names = dict(zip(self.taps, (name for name, _ in found), strict=True))

  def __call__(self, params: tuple, collections: Mapping[str, PyTree], *args: Any
               ) -> tuple[PyTree, dict[str, Any]]:
    visit = replace_cotangent if 'signal' in collections else perturb
    given = flatten_dict(collections.get('signal', collections.get('perturbation', {})))
    outs, _ = self._run(params, given, visit)
    losses = [loss.astype(jnp.promote_types(loss.dtype, jnp.float32)) / self.batch
              for loss in outs[:len(self._shapes)]]
    return jax.tree.unflatten(self._treedef, losses), {'arrays': outs[len(self._shapes):]}

  def record(self, collection: str, params: tuple, *args: Any,
             given: Mapping[str, PyTree] = types.MappingProxyType({})) -> PyTree:
    if collection != 'taps':
      return {}
    _, records = self._run(params, {}, record)
    return unflatten_dict({path: Tap(z, t.ndim, t.local_axes)
                           for z, (path, t) in zip(records, self.taps.items(), strict=True)})

  def _run(self, point: tuple, given: Mapping[Path, jax.Array], visit: Callable
           ) -> tuple[list, list]:
    of_taps = [given.get(path) for path in self.taps]
    return self._walk.run(self.jaxpr, jax.tree.leaves(point), of_taps, visit)

  def credit(self, perturbed: list[Path], mixes_examples: bool | None) -> None:
    """Checks these taps' shapes, and sets `local_axes` to 0 where examples mix."""
    for path in perturbed:
      tap = self.taps[path]
      shape = tap.value.shape[tap.value.ndim - tap.ndim:]
      if mixes_examples or (mixes_examples is None and tap.local_axes and self._mixes(path, shape)):
        tap = self.taps[path] = Tap(tap.value, tap.ndim, 0)
      if shape[:1] != (self.batch,) or len(shape) < tap.local_axes:
        raise ValueError(
            f'tap {path[-1]!r} has shape {shape} and local_axes={tap.local_axes}; allowed: '
            f'{self.batch}, the number of examples, on its first axis, and that many axes')

  def _mixes(self, path: Path, shape: tuple[int, ...]) -> bool:
    """Whether this tap influences the losses of other examples.

    Raises:
      ValueError: it influences those of other parts of the example, against its `local_axes`, or
        nothing is known.
    """
    is_seed, mixed = [other == path for other in self.taps], False
    for axis in range(min(self.taps[path].local_axes, len(shape))):
      influence = Influence(self._walk, axis, shape[axis])
      labels = influence.of(self.jaxpr, is_seed) if shape[axis] > 1 else []
      for label, loss in zip(labels, self._shapes, strict=False):
        if label is None or label == axis or loss.ndim <= axis or loss.shape[axis] == 1:
          continue
        cause = label.primitive if isinstance(label, Mixed) else 'an axis that is moved'
        if isinstance(label, Mixed) and not label.is_known:
          raise ValueError(
              f'whether tap {path[-1]!r} influences the losses of other examples cannot be read '
              f'from {cause}; allowed: mixes_examples=True if it does, False if it does not')
        if axis:
          raise ValueError(
              f'tap {path[-1]!r} has local_axes={self.taps[path].local_axes}, but {cause} mixes '
              f'its axis {axis}; allowed: local_axes={axis}')
        mixed = True
    return mixed


def _perturbed(loss_fn: _Traced, chosen: Taps, tap_passes: Mapping[str, int] | None) -> list[Path]:
  """Paths of the taps that are perturbed."""
  names = {name for path in loss_fn.taps for name in (path[-1], loss_fn.first_names[path])}
  if not names:
    raise ValueError('the function has no tap; allowed: lfg_jax.tap in it, or layers that '
                     'lfg_jax.mark marks')
  if isinstance(chosen, str):
    chosen = {chosen}
  asked = set() if chosen is None or callable(chosen) else set(chosen)
  for unknown in sorted((asked | set(tap_passes or {})) - names):
    raise ValueError(f'there is no tap {unknown!r}; allowed: {", ".join(sorted(names))}')
  if chosen is None:
    return list(loss_fn.taps)
  is_chosen = chosen if callable(chosen) else asked.__contains__
  return [path for path in loss_fn.taps
          if is_chosen(path[-1]) or (not callable(chosen) and is_chosen(loss_fn.first_names[path]))]


def _batch(losses: PyTree) -> int:
  """Number of examples of an array of losses, or of several."""
  leaves = jax.tree_util.tree_leaves_with_path(losses)
  for path, leaf in leaves:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      raise TypeError(f'loss {jax.tree_util.keystr(path)} is {type(leaf).__name__}; allowed: '
                      'arrays with a loss for every example, or with has_aux=True a pair of '
                      'losses and anything')
  shapes = [leaf.shape for _, leaf in leaves]
  if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
    raise ValueError(f'losses have the shapes {shapes}; allowed: the same number of examples on '
                     'the first axis of all (for a pair of losses and anything, has_aux=True)')
  for path, leaf in leaves:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(f'loss {jax.tree_util.keystr(path)} has dtype {leaf.dtype}; allowed: real '
                      'floating-point')
  return shapes[0][0]
