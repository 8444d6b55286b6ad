"""A user's own parts, each in a Python file outside the package."""

import contextlib
import functools
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from types import ModuleType

from lfg_jax.errors import UserError, as_one_line


def local(what: str, path: str | os.PathLike[str]) -> pathlib.Path:
  """A path that a user gives; `~` is the home.

  Args:
    what: name of the option or field that has it.
    path: the path.

  Raises:
    UserError: it is the address of a bucket, or begins with `~` and a name that has no home.

  >>> local('--workdir', 's3://b')
  Traceback (most recent call last):
  lfg_jax.errors.UserError: --workdir is 's3://b'; allowed: a path on this machine, as where a bucket is mounted
  """
  text = os.fspath(path)
  if re.match(r'\w[\w+.-]*:/', text):
    raise UserError(
      f'{what} is {text!r}; allowed: a path on this machine, as where a bucket is mounted'
    )
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise UserError(f'{what} is {text!r}; allowed: ~ or ~NAME of a user who has a home') from error


def load(field: str, path: str, needs: tuple[str, ...]) -> ModuleType:
  """The module in a file. It is run once, and again only when the file has changed.

  Args:
    field: of the config, that names the file.
    path: of the file.
    needs: names that the module must have.

  Raises:
    UserError: one line: there is no such file, what went wrong in it, or what it lacks. It has the
      frames of the user's file.

  >>> load('losses.module', 'nowhere.py', ())
  Traceback (most recent call last):
  lfg_jax.errors.UserError: losses.module is 'nowhere.py'; allowed: a Python file that exists
  """
  if '\0' in path or not path.endswith('.py') or not local(field, path).is_file():
    raise UserError(f'{field} is {path!r}; allowed: a Python file that exists')
  with mistakes(f'{field} {path}'):
    file = local(field, path).resolve()
    module = _run(file, file.read_bytes())
  for name in needs:
    if not hasattr(module, name):
      raise UserError(f'{field} {path} has no {name}; it needs {", ".join(needs)}')
  return module


@contextlib.contextmanager
def mistakes(what: str) -> Iterator[None]:
  """Whatever the user's code raises, as a `UserError` of one line that begins with `what`.

  Its `frames` are those of the user's code.
  """
  try:
    yield
  except Exception as error:
    raise as_one_line(error, what) from error


def loaded() -> tuple[tuple[pathlib.Path, bytes], ...]:
  """All files that were loaded, with what was in them: for `load_again`."""
  return tuple(_loaded.items())


def load_again(files: Iterable[tuple[pathlib.Path, bytes]]) -> None:
  """Makes the modules of `loaded` known to another process, which cannot import them by name."""
  for file, content in files:
    _run(file, content)


_loaded: dict[pathlib.Path, bytes] = {}


@functools.cache
def _run(file: pathlib.Path, content: bytes) -> ModuleType:
  """Only programs that change their files while they run hold more than one of a file."""
  # Not a part of a package, of which pickle would look for the rest; two files may have one name.
  module = ModuleType(f'user_file_{file.stem}_{zlib.crc32(bytes(file)):08x}')
  module.__file__ = str(file)
  sys.modules[module.__name__] = module  # dataclasses and pickle look there
  exec(compile(content, str(file), 'exec'), module.__dict__)
  _loaded[file] = content
  return module
