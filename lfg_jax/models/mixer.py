"""LocalMixer: an MLP-mixer whose every block ends in groups of channels with losses of their own.

(Ren et al. 2023, section 4, figure 3.) An image is cut into P patches; a block mixes tokens, then channels,
then the channels of each group by itself. Blocks of equal shape are scanned with stacked parameters, so
that compile time and, for local rules, memory do not grow with depth.

Parameter tree: `stem`, `blocks` (with pooling also `blocks_1`, …) and `readout`. The leaves of a stack of
blocks have the blocks on their first axis; blocks that change the shape (stem, pooling) are not stacked.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from lfg_jax.estimators.taps import tap
from lfg_jax.losses.heads import Heads
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.targets import Targets
from lfg_jax.models import functional, layers
from lfg_jax.promotion import upcast

NORMS = ('token_in', 'token_out', 'channel_in', 'channel_out', 'group_in', 'group_out', 'head', 'readout')
# Taps have the name of their block in front: 'blocks/after_token'.
TAPS = ('after_token', 'after_channel', 'after_group')
BOUNDARY = 'last_linear'    # a tap too: what the grouped layer of a block under a local loss returns


class Style(NamedTuple):
  """Choices that all blocks of a model share.

  Attributes:
    mixing: `linear` (a P×P matrix) or `conv` (depth-wise `conv_size` × `conv_size`).
    conv_size: height and width of that convolution.
    norm: `layer`, `whole` (all axes of an example) or `batch`.
    norms: which of `NORMS` are there.
    init: `kaiming`, `lecun` or `constant`.
    pool: `average` or `max`, where tokens are pooled.
    norm_derivative: whether a tap's signal goes to its linear layer through the derivative of the norm in
      between, or straight.
    train: batch norm uses the batch's statistics.
    axis_name: mesh axis over which batch norm takes its statistics.
    heads: of local losses.
    precision: 'bfloat16': blocks compute in it, with parameters, statistics of norms, heads, losses and read-out in
      float32; 'float32': all is of the parameters' type.
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
    """In which blocks compute; None: the parameters'."""
    return jnp.bfloat16 if self.precision == 'bfloat16' else None


class BlockSpec(NamedTuple):
  """Sizes of one block. Without token mixing and residual it is a stem."""
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
    """A block whose output has its input's shape can be scanned with others, and has stacked parameters."""
    return self.residual and not self.pool


class _Unit(NamedTuple):
  """Norm → linear → norm: what the linear layer returns, and the second norm of it."""
  linear: jax.Array
  out: jax.Array

  def reshape(self, *shape: int) -> '_Unit':
    return _Unit(*(x.reshape(shape) for x in self))


