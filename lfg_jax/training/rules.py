"""The algorithms of the paper's tables, as a registry of compositions; and the options that vary them.

Which name an estimator has is in `Rule`; `lfg_jax.training.algorithms` puts the parts together.
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
    estimator: 'backprop', 'weight', 'activity' or 'direct_feedback'.
    cut: whether gradients are stopped between blocks (greedy).
    local: whether local losses are used.
    feedback: whether linear layers send gradients back through fixed random matrices.
    finite: derivatives by finite differences instead of `jax.jvp`.
    quiet: activity perturbation with less noise at the same cost: what `Options` leaves to the rule is taps that are
      perturbed one by one, the last under a local loss not at all, and learned guesses. Otherwise it is as in the
      paper: all taps in one pass.
  """

  estimator: str
  cut: bool = False
  local: bool = False
  feedback: bool = False
  finite: bool = False
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
  'FD-W': Rule('weight', finite=True),
  'FD-A': Rule('activity', finite=True),
  'LG-FD-W': Rule('weight', finite=True, **_LOCAL_GREEDY),
  'LG-FD-A': Rule('activity', finite=True, **_LOCAL_GREEDY),
}


HEAD_FIELDS = ('row', 'module', 'head_hidden')  # of config.losses: what heads are, and learn


@dataclasses.dataclass(frozen=True)
class Options:
  """Fields of config.estimator, and those of config.losses that say how losses are cut.

  Attributes:
    law: name of a tangent law, of `tangents.LAWS`.
    module: a Python file with a `law` of your own; None: the one of that name.
    passes: tangents per step.
    chunk: how many of them are in memory at once; 0: all, which takes more memory and, on CPUs, more time.
    combine: 'mean' of the passes, or 'projection' on their span; see `sampling.combine`.
    taps: activity perturbation of all taps at once ('joint') or of each by itself ('separate'). 'auto', here and below:
      what the rule says.
    last_tap: of a block under a local loss: 'perturbed', or 'exact', which lets the exact signal through. Between it
      and the loss are a norm, a ReLU and the head, and no other linear map but those of a block that it looks through.
    guess: which taps have a learned guess (see `guesses`): 'none', the name of the first that the model has one for, or
      'all'. In the LocalMixer the first is 'after_channel', guessed through the grouped layer; 'after_token' is guessed
      through that and the one before.
    guess_rate: learning rate (Adam's) of what guesses go through.
    tap_passes: with separate taps, numbers of passes of their own for taps of these names; 0: `passes`.
    sharing: 'paper' (weights' tangents shared by the batch, activities' not), 'shared' or 'independent'.
    credit: weight perturbation's rule for groups. 'exact' credits a weight with all the losses it influences.
      'paper' credits the columns of the linear layer before the grouped one with their own group only, as
      the authors' program does; biased, because the norm after that layer carries them to every group.
    step: ε of finite differences.
    patch, group: whether losses are cut by patch and by group.
    every: blocks per stage of a greedy rule.
    overlap: greedy stages are overlapping pairs of blocks.
    head_ahead: whether the head of a block reads the features that a slow average of the next block makes of its
      output, see `lfg_jax.losses.ahead`.
    head_average: what that average keeps of itself in a step.
    micro_batch: most examples whose gradients are computed at once; 0: what suits the machine, see `parts`.
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
  step: float = 1e-3
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
    for field, number in (('step', self.step), ('guess_rate', self.guess_rate)):
      if number <= 0:
        raise ValueError(f'estimator.{field} is {number!r}; allowed: more than 0')
    if not 0 <= self.head_average < 1:
      raise ValueError(f'losses.head_average is {self.head_average!r}; allowed: 0 … 1, without 1')
    if self.overlap and self.every > 1:
      raise ValueError(
        f'losses.overlap=True and losses.every={self.every} exclude each other; allowed: one of them'
      )

  @classmethod
  def read(cls, config: Any, **changes: Any) -> 'Options':
    """Those of a config, with changes."""
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
    """With the rule's own choice for what is 'auto', as far as the model has it.

    Raises:
      ValueError: fields that contradict each other, or that rule or model have no use for.
    """
    # A tap further away needs the guesses of all between: its own alone would come through their kernels.
    one_of('estimator.guess', self.guess, ('auto', 'none', *tuple(model.guessed)[:1], 'all'))
    for tap in self.tap_passes:
      one_of('tap of estimator.tap_passes', tap, model.taps)
    one_block = rule.cut and self.every == 1 and not self.overlap
    quiet = rule.quiet and self.taps != 'joint'
    choice: dict[str, Any] = {
      'taps': 'separate' if quiet else 'joint',
      'last_tap': 'exact' if rule.quiet and model.boundary else 'perturbed',
      'guess': next(iter(model.guessed), 'none') if quiet and one_block else 'none',
    }
    open_fields = {
      field: value for field, value in choice.items() if getattr(self, field) == 'auto'
    }
    options = dataclasses.replace(self, **open_fields)
    options._check_activity(rule, model, one_block)
    return options

  def _check_activity(self, rule: Rule, model: StagedModel, one_block: bool) -> None:
    if self.last_tap == 'exact' and not (
      rule.estimator == 'activity' and rule.cut and model.boundary
    ):
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
