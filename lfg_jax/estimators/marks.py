"""Layers marked by type: `mark(model, nn.Dense)` taps the outputs of layers.

The model's code stays as it is.

    def losses(params, x, y):                                           # Flax linen
      logits = lfg_jax.mark(model, nn.Dense).apply({'params': params}, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    graph, params, rest = nnx.split(lfg_jax.mark(model, nnx.Linear), nnx.Param, ...)    # Flax NNX

    def losses(model, x, y):                                            # Equinox
      logits = jax.vmap(lfg_jax.mark(model, eqx.nn.Linear))(x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y)

A tap is named after its layer's path; a layer that is called twice has one tap per call.
"""

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.scope import DenyList, subtract_filters, union_filters

from lfg_jax.estimators.taps import tap

PyTree = Any
Layers = type | Sequence[type] | Callable[[Any], bool]


def mark(model: Any, layers: Layers) -> Any:
  """The model, with taps at the outputs of some layers. The given model is not changed.

  Args:
    model: a Flax linen or NNX module, or an Equinox module (or another pytree of layers).
    layers: a layer type, several types, or a predicate of a layer.

  Returns:
    For linen, an object with the model's `apply` and `init`; otherwise a copy of the model, whose
    parameters keep their paths and values.

  Raises:
    ValueError: no layer fits. (With linen, `apply` raises it, because layers are created when
      called.)

  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> marked = mark(model, nnx.Linear)
  >>> str(jax.make_jaxpr(marked)(jnp.ones((1, 2)))).count('tap[')
  1
  """
  is_marked = _matcher(layers)
  if isinstance(model, nn.Module):
    return MarkedLinen(model, is_marked, tuple(layers) if isinstance(layers, Sequence) else layers)
  mark_copy = _mark_nnx if isinstance(model, nnx.Module) else _mark_tree
  return mark_copy(model, is_marked)


def _matcher(layers: Layers) -> Callable[[Any], bool]:
  if isinstance(layers, (type, Sequence)):
    kinds = layers if isinstance(layers, type) else tuple(layers)
    return lambda layer: isinstance(layer, kinds)
  return layers


def _tapped(output: PyTree, name: str) -> PyTree:
  """A layer's output, with taps at all its floating-point arrays."""
  is_floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
  return jax.tree.map(lambda leaf: tap(leaf, name) if is_floating(leaf) else leaf, output)


def _none_fits(names: Sequence[str]) -> ValueError:
  return ValueError(
    'no layer is marked; allowed, as `layers`: types or a predicate that fit some '
    f'of {", ".join(sorted(set(names)))}'
  )


class MarkedLinen(NamedTuple):
  """A linen module that taps its marked layers when applied."""

  model: nn.Module
  is_marked: Callable[[Any], bool]
  layers: Any

  def init(self, *args: Any, **kwargs: Any) -> Any:
    """As `model.init`."""
    return self.model.init(*args, **kwargs)

  def apply(self, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
    """As `model.apply`."""
    run = lambda tag: self._apply(variables, args, mutable, kwargs, tag)
    output, called, is_found = run(('marked', self.layers))
    if not is_found:
      # Layers inside an nn.jit that was traced before are not called again. Now all of them are.
      def names() -> None:
        nonlocal called, is_found
        _, called, is_found = run(object())

      jax.eval_shape(names)
    if not is_found:
      raise _none_fits(called)
    return output

  def _apply(
    self, variables: Any, args: tuple, mutable: Any, kwargs: dict, tag: Any
  ) -> tuple[Any, list[str], bool]:
    called, is_found = [], False

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
      nonlocal is_found
      output = next_fun(*args, **kwargs)
      if context.method_name != '__call__':
        return output
      name = '/'.join(context.module.path)
      called.append(name or 'the model itself')
      if not self.is_marked(context.module):
        return output
      is_found = True
      return _tapped(output, name or type(context.module).__name__)

    # nn.jit looks up earlier traces by (among other things) what is mutable. An entry that matches
    # no collection separates the traces of differently marked models.
    deny = mutable is True or isinstance(mutable, DenyList)
    own = (subtract_filters if deny else union_filters)(mutable, (tag,))
    with nn.intercept_methods(intercept):
      output, updates = self.model.apply(variables, *args, mutable=own, **kwargs)
    return (output if mutable is False else (output, updates)), called, is_found


def _mark_nnx(model: nnx.Module, is_marked: Callable[[Any], bool]) -> nnx.Module:
  model, kinds, is_found = nnx.clone(model), [], False
  for path, layer in list(nnx.iter_modules(model)):
    kinds.append(type(layer).__name__)
    if is_marked(layer):
      is_found = True
      layer.__class__ = _tapping(type(layer), '/'.join(map(str, path)))
  if not is_found:
    raise _none_fits(kinds)
  return model


def _mark_tree(model: PyTree, is_marked: Callable[[Any], bool]) -> PyTree:
  """For Equinox, say, where a module is a frozen dataclass and a pytree."""
  kinds: list[str] = []

  def is_leaf(node: Any) -> bool:
    if callable(node):
      kinds.append(type(node).__name__)
    return is_marked(node)

  def one(path: tuple, node: Any) -> Any:
    if not is_marked(node):
      return node
    marked = copy.copy(node)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    object.__setattr__(marked, '__class__', _tapping(type(node), name))  # it is frozen
    return marked

  marked = jax.tree_util.tree_map_with_path(one, model, is_leaf=is_leaf)
  if not any(map(is_marked, jax.tree.leaves(model, is_leaf=is_marked))):
    raise _none_fits(kinds)
  return marked


def _tapping(kind: Any, name: str) -> type:
  """A subclass of a layer type that taps its output."""

  def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _tapped(kind.__call__(self, *args, **kwargs), name or kind.__name__)

  body = lambda names: names.update(__call__=call)
  return types.new_class(kind.__name__, (kind,), exec_body=body)
