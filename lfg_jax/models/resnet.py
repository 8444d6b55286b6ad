"""A small residual network for images, with losses per block, patch and channel group.

A block is conv 3×3 → group norm → ReLU → conv 3×3 → group norm → + input → ReLU. In every stage but
the first, the first block halves the image and doubles the channels; there the added input is
averaged and padded with zero channels (He et al. 2016, option A). Two blocks in each of four stages
of 64, 128, 256 and 512 channels give ResNet-18.

Convolutions carry an activity to other patches, so a perturbation of the first layer is credited
with all losses of the example, and its noise grows with the size of the whole image.

**On a CPU**, XLA compiles gradients of convolutions in a loop without its fast kernels, 14 times
slower in this model (jax issue 12868). So blocks are not scanned here, a batch stays whole, and
every step is dispatched by itself (`slow_in_loops`). `micro_batch` is a loop too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.fields import Allowed, Field, at_least, between
from lfg_jax.jaxpr.taps import tap
from lfg_jax.local.heads import Heads
from lfg_jax.local.staged import Block, BlockContext, Outcome, Stack, StagedModel, Variables
from lfg_jax.local.targets import Targets
from lfg_jax.models import layers
from lfg_jax.models.registry import Images, check_divides, pixels

DEFAULTS = {
  'stages': Field(
    (1, 1, 1),
    'number of blocks in each stage',
    Allowed(
      lambda counts: bool(counts) and all(isinstance(n, int) and n >= 1 for n in counts),
      'numbers of blocks, each 1 or more',
    ),
  ),
  'channels': Field(16, 'channels of the first stage', between(1, 10**6)),
  'groups': Field(
    4, 'number of channel groups, each normalised separately and with its own losses', at_least(1)
  ),
  'patches': Field(
    4, 'number of rows and of columns of patches with their own losses', at_least(1)
  ),
}
TAPS = {'first': 'first', 'second': 'second'}


def make(fields: dict[str, Any], images: Images, heads: Heads = Heads()) -> StagedModel:
  """The model for the images of a data set; see `registry.Model`."""
  _check(fields, images)
  G, side = fields['groups'], fields['patches']
  shapes = list(_shapes(fields, images))
  new_block = functools.partial(_block, G, side, heads)
  stacks = tuple(
    Stack(name, 1, new_block(stride), False, _flop(height, C, D, stride))
    for name, height, C, D, stride in shapes
  )

  def init(key: jax.Array) -> Variables:
    *keys, readout = jax.random.split(key, len(shapes) + 1)
    params: Variables = {
      name: _init_block(k, C, D, G, images.classes, heads)
      for k, (name, _, C, D, _) in zip(keys, shapes, strict=True)
    }
    params['readout'] = layers.init_read_out(readout, shapes[-1][3], images.classes)
    return {'params': params}

  return StagedModel(
    stacks=stacks,
    init=init,
    prepare=functools.partial(pixels, images=images),
    read_out=layers.read_out,
    input_shape=images.shape,
    taps=TAPS,
    slow_in_loops=True,
  )


def _check(fields: dict[str, Any], images: Images) -> None:
  check_divides(fields['groups'], 'channels', fields['channels'])
  counts, height = fields['stages'], images.shape[0]
  smallest = height // 2 ** (len(counts) - 1)
  if (
    images.shape[0] != images.shape[1]
    or height % 2 ** (len(counts) - 1)
    or (smallest % fields['patches'])
  ):
    raise ValueError(
      f'model.stages has {len(counts)} stages, and model.patches is {fields["patches"]}: an image of '
      f'{height}x{images.shape[1]} cannot be halved {len(counts) - 1} times and then cut into '
      f'{fields["patches"]}x{fields["patches"]} patches; allowed: fewer stages or patches'
    )


def _shapes(fields: dict[str, Any], images: Images) -> Any:
  """(name, height, channels in, channels out, stride) of every block."""
  height, channels = images.shape[0], images.shape[2]
  for stage, count in enumerate(fields['stages']):
    width = fields['channels'] * 2**stage
    for n in range(count):
      stride = 2 if stage and not n else 1
      yield f'stage_{stage}_block_{n}', height, channels, width, stride
      height, channels = height // stride, width


def _flop(height: int, C: int, D: int, stride: int) -> dict[str, int]:
  positions = (height // stride) ** 2
  return {'first': 2 * 9 * positions * C * D, 'second': 2 * 9 * positions * D * D}


def _init_block(key: jax.Array, C: int, D: int, G: int, classes: int, heads: Heads) -> Any:
  first, second, head = jax.random.split(key, 3)
  return {
    'first': layers.init(first, (3, 3, C, D), (D,), 9 * C, 'kaiming'),
    'second': layers.init(second, (3, 3, D, D), (D,), 9 * D, 'kaiming'),
    'head': layers.init_head(head, heads, G, D // G, classes),
  }


def _block(G: int, side: int, heads: Heads, stride: int) -> Block:
  first, second = (functools.partial(layers.convolution, stride=s) for s in (stride, 1))

  def block(
    variables: Variables, x_BxHxWxC: jax.Array, targets: Targets, context: BlockContext
  ) -> Outcome:
    # Convolutions and norms carry an activity to all patches and groups: credit as `context.last` allows
    # would be too narrow.
    y = layers.layer(variables, 'first', first, x_BxHxWxC)
    h = _group_norm(y, G)
    h = jax.nn.relu(tap(h, f'{context.name}/first', active=h > 0))
    y = layers.layer(variables, 'second', second, h)
    y = _group_norm(tap(y, f'{context.name}/second'), G)
    out = jax.nn.relu(y + _shortcut(x_BxHxWxC, y.shape[-1], stride))
    features = layers.layer_norm(_patches(out, side, G))
    return out, layers.losses(variables, heads, features, targets, context.cut), {}

  return block


def _group_norm(x_BxHxWxC: jax.Array, G: int) -> jax.Array:
  grouped = x_BxHxWxC.reshape(*x_BxHxWxC.shape[:3], G, -1)
  return layers.layer_norm(grouped, (1, 2, 4)).reshape(x_BxHxWxC.shape)


def _shortcut(x_BxHxWxC: jax.Array, channels: int, stride: int) -> jax.Array:
  """The input, averaged to the output's size and padded with zero channels."""
  B, H, W, C = x_BxHxWxC.shape
  if channels < C or (stride == 1 and channels != C):
    return jnp.zeros((), x_BxHxWxC.dtype)  # the very first block: colours are not channels
  cells = x_BxHxWxC.reshape(B, H // stride, stride, W // stride, stride, C).mean((2, 4))
  return jnp.pad(cells, ((0, 0), (0, 0), (0, 0), (0, channels - C)))


def _patches(x_BxHxWxC: jax.Array, side: int, G: int) -> jax.Array:
  """[B, P, G, C/G]: means over the cells of a grid of side × side patches."""
  B, H, W, _ = x_BxHxWxC.shape
  cells = x_BxHxWxC.reshape(B, side, H // side, side, W // side, -1).mean((2, 4))
  return cells.reshape(B, side * side, G, -1)
