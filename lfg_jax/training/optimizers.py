"""Optimizers and learning-rate schedules of optax, by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lfg_jax import promotion

PyTree = Any
ADAPTIVE = ('adam', 'adamw')  # have b1, not momentum
OPTIMIZERS = ('sgd', 'adam', 'adamw', 'lars')
SCHEDULES = ('constant', 'linear', 'staircase', 'cosine')
ENDLESS = ('constant', 'staircase')  # do not depend on the number of epochs


def schedule(
  config: Any, steps_per_epoch: int, epochs: int, batch_size: int = 256
) -> optax.Schedule:
  """Returns the learning rate by step: a linear warm-up from 0, then config.schedule.

  'linear' and 'cosine' fall to 0 at the last step. 'staircase' is multiplied by
  config.staircase_factor at each of config.staircase_epochs, which count from the start of
  training. With config.scale_with_batch, config.learning_rate is for a batch of 256, and the rate
  grows in proportion to the batch size.
  """
  warmup = round(config.warmup_epochs * steps_per_epoch)
  rest = max(epochs * steps_per_epoch - warmup, 1)
  rate = config.learning_rate * (batch_size / 256 if config.scale_with_batch else 1)
  if config.schedule == 'linear':
    main = optax.linear_schedule(rate, 0.0, rest)
  elif config.schedule == 'cosine':
    main = optax.cosine_decay_schedule(rate, rest)
  elif config.schedule == 'staircase':
    falls = [round(epoch * steps_per_epoch) - warmup for epoch in config.staircase_epochs]
    main = optax.piecewise_constant_schedule(rate, dict.fromkeys(falls, config.staircase_factor))
  else:
    main = optax.constant_schedule(rate)
  return (
    optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), main], [warmup])
    if warmup
    else main
  )


def make(config: Any, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Builds the optimizer that config.name names.

  Weight decay acts on kernels only. For sgd and adam it is L2 regularisation, added to the
  gradient. For adamw it is decoupled from the gradient. lars adds it before its trust ratio, which
  applies to kernels only; a stack of scanned blocks is one kernel. The updates
  of the read-out and of the local heads have their own multipliers.
  """
  decay = config.weight_decay
  momentum, b1 = (0.9 if value is None else value for value in (config.momentum, config.b1))
  l2 = optax.add_decayed_weights(decay, mask=kernels)
  optimizer = {
    'sgd': lambda: optax.chain(l2, optax.sgd(learning_rate, momentum)),
    'adam': lambda: optax.chain(l2, optax.adam(learning_rate, b1=b1)),
    'adamw': lambda: optax.adamw(learning_rate, b1=b1, weight_decay=decay, mask=kernels),
    'lars': lambda: optax.lars(
      learning_rate, decay, weight_decay_mask=kernels, trust_ratio_mask=kernels, momentum=momentum
    ),
  }[config.name]()
  multipliers = {'readout': config.readout_multiplier, 'head': config.head_multiplier}
  return lenient(optax.chain(optimizer, _multiply(multipliers)))


def adam_of_control_variates(rate: float) -> optax.GradientTransformation:
  """Adam whose rounding does not depend on the number of leaves.

  So the stages of a pipeline can share out the leaves and get the same result. optax divides the
  moments by 1 - bⁿ. XLA turns this division into a product for one leaf, but not for two. Here
  these divisors are part of the learning rate.
  """
  b1, b2, eps = 0.9, 0.999, 1e-8
  plain = optax.scale_by_adam(b1, b2, eps)

  def update(
    updates: PyTree, state: optax.ScaleByAdamState, _: PyTree = None
  ) -> tuple[PyTree, Any]:
    _, new = plain.update(updates, state)
    shrunk = jnp.sqrt(1 - b2**new.count)
    scale = shrunk / (1 - b1**new.count)
    return jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps * shrunk), new.mu, new.nu), new

  return lenient(optax.chain(optax.GradientTransformation(plain.init, update), optax.scale(-rate)))


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Makes an optax optimizer work where the user has forbidden silent promotion."""

  def update(*args: Any) -> tuple[PyTree, PyTree]:
    with promotion.allowed():
      return optimizer.update(*args)

  return optax.GradientTransformation(optimizer.init, update)


def kernels(params: PyTree) -> PyTree:
  """Returns a tree of bools: True for leaves named 'kernel'.

  >>> kernels({'linear': {'kernel': 0, 'bias': 0}})
  {'linear': {'bias': False, 'kernel': True}}
  """
  return _by_names(lambda names, _: names[-1] == 'kernel', params)


def _multiply(multipliers: dict[str, float]) -> optax.GradientTransformation:
  """Multiplies the updates in the subtrees with these names."""

  def scale(names: list[str], update: jax.Array) -> jax.Array:
    for name, multiplier in multipliers.items():
      if name in names:
        return update * multiplier
    return update

  return optax.stateless(lambda updates, _: _by_names(scale, updates))


def _by_names(f: Callable[[list[str], Any], Any], tree: PyTree) -> PyTree:
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: f([entry.key for entry in path], leaf), tree
  )
