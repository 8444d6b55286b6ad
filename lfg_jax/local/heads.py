"""Local heads: the losses of a block, and the settings that all blocks share."""

from typing import Any, NamedTuple

import jax

from lfg_jax.local import info_nce
from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.replicated import Cut, replicated_loss, scale_gradient
from lfg_jax.local.row_losses import RowLoss, cross_entropy
from lfg_jax.local.targets import Targets

Params = dict[str, Any]


class Heads(NamedTuple):
  """The settings of all local heads of a network.

  A head is one linear layer on a block's mean feature, or two with a ReLU between them.

  Attributes:
    row_loss: loss of the outputs, see `row_losses`.
    hidden: channels of the hidden layer; 0: there is none.
    contrast: options of the contrastive loss, which replaces `row_loss`; None: heads classify.
    project: whether a projection at the end of the network replaces the heads, for contrastive
      learning without local losses.
  """

  row_loss: RowLoss = cross_entropy
  hidden: int = 0
  contrast: Contrast | None = None
  project: bool = False

  def outputs(self, classes: int) -> int:
    """Number of a head's outputs: classes, or dimensions of the projection."""
    return self.contrast.projections if self.contrast else classes

  def losses(
    self,
    features_BxPxGxC: jax.Array,
    head: Params,
    targets: Targets,
    cut: Cut,
    feedback: Params | None = None,
  ) -> jax.Array:
    """Returns the weighted losses [B, P, G] of a block (size 1 for an axis that is not cut).

    The head learns from the mean of the replicas, but the block learns from their sum.

    Args:
      features_BxPxGxC: normalised output of the block, in groups.
      head: the head's parameters. `feedback` has its feedback matrices; see
        `replicated.replicated_loss`.
      targets: targets of the examples.
      cut: how losses are replicated.

    >>> x, head = jax.numpy.ones((2, 4, 3, 5)), {'kernel': jax.numpy.zeros((3, 5, 10)),
    ...                                          'bias': jax.numpy.zeros(10)}
    >>> targets = Targets(jax.numpy.array([1, 2]), jax.numpy.array([0.5, 0.5]))
    >>> round(Heads().losses(x, head, targets, Cut()).mean((1, 2)).sum().item(), 4)
    2.3026
    """
    share = 1 / cut.replicas(features_BxPxGxC)
    losses = replicated_loss(
      info_nce.row_loss(self.contrast) if self.contrast else self.row_loss,
      features_BxPxGxC,
      jax.tree.map(lambda leaf: scale_gradient(leaf, share), head),
      targets,
      cut,
      feedback=feedback,
      mixes_rows=self.contrast is not None and not self.contrast.stop_gradient,
    )
    return losses * targets.weight_B[:, None, None]
