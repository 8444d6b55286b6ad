"""bfloat16 inside blocks, float32 around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.estimators.activity import draw_at_tap
from lfg_jax.estimators.sampling import Sampling
from lfg_jax.estimators.tangents import LAWS, Passes
from lfg_jax.estimators.taps import Tap
from lfg_jax.estimators.traced import Traced
from lfg_jax.losses import staged
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.targets import Targets
from lfg_jax.models.layers import layer_norm
from tests.small import gradient, small

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
@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'least'), [('LG-BP', 0.999), ('BP', 0.98), ('LG-FG-A', 0.99), ('FG-W', 0.99)]
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
    logits, _, new = model.model.read_out(staged.own(v, 'readout'), x, targets.weight_B)
    return logits, local, (updates.get('batch_stats', {}), new)

  traced = Traced(run, {k: v for k, v in model.variables.items() if k != 'feedback'})
  logits, local, updates = traced.shape
  assert logits.dtype == jnp.float32
  assert {tap.dtype for tap in traced.taps.values()} == {jnp.dtype('bfloat16')} and len(
    traced.taps
  ) == 5
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((local, updates)))


def test_norms_are_as_exact_as_their_result():
  x = (100 + jax.random.normal(KEY, (8, 4096))).astype(jnp.bfloat16)
  exact = layer_norm(x.astype(jnp.float32))
  assert jnp.abs(layer_norm(x).astype(jnp.float32) - exact).max() < 2**-8 * jnp.abs(exact).max()


def test_tangents_keep_their_tails():
  """Normals drawn in bfloat16 end at 2.5; their mean, -0.011, is over 11 standard errors off."""
  tap = Tap((16384, 64), jnp.bfloat16, 2, 1)
  u = draw_at_tap(Sampling(LAWS['normal']), KEY, tap, Passes(1)).astype(jnp.float32)
  assert abs(float(u.mean())) < 5 / u.size**0.5
  assert abs(float((u**2).mean()) - 1) < 5 * (2 / u.size) ** 0.5
  assert u.max() > 4
