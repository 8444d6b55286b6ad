"""One block of the LocalMixer, with its local head.

A block mixes tokens, then channels, then the channels of each group by itself (Ren et al. 2023,
section 4, figure 3).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lfg_jax.estimators.taps import tap
from lfg_jax.losses.heads import Heads
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.targets import Targets
from lfg_jax.models import functional, layers

NORMS = (
  'token_in',
  'token_out',
  'channel_in',
  'channel_out',
  'group_in',
  'group_out',
  'head',
  'readout',
)
# The block's name is put in front: 'blocks/after_token'.
TAPS = ('after_token', 'after_channel', 'after_group')
BOUNDARY = 'last_linear'  # also a tap: the grouped layer's output, in a block with a local loss


class Style(NamedTuple):
  """Options shared by all blocks of a model.

  Attributes:
    mixing: `linear` (a P×P matrix) or `conv` (depth-wise `conv_size` × `conv_size`).
    conv_size: height and width of the convolution of mixing='conv'.
    norm: `layer`, `whole` (all axes of an example) or `batch`.
    norms: which of `NORMS` to use.
    init: `kaiming`, `lecun` or `constant`.
    pool: `average` or `max`, where tokens are pooled.
    norm_derivative: whether a tap's signal reaches its linear layer through the derivative of the
      norm in between, or directly.
    train: whether batch norm uses the batch's statistics.
    axis_name: mesh axis over which batch norm takes its statistics.
    heads: of local losses.
    precision: 'bfloat16': blocks compute in bfloat16; parameters, norm statistics, heads, losses
      and read-out are in float32. 'float32': everything has the parameters' type.
  """

  mixing: str = 'linear'
  conv_size: int = 3
  norm: str = 'layer'
  norms: tuple[str, ...] = NORMS
  init: str = 'lecun'
  pool: str = 'average'
  norm_derivative: bool = True
  train: bool = True
  axis_name: str | None = None
  heads: Heads = Heads()
  precision: str = 'float32'

  @property
  def dtype(self) -> Any:
    """The type in which blocks compute; None: the parameters'."""
    return jnp.bfloat16 if self.precision == 'bfloat16' else None


class BlockSpec(NamedTuple):
  """Sizes of one block. A stem has no token mixing and no residual."""

  tokens: int
  inputs: int
  hidden: int
  channels: int
  groups: int
  mix: bool = True
  pool: bool = False

  @property
  def residual(self) -> bool:
    """Only a block that keeps its width can add its input."""
    return self.mix and self.inputs == self.channels

  @property
  def stacked(self) -> bool:
    """A block whose output has its input's shape can be scanned, with stacked parameters."""
    return self.residual and not self.pool


class _Unit(NamedTuple):
  """Norm → linear → norm: the outputs of the linear layer and of the second norm."""

  linear: jax.Array
  out: jax.Array

  def reshape(self, *shape: int) -> '_Unit':
    return _Unit(*(x.reshape(shape) for x in self))


