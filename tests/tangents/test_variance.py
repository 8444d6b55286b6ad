"""Measured variance against predicted variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.estimators import linear_layer
from lfg_jax.tangents import variance
from lfg_jax.tangents.distributions import DISTRIBUTIONS, Chunk, hadamard, normal, rademacher
from lfg_jax.tangents.sampling import Sampling
from tests.statistics import RMS, ROW, is_mean

SIZES = (2, 8, 64)
BATCHES = (1, 16, 128)
KINDS = [
  (estimator, distribution, shared)
  for estimator in ('weight', 'activity')
  for distribution in ('normal', 'rademacher')
  for shared in (True, False)
]
# All nine pairs of p and q, every batch size with every p and every q, each with two of the kinds of estimates.
# (experiments/paper/variance.py measures all 216 combinations.)
ROWS = [
  (KINDS[(3 * i + j + 4 * k) % 8], p, q, BATCHES[(i + j) % 3])
  for i, p in enumerate(SIZES)
  for j, q in enumerate(SIZES)
  for k in range(2)
]


def z_score(estimator, distribution, num_tangents, shared, p, q, batch, draws=1000):
  """(measured - predicted) / standard error of a row, and the same with twice the prediction."""
  layer = linear_layer.random_layer(jax.random.key(p + 100 * q), p, q)
  estimate = layer.estimate(
    estimator, Sampling(DISTRIBUTIONS[distribution], num_tangents, shared), batch
  )
  at_once = 100 if p * q * batch < 100_000 else 10
  draws = draws if p * q * batch < 100_000 else 300
  measured = variance.measure(estimate, layer.truth, jax.random.key(2), draws, at_once=at_once)
  expected = variance.predicted(
    estimator,
    DISTRIBUTIONS[distribution],
    num_tangents,
    shared=shared,
    batch=batch,
    p=p,
    q=q,
    V=layer.V,
    S=layer.S,
  )
  z = lambda expected: float((measured.squared_error - expected) / measured.squared_error_se)
  return z(expected), z(2 * expected)


@pytest.mark.full
@pytest.mark.parametrize(('kind', 'p', 'q', 'batch'), ROWS)
def test_rows_of_table_1(kind, p, q, batch):
  estimator, distribution, shared = kind
  score, wrong = z_score(estimator, distribution, 1, shared, p, q, batch)
  assert abs(score) < ROW < abs(wrong)


@pytest.mark.full
@pytest.mark.parametrize('distribution', ['coordinate', 'haar', 'hadamard'])
def test_orthogonal_passes_between_one_and_all(distribution):
  """The excess is d/K - 1: for 8 dimensions, 3 with 2 tangents and 0 with 8."""
  assert abs(z_score('activity', distribution, 2, False, 8, 8, 16)[0]) < ROW
  layer = linear_layer.random_layer(jax.random.key(0), 8, 8)
  estimate = lambda distribution, num_tangents: layer.estimate(
    'activity', Sampling(distribution, num_tangents), 16
  )(jax.random.key(1))
  # The batch depends on the key alone: with all tangents every orthogonal distribution gives its exact gradient.
  assert jnp.allclose(
    jax.jit(estimate, static_argnums=(0, 1))(DISTRIBUTIONS[distribution], 8),
    jax.jit(estimate, static_argnums=(0, 1))(hadamard, 16),
    rtol=1e-4,
    atol=1e-5,
  )


def test_welford_over_devices_is_that_of_all_draws():
  mesh = jax.make_mesh((8,), ('draws',), axis_types=(jax.sharding.AxisType.Auto,))
  truth = {'a': jnp.ones(3), 'b': jnp.zeros(())}
  estimate = lambda key: {
    'a': 1 + jax.random.normal(key, (3,)),
    'b': 100 + 2 * jax.random.normal(key),
  }
  measured = variance.measure(estimate, truth, jax.random.key(0), 8000, at_once=50, mesh=mesh)
  keys = [
    jax.random.split(k, 50)
    for device in range(8)
    for k in jax.random.split(jax.random.fold_in(jax.random.key(0), device), 20)
  ]
  stored = jax.vmap(estimate)(jnp.concatenate(keys))
  assert measured.draws == 8000
  for name in truth:
    assert jnp.allclose(measured.mean[name], stored[name].mean(0), rtol=1e-5)
    assert jnp.allclose(measured.variance[name], stored[name].var(0, ddof=1), rtol=1e-4)
  errors = (((stored['a'] - 1) ** 2).sum(1) + stored['b'] ** 2) / 4
  assert jnp.allclose(measured.squared_error, errors.mean(), rtol=1e-5)
  assert jnp.allclose(measured.squared_error_se, errors.std(ddof=1) / 8000**0.5, rtol=1e-3)
  unbiased = measured.bias_z({'a': jnp.ones(3), 'b': jnp.float32(100)})
  assert unbiased < 2 < measured.bias_z(truth)


def test_allocation_is_the_best_of_all_within_the_budget():
  dims, norms, costs = (8, 8, 8), (1.0, 4.0, 0.5), (2.0, 2.0, 2.0)
  for distribution in (hadamard, rademacher):
    error = lambda num_tangents, distribution=distribution: sum(
      variance.predicted_taps(distribution, num_tangents, dims, norms, joint=False)
    )
    fitting = [
      num_tangents
      for num_tangents in np.ndindex(12, 12, 12)
      if min(num_tangents) > 0 and np.dot(num_tangents, costs) <= 30
    ]
    assert error(variance.allocate(distribution, dims, norms, costs, 30)) == pytest.approx(
      min(map(error, fitting))
    )
  with pytest.raises(ValueError, match=r'budget is 1; allowed: 6\.0'):
    variance.allocate(normal, dims, norms, costs, 1)


@pytest.mark.parametrize('joint', [True, False])
@pytest.mark.parametrize('distribution', [normal, hadamard])
def test_taps_disturb_each_other_just_when_perturbed_jointly(distribution, joint):
  g = [jnp.array([1.0, 2.0, 0.5, -1.0]), jnp.array([0.5, -0.5])]
  dims, norms = [x.size for x in g], [float((x**2).sum()) for x in g]

  def errors(key):
    keys = jax.random.split(key)
    u = [
      distribution.draw(k, Chunk(2), (), x.size, jnp.float32) for k, x in zip(keys, g, strict=True)
    ]
    slopes = [u @ x for u, x in zip(u, g, strict=True)]
    signals = [
      ((sum(slopes) if joint else s)[:, None] * u).mean(0) for s, u in zip(slopes, u, strict=True)
    ]
    return jnp.stack([((s - x) ** 2).sum() for s, x in zip(signals, g, strict=True)])

  measured = np.asarray(jax.jit(jax.vmap(errors))(jax.random.split(jax.random.key(0), 20_000)))
  expected = variance.predicted_taps(distribution, [2, 2], dims, norms, joint=joint)
  assert is_mean(measured, expected, slack=1e-5)


def test_what_is_refused():
  with pytest.raises(ValueError, match="estimator is 'both'; allowed: weight, activity"):
    variance.predicted('both', normal, 1, shared=True, batch=1, p=1, q=1, V=1.0, S=1.0)
  with pytest.raises(ValueError, match='draws is 5; allowed: at_once x devices = 10 or more'):
    variance.measure(lambda key: jnp.ones(1), jnp.ones(1), jax.random.key(0), 5, at_once=10)


def test_an_exact_estimate_has_no_bias_and_a_shifted_one_has():
  truth = {'a': jnp.array([1.0, 0.3, 0.0])}
  third = lambda key: {'a': (truth['a'] / 3 + 0 * jax.random.normal(key)) * 3}
  exact = variance.measure(third, truth, jax.random.key(0), 200)
  assert exact.bias_z(truth) < RMS < exact.bias_z({'a': truth['a'] + 1e-3})