class LocalBlock(nn.Module):
  """One block with its local head.

  Attributes:
    last: the block's output goes to local losses only, so that its activities influence the losses of their own
      patch and group; otherwise they are credited with all losses of the example.
    cut: how the head's loss is replicated.
    classes: of labels.
  """
  spec: BlockSpec
  style: Style
  classes: int
  cut: Cut = Cut()
  last: bool = False

  @nn.compact
  def __call__(self, x_BxPxC: jax.Array, targets: Targets | None, weight_B: jax.Array
               ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the output [B, P, C] and the weighted local losses [B, P, G] (None without targets)."""
    s, (B, *_) = self.spec, x_BxPxC.shape
    x = self._pool(x_BxPxC) if s.pool else x_BxPxC
    h = x
    if s.mix:
      z = self._unit('token', self._token_linear(), h, weight_B)
      h = nn.relu(self._tap('after_token', z, z.out > 0, 2))
    z = self._unit('channel', self._linear(layers.dense, (s.inputs, s.hidden), (s.hidden,), s.inputs), h, weight_B)
    z = z.reshape(B, s.tokens, s.groups, -1)
    h = nn.relu(self._tap('after_channel', z, z.out > 0, 3))
    width_in, width_out = s.hidden // s.groups, s.channels // s.groups
    grouped = self._linear(layers.grouped, (s.groups, width_in, width_out), (s.groups, width_out), width_in)
    z = self._unit('group', grouped, h, weight_B)
    skip = x.reshape(z.out.shape) if s.residual else jnp.zeros((), z.out.dtype)
    out_BxPxGxC = nn.relu(self._tap('after_group', z, z.out + skip > 0, 3) + skip)
    losses = Head(s, self.style, self.classes, self.cut, name='head')(out_BxPxGxC, targets, weight_B)
    return out_BxPxGxC.reshape(B, s.tokens, s.channels), losses

  def _local_axes(self, axes: int) -> int:
    """With layer norm a last block's activity stays in its patch (and group) up to the loss."""
    if self.style.norm == 'batch':
      return 0
    return axes if self.last and self.style.norm == 'layer' else 1

  def _linear(self, linear: Callable, kernel: tuple, bias: tuple, fan_in: int) -> Callable[[str], layers.Linear]:
    return lambda name: layers.Linear(linear, kernel, bias, fan_in, self.style.init, self.style.dtype, name=name)

  def _token_linear(self) -> Callable[[str], layers.Linear]:
    P, C, k = self.spec.tokens, self.spec.inputs, self.style.conv_size
    if self.style.mixing == 'conv':
      return self._linear(layers.depthwise, (k, k, 1, C), (C,), k * k)
    return self._linear(layers.across_tokens, (P, P), (P, 1), P)

  def _unit(self, name: str, linear: Callable[[str], layers.Linear], x: jax.Array, weight_B: jax.Array) -> '_Unit':
    """Norm → linear → norm."""
    y = linear(name)(_norm(self.style, f'{name}_in', x, weight_B))
    if name == 'group' and self.last:
      y = tap(y, f'{self.name}/{BOUNDARY}', local_axes=3)
    return _Unit(y, _norm(self.style, f'{name}_out', y, weight_B))

  def _tap(self, name: str, z: '_Unit', active: jax.Array, local_axes: int) -> jax.Array:
    """The unit's output, tapped. Its signal can pass the second norm on the way back."""
    source = None if self.style.norm_derivative else z.linear
    return tap(z.out, f'{self.name}/{name}', local_axes=self._local_axes(local_axes), active=active, source=source)

  def _pool(self, x_BxPxC: jax.Array) -> jax.Array:
    B, P, C = x_BxPxC.shape
    side = round(P**0.5)
    cells = x_BxPxC.reshape(B, side // 2, 2, side // 2, 2, C)
    pooled = cells.mean((2, 4)) if self.style.pool == 'average' else cells.max((2, 4))
    return pooled.reshape(B, P // 4, C)


def _norm(style: Style, name: str, x: jax.Array, weight_B: jax.Array) -> jax.Array:
  """To be called inside a compact method: the norm becomes a child of the calling module."""
  if name not in style.norms:
    return x
  return layers.Norm(style.norm, style.train, style.axis_name, name=f'norm_{name}')(x, weight_B)


class Head(nn.Module):
  """The local head: group norm, and losses shared by all patches and groups."""
  spec: BlockSpec
  style: Style
  classes: int
  cut: Cut

  @nn.compact
  def __call__(self, x_BxPxGxC: jax.Array, targets: Targets | None, weight_B: jax.Array) -> jax.Array | None:
    G, C = self.spec.groups, self.spec.channels // self.spec.groups
    heads = self.style.heads
    init = functools.partial(functional.init_head, heads=heads, groups=G, width=C,
                             classes=self.classes, kind=self.style.init)
    features = _norm(self.style, 'head', x_BxPxGxC, weight_B)
    if targets is None and not self.is_initializing():
      return None    # whatever the head's shape: it may be one for the next block's features
    params = {name: self.param(name, lambda key, name=name: init(key)[name])
              for name in ('kernel', 'bias', *['out'] * bool(heads.hidden))}
    if targets is None:
      return None
    feedback: dict[str, Any] = {name: self.get_variable('feedback', name) for name in params
                                if self.has_variable('feedback', name)}
    return heads.losses(features, params, targets, self.cut, feedback)


class Projection(nn.Module):
  """Group norm, mean over tokens → linear, and no local loss: the head of a network that learns end to end."""
  style: Style
  groups: int

  @nn.compact
  def __call__(self, x_NxPxC: jax.Array, weight_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projections [N, K] as anchors, and as candidates (behind the stop-gradient, if there is one)."""
    contrast, (N, P, C) = self.style.heads.contrast, x_NxPxC.shape
    assert contrast
    features = _norm(self.style, 'head', x_NxPxC.reshape(N, P, self.groups, -1), weight_N)
    linear = layers.Linear(layers.dense, (C, contrast.projections), (contrast.projections,), C, self.style.init,
                           name='linear')
    z_NxK = linear(upcast(features).mean(1).reshape(N, C))
    return z_NxK, jax.lax.stop_gradient(z_NxK) if contrast.stop_gradient else z_NxK


class ReadOut(nn.Module):
  """Mean over tokens → norm → linear to the classes."""
  style: Style
  classes: int

  @nn.compact
  def __call__(self, x_BxPxC: jax.Array, weight_B: jax.Array) -> jax.Array:
    C = x_BxPxC.shape[-1]
    h = _norm(self.style, 'readout', upcast(x_BxPxC).mean(1), weight_B)
    self.sow('features', 'mean', h)
    return layers.Linear(layers.dense, (C, self.classes), (self.classes,), C, 'zero', name='linear')(h)


@dataclasses.dataclass(frozen=True)
class Run:
  """`count` blocks of one shape; more than one only where `spec.stacked`."""
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
    project: there is a `Projection` at the end, `head`.

  >>> from lfg_jax.models.sizes import mixer_spec
  >>> model = LocalMixer(mixer_spec('M/8/16', image_shape=(32, 32, 3), classes=10))
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 48)))
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  918770
  """
  spec: MixerSpec
  cut: Cut = Cut(patch=False, group=False)
  project: bool = False

  @nn.compact
  def __call__(self, tokens_BxPxD: jax.Array, targets: Targets | None = None, weight_B: jax.Array | None = None
               ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns logits [B, classes] and the local losses [n, B, P, G] of every stack (None without targets).

    With `project`, what it returns is among the latter as `head`.
    """
    x, stem = tokens_BxPxD, self.spec.runs[0].spec
    chex.assert_shape(x, (None, stem.tokens, stem.inputs), custom_message='tokens are [examples, patches, inputs]')
    weight_B = jnp.ones(x.shape[:1]) if weight_B is None else weight_B
    local: dict[str, Any] = {}
    for run in self.spec.runs:
      stack = nn.scan(LocalBlock, variable_axes={name: 0 for name in COLLECTIONS}, split_rngs={'params': True},
                      in_axes=(nn.broadcast, nn.broadcast), length=run.count)
      block = (stack if run.spec.stacked else LocalBlock)(
          run.spec, self.spec.style, self.spec.classes, self.cut, name=run.name)
      x, local[run.name] = block(x, targets, weight_B)
    if self.project:
      local['head'] = Projection(self.spec.style, self.spec.runs[-1].spec.groups, name='head')(x, weight_B)
    return ReadOut(self.spec.style, self.spec.classes, name='readout')(x, weight_B), local


COLLECTIONS = ('params', 'batch_stats', 'feedback')
