"""What the equations tell about the credit: read right, or refused by name."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lfg_jax import diagnose, tap, value_and_activity_grad
from lfg_jax.estimators.activity_gradient import credited
from lfg_jax.jaxpr import dependence, dependence_rules
from lfg_jax.jaxpr.interpreter import inner_jaxprs, opened
from lfg_jax.jaxpr.tapped import Tapped
from lfg_jax.tangents import distributions, variance
from tests import runs
from tests.small import relative_error
from tests.statistics import is_unbiased

B, T, C = 4, 2, 4
X = jax.random.normal(jax.random.key(1), (B, T, C))
V = jax.random.normal(jax.random.key(2), (C, C)) / 2


def losses(operation, w, x=X, local_axes='auto'):
  return (operation(tap(x @ w, 'h', local_axes=local_axes)) ** 2).sum(-1)


def read(fun, *args, change=lambda jaxpr: jaxpr):
  """The taps of a function, credited; `change` is applied to its jaxpr."""
  tapped = Tapped(lambda *args: (fun(*args), {}), *args)
  tapped.jaxpr = change(tapped.jaxpr)
  credited(tapped, list(tapped.taps), None)
  return tapped.taps


def operations():
  hunt = runs.script('bench/bias_hunt')
  return hunt['OPERATIONS'], hunt['MIXING'], hunt['bias_primitives'].OPERATIONS


def expected(name):
  """How many leading axes an operation keeps apart."""
  kind, axis = name.rsplit(' along ', 1) if ' along ' in name else (name, '2')
  mapped = kind.startswith('mapped') or kind in ('conjugate gradients', 'tridiagonal_solve')
  if kind in ('transpose', 'merged', 'halves', 'scan without carry', 'mapped cond'):
    return 2
  if kind == 'merged and rolled' or (mapped and axis != '0'):
    return 0
  return 1 if mapped or (kind, axis) == ('convolution', '2') else int(axis)


def test_every_operation_of_the_hunt_is_read_as_it_is():
  every, mixing_ones, primitives = operations()
  for name, operation in primitives.items():
    found = read(functools.partial(losses, operation), V)['h'].local_axes
    assert found == expected(name), name
  for name, operation in every.items():
    if name not in primitives:
      found = read(functools.partial(losses, operation), V)['h'].local_axes
      assert (found == 0) == (name in mixing_ones), name


# Older or newer names, those that appear in reverse mode or with a mesh only, and functions of
# entries without a derivative or with one that the hunt cannot check in float64.
# fmt: off
NOT_HUNTED = {
    'ceil', 'checkpoint', 'closed_call', 'copy_p', 'core_call', 'custom_vjp_call', 'pjit', 'remat',
    'householder_product', 'igamma_grad_a', 'igammac', 'is_finite', 'layout_constraint', 'log2',
    'mulhi', 'nextafter', 'not', 'one_minus_square', 'pcast', 'pvary', 'ragged_dot_general',
    'random_gamma_grad', 'reduce_window', 'reduce_window_min', 'regularized_incomplete_beta',
    'reshard', 'round', 'sharding_constraint', 'xor', 'zeta'}
# fmt: on
if jax.__version_info__ < (0, 10, 1):
  NOT_HUNTED |= {'stack', 'unstack'}


def test_the_hunt_tries_every_primitive_that_has_a_rule():
  seen = set()

  def look(jaxpr):
    for eqn in opened(jaxpr).eqns:
      seen.add(eqn.primitive.name)
      for inner in inner_jaxprs(eqn):
        look(inner)

  for operation in operations()[0].values():
    look(jax.make_jaxpr(operation)(X))
    look(jax.make_jaxpr(lambda x, f=operation: jax.jvp(f, (x,), (x,)))(X))
  assert set(dependence_rules._RULES) - seen <= NOT_HUNTED


def with_parameter(primitive, **added):
  """Adds a parameter to all equations of a primitive, at any depth of calls."""

  def one(eqn):
    params = {
      name: value.replace(jaxpr=change(value.jaxpr)) if hasattr(value, 'eqns') else value
      for name, value in eqn.params.items()
    }
    return eqn.replace(params=params | (added if eqn.primitive.name == primitive else {}))

  def change(jaxpr):
    return jaxpr.replace(eqns=[one(eqn) for eqn in jaxpr.eqns])

  return lambda closed: closed.replace(jaxpr=change(closed.jaxpr))


@pytest.mark.parametrize(
  ('primitive', 'operation'),
  [
    ('tanh', jnp.tanh),
    ('dot_general', lambda h: h @ V),
    ('sort', lambda h: jnp.sort(h, -1)),
    ('gather', lambda h: h[:, jnp.array([1, 0])]),
    ('scan', lambda h: lax.scan(lambda c, e: (c, jnp.tanh(e)), 0, h)[1]),
    ('custom_jvp_call', jax.nn.relu),
    ('device_put', jax.device_put),
    ('reshape', lambda h: h.reshape(B, -1).reshape(h.shape)),
  ],
)
def test_an_unknown_parameter_is_refused_by_name(primitive, operation):
  fun = functools.partial(losses, operation, local_axes=1)
  assert read(fun, V)['h'].local_axes == 1
  with pytest.raises(
    ValueError, match=rf"read from {primitive}: parameter 'direction'; allowed: mixes_examples=True"
  ):
    read(fun, V, change=with_parameter(primitive, direction='backward'))


def test_an_unknown_field_of_dimension_numbers_is_refused_by_name():
  class Numbers(lax.GatherDimensionNumbers):
    _fields = (*lax.GatherDimensionNumbers._fields, 'wraps')

  old = jax.make_jaxpr(lambda h: h[:, jnp.array([1, 0])])(X)
  (eqn,) = [eqn for eqn in old.eqns if eqn.primitive.name == 'gather']
  assert dependence_rules.unread(eqn) is None
  numbers = Numbers(*eqn.params['dimension_numbers'])
  new = eqn.replace(params=eqn.params | {'dimension_numbers': numbers})
  assert dependence_rules.unread(new) == "gather: parameter 'wraps'"


def test_a_reshape_that_transposes_is_refused():
  fun = functools.partial(losses, lambda h: h.reshape(B, -1).reshape(h.shape), local_axes=1)
  with pytest.raises(ValueError, match='cannot be read from reshape; allowed'):
    read(fun, V, change=with_parameter('reshape', dimensions=(2, 1, 0)))


def step_norm(h, w):
  """Batch norm before the layer, in every step of a scan."""
  h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)
  return jnp.tanh(tap(h @ w, 'layer')), None


def step_roll(h, w):
  return jnp.tanh(tap((h + jnp.roll(h, 1, 0)) @ w, 'layer')), None


def step_largest(h, w):
  return jnp.tanh(tap((h - h.max(0)) @ w, 'layer')), None


@pytest.mark.parametrize('step', [step_norm, step_roll, step_largest])
def test_a_tap_in_a_scan_behind_what_mixes(step):
  weights = jax.random.normal(jax.random.key(3), (3, C, C)) / 2
  fun = lambda w: ((lax.scan(step, X[:, 0], w)[0] @ V - 1) ** 2).sum(-1)
  assert read(fun, weights)['layer'].local_axes == 0
  assert read(lambda w: fun(w[:1]), weights)['layer'].local_axes == 0  # as if there were several


@pytest.mark.full
@pytest.mark.parametrize('step', [step_norm, step_roll])
def test_a_tap_in_a_scan_behind_what_mixes_is_unbiased(step):
  weights = jax.random.normal(jax.random.key(3), (3, C, C)) / 2
  fun = lambda w: ((lax.scan(step, X[:, 0], w)[0] @ V - 1) ** 2).sum(-1)
  is_unbiased(*scaled(fun, weights))


def scaled(fun, w, draws=20_000):
  step = value_and_activity_grad(fun)
  exact = jax.jit(jax.grad(lambda w: fun(w).sum() / B))(w)
  of_key = lambda key: step(w, key=key)[1]
  return variance.measure(of_key, exact, jax.random.key(4), draws, at_once=500), exact


@pytest.mark.parametrize(
  'largest',
  [
    lambda h: lax.top_k(h, 1, axis=0)[0],
    lambda h: lax.approx_max_k(h, 1, reduction_dimension=0)[0],
    lambda h: lax.sort(h, dimension=0)[-1:],
  ],
)
def test_the_largest_of_the_batch(largest):
  fun = lambda w: ((tap(X[:, 0] @ w, 'h') - largest(tap(X[:, 0] @ w, 'g'))) ** 2).sum(-1)
  taps = read(fun, V)
  assert (taps['h'].local_axes, taps['g'].local_axes) == (1, 0)
  is_unbiased(*scaled(fun, V))


def positive(h):
  return jnp.tanh(h @ h.T) / 4 + 2 * jnp.eye(len(h))


@pytest.mark.parametrize(
  'one',
  [
    lambda h: jnp.linalg.inv(positive(h)) @ h,
    lambda h: h * jnp.linalg.slogdet(positive(h))[1],
    lambda h: jax.scipy.linalg.expm(positive(h) / 4) @ h,
    lambda h: jax.scipy.sparse.linalg.cg(lambda v: 2 * v + v @ (V + V.T) / 4, h)[0],
    lambda h: jnp.linalg.solve(positive(h), h),
    lambda h: jax.device_put(h) * 2,
  ],
  ids=['inv', 'slogdet', 'expm', 'cg', 'solve', 'device_put'],
)
def test_solvers_of_an_example_are_read_and_exact(one):
  fun = lambda w: (jax.vmap(one)(tap(X @ w, 'h')) ** 2).sum((1, 2))
  assert read(fun, V)['h'].local_axes == 1
  run = value_and_activity_grad(fun, distribution=distributions.haar, num_tangents=T * C)
  exact = jax.grad(lambda w: fun(w).sum() / B)(V)
  assert relative_error(jax.jit(run)(V, key=jax.random.key(0))[1], exact) < 1e-4


# A vmap over heads or an ensemble in front of the examples.
def heads(w, count, local_axes=1, x=X):
  one = lambda scale: jnp.tanh(tap(x @ (scale * w), 'h', local_axes=local_axes))
  return (jax.vmap(one)(jnp.linspace(1, 2, count)).sum(0) ** 2).sum(-1)


@pytest.mark.parametrize('count', [2, B, 5])
@pytest.mark.parametrize('local_axes', [1, 2, 'auto'])
def test_a_vmap_in_front_of_the_examples(count, local_axes):
  fun = functools.partial(heads, count=count, local_axes=local_axes)
  found = read(fun, V)['h']
  own = 1 if local_axes == 1 else 2
  assert (found.front, found.local_axes) == (1, own)
  assert found.shape == ((B, count, T, C) if own == 1 else (B, T, count, C))
  dimensions = count * C * (T if own == 1 else 1)
  run = value_and_activity_grad(fun, distribution=distributions.haar, num_tangents=dimensions)
  exact = jax.grad(lambda w: fun(w).sum() / B)(V)
  assert relative_error(jax.jit(run)(V, key=jax.random.key(0))[1], exact) < 1e-4


def test_a_guess_and_a_diagnosis_see_the_examples_first():
  fun = functools.partial(heads, count=3)
  shapes = {}

  def control_variate(activities, w):
    shapes.update(jax.tree.map(jnp.shape, dict(activities)))
    return {'h': jnp.zeros_like(activities['h'])}

  plain, control_variates = (
    value_and_activity_grad(fun, joint=False, **options)(V, key=jax.random.key(0))[1]
    for options in ({}, {'control_variate': control_variate})
  )
  assert shapes == {'h': (B, 3, T, C)}
  assert relative_error(control_variates, plain) < 1e-6
  (found,) = diagnose(fun, num_tangents=(4,), draws=200)(V, key=jax.random.key(1)).taps
  assert found.verdict == 'ok' and found.declared.shape == (B, 3, T, C) and found.declared.reaches


def test_an_ensemble_in_a_scan_and_of_modules():
  def scanned(w):
    step = lambda h, _: (
      jax.vmap(lambda h, s: jnp.tanh(tap(h @ w * s, 'h')))(h, jnp.arange(2.0)),
      0,
    )
    return (lax.scan(step, jnp.stack([X, X]), None, length=3)[0].sum(0) ** 2).sum((1, 2))

  assert read(scanned, V)['h'].shape == (3, B, 2, T, C)
  is_unbiased(*scaled(scanned, V))

  class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
      return tap(nn.Dense(3)(x), 'h')

  several = nn.vmap(
    Head, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=None, axis_size=5
  )()
  params = several.init(jax.random.key(0), X[:, 0])
  fun = lambda params: (several.apply(params, X[:, 0]).mean(0) ** 2).sum(-1)
  assert read(fun, params)['h'].front == 1


def test_an_ensemble_whose_examples_mix():
  normed = lambda w: jax.vmap(lambda s: (lambda h: h - h.mean(0))(tap(X[:, 0] @ w * s, 'h')))
  fun = lambda w: (normed(w)(jnp.arange(1.0, 4.0)).sum(0) ** 2).sum(-1)
  assert read(fun, V)['h'] == read(fun, V)['h']._replace(local_axes=0, front=1, shape=(B, 3, C))
  is_unbiased(*scaled(fun, V))


def test_what_has_no_axis_of_examples_is_refused():
  with pytest.raises(
    ValueError, match=r'shape \(5, 2\) and local_axes=1; allowed: 4, the number of examples, on'
  ):
    read(lambda w: (X[:, 0] @ tap(w, 'w')[:4]).sum(-1), jnp.ones((5, 2)))
  with pytest.raises(ValueError, match=r'shape \(2, 4, 2, 4\) and local_axes=1; allowed: 4'):
    value_and_activity_grad(functools.partial(heads, count=2), mixes_examples=False)(
      V, key=jax.random.key(0)
    )


def test_the_analysis_is_linear_in_depth(monkeypatch):
  asked = []
  monkeypatch.setattr(
    dependence, 'moved', lambda *args: asked.append(0) or dependence_rules.moved(*args)
  )

  def deep(w, depth):
    h = X[:, 0]
    for n in range(depth):
      h = jax.nn.relu(tap(h @ w, f'h{n}'))
    return (h**2).sum(-1)

  def count(depth):
    asked.clear()
    read(functools.partial(deep, depth=depth), V)
    return len(asked)

  assert 0 < count(20) - count(10) == (count(40) - count(20)) / 2


@pytest.mark.parametrize(
  ('operation', 'local_axes'),
  [
    (lambda h: lax.reduce_window(h, 0.0, lambda a, b: a + b, (1, 2, 1), (1, 1, 1), 'SAME'), 1),
    (lambda h: lax.reduce_window(h, 0.0, lambda a, b: a + b, (2, 1, 1), (1, 1, 1), 'SAME'), 0),
    (lambda h: lax.ragged_dot(h[:, 0], jnp.stack([V, V]), jnp.array([1, 3]))[:, None] + h, 1),
    (lambda h: lax.ragged_dot(h[:, 0].T, jnp.stack([V, V]), jnp.array([1, 3]))[:, None] + h, 0),
  ],
)
def test_what_the_hunt_cannot_differentiate_is_read(operation, local_axes):
  assert read(functools.partial(losses, operation), V)['h'].local_axes == local_axes
