"""The block pipeline equals the sequential run, talks only to neighbours, and is balanced."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax import data
from lfg_jax.jaxpr import hlo
from lfg_jax.training import configs, optimizers, update
from lfg_jax.training.pipeline import partition, pipeline, pipeline_plan
from lfg_jax.training.rules import algorithms
from tests.runs import STEPS, first_state, tiny

BATCH = 64
MIXER = {'model__size': 'S/2/4', 'model__blocks': 4}


def perceptron(blocks=8, **fields):
  """A config of a perceptron with `blocks` blocks or, if `fields` has model fields, of a mixer."""
  if any(name.startswith('model__') for name in fields):
    return tiny(**fields)
  config = tiny()
  configs.use_model(config, 'mlp', blocks=blocks, channels=16, groups=4)
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return config


def mesh_of(devices, stages):
  """A mesh of the first devices, arranged as in `update.make_mesh`."""
  shape, axes = ((devices, stages), ('data', 'stage')) if stages > 1 else ((devices,), ('data',))
  return jax.make_mesh(
    shape,
    axes,
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
    devices=jax.devices()[: devices * stages],
  )


@functools.cache
def feed_of(at_once, mesh):
  """The feed of digits' training set."""
  return update.make_feed(
    data.load('digits').train, mesh, BATCH, jax.random.key(1), at_once=at_once
  )


def build(config, devices, stages, feed=None):
  """(feed, state before the first step, steps), as in `functions.build`, on some of the devices."""
  dataset, mesh = data.load('digits'), mesh_of(devices, stages)
  algorithm = algorithms.make(config, dataset, update.AXIS)
  partition.check(config, algorithm.composition)
  feed = feed or feed_of(config.steps_per_dispatch, mesh)
  rate = optimizers.schedule(config.optimizer, feed.steps, config.epochs)
  optimizer = optimizers.make(config.optimizer, rate)
  before = first_state(config, algorithm, optimizer, config.optimizer.name, mesh)
  if stages == 1:
    return feed, before, update.make_update(algorithm, optimizer, mesh, feed)
  spans = partition.spans(algorithm.composition, stages)
  batch = update.batch_like(dataset.image_shape, BATCH)
  return (
    feed,
    before,
    pipeline.make(pipeline_plan.make(algorithm, optimizer, mesh, feed, spans, before, batch)),
  )


def after(config, devices, stages, steps):
  """The state after the last steps of an epoch; the very last batch has padding."""
  feed, before, made = build(config, devices, stages)
  first, key = STEPS - steps, jax.random.key(2)
  before = before._replace(step=jax.device_put(jnp.int32(first), before.step.sharding))
  if stages == 1:
    for count, inputs in feed.epoch(0, first):
      before = made(before, key, count, *inputs)
    return jax.device_get(before)
  now = made.begin(before)
  for count, inputs in feed.epoch(0, first):
    now = made.steps(now, key, count, inputs)
  return jax.device_get(made.whole(made.finish(now, key, inputs)))


@functools.cache
def sequential(text, devices, steps):
  """`after` without stages, for the config with this text."""
  config = configs_by_text[text]
  return after(config, devices, 1, steps)


configs_by_text = {}


def both(config, devices, stages, steps):
  """The states of the sequential run, which tests share, and of the pipeline."""
  text = configs.to_json(config)
  configs_by_text[text] = config
  return sequential(text, devices, steps), after(config, devices, stages, steps)


def assert_equal(config, devices, stages, steps):
  """Asserts that parameters, optimizer, control variates and metrics are equal bit by bit."""
  one, several = both(config, devices, stages, steps)
  assert one.step == STEPS and one.bad_step == -1 and one.sums['loss'] > 0
  assert_same(several, one)


def assert_same(state, other):
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path)),
    state,
    other,
  )


@pytest.mark.full
@pytest.mark.parametrize('devices, stages, steps', [(1, 4, 20), (2, 2, 8)])
def test_contrastive_learning_is_equal_but_for_rounding(devices, stages, steps):
  """XLA sums the slopes of rows in a scanned block in another order than in a single block."""
  config = perceptron(
    4, steps_per_dispatch=7, algorithm='LG-FG-A+', objective='contrastive', optimizer__name='sgd'
  )
  one, several = both(config, devices, stages, steps)
  assert one.step == STEPS and one.sums['contrastive_loss'] > 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max()),
    (one.params, one.sums),
    (several.params, several.sums),
  )


