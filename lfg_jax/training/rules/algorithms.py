"""Builds an algorithm from a rule, options and a model: an estimator combined with an objective.

`lfg_jax.training.rules.rules` has the rules, `lfg_jax.estimators` the estimators, and
`lfg_jax.local.objectives` the objectives (end to end, or stage by stage). With the contrastive
loss, a batch holds two views of every image.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lfg_jax.data import augmentation
from lfg_jax.data.datasets import Arrays, Batch, Dataset
from lfg_jax.local import row_losses, staged
from lfg_jax.local.heads import Heads
from lfg_jax.local.info_nce import VIEWS, Contrast
from lfg_jax.local.lookahead import look_ahead
from lfg_jax.local.staged import StagedModel, Variables
from lfg_jax.models import registry
from lfg_jax.models.registry import Images
from lfg_jax.training.rules import checks
from lfg_jax.training.rules.composition import Composition
from lfg_jax.training.rules.flop import gradient_flop
from lfg_jax.training.rules.rules import REGISTRY, Options, Rule

PyTree = Any


class Algorithm(NamedTuple):
  """The pure functions that training needs, for a rule and a model.

  Attributes:
    init: `key -> variables`: 'params' and, where used, 'batch_stats', 'feedback', 'lookahead', 'control_variate'
      and 'control_variate_optimizer'.
    gradient: `(variables, key, batch) -> (grads, aux)`. The batch's weights must sum to 1 over the
      global batch. If the batch is sharded over a mesh axis, sum grads, the `metrics` in aux and
      aux['control_variate_gradient'] over devices. aux['batch_stats'] is already the same on all devices.
    advance: `(variables, params, aux) -> variables`: the variables other than 'params', after a
      step to new `params`.
    predict: `(variables, image [B, H, W, C]) -> logits [B, classes]`.
    features: `(variables, image [B, H, W, C]) -> [B, C]`, the input of the read-out's linear layer.
    composition: the rule, options and model.
    metrics: names of the scalars in aux that are means over the global batch.
    flop: operations per example that the gradient needs at least; None: the model does not state
      the operations of all its blocks.
  """

  init: Callable[[jax.Array], dict[str, PyTree]]
  gradient: Callable[[dict[str, PyTree], jax.Array, Batch], tuple[PyTree, dict[str, Any]]]
  predict: Callable[[dict[str, PyTree], jax.Array], jax.Array]
  features: Callable[[dict[str, PyTree], jax.Array], jax.Array]
  advance: Callable[[dict[str, PyTree], PyTree, dict[str, Any]], dict[str, PyTree]]
  composition: Composition
  metrics: tuple[str, ...] = ('loss', 'error')
  flop: int | None = None


def make(config: Any, dataset: Dataset, axis_name: str | None = None) -> Algorithm:
  """Builds the algorithm and the model that a config names, for the images of a data set.

  Raises:
    ValueError: one line with the field, its value and what is allowed.
  """
  options = Options.read(config)
  row, own_loss = config.losses.row, config.losses.module
  row_loss = row_losses.find(row, own_loss, dataset.classes)
  contrast = _contrast(config.contrastive, axis_name) if config.objective == 'contrastive' else None
  if contrast and row_loss is not row_losses.cross_entropy:
    raise ValueError(
      f'losses.{f"module is {own_loss!r}" if own_loss else f"row is {row!r}"}, and '
      "objective='contrastive' compares rows; allowed: objective='supervised'"
    )
  fields = dict(config.model)
  module = registry.find(fields.pop('name'), fields.pop('module'))
  images = Images(dataset.image_shape, dataset.classes, dataset.mean, dataset.std, axis_name)
  model = registry.build(
    module, fields, images, Heads(row_loss, config.losses.head_hidden, contrast)
  )
  return compose(
    REGISTRY[config.algorithm], options, model, axis_name, _augmentation(config, dataset)
  )


def _contrast(config: Any, axis_name: str | None) -> Contrast:
  return Contrast(
    config.temperature, config.stop_gradient, config.shared_views, axis_name=axis_name
  )


def _augmentation(config: Any, dataset: Dataset) -> Callable | None:
  """What becomes of a batch's images before a step, `(key [B], image) -> image`; None: nothing."""
  fields = {field: value for field, value in config.augment.items() if value}
  given = ', '.join(f'augment.{field} is {value!r}' for field, value in fields.items())
  nothing = 'allowed: augment.shift=0 and augment.flip=False'
  if config.objective == 'contrastive':
    if fields:
      raise ValueError(f"{given}, and objective='contrastive' has views of its own; {nothing}")
    return functools.partial(augmentation.views, min_area=config.contrastive.min_area)
  if not fields:
    return None
  if not isinstance(dataset.train, Arrays):
    raise ValueError(f'{given}, and {dataset.name} is cropped and flipped as it is read; {nothing}')
  size = min(dataset.image_shape[:2])
  if not 0 <= config.augment.shift < size:
    raise ValueError(f'augment.shift is {config.augment.shift!r}; allowed: 0 … {size - 1}')
  return functools.partial(augmentation.moved, **fields)


def compose(
  rule: Rule,
  options: Options,
  model: StagedModel,
  axis_name: str | None = None,
  augment: Callable | None = None,
) -> Algorithm:
  """Combines a rule, options and a model into an algorithm.

  `augment` is `(key [B], image [B, H, W, C]) -> [B, H, W, C]`, or None. With contrastive heads, it
  returns [2B, H, W, C]: the two views of an example are in consecutive rows.
  """
  checks.check(rule, options, model)
  contrast = model.contrast
  still = model.variant(train=False)
  model = model.variant(project=contrast is not None and not rule.local)
  options = options.of(rule, model)
  if options.head_ahead:
    model = look_ahead(model, bounded=options.last_tap == 'exact')
  composition = Composition(rule, options, model, axis_name, augment)

  def evaluate(variables: Variables, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    seen = {kind: tree for kind, tree in variables.items() if kind in ('params', 'batch_stats')}
    return staged.evaluate(still, seen, model.prepare(image))

  return Algorithm(
    composition.init,
    composition.gradient,
    lambda variables, image: evaluate(variables, image)[0],
    lambda variables, image: evaluate(variables, image)[1],
    composition.advance,
    composition,
    ('loss', 'error', 'contrastive_loss') if contrast else ('loss', 'error'),
    _flop(rule, options, model),
  )


def _flop(rule: Rule, options: Options, model: StagedModel) -> int | None:
  if not all(stack.flop for stack in model.stacks):
    return None
  return gradient_flop(model, rule, options) * (VIEWS if model.contrast else 1)
