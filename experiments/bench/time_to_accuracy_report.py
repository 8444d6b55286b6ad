"""Rows, table and figure of time_to_accuracy.py, from its curves."""

import math
import pathlib
import statistics
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lfg_jax.training.run import plots, results

Row = dict[str, Any]
Curve = dict[str, Any]


def rows(curves: list[Curve], thresholds: list[float]) -> list[Row]:
  """A row per algorithm, rate and threshold: medians over seeds, ratios to BP at its best rate.

  A median is None if half of the seeds or more do not reach the threshold. 'best' marks the rows of
  an algorithm's best rate.
  """
  groups: dict[tuple[str, float], list[Curve]] = {}
  for curve in curves:
    groups.setdefault((curve['algorithm'], curve['rate']), []).append(curve)
  found = [_row(case, own, threshold) for case, own in groups.items() for threshold in thresholds]
  best = {name: _best([row for row in found if row['algorithm'] == name]) for name, _ in groups}
  bp = {
    row['threshold']: row['seconds']
    for row in found
    if row['algorithm'] == 'BP' and row['rate'] == best['BP']
  }
  for row in found:
    reference = bp.get(row['threshold'])
    row['ratio_to_bp'] = row['seconds'] / reference if row['seconds'] and reference else None
    row['best'] = row['rate'] == best[row['algorithm']]
  return found


def _row(case: tuple[str, float], curves: list[Curve], threshold: float) -> Row:
  seconds, steps = (
    [_first(curve, key, threshold) for curve in curves] for key in ('seconds', 'steps')
  )
  return {
    'algorithm': case[0],
    'rate': case[1],
    'threshold': threshold,
    'seeds': len(curves),
    'seconds': _median(seconds),
    'steps': _median(steps),
    'seconds_of_seeds': seconds,
  }


def _first(curve: Curve, key: str, threshold: float) -> float | None:
  """The value of `key` at the first evaluation with an error of at most the threshold."""
  values = zip(curve[key], curve['test_error_percent'], strict=True)
  return next((value for value, error in values if error <= threshold), None)


def _median(values: list[float | None]) -> float | None:
  median = statistics.median(math.inf if value is None else value for value in values)
  return median if math.isfinite(median) else None


def _best(own: list[Row]) -> float:
  """The first rate to reach the strictest threshold that any rate reaches."""
  reached = [row for row in own if row['seconds'] is not None]
  first = min(reached, key=lambda row: (row['threshold'], row['seconds']), default=own[0])
  return first['rate']


def table(found: list[Row], origin: dict[str, Any]) -> str:
  """A Markdown table: seconds and, in parentheses, the ratio to BP and steps."""
  config, thresholds = (origin['settings'][key] for key in ('config', 'thresholds'))
  settings = (
    f'{config["model"]["size"]} on {config["dataset"]}, batch {config["batch_size"]}, '
    f'{config["optimizer"]["name"]} with constant rates; {origin["device"]}, '
    f'jax {origin["jax"]}, commit {origin["commit"]}.'
  )
  text = (
    f'{settings} Seconds of training until the test error is … % or less, evaluated every '
    f'{origin["settings"]["interval"]} steps: medians over seeds (× BP; steps). –: half of '
    'them or more do not reach it. *: best rate of its algorithm.'
  )
  head = ' | '.join(['algorithm | rate | seeds', *(f'{threshold:g} %' for threshold in thresholds)])
  cells = []
  for name, rate in dict.fromkeys((row['algorithm'], row['rate']) for row in found):
    own = [row for row in found if (row['algorithm'], row['rate']) == (name, rate)]
    star = '*' if own[0]['best'] else ''
    cells.append([name, f'{rate:g}{star}', str(own[0]['seeds']), *map(_cell, own)])
  return f'{text}\n\n{results.in_table(head, cells)}\n'


def _cell(row: Row) -> str:
  if row['seconds'] is None:
    return '–'
  ratio = '' if row['ratio_to_bp'] is None else f'{row["ratio_to_bp"]:.2f} ×; '
  return f'{row["seconds"]:.3g} ({ratio}{row["steps"]:g})'


def draw(
  path: pathlib.Path, curves: list[Curve], found: list[Row], thresholds: list[float]
) -> None:
  """Draws test error against seconds of training, for every seed, at each algorithm's best rate."""
  figure = Figure(figsize=(9, 5), layout='constrained')
  axes = figure.subplots()
  for threshold in thresholds:
    axes.axhline(threshold, color='0.6', linewidth=0.6)
  best = dict.fromkeys((row['algorithm'], row['rate']) for row in found if row['best'])
  for colour, (name, rate) in zip(plots.COLOURS, best, strict=False):
    own = [curve for curve in curves if (curve['algorithm'], curve['rate']) == (name, rate)]
    for curve in own:
      errors = [max(error, 1e-2) for error in curve['test_error_percent'][1:]]
      axes.loglog(curve['seconds'][1:], errors, '.-', color=colour, markersize=3, linewidth=1)
  axes.set(xlabel='seconds of training, without evaluation', ylabel='test error, %')
  others = [
    tick
    for tick in (10, 20, 50, 90)
    if all(abs(math.log(tick / t)) > 0.2 for t in thresholds if t > 0)
  ]
  axes.set_yticks([*(t for t in thresholds if t > 0), *others])
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter('{x:g}')
  axes.minorticks_off()
  axes.grid(axis='x', alpha=0.3)
  ends = [
    next(
      curve['test_error_percent'][-1]
      for curve in curves
      if (curve['algorithm'], curve['rate']) == case
    )
    for case in best
  ]
  plots.name_lines(axes, [f'{name}, rate {rate:g}' for name, rate in best], ends)
  figure.savefig(path, dpi=120)
