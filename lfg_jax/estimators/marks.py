"""Layers marked by type: `mark(model, nn.Dense)` taps the outputs of layers.

The model's code stays as it is.

    def losses(params, x, y):                                           # Flax linen
      logits = lfg_jax.mark(model, nn.Dense).apply({'params': params}, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    graph, params, rest = nnx.split(lfg_jax.mark(model, nnx.Linear), nnx.Param, ...)    # Flax NNX

    params, rest = eqx.partition(lfg_jax.mark(model, eqx.nn.Linear), eqx.is_inexact_array)  # Equinox

A tap is named after its layer's path; a layer that is called twice has one tap per call.
"""

import copy
import fnmatch
import functools
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.scope import DenyList, subtract_filters, union_filters

from lfg_jax.jaxpr.taps import tap

PyTree = Any
Layers = type | Collection[type] | Callable[[Any], bool]
LocalAxes = int | Mapping[type | str, int]


def mark(model: Any, layers: Layers, *, local_axes: LocalAxes = 1) -> Any:
  """The model, with taps at the outputs of some layers. The given model is not changed.

  Args:
    model: a Flax linen or NNX module, or an Equinox module (or another pytree of layers).
    layers: a layer type, several types, or a predicate of a layer.
    local_axes: of the taps, see `tap`; or a mapping from layer types or names (`'block/Dense_0'`,
      `'*/Dense_0'`) to it. The first that fits a layer counts; other layers have 1.

  Returns:
    For linen, an object with the model's `apply` and `init`; otherwise a copy of the model, whose
    parameters keep their paths and values. Models that are marked alike have the same types, so a
    jitted function of them is compiled once.

  Raises:
    ValueError: no layer fits `layers`, or none a type or name in `local_axes`. (With linen, `apply`
      raises it, because layers are created when called.)

  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> marked = mark(model, nnx.Linear)
  >>> str(jax.make_jaxpr(marked)(jnp.ones((1, 2)))).count('tap[')
  1
  """
  choice = _choice(layers, local_axes)
  if isinstance(model, nn.Module):
    return MarkedLinen(model, choice)
  mark_copy = _mark_nnx if isinstance(model, nnx.Module) else _mark_tree
  return mark_copy(model, choice)


class Layer(NamedTuple):
  """A layer of a model, its name, and whether it is marked."""

  itself: Any
  name: str
  is_marked: bool


class Choice(NamedTuple):
  """Which layers are marked, and how local their taps are. Equal choices are equal keys.

  Attributes:
    layers: types, or a predicate of a layer.
    local_axes: of all taps, or by type or name.
  """

  layers: tuple[type, ...] | Callable[[Any], bool]
  local_axes: int | tuple[tuple[type | str, int], ...]

  def is_marked(self, layer: Any) -> bool:
    """Whether the layer has a tap."""
    if isinstance(self.layers, tuple):
      return isinstance(layer, self.layers)
    return self.layers(layer)

  def local_axes_of(self, layer: Any, name: str) -> int:
    """That of a marked layer's tap."""
    if isinstance(self.local_axes, int):
      return self.local_axes
    return next((axes for rule, axes in self.local_axes if _fits(rule, layer, name)), 1)

  def problem(self, layers: Sequence[Layer]) -> str | None:
    """Why these layers cannot be marked; None if they can."""
    marked = [layer for layer in layers if layer.is_marked]
    if not marked:
      kinds = ', '.join(sorted({type(layer.itself).__name__ for layer in layers}))
      return (
        f'no layer is marked; allowed, as `layers`: types or a predicate that fit some of {kinds}'
      )
    rules = () if isinstance(self.local_axes, int) else self.local_axes
    for rule, _ in rules:
      if not any(_fits(rule, layer.itself, layer.name) for layer in marked):
        names = ', '.join(layer.name for layer in marked)
        return (
          f'local_axes has {rule!r}, which is no marked layer; allowed: types, or some of {names}'
        )
    return None


def _choice(layers: Layers, local_axes: LocalAxes) -> Choice:
  kinds = (layers,) if isinstance(layers, type) else layers
  if isinstance(kinds, Collection) and all(isinstance(kind, type) for kind in kinds):
    kinds = tuple(kinds)
  elif not callable(kinds):
    raise ValueError(
      f'layers is {layers!r}; allowed: a layer type such as nn.Dense, several types, or a predicate '
      'of a layer'
    )
  pairs = tuple(local_axes.items()) if isinstance(local_axes, Mapping) else ((type, local_axes),)
  for rule, axes in pairs:
    if not isinstance(rule, (type, str)) or not isinstance(axes, int) or axes < 0:
      raise ValueError(
        f'local_axes is {local_axes!r}; allowed: 0 or more, or a mapping from layer types or names'
      )
  return Choice(kinds, pairs if isinstance(local_axes, Mapping) else local_axes)


