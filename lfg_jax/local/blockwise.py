"""Blockwise training: each stage of the network learns from its own local losses only.

A stage is one block (or k blocks, or an overlapping pair of blocks) with the losses at its end. No
gradient flows back to earlier stages. Any estimator can serve a stage. Each stage finishes before
the next begins. Equal stages are scanned, so memory does not grow with depth.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.estimators.control_variates import Learned
from lfg_jax.estimators.exact_tail import Estimator
from lfg_jax.local.replicated import Cut
from lfg_jax.local.staged import (
  Block,
  BlockContext,
  Stack,
  StagedModel,
  Variables,
  merge,
  variables_of,
)
from lfg_jax.local.targets import Targets

PyTree = Any
KINDS = (
  'params',
  'batch_stats',
  'feedback',
  'lookahead',
  'control_variate',
)  # of variables that blocks have


def stage_loss(blocks: Sequence[Block], cut: Cut) -> Callable:
  """Returns the loss function of consecutive blocks with local losses after the last.

  Returns:
    `(fixed, params, x, targets) -> (losses [B, P, G], aux)`. `params` and the other variables,
    `fixed`, have one entry per block, by `block_names`. aux has the blocks' 'outputs' and the
    variables that they update.
  """
  names = block_names(len(blocks))

  def loss(
    fixed: Variables, params: PyTree, x: jax.Array, targets: Targets
  ) -> tuple[jax.Array | None, dict[str, Any]]:
    variables: Variables = {'params': params, **fixed}
    outputs: list[jax.Array] = []
    updates: Variables = {}
    losses = None
    for name, block in zip(names, blocks, strict=True):
      context = BlockContext(name, cut, last=True) if name == 'last' else BlockContext(name)
      x, losses, new = block(variables_of(variables, name), x, targets, context)
      outputs.append(x)
      merge(updates, name, new)
    return losses, {'outputs': tuple(outputs), **updates}

  return loss


def block_names(size: int) -> list[str]:
  """Names of a stage's blocks: `inner_0`, …, and `last` for the block below the losses."""
  return [*(f'inner_{i}' for i in range(size - 1)), 'last']


class Stages(NamedTuple):
  """Consecutive equal stages.

  Attributes:
    blocks: for every stage, the positions of its blocks in the network.
    advance: number of a stage's blocks that the next stage's input has passed through.
    taken: which of the stages are run.
  """

  blocks: tuple[tuple[int, ...], ...]
  advance: int
  taken: slice = slice(None)


def stages(depth: int, every: int = 1, overlap: bool = False) -> list[tuple[tuple[int, ...], int]]:
  """Returns (blocks, advance) for every stage, as in `Stages`.

  Args:
    depth: number of blocks.
    every: blocks per stage; the last stage takes the remaining ones.
    overlap: whether stages are pairs of neighbours, so that a block also learns from the next
      block's losses (Xiong et al. 2020).

  >>> stages(4)
  [((0,), 1), ((1,), 1), ((2,), 1), ((3,), 1)]
  >>> stages(3, every=2)
  [((0, 1), 2), ((2,), 1)]
  >>> stages(3, overlap=True)
  [((0,), 0), ((0, 1), 1), ((1, 2), 1)]
  """
  if overlap:
    return [((0,), 0), *(((n - 1, n), 1) for n in range(1, depth))]
  cut = [tuple(range(n, min(n + every, depth))) for n in range(0, depth, every)]
  return [(blocks, len(blocks)) for blocks in cut]


def _grouped(
  homes: Sequence[tuple[Stack, int]], plan: Sequence[tuple[tuple[int, ...], int]]
) -> list[Stages]:
  """Groups consecutive stages of equal blocks, if they can be scanned."""
  groups: list[Stages] = []
  kind = None
  for blocks, advance in plan:
    stacks = [homes[n][0] for n in blocks]
    previous, kind = kind, ([stack.name for stack in stacks], advance)
    if kind == previous and all(stack.is_stacked for stack in stacks):
      groups[-1] = groups[-1]._replace(blocks=(*groups[-1].blocks, blocks))
    else:
      groups.append(Stages((blocks,), advance))
  return groups


