"""Row losses: what a local head learns, by name or from your own file.

A row loss is `row_loss(outputs_BxK, targets) -> losses_B`. It takes a head's outputs, one row per
example, and the examples' targets. A row's loss depends only on that row's outputs. JAX provides
its derivative, and `lfg_jax.local.replicated` replicates it for free.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lfg_jax import user_files
from lfg_jax.errors import one_of
from lfg_jax.local.targets import Targets

RowLoss = Callable[[jax.Array, Targets], jax.Array]


def cross_entropy(outputs_BxK: jax.Array, targets: Targets) -> jax.Array:
  """[B] cross-entropy of the softmax with integer labels, in nats.

  >>> targets = Targets(jnp.array([1]), jnp.ones(1))
  >>> round(cross_entropy(jnp.zeros((1, 10)), targets).item(), 4)
  2.3026
  """
  return optax.softmax_cross_entropy_with_integer_labels(outputs_BxK, targets.label_B)


def squared_error(outputs_BxK: jax.Array, targets: Targets) -> jax.Array:
  """[B] half the squared distance to the one-hot label, no unit.

  >>> squared_error(jnp.array([[0., 3.]]), Targets(jnp.array([1]), jnp.ones(1))).tolist()
  [2.0]
  """
  return 0.5 * ((outputs_BxK - _one_hot(outputs_BxK, targets)) ** 2).sum(-1)


def margin(outputs_BxK: jax.Array, targets: Targets) -> jax.Array:
  """[B] by how much the best wrong class violates a margin of 1 (Crammer, Singer 2001).

  >>> targets = Targets(jnp.ones(2, int), jnp.ones(2))
  >>> margin(jnp.array([[0., 3., 2.5], [0., 3., 1.]]), targets).tolist()
  [0.5, 0.0]
  """
  label_BxK = _one_hot(outputs_BxK, targets)
  right_B = (outputs_BxK * label_BxK).sum(-1)
  return jax.nn.relu((outputs_BxK + 1 - label_BxK).max(-1) - right_B)


def _one_hot(outputs_BxK: jax.Array, targets: Targets) -> jax.Array:
  return jax.nn.one_hot(targets.label_B, outputs_BxK.shape[-1], dtype=outputs_BxK.dtype)


ROW_LOSSES: dict[str, RowLoss] = {
  'cross_entropy': cross_entropy,
  'squared_error': squared_error,
  'margin': margin,
}


def find(row: str, module: str | None = None, outputs: int = 10) -> RowLoss:
  """A row loss by name, or from a file.

  Args:
    row: loss of the local heads: 'cross_entropy', 'squared_error' or 'margin'. The read-out always
      learns the cross-entropy.
    module: a Python file with your own `row_loss`; None: the loss with that name.
    outputs: number of a head's outputs, K.

  Raises:
    ValueError, UserError: there is no such loss or file, or the file's `row_loss` does not return
      one loss per row, which depends on that row alone.

  >>> find('margin') is margin
  True
  """
  if module is None:
    one_of('losses.row', row, ROW_LOSSES)
    return ROW_LOSSES[row]
  row_loss: RowLoss = user_files.load('losses.module', module, ('row_loss',)).row_loss
  _check(f'losses.module {module}', row_loss, outputs)
  return row_loss


def _check(what: str, row_loss: RowLoss, outputs: int) -> None:
  """Raises ValueError unless each of three rows gets one loss that depends on that row alone."""
  outputs_3xK = jnp.linspace(-1, 1, 3 * outputs).reshape(3, outputs)
  targets = Targets(jnp.arange(3) % outputs, jnp.full(3, 1 / 3))
  with user_files.mistakes(what):
    slopes = jax.jacobian(lambda x: row_loss(x, targets))(outputs_3xK)
  if slopes.shape != (3, 3, outputs):
    raise ValueError(
      f'{what}: row_loss gives a loss of shape {slopes.shape[:-2]} for outputs '
      f'(3, {outputs}); allowed: (3,), one for each row'
    )
  if jnp.where(jnp.eye(3, dtype=bool)[..., None], 0, slopes).any():
    raise ValueError(
      f'{what}: row_loss lets the loss of a row depend on other rows; allowed: on '
      'its own outputs only'
    )
