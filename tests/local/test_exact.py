"""Exact gradients against straightforward code."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lfg_jax.local.replicated import Cut, replicated_loss
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.targets import Targets
from lfg_jax.training.rules import rules
from tests import oracle
from tests.small import compose, gradient, keep_kernels, relative_error, small

TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-12}


def features(P, G, dtype):
  keys = jax.random.split(jax.random.key(P * 100 + G), 6)
  shapes = [(3, P, G, 4), (G, 4, 5), (5,)]
  point = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
  direction = [jax.random.normal(k, s, dtype) for k, s in zip(keys[3:], shapes, strict=True)]
  return point, direction, jnp.array([0, 4, 2])


def fused(features, kernel, bias, label, cut=Cut()):
  head, targets = {'kernel': kernel, 'bias': bias}, Targets(label, jnp.ones(len(label)))
  return replicated_loss(cross_entropy, features, head, targets, cut)


CUTS = [Cut(True, True), Cut(True, False), Cut(False, True), Cut(False, False)]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@pytest.mark.parametrize('P', [1, 4, 16])
@pytest.mark.parametrize('G', [1, 4, 16])
def test_fused_loss_equals_naive(P, G, dtype):
  with jax.enable_x64(dtype == jnp.float64):
    point, direction, label = features(P, G, dtype)
    cotangents = [
      jax.random.normal(jax.random.key(9), (3, P if cut.patch else 1, G if cut.group else 1), dtype)
      for cut in CUTS
    ]

    def derivatives(loss, ct):
      return *jax.jvp(loss, point, direction), jax.vjp(loss, *point)[1](ct)

    def of_cut(cut, ct):
      naive = lambda *x: oracle.naive_replicated_loss(*x, label, *cut)
      return derivatives(lambda *x: fused(*x, label, cut), ct), derivatives(naive, ct)

    @jax.jit
    def both():
      return [of_cut(cut, ct) for cut, ct in zip(CUTS, cotangents, strict=True)]

    for ct, (got, expected) in zip(cotangents, both(), strict=True):
      assert got[0].shape == ct.shape
      assert (
        max(relative_error(a, b) for a, b in zip(got, expected, strict=True)) < TOLERANCE[dtype]
      )


CASES = [('LG-BP', side, groups) for side in (1, 2, 4) for groups in (1, 4, 16)] + [
  ('L-BP', 2, 4),
  ('BP', 2, 4),
]


# Without --full, every rule has one test.
CASES = [(*case, jnp.float64) for case in CASES] + [
  (*case, jnp.float32) for case in (('LG-BP', 1, 16), ('LG-BP', 4, 4), ('L-BP', 2, 4), ('BP', 2, 4))
]
CASES = [
  case if case[1:] == (2, 4, jnp.float64) else pytest.param(*case, marks=pytest.mark.full)
  for case in CASES
]


@pytest.mark.parametrize(('name', 'side', 'groups', 'dtype'), CASES)
def test_backprop_rules_equal_jax_grad_of_the_naive_network(name, side, groups, dtype):
  with jax.enable_x64(dtype == jnp.float64):
    s = small(side=side, groups=groups, channels=16 * groups, dtype=dtype)
    s = s._replace(variables=jax.tree.map(lambda leaf: leaf.astype(dtype), s.variables))

    def naive(params):
      return oracle.objective(
        params,
        s.prepare(s.batch.image),
        s.batch.label,
        s.batch.weight,
        groups,
        local=name != 'BP',
        cut=name == 'LG-BP',
      )

    expected = jax.jit(jax.grad(naive))(s.variables['params'])
    # Leaf by leaf in float64; in float32 rounding in small leaves is held against the whole gradient.
    floor = 1.0 if dtype == jnp.float32 else 0.01
    assert relative_error(gradient(s, name), expected, floor) < TOLERANCE[dtype]


def objective_of_stages(params, s, groups, plan):
  """LG-BP's objective with several blocks per stage, whose losses are at the stage's end."""
  blocks = oracle.unstack(params)
  inputs = [s.prepare(s.batch.image)]
  for n, p in enumerate(blocks):
    inputs.append(oracle.block(p, inputs[-1], groups, mix=n > 0))
  value = 0.0
  for stage in plan:
    x = jax.lax.stop_gradient(inputs[stage[0]])
    for n in stage:
      x = oracle.block(blocks[n], x, groups, mix=n > 0)
    f = oracle.layer_norm(x.reshape(*x.shape[:2], groups, -1))
    head = blocks[stage[-1]]['head']
    loss_B = oracle.naive_replicated_loss(
      f, head['kernel'], head['bias'], s.batch.label, False, False
    )[:, 0, 0]
    value += (loss_B * s.batch.weight).sum()
  return value


@pytest.mark.full
@pytest.mark.parametrize(
  ('options', 'plan'),
  [
    ({'every': 2}, [(0, 1), (2, 3), (4,)]),
    ({'every': 3}, [(0, 1, 2), (3, 4)]),
    ({'overlap': True}, [(0,), (0, 1), (1, 2), (2, 3), (3, 4)]),
  ],
)
def test_stages_of_several_blocks(options, plan):
  with jax.enable_x64(True):
    s = small(blocks=5, dtype=jnp.float64)
    grads = gradient(s, 'LG-BP', **options)
    expected = jax.jit(jax.grad(lambda params: objective_of_stages(params, s, 4, plan)))(
      s.variables['params']
    )
    grads.pop('readout'), expected.pop('readout')
    assert relative_error(grads, expected) < TOLERANCE[jnp.float64]


@pytest.mark.parametrize('name', ['FA', 'L-FA', 'LG-FA'])
def test_feedback_alignment_with_transposed_forward_matrices_is_backprop(name):
  s = small()
  algorithm = compose(s, name)
  random = jax.jit(algorithm.init)(jax.random.key(3))['feedback']
  own = keep_kernels(s.variables['params'])
  assert jax.tree.structure(own) == jax.tree.structure(random)
  run = jax.jit(algorithm.gradient)
  with_feedback = lambda feedback: run(
    {**s.variables, 'feedback': feedback}, jax.random.key(0), s.batch
  )
  expected = gradient(s, name.replace('FA', 'BP'))
  assert relative_error(with_feedback(own)[0], expected) < 1e-5
  assert relative_error(with_feedback(random)[0], expected) > 0.1


def with_any_feedback(name):
  """Gradient and aux of a rule; its feedback matrices, if any, are all ones."""
  s = small()
  algorithm = compose(s, name)
  shapes = jax.eval_shape(algorithm.init, jax.random.key(3))
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes.get('feedback', {}))
  variables = {**s.variables, **({'feedback': ones} if ones else {})}
  return jax.jit(algorithm.gradient)(variables, jax.random.key(0), s.batch)


@functools.cache
def naive_loss_and_gradient():
  """The loss at the end of the network and its gradient, from the equations."""
  s = small()
  loss = functools.partial(
    oracle.objective,
    tokens=s.prepare(s.batch.image),
    label=s.batch.label,
    weight=s.batch.weight,
    groups=4,
    local=False,
    cut=False,
  )
  return jax.jit(jax.value_and_grad(loss))(s.variables['params'])


@pytest.mark.parametrize('name', sorted(rules.REGISTRY))
def test_values_and_read_out_are_those_of_backprop(name):
  (grads, aux), (loss, exact) = with_any_feedback(name), naive_loss_and_gradient()
  assert jnp.allclose(aux['loss'], loss, rtol=1e-5)
  assert relative_error(grads['readout'], exact['readout']) < 1e-5


def test_direct_feedback_sends_the_output_error_to_every_layer():
  s = small(blocks=2)
  algorithm = compose(s, 'DFA')
  matrices = jax.jit(algorithm.init)(jax.random.key(3))['feedback']
  grads, _ = jax.jit(algorithm.gradient)(
    {**s.variables, 'feedback': matrices}, jax.random.key(0), s.batch
  )

  # By hand, for the stem's first linear layer: error × matrix, masked by the ReLU, through norm and linear map.
  @jax.jit
  def expected(p, matrix):
    x = s.prepare(s.batch.image)
    error = jax.nn.softmax(oracle.logits(p, x, 4)) - jax.nn.one_hot(s.batch.label, 5)
    layer = lambda w: oracle.layer_norm(oracle.layer_norm(x) @ w['kernel'] + w['bias'])
    z, pull = jax.vjp(layer, p['stem']['channel'])
    signal = jnp.einsum('bk,kpgc->bpgc', error * s.batch.weight[:, None], matrix).reshape(z.shape)
    return pull(signal * (z > 0))[0]

  wanted = expected(s.variables['params'], matrices['stem']['after_channel'])
  assert relative_error(grads['stem']['channel'], wanted) < 1e-5
