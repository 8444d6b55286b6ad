"""The jitted functions of a run: training steps, sequential or in stages, and the test error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lfg_jax.data import Dataset
from lfg_jax.local.staged import StagedModel
from lfg_jax.training import optimizers, update
from lfg_jax.training.pipeline import partition, pipeline, pipeline_plan
from lfg_jax.training.rules.algorithms import Algorithm
from lfg_jax.training.update import Feed, TrainState

State = Any  # TrainState, or PipelineState in stages


class Functions(NamedTuple):
  """The functions that a run calls repeatedly.

  Attributes:
    feed: the training data.
    steps: `(state, number of steps, inputs of the feed) -> state`.
    test_error: `(TrainState, optional: what may end a stream early) -> float`, a fraction; see
      `update.make_error`.
    learning_rate: by step, from 0.
    begin: `TrainState -> state`: the state with which `steps` continues. In stages, every device
      has a part of it.
    finish: `(state, inputs) -> state`: completes all steps that have begun.
    whole: `state -> TrainState`, to be called after `finish`.
  """

  feed: Feed
  steps: Callable[[State, int, tuple], State]
  test_error: Callable[..., float]
  learning_rate: optax.Schedule
  begin: Callable[[TrainState], State] = lambda state: state
  finish: Callable[[State, tuple], State] = lambda state, inputs: state
  whole: Callable[[State], TrainState] = lambda state: state


def build(
  config: ConfigDict, dataset: Dataset, algorithm: Algorithm, mesh: Mesh
) -> tuple[Functions, TrainState]:
  """Builds the jitted functions of a run, and its state before the first step."""
  init_key, order_key, noise_key = jax.random.split(jax.random.key(config.seed), 3)
  at_once = steps_per_dispatch(config, algorithm.composition.model)
  feed = update.make_feed(dataset.train, mesh, config.batch_size, order_key, at_once=at_once)
  rate = optimizers.schedule(config.optimizer, feed.steps, config.epochs, config.batch_size)
  optimizer = optimizers.make(config.optimizer, rate)
  flat = update.flat(mesh)
  whole_rows = -(-config.batch_size // flat.size) * flat.size
  test_error = update.make_error(algorithm, flat, update.make_feed(dataset.test, flat, whole_rows))
  state = update.init_state(algorithm, optimizer, init_key, mesh)
  if config.pipeline_stages > 1:
    spans = partition.spans(algorithm.composition, config.pipeline_stages)
    batch = update.batch_like(dataset.image_shape, config.batch_size)
    stages = pipeline.make(
      pipeline_plan.make(algorithm, optimizer, mesh, feed, spans, state, batch)
    )
    return Functions(
      feed,
      lambda state, count, inputs: stages.steps(state, noise_key, count, inputs),
      test_error,
      rate,
      stages.begin,
      lambda state, inputs: stages.finish(state, noise_key, inputs),
      stages.whole,
    ), state
  step = update.make_update(algorithm, optimizer, mesh, feed)
  return Functions(
    feed, lambda state, count, inputs: step(state, noise_key, count, *inputs), test_error, rate
  ), state


def steps_per_dispatch(config: ConfigDict, model: StagedModel) -> int:
  """As the config says, or 1 where the device is slow at this model in a loop."""
  is_slow = model.slow_in_loops and jax.default_backend() == 'cpu'
  return 1 if is_slow else config.steps_per_dispatch
