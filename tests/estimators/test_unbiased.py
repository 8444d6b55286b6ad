"""Every forward-gradient rule is unbiased for its target, parameter by parameter.

Means over many estimates are compared with the exact gradient (tests/statistics.py). The same test
must reject estimators that are biased on purpose.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.estimators import activity
from lfg_jax.local.heads import Heads
from lfg_jax.local.info_nce import Contrast
from lfg_jax.training.rules import algorithms, rules
from tests.small import compose, gradient, small
from tests.statistics import verdict, z_scores, z_scores_of_multiples


def model(**changes):
  return small(**{'channels': 8, 'groups': 2, 'blocks': 3, 'batch': 2, 'classes': 3, **changes})


def judge(s, name, target_name, multiples=(1,), **options):
  """The verdicts on the estimates times each number."""
  algorithm = compose(s, name, **options)
  cuts = {k: v for k, v in options.items() if k in ('patch', 'group', 'every', 'overlap')}
  target = gradient(s, target_name, **cuts)
  run = lambda key: algorithm.gradient(s.variables, key, s.batch)[0]
  return [verdict(scores) for scores in z_scores_of_multiples(run, target, multiples)]


CASES = [
  ('FG-W', 'BP', {}),
  ('FG-A', 'BP', {}),
  ('LG-FG-W', 'LG-BP', {}),
  ('LG-FG-A', 'LG-BP', {}),
  ('LG-FG-A', 'LG-BP', {'distribution': 'normal'}),
  ('LG-FG-A', 'LG-BP', {'sharing': 'shared'}),
  ('LG-FG-A', 'LG-BP', {'num_tangents': 3}),
  ('LG-FG-A', 'LG-BP', {'patch': False}),
  ('LG-FG-A', 'LG-BP', {'group': False}),
  ('LG-FG-A', 'LG-BP', {'every': 2}),
  ('LG-FG-A', 'LG-BP', {'overlap': True}),
  ('LG-FG-W', 'LG-BP', {'sharing': 'independent'}),
  ('LG-FG-W', 'LG-BP', {'distribution': 'normal', 'num_tangents': 2}),
  ('LG-FG-A+', 'LG-BP', {}),
  ('LG-FG-A+', 'LG-BP', {'patch': False}),
  ('LG-FG-A+', 'LG-BP', {'group': False}),
  ('LG-FG-A+', 'LG-BP', {'every': 2}),
  ('LG-FG-A+', 'LG-BP', {'overlap': True}),
]


# Without --full, every rule has one test.
CASES = [case if not case[2] else pytest.param(*case, marks=pytest.mark.full) for case in CASES]


@pytest.mark.parametrize('name, target, options', CASES, ids=lambda x: str(x))
def test_unbiased(name, target, options):
  """Estimates that are ten percent too long are rejected."""
  right, longer = judge(model(), name, target, (1, 1.1), **options)
  assert right == []
  # Exact gradients (heads, read-out) are trivial to reject: one that carries noise must be found.
  assert any('head' not in line and 'readout' not in line for line in longer)


def two_views(key_B, image):
  """The image and its negative; ignores the key, so that only tangents differ between draws."""
  del key_B
  return jnp.stack([image, 255 - image], 1).reshape(-1, *image.shape[1:])


def judge_contrastive(name, shared_views=True, stop_gradient=True):
  contrast = Contrast(projections=4, shared_views=shared_views, stop_gradient=stop_gradient)
  s = model(batch=3, heads=Heads(contrast=contrast))
  run, exact = (
    algorithms.compose(rules.REGISTRY[n], rules.Options(), s.model, augment=two_views)
    for n in (name, {'FG-A': 'BP', 'FG-W': 'BP'}.get(name, 'LG-BP'))
  )
  target = jax.jit(exact.gradient)(s.variables, jax.random.key(0), s.batch)[0]
  return verdict(z_scores(lambda key: run.gradient(s.variables, key, s.batch)[0], target))


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'shared_views'),
  [('LG-FG-A', True), ('LG-FG-A', False), ('LG-FG-A+', True), ('FG-A', True), ('LG-FG-W', True)],
)
def test_contrastive_estimates_are_unbiased(name, shared_views):
  assert judge_contrastive(name, shared_views) == []


@pytest.mark.full
def test_without_the_stop_gradient_contrastive_activity_estimates_are_biased():
  """They ignore the influence of an activity on the losses of other rows: the paper's figure 4."""
  assert judge_contrastive('LG-FG-A', stop_gradient=False)


@pytest.mark.full
def test_without_the_stop_gradient_exact_signals_know_of_the_other_rows():
  """Behind the boundary, reverse mode gives the whole gradient, so our estimator stays unbiased."""
  assert judge_contrastive('LG-FG-A+', stop_gradient=False) == []


def test_one_tangent_for_a_batch_that_batch_norm_mixes_is_refused():
  with pytest.raises(ValueError, match=r"sharing='shared'.*model\.norm='batch' mixes; allowed"):
    compose(model(norm='batch'), 'LG-FG-A+', sharing='shared')


@pytest.mark.full
def test_the_papers_credit_rule_is_biased_for_the_layer_before_the_groups_only():
  (bad,) = judge(model(), 'LG-FG-W', 'LG-BP', credit='paper')
  assert bad and all("['channel']" in line for line in bad)


def test_a_tap_credited_with_its_own_group_only_is_rejected(monkeypatch):
  """Token mixing feeds every group, so crediting its tap with one group's losses only is biased."""
  right = activity.credit

  def wrong(tap, dL, axis_name=None):
    only = jax.tree.map(lambda d: d * (jnp.arange(d.shape[-1]) == 0), dL)
    return right(tap, only if tap.local_axes == 2 else dL, axis_name)

  monkeypatch.setattr(activity, 'credit', wrong)
  (bad,) = judge(model(), 'LG-FG-A', 'LG-BP')
  assert bad and all("['token']" in line for line in bad)


def test_noise_does_not_depend_on_how_the_batch_is_split():
  """Half a batch, at its place in the global batch, gets the tangents of the whole batch."""
  s = model(batch=4)
  algorithm = algorithms.compose(rules.REGISTRY['LG-FG-A+'], rules.Options(), s.model, 'data')
  whole = gradient(s, 'LG-FG-A+')  # the paper's has the same way of drawing
  halves = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), s.batch)
  per_device = jax.jit(
    jax.vmap(
      functools.partial(algorithm.gradient, s.variables, jax.random.key(0)), axis_name='data'
    )
  )(halves)[0]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b.sum(0), rtol=1e-4, atol=1e-6), whole, per_device
  )
