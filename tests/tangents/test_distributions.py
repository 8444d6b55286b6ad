"""Distributions of tangents: second moments, squared errors, and what orthogonal tangents make exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax import diagnose, tap, value_and_activity_grad, value_and_forward_grad
from lfg_jax.errors import UserError
from lfg_jax.estimators.weight import weight_perturbation
from lfg_jax.tangents import distributions, guided, variance
from lfg_jax.tangents.distributions import DISTRIBUTIONS, Chunk
from lfg_jax.tangents.sampling import Sampling, each_chunk, sum_over_chunks
from lfg_jax.training.rules import algorithms, rules
from tests.small import relative_error, small
from tests.statistics import SIGMAS, is_mean, z_of_mean

DRAWS = 20_000


def draws(distribution, num_tangents, d, shape=()):
  draw = lambda key: distribution.draw(key, Chunk(num_tangents), shape, d, jnp.float32)
  return jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), DRAWS))


def z_of_second_moment(u_NxKxD):
  """Largest z-score of the mean over draws of (1/K) Σ_k u uᵀ against the identity."""
  outer = np.einsum('nki,nkj->nij', u_NxKxD, u_NxKxD) / u_NxKxD.shape[1]
  return z_of_mean(outer, np.eye(u_NxKxD.shape[2]), rounding=1e-5).max()  # some entries do not vary


@pytest.mark.parametrize('name', sorted(DISTRIBUTIONS))
@pytest.mark.parametrize(('d', 'num_tangents'), [(4, 1), (4, 3), (4, 4), (4, 6), (6, 4), (5, 3)])
def test_second_moment_is_the_identity_and_squared_error_the_known_factor(name, d, num_tangents):
  distribution = DISTRIBUTIONS[name]
  u = np.asarray(draws(distribution, num_tangents, d))
  assert z_of_second_moment(u) < SIGMAS
  # The test sees a distribution that is wrong.
  assert z_of_second_moment(u * np.linspace(0.9, 1.1, d)) > SIGMAS
  g = np.linspace(-1, 2, d)
  estimate = np.einsum('nk,nkd->nd', u @ g, u) / num_tangents
  errors = ((estimate - g) ** 2).sum(1) / (g**2).sum()
  assert is_mean(errors, distribution.excess(d, num_tangents), SIGMAS, slack=1e-5)


@pytest.mark.parametrize('name', ['coordinate', 'haar', 'hadamard'])
def test_tangents_of_a_set_are_orthogonal(name):
  u = np.asarray(draws(DISTRIBUTIONS[name], 8, 8)[:10])
  gram = np.einsum('nki,nli->nkl', u, u)
  assert np.abs(gram - 8 * np.eye(8)).max() < 1e-4


@pytest.mark.parametrize('name', sorted(DISTRIBUTIONS))
def test_a_part_of_the_passes_is_that_part_of_all(name):
  distribution, key = DISTRIBUTIONS[name], jax.random.key(0)
  whole = distribution.draw(key, Chunk(12), (3,), 4, jnp.float32)
  part = jax.jit(lambda first: distribution.draw(key, Chunk(12, first, 4), (3,), 4, jnp.float32))(4)
  assert whole.shape == (12, 3, 4)
  assert jnp.allclose(part, whole[4:8])


@pytest.mark.full
def test_a_law_from_a_file_must_not_bias(tmp_path):
  path = tmp_path / 'mine.py'
  for text, message in (
    ('distributions = 1', 'has no distribution; it needs distribution'),
    (
      'distribution = Distribution(lambda key, chunk, shape, d, dtype: 1 / 0, None)',
      'ZeroDivisionError',
    ),
    (
      'distribution = Distribution(lambda *shape: 1.1 * normal.draw(*shape), None)',
      r'mean squares of 1\.2., or move together; allowed',
    ),
    (
      'distribution = Distribution(lambda key, chunk, shape, d, dtype: jax.numpy.ones((chunk.total, *shape, d)), None)',
      r'mean squares of 1\.00, or move together; allowed',
    ),
    (
      'distribution = Distribution(lambda *shape: normal.draw(*shape)[0], None)',
      r'distribution draws \(4,\) for 2 tangents in 4 dimensions; allowed: \(2, 4\)',
    ),
  ):
    path.write_text(
      f'import jax\nfrom lfg_jax.tangents.distributions import Distribution, normal\n{text}\n'
    )
    with pytest.raises((ValueError, UserError), match=message):
      rules.Options(module=str(path))
  path.write_text('from lfg_jax.tangents.distributions import sphere as distribution\n')
  options = rules.Options(module=str(path))
  assert (
    relative_error(
      estimate(small(), {'module': options.module}), estimate(small(), {'distribution': 'sphere'})
    )
    == 0
  )


def estimate(s, options, name='LG-FG-A', key=0):
  algorithm = algorithms.compose(rules.REGISTRY[name], rules.Options(**options), s.model)
  return jax.jit(algorithm.gradient)(s.variables, jax.random.key(key), s.batch)[0]


@pytest.mark.full
def test_as_many_orthogonal_passes_as_dimensions_give_the_exact_gradient():
  """Taps are separate. Groups have 16 / 4 channels; token mixing feeds all 16 channels."""
  options = {'joint': False, 'num_tangents': 4, 'num_tangents_by_tap': {'after_token': 16}}
  s = small(blocks=2)
  assert (
    relative_error(estimate(s, {**options, 'distribution': 'hadamard'}), estimate(s, {}, 'LG-BP'))
    < 2e-5
  )
  s = small(blocks=1)
  exact = estimate(s, {}, 'LG-BP')
  assert relative_error(estimate(s, {**options, 'distribution': 'haar'}), exact) < 2e-5
  assert (
    relative_error(
      estimate(
        s, {**options, 'distribution': 'hadamard', 'joint': True, 'num_tangents_by_tap': {}}
      ),
      exact,
    )
    > 0.1
  )


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('LG-FG-A', {'joint': False, 'distribution': 'hadamard'}),
    ('LG-FG-A+', {}),
    ('FG-A', {}),
    ('LG-FG-W', {}),
    ('LG-FG-W', {'sharing': 'independent'}),
  ],
)
def test_chunks_of_passes_change_nothing(name, options):
  s = small(blocks=1)
  whole = estimate(s, {'num_tangents': 6, **options}, name)
  in_chunks = estimate(s, {'num_tangents': 6, 'chunk': 2, **options}, name)
  assert relative_error(in_chunks, whole) < 1e-4


def test_projection_is_shorter_by_k_over_d_and_exact_when_the_span_is_all():
  """Tangents of uniform direction: E[P] = K/d; times d/K it is the haar distribution's mean."""
  s = small(blocks=1, groups=2, channels=8)
  exact = estimate(s, {}, 'LG-BP')
  options = {'distribution': 'normal', 'joint': False, 'combine': 'projection'}
  assert relative_error(estimate(s, {**options, 'num_tangents': 4}), exact) < 1e-3
  algorithm = algorithms.compose(rules.REGISTRY['LG-FG-A'], rules.Options(**options), s.model)
  one = lambda key: algorithm.gradient(s.variables, key, s.batch)[0]['stem']['channel']['kernel']
  samples = np.asarray(
    jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(
      jax.random.split(jax.random.key(5), 4000)
    )
  )
  expected = np.asarray(exact['stem']['channel']['kernel']) / 4
  assert z_of_mean(samples, expected).max() < SIGMAS < z_of_mean(samples, 4 * expected).max()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'combine': 'projection'}, 'joint=False'),
    ({'combine': 'projection', 'joint': False, 'num_tangents': 8}, 'chunk=0 or 8 or more'),
    (
      {'combine': 'projection', 'joint': False, 'num_tangents_by_tap': {'after_group': 8}},
      'chunk=0 or 8 or more',
    ),
    ({'num_tangents_by_tap': {'after_group': 3}}, 'estimator.joint=False'),
    (
      {'joint': False, 'num_tangents_by_tap': {'last': 3}},
      "num_tangents_by_tap is 'last'; allowed: after_token, after_channel",
    ),
    ({'combine': 'sum'}, "estimator.combine is 'sum'; allowed: mean, projection"),
    ({'chunk': -1}, 'estimator.chunk is -1; allowed: 0 or more'),
  ],
)
def test_options_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    rules.Options(**options).of(rules.REGISTRY['LG-FG-A'], small().model)


