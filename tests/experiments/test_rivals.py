"""Published estimators have the bias that their papers say, and the bench that compares them runs."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lfg_jax
from lfg_jax import data, tap
from lfg_jax.tangents.distributions import hadamard
from lfg_jax.training import configs
from lfg_jax.training.rules import algorithms
from tests import runs
from tests.bare import KEYS
from tests.small import relative_error

sys.path.append(str(runs.ROOT / 'experiments' / 'bench'))
import estimator_mixer
import estimator_problems
import rivals

KEY = jax.random.key(5)
N, D = 6, 3
X, Y = (jax.random.normal(key, (N, D)) for key in KEYS[:2])
W = {name: jax.random.normal(key, (D, D)) / 2 for name, key in zip('ab', KEYS[2:4], strict=True)}


def network(w, x, y, back=None):
  layer = lambda x, name: rivals.linear(x, w[name], back[name]) if back else x @ w[name]
  h = jnp.tanh(tap(layer(x, 'a'), 'a'))
  return ((tap(layer(h, 'b'), 'b') - y) ** 2).sum(-1)


def with_error(w, x, y):
  out = jnp.tanh(tap(x @ w['a'], 'a'))
  out = tap(out @ w['b'], 'b')
  return ((out - y) ** 2).sum(-1), 2 * (out - y)


def loss(w, x, y):
  return network(w, x, y).mean()


def compare(estimators, draws=2000):
  return lfg_jax.compare(estimators, network, draws=draws, at_once=100)(W, X, Y, key=KEY)


def test_differences_along_random_directions_are_unbiased():
  """SPSA has the noise of a forward gradient; 8 pairs of a strategy have an eighth of it."""
  found = compare(
    {
      'forward': {'perturb': 'weights'},
      'two-sided': rivals.two_sided(loss),
      'seeded': rivals.seeded(loss),
      'strategies': rivals.antithetic(loss, 8),
      'smoothed': rivals.antithetic(loss, 32, sigma=1.0),
    }
  )
  assert [row.is_biased for row in found.rows] == [False] * 5 + [True]
  d = 2 * D * D
  for name, theory in (('two-sided', d - 1), ('seeded', d + 1), ('strategies', (d + 1) / 8)):
    row = found[name]
    assert abs(row.error - theory) < 4 * row.error_se + 0.01 * theory, name


def test_feedback_is_biased_unless_it_is_the_kernel_and_a_control_variate_never_is():
  wrong = jax.tree.map(lambda w: -w, W)
  mirror = rivals.mirror(W, KEY, 10_000)
  assert relative_error(mirror, W) < 0.05
  matrices = {'a': jnp.ones((D, D)), 'b': jnp.eye(D)}
  options = {'distribution': hadamard, 'num_tangents': 2}
  through = lambda back: rivals.mirrored(network, back, ('a', 'b'), **options)
  found = compare(
    {
      'kernels': rivals.feedback_alignment(network, W),
      'other matrices': rivals.feedback_alignment(network, wrong),
      'direct': rivals.direct_feedback(with_error, matrices),
      'plain': {'joint': False, **options},
      'bad control variate': through(wrong),
      'mirror': through(mirror),
      'kernels as a control variate': through(W),
    }
  )
  assert [row.is_biased for row in found.rows[1:]] == [False, True, True, *[False] * 4]
  assert found['kernels'].verdict == 'exact' and found['kernels as a control variate'].error < 1e-9
  assert found['mirror'].error < 0.1 * found['plain'].error < found['bad control variate'].error


def test_uoro_is_unbiased():
  """A plain recurrent network of 3 units over 4 steps."""
  cell = lambda w, s, x: jnp.tanh(w['a'] @ s + w['b'] @ x)
  loss_at = lambda w, s, y: jnp.square(s - y).sum()
  x, y = (jax.random.normal(key, (2, 4, D)) for key in KEYS[4:6])

  def losses(w, x, y):
    def of_example(x, y):
      step = lambda s, xy: 2 * (cell(w, s, xy[0]),)
      states = jax.lax.scan(step, jnp.zeros(D), (x, y))[1]
      return jnp.square(states - y).sum()

    return jax.vmap(of_example)(x, y)

  online = rivals.uoro(cell, loss_at, lambda w: jnp.zeros(D))

  def short(*args, key):
    value, gradient = online(*args, key=key)
    return value, jax.tree.map(lambda g: 0.8 * g, gradient)

  found = lfg_jax.compare({'UORO': online, 'short': short}, losses, draws=4000, at_once=100)(
    W, x, y, key=KEY
  )
  assert not found['UORO'].is_biased and found['short'].is_biased
  assert found['UORO'].verdict.startswith('no bias above') and found['UORO'].error > 0.1


@pytest.mark.full
def test_the_local_losses_of_the_bench_have_the_gradient_of_the_rule():
  problem = estimator_mixer.mixer()
  config = configs.base()
  config.model.size, config.model.channels, config.algorithm = 'S/2/4', 32, 'LG-BP'
  rule = algorithms.make(config, data.load('digits'))
  (batch,) = problem.batch(0)
  expected = jax.jit(rule.gradient)({'params': problem.params}, KEY, batch)[0]
  mean = estimator_problems.objective(problem.losses)
  assert relative_error(jax.jit(jax.grad(mean))(problem.params, batch), expected) < 1e-4


@pytest.mark.full
def test_the_bench_of_estimators(tmp_path):
  main = runs.script('bench/estimators')['main']
  main([f'--out={tmp_path}', '--problems=gru', '--draws=20', '--steps=2'])
  rows = json.loads((tmp_path / 'estimators.json').read_text())['rows']
  assert {row['point'] for row in rows} == {'start', 'trained'}
  first, *others = rows[: len(rows) // 2]
  assert first['family'] == 'backprop' and first['verdict'] == 'exact' and len(others) > 12
  assert all(np.isfinite(row['error']) and row['microseconds'] > 0 for row in rows)
  for name in ('start', 'trained'):
    assert (tmp_path / f'{name}.png').stat().st_size > 1000
  assert '| UORO | 1 |' in (tmp_path / 'estimators.md').read_text()
