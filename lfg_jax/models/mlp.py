"""A multi-layer perceptron with local losses: the model to read first.

A block is norm → linear → ReLU → grouped linear → norm → ReLU, with a local head on the groups.
"""

from typing import Any

import jax

from lfg_jax.fields import Field, between
from lfg_jax.jaxpr.taps import tap
from lfg_jax.local.heads import Heads
from lfg_jax.local.staged import BlockContext, Outcome, Stack, StagedModel, Variables
from lfg_jax.local.targets import Targets
from lfg_jax.models import layers
from lfg_jax.models.registry import Images, check_divides, pixels

DEFAULTS = {
  'blocks': Field(3, 'number of blocks, including the stem', between(1, 10_000)),
  'channels': Field(256, 'channels of every layer', between(1, 10**6)),
  'groups': Field(8, 'number of channel groups, each with its own losses', between(1, 10_000)),
}
TAPS = {'hidden': 'hidden', 'out': 'out'}


def make(fields: dict[str, Any], images: Images, heads: Heads = Heads()) -> StagedModel:
  """The model for the images of a data set; see `registry.Model`."""
  C, G, more = fields['channels'], fields['groups'], fields['blocks'] - 1
  check_divides(G, 'channels', C)

  def init_block(key: jax.Array, inputs: int = C) -> Any:
    first, second, head = jax.random.split(key, 3)
    return {
      'hidden': layers.init(first, (inputs, C), (C,), inputs),
      'out': layers.init(second, (G, C // G, C // G), (G, C // G), C // G),
      'head': layers.init_head(head, heads, G, C // G, images.classes),
    }

  def init(key: jax.Array) -> Variables:
    stem, blocks, readout = jax.random.split(key, 3)
    rest = {'blocks': layers.stacked(init_block, blocks, more)} if more else {}
    last = {'readout': layers.init_read_out(readout, C, images.classes)}
    return {'params': {'stem': init_block(stem, images.size), **rest, **last}}

  def block(
    variables: Variables, x_Bx1xC: jax.Array, targets: Targets, context: BlockContext
  ) -> Outcome:
    local_axes, layer = 3 if context.last else 1, layers.layer
    h = layer(variables, 'hidden', layers.dense, layers.layer_norm(x_Bx1xC))
    h = h.reshape(*h.shape[:2], G, C // G)
    h = jax.nn.relu(tap(h, f'{context.name}/hidden', local_axes=local_axes, active=h > 0))
    y = tap(
      layer(variables, 'out', layers.grouped, h), f'{context.name}/out', local_axes=local_axes
    )
    y = jax.nn.relu(layers.layer_norm(y))
    losses = layers.losses(variables, heads, layers.layer_norm(y), targets, context.cut)
    return y.reshape(*y.shape[:2], C), losses, {}

  flop = {'hidden': 2 * C * C, 'out': 2 * C * C // G}
  stem = Stack('stem', 1, block, False, {**flop, 'hidden': 2 * images.size * C})
  return StagedModel(
    stacks=(stem, Stack('blocks', more, block, True, flop)) if more else (stem,),
    init=init,
    prepare=lambda image: pixels(image, images).reshape(image.shape[0], 1, -1),
    read_out=layers.read_out,
    input_shape=(1, images.size),
    taps=TAPS,
    grouped=('out',),
  )
