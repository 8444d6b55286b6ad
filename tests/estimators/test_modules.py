"""Gradient estimates of Linen modules that the library does not know, from named layers only."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lfg_jax import mark, tap, value_and_activity_grad
from lfg_jax.tangents import distributions, variance
from tests.small import relative_error

BATCH = 3


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    shared = nn.Dense(4)
    h = nn.tanh(shared(nn.tanh(nn.Dense(4)(x))))
    return nn.Dense(2)(nn.tanh(shared(h)))


class ConvNet(nn.Module):
  """A convolutional network with batch norm and dropout."""

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.BatchNorm(use_running_average=not train)(nn.Conv(2, (3, 3))(x))
    x = nn.relu(nn.Conv(2, (3, 3), strides=2)(nn.relu(x)))
    x = nn.Dropout(0.3, deterministic=not train)(x.reshape(x.shape[0], -1))
    return nn.Dense(2)(x)


class Transformer(nn.Module):
  """A transformer of one layer, whose embedding is also its output layer."""

  @nn.compact
  def __call__(self, token):
    embed = nn.Embed(5, 4)
    x = embed(token) + self.param('position', nn.initializers.normal(), (4, 4))
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    h = nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))
    return embed.attend((x + nn.Dense(4)(h)).mean(1))


class GRU(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(nn.RNN(nn.GRUCell(4))(x)[:, -1])


class OwnTaps(nn.Module):
  """A module with a tap of its own, and with a loss for each of two halves."""

  @nn.compact
  def __call__(self, x):
    z = tap(nn.Dense(8)(x).reshape(x.shape[0], 2, 4), 'z', local_axes=2)
    return (nn.tanh(z) ** 2).sum(-1)


def images(*shape):
  return jax.random.normal(jax.random.key(5), (BATCH, *shape))


TARGET = jax.random.normal(jax.random.key(6), (BATCH, 5))
TOKENS = jnp.array([[0, 1, 2, 3], [4, 4, 1, 0], [2, 3, 2, 1]])
CASES = {
  'mlp': (MLP(), images(3), nn.Dense, {}),
  'mlp, by a predicate': (MLP(), images(3), lambda m: m.name == 'Dense_1', {}),
  'convnet': (ConvNet(), images(4, 4, 1), (nn.Conv, nn.Dense), {'train': False}),
  'transformer': (Transformer(), TOKENS, [nn.Dense, nn.DenseGeneral, nn.Embed, nn.LayerNorm], {}),
  'gru': (GRU(), images(3, 2), (nn.GRUCell, nn.Dense), {}),
  'gru, through time': (GRU(), images(2, 2), nn.RNN, {}),
  'own taps': (OwnTaps(), images(3), None, {}),
}


def losses(output, target):
  return (output - target[:, : output.shape[1]]) ** 2


def init(model, x, kwargs):
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
  return jax.jit(functools.partial(model.init, **kwargs))(keys, x)


def exact(model, variables, x, kwargs, rngs=None):
  def loss(params):
    out, updates = model.apply(
      {**variables, 'params': params}, x, rngs=rngs, mutable=['batch_stats'], **kwargs
    )
    return losses(out, TARGET).sum() / BATCH, (out, updates)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])


def estimator(
  model, variables, x, layers, kwargs, rngs=None, losses=losses, target=TARGET, **options
):
  """`key -> ((value, (output, updates)), gradient)`."""
  marked = mark(model, layers) if layers else model

  def fun(params, x, target):
    out, updates = marked.apply(
      {**variables, 'params': params}, x, rngs=rngs, mutable=['batch_stats'], **kwargs
    )
    return losses(out, target), (out, updates)

  step = value_and_activity_grad(fun, has_aux=True, **options)
  return lambda key: step(variables['params'], x, target, key=key)


@pytest.mark.full
@pytest.mark.parametrize('name', sorted(set(CASES) - {'gru'}))
def test_all_orthogonal_passes_of_each_tap_give_the_exact_gradient(name):
  """The number of tangents is a multiple of the dimensions of every tap, at every scanned step."""
  model, x, layers, kwargs = CASES[name]
  variables = init(model, x, kwargs)
  step = estimator(
    model,
    variables,
    x,
    layers,
    kwargs,
    joint=False,
    distribution=distributions.haar,
    num_tangents=32,
  )
  (value, (output, _)), grads = jax.jit(step)(jax.random.key(1))
  (value_0, (output_0, _)), grads_0 = exact(model, variables, x, kwargs)
  assert jnp.allclose(value, value_0, rtol=1e-5)
  assert jnp.allclose(output, output_0, atol=1e-5)
  assert relative_error(grads, grads_0) < 1e-4
  once = estimator(model, variables, x, layers, kwargs)
  assert relative_error(jax.jit(once)(jax.random.key(1))[1], grads_0) > 0.1


@pytest.mark.full
@pytest.mark.parametrize('name', ['mlp', 'gru', 'convnet'])
def test_unbiased_with_joint_taps_and_with_batch_norm_and_dropout(name):
  model, x, layers, _ = CASES[name]
  kwargs = {'train': True} if name == 'convnet' else {}
  variables, rngs = init(model, x, kwargs), {'dropout': jax.random.key(7)}
  (_, (_, updates_0)), grads_0 = exact(model, variables, x, kwargs, rngs)
  step = estimator(model, variables, x, layers, kwargs, rngs)
  measured = variance.measure(
    lambda key: step(key)[1], grads_0, jax.random.key(2), 20_000, at_once=500
  )
  assert measured.bias_z(grads_0) < 1.5
  assert measured.bias_z(jax.tree.map(lambda g: 1.3 * g, grads_0)) > 1.5
  (_, (_, updates)), _ = jax.jit(step)(jax.random.key(1))
  assert ('batch_stats' in updates) == (name == 'convnet')
  if name == 'convnet':
    assert relative_error(updates['batch_stats'], updates_0['batch_stats']) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize('devices', [2, 8])
def test_the_same_estimate_on_any_number_of_devices(devices):
  x, target = jax.random.normal(jax.random.key(5), (8, 3)), jnp.ones((8, 5))
  variables = init(MLP(), x, {})
  mesh = jax.make_mesh(
    (devices,), ('data',), devices=jax.devices()[:devices], axis_types=(jax.sharding.AxisType.Auto,)
  )

  def local(variables, key, x, target):
    step = estimator(
      MLP(),
      variables,
      x,
      nn.Dense,
      {},
      target=target,
      distribution=distributions.normal,
      axis_name='data',
    )
    (value, _), grads = step(key)
    return jax.lax.pmean((value, grads), 'data')

  sharded = jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=(P(), P(), P('data'), P('data')), out_specs=P(), check_vma=False
    )
  )(variables, jax.random.key(1), x, target)
  step = estimator(
    MLP(), variables, x, nn.Dense, {}, target=target, distribution=distributions.normal
  )
  (value, _), grads = jax.jit(step)(jax.random.key(1))
  assert jnp.allclose(sharded[0], value)
  assert relative_error(sharded[1], grads) < 1e-5


class SharedPosition(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x @ nn.Dense(4, name='position')(jnp.eye(4))


@pytest.mark.parametrize(('model', 'layers', 'message'), [
    (MLP(), nn.Conv, 'no layer is marked; allowed, as `layers`: types or a predicate that fit some of Dense, MLP'),
    (SharedPosition(), nn.Dense, r"tap 'position' has shape \(4, 4\) and local_axes=[01]; allowed: 3, the number"),
])  # fmt: skip
def test_what_is_refused(model, layers, message):
  x = images(4)
  with pytest.raises(ValueError, match=message):
    estimator(model, init(model, x, {}), x, layers, {})(jax.random.key(0))


def test_losses_without_an_axis_of_examples_are_refused():
  x = images(3)
  mean = lambda output, target: losses(output, target).mean()
  with pytest.raises(
    ValueError, match=r'losses have the shapes \[\(\)\]; allowed: the same number of examples'
  ):
    estimator(MLP(), init(MLP(), x, {}), x, nn.Dense, {}, losses=mean)(jax.random.key(0))


@pytest.mark.parametrize(
  'mutable', [False, True, [], ['batch_stats'], 'batch_stats', nn.DenyList(['other'])], ids=str
)
def test_apply_of_a_marked_module_returns_what_apply_does(mutable):
  model, x = CASES['convnet'][0], images(4, 4, 1)
  variables, rngs = init(model, x, {}), {'dropout': jax.random.key(7)}
  kwargs = {'rngs': rngs, 'train': mutable is not False and mutable != []}
  out = mark(model, nn.Conv).apply(variables, x, mutable=mutable, **kwargs)
  expected = model.apply(variables, x, mutable=mutable, **kwargs)
  assert jax.tree.structure(out) == jax.tree.structure(expected)
  assert relative_error(out, expected) < 1e-6
