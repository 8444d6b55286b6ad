"""Mistakes that a user can mend, told in one line; below the frames of the user's own files, if any."""

import contextlib
import difflib
import os
import pathlib
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from typing import Any

LOST = 75  # exit code of a process that lost another one: try again (EX_TEMPFAIL of sysexits.h)
GOES_ON = 'the same command goes on from the last checkpoint'
LONGEST = 300  # characters of a reason in one line; compilers give pages
_OURS = pathlib.Path(__file__).parent
_INSTALLED = {pathlib.Path(sysconfig.get_paths()[name]) for name in ('stdlib', 'scripts')}


class UserError(Exception):
  """Something that the user can mend; the message is one line.

  Attributes:
    exit_code: of a program that ends with it.
    frames: the traceback through the user's own files, in lines; empty if there are none.
  """

  exit_code = 2
  frames = ''


@contextlib.contextmanager
def as_user_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
  """Exceptions of these kinds, by default those about arguments and files, as `UserError`s.

  So are all that come from the user's own code, which we have called.
  """
  try:
    yield
  except Exception as error:
    frames = their_frames(error)
    if isinstance(error, UserError):
      error.frames = error.frames or frames
      raise
    if not frames and not isinstance(error, kinds):
      raise
    raise as_one_line(error, '' if isinstance(error, kinds) else _place(error)) from error


def as_one_line(error: Exception, what: str = '') -> UserError:
  """The error as a `UserError`; one that begins with `what` names its type too."""
  reason = ' '.join(str(error).split())
  if what:  # the words are not ours
    reason = reason if len(reason) <= LONGEST else f'{reason[:LONGEST]}…'
    reason = f'{what}: {type(error).__name__}: {reason}'
  made = UserError(reason)
  made.frames = their_frames(error)
  return made


def their_frames(error: BaseException, *, called: bool = False) -> str:
  """The traceback of an exception and its causes through the user's code; empty if there is none.

  The user's code is what we have called, and neither ours nor that of a library.

  Args:
    error: the exception.
    called: whether it is known that we have called what raised it.
  """
  frames = [traceback.FrameSummary(*at) for at in _theirs(error, called)]
  cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
  before = their_frames(cause, called=called or bool(frames)) if cause else ''
  in_file = isinstance(error, SyntaxError) and error.filename and _is_theirs(error.filename)
  if isinstance(error, UserError) or not (frames or in_file):
    return before
  own = ['Traceback through your own code:\n', *traceback.format_list(frames)]
  end = traceback.TracebackException(type(error), error, None)
  is_hint = re.compile('traceback_filtering', re.IGNORECASE)  # of JAX and grain, about their frames
  end.__notes__ = [note for note in end.__notes__ or () if not is_hint.search(note)]
  return before + ''.join([*own, *end.format_exception_only()])


def _theirs(error: BaseException, called: bool = False) -> list[tuple[str, int, str]]:
  """(file, line, function) of the user's frames; unless `called`, of those behind one of ours."""
  walked = traceback.walk_tb(error.__traceback__)
  frames = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in walked]
  is_ours = lambda file: file != __file__ and pathlib.Path(file).is_relative_to(_OURS)
  ours = [i for i, (file, *_) in enumerate(frames) if is_ours(file)]
  first = 0 if called else ours[0] if ours else len(frames)
  return [at for at in frames[first:] if _is_theirs(at[0])]


def _is_theirs(file: str) -> bool:
  path = pathlib.Path(file)
  libraries = {_OURS, *_INSTALLED}
  return not (
    file.startswith('<')
    or {'site-packages', 'dist-packages'} & {*path.parts}
    or any(path.is_relative_to(folder) for folder in libraries)
  )


def _place(error: Exception) -> str:
  """File and line where the user's code raised the error."""
  theirs = _theirs(error)
  return f'{theirs[-1][0]}, line {theirs[-1][1]}' if theirs else ''


def told(error: UserError) -> str:
  """What a program prints at its end: the user's own frames, or all with --traceback; the line."""
  whole = '--traceback' in sys.argv
  before = ''.join(traceback.format_exception(error)) if whole else error.frames
  return f'{before}{pathlib.Path(sys.argv[0]).name}: {error}'


def complain(error: UserError) -> int:
  """Prints what `told` returns, and returns the program's exit code."""
  print(told(error), file=sys.stderr)
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
    names = [str(one) for one in allowed]
    near = difflib.get_close_matches(str(given), names, 1, 0.7)
    hint = f'did you mean {near[0]}? ' if near else ''
    raise ValueError(f'{field} is {given!r}; {hint}allowed: {", ".join(names)}')
