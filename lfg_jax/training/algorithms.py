"""Algorithms put together from a rule, options and a model: an estimator × the objective it serves.

Rules are in `lfg_jax.training.rules`, estimators in `lfg_jax.estimators`, objectives (end to end, or stage by stage)
in `lfg_jax.training.objectives`. With the contrastive loss the batch has two views of every image.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lfg_jax.data import augmentation
from lfg_jax.data.datasets import Batch, Dataset
from lfg_jax.errors import one_of
from lfg_jax.estimators import parts, tangents
from lfg_jax.estimators.activity import activity_perturbation
from lfg_jax.estimators.boundary import Estimator, exact_behind
from lfg_jax.estimators.derivatives import Derivative, finite_difference, jvp_derivative
from lfg_jax.estimators.feedback import backprop, direct_feedback
from lfg_jax.estimators.parts import WHOLE, Part
from lfg_jax.estimators.sampling import Sampling
from lfg_jax.estimators.signature import GradFn, LossFn
from lfg_jax.estimators.taps import Tap
from lfg_jax.estimators.traced import Traced
from lfg_jax.estimators.weight import weight_perturbation
from lfg_jax.losses.info_nce import VIEWS, Contrast
from lfg_jax.models import layers
from lfg_jax.models.mixer import BOUNDARY, TAPS, Criterion, LocalMixer, MixerSpec
from lfg_jax.models.sizes import mixer_spec, parse, patches
from lfg_jax.training import optimizers
from lfg_jax.training.objectives import end_to_end, stage_by_stage
from lfg_jax.training.rules import REGISTRY, Options, Rule

PyTree = Any


LOSSES = ('supervised', 'contrastive')
LAST_TAP = 'last/after_group'    # of the block under a stage's losses, see `greedy.block_names`
# The layer through which a tap's guess comes.
_GUESS_LAYERS = {'after_channel': 'group', 'after_token': 'channel'}


class Algorithm(NamedTuple):
  """What training needs of a rule and a model; pure functions.

  Attributes:
    init: `key -> variables` ('params', and where used 'batch_stats', 'feedback', 'guess', 'guess_optimizer').
    gradient: `(variables, key, batch) -> (grads, aux)`. The batch's weights sum to 1 over the global batch; when
      the batch is sharded over a mesh axis, the sum over devices of grads and of aux's 'loss' and 'error' is the
      result, and of aux['guess_gradient']. aux['batch_stats'] is the same on all devices.
    advance: `(variables, aux) -> variables`, those of them, without 'params', after a step.
    predict: `(variables, image [B, H, W, C]) -> logits [B, classes]`.
    features: `(variables, image [B, H, W, C]) -> [B, C]`, what the read-out's linear layer sees.
    metrics: the scalars in aux that are means over the global batch.
  """
  init: Callable[[jax.Array], dict[str, PyTree]]
  gradient: Callable[[dict[str, PyTree], jax.Array, Batch], tuple[PyTree, dict[str, Any]]]
  predict: Callable[[dict[str, PyTree], jax.Array], jax.Array]
  features: Callable[[dict[str, PyTree], jax.Array], jax.Array]
  advance: Callable[[dict[str, PyTree], dict[str, Any]], dict[str, PyTree]]
  metrics: tuple[str, ...] = ('loss', 'error')


def make(config: Any, dataset: Dataset, axis_name: str | None = None) -> Algorithm:
  """The algorithm that a config names, on the model that it names, for images of a data set.

  Raises:
    ValueError: one line naming the field, the value and what is allowed.
  """
  one_of('algorithm', config.algorithm, REGISTRY)
  options = Options(**config.estimator, **config.losses, micro_batch=config.micro_batch)
  one_of('loss', config.loss, LOSSES)
  contrast = _contrast(config.contrastive, axis_name) if config.loss == 'contrastive' else None
  sizes = dict(config.model)
  spec = mixer_spec(sizes.pop('size'), image_shape=dataset.image_shape, classes=dataset.classes,
                    axis_name=axis_name, contrast=contrast, **sizes)
  prepare = functools.partial(patches, side=parse(config.model.size)[1], mean=dataset.mean, std=dataset.std)
  views = functools.partial(augmentation.views, min_area=config.contrastive.min_area)
  return compose(REGISTRY[config.algorithm], options, spec, prepare, axis_name, views)


def _contrast(config: Any, axis_name: str | None) -> Contrast:
  if config.temperature <= 0:
    raise ValueError(f'contrastive.temperature is {config.temperature!r}; allowed: more than 0')
  if not 0 < config.min_area <= 1:
    raise ValueError(f'contrastive.min_area is {config.min_area!r}; allowed: more than 0, at most 1')
  return Contrast(config.temperature, config.stop_gradient, config.shared_views, axis_name=axis_name)


def compose(rule: Rule, options: Options, spec: MixerSpec, prepare: Callable[[jax.Array], jax.Array],
            axis_name: str | None = None, views: Callable | None = None) -> Algorithm:
  """`Rule` × options × model.

  `prepare` turns images of pixels 0 … 255 into tokens [B, P, D]. With contrastive heads, `views` is
  `(key [B], image [B, H, W, C]) -> [2B, H, W, C]`, views of an example one after the other.
  """
  if spec.style.norm == 'batch' and rule.estimator == 'weight' and options.sharing == 'independent':
    raise ValueError("estimator.sharing='independent' perturbs weights per example, which model.norm='batch' mixes; "
                     "allowed with batch norm: 'paper', 'shared'")
  if options.micro_batch and mixes_examples(spec):
    raise ValueError(f'micro_batch is {options.micro_batch}, and the losses of one example depend on others; '
                     'allowed here: 0')
  if spec.style.dtype and rule.finite:
    raise ValueError("model.precision is 'bfloat16', whose rounding hides finite differences; allowed with them: "
                     "'float32'")
  if rule.finite:
    spec = dataclasses.replace(spec, style=spec.style._replace(fused=False))
  contrast = spec.style.contrast
  if contrast and rule.estimator == 'weight' and options.sharing == 'independent':
    raise ValueError("estimator.sharing='independent' perturbs weights per example, and loss='contrastive' compares "
                     "examples; allowed with it: 'paper', 'shared'")
  options = options.of(rule)
  stem = spec.runs[0].spec
  project = contrast is not None and not rule.local
  guess_optimizer = optimizers.lenient(optax.adam(options.guess_rate))

  def init(key: jax.Array) -> dict[str, PyTree]:
    model_key, feedback_key = jax.random.split(key)
    variables = LocalMixer(spec, project=project).init(model_key, jnp.zeros((1, stem.tokens, stem.inputs)))
    kept = {name: variables[name] for name in ('params', 'batch_stats') if name in variables}
    if rule.feedback:
      kept['feedback'] = layers.like_kernels(feedback_key, kept['params'])
    if rule.estimator == 'direct_feedback':
      kept['feedback'] = _tap_matrices(feedback_key, spec, kept['params'])
    if options.guessed_taps:
      kept['guess'] = _guess_weights(kept['params'], options)
      kept['guess_optimizer'] = guess_optimizer.init(kept['guess'])
    return kept

  def advance(variables: dict[str, PyTree], aux: dict[str, Any]) -> dict[str, PyTree]:
    new = {name: aux[name] for name in ('batch_stats',) if name in variables}
    if 'guess' in variables:
      updates, new['guess_optimizer'] = guess_optimizer.update(aux['guess_gradient'], variables['guess_optimizer'])
      new['guess'] = optax.apply_updates(variables['guess'], updates)
    return {**variables, **new}

  def part_gradient(variables: dict[str, PyTree], key: jax.Array, part: Part, batch: Batch
                    ) -> tuple[PyTree, dict[str, Any]]:
    if options.guessed_taps and not variables.get('guess'):
      raise ValueError("the guess has no feedback weights; allowed: variables with 'guess', as the algorithm's init "
                       'makes them')
    estimator = build_estimator(rule, options, spec, axis_name, variables, part)
    image, label, weight = map(jnp.asarray, batch)
    if contrast and views:
      key, view_key = jax.random.split(key)
      image = views(tangents.fold_in_all(view_key, tangents.example_ids(len(label), axis_name)), image)
      label, weight = jnp.repeat(label, VIEWS), jnp.repeat(weight / VIEWS, VIEWS)
    used = ('params', 'batch_stats', *['feedback'] * rule.feedback, *['guess'] * bool(options.guessed_taps))
    known = {name: variables[name] for name in used if name in variables}
    if rule.cut:
      run = stage_by_stage(spec, estimator, options.cut, every=options.every, overlap=options.overlap)
    else:
      run = end_to_end(spec, estimator, local=rule.local)
    return run(known, key, prepare(image), Criterion(label, weight))

  def gradient(variables: dict[str, PyTree], key: jax.Array, batch: Batch) -> tuple[PyTree, dict[str, Any]]:
    batch = Batch(*map(jnp.asarray, batch))
    number = number_of_parts(spec, len(batch.label), options.micro_batch)
    return parts.sum_over_parts(functools.partial(part_gradient, variables, key), batch, number)

  still = LocalMixer(dataclasses.replace(spec, style=spec.style._replace(train=False)))

  def evaluate(variables: dict[str, PyTree], image: jax.Array, **options: Any) -> tuple:
    seen: dict[str, PyTree] = {name: variables[name] for name in ('params', 'batch_stats') if name in variables}
    return still.apply(seen, prepare(image), **options)

  def predict(variables: dict[str, PyTree], image: jax.Array) -> jax.Array:
    return evaluate(variables, image)[0]

  def features(variables: dict[str, PyTree], image: jax.Array) -> jax.Array:
    return evaluate(variables, image, mutable='features')[1]['features']['readout']['mean'][0]

  metrics = ('loss', 'error', 'contrastive_loss') if contrast else ('loss', 'error')
  return Algorithm(init, gradient, predict, features, advance, metrics)


def mixes_examples(spec: MixerSpec) -> bool:
  """Whether the losses of one example depend on others, so that a batch is more than its parts."""
  return spec.style.norm == 'batch' or spec.style.contrast is not None


def number_of_parts(spec: MixerSpec, batch_size: int, micro_batch: int) -> int:
  """In how many parts a device takes its share of the batch, of `batch_size` examples."""
  activity_bytes = (2 if spec.style.dtype else 4) * max(run.spec.tokens * run.spec.channels for run in spec.runs)
  return 1 if mixes_examples(spec) else parts.number_of_parts(batch_size, micro_batch, activity_bytes)


def build_estimator(rule: Rule, options: Options, spec: MixerSpec, axis_name: str | None,
                    variables: dict[str, PyTree], part: Part = WHOLE) -> Estimator:
  """The rule's estimator, `(fun, learned) -> grad_fn`."""
  weight = rule.estimator == 'weight'
  shared = weight if options.sharing == 'paper' else options.sharing == 'shared'
  contrast = spec.style.contrast
  rows = VIEWS if contrast and contrast.shared_views else 1
  sampling = Sampling(tangents.LAWS[options.law], options.passes, shared, axis_name, options.chunk or None,
                      options.combine, part, rows)
  derivative = finite_difference(options.step) if rule.finite else jvp_derivative
  if weight:
    group_axis = functools.partial(_group_axis, options, rule.cut and spec.style.norm == 'layer')
    return _never_guessed(functools.partial(weight_perturbation, sampling=sampling, derivative=derivative,
                                            is_exact=_under_a_loss, group_axis=group_axis))
  if rule.estimator == 'activity':
    return _activity_estimator(options, sampling, derivative)
  if rule.estimator == 'direct_feedback':
    matrices = flatten_dict(variables['feedback'], sep='/')
    return _never_guessed(functools.partial(direct_feedback, matrices=matrices))
  return _never_guessed(backprop)


