"""Greedy training: the network in stages, each learning from its own local losses, with nothing flowing back.

A stage is one block (or k blocks, or overlapping pairs) with the losses at its end. Any estimator serves a stage,
and each stage is done with before the next begins: equal stages are scanned, so memory does not grow with depth.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lfg_jax.estimators.boundary import Estimator
from lfg_jax.estimators.guesses import Learned
from lfg_jax.losses.replicated import Cut
from lfg_jax.models.mixer import BlockSpec, Criterion, LocalBlock, MixerSpec, Run, Style

PyTree = Any


class StageModule(nn.Module):
  """Consecutive blocks, with local losses after the last."""
  specs: tuple[BlockSpec, ...]
  style: Style
  head_outputs: int
  cut: Cut

  @nn.compact
  def __call__(self, x: jax.Array, criterion: Criterion) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """Returns the losses [B, P, G] and the output of every block."""
    names, outputs = block_names(len(self.specs)), []
    for i, spec in enumerate(self.specs):
      last = i == len(self.specs) - 1
      block = LocalBlock(spec, self.style, self.head_outputs, self.cut, last, name=names[i])
      x, losses = block(x, criterion if last else None, criterion.weight_B)
      outputs.append(x)
    return losses, tuple(outputs)


def block_names(size: int) -> list[str]:
  """Names of a stage's blocks: `inner_0`, …, and `last`, the one under the losses."""
  return [*(f'inner_{i}' for i in range(size - 1)), 'last']


class Stages(NamedTuple):
  """Equal stages in a row.

  Attributes:
    blocks: for every stage, the positions in the network of its blocks.
    advance: how many of its blocks the next stage's input has passed.
  """
  blocks: tuple[tuple[int, ...], ...]
  advance: int


def stages(depth: int, every: int = 1, overlap: bool = False) -> list[tuple[tuple[int, ...], int]]:
  """(blocks, advance) of every stage.

  Args:
    depth: number of blocks.
    every: blocks per stage; the last stage takes what is left.
    overlap: pairs of neighbours, so that a block also learns from the next block's losses (Xiong et al. 2020).

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


def _grouped(spec: MixerSpec, plan: Sequence[tuple[tuple[int, ...], int]]) -> list[Stages]:
  """Consecutive stages of equal blocks together, if they can be scanned."""
  specs = [run.spec for run in spec.runs for _ in range(run.count)]
  groups: list[Stages] = []
  signature = None
  for blocks, advance in plan:
    previous, signature = signature, (tuple(specs[n] for n in blocks), advance)
    if signature == previous and all(s.stacked for s in signature[0]):
      groups[-1] = groups[-1]._replace(blocks=(*groups[-1].blocks, blocks))
    else:
      groups.append(Stages((blocks,), advance))
  return groups


class Member(NamedTuple):
  """The blocks of a run that stand at one position in each of several equal stages."""
  run: Run
  indices: list[int]

  @property
  def _whole(self) -> bool:
    return self.indices == list(range(self.run.count))

  def take(self, tree: PyTree) -> PyTree:
    """Their part of the run's variables, stacked."""
    if not self.run.spec.stacked:
      return jax.tree.map(lambda leaf: leaf[None], tree)
    return tree if self._whole else jax.tree.map(lambda leaf: leaf[jnp.array(self.indices)], tree)

  def add_to(self, tree: PyTree | None, part: PyTree) -> PyTree:
    """The run's gradients (None: zero so far) with `part` added at these blocks."""
    if not self.run.spec.stacked:
      part = jax.tree.map(lambda leaf: leaf[0], part)
    elif not self._whole:
      zeros = jax.tree.map(lambda leaf: jnp.zeros((self.run.count, *leaf.shape[1:]), leaf.dtype), part)
      part = self.put_in(zeros, part)
    return part if tree is None else jax.tree.map(jnp.add, tree, part)

  def put_in(self, tree: PyTree, part: PyTree) -> PyTree:
    """The run's tree with `part` at these blocks."""
    if not self.run.spec.stacked:
      return jax.tree.map(lambda leaf: leaf[0], part)
    return jax.tree.map(lambda leaf, new: leaf.at[jnp.array(self.indices)].set(new), tree, part)


