"""Layers inside Flax's lifted transforms `nn.jit`, `nn.remat` and `nn.cond`, which cache traces."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lfg_jax import mark
from lfg_jax.tangents import distributions, variance
from tests.estimators.test_modules import estimator, exact, images, init
from tests.small import relative_error


class Tied(nn.Module):
  """One layer, called twice inside a lifted transform."""

  lift: str

  @nn.compact
  def __call__(self, x):
    layer = {'': lambda kind: kind, 'remat': nn.remat, 'jit': nn.jit}[self.lift](nn.Dense)(
      4, name='layer'
    )
    return nn.tanh(layer(nn.tanh(layer(x))))


@pytest.mark.parametrize('lift', ['', 'remat', 'jit'])
def test_a_tied_layer_has_a_tap_for_each_call_behind_every_transform(lift):
  x = images(4)
  variables = init(Tied(lift), x, {})
  options = {'joint': False, 'distribution': distributions.haar, 'num_tangents': 4}
  for _ in range(2):  # the second time nn.jit finds the trace of the first
    grads = estimator(Tied(lift), variables, x, nn.Dense, {}, **options)(jax.random.key(1))[1]
    assert relative_error(grads, exact(Tied(lift), variables, x, {})[1]) < 1e-5
  names = []
  estimator(
    Tied(lift),
    variables,
    x,
    nn.Dense,
    {},
    joint=False,
    control_variate=lambda activities, *_: names.extend(activities) or {},
  )(jax.random.key(1))
  assert names == ['layer', 'layer_1']


class Normed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.tanh(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x)))


JitNormed = nn.jit(Normed)


class WithJitNormed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, name='out')(JitNormed(name='block')(x))


@pytest.mark.full
def test_batch_norm_is_noticed_in_a_trace_that_nn_jit_has_kept():
  """It is traced without marks first, then twice with the same marks, then with others."""
  model, x = WithJitNormed(), images(4)
  variables = init(model, x, {})
  grads_0 = exact(model, variables, x, {})[1]
  for layers in (nn.Dense, nn.Dense, lambda m: m.name == 'Dense_0'):
    step = estimator(model, variables, x, layers, {})
    measured = variance.measure(
      lambda key, step=step: step(key)[1], grads_0, jax.random.key(2), 20_000, at_once=500
    )
    assert measured.bias_z(grads_0) < 1.5
  step = estimator(model, variables, x, lambda m: m.name == 'Dense_0', {}, mixes_examples=False)
  measured = variance.measure(
    lambda key: step(key)[1], grads_0, jax.random.key(2), 20_000, at_once=500
  )
  assert measured.bias_z(grads_0) > 10
  with pytest.raises(ValueError, match=r'no layer is marked; allowed, .* some of .*Dense'):
    mark(model, nn.Conv).apply(variables, x, mutable=['batch_stats'])


def test_a_layer_that_nn_jit_has_kept_is_not_said_to_be_missing():
  model, x = nn.jit(Tied)('jit'), images(4)
  variables = init(model, x, {})
  marked = mark(model, nn.Dense)
  for _ in range(2):
    assert jnp.allclose(marked.apply(variables, x), model.apply(variables, x))


class Branch(nn.Module):
  @nn.compact
  def __call__(self, x):
    h, inner = nn.Dense(4, name='first')(x), nn.Dense(4, name='inner')
    if self.is_initializing():
      h = inner(h)
    else:
      h = nn.cond(h.sum() < 1e9, lambda d, h: nn.tanh(d(h)), lambda d, h: h, inner, h)
    return nn.Dense(2, name='last')(h)


def test_nn_cond():
  x = images(4)
  variables = init(Branch(), x, {})
  step = estimator(
    Branch(),
    variables,
    x,
    nn.Dense,
    {},
    joint=False,
    distribution=distributions.haar,
    num_tangents=4,
  )
  assert (
    relative_error(jax.jit(step)(jax.random.key(1))[1], exact(Branch(), variables, x, {})[1]) < 1e-5
  )