def _within(plan: Sequence[Stages], span: range) -> list[Stages]:
  """The same groups, but only the stages in `span` are taken."""
  begins = [sum(len(group.blocks) for group in plan[:n]) for n in range(len(plan))]
  return [
    group._replace(taken=slice(max(span.start - begin, 0), max(span.stop - begin, 0)))
    for begin, group in zip(begins, plan, strict=True)
  ]


def owned(model: StagedModel, span: range, every: int = 1) -> dict[str, range]:
  """Returns, by stack, the blocks in the stages of `span`. Stages must not overlap.

  >>> from lfg_jax.models import registry
  >>> images = registry.Images((8, 8, 1), 10, (0.5,), (0.3,))
  >>> owned(registry.find('mlp').make({'blocks': 4, 'channels': 8, 'groups': 2}, images), range(2))
  {'stem': range(0, 1), 'blocks': range(0, 1)}
  """
  homes = [(stack.name, i) for stack in model.stacks for i in range(stack.count)]
  mine: dict[str, list[int]] = {}
  for blocks, _ in stages(model.depth, every)[span.start : span.stop]:
    for name, i in (homes[n] for n in blocks):
      mine.setdefault(name, []).append(i)
  return {name: range(indices[0], indices[-1] + 1) for name, indices in mine.items()}


class Member(NamedTuple):
  """The blocks of a stack that are at the same position in each of several equal stages."""

  stack: Stack
  indices: list[int]

  @property
  def _whole(self) -> bool:
    return self.indices == list(range(self.stack.count))

  def take(self, tree: PyTree) -> PyTree:
    """Returns these blocks' part of the stack's variables, stacked."""
    if not self.stack.is_stacked:
      return jax.tree.map(lambda leaf: leaf[None], tree)
    return tree if self._whole else jax.tree.map(lambda leaf: leaf[jnp.array(self.indices)], tree)

  def add_to(self, tree: PyTree | None, part: PyTree) -> PyTree:
    """Returns the stack's gradients `tree` (None: zero), with `part` added at these blocks."""
    if not self.stack.is_stacked:
      part = jax.tree.map(lambda leaf: leaf[0], part)
    elif not self._whole:
      zeros = jax.tree.map(
        lambda leaf: jnp.zeros((self.stack.count, *leaf.shape[1:]), leaf.dtype), part
      )
      part = self.put_in(zeros, part)
    return part if tree is None else jax.tree.map(jnp.add, tree, part)

  def put_in(self, tree: PyTree, part: PyTree) -> PyTree:
    """Returns the stack's tree, with `part` in place of these blocks."""
    if not self.stack.is_stacked:
      return jax.tree.map(lambda leaf: leaf[0], part)
    return jax.tree.map(lambda leaf, new: leaf.at[jnp.array(self.indices)].set(new), tree, part)


