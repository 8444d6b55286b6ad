"""`diagnose` names a tap declared too local and finds planted biases, with no false alarms."""

import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import lfg_jax
from lfg_jax import tap
from lfg_jax.diagnosis import bias_test
from lfg_jax.tangents import distributions
from tests.bare import KEYS, W, bare, batch_normed, scanned, square

matplotlib.use('agg')
KEY = jax.random.key(11)
B, P, C = 4, 3, 5
X = jax.random.normal(KEYS[0], (B, P, C))
V = {name: 0.7 * jax.random.normal(key, (C, C)) for name, key in zip('ab', KEYS[1:3], strict=True)}
SCALED = distributions.Distribution(
  lambda *args: 1.1**0.5 * distributions.rademacher.draw(*args), distributions.rademacher.excess
)


def diagnose(fun, *args, num_tangents=(8,), draws=1000, key=KEY, **options):
  check = lfg_jax.diagnose(fun, num_tangents=num_tangents, draws=draws, at_once=100, **options)
  return check(*args, key=key)


def patches(v, x, mix=0.0, **options):
  """Losses [B, P] of patches; `mix` is the share of an activity that is their mean."""
  h = tap(x @ v['a'], 'h', **options)
  if mix:
    h = (1 - mix) * h + mix * h.mean(1, keepdims=True)
  return jnp.square(jnp.tanh(h) @ v['b'] - 1).sum(-1)


def verdicts(found):
  return {one.declared.name: one.verdict for one in found.taps}


RIGHT = {
  'norm of the batch': (functools.partial(bare, middle=batch_normed), (W,), (12, 12, 4)),
  'scan': (functools.partial(bare, middle=scanned), (W,), (4, 12, 4)),
  'patches': (functools.partial(patches, local_axes=2), (V, X), (5,)),
}


@pytest.mark.parametrize('name', RIGHT)
def test_what_is_right_passes(name):
  fun, args, dimensions = RIGHT[name]
  found = diagnose(fun, *args)
  assert found.problems == [] and found.refused is None
  assert set(verdicts(found).values()) == {'ok'}
  assert all(one.declared.credited == one.real for one in found.taps)
  assert found.overall.visible < 0.2 and abs(found.overall.scale - 1) < 0.1
  assert tuple(one.declared.dimensions for one in found.taps) == dimensions


def test_examples_that_mix_are_named():
  found = diagnose(RIGHT['norm of the batch'][0], W, mixes_examples=False)
  wrong = 'too local: declares local_axes=1, influences along axis 0'
  assert verdicts(found) == {'a': wrong, 'normed': wrong, 'c': 'ok'}
  assert [one.is_biased for one in found.signals] == [True, True, False]
  assert [one.is_biased for one in found.gradients] == [True, True, False]
  assert found.signals[0].limit < 0.9 and found.signals[2].limit > 0.999
  assert f'tap a: {wrong}' in found.problems


def test_parts_that_mix_are_named_though_the_estimate_is_refused():
  found = diagnose(functools.partial(patches, mix=0.2, local_axes=2), V, X)
  assert 'mixes its axis 1' in found.refused
  assert verdicts(found) == {'h': 'too local: declares local_axes=2, influences along axis 1'}
  (signal,) = found.signals
  assert signal.is_biased and 0.05 < signal.bias < 0.3
  assert not found.gradients[1].is_biased and found.gradients[1].verdict == 'exact'
  assert 'refuses' in str(found)


def test_what_could_be_more_local():
  found = diagnose(patches, V, X, draws=100)
  assert verdicts(found) == {'h': 'could be more local: local_axes=2 (of tap or mark)'}
  said = diagnose(functools.partial(patches, local_axes=2), V, X, draws=100, mixes_examples=True)
  assert verdicts(said) == {'h': 'could be more local: mixes_examples=False'}
  assert (said.taps[0].declared.dimensions, said.taps[0].real) == (B * P * C, 2)


