"""The folder of a run: which run it belongs to, its lock, and errors with its files."""

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from ml_collections import ConfigDict

from lfg_jax.errors import UserError
from lfg_jax.training import configs, optimizers
from lfg_jax.training.hosts import processes
from lfg_jax.training.run import metrics

# Fields that may differ when a run resumes. They say where the data is (not which data), how often
# the run is evaluated and saved, or how sums are split, which changes only their rounding.
MAY_DIFFER = (
  'data_dir',
  'distributed',
  'initialization_timeout',
  'heartbeat_timeout',
  'profile',
  'eval_every',
  'checkpoint_every',
  'max_to_keep',
  'steps_per_dispatch',
  'micro_batch',
  'pipeline_stages',
  'workers',
)
LOCK = 'lock'
OWN = {LOCK, processes.TOKEN, 'config.json.tmp'}  # what a run leaves if it is killed at once
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def claim(folder: pathlib.Path, config: ConfigDict) -> Iterator[dict[str, Any] | None]:
  """Claims `folder` for this config's run and, inside the context, for this process.

  Yields the summary if the run is finished, else None. A finished run continues if the config asks
  for more epochs and its schedule does not depend on their number.

  Raises:
    UserError: the folder has a run of another config, or files that do not belong to a run; or
      another process is using it.
  """
  with contextlib.ExitStack() as stack:
    finished = None
    with processes.together():
      if processes.is_first():
        finished = stack.enter_context(_claim(folder, config))
    processes.share_folder(folder)
    yield finished if processes.is_first() else _finished(folder, config)


@contextlib.contextmanager
def _claim(folder: pathlib.Path, config: ConfigDict) -> Iterator[dict[str, Any] | None]:
  """`claim` in the first process."""
  if (folder / 'config.json').exists():
    _compare(folder, config)
    if finished := _finished(folder, config):
      yield finished
      return
  elif folder.exists() and (not folder.is_dir() or {f.name for f in folder.iterdir()} - OWN):
    raise UserError(f'{folder} exists and is not the folder of a run; name another')
  folder.mkdir(parents=True, exist_ok=True)
  with _lock(folder):
    # Check again: another process may have been here in between.
    if (folder / 'config.json').exists():
      _compare(folder, config)
      if finished := _finished(folder, config):
        yield finished
        return
    # In this order, a run that is killed in between is one of fewer epochs, without a summary.
    (folder / 'summary.json').unlink(missing_ok=True)
    metrics.write_atomically(folder / 'config.json', configs.to_json(config))
    yield None


def stored(folder: pathlib.Path) -> dict[str, Any]:
  """The fields of a run's config, by dotted names.

  Raises:
    UserError: the folder has no config, or one that this program did not write.
  """
  path = folder / 'config.json'
  if not path.exists():
    raise UserError(f'{folder} is not the folder of a run: it has no config.json')
  try:
    return dict(configs.flatten(json.loads(path.read_text())))
  except (ValueError, AttributeError) as error:
    raise UserError(
      f'{path} is not a config that this program wrote; name another folder'
    ) from error


def _compare(folder: pathlib.Path, config: ConfigDict) -> None:
  """Raises UserError if the run of the stored config cannot continue with `config`."""
  of = lambda config: dict(configs.flatten(json.loads(configs.to_json(config))))
  there, here = stored(folder), of(config)
  differing = [
    field
    for field in sorted({*here, *there} - {*MAY_DIFFER})
    if here.get(field) != there.get(field)
  ]
  if differing == ['epochs'] and there.get('epochs', math.inf) < here['epochs']:
    if config.optimizer.schedule in optimizers.ENDLESS:
      return
    raise UserError(
      f'{folder} has a run of {there["epochs"]} epochs, on which its '
      f'{config.optimizer.schedule} schedule depends, so that {here["epochs"]} are another '
      f'run; it may start from this one: --config.init_from={folder}, and another folder'
    )
  if differing:
    changes = ', '.join(
      f'{field} is {there.get(field)!r} there, {here.get(field)!r} here' for field in differing
    )
    raise UserError(f'{folder} has a run of another config ({changes}); name another folder')


def _finished(folder: pathlib.Path, config: ConfigDict) -> dict[str, Any] | None:
  """The summary, if the run needs no more epochs; else None."""
  path = folder / 'summary.json'
  if not path.exists() or stored(folder)['epochs'] < config.epochs:
    return None
  return json.loads(path.read_text())


def finished_line(folder: pathlib.Path) -> str:
  """What is said of a run that has nothing left to do."""
  epochs = stored(folder)['epochs']
  return f'{folder}: finished already, after {epochs} epoch{"" if epochs == 1 else "s"}'


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
  """Locks a file in the folder; the kernel releases the lock when the process ends in any way.

  On NFS, the lock works between hosts if the server has a lock service; otherwise it works within
  one host at most. If the file system has no locks, the run continues without one, after a warning.

  Raises:
    UserError: another process holds it.
  """
  with (folder / LOCK).open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f'{folder} is in use by {_owner(file)}; wait for its end, or name another folder'
      ) from error
    except OSError as error:
      if error.errno not in NO_LOCKS:
        raise
      print(
        f'warning: the file system of {folder} has no locks; do not start this run twice',
        file=sys.stderr,
      )
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    yield


def _owner(file: TextIO) -> str:
  file.seek(0)
  return file.read() or 'another process'


@contextlib.contextmanager
def file_errors(folder: pathlib.Path) -> Iterator[None]:
  """Turns errors with files in `folder`, such as a full disk, into one-line errors.

  Raises:
    UserError: for errors that the operating system reports, to Python or to Orbax.
  """
  try:
    yield
  except Exception as error:
    number = _number(error)
    if number is None:
      raise
    if number == errno.EPIPE:
      raise UserError(
        'nobody reads the output any more; the same command goes on from the last checkpoint'
      ) from error
    place = getattr(error, 'filename', None) or folder
    advice = (
      '; what was saved before is kept, and the same command goes on from there when there is room'
      if number in FULL
      else ''
    )
    raise UserError(f'{place}: {os.strerror(number)}{advice}') from error


def _number(error: Exception) -> int | None:
  """The operating system's number of an error; None if there is none.

  TensorStore, which writes checkpoints, gives the number only in the text of its message.
  """
  if isinstance(error, OSError):
    return error.errno
  match = re.search(r"os_error_code='(\d+)'", str(error))
  return int(match[1]) if match else None
