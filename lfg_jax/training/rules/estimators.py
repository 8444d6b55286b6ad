"""Builds the estimator that a rule names, with a config's options, for a model's taps."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict

from lfg_jax.estimators._types import GradFn, LossFn
from lfg_jax.estimators.activity import activity_perturbation
from lfg_jax.estimators.exact_tail import Estimator, exact_tail
from lfg_jax.estimators.feedback import backprop, direct_feedback
from lfg_jax.estimators.weight import weight_perturbation
from lfg_jax.local.info_nce import VIEWS
from lfg_jax.local.staged import StagedModel, in_block
from lfg_jax.tangents import distributions
from lfg_jax.tangents.microbatch import WHOLE, Microbatch
from lfg_jax.tangents.sampling import Sampling
from lfg_jax.training.rules.rules import Options, Rule

PyTree = Any


def build_estimator(
  rule: Rule,
  options: Options,
  model: StagedModel,
  axis_name: str | None,
  variables: dict[str, PyTree],
  microbatch: Microbatch = WHOLE,
) -> Estimator:
  """The rule's estimator, `(fun, learned) -> grad_fn`."""
  weight = rule.estimator == 'weight'
  shared = weight if options.sharing == 'paper' else options.sharing == 'shared'
  contrast = model.contrast
  rows = VIEWS if contrast and contrast.shared_views else 1
  sampling = Sampling(
    distributions.find(options.distribution, options.module),
    options.num_tangents,
    shared,
    axis_name,
    options.chunk or None,
    options.combine,
    microbatch,
    rows,
  )
  if weight:
    group_axis = (
      functools.partial(_group_axis, model, options.credit) if rule.cut else lambda path: None
    )
    return _without_control_variate(
      functools.partial(
        weight_perturbation, sampling=sampling, is_exact=_under_a_loss, group_axis=group_axis
      )
    )
  if rule.estimator == 'activity':
    return _activity_estimator(options, model, sampling)
  if rule.estimator == 'direct_feedback':
    matrices = flatten_dict(variables['feedback'], sep='/')
    return _without_control_variate(functools.partial(direct_feedback, matrices=matrices))
  return _without_control_variate(backprop)


def _without_control_variate(estimator: Callable[[LossFn], GradFn]) -> Estimator:
  return lambda fun, _: estimator(fun)


def _activity_estimator(options: Options, model: StagedModel, sampling: Sampling) -> Estimator:
  own_num_tangents = {tap: n for tap, n in options.num_tangents_by_tap.items() if n}
  num_tangents_of = lambda name: own_num_tangents.get(in_block(name), options.num_tangents)
  activity = functools.partial(
    activity_perturbation,
    sampling=sampling,
    joint=bool(options.joint),
    num_tangents_of=num_tangents_of if own_num_tangents else None,
    has_control_variate=lambda name: in_block(name) in options.control_variate_taps(model),
  )
  if options.last_tap == 'perturbed':
    return functools.partial(activity, is_perturbed=lambda name: in_block(name) in model.taps)
  # The two taps at the boundary of the block right below a stage's losses.
  *_, last = model.taps
  boundary, behind = (f'last/{tap}' for tap in (model.boundary or last, last))
  before = functools.partial(
    activity, is_perturbed=lambda name: in_block(name) in model.taps and name != behind
  )
  return functools.partial(exact_tail, estimator=before, is_boundary=boundary.__eq__)


def _under_a_loss(path: tuple) -> bool:
  """Whether a parameter belongs to a head or the read-out.

  These are single linear layers right below their loss. Their exact gradients need no backprop.
  """
  return any(p.key in ('head', 'readout') for p in path)


def _group_axis(model: StagedModel, credit: str, path: tuple) -> int | None:
  """A weight's axis over the groups that have their own losses; see `weight_perturbation`."""
  stage, layer, *_, leaf = (part.key for part in path)
  if stage != 'last':
    return None
  if layer in model.grouped:
    return 0
  nexts = dict(itertools.pairwise(model.taps.values()))
  if credit == 'paper' and nexts.get(layer) in model.grouped:
    return 1 if leaf == 'kernel' else 0  # the columns that lead to a group
  return None
