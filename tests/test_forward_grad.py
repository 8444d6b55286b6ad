"""`forward_grad`: the shape of `jax.grad`, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lfg_jax import forward_grad, tangents, value_and_forward_grad


def loss(params, x, scale=1.0):
  h = jnp.tanh(x @ params['w'] + params['b'])
  return scale * (h**2).mean()


X = jax.random.normal(jax.random.key(1), (8, 3))
PARAMS = {'w': jax.random.normal(jax.random.key(2), (3, 4)), 'b': jnp.full(4, 0.1)}    # 16 numbers
EXACT = {'law': tangents.hadamard, 'passes': 16}


def same(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, rtol=1e-4, atol=1e-5)), a, b)))


@pytest.mark.parametrize('options', [EXACT, {**EXACT, 'chunk': 4}, {'law': tangents.haar, 'passes': 16},
                                     {'law': tangents.normal, 'passes': 16, 'combination': 'projection'}])
def test_as_many_orthogonal_passes_as_dimensions_give_jax_grad(options):
  estimate = jax.jit(value_and_forward_grad(loss, **options))(PARAMS, X, key=jax.random.key(0))
  value, gradient = jax.value_and_grad(loss)(PARAMS, X)
  assert jnp.allclose(estimate[0], value)
  assert same(estimate[1], gradient)


@pytest.mark.parametrize('argnums', [0, 1, (1, 0), -1, (0,)])
def test_argnums_and_aux(argnums):
  f = lambda params, x: (loss(params, x), {'mean': x.mean()})
  count = {0: 16, 1: 24, (1, 0): 40, -1: 24, (0,): 16}[argnums]
  run = jax.jit(value_and_forward_grad(f, argnums, has_aux=True, law=tangents.haar, passes=count))
  (value, aux), gradient = run(PARAMS, X, key=jax.random.key(0))
  (value_0, aux_0), gradient_0 = jax.value_and_grad(f, argnums, has_aux=True)(PARAMS, X)
  assert jax.tree.structure(gradient) == jax.tree.structure(gradient_0)
  assert same((value, aux, gradient), (value_0, aux_0, gradient_0))
  gradient_1, aux_1 = forward_grad(f, argnums, has_aux=True, law=tangents.haar, passes=count)(
      PARAMS, X, key=jax.random.key(0))
  assert same((gradient_1, aux_1), (gradient_0, aux_0))


def test_unbiased():
  run = forward_grad(loss)
  estimates = jax.jit(jax.vmap(lambda key: run(PARAMS, X, key=key)))(jax.random.split(jax.random.key(0), 20_000))
  exact = jax.grad(loss)(PARAMS, X)
  for name in PARAMS:
    deviation = estimates[name].std(0) / 20_000**0.5
    assert (jnp.abs(estimates[name].mean(0) - exact[name]) / deviation).max() < 4.5
    assert (jnp.abs(1.1 * estimates[name].mean(0) - exact[name]) / deviation).max() > 4.5


def test_vmap_and_scan():
  run = value_and_forward_grad(loss, **EXACT, chunk=8)
  keys = jax.random.split(jax.random.key(0), 8)
  each = jax.jit(jax.vmap(lambda x, key: run(PARAMS, x, key=key)[1]))(X[:, None], keys)
  assert same(each, jax.vmap(lambda x: jax.grad(loss)(PARAMS, x))(X[:, None]))

  def descend(gradient, params, key):
    step = lambda p, key: (jax.tree.map(lambda p, g: p - 0.1 * g, p, gradient(p, key)), None)
    return jax.lax.scan(step, params, jax.random.split(key, 3))[0]

  forward = jax.jit(lambda p: descend(lambda p, key: run(p, X, key=key)[1], p, jax.random.key(0)))(PARAMS)
  assert same(forward, descend(lambda p, key: jax.grad(loss)(p, X), PARAMS, jax.random.key(0)))


@pytest.mark.parametrize('chunk', [None, 4])
def test_shard_map_with_the_same_key_everywhere(chunk):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  run = value_and_forward_grad(loss, passes=8, chunk=chunk)

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P('data'), P()), out_specs=P())
  def of_mean(params, x, key):    # the loss itself is taken over all devices
    return value_and_forward_grad(lambda p: jax.lax.pmean(loss(p, x), 'data'), passes=8, chunk=chunk)(params, key=key)

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P('data'), P()), out_specs=P())
  def mean_of_estimates(params, x, key):
    return jax.lax.pmean(run(params, x, key=key), 'data')

  whole = jax.jit(run)(PARAMS, X, key=jax.random.key(0))
  for f in (of_mean, mean_of_estimates):
    assert same(jax.jit(f)(PARAMS, X, jax.random.key(0)), whole)


def test_drop_in_for_an_optax_loop():
  optimizer = optax.adam(0.05)

  @jax.jit
  def step(params, state, key):
    value, gradient = value_and_forward_grad(loss)(params, X, key=key)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value

  params, state = PARAMS, optimizer.init(PARAMS)
  values = []
  for n in range(200):
    params, state, value = step(params, state, jax.random.key(n))
    values.append(float(value))
  assert values[-1] < 0.2 * values[0]


def test_the_function_is_evaluated_once_for_all_passes():
  count = 0
  def f(x):
    nonlocal count
    count += 1
    return (x**2).sum()
  for chunk in (None, 2):
    count = 0
    forward_grad(f, passes=8, chunk=chunk)(jnp.ones(4), key=jax.random.key(0))
    assert count == 1


def test_ema_of_optax_divides_the_error_by_what_its_memory_says():
  """A running average with decay β over independent estimates has (1 - β) / (1 + β) of their squared error."""
  decay, run, exact = 0.8, forward_grad(loss), jax.grad(loss)(PARAMS, X)['w']
  average = optax.ema(decay)

  def one(key):
    estimates = jax.vmap(lambda key: run(PARAMS, X, key=key))(jax.random.split(key, 40))
    step = lambda state, estimate: average.update(estimate, state)[::-1]
    averages = jax.lax.scan(step, average.init(PARAMS), estimates)[1]
    return ((averages['w'][-1] - exact)**2).sum(), ((estimates['w'][-1] - exact)**2).sum()

  averaged, single = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
  ratio = averaged.mean() / single.mean()
  error = ratio * np.hypot(averaged.std() / averaged.mean(), single.std() / single.mean()) / 4000**0.5
  assert abs(ratio - (1 - decay) / (1 + decay)) < 4 * error + 1e-3
  assert error < 0.01


@pytest.mark.parametrize(('f', 'args', 'options', 'error', 'message'), [
    (lambda x: x, (jnp.ones(3),), {}, ValueError, r'scalar functions; the output has shape \(3,\)'),
    (lambda x: x.sum(), (jnp.arange(3),), {}, TypeError, 'has dtype int32'),
    (lambda x: x.sum(), (jnp.ones(3),), {'argnums': 1}, ValueError, 'called with 1 positional arguments'),
    (lambda x: x.sum(), (jnp.ones(3),), {'passes': 0}, ValueError, 'passes=0'),
    (lambda x: x.sum(), (jnp.ones(3),), {'combination': 'sum'}, ValueError, "combine is 'sum'; allowed: mean")])
def test_what_is_refused(f, args, options, error, message):
  with pytest.raises(error, match=message):
    forward_grad(f, **options)(*args, key=jax.random.key(0))
