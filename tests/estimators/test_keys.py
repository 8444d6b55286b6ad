"""One meaning of a key: the tangent that is measured is the tangent that is used, always.

With as many orthogonal tangents as dimensions, every estimate is exact, but only if all draws agree.
"""

import jax
import jax.numpy as jnp
import pytest

from lfg_jax import Sampling, forward_grad, tap, value_and_activity_grad
from lfg_jax.estimators import activity, forward_gradient, weight
from lfg_jax.tangents import derivatives, distributions, sampling
from tests.small import relative_error
from tests.statistics import is_mean

KEYS = jax.random.split(jax.random.key(0), 3)
B, D, MEMBERS = 3, 4, 3
W = jax.random.normal(KEYS[0], (MEMBERS, D, D))
X = jax.random.normal(KEYS[1], (MEMBERS, B, D))
GENERATORS = ('threefry2x32', 'rbg', 'unsafe_rbg')


def one_tap(w, x):
  return (jnp.sin(tap(x @ w, 'a')) ** 2).sum(-1)


def two_taps(w, x):
  return (tap(jnp.tanh(tap(x @ w, 'a')) @ w, 'b') ** 2).sum(-1)


def by_taps(fun, **options):
  """With the tangents of the distribution `hadamard`, as many as a tap has dimensions."""
  step = value_and_activity_grad(fun, **{'distribution': 'hadamard', 'num_tangents': D, **options})
  return lambda w, x, key: step(w, x, key=key)[1]


def by_weights(**options):
  step = forward_grad(lambda w, x: one_tap(w, x).mean(), distribution='hadamard', **options)
  return lambda w, x, key: step(w, x, key=key)


def in_sum(estimator, **options):
  """An estimator that the trainer uses: the objective is the sum of the losses."""
  distribution = Sampling('hadamard', **options.pop('sampling'))
  step = estimator(lambda w, x: (one_tap(w, x) / B, {}), sampling=distribution, **options)
  return lambda w, x, key: step(w, key, x)[1]


control_variate = lambda activities, w, x: {name: jnp.cos(z) for name, z in activities.items()}
difference = derivatives.finite_difference(1e-3)
ESTIMATES = {
  'joint': (one_tap, by_taps(one_tap)),
  'sets in chunks with a rest': (one_tap, by_taps(one_tap, num_tangents=2 * D, chunk=3)),
  'separate': (two_taps, by_taps(two_taps, joint=False, distribution='haar')),
  'control_variate': (
    one_tap,
    by_taps(one_tap, joint=False, control_variate=control_variate, chunk=3),
  ),
  'projection': (
    one_tap,
    by_taps(one_tap, joint=False, distribution='normal', num_tangents=2 * D, combine='projection'),
  ),
  'shared': (one_tap, by_taps(one_tap, shared=True)),
  'forward gradient': (one_tap, by_weights(num_tangents=2 * D**2)),
  'forward gradient in chunks': (one_tap, by_weights(num_tangents=2 * D**2, chunk=5)),
  'finite differences': (
    one_tap,
    in_sum(activity.activity_perturbation, sampling={'num_tangents': D}, derivative=difference),
  ),
  'weights': (
    one_tap,
    in_sum(weight.weight_perturbation, sampling={'num_tangents': D**2, 'shared': True, 'chunk': 5}),
  ),
  'weights, each example': (
    one_tap,
    in_sum(weight.weight_perturbation, sampling={'num_tangents': 2 * D**2, 'chunk': 5}),
  ),
}
WAYS = {
  'plain': lambda f, key: f(W[0], X[0], key),
  'vmap over parameters': lambda f, key: jax.vmap(f, (0, None, None))(W, X[0], key),
  'vmap over data': lambda f, key: jax.vmap(f, (None, 0, None))(W[0], X, key),
  'vmap over keys': lambda f, key: jax.vmap(f, (None, None, 0))(
    W[0], X[0], jax.random.split(key, MEMBERS)
  ),
  'vmap over all in a scan': lambda f, key: jax.lax.map(
    lambda key: jax.vmap(f)(W, X, jax.random.split(key, MEMBERS)), jax.random.split(key, 2)
  ),
}


def errors(name, generator):
  """The relative error of an estimate that must be exact, for every way of mapping it."""
  fun, estimate = ESTIMATES[name]
  exact = lambda w, x, key: jax.grad(lambda w: fun(w, x).mean())(w)
  both = lambda key: {way: (map_(estimate, key), map_(exact, key)) for way, map_ in WAYS.items()}
  found = jax.jit(both)(jax.random.key(7, impl=generator))
  return {way: relative_error(*pair) for way, pair in found.items()}


@pytest.mark.parametrize('name', ESTIMATES)
@pytest.mark.parametrize(
  'generator', ['rbg', *(pytest.param(g, marks=pytest.mark.full) for g in GENERATORS if g != 'rbg')]
)
def test_the_estimate_is_exact_whatever_is_mapped(name, generator):
  tolerance = 1e-2 if name == 'finite differences' else 1e-4
  assert max(errors(name, generator).values()) < tolerance


@pytest.mark.parametrize(
  ('name', 'ways'),
  [
    ('joint', {'vmap over parameters', 'vmap over data'}),
    ('control_variate', {'vmap over parameters', 'vmap over data'}),
    ('sets in chunks with a rest', set(WAYS)),
    ('forward gradient', set(WAYS)),
    ('weights, each example', set(WAYS)),
  ],
)
def test_keys_as_they_are_would_be_wrong(name, ways, monkeypatch):
  for module in (activity, forward_gradient, weight):
    monkeypatch.setattr(module, 'tangent_key', lambda key: key)
  assert ways <= {way for way, error in errors(name, 'rbg').items() if error > 0.1}


@pytest.mark.parametrize('generator', GENERATORS)
def test_tangents_are_unbiased_independent_signs_whatever_the_generator(generator):
  """Also those of neighbouring keys, and those of one key's parts."""
  keys = jax.random.split(jax.random.key(3, impl=generator), 20_000)
  draw = lambda key: distributions.draw_signs(sampling.tangent_key(key), (6,))
  u_NxD = jax.jit(jax.vmap(draw))(keys)
  assert is_mean(u_NxD, 0) and is_mean(u_NxD[1:] * u_NxD[:-1], 0)
  assert is_mean(u_NxD[:, 1:] * u_NxD[:, :-1], 0) and not is_mean(u_NxD**2, 0)
  assert (
    len({tuple(jax.random.key_data(k).tolist()) for k in jax.vmap(sampling.tangent_key)(keys[:99])})
    == 99
  )


def test_keys_of_threefry_are_taken_as_they_are_and_old_ones_as_new_ones():
  new, old = jax.random.key(5), jax.random.PRNGKey(5)
  estimate = ESTIMATES['joint'][1]
  assert sampling.tangent_key(new) is new
  assert (estimate(W[0], X[0], old) == estimate(W[0], X[0], new)).all()


@pytest.mark.parametrize('name', ['joint', 'forward gradient', 'weights'])
def test_several_keys_are_refused(name):
  with pytest.raises(ValueError, match=r'key has shape \(3,\); allowed: one key, or jax.vmap over'):
    ESTIMATES[name][1](W[0], X[0], KEYS)
