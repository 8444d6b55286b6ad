"""Where the time of a run goes, over all stops."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax

Item = TypeVar('Item')
PARTS = ('compiling', 'input', 'steps', 'evaluation', 'checkpoints')
_spans: list[tuple[float, float]] = []  # of compilation, in order, none inside another


def _compiled(event: str, start_time: float, end_time: float, **_: str | int) -> None:
  """JAX tells of what was inside first."""
  if event.startswith('/jax/core/compile/'):
    while _spans and _spans[-1][0] >= start_time:
      _spans.pop()
    _spans.append((start_time, end_time))


jax.monitoring.register_event_time_span_listener(_compiled)


def compiling() -> float:
  """Seconds in which this process has traced and compiled so far."""
  return sum(end - begin for begin, end in _spans)


class Clock:
  """Seconds since a run began, were it without stops, and what they were spent on.

  Input counts while the program waits for it, when up to two dispatches may be at work.
  """

  def __init__(self, begin: float) -> None:
    """`begin`: by `time.monotonic`."""
    self._begin = begin
    self._compiled = compiling()
    self._parts = dict.fromkeys(PARTS, 0.0)

  def go_on(self, stored: dict[str, float]) -> None:
    """Adds what a checkpoint stored; one of an older version has no parts."""
    self._begin -= stored['seconds']
    self._parts = {part: value + stored.get(part, 0) for part, value in self._parts.items()}

  def read(self) -> dict[str, float]:
    """'seconds' in all, and those of every part."""
    compiled = self._parts['compiling'] + compiling() - self._compiled
    return {'seconds': time.monotonic() - self._begin, **self._parts, 'compiling': compiled}

  @contextlib.contextmanager
  def on(self, part: str) -> Iterator[None]:
    """What is done while this is entered counts for `part`, but for compilation."""
    begin, compiled = time.monotonic(), compiling()
    try:
      yield
    finally:
      self._parts[part] += time.monotonic() - begin - (compiling() - compiled)

  def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
    """The items; the time that they take counts as input."""
    left, none = iter(items), object()
    while True:
      with self.on('input'):
        item: Any = next(left, none)
      if item is none:
        return
      yield item
