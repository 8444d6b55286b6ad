"""Taps of the LocalMixer: where activities are perturbed and learning signals are received.

(Functions and models of your own call `lfg_jax.tap`, in `lfg_jax.estimators.primitive`, which needs no Flax module.)

Calling `z = tap(self, 'name', z)` in a Flax module marks the activity z. Without more, it is the identity.
An estimator that evaluates the module can hand it, as variable collections,

* `perturbation`: added to z. `jax.jvp` with respect to it gives the effect of z on the loss, forward;
* `signal`: z's gradient estimate. It *replaces* the cotangent that arrives at z in the reverse sweep.

What reverse-mode derives between two taps is then a layer's own, local, derivative: what lies before a tap
receives that tap's signal and nothing from behind it (XLA removes the unused computation), and a layer
between the last tap and the loss gets its exact gradient. If every signal is an unbiased estimate of its
activity's gradient, so is every parameter's gradient, whatever the parameters, residuals and sharing,
because the reverse sweep is linear in the signals.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tap:
  """What an estimator must know of a tap.

  Attributes:
    value: the activity (or its shape), `[B, ...]`; under `nn.scan` with the scanned axes before B.
    ndim: number of axes of the activity as the module sees it, without scanned axes.
    local_axes: how many leading axes activity and losses have in common. An activity `[B, P, G, c]` with
      `local_axes=3` influences entry `[b, p, g]` of the losses through its own `[b, p, g]` only; with 1, all
      the losses of its own example; with 0, losses of other examples too (batch norm).
  """
  value: Any
  ndim: int = flax.struct.field(pytree_node=False)
  local_axes: int = flax.struct.field(pytree_node=False)


@jax.custom_vjp
def inject(z: jax.Array, signal: jax.Array) -> jax.Array:
  """z, whose cotangent is replaced by `signal` (of z's shape) in the reverse sweep.

  >>> jax.grad(lambda z: jnp.sum(inject(z, jnp.array([3., 4.])) ** 2))(jnp.ones(2)).tolist()
  [3.0, 4.0]
  """
  del signal
  return z


inject.defvjp(lambda z, signal: (z, signal), lambda signal, _: (signal, jnp.zeros_like(signal)))


def tap(module: nn.Module, name: str, z: jax.Array, *, active: jax.Array | None = None,
        local_axes: int = 1) -> jax.Array:
  """Marks the activity `z` `[B, ...]` of `module`; returns it unchanged in value.

  Args:
    module: the Flax module that calls.
    name: unique in the module.
    z: the activity, examples first.
    active: boolean, of z's shape: where a following ReLU is on. Units that are off have no gradient, so
      their signal is set to zero.
    local_axes: see `Tap`.
  """
  if module.is_initializing():
    return z
  module.sow('taps', name, Tap(z, z.ndim, local_axes), init_fn=lambda: None, reduce_fn=lambda _, new: new)
  if module.has_variable('perturbation', name):
    z = z + module.get_variable('perturbation', name)
  if module.has_variable('signal', name):
    signal: jax.Array = module.get_variable('signal', name)
    z = inject(z, (signal if active is None else jnp.where(active, signal, 0)).astype(z.dtype))
  return z


def boundary(module: nn.Module, name: str, y: jax.Array, local_axes: int) -> jax.Array:
  """Marks the activity `y` `[B, ...]` through which all that comes before influences the losses; see `exact_behind`.

  It shares `local_axes` leading axes with the losses. A module given the collection `boundary_shift` takes
  y + shift behind a stop-gradient: what comes before the boundary then gets no gradient.
  """
  if module.is_initializing():
    return y
  module.sow('boundary', name, Tap(y, y.ndim, local_axes), init_fn=lambda: None, reduce_fn=lambda _, new: new)
  if module.has_variable('boundary_shift', name):
    return jax.lax.stop_gradient(y) + module.get_variable('boundary_shift', name)
  return y


def hold(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  """x behind a stop-gradient, which finite differences can see.

  `jax.lax.stop_gradient` fixes a value under differentiation only. An estimator that *evaluates* at perturbed
  points records the held values at the unperturbed point and hands them back as the collection `held`.
  """
  if module.has_variable('held', name) and not module.is_mutable_collection('held'):
    return module.get_variable('held', name)
  if not module.is_initializing():
    module.sow('held', name, x, init_fn=lambda: None, reduce_fn=lambda _, new: new)
  return jax.lax.stop_gradient(x)
