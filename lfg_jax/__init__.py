"""Forward-gradient learning with local losses, in JAX and Flax."""

from lfg_jax.activity_grad import value_and_activity_grad
from lfg_jax.forward_grad import forward_grad, value_and_forward_grad
from lfg_jax.marks import mark
from lfg_jax.passes import Sampling
from lfg_jax.primitive import tap

__all__ = ['Sampling', 'forward_grad', 'mark', 'tap', 'value_and_activity_grad', 'value_and_forward_grad']