def _fits(rule: type | str, layer: Any, name: str) -> bool:
  return isinstance(layer, rule) if isinstance(rule, type) else fnmatch.fnmatchcase(name, rule)


def _tapped(output: PyTree, name: str, local_axes: int) -> PyTree:
  """A layer's output, with taps at all its floating-point arrays."""

  def one(leaf: Any) -> Any:
    is_floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return tap(leaf, name, local_axes=local_axes) if is_floating else leaf

  return jax.tree.map(one, output)


class MarkedLinen(NamedTuple):
  """A linen module that taps its marked layers when applied."""

  model: nn.Module
  choice: Choice

  def init(self, *args: Any, **kwargs: Any) -> Any:
    """As `model.init`."""
    return self.model.init(*args, **kwargs)

  def apply(self, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
    """As `model.apply`."""
    run = lambda tag: self._apply(variables, args, mutable, kwargs, tag)
    output, called = run(('marked', self.choice))
    if self.choice.problem(called):
      # Layers inside an nn.jit that was traced before are not called again. Now all of them are.
      jax.eval_shape(lambda: called.extend(run(object())[1]))
    problem = self.choice.problem(called)
    if problem:
      raise ValueError(problem)
    return output

  def _apply(
    self, variables: Any, args: tuple, mutable: Any, kwargs: dict, tag: Any
  ) -> tuple[Any, list[Layer]]:
    called: list[Layer] = []

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
      output = next_fun(*args, **kwargs)
      if context.method_name != '__call__':
        return output
      layer = context.module
      name = '/'.join(layer.path) or type(layer).__name__
      called.append(Layer(layer, name, self.choice.is_marked(layer)))
      if not called[-1].is_marked:
        return output
      return _tapped(output, name, self.choice.local_axes_of(layer, name))

    # nn.jit looks up earlier traces by (among other things) what is mutable. An entry that matches
    # no collection separates the traces of differently marked models.
    deny = mutable is True or isinstance(mutable, DenyList)
    own = (subtract_filters if deny else union_filters)(mutable, (tag,))
    with nn.intercept_methods(intercept):
      output, updates = self.model.apply(variables, *args, mutable=own, **kwargs)
    return (output if mutable is False else (output, updates)), called


def _mark_nnx(model: nnx.Module, choice: Choice) -> nnx.Module:
  model = nnx.clone(model)
  layers = [
    Layer(layer, '/'.join(map(str, path)) or type(layer).__name__, choice.is_marked(layer))
    for path, layer in nnx.iter_modules(model)
  ]
  problem = choice.problem(layers)
  if problem:
    raise ValueError(problem)
  for layer, name, is_marked in layers:
    if is_marked:
      layer.__class__ = _tapping(layer.__class__, name, choice.local_axes_of(layer, name))
  return model


def _mark_tree(model: PyTree, choice: Choice) -> PyTree:
  """For Equinox, say, where a module is a frozen dataclass and a pytree."""
  layers: list[Layer] = []

  def is_leaf(node: Any) -> bool:
    is_marked = choice.is_marked(node)
    if callable(node) and not is_marked:
      layers.append(Layer(node, '', False))
    return is_marked

  def one(path: tuple, node: Any) -> Any:
    if not choice.is_marked(node):
      return node
    name = jax.tree_util.keystr(path, simple=True, separator='/') or type(node).__name__
    layers.append(Layer(node, name, True))
    marked = copy.copy(node)
    kind = _tapping(node.__class__, name, choice.local_axes_of(node, name))
    object.__setattr__(marked, '__class__', kind)  # it is frozen
    return marked

  marked = jax.tree_util.tree_map_with_path(one, model, is_leaf=is_leaf)
  problem = choice.problem(layers)
  if problem:
    raise ValueError(problem)
  return marked


@functools.cache  # one class for every mark: JAX compiles anew for a type that it does not know
def _tapping(kind: Any, name: str, local_axes: int) -> type:
  """A subclass of a layer type that taps its output."""

  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _tapped(kind.__call__(self, *args, **kwargs), name, local_axes)

  body = lambda names: names.update(__call__=call)
  return types.new_class(kind.__name__, (kind,), exec_body=body)
