"""XLA's new sums of products on CPUs are switched off where they are wrong.

From jaxlib 0.10.2 on, the CPU backend leaves products and the sums around them to a library,
YNNPACK, which has computed wrong ones without a word (github.com/jax-ml/jax/issues/39103). With
jaxlib 0.11.2 a vmapped estimate in a scan was wrong by a factor of 10⁴; see
`tests/jaxpr/test_exact_sums.py`. XLA reads its flags when JAX first looks for devices, which is after a
program has imported what it uses.
"""

import os
import re
import warnings

import jaxlib
from jax._src import xla_bridge

FLAG = '--xla_cpu_experimental_ynn_fusion_type'
FIRST_WRONG = (0, 10, 2)


def flags(version: str, given: str) -> str:
  """XLA's flags with this version of jaxlib, for a user who has `given` some.

  >>> flags('0.11.2', '--xla_cpu_enable_fast_math=false')
  '--xla_cpu_enable_fast_math=false --xla_cpu_experimental_ynn_fusion_type='
  >>> flags('0.10.1', '')
  ''
  """
  is_right = tuple(map(int, re.findall(r'\d+', version)[:3])) < FIRST_WRONG
  return given if is_right or FLAG in given else f'{given} {FLAG}='.strip()


def ensure() -> None:
  """Sets XLA_FLAGS for this process; warns where it is too late and products are computed on CPUs."""
  given = os.environ.get('XLA_FLAGS', '')
  wanted = flags(jaxlib.__version__, given)
  if wanted == given:
    return
  os.environ['XLA_FLAGS'] = wanted
  if xla_bridge.backends_are_initialized() and xla_bridge.get_backend().platform == 'cpu':
    warnings.warn(
      f'JAX was used before lfg_jax was imported: with jaxlib {jaxlib.__version__} sums of products '
      f'may be wrong on CPUs; import lfg_jax first, or set XLA_FLAGS={FLAG}=',
      stacklevel=3,
    )
