"""InfoNCE as a local loss: replicated over blocks, patches and groups at the cost of one plain loss.

Every image gives two views; rows 2i and 2i + 1 of a batch are the views of example i. A head projects a row's
features to a unit vector a_n. The loss of row n (Chen et al. 2020, equation 1) asks which of all the other rows
of the global batch, the candidates c_m, is the other view of its image, m = n⁺:

    L[n] = -log softmax_{m ≠ n}(a_n · c_m / τ)[n⁺]

As for the cross-entropy (`lfg_jax.losses.replicated`), the replica (p, g) of this loss sees all features, but only
its own x_{n,p,g} without a stop-gradient. With S = (softmax - onehot(n⁺)) / τ, the derivative by the anchor is S c, and

    dL[n,p,g] = (1/P) Σ_k (W_gᵀ dx[n,p,g])_k · (J_n S c)[n,k]  +  a_n · Σ_m S[n,m] dc[m,p,g],

where J_n = (1 - a_n a_nᵀ)/|z_n| normalises, z_n being the projection before it. The second sum is there only if
the candidates are *not* behind a stop-gradient; dc[m,p,g] is what c_m's own patch and group add to it. Memory is
O(B·D + B²), with D the size of a row's features, whatever the number of replicas.

**Credit.** Without the stop-gradient, the activity of a row also influences the losses of all others, through c_m.
A perturbation of activities is credited with its own row's loss only, as in Ren et al. 2023: then its estimate
leaves that influence out, and the other rows' independent perturbations come in as noise, which grows with the
batch. The paper's figure 4 shows that nothing is learnt. With the stop-gradient, the default, the estimate is unbiased.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lfg_jax.losses.replicated import Cut, check_shapes, head_outputs, own_slopes, replicate, sum_uncut

VIEWS = 2
_TINY = 1e-12    # added to |z|²
_NEVER = -1e30   # the logit of what is no candidate; finite, so that no -inf - -inf can arise


class Contrast(NamedTuple):
  """What the contrastive loss depends on.

  Attributes:
    temperature: τ.
    stop_gradient: whether candidates are behind a stop-gradient.
    shared_views: activity perturbations: both views of an example get the same.
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


def _through_unit(z_NxK: jax.Array, d_NxK: jax.Array) -> jax.Array:
  """The derivative of `unit` along d, or, as it is symmetric, its transpose."""
  a_NxK, scale = unit(z_NxK), _inverse_norm(z_NxK)
  return scale * (d_NxK - a_NxK * (a_NxK * d_NxK).sum(-1, keepdims=True))


def gather(x: jax.Array, axis_name: str | None) -> jax.Array:
  """The rows of all devices, in the order of the global batch."""
  return jax.lax.all_gather(x, axis_name, tiled=True) if axis_name else x


def _positions(rows: int, axis_name: str | None) -> jax.Array:
  """[N]: where this device's rows are in the global batch."""
  first = jax.lax.axis_index(axis_name) * rows if axis_name else 0
  return first + jnp.arange(rows)


def _scores(a_NxK: jax.Array, c_MxK: jax.Array, real_N: jax.Array, contrast: Contrast) -> tuple[jax.Array, jax.Array]:
  """Logits [N, M] of all candidates, `_NEVER` for the row itself and for padding; and the other views, one-hot."""
  own_N = _positions(a_NxK.shape[0], contrast.axis_name)
  candidate_1xM = jnp.arange(c_MxK.shape[0])[None]
  is_candidate_NxM = gather(real_N, contrast.axis_name)[None] & (candidate_1xM != own_N[:, None])
  logits_NxM = jnp.where(is_candidate_NxM, a_NxK @ c_MxK.T / contrast.temperature, _NEVER)
  return logits_NxM, candidate_1xM == (own_N ^ 1)[:, None]


