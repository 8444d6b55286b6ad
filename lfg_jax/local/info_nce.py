"""InfoNCE, a loss that compares the rows of a batch with each other.

Every image gives two views; rows 2i and 2i + 1 of a batch are the views of example i. A head
projects a row's features to a unit vector a_n. All other rows of the global batch are the
candidates c_m. The loss of row n (Chen et al. 2020, equation 1) asks which of them is n⁺, the other
view of the same image:

    L[n] = -log softmax_{m ≠ n}(a_n · c_m / τ)[n⁺]

`lfg_jax.local.replicated` replicates it over patches and groups. With the candidates behind a
stop-gradient, a row's loss depends only on its own features, with slope
(1 - a_n a_nᵀ)/|z_n| · S c, where S = (softmax - onehot(n⁺)) / τ and z_n is the projection before
normalisation. Without the stop-gradient, every row moves the loss of every other.

**Credit.** Without the stop-gradient, the activity of a row also influences the losses of all other
rows, through c_m. But a perturbation of activities is credited only with its own row's loss, as in
Ren et al. 2023. So its estimate misses that influence, and the independent perturbations of other
rows add noise that grows with the batch. The paper's figure 4 shows that nothing is learned. With
the stop-gradient, the default, the estimate is unbiased.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lfg_jax.local.row_losses import RowLoss
from lfg_jax.local.targets import Targets

VIEWS = 2
_TINY = 1e-12  # added to |z|²
_NEVER = -1e30  # the logit of a non-candidate; finite, to rule out -inf - -inf


class Contrast(NamedTuple):
  """Options of the contrastive loss.

  Attributes:
    temperature: τ.
    stop_gradient: whether candidates are behind a stop-gradient.
    shared_views: whether both views of an example share their activity perturbation.
    projections: dimensions of the projected space.
    axis_name: mesh axis over which the batch is sharded; candidates are gathered along it.
  """

  temperature: float = 0.5
  stop_gradient: bool = True
  shared_views: bool = True
  projections: int = 128
  axis_name: str | None = None


def unit(z_NxK: jax.Array) -> jax.Array:
  """z / |z|, row by row.

  >>> unit(jnp.array([[3., 4.]])).round(3).tolist()
  [[0.6000000238418579, 0.800000011920929]]
  """
  return z_NxK * _inverse_norm(z_NxK)


def _inverse_norm(z_NxK: jax.Array) -> jax.Array:
  return jax.lax.rsqrt((z_NxK * z_NxK).sum(-1, keepdims=True) + _TINY)


def gather(x: jax.Array, axis_name: str | None) -> jax.Array:
  """The rows of all devices, in global batch order."""
  return jax.lax.all_gather(x, axis_name, tiled=True) if axis_name else x


def _positions(rows: int, axis_name: str | None) -> jax.Array:
  """[N]: positions of this device's rows in the global batch."""
  first = jax.lax.axis_index(axis_name) * rows if axis_name else 0
  return first + jnp.arange(rows)


def _scores(
  a_NxK: jax.Array, c_MxK: jax.Array, real_N: jax.Array, contrast: Contrast
) -> tuple[jax.Array, jax.Array]:
  """Logits [N, M] of all candidates (`_NEVER` for the row itself and padding), and n⁺ one-hot."""
  own_N = _positions(a_NxK.shape[0], contrast.axis_name)
  candidate_1xM = jnp.arange(c_MxK.shape[0])[None]
  is_candidate_NxM = gather(real_N, contrast.axis_name)[None] & (candidate_1xM != own_N[:, None])
  logits_NxM = jnp.where(is_candidate_NxM, a_NxK @ c_MxK.T / contrast.temperature, _NEVER)
  return logits_NxM, candidate_1xM == (own_N ^ 1)[:, None]


def info_nce(
  z_NxK: jax.Array, candidate_z_NxK: jax.Array, real_N: jax.Array, contrast: Contrast
) -> jax.Array:
  """[N] InfoNCE losses of this device's rows, in nats, without replication.

  Args:
    z_NxK: projections of anchors; rows 2i and 2i + 1 are the views of an example.
    candidate_z_NxK: the same rows as candidates: z itself, or z behind a stop-gradient.
    real_N: False for rows that pad the batch, which are not candidates.
    contrast: temperature and mesh axis.

  >>> z = jnp.array([[1., 0.], [1., 0.], [0., 1.], [0., 1.]])
  >>> bool(jnp.allclose(info_nce(z, z, jnp.ones(4, bool), Contrast()), jnp.log(1 + 2 / jnp.e**2)))
  True
  """
  logits_NxM, positive_NxM = _scores(
    unit(z_NxK), gather(unit(candidate_z_NxK), contrast.axis_name), real_N, contrast
  )
  return _losses(logits_NxM, positive_NxM)


def _losses(logits_NxM: jax.Array, positive_NxM: jax.Array) -> jax.Array:
  # A padding row has a padding partner with logit `_NEVER`. Its weight is 0, but it must be finite.
  positive_N = jnp.where(positive_NxM & (logits_NxM > _NEVER), logits_NxM, 0).sum(-1)
  return jax.nn.logsumexp(logits_NxM, axis=-1) - positive_N


def row_loss(contrast: Contrast) -> RowLoss:
  """InfoNCE of outputs [N, K], for `replicated_loss`; rows of weight 0 are padding.

  >>> z, targets = jnp.eye(4), Targets(jnp.zeros(4, int), jnp.full(4, 0.25))
  >>> row_loss(Contrast())(z, targets).shape
  (4,)
  """

  def loss(z_NxK: jax.Array, targets: Targets) -> jax.Array:
    candidates_NxK = jax.lax.stop_gradient(z_NxK) if contrast.stop_gradient else z_NxK
    return info_nce(z_NxK, candidates_NxK, targets.weight_B > 0, contrast)

  return loss


def end_losses(
  projected: tuple[jax.Array, jax.Array], weight_N: jax.Array, contrast: Contrast
) -> tuple[jax.Array, jax.Array]:
  """The end-to-end loss: weighted losses [N], and the objective's gradient [N, K] at the output.

  Args:
    projected: the outputs as anchors and as candidates, both [N, K].
    weight_N: each row's weight in the objective; 0 for padding.
    contrast: options of the loss.
  """
  z_NxK, candidates_NxK = projected

  def losses(anchors_NxK: jax.Array, candidates_NxK: jax.Array) -> jax.Array:
    return info_nce(anchors_NxK, candidates_NxK, weight_N > 0, contrast) * weight_N

  def objective(z_NxK: jax.Array) -> jax.Array:
    return losses(z_NxK, candidates_NxK if contrast.stop_gradient else z_NxK).sum()

  return losses(z_NxK, candidates_NxK), jax.grad(objective)(z_NxK)