def test_sampling_refuses_projection_in_chunks():
  with pytest.raises(ValueError, match='needs all 4 tangents at once'):
    Sampling(distributions.normal, num_tangents=4, chunk=2, combine='projection').check()
  assert Sampling(num_tangents=6, chunk=4).at_once == 4


@pytest.mark.parametrize(
  ('num_tangents', 'chunk'), [(5, 4), (7, 4), (8, 4), (11, 3), (4, 9), (3, 1)]
)
def test_chunks_with_a_rest(num_tangents, chunk):
  """Every pass counts once, in as few chunks as possible, and the result is that of all at once."""
  whole, parts = Sampling('haar', num_tangents), Sampling('haar', num_tangents, chunk=chunk)
  sizes = []

  def part(own):
    sizes.append(own.total if own.size is None else own.size)
    return {'ids': own.ids_K, 'of': own.of(jnp.arange(num_tangents) ** 2)}

  found = each_chunk(part, parts)
  assert found['ids'].tolist() == list(range(num_tangents))
  assert found['of'].tolist() == [n**2 for n in range(num_tangents)]
  rest = num_tangents % chunk
  assert set(sizes) == ({num_tangents} if chunk >= num_tangents else {rest, chunk} - {0})
  summed = lambda sampling: sum_over_chunks(lambda own: (own.ids_K + 1).sum(), sampling)
  assert summed(parts) == summed(whole) == num_tangents * (num_tangents + 1) / 2