def test_signals_a_tenth_too_long_are_found():
  found = diagnose(functools.partial(patches, local_axes=2), V, X, distribution=SCALED)
  assert found.signals[0].is_biased and found.overall.is_biased
  assert found.signals[0].sigmas[0] > bias_test.SIGMAS < found.signals[0].sigmas[1]
  assert found.signals[0].scale == pytest.approx(1.1, abs=0.03)
  assert found.signals[0].limit > 0.99  # the direction is right
  assert verdicts(found) == {'h': 'ok'}


def leaky(w):
  """The second of two taps declares a ReLU inactive where a tenth of the signal passes."""
  z = jnp.tanh(tap(X[:3, 0, :4] @ w['a'], 'right')) @ w['b']
  z = tap(z, 'wrong', active=z > 0)
  return square(jnp.where(z > 0, z, 0.1 * z) @ w['c'])


def test_a_bias_in_another_direction_is_found_at_its_tap():
  found = diagnose(leaky, W, draws=3000)
  right, wrong = found.signals
  assert not right.is_biased and wrong.is_biased and wrong.sigmas[1] > bias_test.SIGMAS
  assert wrong.bias == pytest.approx(0.1, abs=0.08)
  assert not found.gradients[2].is_biased  # what follows the tap is exact


def linear(w, x, y):
  return jnp.square(tap(x @ w, 'z') - y).sum(-1)


@pytest.mark.parametrize('distribution', ['rademacher', 'haar'])
def test_the_law_of_a_linear_layer(distribution):
  d, K = 8, (1, 2, 8)
  args = jax.random.normal(KEYS[0], (3, d)), jax.random.normal(KEYS[1], (1, 3)), jnp.zeros((1, d))
  found = diagnose(
    linear,
    *args,
    num_tangents=K,
    draws=2000,
    distribution=distributions.DISTRIBUTIONS[distribution],
  )
  for one in (found.signals[0], found.overall):
    expected = [distributions.DISTRIBUTIONS[distribution].excess(d, k) for k in K]
    assert np.all(np.abs(one.error - expected) < 4 * one.error_se + 1e-5)
    assert one.limit == pytest.approx(1, abs=0.01)
    a, b = (d - 1, 0) if distribution == 'rademacher' else (d, 1)
    assert one.noise == pytest.approx(a, rel=0.06) and one.orthogonal == pytest.approx(b, abs=0.06)
    curve = one.cosine_at(np.asarray(K))
    assert np.all(np.abs(one.cosine - curve) < 4 * one.cosine_se + 0.01)


def headed(w, x, off=0.0, middle=lambda h: h):
  h = jax.nn.relu(middle(tap(x @ w['a'], 'h')) - off)
  return {'head': jnp.square(h @ w['b'] - 1).sum((1, 2)), 'aux': jnp.square(h @ w['c']).sum((1, 2))}


def test_what_is_zero_by_accident_is_not_called_right():
  zero = jnp.zeros((C, C))
  mixed = functools.partial(headed, middle=lambda h: h - h.mean(0))
  at = lambda fun, b, c, **options: diagnose(fun, {**V, 'b': b, 'c': c}, X, draws=100, **options)
  start = at(headed, zero, zero)
  assert verdicts(start) == {'h': 'no influence seen; nearby: ok'} and start.problems == []
  assert start.signals[0].verdict == 'the gradient is zero here' and start.signals[0].is_zero
  assert np.isnan(start.signals[0].cosine).all() and not start.overall.is_biased
  (wrong,) = at(mixed, zero, zero, mixes_examples=False).taps
  assert wrong.verdict.startswith('no influence seen; nearby: too local') and wrong.is_wrong
  dead = at(functools.partial(headed, off=100), V['b'], V['b'])
  assert verdicts(dead) == {'h': 'no influence seen'} and dead.taps[0].real is None
  assert 'nan' not in str(dead)


def test_a_gradient_that_is_zero_but_for_rounding_and_one_that_is_not_finite():
  """An offset that the batch mean removes again, and a root of negative numbers."""

  def fun(w, x):
    h = tap(x @ w['a'] + w['offset'], 'h')
    return jnp.square((h - h.mean(0)) @ w['b'] - 1).sum(-1)

  found = diagnose(fun, {**V, 'offset': jnp.ones(C)}, X[:, 0], draws=300)
  assert found.gradients[2].verdict == 'the gradient is zero here' and found.problems == []
  bad = diagnose(lambda w, x: jnp.sqrt(tap(x @ w['a'], 'h')).sum(-1), V, X[:, 0], draws=100)
  assert 'finite' in bad.taps[0].verdict and 'signal of h: not finite' in bad.problems
  assert 'not finite' in str(bad)


