"""LocalMixer: the paper's sizes, and the effect of every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.local.heads import Heads
from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.staged import BlockContext, evaluate, variables_of
from lfg_jax.local.targets import Targets
from lfg_jax.models import layers, mixer
from lfg_jax.models.sizes import NORMS, mixer_spec
from tests import oracle
from tests.small import compose, gradient, relative_error, small

MNIST, CIFAR10, IMAGENET = (28, 28, 1), (32, 32, 3), (224, 224, 3)


def parameters(spec):
  variables = jax.eval_shape(functools.partial(mixer.init, spec), jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize(
  'size, image_shape, count',
  [
    ('S/1/1', MNIST, 271_892),
    ('M/1/16', MNIST, 429_076),
    ('M/8/16', CIFAR10, 918_770),
    ('L/8/64', CIFAR10, 13_074_674),
  ],
)
def test_parameter_counts_of_the_paper(size, image_shape, count):
  assert parameters(mixer_spec(size, image_shape=image_shape, classes=10)) == count


def test_parameter_count_of_the_imagenet_size():
  """The paper says 17.3 M: without the read-out, and truncated (or without the 19,968 biases)."""
  spec = mixer_spec('L/32/64', image_shape=IMAGENET, classes=1000, heads=Heads(contrast=Contrast()))
  assert parameters(spec) - 2049 * 1000 == 17_360_384


def logits(s):
  run = jax.jit(functools.partial(evaluate, s.model))
  return run(s.variables, s.prepare(s.batch.image))[0]


def expected_logits(s, without=None):
  run = jax.jit(functools.partial(oracle.logits, groups=4, without=without))
  return run(s.variables['params'], s.prepare(s.batch.image))


def test_forward_values_are_the_equations():
  s = small(blocks=3)
  np.testing.assert_allclose(logits(s), expected_logits(s), rtol=1e-4, atol=1e-5)


def test_convolution_mixes_neighbours_channel_by_channel():
  s = small(side=4, blocks=2, mixing='conv', conv_size=3)
  assert s.variables['params']['blocks']['token']['kernel'].shape == (1, 3, 3, 1, 16)
  x = jnp.arange(2 * 16 * 3, dtype=jnp.float32).reshape(2, 16, 3)
  kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 3))
  grid = np.pad(np.asarray(x).reshape(2, 4, 4, 3), ((0, 0), (1, 1), (1, 1), (0, 0)))
  expected = sum(
    grid[:, i : i + 4, j : j + 4] * np.asarray(kernel)[i, j, 0] for i in range(3) for j in range(3)
  )
  np.testing.assert_allclose(
    layers.depthwise(x, kernel), expected.reshape(2, 16, 3), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(logits(s), expected_logits(s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['average', 'max'])
def test_pooling_halves_the_grid_and_widens(kind):
  s = small(side=4, blocks=3, pool_every=1, channel_ratio=2, group_ratio=4, pool=kind)
  sizes = [(run.spec.tokens, run.spec.channels, run.spec.groups) for run in s.spec.runs]
  assert sizes == [(16, 16, 4), (4, 32, 16), (1, 64, 64)]
  found, x = {}, s.prepare(s.batch.image)
  for stack in s.model.stacks[:2]:
    of_stack = variables_of(s.variables, stack.name)
    run = jax.jit(functools.partial(stack.block, context=BlockContext('')))
    x, *_ = run(of_stack, x, Targets(s.batch.label, s.batch.weight))
    found[stack.name] = x
  p = s.variables['params']['blocks']
  cells = np.asarray(found['stem']).reshape(4, 2, 2, 2, 2, 16)
  pooled = {'average': cells.mean((2, 4)), 'max': cells.max((2, 4))}[kind].reshape(4, 4, 16)
  h = (
    jnp.einsum('bpc,pq->bqc', oracle.layer_norm(pooled), p['token']['kernel']) + p['token']['bias']
  )
  h = (
    oracle.layer_norm(jax.nn.relu(oracle.layer_norm(h))) @ p['channel']['kernel']
    + p['channel']['bias']
  )
  h = oracle.layer_norm(jax.nn.relu(oracle.layer_norm(h)).reshape(4, 4, 16, 2))
  z = jnp.einsum('bpgc,gcd->bpgd', h, p['group']['kernel']) + p['group']['bias']
  # Wider than its input: no residual.
  np.testing.assert_allclose(
    found['blocks'], jax.nn.relu(oracle.layer_norm(z)).reshape(4, 4, 32), rtol=1e-3, atol=1e-4
  )


def test_hidden_width():
  s = small(hidden=24)
  kernels = {
    name: s.variables['params']['blocks'][name]['kernel'].shape[1:] for name in ('channel', 'group')
  }
  assert kernels == {'channel': (16, 24), 'group': (4, 6, 4)}
  assert jnp.isfinite(logits(s)).all()


@pytest.mark.parametrize('norm', NORMS)
def test_every_norm_can_be_left_out(norm):
  """This norm is left out, and no other."""
  s = small(blocks=2, norms=tuple(n for n in NORMS if n != norm))
  if norm != 'head':
    np.testing.assert_allclose(logits(s), expected_logits(s, without=norm), rtol=1e-4, atol=1e-5)
    return
  # It does not touch the network itself.
  objective = functools.partial(
    oracle.objective,
    tokens=s.prepare(s.batch.image),
    label=s.batch.label,
    weight=s.batch.weight,
    groups=4,
    local=True,
    cut=True,
    without=norm,
  )
  assert (
    relative_error(gradient(s, 'LG-BP'), jax.jit(jax.grad(objective))(s.variables['params'])) < 1e-4
  )


def test_derivative_of_layer_norm_along_several_tangents():
  """Activities have a realistic size.

  Here jaxlib 0.10.2 is 26 % off on CPUs (github.com/jax-ml/jax/issues/39103).
  """
  rng = np.random.default_rng(0)
  x, dx = rng.normal(size=(4096, 32)), rng.normal(size=(4, 4096, 32))
  found = jax.jit(jax.vmap(lambda d: jax.jvp(layers.layer_norm, (jnp.float32(x),), (d,))[1]))(
    jnp.float32(dx)
  )
  centred, scale = x - x.mean(-1, keepdims=True), 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  moved = dx - dx.mean(-1, keepdims=True)
  expected = scale * moved - scale**3 * centred * (centred * moved).mean(-1, keepdims=True)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_whole_norm_is_over_all_of_an_example():
  x = jax.random.normal(jax.random.key(0), (3, 4, 5)) + jnp.arange(4)[:, None]
  y = layers.layer_norm(x, (1, 2))
  np.testing.assert_allclose(y.mean((1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.var((1, 2)), 1, atol=1e-4)
  assert jnp.abs(y.mean(2)).max() > 0.5


@pytest.mark.parametrize('shape', [(6, 8), (6, 5, 8), (6, 5, 2, 4)])
def test_batch_norm_is_per_channel_over_real_examples(shape):
  x = jax.random.normal(jax.random.key(0), shape) + jnp.arange(shape[-1])
  weight = jnp.array([1.0, 1, 1, 1, 0, 0])
  y, stats = layers.batch_norm(x, weight, layers.init_statistics(8))
  real = np.asarray(x[:4]).reshape(-1, 8)
  np.testing.assert_allclose(
    np.asarray(y[:4]).reshape(-1, 8),
    (real - real.mean(0)) / np.sqrt(real.var(0) + 1e-5),
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_allclose(stats['mean'], 0.1 * real.mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * real.var(0), rtol=1e-4)
  still, same = layers.batch_norm(x, weight, stats, train=False)
  flat = np.asarray(x).reshape(-1, 8)
  np.testing.assert_allclose(
    np.asarray(still).reshape(-1, 8),
    (flat - stats['mean']) / np.sqrt(stats['var'] + 1e-5),
    rtol=1e-4,
    atol=1e-5,
  )
  jax.tree.map(np.testing.assert_array_equal, same, stats)


@pytest.mark.parametrize(
  'kind, fan_in, scale',
  [
    ('kaiming', 1600, 0.05),
    ('kaiming', 16, 0.1),
    ('lecun', 1600, 0.025),
    ('lecun', 16, 0.1),
    ('constant', 1600, 0.1),
  ],
)
def test_initial_weights(kind, fan_in, scale):
  w = layers.init(jax.random.key(0), (200, 200), (200,), fan_in, kind)['kernel']
  # 5 standard errors of a standard deviation over 40,000 normal numbers.
  np.testing.assert_allclose(w.std(), scale, rtol=5 / np.sqrt(2 * 40_000))


@pytest.mark.full
def test_read_out_heads_and_biases_start_at_zero():
  spec = mixer_spec('S/2/4', image_shape=(4, 4, 1), classes=3, channels=16)
  params = mixer.init(spec, jax.random.key(0))['params']
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    assert bool((leaf == 0).all()) == ('bias' in name or 'head' in name or 'readout' in name), name


@pytest.mark.full
def test_signal_straight_through_the_norm():
  """Without the norm's derivative, estimates change but exact gradients do not."""
  with_it, without = small(), small(norm_derivative=False)
  assert relative_error(gradient(without, 'LG-BP'), gradient(with_it, 'LG-BP')) < 1e-6
  assert relative_error(gradient(without, 'LG-FG-A+'), gradient(with_it, 'LG-FG-A+')) > 0.01


@pytest.mark.full
def test_every_block_of_a_stage_updates_its_statistics():
  """With batch norm and stages of two blocks, so does the block that is not under the losses."""
  s = small(norm='batch', blocks=4)
  _, aux = jax.jit(compose(s, 'LG-BP', every=2).gradient)(s.variables, jax.random.key(0), s.batch)
  moved = jax.tree.map(
    lambda new, old: jnp.abs(new - old).max(-1) > 1e-3,
    aux['batch_stats'],
    s.variables['batch_stats'],
  )
  assert {'stem', 'blocks'} <= {*moved}
  for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
    assert leaf.all(), jax.tree_util.keystr(path)
