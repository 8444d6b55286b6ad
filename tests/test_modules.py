"""Modules that the library knows nothing about: estimates of their gradients, from layers that are only named."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lfg_jax import TAP_COLLECTIONS, Sampling, tangents, tap, value_and_activity_grad, variance
from tests.small import relative_error

BATCH = 3


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    shared = nn.Dense(4)
    h = nn.tanh(shared(nn.tanh(nn.Dense(4)(x))))
    return nn.Dense(2)(nn.tanh(shared(h)))


class ConvNet(nn.Module):
  """With batch norm and dropout."""
  @nn.compact
  def __call__(self, x, train=True):
    x = nn.BatchNorm(use_running_average=not train)(nn.Conv(2, (3, 3))(x))
    x = nn.relu(nn.Conv(2, (3, 3), strides=2)(nn.relu(x)))
    x = nn.Dropout(0.3, deterministic=not train)(x.reshape(x.shape[0], -1))
    return nn.Dense(2)(x)


class Transformer(nn.Module):
  """One layer, whose embedding is its output layer as well."""
  @nn.compact
  def __call__(self, token):
    embed = nn.Embed(5, 4)
    x = embed(token) + self.param('position', nn.initializers.normal(), (4, 4))
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    h = nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))
    return embed.attend((x + nn.Dense(4)(h)).mean(1))


class GRU(nn.Module):
  carries_taps: bool = True

  @nn.compact
  def __call__(self, x):
    axes = dict.fromkeys(TAP_COLLECTIONS, 0) if self.carries_taps else {}
    return nn.Dense(2)(nn.RNN(nn.GRUCell(4), variable_axes=axes)(x)[:, -1])


class OwnTaps(nn.Module):
  """A tap in the module itself, and a loss for each of two halves."""
  @nn.compact
  def __call__(self, x):
    z = tap(self, 'z', nn.Dense(8)(x).reshape(x.shape[0], 2, 4), local_axes=2)
    return (nn.tanh(z)**2).sum(-1)


def images(*shape):
  return jax.random.normal(jax.random.key(5), (BATCH, *shape))


TARGET = jax.random.normal(jax.random.key(6), (BATCH, 5))
TOKENS = jnp.array([[0, 1, 2, 3], [4, 4, 1, 0], [2, 3, 2, 1]])
CASES = {
    'mlp': (MLP(), images(3), nn.Dense, {}),
    'mlp, by a predicate': (MLP(), images(3), lambda m: m.name == 'Dense_1', {}),
    'convnet': (ConvNet(), images(4, 4, 1), (nn.Conv, nn.Dense), {'train': False}),
    'transformer': (Transformer(), TOKENS, (nn.Dense, nn.DenseGeneral, nn.Embed, nn.LayerNorm), {}),
    'gru': (GRU(), images(3, 2), (nn.GRUCell, nn.Dense), {}),
    'gru, through time': (GRU(carries_taps=False), images(2, 2), nn.RNN, {}),
    'own taps': (OwnTaps(), images(3), (), {}),
}


def losses(output, target):
  return (output - target[:, :output.shape[1]])**2


def init(model, x, kwargs):
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
  return jax.jit(functools.partial(model.init, **kwargs))(keys, x)


def exact(model, variables, x, kwargs, rngs=None):
  def loss(params):
    out, updates = model.apply({**variables, 'params': params}, x, rngs=rngs, mutable=['batch_stats'], **kwargs)
    return losses(out, TARGET).sum() / BATCH, (out, updates)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])


@pytest.mark.parametrize('name', sorted(set(CASES) - {'gru'}))
def test_all_orthogonal_passes_of_each_tap_give_the_exact_gradient(name):
  """Passes are whole sets: a multiple of the dimensions of every tap. (A scanned tap has one for every time.)"""
  model, x, layers, kwargs = CASES[name]
  variables = init(model, x, kwargs)
  step = value_and_activity_grad(model, losses, layers, separate=True, sampling=Sampling(tangents.haar, 32))
  (value, aux), grads = jax.jit(functools.partial(step, **kwargs))(variables, jax.random.key(1), x, TARGET)
  (value_0, (output_0, _)), grads_0 = exact(model, variables, x, kwargs)
  assert jnp.allclose(value, value_0, rtol=1e-5)
  assert jnp.allclose(aux['output'], output_0, atol=1e-5)
  assert relative_error(grads, grads_0) < 1e-4
  once = functools.partial(value_and_activity_grad(model, losses, layers), **kwargs)
  assert relative_error(jax.jit(once)(variables, jax.random.key(1), x, TARGET)[1], grads_0) > 0.1


@pytest.mark.parametrize('name', ['mlp', 'gru', 'convnet'])
def test_unbiased_with_joint_taps_and_with_batch_norm_and_dropout(name):
  model, x, layers, _ = CASES[name]
  kwargs = {'train': True} if name == 'convnet' else {}
  variables, rngs = init(model, x, kwargs), {'dropout': jax.random.key(7)}
  (_, (_, updates_0)), grads_0 = exact(model, variables, x, kwargs, rngs)
  step = functools.partial(value_and_activity_grad(model, losses, layers), rngs=rngs, **kwargs)
  measured = variance.measure(lambda key: step(variables, key, x, TARGET)[1], grads_0, jax.random.key(2), 20_000,
                              at_once=500)
  assert measured.bias_z(grads_0) < 1.5
  assert measured.bias_z(jax.tree.map(lambda g: 1.3 * g, grads_0)) > 1.5
  (_, aux), _ = jax.jit(step)(variables, jax.random.key(1), x, TARGET)
  assert ('batch_stats' in aux) == (name == 'convnet')
  if name == 'convnet':
    assert relative_error(aux['batch_stats'], updates_0['batch_stats']) < 1e-5


class SharedPosition(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x @ nn.Dense(4, name='position')(jnp.eye(4))


@pytest.mark.parametrize(('model', 'layers', 'message'), [
    (MLP(), nn.Conv, 'no layer is marked; allowed, as `layers`: types or a predicate that fit some of Dense_0, Dense'),
    (SharedPosition(), nn.Dense, r'layer position has shape \(4, 4\); allowed for a marked layer: 3, the number'),
])
def test_what_is_refused(model, layers, message):
  x = images(4)
  with pytest.raises(ValueError, match=message):
    value_and_activity_grad(model, losses, layers)(init(model, x, {}), jax.random.key(0), x, TARGET)


def test_a_cell_whose_scan_does_not_carry_taps_is_refused():
  model, x = GRU(carries_taps=False), images(3, 2)
  with pytest.raises(ValueError, match='layer GRUCell_0 is inside a scan that does not carry taps'):
    value_and_activity_grad(model, losses, (nn.GRUCell, nn.Dense))(init(model, x, {}), jax.random.key(0), x, TARGET)


def test_losses_without_an_axis_of_examples_are_refused():
  x = images(3)
  mean = lambda output, target: losses(output, target).mean()
  with pytest.raises(ValueError, match=r'losses have the shapes \[\(\)\]; allowed: the same number of examples'):
    value_and_activity_grad(MLP(), mean, nn.Dense)(init(MLP(), x, {}), jax.random.key(0), x, TARGET)