def test_losses_that_are_not_seen_are_named():
  def fun(w, x):
    h = tap(x @ w['a'], 'h')
    return {
      'main': jnp.square(jax.nn.relu(h - 100) @ w['b']).sum((1, 2)),
      'aux': jnp.square(h).sum((1, 2)),
      'apart': jnp.square(x @ w['b']).sum((1, 2)),
    }

  assert verdicts(diagnose(fun, V, X, draws=100)) == {'h': 'ok, but no influence on main seen'}


def dropped(x, w, bias, *, key, size):
  """A function with two taps and a checkpoint name, and an aux that is not an array."""
  x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
  h = tap(checkpoint_name(x @ w['a'], 'h'), 'h')
  out = tap(jnp.tanh(h @ w['b']) + bias, 'out')
  return size * jnp.square(out).sum(-1), 'text'


def test_options_are_those_of_the_gradient():
  perfect = lambda activities, x, *args, size: {'out': 2 * size * activities['out'] / len(x)}
  check = lfg_jax.diagnose(
    dropped,
    argnums=(1, 2),
    has_aux=True,
    num_tangents=(2,),
    draws=500,
    at_once=100,
    distribution=distributions.normal,
    joint=False,
    checkpoint_names=True,
    taps=('h_1', 'out'),
    control_variate=perfect,
  )
  found = check(X[:, 0], V, jnp.ones(C), size=3.0, key=KEY)
  assert found.problems == [] and verdicts(found) == {'h_1': 'ok', 'out': 'ok'}
  assert [one.name for one in found.gradients] == ['0/a', '0/b', '1']
  assert found.signals[0].error == pytest.approx((C + 1) / 2, rel=0.2)
  assert found.signals[1].verdict == 'exact'


def test_table_and_plot():
  of_key = lambda: diagnose(RIGHT['patches'][0], V, X, num_tangents=(1, 4), draws=100)
  found = of_key()
  assert str(found) == str(of_key())
  lines = str(found).splitlines()
  assert lines[1].split() == ['tap', 'shape', 'd', 'local_axes', 'credited', 'real', 'verdict']
  assert lines[2].split() == ['h', '4×3×5', '5', '2', '2', '2', 'ok']
  assert [line.split()[:2] for line in lines[6:]] == [
    ['signal', 'h'],
    ['grad', 'a'],
    ['grad', 'b'],
    ['whole', 'gradient'],
  ]
  assert repr(found) == str(found) and max(map(len, lines)) < 110
  figure = found.plot()
  assert len(figure.axes[0].lines) > 4 and figure.axes[0].get_xlabel() == 'tangents K'
  assert found.plot(figure.axes[0]) is figure
  matplotlib.pyplot.close(figure)


def test_statistics_of_draws_with_an_uneven_covariance():
  """Noise has variances 1, 1/2, …, 1/8, and the mean is off by a fifth, orthogonal to the truth.

  A second leaf has 400 dimensions with equal noise.
  """
  truth, off = [jnp.arange(8.0), jnp.ones(400)], 0.2 * np.sqrt(140) * np.eye(8)[0]
  scales = [np.sqrt(1 / np.arange(1, 9)), np.full(400, 0.1)]
  first_t, second_t = (
    [np.sum(s ** (2 * n)) / size**n for n in (1, 2, 3)]
    for s, size in zip(scales, (140, 400), strict=True)
  )

  def estimate(key, shift):
    first, second = (s * jax.random.normal(key, s.shape) for s in scales)
    return [truth[0] + first + shift, truth[1] + second]

  for shift in (0, off):
    shifted = functools.partial(estimate, shift=shift)
    draws = bias_test.sample(shifted, truth, KEY, 2000, 100, (True, True))
    first, second, whole = bias_test.accuracies(
      'abc', [1], [draws], [1e-6] * 3, is_orthogonal=False
    )
    assert draws.traces[:, 0] == pytest.approx(np.asarray(first_t[1:]), rel=0.2)
    assert draws.traces[:, 1] == pytest.approx(np.asarray(second_t[1:]), rel=0.2)
    assert draws.traces[0, 2] == pytest.approx(
      (140**2 * first_t[1] + 400**2 * second_t[1]) / 540**2, rel=0.2
    )
    assert first.error[0] - 0.04 * bool(np.any(shift)) == pytest.approx(first_t[0], rel=0.1)
    assert first.is_biased == whole.is_biased == bool(np.any(shift))
    assert first.bias == pytest.approx(0.2 if first.is_biased else 0, abs=0.005)
    assert abs(first.sigmas[0]) < 4 and max(np.abs(second.sigmas)) < 4
    assert first.limit == pytest.approx(1 / np.sqrt(1.04) if first.is_biased else 1, abs=0.003)
    assert 1 < first.visible / np.sqrt(5 * np.sqrt(2 * first_t[1]) / 2000) < 2