@pytest.mark.parametrize('distribution', sorted(DISTRIBUTIONS))
@pytest.mark.parametrize('joint', [True, False])
def test_estimates_do_not_depend_on_the_chunk(distribution, joint):
  with jax.enable_x64(True):
    w = jax.random.normal(jax.random.key(0), (4, 4), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (3, 4), jnp.float64)
    losses = lambda w: (tap(jnp.tanh(tap(x @ w, 'a')) @ w, 'b') ** 2).sum(-1)
    taps = lambda chunk: value_and_activity_grad(
      losses, distribution=distribution, num_tangents=7, chunk=chunk, joint=joint
    )(w, key=jax.random.key(2))
    weights = lambda chunk: value_and_forward_grad(
      lambda w: losses(w).mean(), distribution=distribution, num_tangents=7, chunk=chunk
    )(w, key=jax.random.key(2))
    for run in (taps, weights):
      assert relative_error(run(4), run(None)) < 1e-12


@pytest.mark.parametrize('name', sorted(DISTRIBUTIONS))
def test_a_law_may_be_given_by_its_name(name):
  w, key = jnp.arange(4.0), jax.random.key(0)
  losses = lambda w: (tap(jnp.ones((2, 4)) * w, 'h') ** 2).sum(-1)
  guide = jnp.eye(2, 4)
  doors = {
    'activity': lambda distribution: value_and_activity_grad(losses, distribution=distribution)(
      w, key=key
    )[1],
    'forward': lambda distribution: value_and_forward_grad(
      lambda w: (w**2).sum(), distribution=distribution
    )(w, key=key)[1],
    'weight': lambda distribution: weight_perturbation(
      lambda w: (losses(w), {}), sampling=Sampling(distribution, shared=True)
    )(w, key)[1],
    'tree': lambda distribution: distributions.like_tree(distribution, key, w, Chunk(2)),
    'within': lambda distribution: guided.within(guide, distribution).draw(
      key, Chunk(1), (), 4, jnp.float32
    ),
    'predicted': lambda distribution: variance.predicted_taps(
      distribution, [2], [4], [1.0], joint=False
    )[0],
    'allocate': lambda distribution: jnp.array(
      variance.allocate(distribution, [4, 8], [1.0, 2.0], [1.0, 2.0], 9.0)
    ),
  }
  for door in doors.values():
    np.testing.assert_array_equal(door(name), door(DISTRIBUTIONS[name]))


@pytest.mark.parametrize(
  ('distribution', 'message'),
  [
    (
      'rademache',
      r"distribution is 'rademache'; did you mean rademacher\? allowed: normal, rademacher",
    ),
    ('gauss', "distribution is 'gauss'; allowed: normal, rademacher, sphere"),
    (
      jax.random.normal,
      'distribution is <.*; allowed: a distributions.Distribution, or one of normal, rademacher',
    ),
  ],
  ids=['nearly', 'another', 'a function'],
)
def test_what_is_no_law_is_refused_at_every_door(distribution, message):
  doors = (
    lambda: value_and_activity_grad(lambda w: w, distribution=distribution),
    lambda: value_and_forward_grad(lambda w: w, distribution=distribution),
    lambda: diagnose(lambda w: w, distribution=distribution),
    lambda: weight_perturbation(lambda w: w, sampling=Sampling(distribution)),
    lambda: guided.within(jnp.eye(2, 4), distribution),
  )
  for door in doors:
    with pytest.raises(ValueError, match=message):
      door()


@pytest.mark.parametrize('distribution', sorted(DISTRIBUTIONS))
def test_an_empty_leaf_has_empty_tangents(distribution):
  tree = {'none': jnp.zeros((0, 3)), 'some': jnp.zeros(4)}
  found = distributions.like_tree(distribution, jax.random.key(0), tree, Chunk(5, 2, 3))
  assert {name: leaf.shape for name, leaf in found.items()} == {'none': (3, 0, 3), 'some': (3, 4)}
