"""The registry of the algorithms in the paper's tables, and the options that vary them.

A `Rule` names the parts of an algorithm; `lfg_jax.training.rules.algorithms` puts them together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lfg_jax import errors, fields
from lfg_jax.fields import BELOW_ONE, Field, above, at_least, field, one_of
from lfg_jax.local.replicated import Cut
from lfg_jax.local.staged import StagedModel
from lfg_jax.tangents import distributions
from lfg_jax.tangents.sampling import COMBINATIONS


class Rule(NamedTuple):
  """One row of the registry.

  Attributes:
    estimator: name of the estimator: 'backprop', 'weight', 'activity' or 'direct_feedback'.
    cut: whether gradients are stopped between blocks (blockwise).
    local: whether local losses are used.
    feedback: whether linear layers send gradients back through fixed random matrices.
    variance_reduced: whether activity perturbation has less noise at the same cost. This decides what
      'auto' and None mean in `Options`. If True: taps are perturbed one by one, the last tap under a local loss is
      exact, and control variates are learned. If False, as in the paper: all taps at once.
  """

  estimator: str
  cut: bool = False
  local: bool = False
  feedback: bool = False
  variance_reduced: bool = False


_LOCAL_GREEDY = {'cut': True, 'local': True}
REGISTRY: dict[str, Rule] = {
  'BP': Rule('backprop'),
  'L-BP': Rule('backprop', local=True),
  'LG-BP': Rule('backprop', **_LOCAL_GREEDY),
  'FA': Rule('backprop', feedback=True),
  'L-FA': Rule('backprop', feedback=True, local=True),
  'LG-FA': Rule('backprop', feedback=True, **_LOCAL_GREEDY),
  'DFA': Rule('direct_feedback'),
  'FG-W': Rule('weight'),
  'FG-A': Rule('activity'),
  'LG-FG-W': Rule('weight', **_LOCAL_GREEDY),
  'LG-FG-A+': Rule('activity', variance_reduced=True, **_LOCAL_GREEDY),
  'LG-FG-A': Rule('activity', **_LOCAL_GREEDY),
}


@dataclasses.dataclass(frozen=True)
class EstimatorOptions:
  """The fields of config.estimator."""

  distribution: str = field('hadamard', 'of tangents', one_of(distributions.DISTRIBUTIONS))
  module: str | None = field(
    None, 'Python file with your own `distribution`; None: the one with that name'
  )
  num_tangents: int = field(1, 'number of tangents per step', at_least(1))
  chunk: int = field(
    4, 'tangents in memory at once; 0: all: more memory, on CPUs slower', at_least(0)
  )
  combine: str = field(
    'mean', 'tangents become their mean, or a projection onto their span', one_of(COMBINATIONS)
  )
  joint: bool | None = field(
    None, 'whether all taps are perturbed at once, or one by one; None: the rule decides'
  )
  last_tap: str = field(
    'auto',
    'at the last tap of a block under a local loss, the exact signal num_tangents, or it is perturbed; '
    'auto: the rule decides. Between this tap and the loss lie only a norm, a ReLU, the head and, '
    'if the head looks ahead, the next block',
    one_of(('auto', 'perturbed', 'exact')),
  )
  control_variate: str = field(
    'auto',
    'which taps have a learned one: none, the name of the first tap for which the model has one, '
    "or all; auto: the rule decides. In the LocalMixer, that of 'after_channel', the first, comes "
    "back through the grouped layer; that of 'after_token' through that layer and the one before",
  )
  control_variate_rate: float = field(
    3e-3, "Adam's learning rate for the matrices through which control variates come", above(0)
  )
  num_tangents_by_tap: Mapping[str, int] = dataclasses.field(default_factory=dict)
  sharing: str = field(
    'paper',
    'examples share a tangent or have independent ones; paper: shared for weights only',
    one_of(('paper', 'shared', 'independent')),
  )
  credit: str = field(
    'exact',
    'losses that weight perturbation credits to a weight: exact: all that it influences. paper: for '
    'the columns before the grouped layer those of their own group only, as the authors do. This is '
    'biased, because the norm behind that layer carries them to every group',
    one_of(('exact', 'paper')),
  )


# Of a field of config.estimator.num_tangents_by_tap, which has one for every tap of the model.
OF_A_TAP = Field(0, 'number of tangents, if joint is not set; 0: num_tangents', at_least(0))


@dataclasses.dataclass(frozen=True)
class LossOptions:
  """The fields of config.losses that say which blocks, patches and groups have losses."""

  patch: bool = field(True, 'whether every patch has local losses of its own')
  group: bool = field(True, 'whether every channel group has local losses of its own')
  every: int = field(1, 'number of blocks per stage of a blockwise rule', at_least(1))
  overlap: bool = field(False, 'whether blockwise stages are overlapping pairs of blocks')
  head_ahead: bool = field(
    False, "whether a head sees its block's output through a slow average of the next block"
  )
  head_average: float = field(
    0.99, 'fraction of its old value that this average keeps in a step', BELOW_ONE
  )


@dataclasses.dataclass(frozen=True)
class Options(EstimatorOptions, LossOptions):
  """What varies a rule: both groups of fields, and config.micro_batch."""

  micro_batch: int = 0

  def __post_init__(self) -> None:
    distributions.find(self.distribution, self.module)
    fields.check('estimator', self, EstimatorOptions)
    fields.check('losses', self, LossOptions)
    for tap, number in self.num_tangents_by_tap.items():
      if allowed := OF_A_TAP.wrong(number):
        raise ValueError(f'estimator.num_tangents_by_tap.{tap} is {number!r}; allowed: {allowed}')
    if self.overlap and self.every > 1:
      raise ValueError(
        f'losses.overlap=True and losses.every={self.every} exclude each other; allowed: one of them'
      )

  @classmethod
  def read(cls, config: Any, **changes: Any) -> 'Options':
    """The options in a config, with `changes`."""
    losses = {name: config.losses[name] for name in fields.described(LossOptions)}
    return cls(**{**config.estimator, **losses, 'micro_batch': config.micro_batch, **changes})

  @property
  def cut(self) -> Cut:
    return Cut(self.patch, self.group)

  def control_variate_taps(self, model: StagedModel) -> tuple[str, ...]:
    """Names of the taps that have a control variate."""
    return (
      tuple(model.control_variates)
      if self.control_variate == 'all'
      else tuple(tap for tap in model.control_variates if tap == self.control_variate)
    )

  def of(self, rule: Rule, model: StagedModel) -> 'Options':
    """The options with the rule's choice in place of 'auto', as far as the model supports it.

    Raises:
      ValueError: options contradict each other, or the rule or the model has no use for one.
    """
    # A tap further from the loss needs the control variates of all taps between: alone, its own control variate would
    # come back through their kernels.
    errors.one_of(
      'estimator.control_variate',
      self.control_variate,
      ('auto', 'none', *tuple(model.control_variates)[:1], 'all'),
    )
    for tap in self.num_tangents_by_tap:
      errors.one_of('tap of estimator.num_tangents_by_tap', tap, model.taps)
    one_block = rule.cut and self.every == 1 and not self.overlap
    variance_reduced = rule.variance_reduced and not self.joint
    choice: dict[str, Any] = {
      'joint': not variance_reduced,
      'last_tap': 'exact' if rule.variance_reduced else 'perturbed',
      'control_variate': next(iter(model.control_variates), 'none')
      if variance_reduced and one_block
      else 'none',
    }
    open_fields = {
      field: value for field, value in choice.items() if getattr(self, field) in ('auto', None)
    }
    options = dataclasses.replace(self, **open_fields)
    options._check_activity(rule, model, one_block)
    return options

  def _check_activity(self, rule: Rule, model: StagedModel, one_block: bool) -> None:
    if self.last_tap == 'exact' and not (rule.estimator == 'activity' and rule.cut):
      raise ValueError(
        "estimator.last_tap='exact' is for activity perturbation with losses per block; allowed: "
        "'auto', 'perturbed'"
      )
    if self.control_variate != 'none' and not (
      rule.estimator == 'activity' and one_block and not self.joint
    ):
      raise ValueError(
        f'estimator.control_variate={self.control_variate!r} is for activities of single blocks with losses '
        "of their own, perturbed one by one; allowed: 'auto', 'none', or LG-FG-A+ with joint=False, "
        'losses.every=1, no losses.overlap'
      )
    most = max(self.num_tangents, *self.num_tangents_by_tap.values(), 0)
    if self.combine == 'projection' and (self.joint or 0 < self.chunk < most):
      raise ValueError(
        f"estimator.combine='projection' needs all tangents of one tap at once, not joint={self.joint}, "
        f'chunk={self.chunk}; allowed: joint=False, and chunk=0 or {most} or more'
      )
    if self.joint and any(self.num_tangents_by_tap.values()):
      raise ValueError(
        'estimator.num_tangents_by_tap is for taps perturbed one by one; allowed: estimator.joint=False'
      )
