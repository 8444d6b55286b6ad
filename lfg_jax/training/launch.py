"""Makes a program one of several processes: by options, environment variables or a rehearsal."""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax

from lfg_jax.errors import LOST, UserError
from lfg_jax.training import guard
from lfg_jax.training.processes import Place

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
# How long a process that has failed waits for the others to fail too.
ALONE_SECONDS = 10


def find_place(given: Place, environment: Mapping[str, str]) -> Place | None:
  """Returns this process's place, from options or else environment variables; None: not given.

  Raises:
    UserError: the place is incomplete, or makes no sense.

  >>> find_place(Place(process=1), {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2'})
  Place(coordinator='a:1', processes=2, process=1)
  """
  texts = [
    environment.get(name, '') if value is None else str(value)
    for name, value in zip(VARIABLES, given, strict=True)
  ]
  if not any(texts):
    return None
  address, count, index = texts
  told = f'coordinator, processes, process are {", ".join(text or "missing" for text in texts)}'
  if not (re.fullmatch(r'.+:\d+', address) and count.isdecimal() and index.isdecimal()):
    raise UserError(
      f'{told}; allowed: all of --coordinator=HOST:PORT --processes=N --process=I, '
      f'or of the environment variables {", ".join(VARIABLES)}'
    )
  if not int(index) < int(count):
    raise UserError(f'{told}; allowed: process 0 … processes − 1')
  return Place(address, int(count), int(index))


def free_address() -> str:
  """Returns an unused HOST:PORT on this machine."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


def rehearse(count: int, lost_after: int) -> Place:
  """Forks `count` processes on this machine's CPUs. Each of them returns its own place."""
  address = free_address()
  jax.config.update('jax_platforms', 'cpu')
  number = guard.guard(range(count), grace=lost_after + ALONE_SECONDS)
  return Place(address, count, number)


def run(work: Callable[[], None]) -> NoReturn:
  """Does `work` and exits: together with the other processes, or alone if they do not end."""
  code = 0
  try:
    work()
  except UserError as error:
    code = guard.tell(error)
  except Exception:
    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    code = 1
  if code and code != LOST:
    # A barrier. A process that waits for this one in a collective operation never reaches it.
    end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    end.start()
    end.join(ALONE_SECONDS)
  if code:
    sys.stdout.flush()
    os._exit(code)
  sys.exit()
