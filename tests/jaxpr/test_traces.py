"""The public functions check shapes, and a training step is traced once."""

import chex
import jax
import jax.numpy as jnp
import pytest

from lfg_jax import value_and_activity_grad
from lfg_jax.local.replicated import replicated_loss
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.staged import evaluate
from lfg_jax.local.targets import Targets
from tests import bare
from tests.small import compose, small


@pytest.mark.parametrize('name', ['BP', 'LG-BP', 'LG-FG-A+', 'LG-FG-W'])
def test_a_gradient_is_traced_once_for_all_steps(name):
  s = small()
  chex.clear_trace_counter()
  gradient = jax.jit(chex.assert_max_traces(compose(s, name).gradient, 1))
  for step in range(3):
    gradient(s.variables, jax.random.key(step), s.batch)
  with pytest.raises(AssertionError, match='traced > 1 times'):  # the test sees a second one
    half = jax.tree.map(lambda leaf: leaf[:2], s.batch)
    gradient(s.variables, jax.random.key(0), half)


def test_a_function_with_taps_is_traced_once_for_all_steps_and_tangents():
  chex.clear_trace_counter()
  fun = chex.assert_max_traces(lambda w: bare.bare(w, bare.MIDDLES['nothing']), 1)
  step = jax.jit(lambda w, key: value_and_activity_grad(fun, num_tangents=4, chunk=2)(w, key=key))
  for key in bare.KEYS[:3]:
    step(bare.W, key)


def test_shapes_that_do_not_fit_are_told():
  x, kernel, bias, label = (
    jnp.ones((2, 4, 3, 5)),
    jnp.ones((3, 5, 10)),
    jnp.ones(10),
    jnp.zeros(2, int),
  )
  for wrong, message in (
    ((x[0], kernel, bias, label), 'rank'),
    ((x, kernel[:2], bias, label), 'the head needs a row for every group and channel'),
    ((x, kernel, bias[:9], label), 'the bias has one entry per output of the head'),
    ((x, kernel, bias, label[:1]), 'one entry per example'),
  ):
    with pytest.raises(AssertionError, match=message):
      x_, kernel_, bias_, label_ = wrong
      targets = Targets(label_, jnp.ones(2))
      replicated_loss(cross_entropy, x_, {'kernel': kernel_, 'bias': bias_}, targets)
  s = small()
  with pytest.raises(AssertionError, match=r'tokens are \[examples, patches, inputs\]'):
    evaluate(s.model, s.variables, jnp.ones((2, 4, 7)))
