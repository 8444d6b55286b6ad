"""Builds an algorithm from a rule, options and a model: an estimator combined with an objective.

`lfg_jax.training.rules` has the rules, `lfg_jax.estimators` the estimators, and
`lfg_jax.losses.objectives` the objectives (end to end, or stage by stage). With the contrastive
loss, a batch holds two views of every image.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from lfg_jax.data import augmentation
from lfg_jax.data.datasets import Batch, Dataset
from lfg_jax.errors import one_of
from lfg_jax.estimators import parts, tangents
from lfg_jax.estimators.boundary import Estimator
from lfg_jax.estimators.parts import Part
from lfg_jax.estimators.taps import Tap
from lfg_jax.estimators.traced import Traced
from lfg_jax.losses import row_losses, staged
from lfg_jax.losses.ahead import look_ahead
from lfg_jax.losses.heads import Heads
from lfg_jax.losses.info_nce import VIEWS, Contrast
from lfg_jax.losses.objectives import end_to_end, stage_by_stage
from lfg_jax.losses.staged import StagedModel, Variables
from lfg_jax.losses.targets import Targets
from lfg_jax.models import layers, registry
from lfg_jax.models.registry import Images
from lfg_jax.training import compatible, optimizers, timing
from lfg_jax.training.rule_estimators import build_estimator
from lfg_jax.training.rules import HEAD_FIELDS, REGISTRY, Options, Rule

PyTree = Any


LOSSES = ('supervised', 'contrastive')


class Composition(NamedTuple):
  """The parts of an algorithm, with `options` and `model` as adapted to the rule."""

  rule: Rule
  options: Options
  model: StagedModel
  axis_name: str | None
  views: Callable | None

  def keys(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a step's keys of the estimator and of the views; without views, both are `key`."""
    return tuple(jax.random.split(key)) if self.model.contrast and self.views else (key, key)

  def seen(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, Targets]:
    """Returns the images and their targets; in contrastive learning, two views of each image."""
    image, label, weight = map(jnp.asarray, batch)
    if self.model.contrast and self.views:
      ids_B = tangents.example_ids(len(label), self.axis_name)
      image = self.views(tangents.fold_in_all(self.keys(key)[1], ids_B), image)
      label, weight = jnp.repeat(label, VIEWS), jnp.repeat(weight / VIEWS, VIEWS)
    return image, Targets(label, weight)

  def known(self, variables: Variables) -> Variables:
    """Returns the variables that objectives use."""
    guessed = self.options.guessed_taps(self.model)
    used = (
      'params',
      'batch_stats',
      *['feedback'] * self.rule.feedback,
      *['guess'] * bool(guessed),
      'ahead',
    )
    if guessed and not variables.get('guess'):
      raise ValueError(
        "the guess has no feedback weights; allowed: variables with 'guess', as the "
        "algorithm's init makes them"
      )
    return {name: variables[name] for name in used if name in variables}

  def estimator(self, variables: Variables, part: Part) -> Estimator:
    """Builds the rule's estimator for a part of the batch."""
    return build_estimator(self.rule, self.options, self.model, self.axis_name, variables, part)

  def parts(self, examples: int) -> int:
    """Number of parts into which a device splits its share of a batch, `examples` rows."""
    if compatible.depends_on_others(self.model):
      return 1
    return parts.number_of_parts(examples, self.options.micro_batch, self.model.activity_bytes)


