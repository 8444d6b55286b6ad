"""The files that a finished run leaves: curves.png and summary.json."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.training import clock, processes, run_log, timing
from lfg_jax.training.run_log import Row


def write(
  workdir: pathlib.Path,
  facts: dict[str, Any],
  rows: list[Row],
  seconds: dict[str, float],
  flop: float | None,
  precision: str = 'float32',
) -> dict[str, Any]:
  """Writes both files, in the first process only; returns the summary.

  Args:
    workdir: the run's folder.
    facts: entries of the summary that describe the run.
    rows: the run's rows of metrics.
    seconds: as returned by `clock.Clock.read`.
    flop: number of operations that the run's gradients need at least; None: unknown.
    precision: dtype of its matrix products.
  """
  last = rows[-1]
  summary = {
    **facts,
    'train_error': last['train_error'],
    'test_error': last['test_error'],
    'seconds': round(seconds['seconds'], 2),
    'time': shares(seconds),
  }
  if not processes.is_first():
    return summary
  if flop is not None:
    rate, peak = flop / seconds['steps'], machine_rate(precision)
    summary['flop_per_second'] = float(f'{rate:.4g}')
    summary['utilisation'] = float(f'{rate / peak:.4g}') if peak else None
  from lfg_jax.training import plots  # here: matplotlib takes a sixth of a program's start

  plots.curves(workdir / 'curves.png', {facts['algorithm']: [rows]})
  run_log.write_atomically(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
  return summary


def shares(seconds: dict[str, float]) -> dict[str, float]:
  """Seconds of every part in `clock.PARTS`, and of everything else as 'other'.

  >>> shares({'seconds': 9, **dict.fromkeys(clock.PARTS, 1.5)})['other']
  1.5
  """
  parts = {part: seconds[part] for part in clock.PARTS}
  parts['other'] = max(0.0, seconds['seconds'] - sum(parts.values()))
  return {part: round(value, 2) for part, value in parts.items()}


def machine_rate(precision: str) -> float | None:
  """Operations per second of a plain matrix product on all devices; None: too little memory.

  One device is measured, and its rate is multiplied by the number of devices. On CPUs, it is
  multiplied by the number of processes, because virtual devices share their process's CPU.
  """
  devices = jax.process_count() if jax.default_backend() == 'cpu' else jax.device_count()
  try:
    product, flop = timing.matmul(jnp.dtype(precision))
    return devices * flop / (1e-3 * timing.one_ms(product))
  except jax.errors.JaxRuntimeError:  # the run fills the device's memory
    return None
