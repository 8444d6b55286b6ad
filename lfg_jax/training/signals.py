"""SIGTERM and Ctrl-C: a run that is asked to end saves its state first."""

import signal
from types import FrameType
from typing import Any

import jax

from lfg_jax.errors import UserError
from lfg_jax.training import processes


class Interrupted(UserError):
  """A signal ended the run, after its state was saved."""

  def __init__(self, step: int, number: int) -> None:
    super().__init__(
      f'{signal.Signals(number).name}: saved step {step}; the same command goes on from there'
    )
    self.exit_code = 128 + number  # as shells report a signal


class Signals:
  """While entered, SIGTERM and Ctrl-C only ask for an end; a second one acts as usual.

  With several processes the end must come at the same step in all: JAX agrees on one after a SIGTERM to any.
  """

  def __init__(self) -> None:
    self.received = 0

  def __enter__(self) -> 'Signals':
    ours = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    self._previous = {number: signal.signal(number, self._receive) for number in ours}
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number: int, _: FrameType | None) -> None:
    self.received = number
    self.__exit__()

  def ask_to_stop(self) -> bool:
    """To be called after every dispatch."""
    if jax.process_count() > 1 and processes.terminated():
      self.received = signal.SIGTERM
    return bool(self.received)
