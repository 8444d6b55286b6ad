"""Forward-gradient learning with local losses, in JAX and Flax."""

from lfg_jax.estimators.activity_gradient import value_and_activity_grad
from lfg_jax.estimators.diagnosis import diagnose
from lfg_jax.estimators.forward_gradient import forward_grad, value_and_forward_grad
from lfg_jax.estimators.marks import mark
from lfg_jax.estimators.passes import Sampling
from lfg_jax.estimators.primitive import tap

__all__ = ['Sampling', 'diagnose', 'forward_grad', 'mark', 'tap', 'value_and_activity_grad', 'value_and_forward_grad']
