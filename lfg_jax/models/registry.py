"""Models by name or from your own file, and what they need to know about the images.

A model is a Python module with `DEFAULTS`, the fields of config.model: each a default (a type stands
for a field that may be None) or a `lfg_jax.fields.Field`, which also has a meaning and a range;
`TAPS`, its taps, as in `StagedModel`; and `make`, see `Model`.
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lfg_jax import user_files
from lfg_jax.errors import UserError
from lfg_jax.fields import Field
from lfg_jax.local.heads import Heads
from lfg_jax.local.staged import StagedModel, Variables, no_variant
from lfg_jax.models import layers

MODELS = ('mixer', 'mlp', 'resnet')


class Images(NamedTuple):
  """What a model needs to know about a data set.

  Attributes:
    shape: (height, width, colours).
    mean, std: for normalising the colours.
    axis_name: mesh axis over which the batch is sharded.
  """

  shape: tuple[int, int, int]
  classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  axis_name: str | None = None

  @property
  def size(self) -> int:
    """How many numbers an image has."""
    height, width, colours = self.shape
    return height * width * colours


class Model(Protocol):
  """A Python module that defines a model."""

  DEFAULTS: dict[str, Any]
  TAPS: dict[str, str | None]

  def make(self, fields: dict[str, Any], images: Images, heads: Heads) -> StagedModel:
    """The staged model with these fields, which have the types of the defaults.

    Raises:
      ValueError: a value is not allowed. The message is one line and calls the field 'model.FIELD'.
    """


def find(name: str, path: str | None = None) -> Model:
  """The model with this name, or the one in the file `path`.

  Raises:
    UserError: there is no such model, or the file does not define one.

  >>> find('mlp').TAPS
  {'hidden': 'hidden', 'out': 'out'}
  """
  if path is None:
    if name not in MODELS:
      raise UserError(
        f'model.name is {name!r}; allowed: {", ".join(MODELS)}, or a file of your '
        'own: --config.model.module=FILE.py'
      )
    return importlib.import_module(f'lfg_jax.models.{name}')  # type: ignore[return-value]
  own: Any = user_files.load('model.module', path, ('DEFAULTS', 'TAPS', 'make'))
  return own


def fields_of(model: Model) -> dict[str, Field]:
  """A model's fields, with what is known of them.

  >>> fields_of(find('mlp'))['channels'].default
  256
  """
  return {
    name: entry
    if isinstance(entry, Field)
    else Field(None, kind=entry)
    if isinstance(entry, type)
    else Field(entry)
    for name, entry in model.DEFAULTS.items()
  }


def build(
  model: Model, fields: dict[str, Any], images: Images, heads: Heads = Heads()
) -> StagedModel:
  """`model.make(…)`, completed with what follows from the heads, and with its variants.

  What a model without batch norm does is the same in evaluation.

  >>> fields, images = {'blocks': 3, 'channels': 8, 'groups': 2}, Images((8, 8, 1), 10, (0.5,), (0.3,))
  >>> build(find('mlp'), fields, images).variant(train=False).depth
  3
  """
  made = dataclasses.replace(model.make(fields, images, heads), contrast=heads.contrast)
  if heads.project and made.project is None:
    made = _with_projection(made, heads)

  def variant(*, train: bool = True, project: bool = False) -> StagedModel:
    del train
    return build(model, fields, images, heads._replace(project=project))

  return made if made.variant is not no_variant else dataclasses.replace(made, variant=variant)


def _with_projection(model: StagedModel, heads: Heads) -> StagedModel:
  """The model with `layers.projection` at its end."""

  def init(key: jax.Array) -> Variables:
    variables, own_key = model.init(key), jax.random.fold_in(key, 2**31)
    head = layers.init_projection(own_key, model.shapes[-1].shape[-1], heads)
    return {**variables, 'params': {**variables['params'], 'head': head}}

  return dataclasses.replace(model, init=init, project=functools.partial(layers.projection, heads))


def pixels(image_BxHxWxC: jax.Array, images: Images) -> jax.Array:
  """Pixels 0 … 255 → normalised floating-point numbers, for the images of a data set."""
  return normalised(image_BxHxWxC, images.mean, images.std)


def normalised(
  image_BxHxWxC: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """Pixels 0 … 255 → floating-point numbers, normalised by each colour's mean and std.

  >>> normalised(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.5,)).item()
  1.0
  """
  mean_1x1x1xC, std_1x1x1xC = (jnp.array(numbers)[None, None, None] for numbers in (mean, std))
  return (image_BxHxWxC.astype(jnp.result_type(float)) / 255 - mean_1x1x1xC) / std_1x1x1xC


def check_divides(groups: int, field: str, width: int) -> None:
  """Raises ValueError if `groups` does not divide a width."""
  if width % groups:
    raise ValueError(f'{groups} groups do not divide model.{field} = {width}')
