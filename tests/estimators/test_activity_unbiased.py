"""Activity perturbation of any function is unbiased; it notices if examples mix."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lfg_jax import tap, value_and_activity_grad
from lfg_jax.tangents import variance
from tests.bare import (
  BATCH,
  EXACT,
  KEYS,
  NOISY,
  W,
  X,
  bare,
  batch_normed,
  jitted,
  layer,
  objective,
  square,
)
from tests.small import relative_error
from tests.statistics import LARGEST, is_unbiased


def measure(fun, draws=10_000, w=W, **options):
  step = value_and_activity_grad(fun, **options)
  exact = objective(fun)(w)[1]
  return variance.measure(
    lambda key: step(w, key=key)[1], exact, KEYS[7], draws, at_once=500
  ), exact


@pytest.mark.parametrize('middle', NOISY)
def test_unbiased(middle):
  is_unbiased(*measure(functools.partial(bare, middle=NOISY[middle])))


@pytest.mark.full
@pytest.mark.parametrize(
  'options',
  [
    {'shared': True},
    {'num_tangents': 4, 'chunk': 2},
    {'taps': ('a', 'b')},
    {'joint': False, 'num_tangents_by_tap': {'a': 3}},
  ],
  ids=str,
)
def test_unbiased_with_every_option(options):
  is_unbiased(*measure(functools.partial(bare, middle=jitted), **options))


def contrast(w):
  """A loss by which example i should resemble example i + 1 more than the others."""
  out = layer(w['c'], layer(w['a'], X, 'a'), 'c')
  logits = out @ out.T - 1e9 * jnp.eye(BATCH)
  return -jax.nn.log_softmax(logits)[jnp.arange(BATCH), (jnp.arange(BATCH) + 1) % BATCH]


def ensemble(w):
  """Batch norm in a network mapped over three scales: the examples are on the tap's second axis."""
  h = jax.vmap(lambda scale: tap(X @ (scale * w['a']), 'a'))(jnp.arange(1.0, 4.0))
  return square(jnp.tanh(h - h.mean(1, keepdims=True)).sum(0) @ w['c'])


@pytest.mark.full
@pytest.mark.parametrize(
  'fun',
  [contrast, ensemble, functools.partial(bare, middle=batch_normed)],
  ids=['contrast', 'ensemble', 'batch norm'],
)
def test_examples_that_mix_are_noticed(fun):
  is_unbiased(*measure(fun))
  wrong, exact = measure(fun, mixes_examples=False)
  assert wrong.bias_z(exact) > LARGEST
  noticed, declared = (
    value_and_activity_grad(fun, taps='a', mixes_examples=mixes)(W, key=KEYS[5])[1]
    for mixes in (None, True)
  )
  assert relative_error(noticed, declared) < 1e-6


def test_one_tangent_for_examples_that_mix_is_refused():
  """It would credit every example with the sum of all examples' gradients."""
  with pytest.raises(ValueError, match="tap 'a' influences the losses of other examples, and one"):
    value_and_activity_grad(contrast, shared=True)(W, key=KEYS[5])


def test_taps_behind_the_mixing_keep_the_credit_of_their_example():
  fun = functools.partial(bare, middle=batch_normed)
  grads = value_and_activity_grad(fun, **EXACT)(W, key=KEYS[5])[1]
  exact = objective(fun)(W)[1]
  assert relative_error(grads['c'], exact['c']) < 3e-6
  assert relative_error(grads['b'], exact['b']) > 0.1


def test_what_cannot_be_read_must_be_declared():
  halves = lambda w: square(layer(w['a'], X, 'a').reshape(2, 6).reshape(BATCH, 4))
  with pytest.raises(
    ValueError,
    match="'a' influences the losses of other examples cannot be read from reshape; allo",
  ):
    value_and_activity_grad(halves)(W, key=KEYS[5])
  grads = value_and_activity_grad(halves, **EXACT, mixes_examples=False)(W, key=KEYS[5])[1]
  assert relative_error(grads, objective(halves)(W)[1]) < 3e-6
