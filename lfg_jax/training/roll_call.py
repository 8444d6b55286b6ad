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

_HELLO = 'lfg process {} of {}\n'
_ANSWER = 'lfg answer: {}\n'
_GO = 'go'
_PAUSE_SECONDS = 0.2
_STEP_SECONDS = 5.0  # for one connection


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
  first = index == 0
  answer = _preside(address, count, seconds) if first else _answer(address, count, index, seconds)
  if answer != _GO:
    raise UserError(f'the run cannot start: {answer}')


def _preside(address: str, count: int, seconds: float) -> str:
  """Process 0's part; returns the answer that it gives to all."""
  end, came, answer = time.monotonic() + seconds, dict[int, socket.socket](), ''
  with _listen(address) as server, _reach(address, count, 0, seconds):  # it must reach itself, too
    while not answer:
      server.settimeout(max(end - time.monotonic(), 0.01))
      try:
        connection = server.accept()[0]
      except TimeoutError:
        missing = ', '.join(str(i) for i in range(count) if i not in came)
        answer = f'of {count} processes, {missing} did not come within {seconds:g} s'
      else:
        answer = _register(connection, count, came)
    for connection in came.values():
      with connection:
        connection.sendall(_ANSWER.format(answer).encode())
  return answer


def _answer(address: str, count: int, index: int, seconds: float) -> str:
  """The other processes' part: process 0's answer."""
  end = time.monotonic() + seconds
  while True:
    with _reach(address, count, index, end - time.monotonic()) as connection:
      # Process 0 has waited for longer than this one, and answers when its own time is over.
      connection.settimeout(seconds + _STEP_SECONDS)
      if match := re.fullmatch(_ANSWER.strip().format('(.*)'), _line(connection)):
        return match[1]
    # It may be a process of a run that has just ended.
    if time.monotonic() > end:
      return f'what listens at {address} is not process 0 of this run'
    time.sleep(_PAUSE_SECONDS)


def _register(connection: socket.socket, count: int, came: dict[int, socket.socket]) -> str:
  """Adds a process to those that came; returns an answer, or '' while some are missing."""
  connection.settimeout(_STEP_SECONDS)
  match = re.fullmatch(_HELLO.strip().replace('{}', r'(\d+)'), _line(connection))
  if not match:  # a stranger, such as a scan of ports
    connection.close()
    return ''
  index, told = int(match[1]), int(match[2])
  for other in [other for other in came if select.select([came[other]], [], [], 0)[0]]:
    came.pop(other).close()  # it says nothing more, so it has ended
  twice = index in came
  came[-1 if twice else index] = connection
  if twice:
    return f'two processes were told that they are process {index}'
  if told != count:
    return f'process {index} was told of {told} processes, process 0 of {count}'
  return _GO if len(came) == count else ''


def _listen(address: str) -> socket.socket:
  port = int(address.rpartition(':')[2])
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(('', port))
  except OSError as error:
    raise UserError(
      f'the run cannot start: process 0 cannot listen on port {port} ({_reason(error)}); '
      'name a free one'
    ) from error


def _reach(address: str, count: int, index: int, seconds: float) -> socket.socket:
  """Connects to process 0, and says who this is."""
  host, _, port = address.rpartition(':')
  end = time.monotonic() + seconds
  while True:
    try:
      connection = socket.create_connection(
        (host.strip('[]'), int(port)), max(min(end - time.monotonic(), _STEP_SECONDS), 0.01)
      )
      connection.sendall(_HELLO.format(index, count).encode())
      return connection
    except OSError as error:
      if time.monotonic() > end:
        raise UserError(
          f'the run cannot start: process {index} does not reach process 0 at {address} '
          f'({_reason(error)}); check that it runs there, and that no firewall '
          'closes the port'
        ) from error
    time.sleep(_PAUSE_SECONDS)


def _line(connection: socket.socket) -> str:
  """One line from the other side; '' if there is none."""
  try:
    with connection.makefile(errors='replace') as lines:
      return lines.readline(200).strip()
  except OSError:
    return ''


def _reason(error: Exception) -> str:
  return str(getattr(error, 'strerror', None) or error)