@pytest.mark.parametrize(
  'options',
  [{'num_tangents': ()}, {'num_tangents': (4, 1)}, {'at_once': 7}, {'draws': 0}, {'probes': 0}],
  ids=str,
)
def test_numbers_that_make_no_sense(options):
  with pytest.raises(ValueError, match=f'{next(iter(options))}.*allowed'):
    lfg_jax.diagnose(patches, **options)


def test_what_the_gradient_refuses_is_refused():
  with pytest.raises(ValueError, match='has no tap'):
    lfg_jax.diagnose(lambda v: jnp.square(X @ v['a']).sum((1, 2)))(V, key=KEY)
  with pytest.raises(ValueError, match="no tap 'unknown'"):
    lfg_jax.diagnose(patches, taps='unknown')(V, X, key=KEY)


@pytest.mark.parametrize('options', [{'num_tangents': 2}, {'num_tangents': (2,)}])
def test_the_number_of_tangents_is_one_or_several(options):
  found = lfg_jax.diagnose(patches, draws=12, at_once=6, **options)(V, X, key=KEY)
  assert found.num_tangents == (2,)


def test_what_has_no_rule_for_vmap_can_be_diagnosed():
  def fun(w, x):
    sizes = jnp.array([2, len(x) - 2])
    return jnp.square(jax.lax.ragged_dot(tap(x * w, 'h'), jnp.ones((2, C, 3)), sizes)).sum(-1)

  found = diagnose(fun, jnp.ones(C), X[:, 0], num_tangents=1, draws=100, mixes_examples=False)
  assert verdicts(found) == {'h': 'ok'} and found.problems == []


@pytest.mark.parametrize('local_axes', [1, 2])
def test_a_marked_layer_is_made_as_local_as_advised(local_axes):
  model = nnx.Linear(C, C, rngs=nnx.Rngs(0))
  graph, params = nnx.split(lfg_jax.mark(model, nnx.Linear, local_axes=local_axes))
  losses = lambda params: jnp.square(nnx.merge(graph, params)(X)).sum(-1)
  expected = 'could be more local: local_axes=2 (of tap or mark)' if local_axes == 1 else 'ok'
  assert verdicts(diagnose(losses, params, draws=100)) == {'Linear': expected}


def test_skewed_draws_are_not_a_bias():
  """The scale of one tangent is χ² - 1. Of 20,000 means over 100, at most one is a false alarm."""
  x = np.random.default_rng(0).chisquare(1, (20_000, 100)) - 1
  plain = np.abs(x.mean(1) / x.std(1, ddof=1) * 10)
  found = np.array([bias_test._along(row, 1e-6) for row in x])
  assert (plain > bias_test.SIGMAS).sum() > 1 >= (np.abs(found) > bias_test.SIGMAS).sum()
  for sign in (-1, 1):
    assert sign * bias_test._along(x[0] + sign * 2.0, 1e-6) > bias_test.SIGMAS
  assert abs(bias_test._along(1e-9 * x[0], 1e-6)) < 1e-3
  assert bias_test._along(np.full(20, 0.1), 1e-6) > bias_test.SIGMAS