@pytest.mark.parametrize('stages', [2, *(pytest.param(n, marks=pytest.mark.full) for n in (4, 8))])
def test_equal_after_twenty_steps(stages):
  assert_equal(perceptron(max(stages, 4), steps_per_dispatch=7), 1, stages, 20)


@pytest.mark.full
@pytest.mark.parametrize('stages, fields', [
    (2, {'algorithm': 'LG-BP'}), (8, {'algorithm': 'LG-BP'}), (4, {'algorithm': 'LG-FG-W'}),
    (2, {'algorithm': 'LG-FA', 'losses__every': 3}),
    (4, {'algorithm': 'LG-FG-A+', **MIXER}), (4, {'algorithm': 'LG-BP', **MIXER, 'micro_batch': 16}),
    (2, {'algorithm': 'LG-FG-A', **MIXER}),
    (2, {'algorithm': 'LG-BP', 'optimizer__name': 'adamw', 'optimizer__weight_decay': 0.1}),
], ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else str(value))  # fmt: skip
def test_equal_for_rules_models_and_losses(stages, fields):
  assert_equal(perceptron(max(stages, 4), steps_per_dispatch=7, **fields), 1, stages, 20)


@pytest.mark.full
def test_equal_with_data_parallelism_beside_it():
  assert_equal(perceptron(4, steps_per_dispatch=7, augment__shift=1), 2, 4, 8)


@pytest.mark.full
def test_batch_norm_has_the_same_statistics():
  """Nearly bit by bit: XLA sums the read-out's mean over patches and examples in another order."""
  config = tiny(algorithm='LG-BP', optimizer__name='sgd', **MIXER, model__norm='batch')
  one, several = both(config, 1, 2, 3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), several, one)
  jax.tree.map(lambda a: np.testing.assert_array_less(0, np.abs(a)), one.rest['batch_stats'])


@pytest.mark.full
def test_the_first_bad_step_is_told():
  fields = {
    'optimizer__name': 'sgd',
    'optimizer__learning_rate': 1e9,
    'optimizer__schedule': 'constant',
  }
  one, several = both(perceptron(4, algorithm='LG-BP', steps_per_dispatch=2, **fields), 1, 4, 12)
  assert several.bad_step == one.bad_step > STEPS - 11


@pytest.mark.full
def test_outputs_of_different_shapes():
  config = tiny(algorithm='LG-BP')
  configs.use_model(config, 'resnet', stages=(1, 2), channels=8, groups=2, patches=2)
  assert_equal(config, 1, 3, 3)


def compiled(config, devices, stages):
  feed, before, made = build(config, devices, stages)
  shapes = jax.eval_shape(made.begin, before)
  _, inputs = next(feed.epoch(0, 0))
  return made.dispatch.lower(shapes, jax.random.key(0), 1, 1, *inputs).compile()


@pytest.mark.full
def test_neighbours_send_one_activity_and_nothing_else():
  """A tick sends x, labels, weights, number of examples and step; metrics then go round once."""
  text = compiled(perceptron(algorithm='LG-BP'), 1, 4).as_text()
  assert set(re.findall(rf' ({"|".join(hlo.COLLECTIVES)})(?:-start)?\(', text)) == {
    'collective-permute'
  }
  of_tick = BATCH * (16 + 1 + 1) * 4 + 8
  metrics = 3 * (4 * 4)  # hops × (loss, error, examples, bad step)
  assert hlo.collectives(text)['collective-permute'].sent == of_tick + metrics


def test_a_device_holds_its_own_stage():
  config = perceptron(algorithm='LG-BP')
  held = compiled(config, 1, 4).memory_analysis().argument_size_in_bytes
  feed, before, _ = build(config, 1, 1)
  own = sum(leaf.nbytes for leaf in jax.tree.leaves((before.params, before.opt_state)))
  data_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(next(feed.epoch(0, 0))[1]))
  assert held - data_bytes < 0.5 * own


@pytest.mark.parametrize('number', [1, 2, 3, 5, 7])
def test_stages_are_balanced(number):
  """The split is as good as the best of all splits of seven parts."""
  costs = np.random.default_rng(number).integers(1, 9, 7).tolist()
  slowest = lambda ends: max(sum(costs[a:b]) for a, b in zip((0, *ends), ends, strict=False))
  best = min(slowest((*cuts, 7)) for cuts in itertools.combinations(range(1, 7), number - 1))
  ends = partition._balanced(tuple(costs), number)
  assert (len(ends), ends[-1], slowest(ends)) == (number, 7, best)
