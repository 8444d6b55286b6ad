"""The standard problem of estimators.py with local losses: a LocalMixer, and rules of the trainer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rivals
from estimator_problems import Problem, digits

from lfg_jax import data
from lfg_jax.data.datasets import Batch
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.staged import BlockContext, variables_of
from lfg_jax.local.targets import Targets
from lfg_jax.training import configs
from lfg_jax.training.rules import algorithms

PyTree = Any


def mixer(batch: int = 32) -> Problem:
  """The LocalMixer S/2/4 with a loss for every block, patch and group, on the digits.

  No gradient crosses blocks. Estimators are rules of the trainer; the exact gradient is LG-BP's.
  """
  images, dataset = digits(batch), data.load('digits')

  def algorithm(rule: str, **fields: Any) -> algorithms.Algorithm:
    config = configs.base()
    config.model.size, config.model.channels, config.algorithm = 'S/2/4', 32, rule
    config.estimator.update({'chunk': 0, **fields})
    return algorithms.make(config, dataset)

  exact = algorithm('LG-BP')
  model, cut = exact.composition.model, exact.composition.options.cut

  def losses(params: PyTree, examples: Batch) -> list[jax.Array]:
    x, ones, found = model.prepare(examples.image), jnp.ones(batch), []
    targets, variables = Targets(examples.label, ones), {'params': params}
    for stack in model.stacks:

      def body(x: jax.Array, of_block: Any, stack: Any = stack) -> tuple[jax.Array, jax.Array]:
        at = BlockContext('last', cut, last=True)
        return stack.block(of_block, jax.lax.stop_gradient(x), targets, at)[:2]

      inside = variables_of(variables, stack.name)
      x, local = jax.lax.scan(body, x, inside) if stack.is_stacked else body(x, inside)
      found.append(jnp.moveaxis(local, 0, 1) if stack.is_stacked else local)
    x = jax.lax.stop_gradient(x)
    return [
      *found,
      cross_entropy(model.read_out(variables_of(variables, 'readout'), x, ones)[0], targets),
    ]

  def of(number: int) -> tuple[Batch]:
    image, label = images(number)
    return (Batch(image, label, np.full(batch, 1 / batch, np.float32)),)

  def rule(params: PyTree, key: jax.Array, name: str, **fields: Any) -> rivals.Estimator:
    made = algorithm(name, **fields)
    rest = {kind: tree for kind, tree in made.init(key).items() if kind != 'params'}
    if 'control_variate' in rest:  # learned here for a while, as it would be beside the parameters
      learn = jax.jit(
        lambda rest, key, examples: made.advance(
          rest, params, made.gradient({'params': params, **rest}, key, examples)[1]
        )
      )
      for number in range(300):
        rest = learn(rest, jax.random.fold_in(key, number), of(number)[0])

    def run(params: PyTree, examples: Batch, *, key: jax.Array) -> tuple[jax.Array, PyTree]:
      gradient, aux = made.gradient({'params': params, **rest}, key, examples)
      return aux['loss'], gradient

    return run

  def estimators(params: PyTree, key: jax.Array) -> dict[tuple[str, int], Any]:
    made, alone = (
      functools.partial(rule, params, key),
      {'control_variate': 'none', 'last_tap': 'perturbed'},
    )
    return {
      **{('weights', K): made('LG-FG-W', num_tangents=K) for K in (1, 16)},
      **{('activities at once (Ren et al.)', K): made('LG-FG-A', num_tangents=K) for K in (1, 8)},
      **{('activities one by one', K): made('LG-FG-A+', num_tangents=K, **alone) for K in (1, 8)},
      **{
        ('one by one, last exact', K): made('LG-FG-A+', num_tangents=K, control_variate='none')
        for K in (1, 8)
      },
      **{
        ('last exact, learned control variates', K): made(
          'LG-FG-A+', num_tangents=K, control_variate='all'
        )
        for K in (1, 8)
      },
      ('feedback alignment', 1): made('LG-FA'),
    }

  params = exact.init(jax.random.key(0))['params']
  return Problem('LocalMixer on digits, local losses', params, losses, of, estimators)
