"""The registry of the algorithms in the paper's tables, and the options that vary them.

A `Rule` names the parts of an algorithm; `lfg_jax.training.algorithms` puts them together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lfg_jax.errors import one_of
from lfg_jax.estimators import tangents
from lfg_jax.estimators.sampling import COMBINATIONS
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.staged import StagedModel


class Rule(NamedTuple):
  """One row of the registry.

  Attributes:
    estimator: name of the estimator: 'backprop', 'weight', 'activity' or 'direct_feedback'.
    cut: whether gradients are stopped between blocks (greedy).
    local: whether local losses are used.
    feedback: whether linear layers send gradients back through fixed random matrices.
    quiet: whether activity perturbation has less noise at the same cost. This decides what 'auto'
      means in `Options`. If True: taps are perturbed one by one, the last tap under a local loss is
      exact, and guesses are learned. If False, as in the paper: all taps in one pass.
  """

  estimator: str
  cut: bool = False
  local: bool = False
  feedback: bool = False
  quiet: bool = False


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
  'LG-FG-A': Rule('activity', quiet=True, **_LOCAL_GREEDY),
  'LG-FG-A-paper': Rule('activity', **_LOCAL_GREEDY),
}


# Fields of config.losses that say what heads are and what they learn.
HEAD_FIELDS = ('row', 'module', 'head_hidden')


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of config.estimator, those of config.losses except `HEAD_FIELDS`, and micro_batch.

  Attributes:
    law: distribution of tangents: 'normal', 'rademacher', 'sphere', 'coordinate', 'hadamard' or
      'haar'; see `tangents.LAWS`.
    module: a Python file with your own `law`; None: the law with that name.
    passes: number of tangents per step.
    chunk: number of tangents in memory at once; 0: all, which takes more memory and, on CPUs, more
      time.
    combine: how passes are combined: their 'mean', or a 'projection' onto their span; see
      `sampling.combine`.
    taps: whether activity perturbation perturbs all taps at once ('joint') or one by one
      ('separate'); 'auto': the rule decides.
    last_tap: what happens at the last tap of a block under a local loss: 'perturbed', or 'exact',
      which lets the exact signal through; 'auto': the rule decides. Between this tap and the loss
      lie only a norm, a ReLU, the head and, if the head looks ahead, the next block.
    guess: which taps have a learned guess (see `guesses`): 'none', the name of the first tap for
      which the model has one, or 'all'; 'auto': the rule decides. In the LocalMixer, the first is
      'after_channel': its guess comes back through the grouped layer. The guess for 'after_token'
      comes back through that layer and the one before it.
    guess_rate: Adam's learning rate for the matrices through which guesses come back.
    tap_passes: number of passes for each tap by name, if taps are separate; 0: `passes`.
    sharing: 'paper' (the batch shares tangents of weights, but not those of activities), 'shared'
      or 'independent'.
    credit: weight perturbation's rule for groups. 'exact' credits a weight with all the losses it
      influences. 'paper' credits the columns of the linear layer before the grouped one with their
      own group only, as the authors' program does. This is biased, because the norm after that
      layer carries them to every group.
    patch: whether every patch has local losses of its own.
    group: whether every channel group has local losses of its own.
    every: number of blocks per stage of a greedy rule.
    overlap: whether greedy stages are overlapping pairs of blocks.
    head_ahead: whether the head of a block sees the block's output through a slow average of the
      next block; see `lfg_jax.losses.ahead`.
    head_average: the fraction of its old value that the average for `head_ahead` keeps in a step.
    micro_batch: the most examples whose gradients are computed at once; 0: as many as suit the
      hardware, see `parts`.
  """

  law: str = 'hadamard'
  module: str | None = None
  passes: int = 1
  chunk: int = 4
  combine: str = 'mean'
  taps: str = 'auto'
  last_tap: str = 'auto'
  guess: str = 'auto'
  guess_rate: float = 3e-3
  tap_passes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  sharing: str = 'paper'
  credit: str = 'exact'
  patch: bool = True
  group: bool = True
  every: int = 1
  overlap: bool = False
  head_ahead: bool = False
  head_average: float = 0.99
  micro_batch: int = 0

  def __post_init__(self) -> None:
    tangents.find(self.law, self.module)
    one_of('estimator.sharing', self.sharing, ('paper', 'shared', 'independent'))
    one_of('estimator.combine', self.combine, COMBINATIONS)
    one_of('estimator.taps', self.taps, ('auto', 'joint', 'separate'))
    one_of('estimator.last_tap', self.last_tap, ('auto', 'perturbed', 'exact'))
    one_of('estimator.credit', self.credit, ('exact', 'paper'))
    for field, value, low in (
      ('estimator.passes', self.passes, 1),
      ('estimator.chunk', self.chunk, 0),
      *((f'estimator.tap_passes.{tap}', n, 0) for tap, n in self.tap_passes.items()),
      ('losses.every', self.every, 1),
      ('micro_batch', self.micro_batch, 0),
    ):
      if value < low:
        raise ValueError(f'{field} is {value!r}; allowed: {low} or more')
    if self.guess_rate <= 0:
      raise ValueError(f'estimator.guess_rate is {self.guess_rate!r}; allowed: more than 0')
    if not 0 <= self.head_average < 1:
      raise ValueError(f'losses.head_average is {self.head_average!r}; allowed: 0 … 1, without 1')
    if self.overlap and self.every > 1:
      raise ValueError(
        f'losses.overlap=True and losses.every={self.every} exclude each other; allowed: one of them'
      )

  @classmethod
  def read(cls, config: Any, **changes: Any) -> 'Options':
    """The options in a config, with `changes`."""
    cuts = {field: value for field, value in config.losses.items() if field not in HEAD_FIELDS}
    return cls(**{**config.estimator, **cuts, 'micro_batch': config.micro_batch, **changes})

  @property
  def cut(self) -> Cut:
    return Cut(self.patch, self.group)

  def guessed_taps(self, model: StagedModel) -> tuple[str, ...]:
    """Names of the taps that have a guess."""
    return (
      tuple(model.guessed)
      if self.guess == 'all'
      else tuple(tap for tap in model.guessed if tap == self.guess)
    )

  def of(self, rule: Rule, model: StagedModel) -> 'Options':
    """The options with the rule's choice in place of 'auto', as far as the model supports it.

    Raises:
      ValueError: options contradict each other, or the rule or the model has no use for one.
    """
    # A tap further from the loss needs the guesses of all taps between: alone, its own guess would
    # come back through their kernels.
    one_of('estimator.guess', self.guess, ('auto', 'none', *tuple(model.guessed)[:1], 'all'))
    for tap in self.tap_passes:
      one_of('tap of estimator.tap_passes', tap, model.taps)
    one_block = rule.cut and self.every == 1 and not self.overlap
    quiet = rule.quiet and self.taps != 'joint'
    choice: dict[str, Any] = {
      'taps': 'separate' if quiet else 'joint',
      'last_tap': 'exact' if rule.quiet else 'perturbed',
      'guess': next(iter(model.guessed), 'none') if quiet and one_block else 'none',
    }
    open_fields = {
      field: value for field, value in choice.items() if getattr(self, field) == 'auto'
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
    if self.guess != 'none' and not (
      rule.estimator == 'activity' and one_block and self.taps == 'separate'
    ):
      raise ValueError(
        f'estimator.guess={self.guess!r} is for activities of single blocks with losses of their own, '
        "perturbed one by one; allowed: 'auto', 'none', or LG-FG-A with taps='separate', "
        'losses.every=1, no losses.overlap'
      )
    most = max(self.passes, *self.tap_passes.values(), 0)
    if self.combine == 'projection' and (self.taps == 'joint' or 0 < self.chunk < most):
      raise ValueError(
        f"estimator.combine='projection' needs all passes of one tap at once, not taps={self.taps!r}, "
        f"chunk={self.chunk}; allowed: taps='separate', and chunk=0 or {most} or more"
      )
    if self.taps == 'joint' and any(self.tap_passes.values()):
      raise ValueError(
        "estimator.tap_passes is for taps perturbed one by one; allowed: estimator.taps='separate'"
      )