def greedy(estimator: Estimator, spec: MixerSpec, cut: Cut, *, every: int = 1,
           overlap: bool = False) -> Callable:
  """Gradients of all blocks, stage by stage.

  Returns:
    `(variables, key, tokens, criterion) -> (x, losses_B, grads, updates)`: the last block's output [B, P, C], the sum
    over stages of the mean local loss (weighted, per example), gradients of all stacks, and further trees of the
    variables' structure: 'batch_stats', batch norm's updated statistics, and 'guess_gradient', of what guesses learn.
  """
  plan = _grouped(spec, stages(sum(run.count for run in spec.runs), every, overlap))
  homes = [(run, i) for run in spec.runs for i in range(run.count)]

  def run_stages(variables: dict[str, PyTree], key: jax.Array, x: jax.Array, criterion: Criterion
                 ) -> tuple[jax.Array, jax.Array, PyTree, PyTree]:
    grads: dict[str, PyTree] = {}
    guess_grads: dict[str, PyTree] = {}
    stats = dict(variables.get('batch_stats', {}))
    fixed = {name: variables[name] for name in ('feedback', 'batch_stats') if variables.get(name)}
    loss_B, out = jnp.zeros(x.shape[0]), x
    for number, group in enumerate(plan):
      members = [Member(homes[ns[0]][0], [homes[n][1] for n in ns]) for ns in zip(*group.blocks, strict=True)]
      names = block_names(len(members))
      gather = lambda tree: {name: m.take(tree[m.run.name]) for name, m in zip(names, members, strict=True)}  # noqa: B023
      module = StageModule(tuple(m.run.spec for m in members), spec.style, spec.head_outputs, cut)
      keys = jax.random.split(jax.random.fold_in(key, number), len(group.blocks))
      guess = {name: m.take(variables['guess'][m.run.name]) for name, m in zip(names, members, strict=True)
               if m.run.name in variables.get('guess', {})}
      inputs = (keys, gather(variables['params']), {name: gather(tree) for name, tree in fixed.items()}, guess)
      body = _stage_body(estimator, module, criterion, group.advance)
      (x, out), (losses_SxB, part, new_stats, guess_part) = _scan(body, x, inputs, len(group.blocks))
      loss_B = loss_B + losses_SxB.sum(0)
      for name, member in zip(names, members, strict=True):
        grads[member.run.name] = member.add_to(grads.get(member.run.name), part[name])
        if name in guess_part:
          guess_grads[member.run.name] = member.add_to(guess_grads.get(member.run.name), guess_part[name])
      if 'last' in new_stats:
        old = stats[members[-1].run.name]
        stats[members[-1].run.name] = members[-1].put_in(old, new_stats['last'])
    return out, loss_B, grads, {'batch_stats': stats, 'guess_gradient': guess_grads}
  return run_stages


def _stage_body(estimator: Estimator, module: StageModule, criterion: Criterion, advance: int
                ) -> Callable:
  """One stage, for `jax.lax.scan`. Carries the next stage's input and the last block's output."""
  def body(carry: tuple[jax.Array, jax.Array], inputs: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    x, _ = carry
    key, params, fixed, guess_weights = inputs

    def loss(fixed: PyTree, params: PyTree, x: jax.Array, criterion: Criterion) -> tuple[jax.Array, dict]:
      (losses, outputs), updates = module.apply({'params': params, **fixed}, x, criterion, mutable=('batch_stats',))
      return losses, {'outputs': outputs, **updates}

    def guessing(weights: PyTree, *args: Any) -> tuple[jax.Array, dict]:
      return loss({**fixed, 'feedback': weights}, *args)

    learned = Learned(guess_weights, guessing) if guess_weights else None
    (losses, aux), grads = estimator(functools.partial(loss, fixed), learned)(params, key, x, criterion)
    outputs = (x, *aux['outputs'])
    return (outputs[advance], outputs[-1]), (losses.mean((1, 2)), grads, aux.get('batch_stats', {}),
                                             aux.get('guess_gradient', {}))
  return body


def _scan(body: Callable, x: jax.Array, inputs: PyTree, length: int) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
  """`jax.lax.scan`; a single stage may change the shape of x."""
  if length > 1:
    return jax.lax.scan(body, (x, x), inputs)
  carry, out = body((x, x), jax.tree.map(lambda leaf: leaf[0], inputs))
  return carry, jax.tree.map(lambda leaf: leaf[None], out)