def _never_guessed(estimator: Callable[[LossFn], GradFn]) -> Estimator:
  return lambda fun, _: estimator(fun)


def _activity_estimator(options: Options, sampling: Sampling, derivative: Derivative) -> Estimator:
  own_passes = {tap: n for tap, n in options.tap_passes.items() if n}
  passes_of = lambda name: own_passes.get(_in_block(name), options.passes)
  activity = functools.partial(
      activity_perturbation, sampling=sampling, derivative=derivative, separate=options.taps == 'separate',
      passes_of=passes_of if own_passes else None, is_guessed=lambda name: _in_block(name) in options.guessed_taps)
  if options.last_tap == 'perturbed':
    return functools.partial(activity, is_perturbed=lambda name: _in_block(name) in TAPS)
  before = functools.partial(activity, is_perturbed=lambda name: _in_block(name) in TAPS and name != LAST_TAP)
  return functools.partial(exact_behind, estimator=before, is_boundary=lambda name: _in_block(name) == BOUNDARY)


def _in_block(name: str) -> str:
  """A tap's name without its block's."""
  return name.rsplit('/')[-1]


def _under_a_loss(path: tuple) -> bool:
  """Heads and the read-out: one linear layer under its loss, whose exact gradient needs no backprop."""
  return any(p.key in ('head', 'readout') for p in path)