def info_nce(z_NxK: jax.Array, candidate_z_NxK: jax.Array, real_N: jax.Array, contrast: Contrast) -> jax.Array:
  """[N] InfoNCE losses of this device's rows, in nats, without replication; by JAX's own derivatives.

  Args:
    z_NxK: projections of anchors; rows 2i and 2i + 1 are the views of an example.
    candidate_z_NxK: the same rows as candidates: behind a stop-gradient, or z itself.
    real_N: False for rows that pad the batch: they are no candidates.
    contrast: temperature and mesh axis.

  >>> z = jnp.array([[1., 0.], [1., 0.], [0., 1.], [0., 1.]])
  >>> bool(jnp.allclose(info_nce(z, z, jnp.ones(4, bool), Contrast()), jnp.log(1 + 2 / jnp.e**2)))
  True
  """
  logits_NxM, positive_NxM = _scores(unit(z_NxK), gather(unit(candidate_z_NxK), contrast.axis_name), real_N, contrast)
  return _losses(logits_NxM, positive_NxM)


def _losses(logits_NxM: jax.Array, positive_NxM: jax.Array) -> jax.Array:
  # A padding row has a padding partner, with the logit `_NEVER`. Its loss has no weight, but must be finite.
  positive_N = jnp.where(positive_NxM & (logits_NxM > _NEVER), logits_NxM, 0).sum(-1)
  return jax.nn.logsumexp(logits_NxM, axis=-1) - positive_N


def _fused(features_NxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array, backward_GxCxK: jax.Array,
           real_N: jax.Array, cut: Cut, contrast: Contrast) -> jax.Array:
  del backward_GxCxK
  z_NxK = head_outputs(features_NxPxGxC, kernel_GxCxK, bias_K)
  _, P, G, _ = features_NxPxGxC.shape
  return replicate(info_nce(z_NxK, z_NxK, real_N, contrast), P, G, cut)


_fused_loss = jax.custom_jvp(_fused, nondiff_argnums=(5, 6))


