"""Sizes of LocalMixers, by name ("M/8/16": size, patches per side, groups) or by numbers."""

import dataclasses
import re
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp

from lfg_jax.local.heads import Heads
from lfg_jax.models.registry import normalised

CHANNELS = {'S': 256, 'M': 512, 'L': 2048}
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


def _check(ok: bool, message: str) -> None:
  if not ok:
    raise ValueError(message)


def parse(name: str) -> tuple[str, int, int]:
  """'M/8/16' → ('M', 8, 16)."""
  match = re.fullmatch(r'([SML])/(\d+)/(\d+)', name)
  if not match or '0' in match.groups():
    raise ValueError(
      f"model.size is {name!r}; allowed: SIZE/PATCHES/GROUPS with SIZE one of S, M, L, as in 'M/8/16'"
    )
  return match[1], int(match[2]), int(match[3])


def mixer_spec(
  size: str = 'M/8/16',
  *,
  image_shape: tuple[int, int, int],
  classes: int,
  blocks: int | None = None,
  channels: int | None = None,
  hidden: int | None = None,
  pool_every: int = 0,
  channel_ratio: int = 2,
  group_ratio: int = 2,
  norms: tuple[str, ...] = NORMS,
  **style: Any,
) -> MixerSpec:
  """Sizes and style of a LocalMixer.

  Args:
    image_shape: (height, width, colours).
    classes: number of outputs of read-out and local heads.
    style: further fields of `Style`. `mixer.DEFAULTS` explains all others.

  Raises:
    ValueError: one line, for sizes that do not divide.

  >>> spec = mixer_spec('M/8/16', image_shape=(32, 32, 3), classes=10)
  >>> [(run.name, run.count) for run in spec.runs]
  [('stem', 1), ('blocks', 3)]
  """
  letter, side, groups = parse(size)
  blocks = (1 if side == 1 else 4) if blocks is None else blocks
  channels = CHANNELS[letter] if channels is None else channels
  hidden = channels if hidden is None else hidden
  height, width, colours = image_shape
  _check(
    height % side == 0 and width % side == 0,
    f'model.size asks for {side}x{side} patches, which do not divide an image of {height}x{width}',
  )
  _check_groups(channels, hidden, groups)
  full = Style(norms=tuple(norms), **style)
  _check(
    full.mixing != 'conv' or 1 <= full.conv_size <= height,
    f'model.conv_size is {full.conv_size}; allowed: 1 … {height}, the height of an image',
  )
  stem = BlockSpec(
    side * side, height * width * colours // side**2, hidden, channels, groups, mix=False
  )
  runs = [Run('stem', stem, 1)]
  for index in range(1, blocks):
    last = runs[-1].spec
    spec = last._replace(inputs=last.channels, mix=True, pool=False)
    if pool_every and index % pool_every == 0:
      spec = _pooled(spec, channel_ratio, group_ratio)
    if spec == last and spec.stacked:
      runs[-1] = dataclasses.replace(runs[-1], count=runs[-1].count + 1)
    else:
      number = len(runs) - 1
      runs.append(Run(f'blocks_{number}' if number else 'blocks', spec, 1))
  return MixerSpec(tuple(runs), full, classes)


def _check_groups(channels: int, hidden: int, groups: int) -> None:
  for what, width in (('channels', channels), ('hidden', hidden)):
    _check(width % groups == 0, f'{groups} groups do not divide model.{what} = {width}')


def _pooled(spec: BlockSpec, channel_ratio: int, group_ratio: int) -> BlockSpec:
  side = round(spec.tokens**0.5)
  _check(
    side % 2 == 0,
    f'model.pool_every asks to pool a grid of {side}x{side} tokens, which 2 does not divide',
  )
  wider = spec._replace(
    tokens=spec.tokens // 4,
    hidden=spec.hidden * channel_ratio,
    pool=True,
    channels=spec.channels * channel_ratio,
    groups=spec.groups * group_ratio,
  )
  _check_groups(wider.channels, wider.hidden, wider.groups)
  return wider


def patches(
  image_BxHxWxC: jax.Array, side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """uint8 images [B, H, W, C] → normalised patches [B, side·side, (H/side)·(W/side)·C].

  >>> patches(jax.numpy.zeros((2, 8, 8, 1), jax.numpy.uint8), 4, (0.5,), (0.5,))[0, 0].tolist()
  [-1.0, -1.0, -1.0, -1.0]
  """
  x = normalised(image_BxHxWxC, mean, std)
  return einops.rearrange(x, 'b (p h) (q w) c -> b (p q) (h w c)', p=side, q=side)
