"""Runs of several processes: how they connect, and how they agree on the run's folder."""

import contextlib
import itertools
import pathlib
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from lfg_jax.errors import LOST, UserError
from lfg_jax.training import guard

TOKEN = 'token'  # a file with a random number, which the first process draws at every start
PATIENCE_SECONDS = 5  # until a file is visible on another host
_looks = itertools.count(1)


# XLA's message contains one of these if a collective operation has lost another process.
_MISSED = re.compile('Gloo|NCCL|RCCL|coordination service|UNAVAILABLE')


class Place(NamedTuple):
  """A process's place among the processes of its run; None: JAX asks the cluster."""

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None


class Lost(UserError):
  """Another process was lost."""

  exit_code = LOST


AS_TOLD = Place()


def connect(at: Place = AS_TOLD, lost_after: int = 25) -> None:
  """Connects this process with the others.

  Args:
    at: this process's place among them.
    lost_after: seconds of silence after which a process counts as lost.

  Raises:
    UserError: JAX finds no cluster or cannot reach the coordinator, or the processes have different
      numbers of devices.
  """
  if jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(*at, heartbeat_timeout_seconds=lost_after)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f'the processes cannot be connected ({" ".join(str(error).split())[:200]}); where JAX knows no '
      'cluster, give each --coordinator=HOST:PORT --processes=N --process=I, I from 0'
    ) from error
  same_devices(Counter(device.process_index for device in jax.devices()))


def same_devices(counts: Mapping[int, int]) -> None:
  """Raises UserError if the numbers of devices, given by process, are not all equal.

  >>> same_devices({0: 4, 1: 4})
  """
  usual = max(counts.values())
  if differing := {process: count for process, count in sorted(counts.items()) if count != usual}:
    told = ', '.join(f'process {process} has {count}' for process, count in differing.items())
    raise UserError(
      f'the processes have different numbers of devices ({told}, '
      f'the others {usual}); allowed: the same on each'
    )


@contextlib.contextmanager
def losses() -> Iterator[None]:
  """Turns XLA's errors about a lost process into `Lost`."""
  try:
    yield
  except Exception as error:
    if isinstance(error, UserError) or jax.process_count() == 1 or not _MISSED.search(str(error)):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise Lost(
      f'process {jax.process_index()} lost another one ({reason}); {guard.GOES_ON}'
    ) from error


def is_first() -> bool:
  """Whether this is the first process, which prints and writes files."""
  return jax.process_index() == 0


def say(*words: Any, file: TextIO | None = None) -> None:
  """Prints, in the first process only."""
  if is_first():
    print(*words, file=file, flush=True)


def share_folder(folder: pathlib.Path | None) -> None:
  """Checks that all processes see the folder that the first one has claimed.

  All processes must call this. The first passes None if it could not claim the folder.

  Raises:
    UserError: in all processes, if one does not see the folder of the first; in the others, if the
      first could not claim it.
  """
  if jax.process_count() == 1:
    return
  mine = -1 if folder is None else secrets.randbits(31)
  if folder and is_first():
    (folder / TOKEN).write_text(str(mine))
  wanted = int(multihost_utils.broadcast_one_to_all(np.int32(mine)))
  if folder is None:
    return
  if wanted == -1:
    raise UserError('process 0 could not begin; see what it says')
  sees = np.asarray(
    multihost_utils.process_allgather(np.int32(_sees(folder / TOKEN, str(wanted))))
  ).ravel()
  if not sees.all():
    raise UserError(
      f'processes {np.flatnonzero(sees == 0).tolist()} do not see the folder of process 0; allowed: one '
      f'--workdir for all, on a file system that they share; here it is {folder}'
    )


def _sees(path: pathlib.Path, text: str) -> bool:
  end = time.monotonic() + PATIENCE_SECONDS
  while not (path.exists() and path.read_text() == text):
    if time.monotonic() > end:
      return False
    time.sleep(0.1)
  return True


def terminated() -> bool:
  """Whether any process has received a SIGTERM; all processes get the same answer.

  All processes must call this equally often. JAX makes them agree on a future number, and must be
  asked about every number. So the numbers count calls, not steps: one dispatch may have several
  steps.
  """
  return multihost_utils.reached_preemption_sync_point(next(_looks))
