"""One network written four times (bare, linen, NNX, Equinox): the estimates are equal and right."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from lfg_jax import mark, tap, value_and_activity_grad
from lfg_jax.tangents import distributions
from tests.small import relative_error
from tests.statistics import SIGMAS, z_of_mean

BATCH, STEPS = 3, 2
KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (BATCH, 4, 1))  # four positions, one channel
Y = jax.random.normal(KEYS[1], (BATCH, 2))
WEIGHTS = {
  'conv': {'kernel': jax.random.normal(KEYS[2], (3, 1, 4)), 'bias': jnp.full(4, 0.1)},
  'mix': {'kernel': jax.random.normal(KEYS[3], (4, 4)), 'bias': jnp.full(4, 0.2)},
  'out': {'kernel': jax.random.normal(KEYS[4], (4, 2)), 'bias': jnp.full(2, 0.3)},
}


def attend(h_TxD):
  """Self-attention: every position attends to all positions."""
  return jax.nn.softmax(h_TxD @ jnp.swapaxes(h_TxD, -1, -2)) @ h_TxD


def square(out):
  return ((out - Y) ** 2).sum(-1)


def bare(w):
  conv = jax.lax.conv_general_dilated(
    X, w['conv']['kernel'], (1,), 'SAME', dimension_numbers=('NHC', 'HIO', 'NHC')
  )
  h = jnp.tanh(tap(conv + w['conv']['bias'], 'conv'))
  layer = lambda name, h: tap(h @ w[name]['kernel'] + w[name]['bias'], name)
  h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(layer('mix', attend(h))), None), h, None, length=STEPS)
  return square(layer('out', h.mean(1)))


class Step(nn.Module):
  @nn.compact
  def __call__(self, h, _):
    return nn.tanh(nn.Dense(4, name='mix')(attend(h))), None


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.tanh(nn.Conv(4, (3,), name='conv')(x))
    scan = nn.scan(Step, variable_broadcast='params', split_rngs={'params': False}, length=STEPS)
    h, _ = scan(name='scan')(h, None)
    return nn.Dense(2, name='out')(h.mean(1))


def linen(w):
  params = {'conv': w['conv'], 'scan': {'mix': w['mix']}, 'out': w['out']}
  return square(mark(Linen(), (nn.Conv, nn.Dense)).apply({'params': params}, X))


class NNX(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3,), rngs=rngs)
    self.mix, self.out = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    h = jnp.tanh(self.conv(x))
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(self.mix(attend(h))), None), h, None, length=STEPS)
    return self.out(h.mean(1))


GRAPH, STATE = nnx.split(NNX(nnx.Rngs(0)))


def nnx_model(w):
  state = jax.tree.map(lambda leaf: leaf, STATE)
  nnx.replace_by_pure_dict(state, w)
  return mark(nnx.merge(GRAPH, state), [nnx.Conv, nnx.Linear])


class Equinox(eqx.Module):
  """The network for one example, with channels first."""

  conv: eqx.nn.Conv1d
  mix: eqx.nn.Linear
  out: eqx.nn.Linear

  def __call__(self, x):
    h = jnp.tanh(self.conv(x.T).T)
    step = lambda h, _: (jnp.tanh(jax.vmap(self.mix)(attend(h))), None)
    h, _ = jax.lax.scan(step, h, None, length=STEPS)
    return self.out(h.mean(0))


EMPTY = Equinox(
  eqx.nn.Conv1d(1, 4, 3, padding=1, key=KEYS[5]),
  eqx.nn.Linear(4, 4, key=KEYS[5]),
  eqx.nn.Linear(4, 2, key=KEYS[5]),
)


def equinox_model(w):
  leaves = lambda m: [
    getattr(layer, leaf) for layer in (m.conv, m.mix, m.out) for leaf in ('weight', 'bias')
  ]
  conv = [jnp.transpose(w['conv']['kernel'], (2, 1, 0)), w['conv']['bias'][:, None]]
  linear = [leaf for name in ('mix', 'out') for leaf in (w[name]['kernel'].T, w[name]['bias'])]
  return eqx.tree_at(leaves, EMPTY, [*conv, *linear])


def equinox(w):
  return square(jax.vmap(mark(equinox_model(w), (eqx.nn.Conv, eqx.nn.Linear)))(X))


NETWORKS = {
  'bare': bare,
  'linen': linen,
  'nnx': lambda w: square(nnx_model(w)(X)),
  'equinox': equinox,
}


def estimate(name, key=KEYS[6], **options):
  step = value_and_activity_grad(NETWORKS[name], **options)
  return jax.jit(lambda w, key: step(w, key=key))(WEIGHTS, key)


@pytest.mark.full
@pytest.mark.parametrize('name', sorted(set(NETWORKS) - {'bare', 'equinox'}))
@pytest.mark.parametrize(
  'options',
  [{}, {'joint': False, 'distribution': distributions.normal, 'num_tangents': 2}],
  ids=['joint', 'separate'],
)
def test_equal_keys_give_equal_estimates(name, options):
  value, grads = estimate(name, **options)
  value_0, grads_0 = estimate('bare', **options)
  assert jnp.allclose(value, value_0, rtol=1e-6)
  assert relative_error(grads, grads_0) < 1e-5


@pytest.mark.parametrize('name', NETWORKS)
def test_layers_that_no_scanned_tap_disturbs_are_exact(name):
  """Taps are separate, with as many orthogonal tangents as dimensions."""
  options = {'joint': False, 'distribution': distributions.haar, 'num_tangents': 16}
  exact = jax.jit(jax.grad(lambda w: NETWORKS[name](w).sum() / BATCH))(WEIGHTS)
  grads = estimate(name, **options)[1]
  for layer in ('conv', 'out'):
    assert relative_error(grads[layer], exact[layer]) < 1e-5
  assert relative_error(grads['mix'], exact['mix']) > 0.1


@pytest.mark.full
@pytest.mark.parametrize('name', NETWORKS)
def test_unbiased(name):
  exact = jax.jit(jax.grad(lambda w: NETWORKS[name](w).sum() / BATCH))(WEIGHTS)
  run = jax.vmap(lambda key: value_and_activity_grad(NETWORKS[name])(WEIGHTS, key=key)[1])
  draws = jax.jit(run)(jax.random.split(KEYS[7], 10_000))
  for layer in exact:
    samples, target = draws[layer]['kernel'], exact[layer]['kernel']
    assert z_of_mean(samples, target).max() < SIGMAS < z_of_mean(samples, 1.3 * target).max()


@pytest.mark.full
def test_names_are_the_paths_of_layers_and_parameters_keep_theirs():
  def names(fun, *args):
    found = []
    look = lambda activities, *_: found.extend(activities) or {}
    grads = value_and_activity_grad(fun, joint=False, control_variate=look)(*args, key=KEYS[6])[1]
    assert jax.tree.structure(grads) == jax.tree.structure(args[0])
    return found

  assert names(linen, WEIGHTS) == ['conv', 'scan/mix', 'out']
  graph, params = nnx.split(mark(NNX(nnx.Rngs(0)), nnx.Linear), nnx.Param)
  assert names(lambda params: square(nnx.merge(graph, params)(X)), params) == ['mix', 'out']
  paths = lambda state: [path for path, _ in nnx.to_flat_state(state)]
  assert paths(params) == paths(STATE)
  arrays, static = eqx.partition(EMPTY, eqx.is_array)
  of_arrays = lambda arrays: square(jax.vmap(mark(eqx.combine(arrays, static), eqx.nn.Linear))(X))
  assert names(of_arrays, arrays) == ['mix', 'out']


def test_the_model_that_was_given_is_not_changed():
  for model, kind in ((NNX(nnx.Rngs(0)), nnx.Linear), (EMPTY, eqx.nn.Linear)):
    marked = mark(model, kind)
    assert type(model.out) is kind and isinstance(marked.out, kind) and type(marked.out) is not kind
    weight = 'kernel' if kind is nnx.Linear else 'weight'
    np.testing.assert_array_equal(getattr(marked.out, weight)[...], getattr(model.out, weight)[...])


@pytest.mark.parametrize(
  ('model', 'message'),
  [(NNX(nnx.Rngs(0)), 'some of Conv, Linear, NNX'), (EMPTY, 'some of Conv1d, Equinox, Linear')],
)
def test_a_type_that_no_layer_has_is_refused(model, message):
  with pytest.raises(ValueError, match=f'no layer is marked; allowed, as `layers`: .*{message}'):
    mark(model, nn.Dense)


@pytest.mark.parametrize(
  ('layers', 'local_axes', 'message'),
  [
    ('Linear', 1, "layers is 'Linear'; allowed: a layer type such as nn.Dense, several types, or"),
    (['Linear'], 1, r"layers is \['Linear'\]; allowed: a layer type"),
    (None, 1, 'layers is None; allowed: a layer type'),
    (nnx.Linear, -1, 'local_axes is -1; allowed: 0 or more'),
    (nnx.Linear, {'out': '2'}, 'allowed: 0 or more, or a mapping from layer types or names'),
    (nnx.Linear, {'outer': 2}, "local_axes has 'outer', which is no marked layer; .* mix, out"),
    (
      nnx.Linear,
      {nnx.Conv: 2},
      'local_axes has .*Conv.*, which is no marked layer; allowed: types',
    ),
  ],
)
def test_a_choice_that_makes_no_sense_is_refused(layers, local_axes, message):
  with pytest.raises(ValueError, match=message):
    mark(NNX(nnx.Rngs(0)), layers, local_axes=local_axes)


def local_axes_of(jaxpr):
  """{name: local_axes} of all taps."""
  found = {}
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'tap':
      found[eqn.params['name']] = eqn.params['local_axes']
    for inner in jaxprs_in_params(eqn.params):
      found |= local_axes_of(inner)
  return found


LINEN_PARAMS = {'conv': WEIGHTS['conv'], 'scan': {'mix': WEIGHTS['mix']}, 'out': WEIGHTS['out']}
LIBRARIES = {
  'linen': (Linen(), nn.Conv, nn.Dense, lambda m: m.apply({'params': LINEN_PARAMS}, X)),
  'nnx': (NNX(nnx.Rngs(0)), nnx.Conv, nnx.Linear, lambda m: m(X)),
  'equinox': (EMPTY, eqx.nn.Conv, eqx.nn.Linear, lambda m: m(X[0])),
}


@pytest.mark.parametrize(
  ('by', 'expected'), [('number', (2, 2)), ('type', (2, 1)), ('name', (2, 0))]
)
@pytest.mark.parametrize('name', LIBRARIES)
def test_local_axes_by_type_or_name(name, by, expected):
  model, conv, linear, run = LIBRARIES[name]
  local_axes = {'number': 2, 'type': {conv: 2}, 'name': {'c*': 2, 'conv': 3, '*out': 0}}[by]
  marked = mark(model, (conv, linear), local_axes=local_axes)
  found = local_axes_of(jax.make_jaxpr(lambda: run(marked))().jaxpr)
  assert (found['conv'], found['out']) == expected


def test_marks_of_linen_are_checked_when_layers_are_called():
  marked = mark(Linen(), nn.Conv, local_axes={'conf': 2})
  with pytest.raises(ValueError, match=r"local_axes has 'conf', which is no marked layer; .* conv"):
    LIBRARIES['linen'][3](marked)


def test_the_first_rule_that_fits_counts():
  marked = mark(NNX(nnx.Rngs(0)), nnx.Linear, local_axes={'mix': 3, nnx.Linear: 2, '*': 1})
  found = local_axes_of(jax.make_jaxpr(lambda: marked(X))().jaxpr)
  assert found == {'mix': 3, 'out': 2}


@pytest.mark.parametrize('name', LIBRARIES)
def test_a_model_marked_in_every_step_is_compiled_once(name):
  traces = []
  model, conv, linear, run = LIBRARIES[name]

  def counted(model):
    traces.append(1)
    return run(model)

  jits = {'linen': functools.partial(jax.jit, static_argnums=0), 'nnx': nnx.jit}
  step = jits.get(name, eqx.filter_jit)(counted)
  for _ in range(3):
    step(mark(model, linear))
  assert len(traces) == 1
  for changed in (mark(model, conv), mark(model, linear, local_axes=2)):
    step(changed)
  assert len(traces) == 3
