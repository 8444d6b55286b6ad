"""The local head: one linear layer on a block's mean feature, and its replicated losses."""

from typing import Any

import jax

from lfg_jax.losses.info_nce import Contrast, replicated_info_nce
from lfg_jax.losses.replicated import Cut, replicated_cross_entropy, scale_gradient
from lfg_jax.losses.targets import Targets

Params = dict[str, Any]


def local_losses(features_BxPxGxC: jax.Array, head: Params, targets: Targets, cut: Cut, *,
                 contrast: Contrast | None = None, fused: bool = True,
                 feedback_GxCxK: jax.Array | None = None) -> jax.Array:
  """[B, P, G] weighted losses of a block (1 in place of an axis that is not cut), in nats.

  The head learns from the mean of the replicas, while the block takes their sum.

  Args:
    features_BxPxGxC: normalised output of the block, in groups.
    head: 'kernel' [G, C, K] and 'bias' [K]; the patches share it.
    contrast: of the contrastive loss; None: cross-entropy.
    fused: losses have a derivative of their own, at the cost of one plain loss. Finite differences
      see no derivative: for them every replica is written out, with the others' features behind a
      stop-gradient.
    feedback_GxCxK: fixed matrix in place of the kernel, in derivatives by the features.

  >>> x, head = jax.numpy.ones((2, 4, 3, 5)), {'kernel': jax.numpy.zeros((3, 5, 10)),
  ...                                          'bias': jax.numpy.zeros(10)}
  >>> targets = Targets(jax.numpy.array([1, 2]), jax.numpy.array([0.5, 0.5]))
  >>> round(local_losses(x, head, targets, Cut()).mean((1, 2)).sum().item(), 4)
  2.3026
  """
  share = 1 / cut.replicas(features_BxPxGxC)
  kernel, bias = scale_gradient(head['kernel'], share), scale_gradient(head['bias'], share)
  held = None if fused else jax.lax.stop_gradient(features_BxPxGxC)
  if contrast is None:
    losses = replicated_cross_entropy(features_BxPxGxC, kernel, bias, targets.label_B, cut,
                                      backward_GxCxK=feedback_GxCxK, held_BxPxGxC=held)
  else:
    losses = replicated_info_nce(features_BxPxGxC, kernel, bias, targets.weight_B > 0, contrast,
                                 cut, backward_GxCxK=feedback_GxCxK, held_NxPxGxC=held)
  return losses * targets.weight_B[:, None, None]
