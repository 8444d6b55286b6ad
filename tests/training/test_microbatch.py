"""A batch processed in parts gives the gradient of the whole batch."""

import jax
import jax.numpy as jnp
import pytest

from lfg_jax import data
from lfg_jax.tangents import microbatch
from lfg_jax.training import configs, step_functions
from lfg_jax.training.rules import algorithms, rules
from tests.runs import tiny
from tests.small import compose, relative_error, small


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'sharing'),
  [('BP', 'paper'), ('LG-FG-A+', 'paper'), ('LG-FG-A+', 'shared'), ('LG-FG-W', 'independent')],
)
def test_gradient_of_parts_is_that_of_the_batch(name, sharing):
  s = small(batch=4, blocks=2)

  def result(size):
    algorithm = compose(s, name, micro_batch=size, sharing=sharing)
    return jax.jit(algorithm.gradient)(s.variables, jax.random.key(0), s.batch)

  whole, in_parts = result(4), result(2)
  assert relative_error(in_parts[0], whole[0]) < 1e-5
  assert jnp.allclose(in_parts[1]['loss'], whole[1]['loss'], rtol=1e-5)


def test_a_micro_batch_is_the_most_that_divides():
  assert [microbatch.number_of_microbatches(12, size, 1) for size in (1, 4, 5, 7, 12, 99)] == [
    12,
    3,
    3,
    2,
    1,
    1,
  ]


def test_batch_norm_takes_the_whole_batch():
  s = small(norm='batch')
  with pytest.raises(ValueError, match='micro_batch is 1'):
    algorithms.compose(rules.REGISTRY['BP'], rules.Options(micro_batch=1), s.model)


def test_automatic_size_keeps_an_activity_in_cache():
  assert microbatch.number_of_microbatches(128, 0, 2**17) == (
    16 if jax.default_backend() == 'cpu' else 1
  )
  assert (
    microbatch.number_of_microbatches(127, 0, 2**17) == 1
  )  # 127 parts of one example would be slower
  assert microbatch.number_of_microbatches(5, 0, 2**30) == (
    5 if jax.default_backend() == 'cpu' else 1
  )


def test_a_model_that_is_slow_in_loops_is_computed_outside_them():
  """On CPUs, the gradient of a convolution takes 14 times as long inside a loop."""
  config = tiny(steps_per_dispatch=7)
  of = lambda: algorithms.make(config, data.load('digits')).composition
  whole = step_functions.steps_per_dispatch(config, of().model)
  configs.use_model(config, 'resnet', patches=2)
  resnet = of()
  on_cpu = jax.default_backend() == 'cpu'
  assert (whole, step_functions.steps_per_dispatch(config, resnet.model)) == (7, 1 if on_cpu else 7)
  assert resnet.microbatches(4096) == 1 and not any(
    stack.is_stacked for stack in resnet.model.stacks
  )