def _fused_jvp(cut: Cut, contrast: Contrast, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  features, kernel, bias, backward, real_N = primals
  d_features, d_kernel, d_bias = _filled(tangents[0]), *tangents[1:3]
  P, G = features.shape[1:3]
  z_NxK = head_outputs(features, kernel, bias)
  c_MxK = gather(unit(z_NxK), contrast.axis_name)
  logits_NxM, positive_NxM = _scores(unit(z_NxK), c_MxK, real_N, contrast)
  loss = replicate(_losses(logits_NxM, positive_NxM), P, G, cut)
  S_NxM = (jax.nn.softmax(logits_NxM) - positive_NxM.astype(z_NxK.dtype)) / contrast.temperature
  slope_NxK = _through_unit(z_NxK, S_NxM @ c_MxK)
  slope_NxGxC = jnp.einsum('gck,nk->ngc', backward, slope_NxK) / P
  d_own = own_slopes(d_features, slope_NxGxC, cut)
  # Where only activities move, no product with the head's zero tangent.
  head_moves = not (isinstance(d_kernel, SymbolicZero) and isinstance(d_bias, SymbolicZero))
  d_loss = d_own
  if not contrast.stop_gradient:
    d_loss += _through_candidates(d_features, backward, z_NxK, S_NxM, cut, contrast)
  if head_moves:
    d_z_NxK = head_outputs(features, _filled(d_kernel), _filled(d_bias))
    d_loss += (d_z_NxK * slope_NxK).sum(-1)[:, None, None]
    if not contrast.stop_gradient:
      dc_MxK = gather(_through_unit(z_NxK, d_z_NxK), contrast.axis_name)
      d_loss += ((S_NxM @ dc_MxK) * unit(z_NxK)).sum(-1)[:, None, None]
  return loss, d_loss


_fused_loss.defjvp(_fused_jvp, symbolic_zeros=True)


def _filled(d: jax.Array | SymbolicZero) -> jax.Array:
  return jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d


def _through_candidates(d_features: jax.Array, backward_GxCxK: jax.Array, z_NxK: jax.Array, S_NxM: jax.Array,
                        cut: Cut, contrast: Contrast) -> jax.Array:
  """a_n · Σ_m S[n,m] dc[m,p,g] of moving features, patch by patch: dc of all replicas would be larger than they are."""
  P = d_features.shape[1]
  a_NxK = unit(z_NxK)

  def one_patch(d_NxGxC: jax.Array) -> jax.Array:
    moved_NxGxK = jnp.einsum('ngc,gck->ngk', d_NxGxC, backward_GxCxK) / P
    if not cut.group:
      moved_NxGxK = moved_NxGxK.sum(1, keepdims=True)
    dc_NxGxK = _through_unit(z_NxK[:, None], moved_NxGxK)
    seen_NxGxK = jnp.tensordot(S_NxM, gather(dc_NxGxK, contrast.axis_name), 1)
    return (seen_NxGxK * a_NxK[:, None]).sum(-1)

  d_PxNxGxC = jnp.moveaxis(d_features if cut.patch else d_features.sum(1, keepdims=True), 1, 0)
  return jnp.moveaxis(jax.lax.map(one_patch, d_PxNxGxC), 0, 1)


def replicated_info_nce(features_NxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array, real_N: jax.Array,
                        contrast: Contrast = Contrast(), cut: Cut = Cut(), *,
                        backward_GxCxK: jax.Array | None = None,
                        held_NxPxGxC: jax.Array | None = None) -> jax.Array:
  """InfoNCE of a linear head on the mean feature, with one replica per cut of patch and group.

  Args:
    features_NxPxGxC: normalised output of the block, in groups; rows 2i and 2i + 1 are the views of an example.
    kernel_GxCxK, bias_K: the head, shared by patches; row g of the kernel belongs to group g.
    real_N: False for rows that pad the batch.
    contrast: see `Contrast`.
    cut, backward_GxCxK, held_NxPxGxC: see `losses.replicated_cross_entropy`.

  Returns:
    [N, P, G] (1 in place of an axis that is not cut), in nats.

  >>> x = jax.random.normal(jax.random.key(0), (4, 9, 3, 5))
  >>> replicated_info_nce(x, jnp.ones((3, 5, 7)), jnp.zeros(7), jnp.ones(4, bool)).shape
  (4, 9, 3)
  """
  check_shapes(features_NxPxGxC, kernel_GxCxK, bias_K, real_N)
  if held_NxPxGxC is not None:
    return _displaced_loss(features_NxPxGxC, held_NxPxGxC, kernel_GxCxK, bias_K, real_N, cut, contrast)
  backward = kernel_GxCxK if backward_GxCxK is None else backward_GxCxK
  return _fused_loss(features_NxPxGxC, kernel_GxCxK, bias_K, backward, real_N, cut, contrast)


def _displaced_loss(features: jax.Array, held: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array,
                    real_N: jax.Array, cut: Cut, contrast: Contrast) -> jax.Array:
  """Replicas at a point where each sees its own features displaced and all others held; one after the other."""
  step_NxPxGxK = jnp.einsum('npgc,gck->npgk', features - held, kernel_GxCxK) / features.shape[1]
  step_NxPxGxK = sum_uncut(step_NxPxGxK, cut)
  z_NxK = head_outputs(held, kernel_GxCxK, bias_K)

  def one_replica(step_NxK: jax.Array) -> jax.Array:
    moved_NxK = z_NxK + step_NxK
    candidates_NxK = jax.lax.stop_gradient(z_NxK) if contrast.stop_gradient else moved_NxK
    return info_nce(moved_NxK, candidates_NxK, real_N, contrast)

  N, P, G, K = step_NxPxGxK.shape
  losses_RxN = jax.lax.map(one_replica, jnp.moveaxis(step_NxPxGxK.reshape(N, P * G, K), 1, 0))
  return losses_RxN.T.reshape(N, P, G)


def end_losses(projected: tuple[jax.Array, jax.Array], weight_N: jax.Array, contrast: Contrast
               ) -> tuple[jax.Array, jax.Array]:
  """What a network learns end to end: weighted losses [N], and the objective's derivative [N, K] by its output."""
  z_NxK, candidates_NxK = projected

  losses = lambda z_NxK, candidates_NxK: info_nce(z_NxK, candidates_NxK, weight_N > 0, contrast) * weight_N
  moving = lambda z: losses(z, candidates_NxK if contrast.stop_gradient else z).sum()
  return losses(z_NxK, candidates_NxK), jax.grad(moving)(z_NxK)