def blockwise(
  estimator: Estimator,
  model: StagedModel,
  cut: Cut,
  *,
  every: int = 1,
  overlap: bool = False,
  span: range | None = None,
) -> Callable:
  """Returns a function that computes the gradients of all blocks, stage by stage.

  Args:
    span: the stages to run; the variables then have only the blocks of these stages, see `owned`.
      None: all stages.

  Returns:
    `(variables, key, x, targets) -> (x, losses_B, grads, updates)`. x is the last block's output.
    losses_B has each example's weighted local loss, averaged over patches and groups and summed
    over stages. grads has the gradients of all stacks. updates has further trees by stack:
    'batch_stats', the updated statistics of batch norm, and 'control_variate_gradient', the gradient of the
    control variates' weights.
  """
  homes = [(stack, i) for stack in model.stacks for i in range(stack.count)]
  plan = _grouped(homes, stages(model.depth, every, overlap))
  if span is not None:
    plan, homes = _within(plan, span), _only(homes, owned(model, span, every))

  def run_stages(
    variables: Variables, key: jax.Array, x: jax.Array, targets: Targets
  ) -> tuple[jax.Array, jax.Array, PyTree, PyTree]:
    grads: dict[str, PyTree] = {}
    control_variate_grads: dict[str, PyTree] = {}
    stats = dict(variables.get('batch_stats', {}))
    loss_B, out = jnp.zeros(x.shape[0]), x
    # Equal stages in succession are one scan; so is a single stage, of length one. x goes from one
    # stage to the next without its gradient, which is what makes the training local.
    for number, group in enumerate(plan):
      named = _members(group, homes)
      if not named:
        continue
      keys = jax.random.split(jax.random.fold_in(key, number), len(group.blocks))[group.taken]
      inputs = (keys, *(_gathered(variables.get(kind, {}), named) for kind in KINDS))
      loss = stage_loss([member.stack.block for member in named.values()], cut)
      body = _stage_body(estimator, loss, targets, group.advance)
      (x, out), (losses_SxB, part, new_stats, control_variate_part) = _scan(
        body, x, inputs, len(keys)
      )
      loss_B = loss_B + losses_SxB.sum(0)
      for total, of_group in ((grads, part), (control_variate_grads, control_variate_part)):
        for name in of_group:
          stack = named[name].stack.name
          total[stack] = named[name].add_to(total.get(stack), of_group[name])
      # With overlap, a block is in two stages. The one with its own losses gives its statistics.
      for name in {'last'} if overlap else set(named):
        if name in new_stats:
          stack = named[name].stack.name
          stats[stack] = named[name].put_in(stats[stack], new_stats[name])
    return (
      out,
      loss_B,
      grads,
      {'batch_stats': stats, 'control_variate_gradient': control_variate_grads},
    )

  return run_stages


def _only(homes: Sequence[tuple[Stack, int]], mine: Mapping[str, range]) -> list[tuple[Stack, int]]:
  """The same homes, in stacks that have only the blocks in `mine`."""
  return [
    (
      dataclasses.replace(stack, count=len(mine.get(stack.name, ()))),
      i - mine[stack.name].start if stack.name in mine else i,
    )
    for stack, i in homes
  ]


def _members(group: Stages, homes: Sequence[tuple[Stack, int]]) -> dict[str, Member]:
  """The blocks of the stages that are run, by their names in a stage; none if none is run."""
  members = [
    Member(homes[ns[0]][0], [homes[n][1] for n in ns])
    for ns in zip(*group.blocks[group.taken], strict=True)
  ]
  return dict(zip(block_names(len(members)), members, strict=True)) if members else {}


def _gathered(tree: PyTree, members: Mapping[str, Member]) -> PyTree:
  """One kind of variables, restricted to a stage's blocks and keyed by their names in the stage."""
  return {
    name: member.take(tree[member.stack.name])
    for name, member in members.items()
    if member.stack.name in tree
  }


def _stage_body(estimator: Estimator, loss: Callable, targets: Targets, advance: int) -> Callable:
  """The body of a scan over stages; carries the next stage's input and the last block's output."""

  def body(
    carry: tuple[jax.Array, jax.Array], inputs: tuple
  ) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    x, _ = carry
    key, params, stats, feedback, lookahead, control_variate_weights = inputs
    given = {'batch_stats': stats, 'feedback': feedback, 'lookahead': lookahead}
    fixed = {kind: tree for kind, tree in given.items() if tree}

    predicting = lambda weights, *args: loss({**fixed, 'feedback': weights}, *args)
    learned = Learned(control_variate_weights, predicting) if control_variate_weights else None
    (losses, aux), grads = estimator(functools.partial(loss, fixed), learned)(
      params, key, x, targets
    )
    outputs = (x, *aux['outputs'])
    new_stats = aux.get('batch_stats', {})
    return (outputs[advance], outputs[-1]), (
      losses.mean((1, 2)),
      grads,
      new_stats,
      aux.get('control_variate_gradient', {}),
    )

  return body


def _scan(
  body: Callable, x: jax.Array, inputs: PyTree, length: int
) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
  """Like `jax.lax.scan`, but a single stage may change the shape of x."""
  if length > 1:
    return jax.lax.scan(body, (x, x), inputs)
  carry, out = body((x, x), jax.tree.map(lambda leaf: leaf[0], inputs))
  return carry, jax.tree.map(lambda leaf: leaf[None], out)
