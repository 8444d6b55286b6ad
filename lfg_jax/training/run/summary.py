"""The files that a finished run leaves: curves.png and summary.json."""

import json
import pathlib
from typing import Any

import jax

import lfg_jax
from lfg_jax.training.hosts import processes
from lfg_jax.training.run import clock, metrics
from lfg_jax.training.run.metrics import Row


def write(
  workdir: pathlib.Path,
  facts: dict[str, Any],
  rows: list[Row],
  seconds: dict[str, float],
  flop: float | None,
) -> dict[str, Any]:
  """Writes both files, in the first process only; returns the summary.

  Args:
    workdir: the run's folder.
    facts: entries of the summary that describe the run.
    rows: the run's rows of metrics.
    seconds: as returned by `clock.Clock.read`.
    flop: number of operations that the run's gradients need at least; None: unknown.
  """
  rate = None if flop is None else float(f'{flop / seconds["steps"]:.4g}')
  summary = {
    **facts,
    'seconds': round(seconds['seconds'], 2),
    'time': shares(seconds),
    'flop_per_second': rate,
    'jax': jax.__version__,
    'lfg_jax': lfg_jax.__version__,
  }
  if not processes.is_first():
    return summary
  from lfg_jax.training.run import plots  # here: matplotlib takes a sixth of a program's start

  title = '{model} on {dataset}, {algorithm}, seed {seed}'.format(**facts)
  plots.curves(workdir / 'curves.png', {facts['algorithm']: [rows]}, title)
  metrics.write_atomically(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
  return summary


def last_line(summary: dict[str, Any]) -> str:
  """What a run has reached, in words.

  >>> last_line({'test_error_percent': 0.8357, 'test_mistakes': 3, 'test_examples': 359})
  'test error 0.8 % (3 of 359)'
  """
  return 'test error {test_error_percent:.1f} % ({test_mistakes} of {test_examples})'.format(
    **summary
  )


def shares(seconds: dict[str, float]) -> dict[str, float]:
  """Seconds of every part in `clock.PARTS`, and of everything else as 'other'.

  >>> shares({'seconds': 9, **dict.fromkeys(clock.PARTS, 1.5)})['other']
  1.5
  """
  parts = {part: seconds[part] for part in clock.PARTS}
  parts['other'] = max(0.0, seconds['seconds'] - sum(parts.values()))
  return {part: round(value, 2) for part, value in parts.items()}
