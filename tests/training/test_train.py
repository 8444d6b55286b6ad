"""The update, on any number of devices and for any batch, and the means that it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lfg_jax import data
from lfg_jax.training import update
from lfg_jax.training.rules import algorithms
from tests.runs import STEPS, first_state, tiny


def mesh(devices):
  return jax.make_mesh(
    (devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
  )


def updated(config, devices, learning_rate=0.1, first_step=STEPS - 2, steps=2, at_once=1):
  """The state after some steps; by default, the last two of an epoch, the second with padding."""
  dataset = data.load('digits')
  algorithm = algorithms.make(config, dataset, update.AXIS)
  optimizer = optax.sgd(learning_rate)
  feed = update.make_feed(dataset.train, mesh(devices), 64, jax.random.key(1), at_once=at_once)
  step = update.make_update(algorithm, optimizer, mesh(devices), feed)
  before = first_state(config, algorithm, optimizer, 'plain sgd', mesh(devices))
  after = before._replace(step=jnp.full((), first_step, jnp.int32))
  for count, inputs in list(feed.epoch(0, first_step))[:steps]:
    after = step(after, jax.random.key(2), count, *inputs)
  return jax.device_get(after)


@pytest.mark.full
@pytest.mark.parametrize(
  'counts, fields',
  [
    ((2, 8), {'algorithm': 'LG-FG-A+', 'augment__shift': 1, 'augment__flip': True}),
    ((8,), {'algorithm': 'FG-W'}),
    ((8,), {'algorithm': 'DFA'}),
    ((8,), {'algorithm': 'LG-BP', 'model__norm': 'batch'}),
  ],
  ids=['LG-FG-A+', 'FG-W', 'DFA', 'LG-BP-batch'],
)
def test_same_update_on_any_number_of_devices(counts, fields):
  config = tiny(model__size='S/2/4', model__blocks=2, **fields)
  one = updated(config, 1)
  for devices in counts:
    several = updated(config, devices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), several, one)


@pytest.mark.full
def test_same_steps_however_many_are_dispatched_at_once():
  config = tiny(model__size='S/2/4', model__blocks=2, algorithm='LG-FG-A+')
  one = updated(config, 1, first_step=STEPS - 5, steps=5)
  several = updated(config, 1, first_step=STEPS - 5, steps=2, at_once=3)  # 3 and 2
  assert several.step == STEPS
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), several, one)


def test_update_is_the_gradient_of_the_whole_batch():
  """The reference is the algorithm without mesh and optimizer, on examples picked here."""
  config, dataset = tiny(algorithm='BP'), data.load('digits')
  algorithm = algorithms.make(config, dataset)
  variables = jax.jit(algorithm.init)(jax.random.key(0))
  row = np.asarray(data.epoch_order(jax.random.fold_in(jax.random.key(1), 0), 1438, 64)[-1])
  row = row[row >= 0]
  images, labels = dataset.train
  batch = data.Batch(images[row], labels[row], jnp.full(len(row), 1 / len(row)))
  grads, aux = jax.jit(algorithm.gradient)(variables, jax.random.key(9), batch)
  after = updated(config, 8, first_step=STEPS - 1, steps=1)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.params, expected
  )
  assert len(row) == 1438 - 22 * 64 == after.sums['examples']
  np.testing.assert_allclose(after.sums['loss'], aux['loss'] * len(row), rtol=1e-5)


def test_an_epoch_has_every_example_once():
  feed = update.make_feed(data.load('digits').train, mesh(8), 64, jax.random.key(1))
  orders = [next(feed.epoch(epoch, 0))[1][1] for epoch in (0, 0, 1)]
  for order in orders:
    assert sorted(np.ravel(order)) == [-1] * 34 + list(range(1438))
  assert (orders[0] == orders[1]).all()
  assert (orders[0] != orders[2]).mean() > 0.9


@pytest.mark.full
def test_errors_are_of_the_whole_sets():
  """With a learning rate of 0, an epoch's running means are the initial model's errors."""
  config, dataset = tiny(algorithm='LG-BP'), data.load('digits')
  after = updated(config, 8, learning_rate=0.0, first_step=0, steps=STEPS)
  algorithm = algorithms.make(config, dataset)
  # A model that is right at times.
  params = jax.tree.map(
    lambda p: p + 0.1 * jax.random.normal(jax.random.key(3), p.shape), after.params
  )
  for split in (dataset.train, dataset.test):
    error = update.make_error(
      algorithms.make(config, dataset, update.AXIS), mesh(8), update.make_feed(split, mesh(8), 64)
    )
    predicted = jax.jit(algorithm.predict)(
      {'params': params}, jnp.asarray(split.image_NxHxWxC)
    ).argmax(-1)
    expected = (predicted != split.label_N).mean()
    np.testing.assert_allclose(error(after._replace(params=params)), expected, rtol=1e-6)
  zero = jax.nn.softmax(jnp.zeros(10)).max()  # heads and read-out start at zero
  np.testing.assert_allclose(after.sums['loss'] / after.sums['examples'], -jnp.log(zero), rtol=1e-5)
  np.testing.assert_allclose(after.sums['error'], (dataset.train.label_N != 0).sum())
