"""LocalMixer: an MLP-Mixer in which every block ends in channel groups with their own losses.

(Ren et al. 2023, section 4, figure 3.) An image is cut into P patches. A block mixes tokens, then
channels, then channels within each group. Blocks of equal shape are scanned with stacked
parameters, so compile time does not grow with depth, and with local rules neither does memory.

The parameter tree has `stem`, `blocks` (with pooling also `blocks_1`, …) and `readout`. The leaves
of a stack have the blocks on their first axis; blocks that change the shape (stem, pooling) are not
stacked.
"""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.targets import Targets
from lfg_jax.models import layers
from lfg_jax.models.block import BlockSpec, LocalBlock, Style, norm
from lfg_jax.promotion import upcast


class Projection(nn.Module):
  """Group norm → mean over tokens → linear: the head of a network that learns end to end."""

  style: Style
  groups: int

  @nn.compact
  def __call__(self, x_NxPxC: jax.Array, weight_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projections [N, K] as anchors and as candidates (behind the stop-gradient, if any)."""
    contrast, (N, P, C) = self.style.heads.contrast, x_NxPxC.shape
    assert contrast
    features = norm(self.style, 'head', x_NxPxC.reshape(N, P, self.groups, -1), weight_N)
    linear = layers.Linear(
      layers.dense,
      (C, contrast.projections),
      (contrast.projections,),
      C,
      self.style.init,
      name='linear',
    )
    z_NxK = linear(upcast(features).mean(1).reshape(N, C))
    return z_NxK, jax.lax.stop_gradient(z_NxK) if contrast.stop_gradient else z_NxK


class ReadOut(nn.Module):
  """Mean over tokens → norm → linear to the classes."""

  style: Style
  classes: int

  @nn.compact
  def __call__(self, x_BxPxC: jax.Array, weight_B: jax.Array) -> jax.Array:
    C = x_BxPxC.shape[-1]
    h = norm(self.style, 'readout', upcast(x_BxPxC).mean(1), weight_B)
    self.sow('features', 'mean', h)
    return layers.Linear(
      layers.dense, (C, self.classes), (self.classes,), C, 'zero', name='linear'
    )(h)


@dataclasses.dataclass(frozen=True)
class Run:
  """`count` blocks of one shape; more than one only if `spec.stacked`."""

  name: str
  spec: BlockSpec
  count: int


@dataclasses.dataclass(frozen=True)
class MixerSpec:
  """A whole LocalMixer: its stacks of blocks and what they share."""

  runs: tuple[Run, ...]
  style: Style
  classes: int


class LocalMixer(nn.Module):
  """The network end to end.

  Attributes:
    cut: how the local heads' losses are replicated.

  >>> from lfg_jax.models.sizes import mixer_spec
  >>> model = LocalMixer(mixer_spec('M/8/16', image_shape=(32, 32, 3), classes=10))
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 48)))
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  918770
  """

  spec: MixerSpec
  cut: Cut = Cut(patch=False, group=False)

  @nn.compact
  def __call__(
    self, tokens_BxPxD: jax.Array, targets: Targets | None = None, weight_B: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns logits [B, classes] and every stack's local losses [n, B, P, G] (None if no targets).

    With `heads.project`, the latter also have the projections, as `head`.
    """
    x, stem = tokens_BxPxD, self.spec.runs[0].spec
    chex.assert_shape(
      x, (None, stem.tokens, stem.inputs), custom_message='tokens are [examples, patches, inputs]'
    )
    weight_B = jnp.ones(x.shape[:1]) if weight_B is None else weight_B
    local: dict[str, Any] = {}
    for run in self.spec.runs:
      stack = nn.scan(
        LocalBlock,
        variable_axes={name: 0 for name in COLLECTIONS},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=run.count,
      )
      block = (stack if run.spec.stacked else LocalBlock)(
        run.spec, self.spec.style, self.spec.classes, self.cut, name=run.name
      )
      x, local[run.name] = block(x, targets, weight_B)
    if self.spec.style.heads.project:
      local['head'] = Projection(self.spec.style, self.spec.runs[-1].spec.groups, name='head')(
        x, weight_B
      )
    return ReadOut(self.spec.style, self.spec.classes, name='readout')(x, weight_B), local


COLLECTIONS = ('params', 'batch_stats', 'feedback')
