"""Shared by the function transformations: how to call a function, how to explain its errors."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax.jaxpr.interpreter import backward_only

PyTree = Any


def positions(argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
  """The differentiated arguments among `count`, as non-negative numbers."""
  numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
  for n in numbers:
    if not -count <= n < count:
      raise ValueError(
        f'argnums is {argnums!r}, but the function was called with {count} positional arguments'
      )
  return tuple(n % count for n in numbers)


def check_floating(numbers: tuple[int, ...], point: tuple) -> None:
  """Raises TypeError unless the differentiated arguments, of these numbers, are real floating-point.

  Raises:
    ValueError: they have no entries.
  """
  leaves = jax.tree_util.tree_leaves_with_path(dict(zip(numbers, point, strict=True)))
  for (number, *path), leaf in leaves:
    name = f'argument {number.key}{jax.tree_util.keystr(tuple(path))}'
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int, complex)):
      raise TypeError(
        f'{name} is {type(leaf).__name__}, not an array; allowed: arrays only, such as the first of '
        'eqx.partition(model, eqx.is_inexact_array)'
      )
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise TypeError(
        f'forward gradients are of real floating-point inputs; {name} has dtype '
        f'{jnp.result_type(leaf)}'
      )
  if not any(jnp.size(leaf) for _, leaf in leaves):
    given = ', '.join(map(str, numbers))
    raise ValueError(f'argument {given} has no entries; allowed: something to differentiate')


def bind(
  fun: Callable, argnums: int | Sequence[int], key: jax.Array, args: tuple, kwargs: dict
) -> tuple[Callable, tuple, jax.Array]:
  """(function of the differentiated arguments, their values, key for the tangents).

  A function with a required parameter `key` gets its own key, split from `key`.
  """
  if wants_key(fun, args, kwargs):
    key, own = jax.random.split(key)
    kwargs = {**kwargs, 'key': own}
  numbers = positions(argnums, len(args))
  point = tuple(args[n] for n in numbers)
  check_floating(numbers, point)

  def of_point(point: tuple) -> Any:
    replaced = dict(zip(numbers, point, strict=True))
    return fun(*(replaced.get(n, arg) for n, arg in enumerate(args)), **kwargs)

  return of_point, point, key


def wants_key(fun: Callable, args: tuple, kwargs: dict) -> bool:
  """Whether `fun` has a parameter `key` without a default that the call does not supply."""
  try:
    signature = inspect.signature(fun)
    given = signature.bind_partial(*args, **kwargs).arguments
  except (TypeError, ValueError):
    return False  # no signature, or arguments that do not fit: the call itself will complain
  key = signature.parameters.get('key')
  required = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  is_required = key is not None and key.kind in required and key.default is key.empty
  return is_required and 'key' not in given


def with_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
  """(value, aux) of a function's output."""
  if not has_aux:
    return out, None
  if not isinstance(out, (tuple, list)) or len(out) != 2:
    raise TypeError(
      f'with has_aux the output is {type(out).__name__}; allowed: a pair (value, aux)'
    )
  value, aux = out
  return value, aux


class Static:
  """Holds the non-arrays of an aux (text, say) while its arrays pass through JAX."""

  def split(self, tree: PyTree) -> list[jax.Array]:
    """The arrays."""
    leaves, self._treedef = jax.tree.flatten(tree)
    self._others = [None if isinstance(leaf, jax.Array) else (leaf,) for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

  def join(self, arrays: Sequence[jax.Array]) -> PyTree:
    """The tree that was split, with these arrays."""
    remaining = iter(arrays)
    leaves = [other[0] if other else next(remaining) for other in self._others]
    return jax.tree.unflatten(self._treedef, leaves)


def explained(error: Exception, jaxpr: Callable[[], Any]) -> Exception:
  """The error, or one that names the function without a forward derivative, or the way around."""
  if isinstance(error, NotImplementedError):
    return NotImplementedError(f'{error}; allowed: chunk=1, which needs no vmap over tangents')
  if 'custom_vjp' not in str(error):
    return error
  names = ', '.join(backward_only(jaxpr())) or 'a function'
  return TypeError(
    f'{names} has jax.custom_vjp, a backward rule only, and no forward derivative; '
    'allowed: jax.custom_jvp, another implementation '
    "(jax.nn.dot_product_attention(implementation='xla')), or no tap before it"
  )
