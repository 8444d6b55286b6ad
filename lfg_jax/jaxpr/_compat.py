"""Every use of an unstable API of JAX, each with why it is needed and since when it is so.

Public JAX has no way to read or evaluate a jaxpr. What `jax.extend.core` offers for it may change
in any release, and so may the names and parameters of primitives. Those of rules for single
primitives are in `dependence_rules`, which refuses a parameter it does not know.
"""

import contextlib
import os
import re
import warnings
from typing import Any

import jax
import jaxlib
from jax._src import xla_bridge
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ['ClosedJaxpr', 'Jaxpr', 'Literal', 'Primitive']

# Names of primitives, all that JAX has used for them. From 0.10 to 0.12: 'jit', 'remat2'.
CALLS = ('jit', 'pjit', 'closed_call', 'core_call')
REMAT = ('remat2', 'remat', 'checkpoint')
OWN_RULES = ('custom_jvp_call', 'custom_vjp_call')
CHECKPOINT_NAME = 'name'  # of `jax.ad_checkpoint.checkpoint_name`

# XLA's message has one of these if a collective operation has lost another process. JAX raises no
# error of its own for it (0.10 to 0.12).
LOST_PROCESS = re.compile('Gloo|NCCL|RCCL|coordination service|UNAVAILABLE')


def identity(name: str) -> Primitive:
  """A primitive that returns its first operand; JAX has no public way to define one.

  Its cotangent goes to the first operand. `vmap` moves the mapped axis of all operands to the front.
  """
  primitive = Primitive(name)

  def first(z: Any, *further: Any, **params: Any) -> Any:
    del further, params
    return z

  def jvp(primals: tuple, tangents: tuple, **params: Any) -> tuple:
    return primitive.bind(*primals, **params), tangents[0]

  def transpose(cotangent: Any, z: Any, *further: Any, **params: Any) -> tuple:
    del z, params
    return cotangent, *(None for _ in further)

  def batch(operands: tuple, axes: tuple, **params: Any) -> tuple[jax.Array, int]:
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    front = [batching.bdim_at_front(x, a, size) for x, a in zip(operands, axes, strict=True)]
    return primitive.bind(*front, **params), 0

  primitive.def_impl(first)
  primitive.def_abstract_eval(first)
  ad.primitive_jvps[primitive] = jvp
  ad.primitive_transposes[primitive] = transpose
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, lambda ctx, z, *further, **params: [z])
  return primitive


def bind(eqn: Any, ins: list) -> list:
  """The equation's outputs."""
  params = eqn.primitive.get_bind_params(eqn.params)
  if isinstance(params, tuple):  # before 0.10.1, functions are separate
    functions, params = params
    outs = eqn.primitive.bind(*functions, *ins, **params)
  else:
    outs = eqn.primitive.bind(*ins, **params)
  return outs if eqn.primitive.multiple_results else [outs]


def traced_context(eqn: Any) -> contextlib.AbstractContextManager:
  """The context in which an equation was traced: matmul precision, a mesh, …."""
  return eqn.ctx.manager


def scan_counts(params: dict) -> tuple[int, int]:
  """How many of a scan's inputs are constants, and how many are carried."""
  if 'ft_in' in params:  # since 0.11
    constants, carried, _ = params['ft_in'].unpack()
    return len(constants), len(carried)
  return params['num_consts'], params['num_carry']


def prevents_cse(params: dict) -> bool:
  """Whether a checkpoint forbids common-subexpression elimination; may be told per input."""
  prevent = params['prevent_cse']
  return prevent if isinstance(prevent, bool) else any(prevent)


def function_name(jaxpr: Jaxpr) -> str:
  """The name of the function from which a jaxpr was traced."""
  return str(jaxpr.debug_info.func_name)


def cluster(
  coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> tuple[str | None, int | None, int | None]:
  """Completes a process's place from the cluster; None where no cluster is known.

  `jax.distributed.initialize` does so too, but tells nobody (0.10 to 0.12); a roll call comes first.
  """
  from jax._src.clusters import ClusterEnv

  detected = ClusterEnv.auto_detect_unset_distributed_params(
    coordinator, processes, process, None, None, timeout
  )
  return detected[:3]


# From jaxlib 0.10.2 on, the CPU backend leaves products and the sums around them to a library,
# YNNPACK, which has computed wrong ones without a word (github.com/jax-ml/jax/issues/39103). With
# jaxlib 0.11.2 a vmapped estimate in a scan was wrong by a factor of 10⁴; see
# `tests/jaxpr/test_exact_sums.py`.
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
  """Sets XLA_FLAGS for this process; warns where it is too late and products are computed on CPUs.

  XLA reads its flags when JAX first looks for devices, which is after a program has imported what
  it uses.
  """
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
