"""A linear layer with examples of known statistics: where the variances of Table 1 hold exactly.

The loss of an example is δ·(x W), with x ~ N(a, 1) and δ ~ N(b, 1), so that its gradient x δᵀ has the mean a bᵀ and
entries of variance (a_i² + 1)(b_j² + 1) - a_i² b_j².
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lfg_jax.estimators import estimators
from lfg_jax.estimators.estimators import FlaxLoss
from lfg_jax.estimators.passes import Sampling
from lfg_jax.estimators.taps import tap

ESTIMATORS: dict[str, Callable] = {'weight': estimators.weight_perturbation,
                                   'activity': estimators.activity_perturbation}


class _Layer(nn.Module):
  """[B, p] → [B, q], tapped."""
  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return tap(self, 'z', nn.Dense(self.outputs, use_bias=False, name='linear')(x))


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
    """[p, q], the gradient."""
    return jnp.outer(self.a, self.b)

  @property
  def S(self) -> float:
    """Mean squared entry of the gradient."""
    return float((self.truth**2).mean())

  @property
  def V(self) -> float:
    """Mean variance over examples of an entry of the per-example gradient."""
    return float(jnp.outer(self.a**2 + 1, self.b**2 + 1).mean()) - self.S

  def estimate(self, estimator: str, sampling: Sampling, batch: int) -> Callable[[jax.Array], jax.Array]:
    """`key -> [p, q]`: a batch is drawn, and its gradient estimated with 'weight' or 'activity' tangents."""
    layer = _Layer(self.b.size)

    def apply(variables: Any, mutable: tuple, x: jax.Array, delta: jax.Array) -> tuple:
      z, updates = layer.apply(variables, x, mutable=mutable)
      return ((delta * z).sum(-1) / batch, {}), updates

    run = ESTIMATORS[estimator](FlaxLoss(apply), sampling=sampling)
    params = {'linear': {'kernel': jnp.zeros((self.a.size, self.b.size))}}

    def one(key: jax.Array) -> jax.Array:
      x_key, delta_key, tangent_key = jax.random.split(key, 3)
      x = self.a + jax.random.normal(x_key, (batch, self.a.size))
      delta = self.b + jax.random.normal(delta_key, (batch, self.b.size))
      _, grads = run(params, tangent_key, x, delta)
      return grads['linear']['kernel']
    return one


def random_layer(key: jax.Array, p: int, q: int) -> LinearLayer:
  """Means drawn from N(0, 1)."""
  a_key, b_key = jax.random.split(key)
  return LinearLayer(jax.random.normal(a_key, (p,)), jax.random.normal(b_key, (q,)))
