"""Activity perturbation for any Flax module: name the layers whose outputs are to be perturbed.

    step = value_and_activity_grad(model, losses, layers=(nn.Dense, nn.Conv))
    (value, aux), grads = step(variables, key, images, labels)

Every output of a marked layer becomes a tap (`lfg_jax.taps`): forward derivatives give it a signal, and the reverse
sweep goes from tap to tap only. *Any* choice of layers gives an unbiased estimate, since the sweep is linear in the
signals; it decides how far reverse mode reaches. All marked: each layer is differentiated by itself. None:
backprop. What must hold is that a tap is credited with all the losses that it can influence:

* Dense, grouped, convolutional, attention layers and norms of one example: nothing to be done.
* Batch norm that takes statistics of the batch makes every activity influence the losses of all examples. This is
  noticed, and the losses of the whole batch are credited: unbiased, but with B times the dimensions, so that
  training by it needs far smaller steps. Layer or group norm, or running statistics, keep the credit in the example.
* Dropout: pass `rngs`; all evaluations of one call then have the same masks.
* A layer that is called twice has a tap for each call.
* `nn.scan` and `nn.RNN` must carry the taps: `nn.RNN(cell, variable_axes=dict.fromkeys(TAP_COLLECTIONS, 0))`. The
  marked cell then has a tap for its carry and its output at every time; nothing goes backwards through time.
* In `shard_map` (with `check_vma=False`) give `Sampling` the mesh axis of the batch, and take the mean over devices of
  value and gradients: the estimate is the same on any number of devices.
* Losses of one's own for parts of an example: call `tap` in the module, with `local_axes`.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lfg_jax import estimators
from lfg_jax.guesses import Path
from lfg_jax.passes import Sampling
from lfg_jax.taps import Tap, tap

PyTree = Any
Layers = type | tuple[type, ...] | Callable[[nn.Module], bool]


def value_and_activity_grad(model: nn.Module, losses: Callable[..., PyTree], layers: Layers = (), *,
                            sampling: Sampling = Sampling(), separate: bool = False,
                            guess: Callable[..., Mapping[Path, jax.Array]] | None = None) -> Callable:
  """The mean loss and the estimate of its gradient with respect to the parameters.

  Args:
    model: called as `model.apply(variables, inputs, **kwargs)`, inputs with examples first.
    losses: `(output, *targets) -> losses`, an array or several with examples first. The objective is the sum of all
      entries divided by the number of examples.
    layers: a type of module, several, or a predicate of a module: those whose outputs are tapped. () leaves it to
      `tap`s in the model itself.
    sampling: law and number of tangents, shared or per example; see `passes.Sampling`.
    separate: whether each tap is perturbed by itself; see `estimators.activity_perturbation`.
    guess: with `separate`, `(activities, inputs, *targets) -> {tap: h}`: guesses of the objective's gradient at some
      taps, from the activities {tap: value} of the unperturbed evaluation. A tap is the path of its layer and
      'tap0_0', or 'tapN_I' for output I of the layer's call N. Whatever it guesses, the estimate is unbiased, and
      its error that of a forward gradient of g - h; see `guesses`.

  Returns:
    `(variables, key, inputs, *targets, rngs=None, **kwargs) -> ((value, aux), grads)`. aux holds 'output' and the
    collections that the model updates ('batch_stats'), from an unperturbed evaluation.

  Raises:
    ValueError: no layer is marked, a tap is lost in a scan, a tap or loss has no axis of examples.

  >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)])
  >>> x, y = jnp.ones((8, 3)), jnp.zeros(8)
  >>> step = value_and_activity_grad(model, lambda out, y: (out[:, 0] - y) ** 2, layers=nn.Dense)
  >>> (value, aux), grads = step(model.init(jax.random.key(0), x), jax.random.key(1), x, y)
  >>> jax.tree.map(jnp.shape, grads['layers_0'])
  {'bias': (4,), 'kernel': (3, 4)}
  """
  def run(variables: Mapping[str, PyTree], key: jax.Array, inputs: PyTree, *targets: PyTree,
          rngs: dict[str, jax.Array] | None = None, **kwargs: Any) -> tuple[tuple[jax.Array, dict], PyTree]:
    rest = {name: tree for name, tree in variables.items() if name != 'params'}
    call = lambda variables, mutable, inputs: model.apply(variables, inputs, rngs=rngs, mutable=mutable, **kwargs)
    loss_fn = _ModelLoss(call, losses, layers, rest)
    of_known = (lambda _, known: guess({path: tap.value for path, tap in known.taps.items()}, *known.args)
                ) if guess else None
    estimator = estimators.activity_perturbation(loss_fn, sampling=sampling, separate=separate, guess=of_known)
    (values, aux), grads = estimator(variables['params'], key, inputs, *targets)
    aux.pop('guess_gradient', None)
    return (estimators.total(values), aux), grads
  return run


class _ModelLoss:
  """A module's losses as an `estimators.LossFn`, with taps at the outputs of marked layers."""

  guess_weights: PyTree = {}    # noqa: RUF012    (never changed)
  size_B = None

  def __init__(self, call: Callable, losses: Callable, layers: Layers, rest: Mapping[str, PyTree]) -> None:
    self._call, self._losses, self._layers, self._rest = call, losses, layers, rest

  def __call__(self, params: PyTree, collections: Mapping[str, PyTree], inputs: PyTree, *targets: PyTree
               ) -> tuple[PyTree, dict[str, Any]]:
    output, updates, _ = self._evaluate(params, collections, (), inputs)
    values = self._losses(output, *targets)
    return jax.tree.map(lambda v: v / _batch(values), values), {'output': output, **updates}

  def record(self, collection: str, params: PyTree, *args: PyTree,
             given: Mapping[str, PyTree] = types.MappingProxyType({})) -> PyTree:
    inputs, *targets = args
    output, updates, marker = self._evaluate(params, given, (collection,), inputs)
    recorded = updates.get(collection, {})
    if collection != 'taps':
      return recorded
    taps = flatten_dict(recorded)
    marker.check(taps, _batch(self._losses(output, *targets)))
    if marker.batch_is_mixed:
      taps = {path: Tap(t.value, t.ndim, local_axes=0) for path, t in taps.items()}
    return unflatten_dict(taps)

  def _evaluate(self, params: PyTree, collections: Mapping[str, PyTree], record: tuple[str, ...], inputs: PyTree
                ) -> tuple[PyTree, dict, '_Marker']:
    marker = _Marker(self._layers)
    with nn.intercept_methods(marker):
      output, updates = self._call({'params': params, **self._rest, **collections}, (*self._rest, *record), inputs)
    return output, updates, marker


