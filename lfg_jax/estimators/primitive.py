"""`tap`: the identity, by which any JAX function names an activity that may be perturbed.

    def losses(params, x, y):
      h = lfg_jax.tap(x @ params['hidden'], 'hidden')
      return cross_entropy(jax.nn.relu(h) @ params['out'], y)

A tap is an equation of the function's jaxpr. `jax.jit`, `jax.grad` and `jax.vmap` see the identity;
`value_and_activity_grad` finds the taps, perturbs them, and replaces their cotangents.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

tap_p = Primitive('tap')


def tap(z: jax.Array, name: str, *, local_axes: int = 1, active: jax.Array | None = None
        ) -> jax.Array:
  """The activity `z` `[B, ...]` itself, known by `name` to `value_and_activity_grad`.

  Every call is a tap of its own. A second call with the same name is known as `name_1`, and so on.
  Inside `vmap` the mapped axes count as the first ones of `z`: a function of one example, mapped
  over the batch, may tap its activities as they are.

  Args:
    z: real floating-point, examples first.
    name: any text.
    local_axes: how many leading axes activity and losses have in common. An activity `[B, P, c]`
      with `local_axes=2` influences entry `[b, p]` of the losses only through its own `[b, p]`;
      with 1, all losses of its own example; with 0, losses of other examples too.
    active: boolean, broadcast to z's shape: where a following ReLU is on. Units that are off have
      no gradient, so their signal is set to zero.

  Raises:
    TypeError: z is not real floating-point.
    ValueError: `local_axes` is negative.

  >>> jax.grad(lambda z: (tap(z, 'z') ** 2).sum())(jnp.ones(2)).tolist()
  [2.0, 2.0]
  """
  z = jnp.asarray(z)
  if not jnp.issubdtype(z.dtype, jnp.floating):
    raise TypeError(f'tap {name!r} has dtype {z.dtype}; allowed: real floating-point')
  if local_axes < 0:
    raise ValueError(f'tap {name!r} has local_axes={local_axes}; allowed: 0 or more')
  operands = (z,) if active is None else (z, jnp.broadcast_to(active, z.shape))
  return tap_p.bind(*operands, name=name, local_axes=local_axes)


def _batch(operands: tuple, axes: tuple, **params: Any) -> tuple[jax.Array, int]:
  """The mapped axis goes to the front of both operands."""
  size = next(x.shape[a] for x, a in zip(operands, axes, strict=True)
              if a is not batching.not_mapped)
  front = [batching.bdim_at_front(x, a, size) for x, a in zip(operands, axes, strict=True)]
  return tap_p.bind(*front, **params), 0


def _transpose(cotangent: Any, z: Any, *active: Any, **params: Any) -> tuple:
  del z, params
  return cotangent, *(None for _ in active)


tap_p.def_impl(lambda z, *active, **params: z)
tap_p.def_abstract_eval(lambda z, *active, **params: z)
ad.primitive_jvps[tap_p] = lambda primals, tangents, **params: (
    tap_p.bind(*primals, **params), tangents[0])
ad.primitive_transposes[tap_p] = _transpose
batching.primitive_batchers[tap_p] = _batch
mlir.register_lowering(tap_p, lambda ctx, z, *active, **params: [z])
