"""Tangent laws: the random directions along which a forward gradient is measured.

A forward gradient `(∇f·v) v` is unbiased when `E[v vᵀ] = I`; its variance depends on the law's fourth
moment. Per example, over d perturbed dimensions, the squared error is `(d + κ - 2) |∇f|²` with κ = E[v⁴]:
d + 1 for normal entries (κ = 3), d - 1 for ±1 entries (κ = 1, the smallest that unit variance allows).

Noise that belongs to an example is keyed by the example's position in the *global* batch, so the same
update comes out on any number of devices.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.parts import WHOLE, Part


class Law(NamedTuple):
  """A law of independent entries with zero mean and unit variance.

  Attributes:
    draw: `(key, shape, dtype) -> array`.
    fourth_moment: E[v⁴] of one entry.
  """
  draw: Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
  fourth_moment: float


def draw_signs(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """±1 with probability one half each, 32 drawn from every random word.

  >>> sorted(set(draw_signs(jax.random.key(0), (3, 50)).ravel().tolist()))
  [-1.0, 1.0]
  """
  size = math.prod(shape)
  words_W = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
  bits_Wx32 = (words_W[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
  return (1 - 2 * bits_Wx32.astype(jnp.int8)).astype(dtype).ravel()[:size].reshape(shape)


normal = Law(jax.random.normal, fourth_moment=3.0)
rademacher = Law(draw_signs, fourth_moment=1.0)

LAWS = {'normal': normal, 'rademacher': rademacher}


def like_tree(law: Law, key: jax.Array, tree: Any) -> Any:
  """One independent tangent for every leaf of `tree`, of its shape and dtype.

  >>> v = like_tree(rademacher, jax.random.key(0), {'a': jnp.zeros(3), 'b': jnp.zeros((2, 2))})
  >>> v['b'].shape
  (2, 2)
  """
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(key, max(len(leaves), 1))
  return jax.tree.unflatten(
      treedef, [law.draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=False)])


def example_ids(batch: int, axis_name: str | None, part: Part = WHOLE) -> jax.Array:
  """int32 [batch]: positions in the global batch of the examples in one of the equal parts that this device takes."""
  index, parts = part
  device = jax.lax.axis_index(axis_name) if axis_name else 0
  return (device * parts + index) * batch + jnp.arange(batch)


def fold_in_all(key: jax.Array, ids_N: jax.Array) -> jax.Array:
  """[N] keys, one for every id."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, ids_N)
