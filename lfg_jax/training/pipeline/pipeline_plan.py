"""The plan of a block pipeline, with the shapes of its stages; and the pipeline's state.

`make` finds the shapes. `begin` splits the sequential run's state into stages, and `whole` joins it
again.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lfg_jax.data.streaming import Batch
from lfg_jax.training.pipeline import packing, stage_work
from lfg_jax.training.pipeline.packing import Rows
from lfg_jax.training.pipeline.stage_work import Message, Own, Stage
from lfg_jax.training.rules.algorithms import Algorithm
from lfg_jax.training.update import AXIS, STAGE, Feed, TrainState

PyTree = Any


class PipelineState(NamedTuple):
  """The state from which the pipeline continues.

  Attributes:
    step: number of batches that have entered.
    own: every stage's part of the run's state, [S, n] by dtype; a device has its stage's row.
    message: the message to every stage, [S, ...], for its work in the next tick.
    sums, bad_step: as in `TrainState`, for the batches that have left.
  """

  step: jax.Array
  own: Rows
  message: Message
  sums: dict[str, jax.Array]
  bad_step: jax.Array


class Plan(NamedTuple):
  """What the functions of a pipeline need to know. Lists have one entry per stage.

  Attributes:
    own: shapes of each stage's part of the state.
    summed, stats: shapes of what `stage_work.gradient` returns under these names.
    ends: shapes of each stage's output, except the last stage's.
    between: shapes of a message between stages, on one device.
  """

  algorithm: Algorithm
  optimizer: optax.GradientTransformation
  mesh: Mesh
  feed: Feed
  stages: tuple[Stage, ...]
  own: list[Own]
  summed: list[dict[str, PyTree]]
  stats: list[PyTree]
  ends: list[jax.ShapeDtypeStruct]
  between: Message

  def total(self, x: PyTree) -> PyTree:
    """Sums x over the devices that have different examples."""
    return jax.lax.psum(x, AXIS) if self.mesh.shape[AXIS] > 1 else x


def make(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  feed: Feed,
  spans: Sequence[range],
  like: TrainState,
  batch: Batch,
) -> Plan:
  """Makes the plan of a run in stages.

  Args:
    algorithm: an algorithm made with `update.AXIS` as its axis_name.
    mesh: a mesh with the axes `update.AXIS` and `update.STAGE`.
    spans: the blockwise stages of each pipeline stage, see `stage_plan`.
    like: shapes of the run's state.
    batch: shapes of a global batch.
  """
  composition = algorithm.composition
  stages = stage_work.make_stages(composition, spans)
  own = [
    jax.eval_shape(
      functools.partial(stage_work.state_of, stage=stage, composition=composition), like
    )
    for stage in stages
  ]
  scalar = jax.ShapeDtypeStruct((), jnp.result_type(float))
  summed = [
    {
      'grads': mine.params,
      'control_variate_gradient': mine.rest.get('control_variate', {}),
      **({'metrics': dict.fromkeys(algorithm.metrics, scalar)} if stage.is_last else {}),
    }
    for stage, mine in zip(stages, own, strict=True)
  ]
  stats = [mine.rest.get('batch_stats', {}) for mine in own]
  ends, between = _between(algorithm, stages, like, batch, mesh.shape[AXIS])
  return Plan(algorithm, optimizer, mesh, feed, stages, own, summed, stats, ends, between)


def _between(
  algorithm: Algorithm, stages: Sequence[Stage], like: TrainState, batch: Batch, devices: int
) -> tuple[list[Any], Message]:
  """Shapes of every stage's output except the last's, and of a message with room for each."""
  composition = algorithm.composition
  of_device = lambda x: jax.ShapeDtypeStruct((x.shape[0] // devices, *x.shape[1:]), x.dtype)
  augmented = composition._replace(axis_name=None).augmented
  image, targets = jax.eval_shape(augmented, jax.random.key(0), jax.tree.map(of_device, batch))
  shapes = stage_work.output_shapes(composition, {'params': like.params, **like.rest}, image)
  ends = [shapes[list(stage.owned)[-1]] for stage in stages[:-1]]
  width = max(math.prod(end.shape[1:]) for end in ends)
  dtype = jnp.result_type(*(end.dtype for end in ends))
  x = jax.ShapeDtypeStruct((len(targets.label_B), width), dtype)
  scalar = lambda dtype: cast(Any, jax.ShapeDtypeStruct((), dtype))
  message = Message(
    scalar(jnp.int32),
    scalar(targets.weight_B.dtype),
    targets,
    cast(Any, x),
    targets.weight_B if composition.model.contrast else None,
  )
  return ends, message


def message_specs(plan: Plan) -> Message:
  return jax.tree.map(lambda leaf: P(STAGE, AXIS) if leaf.ndim else P(STAGE), plan.between)


def begin(plan: Plan, state: TrainState) -> PipelineState:
  """Packs every stage's part of the state into its row. No batch is in the pipeline."""
  composition, width = plan.algorithm.composition, packing.widths(plan.own)
  own = [
    packing.pack(stage_work.state_of(state, stage, composition), width) for stage in plan.stages
  ]
  devices, stages = plan.mesh.shape[AXIS], len(plan.stages)

  def empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    rows = (leaf.shape[0] * devices, *leaf.shape[1:]) if leaf.ndim else ()
    return jnp.zeros((stages, *rows), leaf.dtype)

  message = jax.tree.map(empty, plan.between)
  return PipelineState(
    state.step,
    jax.tree.map(lambda *rows: jnp.stack(rows), *own),
    message._replace(number=message.number - 1),
    state.sums,
    state.bad_step,
  )


def whole(plan: Plan, state: PipelineState) -> TrainState:
  """Joins the stages' parts into the sequential run's state."""
  rows = [jax.tree.map(lambda x, s=s: x[s], state.own) for s in range(len(plan.stages))]
  own = [packing.unpack(row, like) for row, like in zip(rows, plan.own, strict=True)]
  whole: Own = packing.join(own, *stage_work.names(plan.algorithm.composition))
  return TrainState(
    state.step, whole.params, whole.rest, whole.opt_state, state.sums, state.bad_step
  )
