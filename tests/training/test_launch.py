"""How processes are started and find each other: places, the roll call, rehearsals."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from lfg_jax.errors import UserError
from lfg_jax.training import main, train
from lfg_jax.training.hosts import connect, processes
from lfg_jax.training.hosts.processes import Membership, same_devices
from lfg_jax.training.hosts.roll_call import roll_call
from tests.runs import tiny


def called(*calls, seconds=1.0):
  """What a roll call answers to each of several (address, count, index); None: all have come."""

  def answer(call):
    try:
      return roll_call(*call, seconds)
    except UserError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(answer, calls))


def test_all_have_come_and_the_port_is_free_again():
  address = connect.free_address()
  port = int(address.rpartition(':')[2])
  assert called(*((address, 4, i) for i in (3, 2, 1, 0)), seconds=20) == [None] * 4
  socket.create_server(('', port)).close()


def test_who_is_missing_is_told_to_all():
  address = connect.free_address()
  told = 'the run cannot start: of 4 processes, 1, 3 did not come in time'
  assert called((address, 4, 0), (address, 4, 2)) == [told] * 2


@pytest.mark.parametrize(
  'places, reason',
  [
    ([(3, 0), (3, 1), (3, 1)], 'a second process came as 1 of 3; allowed: one each of 0 … 2'),
    ([(3, 0), (2, 1)], 'a process came as 1 of 2; allowed: one each of 0 … 2'),
  ],
)
def test_places_that_contradict_each_other_are_told_to_all(places, reason):
  address = connect.free_address()
  told = called(*((address, *place) for place in places), seconds=20)
  assert told == [f'the run cannot start: {reason}'] * len(places)


def test_strangers_and_one_that_has_ended_do_not_count():
  """A scan of the port says nothing that is known; process 1 comes, is killed, and comes again."""
  address = connect.free_address()
  port = int(address.rpartition(':')[2])
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(roll_call, address, 3, 0, 20)
    strangers = []
    while len(strangers) < 2:
      try:
        strangers.append(socket.create_connection(('localhost', port)))
      except OSError:
        time.sleep(0.02)
    for stranger, text in zip(
      strangers, (b'GET / HTTP/1.1\r\n', b'lfg process 1 of 3\n'), strict=True
    ):
      stranger.sendall(text)
      stranger.close()
    assert called((address, 3, 1), (address, 3, 2), seconds=20) == [None] * 2
    first.result()


def test_a_port_in_use_and_one_of_another_program_are_told():
  with socket.create_server(('', 0)) as other:
    port = other.getsockname()[1]
    (here,) = called((f'localhost:{port}', 2, 0))
    assert here.startswith(f'the run cannot start: process 0 cannot listen on port {port} (Address')
    (there,) = called((f'localhost:{port}', 2, 1), seconds=0.1)
    assert there == (
      f'the run cannot start: what listens at localhost:{port} is not process 0 of this run'
    )


@pytest.mark.parametrize('index', [0, 1])
@pytest.mark.parametrize('host', ['no-such-host.invalid', 'localhost'])
def test_an_address_that_cannot_be_reached_is_told(host, index):
  """With a wrong host, process 0 does not reach itself; the right one is reached by process 0."""
  address = f'{host}:{connect.free_address().rpartition(":")[2]}'
  (told,) = called((address, 2, index), seconds=0.2)
  if (host, index) == ('localhost', 0):
    assert told == 'the run cannot start: of 2 processes, 1 did not come in time'
  else:
    start = f'the run cannot start: {address} cannot be reached from process {index} of 2 ('
    assert told.startswith(start) and told.count('\n') == 0


def test_proxies_are_not_asked_for_processes_and_are_there_afterwards(monkeypatch):
  proxies = ('http_proxy', 'HTTPS_PROXY', 'grpc_proxy')
  seen = {}
  for name in proxies:
    monkeypatch.setenv(name, 'http://localhost:1')
  monkeypatch.setattr(processes, 'roll_call', lambda *_: None)

  def initialize(*_, **more):
    seen.update(os.environ, **more)
    signal.signal(signal.SIGTERM, lambda *_: None)  # JAX's preemption service takes it

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  handler = signal.getsignal(signal.SIGTERM)
  processes.connect(
    tiny(initialization_timeout=7, heartbeat_timeout=9), Membership('localhost:1', 1, 0)
  )
  assert not [name for name in seen if 'proxy' in name.lower()]
  assert (seen['initialization_timeout'], seen['heartbeat_timeout_seconds']) == (7, 9)
  assert all(os.environ[name] == 'http://localhost:1' for name in proxies)
  assert signal.getsignal(signal.SIGTERM) is handler


def test_without_a_cluster_a_line_says_what_to_give():
  with pytest.raises(
    UserError,
    match=r'^the processes cannot be connected \(no cluster is detected\); where JAX knows no '
    r'cluster, give each --coordinator=HOST:PORT --processes=N --process=I',
  ):
    train.prepare(tiny(distributed=True))


def test_different_numbers_of_devices_are_refused():
  with pytest.raises(
    UserError,
    match=r'^the processes have different numbers of devices \(process 2 has 1, '
    r'the others 4\); allowed: the same on each$',
  ):
    same_devices({0: 4, 1: 4, 2: 1})


def test_options_come_before_variables():
  environment = dict(zip(connect.VARIABLES, ('a:1', '2', '0'), strict=True))
  assert connect.find_membership(Membership(), {}) is None
  assert connect.find_membership(Membership('b:2', None, 1), environment) == Membership('b:2', 2, 1)


def test_a_rehearsal_has_no_place():
  with pytest.raises(UserError, match=r'^--rehearse starts all processes itself; allowed: it, or'):
    main.main(['--rehearse=2', '--process=0'])


@pytest.mark.parametrize(
  'given, message',
  [
    (
      Membership('a:1'),
      'coordinator, processes, process are a:1, missing, missing; allowed: all of --coordinator',
    ),
    (Membership('a', 2, 0), 'coordinator, processes, process are a, 2, 0; allowed: all of'),
    (
      Membership('a:65536', 2, 0),
      'coordinator, processes, process are a:65536, 2, 0; allowed: all of',
    ),
    (Membership('a:1', 2, -1), 'coordinator, processes, process are a:1, 2, -1; allowed: all of'),
    (
      Membership('a:1', 2, 2),
      r'coordinator, processes, process are a:1, 2, 2; allowed: process 0 … processes − 1',
    ),
  ],
)
def test_a_place_that_is_not_whole_is_refused(given, message):
  with pytest.raises(UserError, match=f'^{message}'):
    connect.find_membership(given, {})


# --- rehearsals -----------------------------------------------------------------------------------


def rehearsed(tmp_path, work):
  """Exit code, lines and errors of a rehearsal of a program of two processes; each does `work`."""
  path = tmp_path / 'it.py'
  path.write_text(f"""
