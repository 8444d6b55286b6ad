"""The cost of a training step on N devices: compiled for N virtual devices, but not run.

Parameters and images are only shapes, so a model of any size compiles without the memory to run it.
A step is one update by all devices. With pipeline stages it is one tick, in which one batch enters
and one leaves.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lfg_jax import data
from lfg_jax.errors import UserError, one_of
from lfg_jax.jaxpr import hlo
from lfg_jax.training import optimizers, update
from lfg_jax.training.pipeline import partition, pipeline, pipeline_plan, stage_work
from lfg_jax.training.rules import algorithms
from lfg_jax.training.rules.composition import Composition
from lfg_jax.training.update import AXIS, STAGE, Feed, TrainState

PyTree = Any
STEPS = 1000  # per epoch; only schedules use it


class Cost(NamedTuple):
  """The cost of one step. Each number is that of the device with the most.

  Attributes:
    parameters: number of parameters.
    state: bytes of the parameters, the optimizer and everything else that persists.
    temporaries: bytes that the step needs besides its arguments, as XLA lays it out for CPUs.
    flop: floating-point operations of matrix products and convolutions.
    collectives: what is sent, by kind of collective.
  """

  parameters: int
  state: int
  temporaries: int
  flop: int
  collectives: dict[str, hlo.Sent]

  @property
  def sent(self) -> int:
    """Bytes sent by all collectives."""
    return sum(kind.sent for kind in self.collectives.values())

  def seconds(self, flops: float, link: float) -> float:
    """Seconds per step at `flops` operations and `link` *bits* per second, without overlap."""
    return self.flop / flops + 8 * self.sent / link


def virtual_devices(count: int) -> None:
  """Splits the CPU into `count` virtual devices. Must be called before JAX uses the CPU.

  If XLA_FLAGS already sets a number of devices, that number must suffice.

  Raises:
    UserError: there are fewer devices.
  """
  if 'device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)
  if (most := len(jax.devices())) < count:
    raise UserError(f'devices is {count}; allowed: 1 … {most}, as many as there are')


def mesh(devices: int, stages: int = 1) -> Mesh:
  """Returns a mesh of the first `devices` devices, with an axis of stages if there are several."""
  shape, axes = (
    ((devices // stages, stages), (AXIS, STAGE)) if stages > 1 else ((devices,), (AXIS,))
  )
  return jax.make_mesh(
    shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=jax.devices()[:devices]
  )


def images_of(config: ConfigDict) -> data.Dataset:
  """The data set of a config, without its images (digits has them)."""
  if config.dataset == 'digits':
    return data.load('digits')
  one_of('dataset', config.dataset, data.NAMES)
  facts = data.TFDS[config.dataset]
  side = config.image_size or facts.image_shape[0]
  shape = (side, side, facts.image_shape[2])
  nothing: Any = None
  return data.Dataset(config.dataset, facts.classes, shape, facts.mean, facts.std, nothing, nothing)


def cost(config: ConfigDict, devices: int) -> Cost:
  """Returns the cost of a step of a config's run on `devices` devices.

  Raises:
    ValueError: the config's stages or batch do not fit the devices, the rule or the model.
  """
  partition.check_devices(config, devices)
  dataset, on = images_of(config), mesh(devices, config.pipeline_stages)
  algorithm = algorithms.make(config, dataset, AXIS)
  partition.check(config, algorithm.composition)
  rate = optimizers.schedule(config.optimizer, STEPS, config.epochs, config.batch_size)
  optimizer = optimizers.make(config.optimizer, rate)
  whole = jax.eval_shape(
    lambda key: update.init_state(algorithm, optimizer, key, on), jax.random.key(0)
  )
  batch = update.batch_like(dataset.image_shape, config.batch_size)
  feed = Feed(
    STEPS, lambda batch, step: batch, (P(AXIS),), lambda epoch, step: iter(()), 1, is_stream=True
  )
  placed = functools.partial(_placed, on)
  inputs = placed(batch, P(AXIS))
  key, number = placed(jax.eval_shape(lambda: jax.random.key(0)), P()), 1
  if config.pipeline_stages == 1:
    state = placed(whole, P())
    made: Any = update.make_update(algorithm, optimizer, on, feed)
    step = made.lower(state, key, number, inputs)
    return _cost(step.compile(), _size(whole.params), state)
  spans = partition.spans(algorithm.composition, config.pipeline_stages)
  made = pipeline.make(pipeline_plan.make(algorithm, optimizer, on, feed, spans, whole, batch))
  state = jax.eval_shape(made.begin, whole)
  state = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    state,
    jax.tree.broadcast(made.place, state),
  )
  step = made.dispatch.lower(state, key, number, number, inputs)
  return _cost(step.compile(), _largest(algorithm.composition, spans, whole), state)


def _cost(compiled: jax.stages.Compiled, parameters: int, state: PyTree) -> Cost:
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text and memory
  of_device = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return Cost(
    parameters,
    sum(map(of_device, jax.tree.leaves(state))),
    int(memory.temp_size_in_bytes),
    hlo.flop(text),
    hlo.collectives(text),
  )


def _placed(on: Mesh, tree: PyTree, spec: P) -> PyTree:
  place = NamedSharding(on, spec)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _size(tree: PyTree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _largest(composition: Composition, spans: tuple[range, ...], whole: TrainState) -> int:
  """Number of parameters of the stage with the most parameters."""
  return max(
    _size(
      jax.eval_shape(
        functools.partial(stage_work.state_of, stage=stage, composition=composition), whole
      ).params
    )
    for stage in stage_work.make_stages(composition, spans)
  )
