import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.training import configs, optimizers

PARAMS = {
  'stem': {
    'group': {'kernel': jnp.array([3.0, 4.0]), 'bias': jnp.array([1.0])},
    'head': {'kernel': jnp.array([2.0])},
  },
  'readout': {'linear': {'kernel': jnp.array([-1.0]), 'bias': jnp.array([0.5])}},
}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def config(**fields):
  config = configs.base().optimizer
  config.update({'learning_rate': 0.1, 'momentum': 0.0, 'readout_multiplier': 1.0, **fields})
  return config


def updates(steps=1, **fields):
  optimizer = optimizers.make(config(**fields), 0.1)
  state = optimizer.init(PARAMS)
  for _ in range(steps):
    result, state = optimizer.update(GRADS, state, PARAMS)
  return result


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_sgd_adds_kernels_to_the_gradient():
  u = updates(name='sgd', weight_decay=0.5)
  close(u['stem']['group']['kernel'], -0.1 * (1 + 0.5 * np.array([3, 4])))
  close(u['stem']['group']['bias'], [-0.1])
  close(u['stem']['head']['kernel'], [-0.1 * (1 + 0.5 * 2)])
  close(u['readout']['linear']['kernel'], [-0.1 * (1 - 0.5)])


def test_momentum():
  close(
    updates(steps=3, name='sgd', momentum=0.5)['stem']['group']['bias'], [-0.1 * (1 + 0.5 + 0.25)]
  )


def test_multipliers_act_on_updates():
  u = updates(name='adam', readout_multiplier=0.5, head_multiplier=3.0)
  close(u['readout']['linear']['kernel'], [-0.05])
  close(u['readout']['linear']['bias'], [-0.05])
  close(u['stem']['head']['kernel'], [-0.3])
  close(u['stem']['group']['kernel'], [-0.1, -0.1])


def test_adam_sees_decay_and_adamw_does_not():
  # First step: adam divides what it sees by its size.
  of_adam = lambda decay: updates(name='adam', weight_decay=decay)['readout']['linear']['kernel']
  close(of_adam(0.5), [-0.1])  # of gradient 1 - 0.5
  close(of_adam(2.0), [0.1])  # of gradient 1 - 2
  u = updates(name='adamw', weight_decay=0.5)
  close(u['stem']['group']['kernel'], -0.1 * (1 + 0.5 * np.array([3, 4])))
  close(u['stem']['group']['bias'], [-0.1])


def test_lars():
  u = updates(name='lars', weight_decay=0.5)
  decayed = 1 + 0.5 * np.array([3, 4])
  close(u['stem']['group']['kernel'], -0.1 * 0.001 * 5 / np.linalg.norm(decayed) * decayed)
  close(u['stem']['group']['bias'], [-0.1])


@pytest.mark.parametrize(
  'fields, expected',
  [
    (dict(schedule='constant'), {0: 0.1, 39: 0.1}),
    (dict(schedule='linear'), {0: 0.1, 10: 0.075, 40: 0.0}),
    (dict(schedule='cosine'), {0: 0.1, 20: 0.05, 40: 0.0}),
    (dict(schedule='cosine', warmup_epochs=2), {0: 0.0, 10: 0.05, 20: 0.1, 30: 0.05, 40: 0.0}),
    (dict(schedule='staircase', staircase_epochs=(1, 3)), {9: 0.1, 11: 0.01, 29: 0.01, 31: 0.001}),
    (
      dict(schedule='staircase', staircase_epochs=(3,), warmup_epochs=1.0),
      {5: 0.05, 29: 0.1, 31: 0.01},
    ),
  ],
)
def test_schedules(fields, expected):
  rate = optimizers.schedule(config(**fields), steps_per_epoch=10, epochs=4)
  close([rate(step) for step in expected], list(expected.values()))


def test_schedule_reaches_the_optimizer():
  optimizer = optimizers.make(
    config(name='sgd'), optimizers.schedule(config(schedule='linear'), 2, 2)
  )
  state = optimizer.init(PARAMS)
  rates = []
  for _ in range(4):
    u, state = optimizer.update(GRADS, state, PARAMS)
    rates.append(-u['stem']['group']['bias'][0])
  close(rates, [0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize('scaled, factor', [(True, 8.0), (False, 1.0)])
def test_rates_grow_with_the_batch_if_asked(scaled, factor):
  """LARS in the contrastive configs has rate 0.1 × batch / 256, and warms up to it."""
  fields = config(name='lars', schedule='cosine', warmup_epochs=1.0, scale_with_batch=scaled)
  rate = optimizers.schedule(fields, steps_per_epoch=10, epochs=3, batch_size=2048)
  close(
    [rate(0), rate(5), rate(10), rate(20), rate(30)], factor * np.array([0.0, 0.05, 0.1, 0.05, 0.0])
  )
