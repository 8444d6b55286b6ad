"""Staged models: all that rules, blockwise stages, the trainer and the cost model know of a network.

A staged model is a sequence of stacks of equal blocks. A block is a pure function with taps
(`lfg_jax.tap`) that returns its output and its local losses. Images are prepared before the first
block, and a read-out follows the last. `models/mlp.py` is the model to read first.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.replicated import Cut
from lfg_jax.local.targets import Targets

PyTree = Any
Variables = dict[str, PyTree]  # 'params', and where used 'batch_stats', 'feedback', 'lookahead'
# `(variables, x, weight_B) -> (output, another, updated variables)`: what follows the last block.
End = Callable[[Variables, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Variables]]
Outcome = tuple[jax.Array, jax.Array | None, Variables]  # output, losses, updated variables


class BlockContext(NamedTuple):
  """A block's place in the network.

  Attributes:
    name: prefix of the names of the block's taps: `tap(z, f'{context.name}/hidden')`.
    cut: how the block's local losses are replicated; an axis that is not cut has size 1. None:
      there are no losses.
    last: whether only these losses use the output. If so, activities may be credited with only the
      losses of their own patch and group.
  """

  name: str
  cut: Cut | None = None
  last: bool = False


class Block(Protocol):
  """One block as a pure function."""

  def __call__(
    self, variables: Variables, x: jax.Array, targets: Targets, context: BlockContext, /
  ) -> Outcome:
    """Returns (output, losses [B, P, G] times the examples' weights, updated variables).

    Args:
      variables: this block's own variables: {'params': …} and, where used, 'batch_stats' and
        'feedback'. The parameters of its local head are under the key 'head'.
      x: [B, ...], the output of the previous block.
      context: the block's place.
    """


@dataclasses.dataclass(frozen=True)
class Stack:
  """Consecutive equal blocks.

  Attributes:
    name: name of the blocks' subtree of the variables.
    count: number of blocks; more than one only if they are stacked.
    block: the function that one block computes.
    is_stacked: whether the blocks are scanned. If so, every leaf of their variables has a leading
      axis of blocks, and a block's output has the shape of its input.
    flop: floating-point operations per example of each linear map in a block, by the tap after it.
  """

  name: str
  count: int
  block: Block
  is_stacked: bool = False
  flop: Mapping[str, int] = dataclasses.field(default_factory=dict)


def no_variant(**changes: bool) -> Any:
  """Raises ValueError, in place of the variants of a model that `registry.build` has not built."""
  raise ValueError('this model has no variants; allowed: one made by registry.build')


@dataclasses.dataclass(frozen=True)
class StagedModel:
  """A network of stacks of blocks.

  A model's author gives the first six fields, and others where they apply. The last three are the
  package's: `registry.build` and `look_ahead` fill them.

  Attributes:
    stacks: the stacks, from the input to the output.
    init: `key -> variables`: {'params': {stack: …, 'readout': …}} and, where used, 'batch_stats'.
    prepare: images [B, H, W, C] of pixels 0 … 255 → the first block's input.
    read_out: `(variables, x, weight_B) -> (logits [B, classes], features [B, C], updates)`. It gets
      only its own variables.
    input_shape: shape of the first block's input, without the axis of examples.
    taps: names of a block's taps, without the block's name, in their order; and by tap the layer
      before it, a key of the block's params, or None. The learned control variate at a tap comes back through
      the layer of the next one; see `control_variates`.
    grouped: names of the layers whose weights have groups with losses of their own on the first
      axis; see `weight.weight_perturbation`.
    boundary: name of a tap of a last block, after which exact signals are cheap; see `exact_tail`.
      The last of `taps` then needs no perturbation. None: it is the last of `taps`.
    mixes_examples: whether batch norm makes the losses of one example depend on other examples.
    slow_in_loops: whether CPUs are slow at the blocks inside a loop, as at convolutions. There,
      every step is then dispatched by itself, with the whole batch at once.
    project: `(variables, x, weight_B) -> (anchors [B, K], candidates [B, K], updates)`: the
      projection at the end of a network that learns contrastively without local losses. Its
      parameters are under 'head'. None: `registry.build` makes one where it is needed.
    contrast: options of the contrastive losses; None: heads classify.
    lookahead: `params -> params`: by stack, the parameters of the block after each block. Heads look
      through an average of them, see `local.lookahead`. None: heads read the output of their own block.
    variant: `(train=True, project=False) -> StagedModel`: the same network for training or for
      evaluation, where batch norm does not look at the batch, and with other `Heads`.
  """

  stacks: tuple[Stack, ...]
  init: Callable[[jax.Array], Variables]
  prepare: Callable[[jax.Array], jax.Array]
  read_out: End
  input_shape: tuple[int, ...]
  taps: Mapping[str, str | None]
  grouped: tuple[str, ...] = ()
  boundary: str | None = None
  mixes_examples: bool = False
  slow_in_loops: bool = False
  project: End | None = None
  contrast: Contrast | None = None
  lookahead: Callable[[PyTree], PyTree] | None = None
  variant: Callable[..., Any] = no_variant

  def __post_init__(self) -> None:
    if not (isinstance(self.taps, Mapping) and self.taps):
      raise ValueError(
        f'the taps of the model are {self.taps!r}; allowed: a dict, by tap the layer before it or None'
      )

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return sum(stack.count for stack in self.stacks)

  @property
  def control_variates(self) -> dict[str, str]:
    """The taps that can have a learned control variate, the nearest to the loss first, and its layer."""
    nexts = zip(self.taps, [*self.taps.values()][1:], strict=False)
    return {tap: layer for tap, layer in reversed([*nexts]) if layer}

  @functools.cached_property
  def shapes(self) -> list[jax.ShapeDtypeStruct]:
    """Of every stack's input, for one example, and of the last stack's output."""
    x = jax.ShapeDtypeStruct((1, *self.input_shape), jnp.result_type(float))
    variables, found = jax.eval_shape(self.init, jax.random.key(0)), [x]
    for stack in self.stacks:
      one = dataclasses.replace(self, stacks=(stack,))
      targets = Targets(jnp.zeros(1, jnp.int32), jnp.ones(1))
      y = jax.eval_shape(lambda v, x: apply(one, v, x, targets, None)[0], variables, found[-1])  # noqa: B023
      found.append(y)
    return found

  @property
  def activity_bytes(self) -> int:
    """Size of the largest activity between stacks, per example.

    CPUs work on as many examples at once as fit in their cache.
    """
    return max(x.size * x.dtype.itemsize for x in self.shapes)


def variables_of(variables: Variables, name: str) -> Variables:
  """Returns the variables that belong to one stack, the read-out or the head.

  >>> variables_of({'params': {'a': 1, 'b': 2}, 'batch_stats': {'b': 3}}, 'b')
  {'params': 2, 'batch_stats': 3}
  """
  return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def in_block(tap_name: str) -> str:
  """Returns a tap's name without its block's name.

  >>> in_block('blocks/after_token')
  'after_token'
  """
  return tap_name.rsplit('/')[-1]


def merge(updates: Variables, name: str, new: Variables) -> None:
  """Adds the updated variables of one block, stack or layer to `updates`, in place."""
  for kind, tree in new.items():
    updates.setdefault(kind, {})[name] = tree


def apply(
  model: StagedModel, variables: Variables, x: jax.Array, targets: Targets, cut: Cut | None
) -> tuple[jax.Array, list[jax.Array], Variables]:
  """Applies all blocks, one after the other.

  Returns:
    The last block's output, the local losses [n, B, P, G] of every stack (none without a cut), and
    the updated variables. Variables that no block updates are left out.
  """
  local: list[jax.Array] = []
  updates: Variables = {}
  for stack in model.stacks:

    def body(x: jax.Array, block_variables: Variables, stack: Stack = stack) -> tuple:
      y, losses, new = stack.block(block_variables, x, targets, BlockContext(stack.name, cut))
      return y, (losses, new)

    step = functools.partial(jax.lax.scan, body) if stack.is_stacked else body
    x, (losses, new) = step(x, variables_of(variables, stack.name))
    if losses is not None:
      local.append(losses if stack.is_stacked else losses[None])
    merge(updates, stack.name, new)
  return x, local, updates


def evaluate(model: StagedModel, variables: Variables, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns logits [B, classes], and features [B, C], the input of the read-out's linear layer."""
  targets = Targets(jnp.zeros(x.shape[0], jnp.int32), jnp.ones(x.shape[0]))
  x, _, _ = apply(model, variables, x, targets, None)
  logits, features, _ = model.read_out(variables_of(variables, 'readout'), x, targets.weight_B)
  return logits, features