def _batch(values: PyTree) -> int:
  """Number of examples of an array of losses, or of several."""
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(values)]
  if any(not shape or shape[0] != shapes[0][0] for shape in shapes):
    raise ValueError(f'losses have the shapes {shapes}; allowed: the same number of examples on the first axis of all')
  return shapes[0][0]


class _Marker:
  """Interceptor of module calls that taps the outputs of marked layers.

  Attributes:
    batch_is_mixed: a batch norm has taken its statistics from the batch.
  """

  def __init__(self, layers: Layers) -> None:
    self._is_marked = (lambda m: isinstance(m, layers)) if isinstance(layers, (type, tuple)) else layers
    self._calls: dict[tuple, tuple[Any, int]] = {}
    self._called: set[tuple[str, ...]] = set()
    self._marked: set[tuple[str, ...]] = set()
    self.batch_is_mixed = False

  def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module, output = context.module, next_fun(*args, **kwargs)
    if context.method_name != '__call__':
      return output
    self._called.add(module.path)
    if isinstance(module, nn.BatchNorm):
      given = kwargs.get('use_running_average', args[1] if len(args) > 1 else None)
      self.batch_is_mixed |= not (module.use_running_average if given is None else given)
    if not self._is_marked(module):
      return output
    self._marked.add(module.path)
    number = self._count(module)
    leaves, treedef = jax.tree.flatten(output)
    return jax.tree.unflatten(treedef, [
        tap(module, f'tap{number}_{i}', leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf
        for i, leaf in enumerate(leaves)])

  def _count(self, module: nn.Module) -> int:
    """How often the module has been called before in this trace (that of a scan's body has a root scope of its own)."""
    assert module.scope is not None    # it is being called
    root = module.scope.root
    _, number = self._calls.get((id(root), module.path), (root, 0))
    self._calls[id(root), module.path] = root, number + 1    # holds the root, so that its id stays its own
    return number

  def check(self, taps: dict[tuple, Tap], batch: int) -> None:
    """All marked layers must have their taps, with examples first."""
    if not taps:
      names = ', '.join(sorted('/'.join(path) or 'the model itself' for path in self._called))
      raise ValueError(f'no layer is marked; allowed, as `layers`: types or a predicate that fit some of {names}')
    for path in sorted(self._marked - {path[:-1] for path in taps}):
      raise ValueError(f"layer {'/'.join(path)} is inside a scan that does not carry taps; allowed: the scan or nn.RNN "
                       'with variable_axes=dict.fromkeys(TAP_COLLECTIONS, 0), or a mark on the layer around the scan')
    for path, t in taps.items():
      shape = t.value.shape[t.value.ndim - t.ndim:]
      if not shape or shape[0] != batch:
        raise ValueError(f"the output of layer {'/'.join(path[:-1])} has shape {shape}; allowed for a marked layer: "
                         f'{batch}, the number of examples, on its first axis')
