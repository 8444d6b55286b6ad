"""The LocalMixer as a staged model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.fields import Allowed, Field, at_least, between, one_of
from lfg_jax.losses.heads import Heads
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.staged import Block, Outcome, Place, Stack, StagedModel, Variables
from lfg_jax.losses.targets import Targets
from lfg_jax.models.block import BOUNDARY, NORMS, TAPS, BlockSpec, LocalBlock
from lfg_jax.models.mixer import LocalMixer, MixerSpec, Projection, ReadOut, Run
from lfg_jax.models.registry import Images
from lfg_jax.models.sizes import mixer_spec, parse, patches

# The layer through which a tap's guess passes.
GUESSED = {'after_channel': 'group', 'after_token': 'channel'}
KINDS = ('params', 'batch_stats')
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

  >>> from lfg_jax.models.sizes import mixer_spec
  >>> model = staged(mixer_spec('M/8/16', image_shape=(32, 32, 3), classes=10), lambda image: image)
  >>> [(stack.name, stack.count) for stack in model.stacks]
  [('stem', 1), ('blocks', 3)]
  """
  style, stem = spec.style, spec.runs[0].spec

  def init(key: jax.Array) -> Variables:
    tokens = jnp.zeros((1, stem.tokens, stem.inputs))
    variables = LocalMixer(spec).init(key, tokens)
    return {kind: tree for kind, tree in dict(variables).items() if kind in KINDS}

  def read_out(
    variables: Variables, x: jax.Array, weight_B: jax.Array
  ) -> tuple[jax.Array, jax.Array, Variables]:
    module, kept = ReadOut(style, spec.classes), ('batch_stats', 'features')
    logits, updates = module.apply(variables, x, weight_B, mutable=kept)
    features = updates['features']['mean'][0]
    return logits, features, {kind: updates[kind] for kind in updates if kind != 'features'}

  def to_space(
    variables: Variables, x: jax.Array, weight_B: jax.Array
  ) -> tuple[jax.Array, jax.Array, Variables]:
    module = Projection(style, spec.runs[-1].spec.groups)
    (z, candidates), updates = module.apply(variables, x, weight_B, mutable=('batch_stats',))
    return z, candidates, dict(updates)

  def variant(*, train: bool = True, fused: bool = True, project: bool = False) -> StagedModel:
    heads = style.heads._replace(fused=fused, project=project)
    changed = style._replace(train=train, heads=heads)
    return staged(dataclasses.replace(spec, style=changed), prepare)

  digits = 2 if style.dtype else 4
  return StagedModel(
    stacks=tuple(_stack(spec, run) for run in spec.runs),
    init=init,
    prepare=prepare,
    read_out=read_out,
    variant=variant,
    input_shape=(stem.tokens, stem.inputs),
    classes=spec.classes,
    taps=TAPS,
    guessed=GUESSED,
    boundary=(BOUNDARY, TAPS[-1]),
    group_axis=_group_axis if style.norm == 'layer' else lambda path, credit: None,
    mixes_examples=style.norm == 'batch',
    rounds=style.dtype is not None,
    activity_bytes=digits * max(run.spec.tokens * run.spec.channels for run in spec.runs),
    contrast=style.heads.contrast,
    project=to_space if style.heads.project else None,
  )


def _stack(spec: MixerSpec, run: Run) -> Stack:
  conv_size = spec.style.conv_size if spec.style.mixing == 'conv' else None
  return Stack(
    run.name, run.count, _block(spec, run.spec), run.spec.stacked, block_flop(run.spec, conv_size)
  )


def _block(spec: MixerSpec, block_spec: BlockSpec) -> Block:
  def block(variables: Variables, x: jax.Array, targets: Targets, at: Place) -> Outcome:
    cut = at.cut or Cut()
    module = LocalBlock(block_spec, spec.style, spec.classes, cut, at.last, name=at.name)
    shown = None if at.cut is None else targets
    (y, losses), updates = module.apply(
      variables, x, shown, targets.weight_B, mutable=('batch_stats',)
    )
    return y, losses, dict(updates)

  return block


def _group_axis(path: tuple[str, ...], credit: str) -> int | None:
  layer, leaf = path[0], path[-1]
  if layer == 'group':
    return 0
  if layer == 'channel' and credit == 'paper':
    return 1 if leaf == 'kernel' else 0
  return None


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
