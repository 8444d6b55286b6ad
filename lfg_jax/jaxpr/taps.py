"""`tap`: an identity with which any JAX function names an activity that may be perturbed.

    def losses(params, x, y):
      h = lfg_jax.tap(x @ params['hidden'], 'hidden')
      return cross_entropy(jax.nn.relu(h) @ params['out'], y)

A tap is an equation in the function's jaxpr. To `jax.jit`, `jax.grad` and `jax.vmap` it is the
identity. An estimator finds the taps, adds tangents to their activities, and in the reverse sweep
replaces their cotangents with *signals*: estimates of the activities' gradients.

Between two taps, reverse mode then computes only the local derivative of a layer. Everything
before a tap receives that tap's signal, and nothing from after it (XLA removes the unused
computation). If every signal is an unbiased estimate of its activity's gradient, then so is every
parameter's gradient, whatever the residuals and shared parameters, because the reverse sweep is
linear in the signals.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.jaxpr import _compat

tap_p = _compat.identity('tap')


class Tap(NamedTuple):
  """What an estimator knows about a tap before the function is evaluated.

  Attributes:
    shape: of the activity, `[B, ...]`; in a scan, the scanned axes come before B.
    dtype: of the activity.
    ndim: number of axes of the activity as the function sees it, without scanned axes.
    local_axes: how many leading axes activity and losses share; see `tap`.
    is_auto: whether it shares as many as the equations show.
    front: the axis of the examples in the function; `shape` has it, and its parts, in front.
  """

  shape: tuple[int, ...]
  dtype: Any
  ndim: int
  local_axes: int
  is_auto: bool = False
  front: int = 0

  @property
  def scanned(self) -> int:
    """Number of scanned axes."""
    return len(self.shape) - self.ndim

  def with_front(self, front: int) -> 'Tap':
    """This tap, if the function has the examples on the axis `front`."""
    tap = self._replace(front=front)
    outside = jax.eval_shape(tap.outside, jax.ShapeDtypeStruct(self.shape, self.dtype))
    return tap._replace(shape=outside.shape) if front else tap

  def outside(self, x: jax.Array) -> jax.Array:
    """An array with the function's axes, examples first."""
    return jnp.moveaxis(x, *self._axes) if self.front else x

  def inside(self, x: jax.Array) -> jax.Array:
    """An array with the examples first, as the function has it."""
    return jnp.moveaxis(x, *self._axes[::-1]) if self.front else x

  @property
  def _axes(self) -> tuple[list[int], list[int]]:
    first = [self.scanned + n for n in range(max(self.local_axes, 1))]
    return [axis + self.front for axis in first], first


def tap(
  z: jax.Array,
  name: str,
  *,
  local_axes: int | str = 1,
  active: jax.Array | None = None,
  source: jax.Array | None = None,
) -> jax.Array:
  """Returns the activity `z` `[B, ...]` and makes it known to estimators as `name`.

  Every call is a separate tap. A second call with the same name is known as `name_1`, and so on.
  Inside `vmap`, the mapped axes count as the first axes of `z`, so a function of one example can
  tap its activities as they are and then be mapped over the batch. It may be mapped over heads or
  an ensemble too: the axis of the examples is the one that leads to the first axis of the losses.

  Args:
    z: real floating-point, examples first.
    name: any text.
    local_axes: how many leading axes activity and losses share. With `local_axes=2`, the part
      `[b, p]` of an activity `[B, P, c]` influences only the losses at `[b, p]`; with 1, all losses
      of example b; with 0, losses of other examples too.
    active: boolean, broadcast to z's shape: where a following ReLU is on. Units that are off have
      no gradient, so their signal is set to zero.
    source: of z's shape. It receives the signal in place of z; the computation between the two, a
      norm say, is then not differentiated.

  Raises:
    TypeError: z is not real floating-point.
    ValueError: `local_axes` is negative, or text other than 'auto'.

  >>> jax.grad(lambda z: (tap(z, 'z') ** 2).sum())(jnp.ones(2)).tolist()
  [2.0, 2.0]
  """
  z = jnp.asarray(z)
  if not jnp.issubdtype(z.dtype, jnp.floating):
    raise TypeError(f'tap {name!r} has dtype {z.dtype}; allowed: real floating-point')
  if local_axes != 'auto' and (isinstance(local_axes, str) or local_axes < 0):
    raise ValueError(f"tap {name!r} has local_axes={local_axes!r}; allowed: 0 or more, or 'auto'")
  given = {'active': active, 'source': source}
  further = {kind: jnp.broadcast_to(x, z.shape) for kind, x in given.items() if x is not None}
  return tap_p.bind(z, *further.values(), name=name, local_axes=local_axes, further=tuple(further))


@jax.custom_vjp
def inject(z: jax.Array, signal: jax.Array) -> jax.Array:
  """Returns z; in the reverse sweep, `signal` replaces its cotangent.

  >>> jax.grad(lambda z: jnp.sum(inject(z, jnp.array([3., 4.])) ** 2))(jnp.ones(2)).tolist()
  [3.0, 4.0]
  """
  del signal
  return z


inject.defvjp(lambda z, signal: (z, signal), lambda signal, _: (signal, jnp.zeros_like(signal)))


@jax.custom_vjp
def inject_at(source: jax.Array, z: jax.Array, signal: jax.Array) -> jax.Array:
  """Returns z; in the reverse sweep, `source` receives `signal`, and z nothing.

  >>> jax.grad(lambda x: inject_at(x, 5 * x, jnp.array([3., 4.])).sum())(jnp.ones(2)).tolist()
  [3.0, 4.0]
  """
  del source, signal
  return z


inject_at.defvjp(
  lambda source, z, signal: (z, signal),
  lambda signal, _: (signal, jnp.zeros_like(signal), jnp.zeros_like(signal)),
)
