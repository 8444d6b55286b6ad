"""Everything that `value_and_activity_grad` refuses, with a line that names the reason."""

import jax
import jax.numpy as jnp
import pytest

from lfg_jax import diagnose, tap, value_and_activity_grad
from tests.bare import KEYS, W, X, bare, layer, square, straight_through


@jax.custom_jvp
def tapped_inside(x):
  return tap(x, 'inside')


tapped_inside.defjvp(lambda primals, tangents: (primals[0], tangents[0]))

loop = lambda w: jax.lax.while_loop(
  lambda h: h.sum() < -1e9, lambda h: layer(w['a'], h, 'in a loop'), X
)


@pytest.mark.parametrize(
  ('fun', 'options', 'error', 'message'),
  [
    (
      lambda w: square(X @ w['a']),
      {},
      ValueError,
      'the function has no tap; allowed: lfg_jax.tap in it, or layers',
    ),
    (
      lambda w: square(layer(w['a'], X, 'a')),
      {'taps': 'b'},
      ValueError,
      "there is no tap 'b'; allowed: a",
    ),
    (
      lambda w: square(layer(w['a'], X, 'a')),
      {'num_tangents_by_tap': {'z': 2}, 'joint': False},
      ValueError,
      "there is no tap 'z'; allowed: a",
    ),
    (
      lambda w: square(X @ layer(w['a'], jnp.eye(4), 'a')),
      {},
      ValueError,
      r"tap 'a' has shape \(4, 4\) and local_axes=1; allowed: 3",
    ),
    (
      lambda w: square(loop(w)),
      {},
      ValueError,
      "tap 'in a loop' is inside while; allowed: jit, scan, cond, checkp",
    ),
    (
      lambda w: square(tapped_inside(X @ w['a'])),
      {},
      ValueError,
      "tap 'inside' is inside custom_jvp_call; allowed: ",
    ),
    (
      lambda w: square(straight_through(layer(w['a'], X, 'a'))),
      {},
      TypeError,
      'straight_through has jax.custom_vjp',
    ),
    (
      lambda w: layer(w['a'], X, 'a').sum(),
      {},
      ValueError,
      r'shapes \[\(\)\]; allowed: the same number of examples',
    ),
    (
      lambda w: (square(layer(w['a'], X, 'a')), {'n': 3}),
      {},
      TypeError,
      r"loss \[1\]\['n'\] is int; allowed: arrays ",
    ),
    (
      lambda w: (square(layer(w['a'], X, 'a')), X.sum()),
      {},
      ValueError,
      'for a pair of losses and anything, has_aux',
    ),
    (
      lambda w: square(layer(w['a'], X, 'a')),
      {'has_aux': True},
      TypeError,
      'with has_aux the output is .*; allowed: a p',
    ),
    (
      lambda w: square(layer(w['a'], X, 'a')) + 1j,
      {},
      TypeError,
      'has dtype complex64; allowed: real floating-point',
    ),
    (
      lambda w: square(layer(w['a'], X, 'a')),
      {'argnums': 1},
      ValueError,
      'called with 1 positional arguments',
    ),
    (
      lambda w: square(tap(jnp.arange(3), 'n')),
      {},
      TypeError,
      "tap 'n' has dtype int32; allowed: real floating",
    ),
    (
      lambda w: square(layer(w['a'], X, 'a', local_axes=-1)),
      {},
      ValueError,
      "local_axes=-1; allowed: 0 or more, or 'auto'",
    ),
  ],
)
def test_what_is_refused(fun, options, error, message):
  with pytest.raises(error, match=message):
    value_and_activity_grad(fun, **options)(W, key=KEYS[5])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_tangents': 0}, 'num_tangents=0'),
    ({'combine': 'sum'}, "the combination is 'sum'; allowed: mean"),
    ({'combine': 'projection'}, 'allowed: joint=False'),
    (
      {'num_tangents_by_tap': {'a': 2}},
      'only where they are perturbed one by one; allowed: joint=False',
    ),
    ({'num_tangents_by_tap': {'a': 0}, 'joint': False}, 'num_tangents=0'),
    (
      {'num_tangents_by_tap': {'a': 4}, 'joint': False, 'chunk': 2, 'combine': 'projection'},
      'needs all 4',
    ),
  ],
)
def test_options_are_checked_before_any_call(options, message):
  with pytest.raises(ValueError, match=message):
    value_and_activity_grad(bare, **options)


def test_integers_are_refused_as_by_jax_grad():
  with pytest.raises(TypeError, match='has dtype int32'):
    value_and_activity_grad(lambda w: square(tap(w * X, 'x')))(3, key=KEYS[5])


@pytest.mark.parametrize(
  ('fun', 'argument', 'message'),
  [
    (lambda w: square(layer(w['a'], X, 'a')), {}, 'argument 0 has no entries; allowed: something'),
    (
      lambda w: (layer(w['a'], X[:0], 'a') ** 2).sum(-1),
      W,
      r'losses have the shapes \[\(0,\)\]; allowed: one example or more',
    ),
    (
      lambda w: square(X @ w['a'] + tap(X[:, :0], 'nothing').sum(-1, keepdims=True)),
      W,
      r"tap 'nothing' has shape \(3, 0\); allowed: some entries",
    ),
  ],
)
def test_what_is_empty_is_refused(fun, argument, message):
  for gradient in (value_and_activity_grad, diagnose):
    with pytest.raises(ValueError, match=message):
      gradient(fun)(argument, key=KEYS[5])


def test_an_empty_tap_that_is_not_perturbed_and_an_empty_leaf_do_no_harm():
  fun = lambda w: square(layer(w['a'], X, 'a') + tap(X[:, :0], 'nothing').sum(-1, keepdims=True))
  w = {'a': W['a'], 'none': jnp.ones((0, 2))}
  grads = value_and_activity_grad(fun, taps='a')(w, key=KEYS[5])[1]
  assert grads['none'].shape == (0, 2) and jnp.isfinite(grads['a']).all()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'combine': 'projection'}, 'joint=False'),
    ({'control_variate': lambda *_: {}}, 'joint=False'),
    ({'combine': 'projection', 'joint': False, 'chunk': 1, 'num_tangents': 2}, 'chunk=None'),
    ({'shared': True, 'mixes_examples': True}, 'shared=False'),
  ],
  ids=['projection', 'control_variate', 'projection in chunks', 'shared'],
)
def test_what_is_allowed_is_said_in_the_words_of_the_function(options, message):
  """What the message allows is an argument, and with it the call works."""
  run = lambda **options: value_and_activity_grad(
    lambda w: square(layer(w['a'], X, 'a')), **options
  )(W, key=KEYS[5])
  with pytest.raises(ValueError, match=f'allowed: {message}'):
    run(**options)
  name, value = message.split('=')
  run(**{**options, name: {'True': True, 'False': False, 'None': None}[value]})
