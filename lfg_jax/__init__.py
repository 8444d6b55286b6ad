"""Forward-gradient learning with local losses, in JAX and Flax.

Any JAX function: `value_and_forward_grad`, `value_and_activity_grad`, `tap`, `mark`, `diagnose`,
`compare`. The folders, in reading order: `jaxpr`, `tangents`, `estimators`, `diagnosis`, `local`,
`models`, `data`, `training`. What needs more than JAX is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lfg_jax.estimators.activity_gradient import value_and_activity_grad
from lfg_jax.estimators.forward_gradient import forward_grad, value_and_forward_grad
from lfg_jax.jaxpr import _compat
from lfg_jax.jaxpr.taps import tap
from lfg_jax.tangents import distributions
from lfg_jax.tangents.sampling import Sampling

if TYPE_CHECKING:
  from lfg_jax.diagnosis.comparison import compare
  from lfg_jax.diagnosis.diagnosing import diagnose
  from lfg_jax.estimators.marks import mark

_compat.ensure()

__version__ = '0.1.0'
_FOLDERS = ('jaxpr', 'tangents', 'estimators', 'diagnosis', 'local', 'models', 'data', 'training')
_LATER = {
  'compare': 'lfg_jax.diagnosis.comparison',
  'diagnose': 'lfg_jax.diagnosis.diagnosing',
  'mark': 'lfg_jax.estimators.marks',
}

__all__ = [
  'Sampling',
  '__version__',
  'compare',
  'diagnose',
  'distributions',
  'forward_grad',
  'mark',
  'tap',
  'value_and_activity_grad',
  'value_and_forward_grad',
]


def __getattr__(name: str) -> Any:
  if name in _FOLDERS:
    return importlib.import_module(f'lfg_jax.{name}')
  if name in _LATER:
    return getattr(importlib.import_module(_LATER[name]), name)
  raise AttributeError(f'module lfg_jax has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*__all__, *_FOLDERS])
