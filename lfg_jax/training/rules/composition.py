"""What a rule, its options and a model do together: first variables, gradient, other variables' updates.

An algorithm has no code of its own. Its estimator and its objective are those that the rule names.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from lfg_jax.data.datasets import Batch
from lfg_jax.estimators.exact_tail import Estimator
from lfg_jax.jaxpr.tapped import Tapped
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.local import staged
from lfg_jax.local.info_nce import VIEWS
from lfg_jax.local.objectives import end_to_end, stage_by_stage
from lfg_jax.local.staged import StagedModel, Variables
from lfg_jax.local.targets import Targets
from lfg_jax.models import layers
from lfg_jax.tangents import distributions, microbatch
from lfg_jax.tangents.microbatch import Microbatch
from lfg_jax.training import optimizers
from lfg_jax.training.rules import checks
from lfg_jax.training.rules.estimators import build_estimator
from lfg_jax.training.rules.rules import Options, Rule

PyTree = Any


class Composition(NamedTuple):
  """The parts of an algorithm, with `options` and `model` as adapted to the rule."""

  rule: Rule
  options: Options
  model: StagedModel
  axis_name: str | None
  augment: Callable | None

  def step_keys(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a step's keys, of the estimator and of the augmentation; without one, `key` is both."""
    return tuple(jax.random.split(key)) if self.augment else (key, key)

  def augmented(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, Targets]:
    """Returns the augmented images with targets; in contrastive learning, each image's two views."""
    image, label, weight = map(jnp.asarray, batch)
    if self.augment:
      ids_B = distributions.example_ids(len(label), self.axis_name)
      image = self.augment(distributions.fold_in_all(self.step_keys(key)[1], ids_B), image)
      if self.model.contrast:
        label, weight = jnp.repeat(label, VIEWS), jnp.repeat(weight / VIEWS, VIEWS)
    return image, Targets(label, weight)

  def objective_variables(self, variables: Variables) -> Variables:
    """Returns the variables that objectives use."""
    taps = self.options.control_variate_taps(self.model)
    used = (
      'params',
      'batch_stats',
      *['feedback'] * self.rule.feedback,
      *['control_variate'] * bool(taps),
      'lookahead',
    )
    if taps and not variables.get('control_variate'):
      raise ValueError(
        "the control variate has no feedback weights; allowed: variables with 'control_variate', as the "
        "algorithm's init makes them"
      )
    return {name: variables[name] for name in used if name in variables}

  def estimator(self, variables: Variables, microbatch: Microbatch) -> Estimator:
    """Builds the rule's estimator for a microbatch."""
    return build_estimator(
      self.rule, self.options, self.model, self.axis_name, variables, microbatch
    )

  def microbatches(self, examples: int) -> int:
    """Number of microbatches into which a device splits its share of a batch, `examples` rows."""
    model, micro_batch = self.model, self.options.micro_batch
    if checks.depends_on_others(model) or (model.slow_in_loops and not micro_batch):
      return 1
    return microbatch.number_of_microbatches(examples, micro_batch, model.activity_bytes)

  def init(self, key: jax.Array) -> Variables:
    """See `Algorithm`."""
    model, taps = self.model, self.options.control_variate_taps(self.model)
    model_key, feedback_key = jax.random.split(key)
    kept = dict(model.init(model_key))
    if self.rule.feedback:
      kept['feedback'] = layers.like_kernels(feedback_key, kept['params'])
    if self.rule.estimator == 'direct_feedback':
      kept['feedback'] = _tap_matrices(feedback_key, model, kept)
    if model.lookahead:
      kept['lookahead'] = model.lookahead(kept['params'])
    if taps:
      kept['control_variate'] = _control_variate_weights(kept['params'], model, taps)
      kept['control_variate_optimizer'] = self._control_variate_optimizer.init(
        kept['control_variate']
      )
    return kept

  def advance(self, variables: Variables, params: PyTree, aux: dict[str, Any]) -> Variables:
    """See `Algorithm`."""
    new = {name: aux[name] for name in ('batch_stats',) if name in variables}
    if self.model.lookahead:
      new['lookahead'] = optax.incremental_update(
        self.model.lookahead(params), variables['lookahead'], 1 - self.options.head_average
      )
    if 'control_variate' in variables:
      updates, new['control_variate_optimizer'] = self._control_variate_optimizer.update(
        aux['control_variate_gradient'], variables['control_variate_optimizer']
      )
      new['control_variate'] = optax.apply_updates(variables['control_variate'], updates)
    return {**variables, **new}

  def gradient(
    self, variables: Variables, key: jax.Array, batch: Batch
  ) -> tuple[PyTree, dict[str, Any]]:
    """See `Algorithm`."""
    image, targets = self.augmented(key, batch)
    of_microbatch = functools.partial(self._microbatch_gradient, variables, self.step_keys(key)[0])
    return microbatch.sum_over_microbatches(
      of_microbatch, (image, targets), self.microbatches(len(targets.label_B))
    )

  def _microbatch_gradient(
    self,
    variables: Variables,
    key: jax.Array,
    microbatch: Microbatch,
    examples: tuple[jax.Array, Targets],
  ) -> tuple[PyTree, dict[str, Any]]:
    rule, options, (image, targets) = self.rule, self.options, examples
    estimator = self.estimator(variables, microbatch)
    if rule.cut:
      run = stage_by_stage(
        self.model, estimator, options.cut, every=options.every, overlap=options.overlap
      )
    else:
      run = end_to_end(self.model, estimator, local=rule.local)
    return run(self.objective_variables(variables), key, self.model.prepare(image), targets)

  @property
  def _control_variate_optimizer(self) -> optax.GradientTransformation:
    return optimizers.adam_of_control_variates(self.options.control_variate_rate)


def _control_variate_weights(params: PyTree, model: StagedModel, taps: tuple[str, ...]) -> PyTree:
  """Zeros, which guess nothing, for the kernels of the layers through which control variates come."""
  weights: dict[str, PyTree] = {}
  for stack in model.stacks:
    own = params[stack.name]
    names = [model.control_variates[tap] for tap in taps if model.taps[tap] in own]
    for name in names:
      if 'kernel' not in own.get(name, ()):
        raise ValueError(
          f"the taps of the model name a layer {name!r} with a 'kernel'; the params of "
          f'{stack.name} are {", ".join(own)}; allowed: one of them, or None'
        )
    weights[stack.name] = {name: {'kernel': jnp.zeros_like(own[name]['kernel'])} for name in names}
  return weights


def _tap_matrices(key: jax.Array, model: StagedModel, variables: Variables) -> PyTree:
  """Fixed random matrices [*scan, K, ...], one per tap.

  They are scaled so that a signal is about as long as the error.
  """
  x = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.result_type(float))
  tapped = Tapped(functools.partial(staged.evaluate, model), variables, x)
  taps, (logits, _) = tapped.taps, tapped.shape
  outputs = model.contrast.projections if model.contrast else logits.shape[-1]

  def matrix(key: jax.Array, tap: Tap) -> jax.Array:
    scan, rest = tap.shape[: tap.scanned], tap.shape[tap.scanned + 1 :]
    return jax.random.normal(key, (*scan, outputs, *rest)) / math.prod(rest) ** 0.5

  keys = jax.random.split(key, len(taps))
  matrices = {name: matrix(k, tap) for k, (name, tap) in zip(keys, taps.items(), strict=True)}
  return unflatten_dict(matrices, sep='/')
