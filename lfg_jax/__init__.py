"""Forward-gradient learning with local losses, in JAX and Flax."""

from lfg_jax.forward_grad import forward_grad, value_and_forward_grad
from lfg_jax.modules import value_and_activity_grad
from lfg_jax.passes import Sampling
from lfg_jax.taps import TAP_COLLECTIONS, tap

__all__ = ['TAP_COLLECTIONS', 'Sampling', 'forward_grad', 'tap', 'value_and_activity_grad', 'value_and_forward_grad']
