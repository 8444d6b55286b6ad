"""`forward_grad` has the interface of `jax.grad`, under every transformation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from lfg_jax import Sampling, forward_grad, tap, value_and_activity_grad, value_and_forward_grad
from lfg_jax.estimators.weight import weight_perturbation
from lfg_jax.tangents import distributions
from tests.statistics import SIGMAS, SINGLE, is_mean, z_of_mean


def loss(params, x, scale=1.0):
  h = jnp.tanh(x @ params['w'] + params['b'])
  return scale * (h**2).mean()


X = jax.random.normal(jax.random.key(1), (8, 3))
PARAMS = {'w': jax.random.normal(jax.random.key(2), (3, 4)), 'b': jnp.full(4, 0.1)}  # 16 numbers
EXACT = {'distribution': distributions.hadamard, 'num_tangents': 16}


def same(a, b):
  return all(
    jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), a, b))
  )


@pytest.mark.parametrize(
  'options',
  [
    EXACT,
    {**EXACT, 'chunk': 4},
    {'distribution': distributions.haar, 'num_tangents': 16},
    {'distribution': distributions.normal, 'num_tangents': 16, 'combine': 'projection'},
  ],
)
def test_as_many_orthogonal_passes_as_dimensions_give_jax_grad(options):
  estimate = jax.jit(value_and_forward_grad(loss, **options))(PARAMS, X, key=jax.random.key(0))
  value, gradient = jax.value_and_grad(loss)(PARAMS, X)
  assert jnp.allclose(estimate[0], value)
  assert same(estimate[1], gradient)


@pytest.mark.parametrize('argnums', [0, 1, (1, 0), -1, (0,)])
def test_argnums_and_aux(argnums):
  f = lambda params, x: (loss(params, x), {'mean': x.mean()})
  count = {0: 16, 1: 24, (1, 0): 40, -1: 24, (0,): 16}[argnums]
  run = jax.jit(
    value_and_forward_grad(
      f, argnums, has_aux=True, distribution=distributions.haar, num_tangents=count
    )
  )
  (value, aux), gradient = run(PARAMS, X, key=jax.random.key(0))
  (value_0, aux_0), gradient_0 = jax.value_and_grad(f, argnums, has_aux=True)(PARAMS, X)
  assert jax.tree.structure(gradient) == jax.tree.structure(gradient_0)
  assert same((value, aux, gradient), (value_0, aux_0, gradient_0))
  gradient_1, aux_1 = forward_grad(
    f, argnums, has_aux=True, distribution=distributions.haar, num_tangents=count
  )(PARAMS, X, key=jax.random.key(0))
  assert same((gradient_1, aux_1), (gradient_0, aux_0))


def test_unbiased():
  run = forward_grad(loss)
  estimates = jax.jit(jax.vmap(lambda key: run(PARAMS, X, key=key)))(
    jax.random.split(jax.random.key(0), 20_000)
  )
  exact = jax.grad(loss)(PARAMS, X)
  for name in PARAMS:
    assert z_of_mean(estimates[name], exact[name]).max() < SIGMAS
    assert z_of_mean(estimates[name], exact[name] / 1.1).max() > SIGMAS


def test_vmap_and_scan():
  run = value_and_forward_grad(loss, **EXACT, chunk=8)
  keys = jax.random.split(jax.random.key(0), 8)
  each = jax.jit(jax.vmap(lambda x, key: run(PARAMS, x, key=key)[1]))(X[:, None], keys)
  assert same(each, jax.vmap(lambda x: jax.grad(loss)(PARAMS, x))(X[:, None]))

  def descend(gradient, params, key):
    step = lambda p, key: (jax.tree.map(lambda p, g: p - 0.1 * g, p, gradient(p, key)), None)
    return jax.lax.scan(step, params, jax.random.split(key, 3))[0]

  forward = jax.jit(lambda p: descend(lambda p, key: run(p, X, key=key)[1], p, jax.random.key(0)))(
    PARAMS
  )
  assert same(forward, descend(lambda p, key: jax.grad(loss)(p, X), PARAMS, jax.random.key(0)))


@pytest.mark.parametrize('chunk', [None, 4])
def test_shard_map_with_the_same_key_everywhere(chunk):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  run = value_and_forward_grad(loss, num_tangents=8, chunk=chunk)

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P('data'), P()), out_specs=P())
  def of_mean(params, x, key):  # the loss itself is taken over all devices
    return value_and_forward_grad(
      lambda p: jax.lax.pmean(loss(p, x), 'data'), num_tangents=8, chunk=chunk
    )(params, key=key)

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


def test_the_function_is_traced_once_for_all_passes():
  count = 0

  def f(x):
    nonlocal count
    count += 1
    return (x**2).sum()

  for chunk in (None, 2):
    count = 0
    forward_grad(f, num_tangents=8, chunk=chunk)(jnp.ones(4), key=jax.random.key(0))
    assert count == 1


def test_ema_of_optax_divides_the_error_by_what_its_memory_says():
  """An average of independent estimates, with decay β, has (1 - β) / (1 + β) of their error."""
  decay, run, exact = 0.8, forward_grad(loss), jax.grad(loss)(PARAMS, X)['w']
  average = optax.ema(decay)

  def one(key):
    estimates = jax.vmap(lambda key: run(PARAMS, X, key=key))(jax.random.split(key, 40))
    step = lambda state, estimate: average.update(estimate, state)[::-1]
    averages = jax.lax.scan(step, average.init(PARAMS), estimates)[1]
    return ((averages['w'][-1] - exact) ** 2).sum(), ((estimates['w'][-1] - exact) ** 2).sum()

  averaged, single = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
  ratio = averaged.mean() / single.mean()
  error = (
    ratio * np.hypot(averaged.std() / averaged.mean(), single.std() / single.mean()) / 4000**0.5
  )
  assert abs(ratio - (1 - decay) / (1 + decay)) < SINGLE * error + 1e-3
  assert error < 0.01


@pytest.mark.parametrize('chunk', [None, 1])
def test_every_leaf_has_its_own_dtype(chunk):
  """So a scan over steps keeps the types of its carry. The estimate is exact up to rounding."""
  f = lambda p: (p['low'].astype(jnp.float32) ** 2).sum() + 3 * p['high'].sum() + p['number']
  params = {'low': jnp.ones(2, jnp.bfloat16), 'high': jnp.ones((1, 1)), 'number': 1.0}
  run = forward_grad(f, distribution=distributions.hadamard, num_tangents=4, chunk=chunk)
  gradient, exact = run(params, key=jax.random.key(0)), jax.grad(f)(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(gradient, exact)
  assert same(gradient, exact)
  optimizer = optax.apply_if_finite(optax.adam(0.1), 3)

  def step(carry, key):
    updates, state = optimizer.update(forward_grad(f)(carry[0], key=key), carry[1], carry[0])
    return (optax.apply_updates(carry[0], updates), state), None

  start = jax.tree.map(jnp.asarray, params)
  jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize('distribution', ['normal', 'sphere', 'haar'])
def test_tangents_of_a_short_type_have_the_moments_of_the_law(distribution):
  draw = lambda dtype: distributions.DISTRIBUTIONS[distribution].draw(
    jax.random.key(0), distributions.Chunk(1), (100_000,), 4, dtype
  )
  u = draw(jnp.bfloat16)
  assert u.dtype == jnp.bfloat16
  assert jnp.array_equal(u, draw(jnp.float32).astype(jnp.bfloat16))
  u = u.astype(jnp.float32)
  assert abs(u.mean()) < SINGLE / u.size**0.5
  assert is_mean(np.ravel(u) ** 2, 1, slack=1e-4)


def test_chunks_take_the_memory_of_one_evaluation():
  def deep(ws, x):
    for w in ws:
      x = jnp.tanh(x @ w)
    return (x**2).mean()

  ws, x = [jnp.zeros((32, 32))] * 16, jnp.zeros((1024, 32))
  size = lambda f: jax.jit(f).lower(ws, x).compile().memory_analysis().temp_size_in_bytes
  one, chunks = (
    size(
      lambda ws, x, p=p: forward_grad(deep, num_tangents=p, chunk=1)(ws, x, key=jax.random.key(0))
    )
    for p in (1, 64)
  )
  assert chunks < 1.5 * one
  assert chunks < size(jax.grad(deep))


@pytest.mark.parametrize('chunk', [None, 1])
def test_aux_that_is_no_array(chunk):
  f = lambda w: ((w**2).sum(), {'text': 'epoch 3', 'number': 3, 'twice': 2 * w})
  (value, aux), _ = value_and_forward_grad(f, has_aux=True, num_tangents=2, chunk=chunk)(
    jnp.ones(3), key=jax.random.key(0)
  )
  assert (
    value == 3
    and (aux['text'], aux['number']) == ('epoch 3', 3)
    and aux['twice'].tolist() == [2, 2, 2]
  )


def test_a_key_of_the_functions_own():
  f = lambda w, *, key: ((w * jax.random.bernoulli(key, 0.5, w.shape)) ** 2).sum()
  key, w, options = (
    jax.random.key(0),
    jnp.ones(8),
    {'distribution': distributions.hadamard, 'num_tangents': 8},
  )
  own = jax.random.split(key)[1]
  exact = jax.grad(f)(w, key=own)
  assert same(forward_grad(f, **options)(w, key=key), exact)
  assert same(
    forward_grad(functools.partial(f, key=own), **options)(w, key=jax.random.key(1)), exact
  )
  positional = lambda w, key: f(w, key=key)
  assert same(forward_grad(positional, **options)(w, own, key=jax.random.key(1)), exact)
  without = lambda w, key=None: (w**2).sum() if key is None else 0.0
  assert same(forward_grad(without, **options)(w, key=key), 2 * w)


@jax.custom_vjp
def straight_through(x):
  return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@pytest.mark.parametrize(
  ('f', 'args', 'options', 'error', 'message'),
  [
    (lambda x: x, (jnp.ones(3),), {}, ValueError, r'scalar functions; the output has shape \(3,\)'),
    (lambda x: x.sum(), (jnp.arange(3),), {}, TypeError, 'has dtype int32'),
    (
      lambda x: x.sum(),
      (jnp.ones(3),),
      {'argnums': 1},
      ValueError,
      'called with 1 positional arguments',
    ),
    (lambda x: x.sum() + 1j, (jnp.ones(3),), {}, TypeError, 'the output has dtype complex64'),
    (lambda x: jnp.int32(3), (jnp.ones(3),), {}, TypeError, 'the output has dtype int32'),
    (
      lambda x: (x.sum(), x),
      (jnp.ones(3),),
      {},
      TypeError,
      'the output is tuple; allowed: a scalar, or',
    ),
    (lambda x: x.sum(), (jnp.ones(3),), {'has_aux': True}, TypeError, 'with has_aux the output is'),
    (
      lambda x: straight_through(x).sum(),
      (jnp.ones(3),),
      {},
      TypeError,
      'straight_through has jax.custom_vjp',
    ),
    (
      lambda x: straight_through(x).sum(),
      (jnp.ones(3),),
      {'num_tangents': 2, 'chunk': 1},
      TypeError,
      'straight_through has',
    ),
    (lambda x: x.sum(), (jnp.ones(3),), {'num_tangents': 0}, ValueError, 'num_tangents=0'),
    (
      lambda x: x.sum(),
      (jnp.ones(3),),
      {'combine': 'sum'},
      ValueError,
      "the combination is 'sum'; allowed: mean",
    ),
  ],
)
def test_what_is_refused(f, args, options, error, message):
  with pytest.raises(error, match=message):
    forward_grad(f, **options)(*args, key=jax.random.key(0))


@pytest.mark.parametrize(
  ('argument', 'message'),
  [({}, 'argument 1 has no entries'), ({'a': jnp.ones((0, 3))}, 'argument 1 has no entries')],
  ids=['nothing', 'an empty array'],
)
def test_nothing_to_differentiate_is_refused(argument, message):
  with pytest.raises(ValueError, match=message):
    forward_grad(lambda x, w: x.sum(), 1)(X, argument, key=jax.random.key(0))


def test_an_empty_leaf_beside_others_has_an_empty_gradient():
  w = {'a': jnp.ones((0, 3)), 'b': jnp.arange(4.0)}
  run = forward_grad(
    lambda w: w['a'].sum() + (w['b'] ** 2).sum(), distribution='hadamard', num_tangents=4
  )
  gradient = run(w, key=jax.random.key(0))
  assert gradient['a'].shape == (0, 3) and same(gradient['b'], 2 * w['b'])


def kernel(x, out):
  out[...] = jnp.tanh(x[...])


def by_pallas(x):
  """It has a rule for vmap, by which value and derivative are both mapped."""
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)


def by_ragged_dot(x):
  """It has no rule for vmap over these axes."""
  return jnp.tanh(jax.lax.ragged_dot(x, jnp.ones((2, 4, 3)), jnp.array([1, 1])))


# A Pallas kernel has no rule for reverse mode, which taps need, and chunks of `Sampling`.
CASES = [
  ('arguments', by_pallas, [(1, None), (8, 1), (8, None), (8, 3)]),
  ('weights', by_pallas, [(1, None), (8, None)]),
  *(
    (estimator, by_ragged_dot, [(1, None), (8, 1)])
    for estimator in ('arguments', 'weights', 'taps')
  ),
]


@pytest.mark.parametrize(
  ('estimator', 'fun', 'num_tangents', 'chunk'),
  [(name, fun, *sizes) for name, fun, all_sizes in CASES for sizes in all_sizes],
)
def test_one_tangent_needs_no_vmap(estimator, fun, num_tangents, chunk):
  x, key = jnp.arange(8.0).reshape(2, 4) / 8, jax.random.key(0)
  losses = lambda w: (fun(tap(x * w, 'h', local_axes=0)) ** 2).sum(-1)
  f = lambda w: (losses(w).mean(), {'aux': fun(x)})
  options = {'distribution': 'hadamard', 'num_tangents': num_tangents, 'chunk': chunk}
  sampling = Sampling('hadamard', num_tangents, shared=True, chunk=chunk)
  run = {
    'arguments': lambda: value_and_forward_grad(f, has_aux=True, **options)(x, key=key),
    'weights': lambda: weight_perturbation(lambda w: (losses(w) / 2, {}), sampling=sampling)(
      x, key
    ),
    'taps': lambda: value_and_activity_grad(losses, mixes_examples=True, **options)(x, key=key),
  }[estimator]
  value, gradient = run()
  if estimator == 'arguments':
    assert same(value, f(x))
  rule = jnp.tanh if fun is by_pallas else fun  # the kernel's function
  exact = jax.grad(lambda w: (rule(x * w) ** 2).sum() / 2)(x)
  # For the whole batch, the tangents of the two examples at a tap are not orthogonal to each other.
  assert gradient.shape == x.shape and same(gradient, exact) == (
    num_tangents == 8 and estimator != 'taps'
  )


def test_a_way_around_a_missing_rule_is_named():
  f = lambda x: by_ragged_dot(x).sum()
  with pytest.raises(
    NotImplementedError, match=r'vmap over any dim .*; allowed: chunk=1, which needs'
  ):
    forward_grad(f, num_tangents=2)(jnp.ones((2, 4)), key=jax.random.key(0))


@pytest.mark.parametrize('combine', ['mean', 'projection'])
def test_the_value_is_that_of_one_evaluation_whatever_the_passes(combine):
  f = lambda x: ((x**2).sum(), x)
  run = lambda num_tangents: jax.make_jaxpr(
    lambda x: value_and_forward_grad(f, has_aux=True, num_tangents=num_tangents, combine=combine)(
      x, key=jax.random.key(0)
    )
  )(jnp.ones(3))
  assert [x.aval.shape for x in run(1).jaxpr.outvars] == [
    x.aval.shape for x in run(4).jaxpr.outvars
  ]
