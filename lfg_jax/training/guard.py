"""Processes under guard: a child does the work, and its guard reports in one line how it ended.

When one process of a run is lost, JAX ends the others from C++, with a page of text and SIGABRT.
Nothing inside them can catch this. So a forked child does the work, and the guard reads the child's
text.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import NamedTuple, NoReturn

from lfg_jax.errors import LOST, UserError, told

GOES_ON = 'the same command goes on from the last checkpoint'
_RECORD = re.compile(r'[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] ')
_SERVICE = re.compile(r'coordination_|preemption_|client\.h|service\.cc|distributed')
_MISSING = re.compile(r'unhealthy \(stopped sending heartbeats\):\s*([\d, ]+)')
_POLL_SECONDS = 0.1
_LAST = '\x02'  # marks a child's last line


def guard(numbers: Sequence[int | None], grace: float) -> int | None:
  """Forks a child for each number, and returns that number in the child.

  The guard itself never returns. It exits with the worst exit code of its children, and passes
  SIGTERM and Ctrl-C on to them as SIGTERM. Must be called before JAX has looked for devices.

  Args:
    numbers: the numbers of the processes; None where only the cluster knows the number.
    grace: seconds that the other children have to end after one has failed, before they are killed.
  """
  children = []
  for place, number in enumerate(numbers):
    read, write = os.pipe()
    own = os.getpid()
    pid = os.fork()
    if pid == 0:
      os.close(read)
      _be_child(own, write, speaks=place == 0)
      return number
    os.close(write)
    children.append(Child(pid, number, Text(read, shown=place == 0)))
  _watch(children, grace)


def _be_child(parent: int, pipe: int, *, speaks: bool) -> None:
  """Sends C++ text to the pipe. Python's text goes there too, except in the first process."""
  os.setpgid(0, 0)  # Ctrl-C then reaches only the guard
  if speaks:
    sys.stdout, sys.stderr = (os.fdopen(os.dup(file), 'w', buffering=1) for file in (1, 2))
  for file in (1, 2):
    os.dup2(pipe, file)
  os.close(pipe)
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
  """Ends this child if its guard has been killed."""
  while os.getppid() == parent:
    time.sleep(_POLL_SECONDS)
  os._exit(128 + signal.SIGKILL)


class Text(threading.Thread):
  """Reads a child's text from its pipe, and hides the records of JAX's distributed service.

  Attributes:
    hidden: those records.
    held: text to show if the child fails in a way of its own; empty if text is shown at once.
    told: whether the child has printed its last line and needs none from its guard.
  """

  def __init__(self, pipe: int, *, shown: bool) -> None:
    super().__init__(daemon=True)
    self.hidden: list[str] = []
    self.held: list[str] = []
    self.told = False
    self._pipe, self._shown = pipe, shown
    self.start()

  def run(self) -> None:
    """Reads the pipe to its end."""
    hides = False
    with os.fdopen(self._pipe, errors='replace') as lines:
      for line in lines:
        if line.startswith(_LAST):
          self.told = True
          self._show(line.removeprefix(_LAST))
          continue
        if match := _RECORD.match(line):
          hides = bool(_SERVICE.search(match[1]))
        if hides:
          self.hidden.append(line)
        elif not line.startswith('[Gloo]'):
          self._show(line)

  def _show(self, line: str) -> None:
    if self._shown:
      print(line, end='', file=sys.stderr, flush=True)
    else:
      self.held.append(line)


def lost_by(text: str) -> str | None:
  """Says which process is lost, from records of JAX's distributed service; None: they do not tell.

  >>> lost_by('The following tasks are unhealthy (stopped sending heartbeats):\\n1\\n')
  'process 1 is gone'
  >>> lost_by('Failed to send RPC to coordination service. Either the leader task')
  'process 0 is gone'
  """
  if match := _MISSING.search(text):
    return f'process {match[1].strip()} is gone'
  if 'leader task' in text:
    return 'process 0 is gone'
  return 'one ended' if 'detected fatal errors' in text else None


class Child(NamedTuple):
  """A process under guard."""

  pid: int
  number: int | None
  text: Text


def _watch(children: Sequence[Child], grace: float) -> NoReturn:
  """Waits for all children, and exits with the worst of their exit codes."""
  _pass_on(children)
  codes: dict[int, int] = {}
  patience_ends = float('inf')
  while left := [child for child in children if child.pid not in codes]:
    if time.monotonic() > patience_ends:
      _send(signal.SIGKILL, left)
    for child in left:  # by pid: the first process of a container inherits others' children
      pid, status = os.waitpid(child.pid, os.WNOHANG)
      if pid:
        codes[pid] = _code(child, os.waitstatus_to_exitcode(status))
        if codes[pid]:
          patience_ends = min(patience_ends, time.monotonic() + grace)
    time.sleep(_POLL_SECONDS)
  own_way = {code for code in codes.values() if code not in (0, LOST, codes[children[0].pid])}
  for child in children:
    if codes[child.pid] in own_way:
      print(*child.text.held, sep='', end='', file=sys.stderr)
  sys.exit(max(codes.values()))


def _pass_on(children: Sequence[Child]) -> None:
  """Passes signals to the guard on to its children, as SIGTERM."""

  def pass_on(number: int, frame: FrameType | None) -> None:
    _send(signal.SIGTERM, children)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)


def _send(number: int, children: Iterable[Child]) -> None:
  for child in children:
    with contextlib.suppress(ProcessLookupError):
      os.kill(child.pid, number)


def _code(child: Child, code: int) -> int:
  """Returns a child's exit code as a shell would give it.

  Also prints the last line of a child that a signal ended before it could print its own.
  """
  child.text.join(timeout=1)
  if code >= 0:
    return code
  name = 'a process' if child.number is None else f'process {child.number}'
  number = signal.Signals(-code)
  lost = lost_by(''.join(child.text.hidden))
  is_lost = number == signal.SIGABRT and lost
  if not child.text.told:
    end = f'lost another one ({lost})' if is_lost else f'was ended by {number.name}'
    complain(UserError(f'{name} {end}; {GOES_ON}'))
  return LOST if is_lost else 128 + number


def complain(error: UserError) -> int:
  """Prints a program's last line, below the frames of the user's code, and returns its exit code."""
  print(told(error), file=sys.stderr)
  return error.exit_code


def tell(error: UserError) -> int:
  """Like `complain`, for a child: its guard prints the line, even if JAX then ends the child."""
  os.write(2, ''.join(f'{_LAST}{line}\n' for line in told(error).splitlines()).encode())
  return error.exit_code
