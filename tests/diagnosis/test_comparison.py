"""`compare` measures what theory predicts, marks biased estimators, and refuses bad input."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import lfg_jax
from lfg_jax import tap
from lfg_jax.diagnosis import bias_test
from lfg_jax.tangents import variance
from lfg_jax.tangents.distributions import DISTRIBUTIONS, hadamard
from tests.bare import KEYS
from tests.statistics import ROW, SINGLE

matplotlib.use('agg')
KEY = jax.random.key(7)
N, D = 8, 4
X, Y = (jax.random.normal(key, (N, D)) for key in KEYS[:2])
W = {name: jax.random.normal(key, (D, D)) / 2 for name, key in zip('ab', KEYS[2:4], strict=True)}
W |= {'bias': jnp.zeros(D)}


def linear(w, x, y):
  return (y * tap(x @ w, 'z')).sum(-1)


def network(w, x, y):
  h = jnp.tanh(tap(x @ w['a'] + w['bias'], 'first'))
  return ((tap(h @ w['b'], 'second') - y) ** 2).sum(-1)


def z(row, expected):
  """(measured - expected) in standard errors, which include rounding."""
  return (row.error - expected) / (row.error_se + 1e-6)


def test_one_layer_is_as_table_1_says():
  """For all distributions. Table 1 counts the variance of a new batch too: V/N, which a fixed one lacks."""
  kinds = {'weight': {'perturb': 'weights'}, 'activity': {}}
  estimators = {
    f'{kind} {name}': {**options, 'distribution': distribution, 'num_tangents': 2}
    for kind, options in kinds.items()
    for name, distribution in DISTRIBUTIONS.items()
  }
  w = jnp.ones((D, D))
  found = lfg_jax.compare(estimators, linear, draws=1000)(w, X, Y, key=KEY)
  each = np.einsum('ni,nj->nij', X, Y)
  g = each.mean(0)
  V, S = float(each.var(0).mean()), float((g**2).mean())
  for kind in kinds:
    shared = kind == 'weight'  # by the batch
    for name, distribution in DISTRIBUTIONS.items():
      row = found[f'{kind} {name}']
      all_ = (
        variance.predicted(kind, distribution, 2, shared=shared, batch=N, p=D, q=D, V=V, S=S)
        - V / N
      )
      # Shared tangents are applied to the mean of the batch at hand, of which theory knows E|g|².
      expected = distribution.excess(D * D, 2) if shared else all_ / S
      assert row.predicted == pytest.approx(expected, abs=1e-6)
      assert abs(z(row, expected)) < ROW < abs(z(row, 2 * expected + 0.1))
      assert not row.is_biased


def test_networks_are_as_theory_says():
  variate = lambda activities, *_: {'first': jnp.full((N, D), 0.05)}
  exact = {'distribution': hadamard, 'num_tangents': D}
  estimators = {
    'joint': {},
    'separate': {'joint': False, 'num_tangents': 2},
    'numbers': {'joint': False, 'distribution': hadamard, 'num_tangents_by_tap': {'second': D}},
    'control_variate': {'joint': False, 'control_variate': variate},
    'one tap': {'taps': 'first', 'num_tangents': 3},
    'exact': {'joint': False, **exact},
    'shared': {'shared': True},
    'projection': {'joint': False, 'num_tangents': 2, 'combine': 'projection'},
  }
  found = lfg_jax.compare(estimators, network, draws=1000)(W, X, Y, key=KEY)
  for name in ('joint', 'separate', 'numbers', 'control_variate', 'one tap'):
    row = found[name]
    assert abs(z(row, row.predicted)) < SINGLE < abs(z(row, 1.5 * row.predicted)), name
    assert not row.is_biased
  assert found['exact'].verdict == 'exact' and found['exact'].predicted < 1e-9
  assert found['shared'].predicted is None and not found['shared'].is_biased
  assert found['projection'].predicted is None and found['projection'].is_biased
  assert found['joint'].forward_evaluations < found['exact'].forward_evaluations
  first = found.rows[0]
  assert (
    first.name == 'jax.grad' and first.verdict == 'exact' and 2 <= first.forward_evaluations <= 3
  )


def normed(w, x, y):
  z = x @ w['a']
  return ((tap(z / jnp.linalg.norm(z, axis=1, keepdims=True) * w['bias'], 'z') - y) ** 2).sum(-1)


def tied(w, x, y):
  return ((tap(jnp.tanh(tap(x @ w['a'], 'one')) @ w['a'], 'two') - y) ** 2).sum(-1)


def test_theory_says_nothing_where_it_knows_nothing():
  options = {'joint': {}, 'separate': {'joint': False}}
  ask = lambda fun: lfg_jax.compare(options, fun, draws=20)(W, X, Y, key=KEY)
  assert ask(normed)['joint'].predicted is None
  found = ask(tied)  # a matrix that hears from two taps, whose errors are independent if separate
  assert found['joint'].predicted is None and found['separate'].predicted > 0


def times(factor, leaf=None):
  """An estimate that is too long, as a whole or in one leaf."""
  estimate = lfg_jax.value_and_activity_grad(
    network, joint=False, num_tangents=2, distribution=hadamard
  )

  def run(w, x, y, *, key):
    value, grads = estimate(w, x, y, key=key)
    return value, {n: g * factor if leaf in (n, None) else g for n, g in grads.items()}

  return run


def test_biased_estimators_are_marked():
  estimators = {'right': times(1), 'long': times(1.05), 'one leaf': times(1.5, 'bias')}
  estimators['not finite'] = times(jnp.inf, 'bias')
  found = lfg_jax.compare(estimators, network, draws=4000)(W, X, Y, key=KEY)
  assert [row.is_biased for row in found.rows] == [False, False, True, True, True]
  assert found['not finite'].verdict == 'not finite'
  assert found['long'].sigmas > bias_test.SIGMAS and abs(found['long'].bias - 0.05) < 0.02
  assert abs(found['right'].sigmas) < bias_test.SIGMAS


def test_a_table_a_plot_and_rows():
  estimators = {'ours': {'joint': False}, 'double': times(2)}
  found = lfg_jax.compare(estimators, network, draws=1000)(W, X, Y, key=KEY)
  head, _, *lines = str(found).splitlines()
  assert '1000 draws' in head and [line.split()[0] for line in lines] == ['jax.grad', *estimators]
  labels = [text.get_text() for text in found.plot().axes[0].get_legend().get_texts()]
  assert labels == ['jax.grad: exact', 'ours', 'double (biased)']
  assert all(row.microseconds > 0 and row.draws == 1000 for row in found.rows)
  assert set(found.rows[0]._asdict()) >= {'name', 'error', 'predicted', 'temporaries'}


def test_a_scalar_function_and_masks_that_stay():
  def loss(w, x, *, key):
    return jnp.mean((x * jax.random.bernoulli(key, 0.5, x.shape) @ w - 1) ** 2)

  estimators = {'K = 4': {'perturb': 'weights', 'num_tangents': D, 'distribution': hadamard}}
  found = lfg_jax.compare(estimators, loss, draws=20)(jnp.zeros(D), np.asarray(X), key=KEY)
  assert [row.verdict for row in found.rows] == ['exact', 'exact']


def strict(w, x, y):
  return ((tap(x @ w['a'], 'z') - y) ** 2).sum(-1)


@pytest.mark.parametrize('door', [lfg_jax.compare, lfg_jax.diagnose])
def test_silent_promotion_may_be_forbidden(door):
  first = ({'ours': {}, 'weights': {'perturb': 'weights'}}, strict)[door is lfg_jax.diagnose :]
  with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
    assert 'no bias above' in str(door(*first, draws=40)(W, X, Y, key=KEY))


@pytest.mark.parametrize(
  ('estimators', 'options', 'error', 'message'),
  [
    ({}, {}, ValueError, 'one or more'),
    ({'jax.grad': {}}, {}, ValueError, "none named 'jax.grad'"),
    ({'a': 3}, {}, TypeError, "'a' is 3; allowed: a dict of options, or a function"),
    (
      {'a': {'pases': 2}},
      {},
      ValueError,
      "'a' is 'pases'; allowed: perturb, distribution, num_tangents",
    ),
    ({'a': {'perturb': 'weights', 'joint': False}}, {}, ValueError, "'a' is 'joint'"),
    ({'a': {'perturb': 'all'}}, {}, ValueError, 'allowed: activities, weights'),
    ({'a': {}}, {'at_once': 5}, ValueError, 'an even at_once of 6 or more'),
    ({'a': {'num_tangents': 0}}, {}, ValueError, 'num_tangents=0'),
    ({'a': lambda w, x, y, *, key: (0.0, w['a'])}, {}, ValueError, "'a' returns a gradient of"),
  ],
)
def test_what_is_refused(estimators, options, error, message):
  with pytest.raises(error, match=message):
    lfg_jax.compare(estimators, network, **options)(W, X, Y, key=KEY)
