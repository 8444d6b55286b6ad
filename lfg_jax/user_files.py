"""A user's own parts, each in a Python file outside the package."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Iterator
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


@functools.cache
def _run(file: pathlib.Path, content: bytes) -> ModuleType:
  """Only programs that change their files while they run hold more than one of a file."""
  import cloudpickle  # here: only users with files of their own need it

  del content
  spec = importlib.util.spec_from_file_location(f'user_file.{file.stem}', file)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look there for the names in their annotations
  # Other processes, such as the workers of a stream, cannot import it by its name.
  cloudpickle.register_pickle_by_value(module)
  spec.loader.exec_module(module)
  return module
