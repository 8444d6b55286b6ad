"""A diagnosis as data, as tables and as a plot."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lfg_jax.diagnosis.bias_test import SIGMAS, Accuracy
from lfg_jax.diagnosis.influence import Influence


@dataclasses.dataclass(frozen=True, repr=False)
class Diagnosis:
  """What `diagnose` found.

  Attributes:
    num_tangents: the numbers of tangents K.
    draws: number of estimates for every K.
    taps: for every perturbed tap, its influence on the losses, real and declared.
    signals: for every perturbed tap, the accuracy of its signal (its gradient estimate).
    gradients: the same for every leaf of the differentiated arguments.
    overall: the same for all leaves together.
    refused: why `value_and_activity_grad` refuses the function as it is; None if it does not.
  """

  num_tangents: tuple[int, ...]
  draws: int
  taps: tuple[Influence, ...]
  signals: tuple[Accuracy, ...]
  gradients: tuple[Accuracy, ...]
  overall: Accuracy
  refused: str | None

  @property
  def problems(self) -> list[str]:
    """All problems found, one line each."""
    wrong = [f'tap {tap.declared.name}: {tap.verdict}' for tap in self.taps if tap.is_wrong]
    kinds = {'signal': self.signals, 'gradient': self.gradients}
    return wrong + [
      f'{kind} of {one.name}: {one.verdict}'
      for kind, all_ in kinds.items()
      for one in all_
      if one.is_biased or not one.is_finite
    ]

  def __str__(self) -> str:
    refused = [
      f'value_and_activity_grad refuses: {self.refused}',
      'What follows is the estimate as declared, with mixes_examples=False.',
      '',
    ]
    return '\n'.join(
      [*(refused if self.refused else []), *self._influences(), '', *self._accuracies()]
    )

  def __repr__(self) -> str:
    return str(self)

  def _influences(self) -> list[str]:
    rows = [['tap', 'shape', 'd', 'local_axes', 'credited', 'real', 'verdict']]
    for tap in self.taps:
      declared = tap.declared
      scanned = [f'{size} steps of' for size in declared.scanned]
      rows.append(
        [
          declared.name,
          ' '.join([*scanned, '×'.join(map(str, declared.shape))]),
          str(declared.dimensions),
          str(declared.local_axes),
          str(declared.credited),
          '?' if tap.real is None else str(tap.real),
          tap.verdict,
        ]
      )
    return ['Which losses do the taps influence?', *aligned(rows, right=(2, 3, 4, 5))]

  def _accuracies(self) -> list[str]:
    is_orthogonal = any(one.orthogonal for one in (*self.signals, *self.gradients, self.overall))
    distribution = ['c', 'a', 'b'] if is_orthogonal else ['c', 'a']
    rows = [
      [
        'estimate',
        *(f'cos({K})' for K in self.num_tangents),
        *(f'err({K})' for K in self.num_tangents),
        *distribution,
        'scale',
        'sigmas',
        'verdict',
      ]
    ]
    named = [
      *((f'signal {one.name}', one) for one in self.signals),
      *((f'grad {one.name}', one) for one in self.gradients),
      ('whole gradient', self.overall),
    ]
    for name, one in named:
      fitted = [one.limit, one.noise, one.orthogonal][: len(distribution)]
      relative = [
        *(f'{x:.3f}' for x in one.cosine),
        *map(number, one.error),
        *map(number, fitted),
        f'{one.scale:.3f}±{one.scale_se:.3f}',
      ]
      largest = max(one.sigmas, key=abs)
      sigmas = f'{largest:.1f}' if abs(largest) < 100 else '> 100'
      sigmas = '-' if one.verdict == 'exact' else sigmas
      shown = ['-'] * len(relative) if one.is_zero else relative
      rows.append([name, *shown, sigmas, one.verdict])
    head = (
      'How good is the estimate with K tangents? cos(K) = c/√(1 + a/K'
      f'{" - b" if is_orthogonal else ""}); biased: above {SIGMAS:g} sigmas '
      f'({self.draws} draws)'
    )
    return [head, *aligned(rows, right=range(1, len(rows[0]) - 1))]

  def plot(self, axes: Any = None) -> Any:
    """Plots cosines against K with standard errors and fitted distributions, and returns the figure.

    Args:
      axes: matplotlib axes to draw in; None: a new figure.
    """
    if axes is None:
      import matplotlib.pyplot as plt

      _, axes = plt.subplots(layout='constrained')
    K = np.asarray(self.num_tangents, float)
    fine = np.geomspace(K[0], 64 * K[-1], 100)
    named = [(f'signal {one.name}', 'o', one) for one in self.signals]
    for label, marker, one in [*named, ('whole gradient', 's', self.overall)]:
      if one.is_zero or not one.is_finite:
        continue
      line = axes.errorbar(
        K,
        one.cosine,
        one.cosine_se,
        fmt=marker,
        capsize=3,
        markersize=5,
        color='k' if marker == 's' else None,
        label=f'{label}, c = {one.limit:.2f}',
      )
      axes.plot(fine, one.cosine_at(fine), color=line[0].get_color(), linewidth=0.9)
    axes.axhline(1, color='0.7', linewidth=0.8, linestyle=':')
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.set(xlabel='tangents K', ylabel='cosine with the gradient', ylim=(0, 1.05))
    axes.legend(fontsize='small')
    return axes.figure


def number(x: float) -> str:
  return '0' if abs(x) < 1e-9 else f'{x:.3g}'


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
  """Rows of text with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    [
      cell.rjust(width) if n in right else cell.ljust(width)
      for n, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    for row in rows
  ]
  return ['  '.join(line).rstrip() for line in lines]
