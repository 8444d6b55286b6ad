"""Staged models: all that rules, greedy stages, the trainer and the cost model know of a network.

A staged model is stacks of equal blocks in a row. A block is a pure function with taps
(`lfg_jax.tap`) that gives its output and its local losses. Before the first block images are
prepared, behind the last there is a read-out. `models/mlp.py` is the model to read first.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lfg_jax.losses.info_nce import Contrast
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.targets import Targets

PyTree = Any
Variables = dict[str, PyTree]  # 'params', and where used 'batch_stats', 'feedback', 'ahead'


Outcome = tuple[jax.Array, jax.Array | None, Variables]  # output, losses, updated variables


class Place(NamedTuple):
  """Where a block stands.

  Attributes:
    name: goes in front of the names of its taps: `tap(z, f'{at.name}/hidden')`.
    cut: how its local losses are replicated: an axis that is not cut has size 1. None: there are no
      losses.
    last: whether the output goes to these losses only, so that activities may be credited with
      those of their own patch and group.
  """

  name: str
  cut: Cut | None = None
  last: bool = False


class Block(Protocol):
  """One block as a pure function."""

  def __call__(self, variables: Variables, x: jax.Array, targets: Targets, at: Place, /) -> Outcome:
    """Returns (output, losses [B, P, G] times the examples' weights, updated variables).

    Args:
      variables: this block's own: {'params': …} and where used 'batch_stats' and 'feedback'. The
        parameters of its local head are under the key 'head'.
      x: [B, ...], the output of the block before.
      at: where it stands.
    """


@dataclasses.dataclass(frozen=True)
class Stack:
  """Equal blocks in a row.

  Attributes:
    name: of the subtree of the variables that is theirs.
    count: how many; more than one only if they are stacked.
    block: what one of them does.
    is_stacked: every leaf of their variables has the blocks in front; the output of a block has the
      shape of its input. They are then scanned.
    flop: floating-point operations per example of a block's linear maps, by the tap behind each.
  """

  name: str
  count: int
  block: Block
  is_stacked: bool = False
  flop: Mapping[str, int] = dataclasses.field(default_factory=dict)


def no_variant(**changes: bool) -> Any:
  """Stands for the variants of a model that has not been built by `registry.build`."""
  raise ValueError('this model has no variants; allowed: one made by registry.build')


@dataclasses.dataclass(frozen=True)
class StagedModel:
  """A network of stacks of blocks.

  Attributes:
    stacks: from the input to the output.
    init: `key -> variables`, {'params': {stack: …, 'readout': …}} and where used 'batch_stats'.
    prepare: images [B, H, W, C] of pixels 0 … 255 → the first block's input.
    read_out: `(variables, x, weight_B) -> (logits [B, classes], features [B, C], updates)`, with
      its own variables.
    input_shape: of the first block's input, without the axis of examples.
    classes: of the read-out.
    taps: names of a block's taps, without the block's.
    guessed: of those that can have a learned guess, the layer in `params` through whose feedback
      matrix it comes, the nearest to the loss first. See `guesses`.
    boundary: name of a last block's tap behind which exact signals are cheap (see `boundary`), and
      of the tap behind it, which then needs no perturbation; None: there is none.
    group_axis: `(path in a block's params, credit) -> axis`: the axis of a weight that runs over
      groups with losses of their own, or None; see `weight.weight_perturbation`.
    mixes_examples: whether the losses of one example depend on others by batch norm.
    rounds: whether blocks compute in fewer digits than finite differences need.
    activity_bytes: of the largest activity, per example: CPUs work on as many at once as fit in their
      cache. 0: on the whole batch, as suits convolutions.
    contrast: of contrastive losses; None: heads classify.
    ahead: `params -> params`, by stack those of the block after each, through an average of which
      heads look, see `ahead`; None: heads read the output of their own block.
    project: `(variables, x, weight_B) -> (anchors [B, K], candidates [B, K], updates)`, at the end
      of a network that learns contrastively without local losses; its parameters are under 'head'.
    variant: `(train=True, fused=True, project=False) -> StagedModel`: the same network in training
      or evaluation, where batch norm does not look at the batch, and with other `Heads`.
      `registry.build` adds it to models without batch norm.
  """

  stacks: tuple[Stack, ...]
  init: Callable[[jax.Array], Variables]
  prepare: Callable[[jax.Array], jax.Array]
  read_out: Callable[[Variables, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Variables]]
  input_shape: tuple[int, ...]
  classes: int
  taps: tuple[str, ...]
  guessed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  boundary: tuple[str, str] | None = None
  group_axis: Callable[[tuple[str, ...], str], int | None] = lambda path, credit: None
  mixes_examples: bool = False
  rounds: bool = False
  activity_bytes: int = 2**20
  contrast: Contrast | None = None
  ahead: Callable[[PyTree], PyTree] | None = None
  project: Callable[..., tuple[jax.Array, jax.Array, Variables]] | None = None
  variant: Callable[..., Any] = no_variant

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return sum(stack.count for stack in self.stacks)


def own(variables: Variables, name: str) -> Variables:
  """Those variables that belong to one stack, the read-out or the head.

  >>> own({'params': {'a': 1, 'b': 2}, 'batch_stats': {'b': 3}}, 'b')
  {'params': 2, 'batch_stats': 3}
  """
  return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def in_block(tap_name: str) -> str:
  """A tap's name without its block's.

  >>> in_block('blocks/after_token')
  'after_token'
  """
  return tap_name.rsplit('/')[-1]


def merge(updates: Variables, name: str, new: Variables) -> None:
  """Puts the updated variables of one block, stack or layer among the others'."""
  for kind, tree in new.items():
    updates.setdefault(kind, {})[name] = tree


def apply(
  model: StagedModel, variables: Variables, x: jax.Array, targets: Targets, cut: Cut | None
) -> tuple[jax.Array, list[jax.Array], Variables]:
  """All blocks, one after the other.

  Returns:
    The last block's output, the local losses [n, B, P, G] of every stack (none without a cut), and
    the updated variables, those that no block updates left out.
  """
  local: list[jax.Array] = []
  updates: Variables = {}
  for stack in model.stacks:

    def body(x: jax.Array, block_variables: Variables, stack: Stack = stack) -> tuple:
      y, losses, new = stack.block(block_variables, x, targets, Place(stack.name, cut))
      return y, (losses, new)

    step = functools.partial(jax.lax.scan, body) if stack.is_stacked else body
    x, (losses, new) = step(x, own(variables, stack.name))
    if losses is not None:
      local.append(losses if stack.is_stacked else losses[None])
    merge(updates, stack.name, new)
  return x, local, updates


def evaluate(model: StagedModel, variables: Variables, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits [B, classes] and the features [B, C] that the read-out's linear layer sees."""
  targets = Targets(jnp.zeros(x.shape[0], jnp.int32), jnp.ones(x.shape[0]))
  x, _, _ = apply(model, variables, x, targets, None)
  logits, features, _ = model.read_out(own(variables, 'readout'), x, targets.weight_B)
  return logits, features