class Algorithm(NamedTuple):
  """The pure functions that training needs, for a rule and a model.

  Attributes:
    init: `key -> variables`: 'params' and, where used, 'batch_stats', 'feedback', 'ahead', 'guess'
      and 'guess_optimizer'.
    gradient: `(variables, key, batch) -> (grads, aux)`. The batch's weights must sum to 1 over the
      global batch. If the batch is sharded over a mesh axis, sum grads, the `metrics` in aux and
      aux['guess_gradient'] over devices. aux['batch_stats'] is already the same on all devices.
    advance: `(variables, params, aux) -> variables`: the variables other than 'params', after a
      step to new `params`.
    predict: `(variables, image [B, H, W, C]) -> logits [B, classes]`.
    features: `(variables, image [B, H, W, C]) -> [B, C]`, the input of the read-out's linear layer.
    made_of: the rule, options and model.
    metrics: names of the scalars in aux that are means over the global batch.
    flop: operations per example that the gradient needs at least; None: the model does not state
      the operations of all its blocks.
  """

  init: Callable[[jax.Array], dict[str, PyTree]]
  gradient: Callable[[dict[str, PyTree], jax.Array, Batch], tuple[PyTree, dict[str, Any]]]
  predict: Callable[[dict[str, PyTree], jax.Array], jax.Array]
  features: Callable[[dict[str, PyTree], jax.Array], jax.Array]
  advance: Callable[[dict[str, PyTree], PyTree, dict[str, Any]], dict[str, PyTree]]
  made_of: Composition
  metrics: tuple[str, ...] = ('loss', 'error')
  flop: int | None = None


def make(config: Any, dataset: Dataset, axis_name: str | None = None) -> Algorithm:
  """Builds the algorithm and the model that a config names, for the images of a data set.

  Raises:
    ValueError: one line with the field, its value and what is allowed.
  """
  one_of('algorithm', config.algorithm, REGISTRY)
  options = Options.read(config)
  row, own_loss, hidden = (config.losses[field] for field in HEAD_FIELDS)
  one_of('loss', config.loss, LOSSES)
  row_loss = row_losses.find(row, own_loss, dataset.classes)
  contrast = _contrast(config.contrastive, axis_name) if config.loss == 'contrastive' else None
  if contrast and row_loss is not row_losses.cross_entropy:
    raise ValueError(
      f'losses.{f"module is {own_loss!r}" if own_loss else f"row is {row!r}"}, and '
      "loss='contrastive' compares rows; allowed: loss='supervised'"
    )
  fields = dict(config.model)
  module = registry.find(fields.pop('name'), fields.pop('module'))
  images = Images(dataset.image_shape, dataset.classes, dataset.mean, dataset.std, axis_name)
  model = registry.build(module, fields, images, Heads(row_loss, hidden, contrast))
  views = functools.partial(augmentation.views, min_area=config.contrastive.min_area)
  return compose(REGISTRY[config.algorithm], options, model, axis_name, views)


def _contrast(config: Any, axis_name: str | None) -> Contrast:
  if config.temperature <= 0:
    raise ValueError(f'contrastive.temperature is {config.temperature!r}; allowed: more than 0')
  if not 0 < config.min_area <= 1:
    raise ValueError(
      f'contrastive.min_area is {config.min_area!r}; allowed: more than 0, at most 1'
    )
  return Contrast(
    config.temperature, config.stop_gradient, config.shared_views, axis_name=axis_name
  )


