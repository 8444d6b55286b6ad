"""SIGTERM and Ctrl-C: a run that is asked to stop saves its state first."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax

from lfg_jax.errors import UserError
from lfg_jax.training.hosts import processes

Item = TypeVar('Item')


class Interrupted(UserError):
  """A signal ended the run, after its state was saved."""

  def __init__(self, step: int, number: int) -> None:
    super().__init__(
      f'{signal.Signals(number).name}: saved step {step}; the same command goes on from there'
    )
    self.exit_code = 128 + number  # as shells report a signal


class Signals:
  """A context in which SIGTERM and Ctrl-C only request a stop; a second one acts as usual.

  Several processes must stop at the same dispatch, or the others wait for ever for the one that
  stopped. So they exchange on their devices, with every dispatch, what they have received. JAX's
  preemption service does the same with a counter, which breaks when Orbax counts too.

  Attributes:
    stop: the number of the signal that all processes stop for; 0: they go on.
  """

  def __init__(self) -> None:
    self.stop = 0
    self._received = 0

  def __enter__(self) -> 'Signals':
    ours = (signal.SIGTERM, signal.SIGINT)
    self._previous = {number: signal.signal(number, self._receive) for number in ours}
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _receive(self, number: int, _: FrameType | None) -> None:
    self._received = number
    self.__exit__()

  def ask(self) -> jax.Array | None:
    """Asks all processes what they have received; to be called just before a dispatch."""
    return None if jax.process_count() == 1 else processes.largest(self._received)

  def stops(self, question: jax.Array | None) -> bool:
    """Whether the run should stop after the dispatch; waits for the dispatch before it at most."""
    self.stop = self._received if question is None else int(question)
    return bool(self.stop)

  def until_stop(self, items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items, with which the caller dispatches, until the run should stop."""
    for item in items:
      question = self.ask()
      yield item
      if self.stops(question):
        return
