"""The block pipeline: blocks on different devices work at the same time, on consecutive batches.

Once a stage has passed on its output, it is done with the batch: no gradient comes back. At tick t,
stage s has batch t - s. It computes the gradient of its own losses, updates its own blocks, and
hands its output and the targets to the next stage. The last stage also has the read-out. Every
stage sees the weights that the sequential update would use, so the result is the same. The mesh has
a second axis, `stage`; each stage may have several devices along `data`.

A device holds only its stage's part of the state, as vectors (see `packing`). In each tick it sends
one activity, with its targets, to its neighbour, and sums its gradients over `data`. Filling and
draining the pipeline takes S - 1 ticks, once per epoch, however many steps are dispatched at once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfg_jax.data.streaming import Batch
from lfg_jax.training import update
from lfg_jax.training.pipeline import packing, pipeline_plan, stage_work
from lfg_jax.training.pipeline.packing import Rows
from lfg_jax.training.pipeline.pipeline_plan import PipelineState, Plan
from lfg_jax.training.pipeline.stage_work import Message
from lfg_jax.training.update import STAGE, TrainState

Carry = tuple[Rows, Message, dict[str, jax.Array], jax.Array]


class Pipeline(NamedTuple):
  """The jitted functions of a run in stages.

  Attributes:
    stages: number of stages.
    place: shardings of the state's arrays, as a tree.
    begin: `TrainState -> PipelineState`, with no batch in the pipeline.
    dispatch: `(state, key, ticks, fresh, *inputs of the feed) -> state` after `ticks` ticks. A
      batch enters in each of the first `fresh` ticks. Reuses the memory of `state`.
    whole: `PipelineState -> TrainState`, if no batch is in the pipeline.
  """

  stages: int
  place: PipelineState
  begin: Callable[[TrainState], PipelineState]
  dispatch: Any
  whole: Callable[[PipelineState], TrainState]

  def steps(self, state: PipelineState, key: jax.Array, count: int, inputs: tuple) -> PipelineState:
    """Lets `count` batches enter."""
    return self.dispatch(state, key, count, count, *inputs)

  def finish(self, state: PipelineState, key: jax.Array, inputs: tuple) -> PipelineState:
    """Lets all batches in the pipeline leave. Only the shapes of `inputs` matter."""
    return self.dispatch(state, key, self.stages - 1, 0, *inputs)


def make(plan: Plan) -> Pipeline:
  """Builds the functions of a run in stages, from a plan of `pipeline_plan.make`."""
  mesh = plan.mesh
  everywhere, of_stage = cast(Any, P()), cast(Any, P(STAGE))
  specs = PipelineState(
    everywhere, of_stage, pipeline_plan.message_specs(plan), everywhere, everywhere
  )
  ticks = jax.shard_map(
    functools.partial(_dispatch, plan),
    mesh=mesh,
    in_specs=(specs, P(), P(), P(), *plan.feed.specs),
    out_specs=specs,
    check_vma=False,
  )
  place = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, P)
  )
  return Pipeline(
    len(plan.stages),
    place,
    jax.jit(functools.partial(pipeline_plan.begin, plan), out_shardings=place),
    jax.jit(ticks, donate_argnums=0),
    jax.jit(functools.partial(pipeline_plan.whole, plan), out_shardings=NamedSharding(mesh, P())),
  )


def _dispatch(
  plan: Plan, state: PipelineState, key: jax.Array, ticks: jax.Array, fresh: jax.Array, *inputs: Any
) -> PipelineState:
  """Does `ticks` ticks on one device. A batch enters in each of the first `fresh` ticks."""
  mine = jax.tree.map(lambda x: x[0], (state.own, state.message))

  def tick(t: jax.Array, carry: Carry) -> Carry:
    own, message, sums, bad = carry
    stage = jax.lax.axis_index(STAGE)
    # A message carries its batch's number with it; -1: there is no batch, while the pipeline fills
    # and drains. The first stage numbers a batch, and counts its examples, as it enters.
    entering = jnp.where(t < fresh, state.step + t, -1)
    message = message._replace(number=jnp.where(stage == 0, entering, message.number))
    message = message._replace(
      examples=jnp.where(
        stage == 0, plan.total(_fetch(plan, message, inputs).weight.sum()), message.examples
      )
    )
    # All devices run one program, so a stage's work is a branch of a switch. The sums over `data`
    # stand between two switches: a collective in a branch would wait for stages in other branches.
    branch = jnp.where(message.number < 0, 0, 1 + stage)
    gradients = [functools.partial(_gradient, plan, s, key) for s in range(len(plan.stages))]
    summed, stats, output = jax.lax.switch(
      branch, [functools.partial(_nothing, plan), *gradients], own, message, inputs
    )
    updates = [functools.partial(_updated, plan, s) for s in range(len(plan.stages))]
    own, sums, bad = jax.lax.switch(
      branch, [lambda now, *_: now, *updates], (own, sums, bad), plan.total(summed), stats, message
    )
    # The output arrives with the next tick, and the last stage's goes nowhere.
    onward = [(s, s + 1) for s in range(len(plan.stages) - 1)]
    return own, jax.lax.ppermute(output, STAGE, onward), sums, bad

  # Stages find bad steps in any order, so the least is kept; unsigned, -1 (none) is the largest.
  begin = (*mine, state.sums, state.bad_step.astype(jnp.uint32))
  own, message, sums, bad = jax.lax.fori_loop(0, ticks, tick, begin)
  own, message = jax.tree.map(lambda x: x[None], (own, message))
  return PipelineState(state.step + fresh, own, message, *_told(len(plan.stages), sums, bad))


def _fetch(plan: Plan, message: Message, inputs: tuple) -> Batch:
  return plan.feed.fetch(*inputs, jnp.maximum(message.number, 0) % plan.feed.steps)


def _nothing(plan: Plan, own: Rows, message: Message, inputs: tuple) -> tuple[Rows, Rows, Message]:
  """Stands in for `_gradient` in a stage without a batch."""
  zeros = lambda trees: packing.pack({}, packing.widths(trees))
  return zeros(plan.summed), zeros(plan.stats), message


def _gradient(
  plan: Plan, s: int, key: jax.Array, own: Rows, message: Message, inputs: tuple
) -> tuple[Rows, Rows, Message]:
  """What stage s sums over devices, its new statistics, and its message to the next stage."""
  composition, key = plan.algorithm.composition, jax.random.fold_in(key, message.number)
  if s == 0:
    batch = _fetch(plan, message, inputs)
    batch = batch._replace(weight=batch.weight / message.examples)
    image, targets = composition.augmented(key, batch)
    taken = message._replace(
      x=image, targets=targets, local_loss_B=jax.tree.map(jnp.zeros_like, message.local_loss_B)
    )
  else:
    shape = plan.ends[s - 1].shape
    x = message.x[:, : math.prod(shape[1:])].reshape(shape).astype(plan.ends[s - 1].dtype)
    taken = message._replace(x=x)
  result = stage_work.gradient(
    composition, plan.stages[s], packing.unpack(own, plan.own[s]), key, taken
  )
  output = message
  if s < len(plan.stages) - 1:
    x = result.x.reshape(len(result.x), -1).astype(message.x.dtype)
    x = jnp.pad(x, ((0, 0), (0, message.x.shape[1] - x.shape[1])))
    output = taken._replace(x=x, local_loss_B=result.local_loss_B)
  return (
    packing.pack(result.summed, packing.widths(plan.summed)),
    packing.pack(result.stats, packing.widths(plan.stats)),
    output,
  )


def _updated(
  plan: Plan,
  s: int,
  now: tuple[Rows, dict[str, jax.Array], jax.Array],
  summed: Rows,
  stats: Rows,
  message: Message,
) -> tuple[Rows, dict[str, jax.Array], jax.Array]:
  """Stage s after the step: its rows, the sums (which the last stage changes) and the bad step."""
  own, sums, bad = now
  total = packing.unpack(summed, plan.summed[s])
  new, is_finite = stage_work.updated(
    plan.algorithm,
    plan.optimizer,
    packing.unpack(own, plan.own[s]),
    total,
    packing.unpack(stats, plan.stats[s]),
  )
  if plan.stages[s].is_last:
    is_first = message.number % plan.feed.steps == 0
    sums = update.add_to_sums(sums, total['metrics'], message.examples, is_first)
  bad = jnp.where(is_finite, bad, jnp.minimum(bad, (message.number + 1).astype(bad.dtype)))
  return packing.pack(new, packing.widths(plan.own)), sums, bad


def _told(
  stages: int, sums: dict[str, jax.Array], bad: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Sends the last stage's sums and the first bad step of any stage round the ring, to all."""
  ring = [(s, (s + 1) % stages) for s in range(stages)]
  is_last = jax.lax.axis_index(STAGE) == stages - 1

  def hop(_: jax.Array, news: tuple) -> tuple:
    there = jax.lax.ppermute(news, STAGE, ring)
    sums = jax.tree.map(lambda mine, other: jnp.where(is_last, mine, other), news[0], there[0])
    return sums, jnp.minimum(news[1], there[1])

  sums, first = jax.lax.fori_loop(0, stages - 1, hop, (sums, bad))
  return sums, first.astype(jnp.int32)
