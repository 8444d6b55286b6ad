"""Traces chosen steps with jax.profiler: `config.profile=FIRST:LAST`."""

import pathlib
import re
from typing import Any

import jax

from lfg_jax.errors import UserError


def steps_of(text: str | None) -> tuple[int, int] | None:
  """First and last step in 'FIRST:LAST', counted from 1; None if there is no valid text.

  >>> steps_of('10:19')
  (10, 19)
  """
  match = re.fullmatch(r'(\d{1,9}):(\d{1,9})', text or '')
  if not match or not 1 <= int(match[1]) <= int(match[2]):
    return None
  return int(match[1]), int(match[2])


def check(text: str | None, total: int) -> None:
  """Raises UserError if the last step to trace is after the last of the run's `total` steps."""
  steps = steps_of(text)
  if steps and steps[1] > total:
    raise UserError(f'profile is {text!r}; allowed: 1 … {total}, the steps of the run')


class Trace:
  """A context manager that traces the dispatches with the chosen steps, if `active`.

  TensorBoard shows the trace beside the run's curves; ui.perfetto.dev reads its trace.json.gz.
  """

  def __init__(self, folder: pathlib.Path, text: str | None, *, active: bool) -> None:
    self._folder = folder
    self._steps = steps_of(text) if active else None
    self._runs = False

  def before(self, step: int, count: int) -> None:
    """Must be called before steps `step` + 1 … `step` + `count` are dispatched."""
    if self._steps and not self._runs and step < self._steps[1] and step + count >= self._steps[0]:
      jax.profiler.start_trace(self._folder)
      self._runs = True

  def after(self, step: int, result: Any) -> None:
    """Must be called after the steps up to `step`, which compute `result`, are dispatched."""
    if self._steps and self._runs and step >= self._steps[1]:
      jax.block_until_ready(result)
      self._stop()

  def _stop(self) -> None:
    self._steps = None
    if self._runs:
      self._runs = False
      jax.profiler.stop_trace()

  def __enter__(self) -> 'Trace':
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop()
