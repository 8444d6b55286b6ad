"""Measures what a run spends its time on, across interruptions."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax

Item = TypeVar('Item')
PARTS = ('compiling', 'input', 'steps', 'evaluation', 'checkpoints')
_spans: list[tuple[float, float]] = []  # of compilation, in order and disjoint


def _compiled(event: str, start_time: float, end_time: float, **_: str | int) -> None:
  """Records a compilation span. JAX reports inner spans before the span around them."""
  if event.startswith('/jax/core/compile/'):
    while _spans and _spans[-1][0] >= start_time:
      _spans.pop()
    _spans.append((start_time, end_time))


jax.monitoring.register_event_time_span_listener(_compiled)


def compiling() -> float:
  """Seconds that this process has spent on tracing and compiling so far."""
  return sum(end - begin for begin, end in _spans)


class Clock:
  """Seconds since a run began, excluding interruptions, and what they were spent on.

  Input counts only while the program waits for it. Up to two dispatches may run in the meantime.
  """

  def __init__(self, begin: float) -> None:
    """Starts the clock at `begin`, a time of `time.monotonic`."""
    self._begin = begin
    self._compiled = compiling()
    self._parts = dict.fromkeys(PARTS, 0.0)

  def go_on(self, stored: dict[str, float]) -> None:
    """Adds the times stored in a checkpoint; one from an older version has no parts."""
    self._begin -= stored['seconds']
    self._parts = {part: value + stored.get(part, 0) for part, value in self._parts.items()}

  def read(self) -> dict[str, float]:
    """Returns the total 'seconds', and the seconds of every part."""
    compiled = self._parts['compiling'] + compiling() - self._compiled
    return {'seconds': time.monotonic() - self._begin, **self._parts, 'compiling': compiled}

  @contextlib.contextmanager
  def on(self, part: str) -> Iterator[None]:
    """Counts the time inside the context for `part`, except for compilation."""
    begin, compiled = time.monotonic(), compiling()
    try:
      yield
    finally:
      self._parts[part] += time.monotonic() - begin - (compiling() - compiled)

  def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items, and counts the time to get them as input."""
    left, none = iter(items), object()
    while True:
      with self.on('input'):
        item: Any = next(left, none)
      if item is none:
        return
      yield item
