"""Makes a program one of several processes: by options, environment variables or a rehearsal."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import NoReturn

import jax

from lfg_jax.errors import GOES_ON, LOST, UserError, complain, exit_code
from lfg_jax.training.hosts.processes import Membership

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
# How long a process that has failed waits for the others to fail too.
ALONE_SECONDS = 10


def find_membership(given: Membership, environment: Mapping[str, str]) -> Membership | None:
  """Returns this process's place, from options or else environment variables; None: not given.

  Raises:
    UserError: the place is incomplete, or makes no sense.

  >>> find_membership(Membership(process=1), {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2'})
  Membership(coordinator='a:1', processes=2, process=1)
  """
  texts = [
    environment.get(name, '') if value is None else str(value)
    for name, value in zip(VARIABLES, given, strict=True)
  ]
  if not any(texts):
    return None
  address, count, index = texts
  told = f'coordinator, processes, process are {", ".join(text or "missing" for text in texts)}'
  port = re.fullmatch(r'.+:(\d+)', address)
  if not (port and int(port[1]) < 2**16 and count.isdecimal() and index.isdecimal()):
    raise UserError(
      f'{told}; allowed: all of --coordinator=HOST:PORT --processes=N --process=I, '
      f'or of the environment variables {", ".join(VARIABLES)}'
    )
  if not int(index) < int(count):
    raise UserError(f'{told}; allowed: process 0 … processes − 1')
  return Membership(address, int(count), int(index))


def free_address() -> str:
  """Returns an unused HOST:PORT on this machine."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


def rehearse(count: int, arguments: list[str]) -> NoReturn:
  """Runs this program in `count` processes on this machine's CPUs, and exits.

  Only the first one's output is shown, and what others say that end in a way of their own. The exit
  code is the worst of theirs. Signals are passed on to all. If one fails, JAX ends the others.
  """
  place = [f'--coordinator={free_address()}', f'--processes={count}']
  errors = [None, *(tempfile.TemporaryFile('w+') for _ in range(1, count))]  # noqa: SIM115
  running = [
    subprocess.Popen(
      [sys.executable, sys.argv[0], *arguments, *place, f'--process={i}'],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL if file else None,
      stderr=file,
      process_group=0,  # Ctrl-C then reaches only this process, which passes it on once
    )
    for i, file in enumerate(errors)
  ]

  def pass_on(number: int, _: FrameType | None) -> None:
    for child in running:
      child.send_signal(number)

  signal.signal(signal.SIGTERM, pass_on)
  signal.signal(signal.SIGINT, pass_on)
  codes = [child.wait() for child in running]
  for i, (code, file) in enumerate(zip(codes, errors, strict=True)):
    if file and code not in (0, codes[0]):
      file.seek(0)
      sys.stderr.write(file.read())
    if code < 0:
      complain(UserError(f'process {i} was ended by {signal.Signals(-code).name}; {GOES_ON}'))
  sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def run(work: Callable[[], None]) -> NoReturn:
  """Does `work` and exits: together with the other processes, or alone if they do not end."""
  try:
    code = exit_code(work)
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
