"""Finite differences in place of forward derivatives: an option of the functions' estimators."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lfg_jax import tap, value_and_activity_grad, value_and_forward_grad
from lfg_jax.tangents import distributions
from lfg_jax.tangents.derivatives import finite_difference
from tests.small import relative_error

KEYS = jax.random.split(jax.random.key(0), 4)
PLAIN = {'num_tangents': 2}
DOORS = [
  (value_and_forward_grad, PLAIN),
  (value_and_forward_grad, {'num_tangents': 4, 'chunk': 2}),
  (value_and_activity_grad, PLAIN),
  (value_and_activity_grad, {'num_tangents': 4, 'chunk': 2, 'joint': False}),
]


def losses_B(w, x):
  """Of each example; a factor behind a stop-gradient moves neither with weights nor with taps."""
  h = jnp.tanh(tap(x @ w['hidden'], 'hidden'))
  return (tap(h @ w['out'], 'out') ** 2 * jax.lax.stop_gradient(h)).sum(-1)


def estimate(door, dtype=None, **options):
  shapes = ((5, 3), (3, 4), (4, 4))
  x, hidden, out = (
    jax.random.normal(k, shape, dtype or jnp.result_type(float))
    for k, shape in zip(KEYS, shapes, strict=False)
  )
  fun = losses_B if door is value_and_activity_grad else lambda w, x: losses_B(w, x).mean()
  run = jax.jit(functools.partial(door(fun, **options), key=KEYS[3]))
  return run({'hidden': hidden, 'out': out}, x)


@pytest.mark.parametrize(('door', 'options'), DOORS)
@pytest.mark.parametrize(('two_sided', 'order'), [(False, 1), (True, 2)])
def test_differences_approach_the_exact_derivative(door, options, two_sided, order):
  """Along the same tangents, they differ from it by O(ε), two-sided by O(ε²)."""
  with jax.enable_x64(True):
    value, exact = estimate(door, **options)
    found = {
      step: estimate(door, derivative=finite_difference(step, two_sided=two_sided), **options)
      for step in (1e-2, 1e-3)
    }
    assert all(jnp.allclose(v, value, rtol=1e-12) for v, _ in found.values())
  far, near = (relative_error(gradient, exact) for _, gradient in found.values())
  assert far < 0.5
  assert 0.8 * 10**-order < near / far < 1.25 * 10**-order


@pytest.mark.parametrize('distribution', [distributions.rademacher, distributions.normal])
def test_two_sided_differences_are_spsa_and_antithetic_evolution_strategies(distribution):
  f, x, step = lambda x: jnp.sin(x).prod(), jnp.arange(1.0, 6), 0.1
  two_sided = finite_difference(step, two_sided=True)
  run = value_and_forward_grad(f, distribution=distribution, derivative=two_sided)
  _, found = run(x, key=KEYS[0])
  u = distribution.draw(KEYS[0], distributions.Chunk(1), (), 5, jnp.float32)[0]
  assert jnp.allclose(found, (f(x + step * u) - f(x - step * u)) / (2 * step) * u, rtol=1e-4)


def test_no_derivative_of_the_function_is_needed():
  """Not even where JAX has none, in functions with a backward rule only."""

  @jax.custom_vjp
  def square(x):
    return x**2

  square.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * x * ct,))
  f = lambda x: square(x).sum()
  with pytest.raises(TypeError):
    value_and_forward_grad(f)(jnp.ones(3), key=KEYS[0])
  distribution, derivative = distributions.hadamard, finite_difference(0.5, two_sided=True)
  run = value_and_forward_grad(f, distribution=distribution, num_tangents=4, derivative=derivative)
  assert jnp.allclose(run(jnp.arange(4.0), key=KEYS[0])[1], 2 * jnp.arange(4.0), atol=1e-5)


@pytest.mark.parametrize('step', [0, -1e-3, float('nan'), float('inf')])
def test_steps_that_are_none(step):
  with pytest.raises(ValueError, match=f'step of finite differences is {step}; allowed: more than'):
    finite_difference(step)


@pytest.mark.parametrize('door', [value_and_forward_grad, value_and_activity_grad])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_types_whose_rounding_hides_differences(door, dtype):
  with pytest.raises(ValueError, match=r'finite differences of \w*float16.*allowed: float32'):
    estimate(door, dtype, derivative=finite_difference())
