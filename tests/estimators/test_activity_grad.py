"""`value_and_activity_grad` of any function: exact where possible, and called like `jax.grad`."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

from lfg_jax import tap, value_and_activity_grad
from lfg_jax.local.replicated import Cut, head_outputs, replicate, replicated_loss
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.targets import Targets
from lfg_jax.tangents import distributions
from tests.bare import (
  BATCH,
  EXACT,
  KEYS,
  MIDDLES,
  W,
  X,
  bare,
  jitted,
  layer,
  objective,
  scanned,
  square,
  straight_through,
)
from tests.small import relative_error


@pytest.mark.parametrize('middle', MIDDLES)
def test_all_orthogonal_passes_give_the_exact_gradient(middle):
  fun = functools.partial(bare, middle=MIDDLES[middle])
  value, grads = jax.jit(lambda key: value_and_activity_grad(fun, **EXACT)(W, key=key))(KEYS[5])
  value_0, grads_0 = objective(fun)(W)
  assert jnp.allclose(value, value_0, rtol=1e-6)
  assert relative_error(grads, grads_0) < 3e-6


def patches(w, mix, local_axes):
  z = tap((X @ w['a']).reshape(BATCH, 2, 2), 'z', local_axes=local_axes)
  z = z - z.mean(1, keepdims=True) if mix else z
  return (jnp.tanh(z) ** 2).sum(-1)  # [B, P]


def test_losses_of_parts_of_an_example():
  exact = objective(functools.partial(patches, mix=False, local_axes=2))(W)[1]
  options = {'distribution': distributions.haar, 'num_tangents': 2}
  local = value_and_activity_grad(functools.partial(patches, mix=False, local_axes=2), **options)
  assert relative_error(jax.jit(local)(W, key=KEYS[5])[1]['a'], exact['a']) < 3e-6
  with pytest.raises(
    ValueError,
    match=r"'z' has local_axes=2, but reduce_sum mixes its axis 1; allowed: local_axes=1",
  ):
    value_and_activity_grad(functools.partial(patches, mix=True, local_axes=2))(W, key=KEYS[5])


def test_marks_of_checkpoint_name_can_be_taps():
  fun = lambda w: square(checkpoint_name(jnp.tanh(checkpoint_name(X @ w['a'], 'a')) @ w['b'], 'b'))
  run = jax.jit(value_and_activity_grad(fun, **EXACT, checkpoint_names=True))
  grads = run(W, key=KEYS[5])[1]
  assert relative_error(grads, objective(fun)(W)[1]) < 3e-6
  with pytest.raises(ValueError, match='the function has no tap'):
    value_and_activity_grad(fun)(W, key=KEYS[5])


def test_a_guess_sees_every_call_by_its_name():
  names = []
  run = value_and_activity_grad(
    functools.partial(bare, middle=jitted),
    joint=False,
    control_variate=lambda activities, w: names.extend(activities) or {},
  )
  run(W, key=KEYS[5])
  assert names == ['a', 'b', 'b_1', 'c']


def test_identity_under_the_transformations_of_jax():
  f = lambda x: tap(x, 'x') ** 2
  assert jax.grad(f)(3.0) == 6
  assert jax.jvp(f, (3.0,), (1.0,)) == (9, 6)
  assert jax.jit(jax.vmap(jax.grad(f)))(jnp.ones(3)).tolist() == [2, 2, 2]
  assert jax.linear_transpose(lambda x: 2 * tap(x, 'x'), 1.0)(1.0) == (2,)
  masked = jax.vmap(lambda x, on: tap(x, 'x', active=on), (None, 0))(
    jnp.ones(2), jnp.ones((3, 2), bool)
  )
  assert masked.shape == (3, 2)


def test_grad_and_vmap_of_the_whole():
  """The estimate is exact, so its square has the same derivative as the square of the gradient."""
  fun = functools.partial(bare, middle=MIDDLES['nothing'])
  size = lambda gradient: lambda w: sum((g**2).sum() for g in jax.tree.leaves(gradient(w)))
  second = jax.jit(jax.grad(size(lambda w: value_and_activity_grad(fun)(w, key=KEYS[5])[0])))(W)
  value = objective(fun)(W)
  assert relative_error(second, jax.tree.map(lambda g: 2 * value[0] * g, value[1])) < 1e-5
  of_key = lambda key: value_and_activity_grad(fun, **EXACT)(W, key=key)[1]
  each = jax.jit(jax.vmap(of_key))(KEYS[:2])
  assert relative_error(jax.tree.map(lambda g: g[1], each), value[1]) < 3e-6


def test_arguments_and_aux_as_with_jax_grad():
  def fun(scale, params, text, x=X):
    out = tap(x @ params['a'], 'a') @ params['low'].astype(jnp.float32) * scale
    return {'square': square(out), 'other': out}, {'text': text, 'out': out}

  params = {'a': W['a'], 'low': W['b'].astype(jnp.bfloat16)}
  of_mean = lambda scale, params: (
    sum(leaf.sum() for leaf in jax.tree.leaves(fun(scale, params, '')[0])) / BATCH
  )
  run = value_and_activity_grad(fun, (1, 0), has_aux=True, **EXACT)
  (value, aux), grads = run(2.0, params, 'a text', key=KEYS[5])
  value_0, grads_0 = jax.value_and_grad(of_mean, (1, 0))(2.0, params)
  assert jnp.allclose(value, value_0, rtol=1e-6)
  assert aux['text'] == 'a text' and aux['out'].shape == (BATCH, 4)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, grads_0)
  assert relative_error(grads, grads_0) < 1e-2  # of bfloat16


def test_a_key_of_the_functions_own():
  def fun(w, *, key):
    return square(jax.random.bernoulli(key, 0.5, (BATCH, 4)) * layer(w['a'], X, 'a'))

  own = jax.random.split(KEYS[5])[1]
  expected = objective(lambda w: fun(w, key=own))(W)[1]
  assert relative_error(value_and_activity_grad(fun, **EXACT)(W, key=KEYS[5])[1], expected) < 3e-6
  bound = functools.partial(fun, key=own)
  assert relative_error(value_and_activity_grad(bound, **EXACT)(W, key=KEYS[6])[1], expected) < 3e-6


def test_the_function_is_traced_once():
  chex.clear_trace_counter()
  fun = chex.assert_max_traces(lambda w: bare(w, scanned), n=1)
  step = jax.jit(
    lambda w, key: value_and_activity_grad(fun, num_tangents=4, chunk=2, joint=False)(w, key=key)
  )
  for key in KEYS[:3]:
    step(W, key)


@pytest.mark.full
def temporaries(f, layers):
  """Bytes that XLA needs besides the arguments, for a deep network with a tap in every layer."""

  def fun(ws, x):
    for n, w in enumerate(ws):
      x = jnp.tanh(tap(x @ w, str(n)))
    return (x**2).mean(-1)

  ws, x = [jnp.zeros((32, 32))] * layers, jnp.zeros((512, 32))
  compiled = jax.jit(lambda ws, x: f(fun)(ws, x)).lower(ws, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.full
def test_tangents_of_all_taps_are_never_in_memory_together():
  key = jax.random.key(0, impl='unsafe_rbg')  # compiles in half the time

  def estimate(num_tangents, layers):
    of_key = lambda fun: value_and_activity_grad(fun, num_tangents=num_tangents, chunk=1)
    return temporaries(lambda fun: lambda ws, x: of_key(fun)(ws, x, key=key)[1], layers)

  backprop = temporaries(lambda fun: jax.grad(lambda ws, x: fun(ws, x).sum()), 24)
  one, eight = estimate(1, 24), estimate(8, 24)
  # jax 0.11 adds what 12 layers take, however many there are; all tangents would add 24 and more.
  assert one < 1.5 * backprop
  assert eight < 1.5 * one
  assert estimate(16, 8) < 1.05 * estimate(8, 8)


@jax.custom_jvp
def doubled(x):
  return x


doubled.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


def test_functions_with_rules_of_their_own_keep_them():
  fun = lambda w: square(doubled(layer(w['b'], straight_through(X @ w['a']), 'b')))
  grads = jax.jit(value_and_activity_grad(fun, **EXACT))(W, key=KEYS[5])[1]
  assert relative_error(grads, objective(fun)(W)[1]) < 3e-6


def test_cross_entropy_of_integer_labels_keeps_the_examples_apart():
  def fun(w):
    return optax.softmax_cross_entropy_with_integer_labels(
      layer(w['a'], X, 'a') @ w['b'], jnp.arange(BATCH)
    )

  grads = jax.jit(value_and_activity_grad(fun, **EXACT))(W, key=KEYS[5])[1]
  assert relative_error(grads, objective(fun)(W)[1]) < 3e-6


@pytest.mark.full
def test_a_fused_loss_is_local_by_its_derivative_rule():
  """Its value mixes patches and groups; its derivative, on which the credit rests, does not."""
  keys = jax.random.split(jax.random.key(1), 4)
  x = jax.random.normal(keys[0], (3, 2, 4, 4))  # examples, patches, groups, channels
  w, head = jax.random.normal(keys[1], (4, 4, 4)), jax.random.normal(keys[2], (4, 4, 5))
  targets = Targets(jnp.arange(3), jnp.ones(3))

  def losses(w):
    z = tap(jnp.einsum('bpgc,gcd->bpgd', x, w), 'z', local_axes=3)
    linear = {'kernel': head, 'bias': jnp.zeros(5)}
    return replicated_loss(cross_entropy, jnp.tanh(z), linear, targets)

  run = jax.jit(
    value_and_activity_grad(losses, distribution=distributions.hadamard, num_tangents=4)
  )
  exact = jax.jit(jax.grad(lambda w: losses(w).sum() / 3))(w)
  assert relative_error(run(w, key=keys[3])[1], exact) < 1e-5

  def plain(w):
    z = jnp.tanh(tap(jnp.einsum('bpgc,gcd->bpgd', x, w), 'z', local_axes=3))
    return replicate(cross_entropy(head_outputs(z, head, jnp.zeros(5)), targets), 2, 4, Cut())

  with pytest.raises(ValueError, match='mixes its axis 1; allowed: local_axes=1'):
    value_and_activity_grad(plain)(w, key=keys[3])


def test_a_guess_knows_the_activities_of_all_taps():
  """It also knows a tap that is not perturbed. Here the control variate is the gradient, so it is exact."""
  x, first, second = (
    jax.random.normal(key, shape)
    for key, shape in zip(
      jax.random.split(jax.random.key(0), 3), [(4, 3), (3, 5), (5, 2)], strict=True
    )
  )
  losses = lambda w: (tap(tap(x @ w, 'first') @ second, 'second') ** 2).sum(-1)
  control_variate = lambda activities, w: {'first': 2 * activities['second'] @ second.T / len(x)}
  estimate = value_and_activity_grad(
    losses, joint=False, taps=('first',), control_variate=control_variate
  )
  exact = jax.jit(jax.grad(lambda w: losses(w).mean()))(first)
  estimated = jax.jit(estimate)(first, key=jax.random.key(1))[1]
  chex.assert_trees_all_close(estimated, exact, rtol=1e-5)
