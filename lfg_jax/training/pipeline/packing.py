"""Splits the state of a run by stage, and packs the unequal parts into equal rows.

All devices run one program, so their arrays must have equal shapes. Every stage's part of the state
is therefore one vector per dtype, padded to the longest stage's length. The vectors of all stages
are the rows of one array, and a device holds its stage's row.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Rows = dict[str, jax.Array]  # by dtype
Owned = Mapping[str, range]  # the blocks that a stage has, by stack's name or 'readout'


def take(tree: PyTree, owned: Owned, names: frozenset[str], stacked: frozenset[str]) -> PyTree:
  """Returns the part of a tree that belongs to a stage.

  Whatever is not by stack, such as a counter, belongs to every stage.

  Args:
    tree: any nested tree. A dict in it is by stack if all its keys are among `names`.
    owned: the blocks that the stage has.
    names: names of all stacks, and 'readout'.
    stacked: names of the stacks whose leaves have a leading axis of blocks.

  >>> tree = {'count': 3, 'params': {'stem': jnp.ones(2), 'blocks': jnp.arange(4)}}
  >>> names = frozenset({'stem', 'blocks'})
  >>> take(tree, {'blocks': range(1, 3)}, names, frozenset({'blocks'}))['params']['blocks'].tolist()
  [1, 2]
  """

  def part(node: Any) -> Any:
    if not _is_by_stack(node, names):
      return node
    return {
      name: _slice(node[name], blocks) if name in stacked else node[name]
      for name, blocks in owned.items()
      if name in node
    }

  return jax.tree.map(part, tree, is_leaf=lambda node: _is_by_stack(node, names))


def join(trees: Sequence[PyTree], names: frozenset[str], stacked: frozenset[str]) -> PyTree:
  """Joins the parts that `take` returns, in order of the stages, into the whole tree.

  >>> parts = [{'a': jnp.arange(2)}, {'a': jnp.arange(1), 'b': jnp.ones(())}]
  >>> whole = join(parts, frozenset({'a', 'b'}), frozenset({'a'}))
  >>> whole['a'].tolist(), sorted(whole)
  ([0, 1, 0], ['a', 'b'])
  """

  def whole(*nodes: Any) -> Any:
    if not _is_by_stack(nodes[0], names):
      return nodes[0]
    found: dict[str, list] = {}
    for node in nodes:
      for name, part in node.items():
        found.setdefault(name, []).append(part)
    return {
      name: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
      if name in stacked
      else parts[0]
      for name, parts in found.items()
    }

  return jax.tree.map(whole, *trees, is_leaf=lambda node: _is_by_stack(node, names))


def _is_by_stack(node: Any, names: frozenset[str]) -> bool:
  return isinstance(node, dict) and set(node) <= names


def _slice(tree: PyTree, blocks: range) -> PyTree:
  return jax.tree.map(lambda leaf: leaf[blocks.start : blocks.stop], tree)


def widths(trees: Sequence[PyTree]) -> dict[str, int]:
  """Returns, by dtype, the most elements that any of the trees (of arrays or shapes) has.

  >>> widths([{'a': np.zeros((2, 3), np.float32)}, {'b': np.zeros(4, np.float32)}])
  {'float32': 6}
  """
  longest: dict[str, int] = {}
  for tree in trees:
    own: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
      own[_kind(leaf)] = own.get(_kind(leaf), 0) + math.prod(leaf.shape)
    longest = {kind: max(longest.get(kind, 0), own.get(kind, 0)) for kind in {*longest, *own}}
  return longest


def pack(tree: PyTree, width: Mapping[str, int]) -> Rows:
  """Packs all numbers of a tree into one vector per dtype, padded with zeros to its width.

  >>> pack({'a': jnp.ones((1, 2), jnp.float32)}, {'float32': 3})['float32'].tolist()
  [1.0, 1.0, 0.0]
  """
  parts: dict[str, list[jax.Array]] = {kind: [] for kind in width}
  for leaf in jax.tree.leaves(tree):
    parts[_kind(leaf)].append(jnp.ravel(leaf))
  return {kind: _filled(parts[kind], kind, size) for kind, size in width.items()}


def _filled(parts: Sequence[jax.Array], kind: str, size: int) -> jax.Array:
  rest = size - sum(part.size for part in parts)
  return jnp.concatenate([*parts, *[jnp.zeros(rest, kind)] * bool(rest)])


def unpack(rows: Rows, like: PyTree) -> PyTree:
  """Unpacks the vectors of `pack` into a tree with the shapes of `like`.

  >>> unpack({'float32': jnp.arange(3.)}, {'a': jnp.ones((1, 2), jnp.float32)})['a'].tolist()
  [[0.0, 1.0]]
  """
  at = dict.fromkeys(rows, 0)

  def one(leaf: Any) -> jax.Array:
    kind, size = _kind(leaf), math.prod(leaf.shape)
    at[kind] += size
    return rows[kind][at[kind] - size : at[kind]].reshape(leaf.shape)

  return jax.tree.map(one, like)


def _kind(leaf: Any) -> str:
  return np.dtype(leaf.dtype).name
