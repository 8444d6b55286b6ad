"""Forward-gradient learning with local losses, in JAX and Flax."""

from importlib.metadata import PackageNotFoundError, version

from lfg_jax.estimators.activity_gradient import value_and_activity_grad
from lfg_jax.estimators.forward_gradient import forward_grad, value_and_forward_grad
from lfg_jax.estimators.marks import mark
from lfg_jax.estimators.passes import Sampling
from lfg_jax.estimators.primitive import tap

try:
  __version__ = version('lfg_jax')
except PackageNotFoundError:    # a copy of the sources that was not installed
  __version__ = 'unknown'

__all__ = ['Sampling', '__version__', 'forward_grad', 'mark', 'tap', 'value_and_activity_grad',
           'value_and_forward_grad']
