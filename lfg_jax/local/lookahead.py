"""Heads that look ahead: a block's losses are read after a slow average of the next block.

The head of block n sees the features that the next block makes of block n's output:

    losses_n = head_n(f̄(f_n(x))),    f̄ = block n+1 with an average of its parameters.

The average moves after every step and is constant within a step: no gradient flows into it. So
block n learns what block n+1 can use, without waiting for a gradient from block n+1. f̄ comes after
the block's last tap, and its own taps are removed. So it adds nothing to what is perturbed. If the
last tap is exact, the exact signal comes back through f̄ by reverse mode.

**Which block is next.** In a stack of scanned blocks, it is the following block. The last block of
the stack uses its own average as the next block; this is possible because its output has its
input's shape, and it keeps the stack one scan. For a single block, the next block is the first of
the next stack. A single block at the end of the network has nothing to look through, and its head
reads its own output.

**Credit.** f̄ mixes channels, and most blocks mix patches. So every activity of the block
influences the losses of *all* patches and groups. The block's taps must say so, and they do if they
are not `context.last`. An estimator that stops at the model's boundary (see `estimators.exact_tail`) is
different. It has the exact signal s at the block's end y, and takes s·y in place of the true
losses: one part for each patch and group of y. An activity influences y, and so these parts, only
in its own patch and group. Credited with these parts only, it has no more noise than without f̄.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.jaxpr.tapped import without_taps
from lfg_jax.local.staged import Block, BlockContext, Outcome, Stack, StagedModel, Variables
from lfg_jax.local.targets import Targets

PyTree = Any


def look_ahead(model: StagedModel, *, bounded: bool = False) -> StagedModel:
  """Returns the model with heads that look ahead. Its blocks need 'lookahead' among their variables.

  Args:
    bounded: whether the estimator stops at the model's boundary; see "Credit".

  Raises:
    ValueError: no block has a next block to look through, or a block has no parameters 'head'.

  >>> from lfg_jax.models import registry
  >>> images = registry.Images((8, 8, 1), 10, (0.5,), (0.3,))
  >>> mlp = registry.find('mlp').make({'blocks': 4, 'channels': 8, 'groups': 2}, images)
  >>> model = look_ahead(mlp)
  >>> lookahead = model.lookahead(model.init(jax.random.key(0))['params'])
  >>> jax.tree.map(jnp.shape, lookahead['stem'])['hidden']    # of the first block behind the stem
  {'bias': (8,), 'kernel': (8, 8)}
  """
  nexts = next_stacks(model.stacks)
  if not any(nexts):
    raise ValueError(
      'losses.head_ahead looks through the next block, and the model has one block; '
      'allowed: False, or more blocks'
    )
  _check_heads(model)
  stacks = tuple(
    dataclasses.replace(stack, block=_looking(stack.block, after.block, bounded))
    if after
    else stack
    for stack, after in zip(model.stacks, nexts, strict=True)
  )

  def init(key: jax.Array) -> Variables:
    variables = model.init(key)
    return {**variables, 'params': _with_heads(model.stacks, variables['params'])}

  return dataclasses.replace(
    model,
    stacks=stacks,
    init=init,
    lookahead=lambda params: following(model.stacks, params),
    grouped=(),  # every weight influences the losses of all groups
    variant=lambda **changes: look_ahead(model.variant(**changes), bounded=bounded),
  )


def next_stacks(stacks: Sequence[Stack]) -> list[Stack | None]:
  """For every stack, the stack with the block that its heads look through; None: no such block."""
  return [
    stack if stack.is_stacked else after
    for stack, after in zip(stacks, [*stacks[1:], None], strict=True)
  ]


def following(stacks: Sequence[Stack], params: PyTree) -> PyTree:
  """By stack, the parameters (without heads) of the block that follows each of its blocks."""
  found: dict[str, PyTree] = {}
  for stack, after in zip(stacks, next_stacks(stacks), strict=True):
    if after:
      own = {name: layer for name, layer in params[after.name].items() if name != 'head'}
      found[stack.name] = jax.tree.map(_shifted, own) if stack.is_stacked else _first(after, own)
  return found


def _check_heads(model: StagedModel) -> None:
  params = jax.eval_shape(model.init, jax.random.key(0))['params']
  for stack in model.stacks:
    if 'head' not in params[stack.name]:
      raise ValueError(
        f"losses.head_ahead needs parameters 'head' in every block; {stack.name} has "
        f'{", ".join(params[stack.name])}; allowed: False, or a head of that name'
      )


def _shifted(leaf: jax.Array) -> jax.Array:
  """Replaces each block's part, along the leading axis, by the next block's; the last one stays."""
  return jnp.concatenate([leaf[1:], leaf[-1:]])


def _first(stack: Stack, tree: PyTree) -> PyTree:
  """The first block's part of a stack's tree."""
  return jax.tree.map(lambda leaf: leaf[0], tree) if stack.is_stacked else tree


def _with_heads(stacks: Sequence[Stack], params: PyTree) -> PyTree:
  """Gives every block a head whose shape fits the features of its next block."""
  heads = {
    stack.name: _first(after, params[after.name]['head'])
    for stack, after in zip(stacks, next_stacks(stacks), strict=True)
    if after and not stack.is_stacked
  }
  return {**params, **{name: {**params[name], 'head': head} for name, head in heads.items()}}


def _looking(block: Block, after: Block, bounded: bool) -> Block:
  """`block`, with the losses of `after`, in which `block`'s own head replaces that of `after`."""

  def looking(
    variables: Variables, x: jax.Array, targets: Targets, context: BlockContext
  ) -> Outcome:
    own = {kind: tree for kind, tree in variables.items() if kind != 'lookahead'}
    y, _, updates = block(
      own, x, targets, BlockContext(context.name, last=context.last and bounded)
    )
    if context.cut is None:
      return y, None, updates

    @without_taps
    def losses(params: PyTree, y: jax.Array) -> jax.Array | None:
      return after({'params': params}, y, targets, BlockContext(context.name, context.cut))[1]

    through = {**variables['lookahead'], 'head': own['params']['head']}
    return y, losses(through, y), updates

  return looking
