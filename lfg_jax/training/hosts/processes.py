"""Runs of several processes: how they connect, and how they agree on the run's folder."""

import contextlib
import functools
import os
import pathlib
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lfg_jax.errors import GOES_ON, LOST, UserError
from lfg_jax.jaxpr import _compat
from lfg_jax.training.hosts.roll_call import roll_call

TOKEN = 'token'  # a file with a random number, which the first process draws at every start
PATIENCE_SECONDS = 5  # until a file is visible on another host


class Membership(NamedTuple):
  """A process's place among the processes of its run; None: JAX asks the cluster."""

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None


class Lost(UserError):
  """Another process was lost."""

  exit_code = LOST


AS_TOLD = Membership()


def connect(config: ConfigDict, at: Membership = AS_TOLD) -> None:
  """Connects this process, whose place is `at`, with the others.

  Raises:
    UserError: JAX finds no cluster, the processes do not find each other, or they have different
      numbers of devices.
  """
  if jax.distributed.is_initialized():
    return
  terminate = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
  seconds = config.initialization_timeout
  try:
    with _no_proxies():
      place = _complete(at, seconds)
      roll_call(*place, seconds)
      jax.distributed.initialize(
        *place, initialization_timeout=seconds, heartbeat_timeout_seconds=config.heartbeat_timeout
      )
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f'the processes cannot be connected ({" ".join(str(error).split())[:200]}); where JAX knows no '
      'cluster, give each --coordinator=HOST:PORT --processes=N --process=I, I from 0'
    ) from error
  signal.signal(signal.SIGTERM, terminate)  # back from JAX's preemption service; see `Signals`
  same_devices(Counter(device.process_index for device in jax.devices()))


@contextlib.contextmanager
def _no_proxies() -> Iterator[None]:
  """Hides proxies from gRPC. It would ask them for other processes, which Gloo reaches directly."""
  hidden = {name: text for name, text in os.environ.items() if name.lower().endswith('_proxy')}
  for name in hidden:
    del os.environ[name]
  try:
    yield
  finally:
    os.environ.update(hidden)


def _complete(at: Membership, timeout: int) -> tuple[str, int, int]:
  """Coordinator, number of processes and number of this one; what is not given, the cluster tells.

  Raises:
    ValueError: JAX knows no cluster.
  """
  if None in at:
    at = Membership(*_compat.cluster(*at, timeout))
  if at.coordinator is None or at.processes is None or at.process is None:
    raise ValueError('no cluster is detected')
  return at.coordinator, at.processes, at.process


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
    if (
      isinstance(error, UserError)
      or jax.process_count() == 1
      or not _compat.LOST_PROCESS.search(str(error))
    ):
      raise
    reason = ' '.join(str(error).split())[:200]
    raise Lost(f'process {jax.process_index()} lost another one ({reason}); {GOES_ON}') from error


def is_first() -> bool:
  """Whether this is the first process, which prints and writes files."""
  return jax.process_index() == 0


def say(*words: Any) -> None:
  """Prints, in the first process only."""
  if is_first():
    print(*words, flush=True)


def share_folder(folder: pathlib.Path) -> None:
  """Checks that all processes see the folder that the first one has claimed; all must call this.

  Raises:
    UserError: in all processes, if one does not see the folder of the first.
  """
  if jax.process_count() == 1:
    return
  mine = secrets.randbits(31)
  if is_first():
    (folder / TOKEN).write_text(str(mine))
  wanted = of_first(mine)
  if blind := failing(not _sees(folder / TOKEN, str(wanted))):
    raise UserError(
      f'processes {blind} do not see the folder of process 0; allowed: one '
      f'--workdir for all, on a file system that they share; here it is {folder}'
    )


def _sees(path: pathlib.Path, text: str) -> bool:
  end = time.monotonic() + PATIENCE_SECONDS
  while not (path.exists() and path.read_text() == text):
    if time.monotonic() > end:
      return False
    time.sleep(0.1)
  return True


def of_first(number: int) -> int:
  """The first process's number, in all processes; all must call this."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def failing(fails: bool) -> list[int]:
  """The processes that fail, in all processes; all must call this."""
  if jax.process_count() == 1:
    return [0] * fails
  return np.flatnonzero(multihost_utils.process_allgather(np.int32(fails))).tolist()


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A context that ends with an error in all processes if it does in one; all must enter it."""
  error = None
  try:
    yield
  except Exception as caught:
    error = caught
  with losses():
    failed = failing(error is not None)
  if error is not None:
    raise error
  if failed:
    raise UserError(f'processes {failed} could not begin; see what they say')


@functools.cache
def _exchange() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
  mesh = Mesh(np.array(jax.devices()), ('all',))
  return NamedSharding(mesh, P('all')), jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def largest(number: int) -> jax.Array:
  """The largest of all processes' numbers, exchanged by their devices; all must call this."""
  sharding, maximum = _exchange()
  here = np.full(jax.local_device_count(), number, np.int32)
  return maximum(jax.make_array_from_process_local_data(sharding, here))