class LocalBlock(nn.Module):
  """One block with its local head.

  Attributes:
    last: whether the block's output goes only to local losses. Activities then influence only the
      losses of their own patch and group; otherwise, they are credited with all of the example's.
    cut: how the head's loss is replicated.
    classes: of labels.
  """

  spec: BlockSpec
  style: Style
  classes: int
  cut: Cut = Cut()
  last: bool = False

  @nn.compact
  def __call__(
    self, x_BxPxC: jax.Array, targets: Targets | None, weight_B: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the output [B, P, C] and the weighted local losses [B, P, G] (None without targets)."""
    s, (B, *_) = self.spec, x_BxPxC.shape
    x = self._pool(x_BxPxC) if s.pool else x_BxPxC
    h = x
    if s.mix:
      z = self._unit('token', self._token_linear(), h, weight_B)
      h = nn.relu(self._tap('after_token', z, z.out > 0, 2))
    z = self._unit(
      'channel',
      self._linear(layers.dense, (s.inputs, s.hidden), (s.hidden,), s.inputs),
      h,
      weight_B,
    )
    z = z.reshape(B, s.tokens, s.groups, -1)
    h = nn.relu(self._tap('after_channel', z, z.out > 0, 3))
    width_in, width_out = s.hidden // s.groups, s.channels // s.groups
    grouped = self._linear(
      layers.grouped, (s.groups, width_in, width_out), (s.groups, width_out), width_in
    )
    z = self._unit('group', grouped, h, weight_B)
    skip = x.reshape(z.out.shape) if s.residual else jnp.zeros((), z.out.dtype)
    out_BxPxGxC = nn.relu(self._tap('after_group', z, z.out + skip > 0, 3) + skip)
    losses = Head(s, self.style, self.classes, self.cut, name='head')(
      out_BxPxGxC, targets, weight_B
    )
    return out_BxPxGxC.reshape(B, s.tokens, s.channels), losses

  def _local_axes(self, axes: int) -> int:
    """With layer norm, a last block's activity stays in its patch (and group) up to the loss."""
    if self.style.norm == 'batch':
      return 0
    return axes if self.last and self.style.norm == 'layer' else 1

  def _linear(
    self, linear: Callable, kernel: tuple, bias: tuple, fan_in: int
  ) -> Callable[[str], layers.Linear]:
    return lambda name: layers.Linear(
      linear, kernel, bias, fan_in, self.style.init, self.style.dtype, name=name
    )

  def _token_linear(self) -> Callable[[str], layers.Linear]:
    P, C, k = self.spec.tokens, self.spec.inputs, self.style.conv_size
    if self.style.mixing == 'conv':
      return self._linear(layers.depthwise, (k, k, 1, C), (C,), k * k)
    return self._linear(layers.across_tokens, (P, P), (P, 1), P)

  def _unit(
    self, name: str, linear: Callable[[str], layers.Linear], x: jax.Array, weight_B: jax.Array
  ) -> '_Unit':
    """Norm → linear → norm."""
    y = linear(name)(norm(self.style, f'{name}_in', x, weight_B))
    if name == 'group' and self.last:
      y = tap(y, f'{self.name}/{BOUNDARY}', local_axes=3)
    return _Unit(y, norm(self.style, f'{name}_out', y, weight_B))

  def _tap(self, name: str, z: '_Unit', active: jax.Array, local_axes: int) -> jax.Array:
    """The unit's output, tapped. Its signal can bypass the second norm."""
    source = None if self.style.norm_derivative else z.linear
    return tap(
      z.out,
      f'{self.name}/{name}',
      local_axes=self._local_axes(local_axes),
      active=active,
      source=source,
    )

  def _pool(self, x_BxPxC: jax.Array) -> jax.Array:
    B, P, C = x_BxPxC.shape
    side = round(P**0.5)
    cells = x_BxPxC.reshape(B, side // 2, 2, side // 2, 2, C)
    pooled = cells.mean((2, 4)) if self.style.pool == 'average' else cells.max((2, 4))
    return pooled.reshape(B, P // 4, C)


def norm(style: Style, name: str, x: jax.Array, weight_B: jax.Array) -> jax.Array:
  """Call it inside a compact method: the norm becomes a child of the calling module."""
  if name not in style.norms:
    return x
  return layers.Norm(style.norm, style.train, style.axis_name, name=f'norm_{name}')(x, weight_B)


class Head(nn.Module):
  """The local head: group norm, then losses with parameters shared by all patches and groups."""

  spec: BlockSpec
  style: Style
  classes: int
  cut: Cut

  @nn.compact
  def __call__(
    self, x_BxPxGxC: jax.Array, targets: Targets | None, weight_B: jax.Array
  ) -> jax.Array | None:
    G, C = self.spec.groups, self.spec.channels // self.spec.groups
    heads = self.style.heads
    init = functools.partial(
      functional.init_head,
      heads=heads,
      groups=G,
      width=C,
      classes=self.classes,
      kind=self.style.init,
    )
    features = norm(self.style, 'head', x_BxPxGxC, weight_B)
    if targets is None and not self.is_initializing():
      return None  # whatever the head's shape: it may be one for the next block's features
    params = {
      name: self.param(name, lambda key, name=name: init(key)[name])
      for name in ('kernel', 'bias', *['out'] * bool(heads.hidden))
    }
    if targets is None:
      return None
    feedback: dict[str, Any] = {
      name: self.get_variable('feedback', name)
      for name in params
      if self.has_variable('feedback', name)
    }
    return heads.losses(features, params, targets, self.cut, feedback)
