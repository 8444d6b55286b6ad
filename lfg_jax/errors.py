"""Mistakes that a user can mend, told in one line."""

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

LOST = 75  # exit code of a process that lost another one: try again (EX_TEMPFAIL of sysexits.h)


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


def one_of(field: str, given: Any, allowed: Any) -> None:
  """Raises ValueError, in one line, for a value that is not allowed."""
  if given not in allowed:
    names = [str(one) for one in allowed]
    near = difflib.get_close_matches(str(given), names, 1, 0.7)
    hint = f'did you mean {near[0]}? ' if near else ''
    raise ValueError(f'{field} is {given!r}; {hint}allowed: {", ".join(names)}')
