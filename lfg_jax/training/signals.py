"""SIGTERM and Ctrl-C: a run that is asked to stop saves its state first."""

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
  """A context in which SIGTERM and Ctrl-C only request a stop; a second one acts as usual.

  Several processes must all stop at the same step. There, this class installs no handlers: JAX
  makes the processes agree on a step after any of them has received a SIGTERM.
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
    """Whether the run should stop; must be called after every dispatch."""
    if jax.process_count() > 1 and processes.terminated():
      self.received = signal.SIGTERM
    return bool(self.received)
