"""A roll call before JAX connects the processes of a run.

If JAX cannot connect them, it ends the program from C++ (SIGABRT, SIGSEGV), and a scheduler that
starts crashed programs again does so for ever. So process 0 first waits at the coordinator's port
until all processes have come. What is missing is told to all in one line.
"""

import re
import select
import socket
import time

from lfg_jax.errors import UserError

_HELLO, _ANSWER, _GO = 'lfg process {} of {}', 'lfg answer: {}', 'go'
_PAUSE_SECONDS, _STEP_SECONDS = 0.2, 5.0  # between attempts; for one message


def roll_call(address: str, count: int, index: int, seconds: float) -> None:
  """Returns in all processes when all have come.

  Args:
    address: HOST:PORT of process 0.
    count: the number of processes.
    index: this process's number.
    seconds: how long to wait.

  Raises:
    UserError: a process is missing or came twice; the port is in use or cannot be reached.
  """
  end, hello = time.monotonic() + seconds, _HELLO.format(index, count)
  if index == 0:
    with _listen(address) as server, _reach(address, hello, end):  # it must reach itself, too
      answer = _gather(server, count, end)
  else:
    answer = _ask(address, hello, end)
  if answer != _GO:
    raise UserError(f'the run cannot start: {answer}')


def _gather(server: socket.socket, count: int, end: float) -> str:
  """Waits for all processes, in process 0; returns the answer that it gives to all."""
  came: dict[int, socket.socket] = {}
  everyone, answer = [*range(count)], ''
  while not answer:
    server.settimeout(max(end - time.monotonic(), 0.01))
    try:
      connection = server.accept()[0]
    except TimeoutError:
      missing = ', '.join(str(i) for i in everyone if i not in came)
      answer = f'of {count} processes, {missing} did not come in time'
      break
    match = re.fullmatch(_HELLO.replace('{}', r'(\d+)'), _line(connection, _STEP_SECONDS))
    if not match:  # a stranger, such as a scan of ports
      connection.close()
      continue
    for i in [i for i, other in came.items() if select.select([other], [], [], 0)[0]]:
      came.pop(i).close()  # it says nothing more, so it has ended
    index, told = int(match[1]), int(match[2])
    if index in came or told != count:
      which = 'second process' if index in came else 'process'
      answer = f'a {which} came as {index} of {told}; allowed: one each of 0 … {count - 1}'
    came[-1 if index in came else index] = connection
    if sorted(came) == everyone:
      answer = answer or _GO
  for connection in came.values():
    with connection:
      connection.sendall(f'{_ANSWER.format(answer)}\n'.encode())
  return answer


def _ask(address: str, hello: str, end: float) -> str:
  """Process 0's answer, in the other processes."""
  while True:
    with _reach(address, hello, end) as connection:
      # Process 0 has waited for longer than this one, and answers when its own time is over.
      line = _line(connection, max(end - time.monotonic(), 0) + _STEP_SECONDS)
    if match := re.fullmatch(_ANSWER.format('(.*)'), line):
      return match[1]
    if time.monotonic() > end:
      return f'what listens at {address} is not process 0 of this run'
    time.sleep(_PAUSE_SECONDS)  # it may be a process of a run that has just ended


def _listen(address: str) -> socket.socket:
  port, both = int(address.rpartition(':')[2]), socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      ('', port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    )
  except OSError as error:
    raise UserError(
      f'the run cannot start: process 0 cannot listen on port {port} ({error.strerror}); '
      'name a free one'
    ) from error


def _reach(address: str, hello: str, end: float) -> socket.socket:
  """Connects to process 0, and says who this is."""
  host, _, port = address.rpartition(':')
  while True:
    try:
      patience = max(min(end - time.monotonic(), _STEP_SECONDS), 0.01)
      connection = socket.create_connection((host.strip('[]'), int(port)), patience)
      connection.sendall(f'{hello}\n'.encode())
      return connection
    except OSError as error:
      if time.monotonic() > end:
        raise UserError(
          f'the run cannot start: {address} cannot be reached from {hello.removeprefix("lfg ")} '
          f'({error.strerror or error}); allowed: the address of process 0, and an open port there'
        ) from error
    time.sleep(_PAUSE_SECONDS)


def _line(connection: socket.socket, seconds: float) -> str:
  """One line from the other side; '' if there is none."""
  connection.settimeout(seconds)
  try:
    with connection.makefile(errors='replace') as lines:
      return lines.readline(200).strip()
  except OSError:
    return ''
