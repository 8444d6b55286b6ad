"""A linear layer with known example statistics, for which the variances of Table 1 hold exactly.

The loss of an example is δ·(x W), with x ~ N(a, 1) and δ ~ N(b, 1). So its gradient x δᵀ has mean
a bᵀ and entries of variance (a_i² + 1)(b_j² + 1) - a_i² b_j².
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.estimators.activity import activity_perturbation
from lfg_jax.estimators.weight import weight_perturbation
from lfg_jax.jaxpr.taps import tap
from lfg_jax.tangents.sampling import Sampling

ESTIMATORS: dict[str, Callable] = {'weight': weight_perturbation, 'activity': activity_perturbation}


class LinearLayer(NamedTuple):
  """Sizes and means.

  Attributes:
    a: [p] mean of the inputs.
    b: [q] mean of the losses' derivatives.
  """

  a: jax.Array
  b: jax.Array

  @property
  def truth(self) -> jax.Array:
    """The gradient [p, q]."""
    return jnp.outer(self.a, self.b)

  @property
  def S(self) -> float:
    """Mean squared entry of the gradient."""
    return float((self.truth**2).mean())

  @property
  def V(self) -> float:
    """Mean variance over examples of an entry of the per-example gradient."""
    return float(jnp.outer(self.a**2 + 1, self.b**2 + 1).mean()) - self.S

  def estimate(
    self, estimator: str, sampling: Sampling, batch: int
  ) -> Callable[[jax.Array], jax.Array]:
    """`key -> [p, q]`: the estimated gradient of a random batch, by 'weight' or 'activity'."""

    def fun(kernel: jax.Array, x: jax.Array, delta: jax.Array) -> tuple[jax.Array, dict]:
      return (delta * tap(x @ kernel, 'z')).sum(-1) / batch, {}

    run = ESTIMATORS[estimator](fun, sampling=sampling)
    kernel = jnp.zeros((self.a.size, self.b.size))

    def one(key: jax.Array) -> jax.Array:
      x_key, delta_key, tangent_key = jax.random.split(key, 3)
      x = self.a + jax.random.normal(x_key, (batch, self.a.size))
      delta = self.b + jax.random.normal(delta_key, (batch, self.b.size))
      return run(kernel, tangent_key, x, delta)[1]

    return one


def random_layer(key: jax.Array, p: int, q: int) -> LinearLayer:
  """Means drawn from N(0, 1)."""
  a_key, b_key = jax.random.split(key)
  return LinearLayer(jax.random.normal(a_key, (p,)), jax.random.normal(b_key, (q,)))
