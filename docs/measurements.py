"""What the figures of the page "The idea" show, measured on tiny problems.

Errors are squared and divided by the squared gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lfg_jax
from lfg_jax.estimators import linear_layer
from lfg_jax.local.replicated import Cut, replicated_loss
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.targets import Targets
from lfg_jax.tangents import distributions, variance

Params = dict[str, jax.Array]


def error_of_direction(d: int, num_tangents: int) -> float:
  """Squared error of forward gradients of a linear function in d dimensions, over |g|²."""
  g = jax.random.normal(jax.random.key(1), (d,))
  run = lfg_jax.forward_grad(
    lambda x: g @ x, distribution=distributions.hadamard, num_tangents=num_tangents
  )
  keys = jax.random.split(jax.random.key(2), 400)
  estimates = jax.jit(lambda keys: jax.lax.map(lambda key: run(jnp.zeros(d), key=key), keys))(keys)
  return float(((estimates - g) ** 2).sum(1).mean() / (g**2).sum())


def layer_error(kind: str, p: int, q: int, batch: int) -> tuple[float, float]:
  """Variance of a linear layer's estimate over the squared gradient: measured, and by Table 1."""
  layer = linear_layer.LinearLayer(jnp.ones(p), jnp.ones(q))
  distribution = distributions.rademacher
  estimate = layer.estimate(kind, lfg_jax.Sampling(distribution), batch)
  measured = variance.measure(estimate, layer.truth, jax.random.key(3), 2000)
  predicted = variance.predicted(
    kind, distribution, 1, shared=False, batch=batch, p=p, q=q, V=layer.V, S=layer.S
  )
  return float(measured.squared_error) / layer.S, predicted / layer.S


def cut_error(cut: Cut, patches: int, channels: int, groups: int) -> float:
  """Squared error over |g|² for the weights of one layer under a local head."""
  batch, inputs, classes = 8, 16, 10
  keys = jax.random.split(jax.random.key(4), 3)
  x = jax.random.normal(keys[0], (batch, patches, inputs))
  head = jax.random.normal(keys[1], (channels, classes)) / math.sqrt(channels)
  w = jax.random.normal(keys[2], (inputs, channels)) / math.sqrt(inputs)
  labels = jnp.arange(batch) % classes
  local_axes = 1 + (2 if cut.group else 1 if cut.patch else 0)

  def losses(params: Params) -> jax.Array:
    z = (x @ params['w']).reshape(batch, patches, groups, channels // groups)
    h = jax.nn.relu(lfg_jax.tap(z, 'h', local_axes=local_axes, active=z > 0))
    kernel = head.reshape(groups, channels // groups, classes)
    linear, targets = (
      {'kernel': kernel, 'bias': jnp.zeros(classes)},
      Targets(labels, jnp.ones(batch)),
    )
    return replicated_loss(cross_entropy, h, linear, targets, cut)

  # The sum of all copies has the gradient of the plain loss.
  objective = lambda params: losses(params).sum() / batch
  return relative_error(losses, objective, {'w': w}, mixes_examples=False)['w']


def relative_error(
  losses: Callable, objective: Callable, params: Params, **options: Any
) -> dict[str, float]:
  """For every layer, the mean over 400 draws of the squared error over |g|²."""
  truth = jax.grad(objective)(params)
  run = lfg_jax.value_and_activity_grad(losses, **options)
  keys = jax.random.split(jax.random.key(5), 400)
  estimates = jax.jit(lambda keys: jax.lax.map(lambda key: run(params, key=key)[1], keys))(keys)
  error = lambda g, all_: float(((all_ - g) ** 2).sum() / len(keys) / (g**2).sum())
  return jax.tree.map(error, truth, estimates)


class Layers(NamedTuple):
  """Three layers of one width, each tapped, under a linear head."""

  x: jax.Array
  head: jax.Array
  labels: jax.Array

  def losses(self, params: dict[str, jax.Array], shift: jax.Array | float = 0.0) -> jax.Array:
    """[B]; `shift` is added to the outputs of the second layer."""
    h = self.x
    for name, w in params.items():
      z = h @ w + (shift if name == 'second' else 0.0)
      h = jax.nn.relu(lfg_jax.tap(z, name, active=z > 0))
    return self.of_output(h)

  def of_output(self, h: jax.Array) -> jax.Array:
    return cross_entropy(h @ self.head, Targets(self.labels, jnp.ones(len(self.labels))))

  def signal(self, third: jax.Array) -> jax.Array:
    """The exact gradient at the last tap: back through a ReLU and the head."""
    return jax.grad(lambda z: self.of_output(jax.nn.relu(z)).mean())(third)


def learned_feedback(layers: Layers, params: dict[str, jax.Array]) -> jax.Array:
  """A matrix from the last tap's signal to the second's, fitted to 50 forward gradients."""
  step = lfg_jax.value_and_activity_grad(layers.losses, 1, joint=False)
  shift = jnp.zeros_like(layers.x)
  at_second = lambda key: step(params, shift, key=key)[1]
  measured = jax.vmap(at_second)(jax.random.split(jax.random.key(7), 50)).mean(0)
  h = layers.x
  for name, w in params.items():
    z = h @ w
    on, h = z > 0, jax.nn.relu(z)
    if name == 'second':
      measured_where_on = jnp.where(on, measured, 0)
  signal = layers.signal(z)
  return jnp.linalg.lstsq(signal, measured_where_on)[0]
