"""LocalMixer: an MLP-Mixer in which every block ends in channel groups with their own losses.

(Ren et al. 2023, section 4, figure 3.) An image is cut into P patches. A block mixes tokens, then
channels, then the channels of each group by itself. Blocks of equal shape are scanned with stacked
parameters, so compile time does not grow with depth, and with local rules neither does memory.

The parameter tree has `stem`, `blocks` (with pooling also `blocks_1`, …) and `readout`. The leaves
of a stack have the blocks on their first axis; blocks that change the shape (stem, pooling) are not
stacked.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from lfg_jax.fields import Allowed, Field, at_least, between, one_of
from lfg_jax.jaxpr.taps import tap
from lfg_jax.local.heads import Heads
from lfg_jax.local.staged import BlockContext, Outcome, Stack, StagedModel, Variables, variables_of
from lfg_jax.local.targets import Targets
from lfg_jax.models import layers
from lfg_jax.models.registry import Images
from lfg_jax.models.sizes import NORMS, BlockSpec, MixerSpec, Run, Style, mixer_spec, parse, patches
from lfg_jax.promotion import upcast

PyTree = Any
# The block's name is put in front: 'blocks/after_token'.
TAPS = {'after_token': 'token', 'after_channel': 'channel', 'after_group': 'group'}
BOUNDARY = 'last_linear'  # also a tap: the grouped layer's output, in a block with a local loss
DEFAULTS = {
  'size': Field(
    'M/8/16',
    'SIZE/PATCHES/GROUPS, with PATCHES per side; S, M, L have 256, 512, 2048 channels; there is 1 '
    'block with one patch, and 4 with more',
  ),
  'blocks': Field(None, 'with the stem; None: as the size implies', between(1, 10_000), int),
  'channels': Field(None, "of a block's output; None: as the size implies", at_least(1), int),
  'hidden': Field(None, 'channels before the grouped layer; None: channels', at_least(1), int),
  'pool_every': Field(0, 'pool tokens 2×2 → 1 after every so many blocks; 0: never', at_least(0)),
  'channel_ratio': Field(2, 'factor by which channels grow at every pooling', at_least(1)),
  'group_ratio': Field(2, 'factor by which groups grow at every pooling', at_least(1)),
  'pool': Field('average', 'how tokens are pooled', one_of(('average', 'max'))),
  'norm': Field(
    'layer', 'over channels, an example or the batch', one_of(('layer', 'whole', 'batch'))
  ),
  'norm_derivative': Field(True, "whether a tap's signal passes the derivative of the norm"),
  'mixing': Field('linear', 'of tokens: P×P matrix or depth-wise', one_of(('linear', 'conv'))),
  'conv_size': Field(3, 'height and width of the convolution of mixing=conv'),
  'init': Field('lecun', 'first weights', one_of(('kaiming', 'lecun', 'constant'))),
  'norms': Field(
    NORMS,
    'the norms to use, with commas',
    Allowed(lambda names: all(name in NORMS for name in names), f'some of {", ".join(NORMS)}'),
  ),
  'precision': Field(
    'float32',
    'of blocks; with bfloat16, parameters, norm statistics, heads and losses are in float32',
    one_of(('float32', 'bfloat16')),
  ),
}


def make(fields: dict[str, Any], images: Images, heads: Heads = Heads()) -> StagedModel:
  """The model for the images of a data set; see `registry.Model`."""
  size = fields['size']
  numbers = {name: value for name, value in fields.items() if name != 'size'}
  spec = mixer_spec(
    size,
    image_shape=images.shape,
    classes=images.classes,
    heads=heads,
    axis_name=images.axis_name,
    **numbers,
  )
  side = parse(size)[1]
  return staged(spec, functools.partial(patches, side=side, mean=images.mean, std=images.std))


def staged(spec: MixerSpec, prepare: Callable[[jax.Array], jax.Array]) -> StagedModel:
  """The staged model with these sizes.

  Args:
    prepare: images → patches [B, P, D].

  >>> model = staged(mixer_spec('M/8/16', image_shape=(32, 32, 3), classes=10), lambda image: image)
  >>> [(stack.name, stack.count) for stack in model.stacks]
  [('stem', 1), ('blocks', 3)]
  >>> variables = jax.eval_shape(model.init, jax.random.key(0))
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  918770
  """
  style, stem = spec.style, spec.runs[0].spec
  conv_size = style.conv_size if style.mixing == 'conv' else None

  def variant(*, train: bool = True, project: bool = False) -> StagedModel:
    heads = style.heads._replace(project=project)
    changed = style._replace(train=train, heads=heads)
    return staged(dataclasses.replace(spec, style=changed), prepare)

  return StagedModel(
    stacks=tuple(
      Stack(
        run.name,
        run.count,
        functools.partial(block, run.spec, style),
        run.spec.stacked,
        block_flop(run.spec, conv_size),
      )
      for run in spec.runs
    ),
    init=functools.partial(init, spec),
    prepare=prepare,
    read_out=functools.partial(read_out, style),
    variant=variant,
    input_shape=(stem.tokens, stem.inputs),
    taps=TAPS,
    grouped=('group',) if style.norm == 'layer' else (),
    boundary=BOUNDARY,
    mixes_examples=style.norm == 'batch',
    project=functools.partial(project, spec) if style.heads.project else None,
    contrast=style.heads.contrast,
  )


# --- parameters -----------------------------------------------------------------------------------


class _Linear(NamedTuple):
  """A linear map, and the shapes of its parameters."""

  product: Callable[[jax.Array, jax.Array], jax.Array]
  kernel: tuple[int, ...]
  bias: tuple[int, ...]
  fan_in: int


def _linears(spec: BlockSpec, style: Style) -> dict[str, _Linear]:
  """A block's linear layers, in their order."""
  P, G, k = spec.tokens, spec.groups, style.conv_size
  C, H, D = spec.inputs, spec.hidden, spec.channels // spec.groups
  found = {}
  if spec.mix and style.mixing == 'conv':
    found['token'] = _Linear(layers.depthwise, (k, k, 1, C), (C,), k * k)
  elif spec.mix:
    found['token'] = _Linear(layers.across_tokens, (P, P), (P, 1), P)
  found['channel'] = _Linear(layers.dense, (C, H), (H,), C)
  found['group'] = _Linear(layers.grouped, (G, H // G, D), (G, D), H // G)
  return found


def init(spec: MixerSpec, key: jax.Array) -> Variables:
  """All variables: 'params' and, with batch norm, 'batch_stats'."""
  style, width = spec.style, spec.runs[-1].spec.channels
  heads, params, stats = style.heads, {}, {}
  for run in spec.runs:
    one = functools.partial(_init_block, run, style, spec.classes)
    params[run.name] = layers.stacked(one, key, run.count) if run.spec.stacked else one(key)
    statistics = _init_statistics(run.spec, style)
    if run.spec.stacked:
      statistics = jax.tree.map(lambda leaf, n=run.count: jnp.stack([leaf] * n), statistics)
    stats[run.name] = statistics
  params['readout'] = layers.init_read_out(key, width, spec.classes)
  stats['readout'] = _statistics(style, {'readout': width})
  if heads.project:
    head_key = _key_of(key, 'head', 'linear')
    params['head'] = layers.init_projection(head_key, width, heads, style.init)
    stats['head'] = _statistics(style, {'head': width})
  kept = {name: tree for name, tree in stats.items() if tree}
  return {'params': params, **({'batch_stats': kept} if kept else {})}


def _init_block(run: Run, style: Style, classes: int, key: jax.Array) -> PyTree:
  spec = run.spec
  key_of = functools.partial(_key_of, key, run.name, stacked=spec.stacked)
  params: dict[str, PyTree] = {
    name: layers.init(key_of(name), linear.kernel, linear.bias, linear.fan_in, style.init)
    for name, linear in _linears(spec, style).items()
  }
  width = spec.channels // spec.groups
  head = layers.init_head(key_of('head'), style.heads, spec.groups, width, classes, style.init)
  return {**params, 'head': head}


def _key_of(key: jax.Array, *path: str, stacked: bool = False) -> jax.Array:
  """A layer's key, by its name: a variant with further layers keeps the values of the others.

  The byte at the end is the number of the first parameter of a Flax module, which a scan counts
  twice. With it, results of before, when a LocalMixer was such a module, can be reproduced.
  """
  digest = hashlib.sha1(''.join(path).encode() + (b'\3' if stacked else b'\1')).digest()
  return jax.random.fold_in(key, jnp.uint32(int.from_bytes(digest[:4])))


def _init_statistics(spec: BlockSpec, style: Style) -> PyTree:
  """A block's running statistics, with batch norm."""
  inner = {
    **({'token_in': spec.inputs, 'token_out': spec.inputs} if spec.mix else {}),
    'channel_in': spec.inputs,
    'channel_out': spec.hidden,
    'group_in': spec.hidden,
    'group_out': spec.channels,
  }
  head = _statistics(style, {'head': spec.channels})
  return {**_statistics(style, inner), **({'head': head} if head else {})}


def _statistics(style: Style, widths: dict[str, int]) -> PyTree:
  return {
    f'norm_{name}': layers.init_statistics(width)
    for name, width in widths.items()
    if style.norm == 'batch' and name in style.norms
  }


# --- functions ------------------------------------------------------------------------------------


def block(
  spec: BlockSpec,
  style: Style,
  variables: Variables,
  x_BxPxC: jax.Array,
  targets: Targets,
  context: BlockContext,
) -> Outcome:
  """One block with its local head; see `staged.Block`.

  If the block's output goes only to local losses, activities influence only the losses of their own
  patch and group. Otherwise they are credited with all of the example's.
  """
  s, B = spec, x_BxPxC.shape[0]
  chex.assert_shape(
    x_BxPxC,
    (None, s.tokens * (4 if s.pool else 1), s.inputs),
    custom_message='tokens are [examples, patches, inputs]',
  )
  linears, norms = _linears(s, style), _Norms(style, variables, targets.weight_B)

  def unit(name: str, h: jax.Array) -> _Unit:
    """Norm → linear → norm."""
    y = layers.layer(variables, name, linears[name].product, norms(f'{name}_in', h), style.dtype)
    if name == 'group' and context.last:
      y = tap(y, f'{context.name}/{BOUNDARY}', local_axes=3)
    return _Unit(y, norms(f'{name}_out', y))

  def tapped(name: str, z: _Unit, active: jax.Array, local_axes: int) -> jax.Array:
    """The unit's output. Its signal can bypass the second norm."""
    axes = _local_axes(style, context, local_axes)
    source = None if style.norm_derivative else z.linear
    return tap(z.out, f'{context.name}/{name}', local_axes=axes, active=active, source=source)

  x = _pooled(x_BxPxC, style.pool) if s.pool else x_BxPxC
  h = x
  if s.mix:
    z = unit('token', h)
    h = jax.nn.relu(tapped('after_token', z, z.out > 0, 2))
  z = unit('channel', h)
  z = _Unit(*(y.reshape(B, s.tokens, s.groups, -1) for y in z))
  z = unit('group', jax.nn.relu(tapped('after_channel', z, z.out > 0, 3)))
  skip = x.reshape(z.out.shape) if s.residual else jnp.zeros((), z.out.dtype)
  out_BxPxGxC = jax.nn.relu(tapped('after_group', z, z.out + skip > 0, 3) + skip)

  in_head = _Norms(style, variables_of(variables, 'head'), targets.weight_B)
  features = in_head('head', out_BxPxGxC)
  losses = layers.losses(variables, style.heads, features, targets, context.cut)
  updates = {**norms.updates, **({'head': in_head.updates} if in_head.updates else {})}
  return out_BxPxGxC.reshape(B, s.tokens, s.channels), losses, _as_statistics(updates)


class _Unit(NamedTuple):
  """Outputs of a linear layer, and of the norm after it."""

  linear: jax.Array
  out: jax.Array


class _Norms:
  """The norms of one block, by name; those that are left out do nothing.

  Attributes:
    updates: running statistics of batch norms, as far as they have been called.
  """

  def __init__(self, style: Style, variables: Variables, weight_B: jax.Array):
    self._style, self._weight_B = style, weight_B
    self._running = variables.get('batch_stats', {})
    self.updates: dict[str, PyTree] = {}

  def __call__(self, name: str, x: jax.Array) -> jax.Array:
    style, key = self._style, f'norm_{name}'
    if name not in style.norms:
      return x
    if style.norm != 'batch':
      return layers.layer_norm(x, tuple(range(1, x.ndim)) if style.norm == 'whole' else (-1,))
    y, self.updates[key] = layers.batch_norm(
      x, self._weight_B, self._running[key], train=style.train, axis_name=style.axis_name
    )
    return y


def _as_statistics(updates: dict[str, PyTree]) -> Variables:
  return {'batch_stats': updates} if updates else {}


def _local_axes(style: Style, context: BlockContext, axes: int) -> int:
  """With layer norm, a last block's activity stays in its patch (and group) up to the loss."""
  if style.norm == 'batch':
    return 0
  return axes if context.last and style.norm == 'layer' else 1


def _pooled(x_BxPxC: jax.Array, kind: str) -> jax.Array:
  B, P, C = x_BxPxC.shape
  side = round(P**0.5)
  cells = x_BxPxC.reshape(B, side // 2, 2, side // 2, 2, C)
  pooled = cells.mean((2, 4)) if kind == 'average' else cells.max((2, 4))
  return pooled.reshape(B, P // 4, C)


def read_out(
  style: Style, variables: Variables, x_BxPxC: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array, Variables]:
  """Mean over tokens → norm → linear: logits, features [B, C] and updates."""
  norms = _Norms(style, variables, weight_B)
  features = norms('readout', upcast(x_BxPxC).mean(1))
  logits = layers.layer(variables, 'linear', layers.dense, features)
  return logits, features, _as_statistics(norms.updates)


def project(
  spec: MixerSpec, variables: Variables, x_BxPxC: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array, Variables]:
  """Group norm → mean over tokens → linear: anchors, candidates and updates.

  This is the head of a network that learns contrastively end to end; see `StagedModel.project`.
  """
  (B, P, C), style = x_BxPxC.shape, spec.style
  norms = _Norms(style, variables, weight_B)
  features = norms('head', x_BxPxC.reshape(B, P, spec.runs[-1].spec.groups, -1))
  mean_BxC = upcast(features).mean(1).reshape(B, C)
  z_BxK = layers.layer(variables, 'linear', layers.dense, mean_BxC)
  return z_BxK, layers.candidates(z_BxK, style.heads), _as_statistics(norms.updates)


def block_flop(spec: BlockSpec, conv_size: int | None = None) -> dict[str, int]:
  """Floating-point operations per example of a block's linear maps, by the tap after each.

  A multiplication and an addition count as two; norms and ReLUs are not counted.

  >>> block_flop(BlockSpec(tokens=64, inputs=512, hidden=512, channels=512, groups=16))
  {'after_token': 4194304, 'after_channel': 33554432, 'after_group': 2097152}
  """
  token = 2 * spec.tokens * spec.inputs * (conv_size**2 if conv_size else spec.tokens)
  channel = 2 * spec.tokens * spec.inputs * spec.hidden
  group = 2 * spec.tokens * spec.hidden * spec.channels // spec.groups
  of_tokens = {'after_token': token} if spec.mix else {}
  return {**of_tokens, 'after_channel': channel, 'after_group': group}