def compose(
  rule: Rule,
  options: Options,
  model: StagedModel,
  axis_name: str | None = None,
  views: Callable | None = None,
) -> Algorithm:
  """Combines a rule, options and a model into an algorithm.

  With contrastive heads, `views` is `(key [B], image [B, H, W, C]) -> [2B, H, W, C]`. The two views
  of an example are in consecutive rows.
  """
  compatible.check(rule, options, model)
  contrast = model.contrast
  model = model.variant(fused=not rule.finite, project=contrast is not None and not rule.local)
  still = model.variant(train=False)
  options = options.of(rule, model)
  if options.head_ahead:
    model = look_ahead(model, bounded=options.last_tap == 'exact')
  guessed = options.guessed_taps(model)
  guess_optimizer = optimizers.adam_of_guesses(options.guess_rate)

  def init(key: jax.Array) -> Variables:
    model_key, feedback_key = jax.random.split(key)
    kept = dict(model.init(model_key))
    if rule.feedback:
      kept['feedback'] = layers.like_kernels(feedback_key, kept['params'])
    if rule.estimator == 'direct_feedback':
      kept['feedback'] = _tap_matrices(feedback_key, model, kept)
    if model.ahead:
      kept['ahead'] = model.ahead(kept['params'])
    if guessed:
      kept['guess'] = _guess_weights(kept['params'], model, guessed)
      kept['guess_optimizer'] = guess_optimizer.init(kept['guess'])
    return kept

  def advance(variables: Variables, params: PyTree, aux: dict[str, Any]) -> Variables:
    new = {name: aux[name] for name in ('batch_stats',) if name in variables}
    if model.ahead:
      new['ahead'] = optax.incremental_update(
        model.ahead(params), variables['ahead'], 1 - options.head_average
      )
    if 'guess' in variables:
      updates, new['guess_optimizer'] = guess_optimizer.update(
        aux['guess_gradient'], variables['guess_optimizer']
      )
      new['guess'] = optax.apply_updates(variables['guess'], updates)
    return {**variables, **new}

  made_of = Composition(rule, options, model, axis_name, views)

  def part_gradient(
    variables: Variables, key: jax.Array, part: Part, examples: tuple[jax.Array, Targets]
  ) -> tuple[PyTree, dict[str, Any]]:
    estimator = made_of.estimator(variables, part)
    if rule.cut:
      run = stage_by_stage(
        model, estimator, options.cut, every=options.every, overlap=options.overlap
      )
    else:
      run = end_to_end(model, estimator, local=rule.local)
    image, targets = examples
    return run(made_of.known(variables), key, model.prepare(image), targets)

  def gradient(variables: Variables, key: jax.Array, batch: Batch) -> tuple[PyTree, dict[str, Any]]:
    image, targets = made_of.seen(key, batch)
    of_part = functools.partial(part_gradient, variables, made_of.keys(key)[0])
    return parts.sum_over_parts(of_part, (image, targets), made_of.parts(len(targets.label_B)))

  def evaluate(variables: Variables, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    seen = {kind: tree for kind, tree in variables.items() if kind in ('params', 'batch_stats')}
    return staged.evaluate(still, seen, model.prepare(image))

  metrics = ('loss', 'error', 'contrastive_loss') if contrast else ('loss', 'error')
  return Algorithm(
    init,
    gradient,
    lambda variables, image: evaluate(variables, image)[0],
    lambda variables, image: evaluate(variables, image)[1],
    advance,
    made_of,
    metrics,
    _flop(rule, options, model),
  )


def _flop(rule: Rule, options: Options, model: StagedModel) -> int | None:
  if not all(stack.flop for stack in model.stacks):
    return None
  return timing.gradient_flop(model, rule, options) * (VIEWS if model.contrast else 1)


def _guess_weights(params: PyTree, model: StagedModel, guessed: tuple[str, ...]) -> PyTree:
  """Zeros, which guess nothing, for the kernels of the layers through which guesses come."""
  weights: dict[str, PyTree] = {}
  for stack in model.stacks:
    own = params[stack.name]
    names = [model.guessed[tap] for tap in guessed if tap in stack.flop]
    weights[stack.name] = {name: {'kernel': jnp.zeros_like(own[name]['kernel'])} for name in names}
  return weights


def _tap_matrices(key: jax.Array, model: StagedModel, variables: Variables) -> PyTree:
  """Fixed random matrices [*scan, K, ...], one per tap.

  They are scaled so that a signal is about as long as the error.
  """
  x = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.result_type(float))
  taps = Traced(functools.partial(staged.evaluate, model), variables, x).taps
  outputs = model.contrast.projections if model.contrast else model.classes

  def matrix(key: jax.Array, tap: Tap) -> jax.Array:
    scan, rest = tap.shape[: tap.scanned], tap.shape[tap.scanned + 1 :]
    return jax.random.normal(key, (*scan, outputs, *rest)) / math.prod(rest) ** 0.5

  keys = jax.random.split(key, len(taps))
  matrices = {name: matrix(k, tap) for k, (name, tap) in zip(keys, taps.items(), strict=True)}
  return unflatten_dict(matrices, sep='/')
