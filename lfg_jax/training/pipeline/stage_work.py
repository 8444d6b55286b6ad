"""The work of a pipeline stage on one batch: its gradient, and then its own update.

A stage's variables, optimizer state and gradients are those of the sequential run, restricted to
the stage's own blocks (`packing.take`). The stage computes what the sequential run computes for
these blocks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lfg_jax.local import staged
from lfg_jax.local.blockwise import blockwise, owned
from lfg_jax.local.objectives import local_metrics, with_read_out
from lfg_jax.local.targets import Targets
from lfg_jax.tangents.microbatch import Microbatch, sum_and_join
from lfg_jax.training.pipeline import packing
from lfg_jax.training.rules.algorithms import Algorithm
from lfg_jax.training.rules.composition import Composition
from lfg_jax.training.update import TrainState

PyTree = Any


class Own(NamedTuple):
  """A stage's part of `TrainState`."""

  params: PyTree
  rest: dict[str, PyTree]
  opt_state: PyTree


class Message(NamedTuple):
  """What a stage passes to the next.

  Attributes:
    number: the step in which the sequential run processes this batch; negative: there is no batch.
    examples: number of examples in the global batch.
    targets: the targets of this device's rows.
    x: [B, ...], the input of the stage's first block; [B, F] between stages.
    local_loss_B: the sum of the local losses so far in contrastive learning; otherwise None.
  """

  number: jax.Array
  examples: jax.Array
  targets: Targets
  x: jax.Array
  local_loss_B: jax.Array | None


class Result(NamedTuple):
  """The result of a stage's `gradient`.

  Attributes:
    summed: what must be summed over the devices, which have different examples: 'grads',
      'control_variate_gradient' and, in the last stage, 'metrics'.
    stats: 'batch_stats' after the batch, the same on all these devices.
    x: [B, ...], output of the stage's last block.
    local_loss_B: as in `Message`, including this stage's losses.
  """

  summed: dict[str, PyTree]
  stats: PyTree
  x: jax.Array
  local_loss_B: jax.Array | None


class Stage(NamedTuple):
  """One stage of the pipeline.

  Attributes:
    span: its blockwise stages.
    owned: its blocks, by stack; in the last stage also 'readout'.
    is_last: whether it has the read-out, and so the metrics.
  """

  span: range
  owned: packing.Owned
  is_last: bool


def make_stages(composition: Composition, spans: Sequence[range]) -> tuple[Stage, ...]:
  """The pipeline stages that consist of the blockwise stages in `spans`."""
  of = lambda span: owned(composition.model, span, composition.options.every)
  *first, last = (Stage(span, of(span), is_last=False) for span in spans)
  readout = {**last.owned, 'readout': range(1)}
  return (*first, last._replace(owned=readout, is_last=True))


def state_of(state: TrainState, stage: Stage, composition: Composition) -> Own:
  """A stage's part of a run's state."""
  return packing.take(
    Own(state.params, state.rest, state.opt_state), stage.owned, *names(composition)
  )


def names(composition: Composition) -> tuple[frozenset[str], frozenset[str]]:
  """Names of all stacks and the read-out, and of the stacks with blocks as their leading axis."""
  stacks = composition.model.stacks
  return (
    frozenset({'readout', *(stack.name for stack in stacks)}),
    frozenset(stack.name for stack in stacks if stack.is_stacked),
  )


def gradient(
  composition: Composition, stage: Stage, mine: Own, key: jax.Array, message: Message
) -> Result:
  """The gradient of a stage's own losses.

  Args:
    key: the step's key, the same as in the sequential run.
    message: its x has the shape that the stage's first block takes; in the first stage, x is the
      images.
  """
  model, options = composition.model, composition.options
  variables = {'params': mine.params, **mine.rest}
  known, key = composition.objective_variables(variables), composition.step_keys(key)[0]

  def of_microbatch(
    microbatch: Microbatch, share: tuple[jax.Array, Targets]
  ) -> tuple[PyTree, PyTree]:
    x, targets = share
    run = blockwise(
      composition.estimator(variables, microbatch),
      model,
      options.cut,
      every=options.every,
      span=stage.span,
    )
    x = x if stage.span.start else model.prepare(x)
    y, loss_B, grads, aux = run(known, key, x, targets)
    if stage.is_last:
      aux = with_read_out(model, known, y, targets, grads, aux)
    return {'grads': grads, **aux}, (y, loss_B)

  examples = message.x, message.targets
  total, (y, loss_B) = sum_and_join(
    of_microbatch, examples, composition.microbatches(len(message.targets.label_B))
  )
  if message.local_loss_B is not None:
    loss_B = loss_B + message.local_loss_B
  summed = {name: total[name] for name in ('grads', 'control_variate_gradient')}
  if stage.is_last:
    local = local_metrics(model, loss_B, options.every)
    summed['metrics'] = {'loss': total['loss'], 'error': total['error'], **local}
  kept = loss_B if message.local_loss_B is not None else None
  return Result(summed, total['batch_stats'], y, kept)


def updated(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  mine: Own,
  summed: dict[str, PyTree],
  stats: PyTree,
) -> tuple[Own, jax.Array]:
  """A stage's part of the state after the step, and whether its update and loss are finite.

  Only the last stage has a loss to check.
  """
  updates, opt_state = optimizer.update(summed['grads'], mine.opt_state, mine.params)
  aux = {'batch_stats': stats, 'control_variate_gradient': summed['control_variate_gradient']}
  is_finite = jnp.isfinite(optax.tree.norm(updates))
  if 'metrics' in summed:
    is_finite &= jnp.isfinite(summed['metrics']['loss'])
  params = optax.apply_updates(mine.params, updates)
  new = Own(params, algorithm.advance(mine.rest, params, aux), opt_state)
  return new, is_finite


def output_shapes(composition: Composition, variables: PyTree, image: Any) -> dict[str, Any]:
  """Shape and dtype of a block's output for images [B, H, W, C], by the name of its stack."""
  model = composition.model.variant(train=False)
  found: dict[str, jax.Array] = {}

  def run(variables: PyTree, image: jax.Array) -> dict[str, jax.Array]:
    x = model.prepare(image)
    targets = Targets(jnp.zeros(len(x), jnp.int32), jnp.ones(len(x)))
    for stack in model.stacks:
      mine = staged.variables_of(variables, stack.name)
      mine = jax.tree.map(lambda leaf: leaf[0], mine) if stack.is_stacked else mine
      x = stack.block(mine, x, targets, staged.BlockContext(stack.name))[0]
      found[stack.name] = x
    return found

  seen = {kind: variables[kind] for kind in ('params', 'batch_stats') if kind in variables}
  return jax.eval_shape(run, seen, image)