def _group_axis(options: Options, groups_are_separate: bool, path: tuple) -> int | None:
  """The axis of a weight that runs over groups with losses of their own; see `weight_perturbation`."""
  stage, layer, leaf = path[0].key, path[1].key, path[-1].key
  if not groups_are_separate or stage != 'last':
    return None
  if layer == 'group':
    return 0
  if layer == 'channel' and options.credit == 'paper':
    return 1 if leaf == 'kernel' else 0
  return None


def _guess_weights(params: PyTree, options: Options) -> PyTree:
  """Zeros, the guess of nothing, for the kernels of the layers through which guesses come."""
  layers_of = lambda block: [_GUESS_LAYERS[tap] for tap in options.guessed_taps
                             if tap != 'after_token' or 'token' in block]
  return {name: {layer: {'kernel': jnp.zeros_like(block[layer]['kernel'])} for layer in layers_of(block)}
          for name, block in params.items() if 'group' in block}


def _tap_matrices(key: jax.Array, spec: MixerSpec, params: PyTree) -> PyTree:
  """Fixed matrices [*scan, classes, ...] for every tap, scaled so that a signal is about as long as the error."""
  stem = spec.runs[0].spec
  tokens = jax.ShapeDtypeStruct((1, stem.tokens, stem.inputs), jnp.float32)
  forward = lambda params, x: LocalMixer(spec).apply({'params': params}, x, mutable='batch_stats')
  taps = Traced(forward, params, tokens).taps

  def matrix(key: jax.Array, tap: Tap) -> jax.Array:
    scan, rest = tap.shape[:tap.scanned], tap.shape[tap.scanned + 1:]
    return jax.random.normal(key, (*scan, spec.head_outputs, *rest)) / math.prod(rest)**0.5

  keys = jax.random.split(key, len(taps))
  matrices = {name: matrix(k, tap) for k, (name, tap) in zip(keys, taps.items(), strict=True)}
  return unflatten_dict(matrices, sep='/')
