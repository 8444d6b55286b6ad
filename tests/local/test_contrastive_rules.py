"""The algorithms with the contrastive loss, against the equations with a naive loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.estimators.activity import draw_at_tap
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.local import info_nce, staged
from lfg_jax.local.heads import Heads
from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.replicated import Cut
from lfg_jax.local.targets import Targets
from lfg_jax.tangents.distributions import Chunk
from lfg_jax.tangents.sampling import Sampling
from lfg_jax.training.rules import algorithms, rules
from tests import oracle
from tests.local.test_contrastive import naive
from tests.small import keep_kernels, relative_error, small


def noisy_views(key_B, image):
  """Two views for tests: pixels with noise."""
  noise = jax.vmap(lambda k: jax.random.normal(k, (2, *image.shape[1:])))(key_B)
  return (image[:, None] + 30 * noise).reshape(-1, *image.shape[1:])


@pytest.fixture
def float64():
  """Enables float64: normalised projections of few, similar examples are badly conditioned."""
  with jax.enable_x64(True):
    yield


def contrastive_small(contrast=Contrast(projections=6), **fields):
  fields.setdefault('dtype', jnp.result_type(float))
  return small(batch=4, heads=Heads(contrast=contrast), **fields)


def composed(s, name, **options):
  return algorithms.compose(
    rules.REGISTRY[name], rules.Options(**options), s.model, augment=noisy_views
  )


def randomised(s, name, **options):
  """The algorithm, and random variables; rules with equal shapes get equal parameters."""
  algorithm = composed(s, name, **options)
  # By shape alone: compiling the network's own initialisation takes seconds.
  shapes = jax.eval_shape(algorithm.init, jax.random.key(0))

  def random(tree):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), tree)

  return algorithm, {collection: random(tree) for collection, tree in shapes.items()}


def inputs(s, key):
  """The tokens and targets that the algorithm makes from the batch."""
  _, view_key = jax.random.split(key)
  image = noisy_views(
    jax.vmap(lambda i: jax.random.fold_in(view_key, i))(jnp.arange(4)), s.batch.image
  )
  return s.prepare(image), Targets(jnp.repeat(s.batch.label, 2), jnp.repeat(s.batch.weight / 2, 2))


def objective(params, s, key, name, contrast):
  """The objective of a backprop rule with the naive loss, and the values that the rule reports."""
  x, (label, weight) = inputs(s, key)
  cut, local, value = name == 'LG-BP', name != 'BP', 0.0
  loss = functools.partial(naive, contrast=contrast, cut=Cut(False, False))
  for n, p in enumerate(oracle.unstack(params)):
    x = oracle.block(p, jax.lax.stop_gradient(x) if cut else x, 4, mix=n > 0)
    features = oracle.layer_norm(x.reshape(*x.shape[:2], 4, -1))
    if local:
      losses = loss(features, p['head']['kernel'], p['head']['bias'], np.ones(8, bool))[:, 0, 0]
      value += (losses * weight).sum()
  if not local:
    head = params['head']['linear']
    kernel = head['kernel'].reshape(4, -1, head['kernel'].shape[-1])
    value += (loss(features, kernel, head['bias'], np.ones(8, bool))[:, 0, 0] * weight).sum()
  mean = oracle.layer_norm(jax.lax.stop_gradient(x).mean(1))
  logits = mean @ params['readout']['linear']['kernel'] + params['readout']['linear']['bias']
  read_out = -(
    jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], -1)[:, 0] * weight
  ).sum()
  reported = {
    'loss': read_out,
    'contrastive_loss': value / (1 + n if local else 1),
    'error': ((logits.argmax(-1) != label) * weight).sum(),
  }
  return value + read_out, reported


def naive_gradient(s, key, name, contrast):
  return jax.jit(jax.value_and_grad(lambda p: objective(p, s, key, name, contrast), has_aux=True))


@pytest.mark.full
@pytest.mark.parametrize('stop', [True, False])
@pytest.mark.parametrize('name', ['BP', 'L-BP', 'LG-BP'])
def test_backprop_rules_equal_jax_grad_of_the_naive_network(name, stop):
  """In float64: normalised projections of few, similar examples are badly conditioned."""
  with jax.enable_x64(True):
    contrast = Contrast(projections=6, stop_gradient=stop)
    s, key = contrastive_small(contrast, dtype=jnp.float64), jax.random.key(5)
    algorithm, variables = randomised(s, name)
    grads, aux = jax.jit(algorithm.gradient)(variables, key, s.batch)
    (value, reported), wanted = naive_gradient(s, key, name, contrast)(variables['params'])
    # Heads see the sum over replicas of a loss a P·G-th as large: the plain one's gradient.
    assert relative_error(grads, wanted) < 1e-10
    heads = 1 if name == 'BP' else 3
    np.testing.assert_allclose(aux['loss'] + heads * aux['contrastive_loss'], value, rtol=1e-10)
    np.testing.assert_allclose(aux['loss'], reported['loss'], rtol=1e-10)


ELEVEN = [
  'BP',
  'L-BP',
  'LG-BP',
  'FA',
  'L-FA',
  'LG-FA',
  'DFA',
  'FG-W',
  'FG-A',
  'LG-FG-W',
  'LG-FG-A+',
]


@functools.cache
def naive_parts(local):
  """The gradient and values that all rules with (or without) local losses share, in float64."""
  s, contrast = contrastive_small(), Contrast(projections=6)
  name = 'LG-BP' if local else 'BP'
  variables = randomised(s, name)[1]
  (_, reported), wanted = naive_gradient(s, jax.random.key(5), name, contrast)(variables['params'])
  return wanted, reported


@pytest.mark.full
@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('name', ELEVEN)
def test_exact_parts_of_all_algorithms(name):
  """Values and the gradients of heads and read-out do not depend on the estimator."""
  wanted, reported = naive_parts(rules.REGISTRY[name].local)
  s = contrastive_small()
  algorithm, variables = randomised(s, name)
  grads, aux = jax.jit(algorithm.gradient)(variables, jax.random.key(5), s.batch)
  assert jax.tree.all(jax.tree.map(lambda g: bool(jnp.isfinite(g).all()), grads))
  exact_part = lambda g: [g['readout'], g.get('head', {}), g['stem']['head'], g['blocks']['head']]
  assert relative_error(exact_part(grads), exact_part(wanted)) < 1e-10
  for metric in algorithm.metrics:
    np.testing.assert_allclose(aux[metric], reported[metric], rtol=1e-10)
  moving = [grads['stem']['channel']['kernel'], grads['blocks']['group']['kernel']]
  assert all(jnp.abs(g).max() > 1e-6 for g in moving)


@pytest.mark.full
@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('name', ['FA', 'L-FA', 'LG-FA'])
def test_feedback_alignment_with_transposed_forward_matrices_is_backprop(name):
  s, key = contrastive_small(), jax.random.key(5)
  algorithm, variables = randomised(s, name)
  exact, _ = randomised(s, name.replace('FA', 'BP'))
  own = jax.tree.map(
    lambda f, k: k,
    variables['feedback'],
    {k: v for k, v in keep_kernels(variables['params']).items()},
  )
  gradient = jax.jit(algorithm.gradient)
  wanted = jax.jit(exact.gradient)(variables, key, s.batch)[0]
  assert relative_error(gradient({**variables, 'feedback': own}, key, s.batch)[0], wanted) < 1e-5
  assert relative_error(gradient(variables, key, s.batch)[0], wanted) > 0.1


@pytest.mark.full
@pytest.mark.usefixtures('float64')
def test_direct_feedback_sends_the_error_of_the_projection():
  s = contrastive_small()
  algorithm, variables = randomised(s, 'DFA')
  assert variables['feedback']['stem']['after_channel'].shape[0] == 6
  x, criterion = inputs(s, jax.random.key(5))
  model = s.model.variant(project=True)

  @jax.jit
  def projected(params):
    y, _, _ = staged.apply(model, {'params': params}, x, criterion, None)
    return model.project({'params': params['head']}, y, criterion.weight_B)[0]

  z = projected(variables['params'])
  _, error = jax.jit(
    lambda z: info_nce.end_losses((z, z), criterion.weight_B, s.spec.style.heads.contrast)
  )(z)
  naive_loss = lambda moved: (
    info_nce.info_nce(moved, z, jnp.ones(8, bool), s.spec.style.heads.contrast) / 8
  ).sum()
  np.testing.assert_allclose(error, jax.jit(jax.grad(naive_loss))(z), rtol=1e-4, atol=1e-7)
  grads = jax.jit(algorithm.gradient)(variables, jax.random.key(5), s.batch)[0]
  stem = variables['params']['stem']['channel']
  layer = lambda w: oracle.layer_norm(oracle.layer_norm(x) @ w['kernel'] + w['bias'])

  @jax.jit
  def expected(matrix):
    out, pull = jax.vjp(layer, stem)
    signal = jnp.einsum('bk,kpgc->bpgc', error, matrix).reshape(out.shape)
    return pull(signal * (out > 0))[0]

  wanted = expected(variables['feedback']['stem']['after_channel'])
  assert relative_error(grads['stem']['channel'], wanted) < 1e-5


def test_views_share_perturbations_or_not():
  """Both views of an example have the same perturbation if `rows` is 2, else independent ones."""
  tap = Tap((8, 3, 40), jnp.float32, 3, 1)
  shared = draw_at_tap(Sampling(rows=2), jax.random.key(0), tap, Chunk(1))[0]
  own = draw_at_tap(Sampling(rows=1), jax.random.key(0), tap, Chunk(1))[0]
  assert (shared[0::2] == shared[1::2]).all()
  assert 0.4 < (shared[0::2][:-1] == shared[2::2]).mean() < 0.6
  assert 0.4 < (own[0::2] == own[1::2]).mean() < 0.6
