"""Forward-gradient learning with local losses, in JAX and Flax.

Any JAX function: `value_and_forward_grad`, `value_and_activity_grad`, `tap`, `mark`; what they are
made of is in `estimators`. Networks that learn by local losses: `losses`, `models`, `data`,
`training`, which are imported when they are first used.
"""

import importlib
from types import ModuleType

from lfg_jax import estimators, exact_sums
from lfg_jax.estimators.activity_gradient import value_and_activity_grad
from lfg_jax.estimators.comparison import compare
from lfg_jax.estimators.diagnosis import diagnose
from lfg_jax.estimators.forward_gradient import forward_grad, value_and_forward_grad
from lfg_jax.estimators.marks import mark
from lfg_jax.estimators.sampling import Sampling
from lfg_jax.estimators.taps import tap

exact_sums.ensure()

__version__ = '0.1.0'
_LATER = ('losses', 'models', 'data', 'training')

__all__ = [
  'Sampling',
  '__version__',
  'compare',
  'diagnose',
  'estimators',
  'forward_grad',
  'mark',
  'tap',
  'value_and_activity_grad',
  'value_and_forward_grad',
]


def __getattr__(name: str) -> ModuleType:
  if name in _LATER:
    return importlib.import_module(f'lfg_jax.{name}')
  raise AttributeError(f'module lfg_jax has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*__all__, *_LATER])
