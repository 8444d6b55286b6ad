"""The algorithms of the paper's tables, as a registry of compositions; and the options that vary them.

Which name an estimator has is in `Rule`; `lfg_jax.algorithms` puts the parts together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lfg_jax import passes, tangents
from lfg_jax.losses import Cut
from lfg_jax.mixer import TAPS


class Rule(NamedTuple):
  """One row of the registry.

  Attributes:
    estimator: 'backprop', 'weight', 'activity' or 'direct_feedback'.
    cut: whether gradients are stopped between blocks (greedy).
    local: whether local losses are used.
    feedback: whether linear layers send gradients back through fixed random matrices.
    finite: derivatives by finite differences instead of `jax.jvp`.
  """
  estimator: str
  cut: bool = False
  local: bool = False
  feedback: bool = False
  finite: bool = False


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
    'LG-FG-A': Rule('activity', **_LOCAL_GREEDY),
    'FD-W': Rule('weight', finite=True),
    'FD-A': Rule('activity', finite=True),
    'LG-FD-W': Rule('weight', finite=True, **_LOCAL_GREEDY),
    'LG-FD-A': Rule('activity', finite=True, **_LOCAL_GREEDY),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Fields of config.estimator and config.losses.

  Attributes:
    law: name of a tangent law, of `tangents.LAWS`.
    passes: tangents per step.
    chunk: how many of them are in memory at once; 0: all, which takes more memory and, on CPUs, more time.
    combine: 'mean' of the passes, or 'projection' on their span; see `passes.combine`.
    taps: activity perturbation of all taps at once ('joint') or of each by itself ('separate').
    tap_passes: with separate taps, numbers of passes of their own for taps of these names; 0: `passes`.
    sharing: 'paper' (weights' tangents shared by the batch, activities' not), 'shared' or 'independent'.
    credit: weight perturbation's rule for groups. 'exact' credits a weight with all the losses it influences.
      'paper' credits the columns of the linear layer before the grouped one with their own group only, as
      the authors' program does; biased, because the norm after that layer carries them to every group.
    step: ε of finite differences.
    patch, group: whether losses are cut by patch and by group.
    every: blocks per stage of a greedy rule.
    overlap: greedy stages are overlapping pairs of blocks.
    micro_batch: examples whose gradients are computed at once; 0: what suits the machine, see `parts`.
  """
  law: str = 'rademacher'
  passes: int = 1
  chunk: int = 4
  combine: str = 'mean'
  taps: str = 'joint'
  tap_passes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  sharing: str = 'paper'
  credit: str = 'exact'
  step: float = 1e-3
  patch: bool = True
  group: bool = True
  every: int = 1
  overlap: bool = False
  micro_batch: int = 0

  def __post_init__(self) -> None:
    one_of('estimator.law', self.law, tangents.LAWS)
    one_of('estimator.sharing', self.sharing, ('paper', 'shared', 'independent'))
    one_of('estimator.combine', self.combine, passes.COMBINATIONS)
    one_of('estimator.taps', self.taps, ('joint', 'separate'))
    for tap in self.tap_passes:
      one_of('tap of estimator.tap_passes', tap, TAPS)
    one_of('estimator.credit', self.credit, ('exact', 'paper'))
    for field, value, low in (('estimator.passes', self.passes, 1), ('estimator.chunk', self.chunk, 0),
                              *((f'estimator.tap_passes.{tap}', n, 0) for tap, n in self.tap_passes.items()),
                              ('losses.every', self.every, 1), ('micro_batch', self.micro_batch, 0)):
      if value < low:
        raise ValueError(f'{field} is {value!r}; allowed: {low} or more')
    if self.step <= 0:
      raise ValueError(f'estimator.step is {self.step!r}; allowed: more than 0')
    most = max(self.passes, *self.tap_passes.values(), 0)
    if self.combine == 'projection' and (self.taps == 'joint' or 0 < self.chunk < most):
      raise ValueError(f"estimator.combine='projection' needs all passes of one tap at once, not taps={self.taps!r}, "
                       f"chunk={self.chunk}; allowed: taps='separate', and chunk=0 or {most} or more")
    if self.taps == 'joint' and any(self.tap_passes.values()):
      raise ValueError("estimator.tap_passes is for taps perturbed one by one; allowed: estimator.taps='separate'")
    if self.overlap and self.every > 1:
      raise ValueError(f'losses.overlap=True and losses.every={self.every} exclude each other; allowed: one of them')

  @property
  def cut(self) -> Cut:
    return Cut(self.patch, self.group)


def one_of(field: str, given: Any, allowed: Any) -> None:
  """Raises ValueError, in one line, for a value that is not allowed."""
  if given not in allowed:
    raise ValueError(f'{field} is {given!r}; allowed: {", ".join(map(str, allowed))}')
