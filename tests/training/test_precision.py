"""bfloat16 inside blocks, float32 around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.estimators.activity import draw_at_tap
from lfg_jax.jaxpr.tapped import Tapped
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.local import staged
from lfg_jax.local.replicated import Cut
from lfg_jax.local.targets import Targets
from lfg_jax.models import layers
from lfg_jax.models.layers import batch_norm, init_statistics, layer_norm
from lfg_jax.tangents.distributions import DISTRIBUTIONS, Chunk
from lfg_jax.tangents.sampling import Sampling
from tests.small import compose, gradient, small

KEY = jax.random.key(3)


@pytest.fixture(scope='module')
def models():
  make = lambda precision: small(side=4, channels=64, batch=16, precision=precision)
  return make('float32'), make('bfloat16')


def cosine(a, b):
  a, b = (
    np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
    for tree in (a, b)
  )
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


# Backprop adds up the rounding, and ReLUs that flip, of all blocks behind. Forward gradients, at the same tangents,
# have the error of a derivative that is a sum with cancellation.
@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'least'), [('LG-BP', 0.999), ('BP', 0.98), ('LG-FG-A+', 0.99), ('FG-W', 0.99)]
)
def test_gradients_agree_and_are_float32(models, name, least):
  exact, rounded = (gradient(model, name, KEY) for model in models)
  assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype('float32')}
  assert least < cosine(exact, rounded) < 1 - 1e-9  # and the arithmetic was another


@pytest.mark.parametrize('norm', ['layer', 'batch'])
def test_blocks_compute_in_bfloat16_and_losses_in_float32(norm):
  model = small(precision='bfloat16', norm=norm)
  tokens = model.prepare(model.batch.image)
  targets = Targets(model.batch.label, model.batch.weight)

  def run(v):
    x, local, updates = staged.apply(model.model, v, tokens, targets, Cut())
    logits, _, new = model.model.read_out(staged.variables_of(v, 'readout'), x, targets.weight_B)
    return logits, local, (updates.get('batch_stats', {}), new)

  tapped = Tapped(run, {k: v for k, v in model.variables.items() if k != 'feedback'})
  logits, local, updates = tapped.shape
  assert logits.dtype == jnp.float32
  assert {tap.dtype for tap in tapped.taps.values()} == {jnp.dtype('bfloat16')} and len(
    tapped.taps
  ) == 5
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((local, updates)))


def test_norms_are_as_exact_as_their_result():
  x = (100 + jax.random.normal(KEY, (8, 4096))).astype(jnp.bfloat16)
  exact = layer_norm(x.astype(jnp.float32))
  assert jnp.abs(layer_norm(x).astype(jnp.float32) - exact).max() < 2**-8 * jnp.abs(exact).max()


def test_tangents_keep_their_tails():
  """Normals drawn in bfloat16 end at 2.5; their mean, -0.011, is over 11 standard errors off."""
  tap = Tap((16384, 64), jnp.bfloat16, 2, 1)
  u = draw_at_tap(Sampling(DISTRIBUTIONS['normal']), KEY, tap, Chunk(1)).astype(jnp.float32)
  assert abs(float(u.mean())) < 5 / u.size**0.5
  assert abs(float((u**2).mean()) - 1) < 5 * (2 / u.size) ** 0.5
  assert u.max() > 4


@pytest.mark.parametrize(('examples', 'padding'), [(359, 0), (257, 3), (1001, 23)])
@pytest.mark.parametrize('shape', [(3,), (5, 3), (2, 4, 3)])
def test_batch_norm_counts_exactly(examples, padding, shape):
  """In bfloat16 these numbers of examples, or of tokens, would be rounded by up to 0.3 %."""
  x = 3 + jax.random.normal(KEY, (examples + padding, *shape))
  weight_B = jnp.arange(examples + padding) < examples
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    low = x.astype(dtype)
    new = batch_norm(low, weight_B, init_statistics(np.prod(shape[1:] or shape, dtype=int)))[1]
    real = np.asarray(low[:examples].astype(jnp.float32), np.float64)
    real = real.reshape(examples, -1, np.prod(shape[1:] or shape, dtype=int))
    for name, before, expected in (('mean', 0, real.mean((0, 1))), ('var', 1, real.var((0, 1)))):
      stat = (np.asarray(new[name], np.float64) - 0.9 * before) / 0.1
      np.testing.assert_allclose(stat, expected, rtol=3e-5)


EPS = 2.0**-8  # between 1 and the next number of bfloat16; rounding errs by half of it
# Between two norms, which start anew, a block rounds six times: norm, product, bias, ReLU, product, sum.
ROUNDINGS = 6


@pytest.mark.full
@pytest.mark.parametrize('norm', ['layer', 'batch', 'whole'])
def test_statistics_of_a_mixer_agree_with_those_in_float32(norm):
  """Losses, errors, running statistics and gradients; 23 examples of 16 tokens, 3 blocks."""
  found = []
  for precision in ('float32', 'bfloat16'):
    model = small(side=4, channels=64, batch=23, precision=precision, norm=norm)
    algorithm = compose(model, 'LG-BP')
    found.append(jax.jit(algorithm.gradient)(model.variables, KEY, model.batch)[:2])
  (exact, there), (rounded, here) = found
  assert jax.tree.structure(there) == jax.tree.structure(here)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((rounded, here)))
  np.testing.assert_allclose(here['loss'], there['loss'], rtol=EPS)
  assert here['loss'] != there['loss']  # the arithmetic was another
  np.testing.assert_allclose(here['error'], there['error'], atol=1 / 23 + 1e-6)  # one may flip
  assert bool(there['batch_stats']) == (norm == 'batch')
  for name, (low, high) in _pairs(here['batch_stats'], there['batch_stats']).items():
    scale = np.abs(high).max()  # a channel's mean may vanish; its activations do not
    assert np.abs(low - high).max() <= ROUNDINGS * EPS * scale, name
  for name, (low, high) in _pairs(rounded, exact).items():
    if 'kernel' in name:  # a bias before a norm has no gradient but rounding
      assert 1 - cosine(low, high) < ROUNDINGS * EPS, name
      assert abs(np.linalg.norm(low) / np.linalg.norm(high) - 1) < ROUNDINGS * EPS, name


def _pairs(*trees):
  """{path: leaves in float64}; running statistics without the past of 0.9, which hides errors."""
  flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
  recent = lambda path, x: (x - 0.9) / 0.1 if str(path[-1].key) in ('mean', 'var') else x
  return {
    jax.tree_util.keystr(path): tuple(
      recent(path, np.asarray(leaf, np.float64)) for leaf in (one, other)
    )
    for (path, one), (_, other) in zip(*flat, strict=True)
  }


def test_the_mean_feature_of_a_long_sequence():
  """That of a user's own model: as exact as its dtype."""
  x = (100 + jax.random.normal(KEY, (4, 4096, 32))).astype(jnp.bfloat16)
  exact = layers._mean_feature(x.astype(jnp.float32))
  found = layers._mean_feature(x)
  assert found.dtype == jnp.bfloat16
  assert jnp.abs(found.astype(jnp.float32) - exact).max() < EPS * jnp.abs(exact).max()