import os, signal, sys, time
if '--process' not in sys.argv[-1]:
  from lfg_jax.training.hosts import connect
  connect.rehearse(2, ['an argument'])
argument, _, _, place = sys.argv[1:]
i = int(place.partition('=')[2])
{work}
""")
  done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
  return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.full
def test_only_the_first_speaks(tmp_path):
  work = "print(i, argument, os.environ['JAX_PLATFORMS']); print('error', i, file=sys.stderr)"
  assert rehearsed(tmp_path, work) == (0, ['0 an argument cpu'], ['error 0'])


@pytest.mark.full
def test_one_that_fails_in_its_own_way_is_heard(tmp_path):
  work = "print('error', i, file=sys.stderr); sys.exit([2, 75][i])"
  assert rehearsed(tmp_path, work) == (75, [], ['error 0', 'error 1'])


@pytest.mark.full
def test_the_worst_end_is_that_of_the_rehearsal(tmp_path):
  code, _, errors = rehearsed(tmp_path, 'os.kill(os.getpid(), 9) if i else sys.exit(75)')
  end = 'process 1 was ended by SIGKILL; the same command goes on from the last checkpoint'
  assert (code, errors) == (128 + signal.SIGKILL, [f'it.py: {end}'])


@pytest.mark.full
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_signals_are_passed_on_to_all(name, tmp_path):
  work = f"""
signal.signal(signal.{name}, lambda *_: sys.exit(143))
time.sleep(1)
if i == 0:
  os.kill(os.getppid(), signal.{name})
time.sleep(500)"""
  assert rehearsed(tmp_path, work) == (143, [], [])
