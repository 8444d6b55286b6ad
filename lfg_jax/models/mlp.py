"""A multi-layer perceptron with local losses: the model to read first.

A block is norm → linear → ReLU → grouped linear → norm → ReLU, with a local head on the groups.
"""

from typing import Any

import jax

from lfg_jax.estimators.taps import tap
from lfg_jax.losses.heads import Heads
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.staged import Stack, StagedModel, Variables
from lfg_jax.losses.targets import Targets
from lfg_jax.models import functional, layers
from lfg_jax.models.registry import Images, check_divides, check_range, pixels

DEFAULTS: dict[str, Any] = {'blocks': 3, 'channels': 256, 'groups': 8}
TAPS = ('hidden', 'out')


def make(
  fields: dict[str, Any], images: Images, heads: Heads = Heads(), project: bool = False
) -> StagedModel:
  """The model for the images of a data set; see `registry.Model`.

  Fields:
    blocks: number of blocks, including the stem.
    channels: of every layer.
    groups: number of channel groups, each with its own losses.
  """
  C, G, inputs = fields['channels'], fields['groups'], images.size
  check_divides(G, 'channels', C)
  check_range('blocks', fields['blocks'], 1)
  contrast = heads.contrast

  def init_block(key: jax.Array, inputs: int) -> Any:
    first, second, head = jax.random.split(key, 3)
    return {
      'hidden': functional.init(first, (inputs, C), (C,), inputs),
      'out': functional.init(second, (G, C // G, C // G), (G, C // G), C // G),
      'head': functional.init_head(head, heads, G, C // G, images.classes),
    }

  def init(key: jax.Array) -> Variables:
    stem, blocks, readout, head = jax.random.split(key, 4)
    read = functional.init(readout, (C, images.classes), (images.classes,), C, 'zero')
    params = {'stem': init_block(stem, inputs), 'readout': {'linear': read}}
    if fields['blocks'] > 1:
      params['blocks'] = functional.stacked(
        lambda k: init_block(k, C), blocks, fields['blocks'] - 1
      )
    if contrast and project:
      params['head'] = functional.init_projection(head, C, contrast)
    return {'params': params}

  def block(
    variables: Variables,
    x_Bx1xC: jax.Array,
    targets: Targets,
    *,
    name: str,
    cut: Cut | None,
    last: bool,
  ) -> tuple[jax.Array, jax.Array | None, Variables]:
    params, feedback = variables['params'], variables.get('feedback', {})
    local_axes, by_group = 3 if last else 1, (*x_Bx1xC.shape[:2], G, -1)
    h = functional.affine(
      layers.dense, params['hidden'], layers.layer_norm(x_Bx1xC), feedback.get('hidden')
    ).reshape(by_group)
    h = jax.nn.relu(tap(h, f'{name}/hidden', local_axes=local_axes, active=h > 0))
    y = functional.affine(layers.grouped, params['out'], h, feedback.get('out'))
    y = layers.layer_norm(tap(y, f'{name}/out', local_axes=local_axes))
    y = jax.nn.relu(y)
    losses = (
      None
      if cut is None
      else heads.losses(layers.layer_norm(y), params['head'], targets, cut, feedback.get('head'))
    )
    return y.reshape(*x_Bx1xC.shape[:2], C), losses, {}

  grouped = 2 * C * C // G
  stem = Stack('stem', 1, block, False, {'hidden': 2 * inputs * C, 'out': grouped})
  rest = Stack('blocks', fields['blocks'] - 1, block, True, {'hidden': 2 * C * C, 'out': grouped})
  return StagedModel(
    stacks=(stem, rest) if rest.count else (stem,),
    init=init,
    prepare=lambda image: pixels(image, images).reshape(image.shape[0], 1, -1),
    read_out=functional.read_out,
    input_shape=(1, inputs),
    classes=images.classes,
    taps=TAPS,
    guessed={'hidden': 'out'},
    boundary=('out', 'out'),
    activity_bytes=4 * max(inputs, C),
    group_axis=lambda path, credit: 0 if path[0] == 'out' else None,
    contrast=contrast,
    project=functional.projection(contrast) if contrast and project else None,
    variant=lambda train=True, fused=True, project=False: make(
      fields, images, heads._replace(fused=fused), project
    ),
  )
