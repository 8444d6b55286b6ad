"""Mistakes that a user can mend, told in one line."""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

LOST = 75  # exit code of a process that lost another one: try again (EX_TEMPFAIL of sysexits.h)
GOES_ON = 'the same command goes on from the last checkpoint'


class UserError(Exception):
  """Something that the user can mend; the message is one line.

  Attributes:
    exit_code: of a program that ends with it.
  """

  exit_code = 2


@contextlib.contextmanager
def as_user_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
  """Exceptions of these kinds, by default those about arguments and files, as `UserError`s."""
  try:
    yield
  except kinds as error:
    raise UserError(' '.join(str(error).split())) from error


def complain(error: UserError) -> int:
  """Prints a program's last line, and returns its exit code."""
  print(f'{pathlib.Path(sys.argv[0]).name}: {error}', file=sys.stderr)
  return error.exit_code


def exit_code(work: Callable[[], None]) -> int:
  """Does `work`, and returns the program's exit code; a mistake or a Ctrl-C is one line.

  A Ctrl-C ends the program at once, because XLA may crash where it is interrupted.
  """
  try:
    work()
  except KeyboardInterrupt:
    complain(UserError('SIGINT: ended at once; what was saved before is kept'))
    sys.stdout.flush()
    os._exit(128 + signal.SIGINT)
  except UserError as error:
    return complain(error)
  return 0


def one_of(field: str, given: Any, allowed: Any) -> None:
  """Raises ValueError, in one line, for a value that is not allowed."""
  if given not in allowed:
    raise ValueError(f'{field} is {given!r}; allowed: {", ".join(map(str, allowed))}')
