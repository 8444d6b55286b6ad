"""Guards: how children end, and which of their output is shown."""

import os
import subprocess
import sys
import time

import pytest

from lfg_jax.errors import LOST, UserError
from lfg_jax.training import launch, program
from lfg_jax.training.guard import Text, lost_by
from lfg_jax.training.processes import Place, same_devices

FATAL = """W1127 04:53:20.262011   26399 preemption_sync_manager.cc:146] Failed to retrieve notice
  : continued
E1127 04:59:12.1  25573 coordination_service.cc:1548] [4] Use error polling to propagate: UNAVAILABLE: \
The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed.
F1127 04:59:12.2  25584 client.h:80] Terminating process because the JAX distributed service detected fatal errors.
*** Check failure stack trace: ***
    @     0x7fa1e0f72104  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def guarded(work, children=1, grace=0.5):
  """Exit code, lines and seconds of a guard; child number `i` executes the code `work`."""
  code = f"""
import os, signal, sys, time
from lfg_jax.training import guard
i = guard.guard(range({children}), grace={grace})
{work}
"""
  begin = time.monotonic()
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert 'Traceback' not in done.stderr
  return (
    done.returncode,
    done.stdout.splitlines(),
    done.stderr.splitlines(),
    time.monotonic() - begin,
  )


def abort(text):
  return (
    f'os.write(2, {text!r}.encode()); signal.signal(signal.SIGABRT, signal.SIG_DFL); os.abort()'
  )


@pytest.mark.slow
def test_a_child_that_ends_itself_has_said_why():
  code, out, errors, _ = guarded("print('out'); print('why', file=sys.stderr); sys.exit(5)")
  assert (code, out, errors) == (5, ['out'], ['why'])


@pytest.mark.slow
def test_an_abort_for_a_lost_process_is_one_line():
  code, _, errors, _ = guarded(abort(FATAL))
  assert code == LOST
  assert errors == [
    '-c: process 0 lost another one (process 1 is gone); '
    'the same command goes on from the last checkpoint'
  ]


@pytest.mark.slow
def test_a_child_that_has_told_and_is_aborted_is_one_line():
  work = f"from lfg_jax.errors import UserError; guard.tell(UserError('lost')); {abort(FATAL)}"
  code, _, errors, _ = guarded(work)
  assert (code, errors) == (LOST, ['-c: lost'])


@pytest.mark.slow
def test_an_abort_for_another_reason_keeps_its_text():
  code, _, errors, _ = guarded(
    abort('F1127 04:59:12.2  25584 cholesky.cc:80] Check failed\nmore\n')
  )
  assert code == 128 + 6
  assert errors == [
    'F1127 04:59:12.2  25584 cholesky.cc:80] Check failed',
    'more',
    '-c: process 0 was ended by SIGABRT; the same command goes on from the last checkpoint',
  ]


@pytest.mark.slow
def test_only_the_first_speaks():
  code, out, errors, _ = guarded("print('out', i); print('error', i, file=sys.stderr)", 3)
  assert (code, out, errors) == (0, ['out 0'], ['error 0'])


@pytest.mark.slow
def test_one_that_fails_in_its_own_way_is_heard():
  work = f"print('error', i, file=sys.stderr); sys.exit([3, 2, {LOST}, 3][i])"
  code, _, errors, _ = guarded(work, 4)
  assert (code, errors) == (LOST, ['error 0', 'error 1'])


@pytest.mark.slow
def test_when_one_dies_the_others_are_killed():
  code, _, errors, seconds = guarded('time.sleep(0 if i else 50); sys.exit(3 * i)', 2)
  assert code == 128 + 9 and seconds < 20
  assert errors == [
    '-c: process 0 was ended by SIGKILL; the same command goes on from the last checkpoint'
  ]


@pytest.mark.slow
@pytest.mark.parametrize('number', ['SIGTERM', 'SIGINT'])
def test_signals_become_sigterm_to_all(number):
  work = f"""
stopped = lambda *_: sys.exit(143)
signal.signal(signal.SIGTERM, stopped)
if i == 0:
  time.sleep(0.5)
  os.kill(os.getppid(), signal.{number})
time.sleep(50)"""
  code, _, errors, seconds = guarded(work, 2, grace=40)
  assert (code, errors) == (143, []) and seconds < 20


@pytest.mark.slow
def test_a_guard_that_is_killed_takes_its_child_along():
  code, out, _, seconds = guarded(
    'print(os.getpid(), flush=True)\nos.kill(os.getppid(), 9)\ntime.sleep(50)'
  )
  assert code == -9 and seconds < 40  # until nobody has the guard's output open
  end = time.monotonic() + 20
  while os.path.exists(f'/proc/{out[0]}') and time.monotonic() < end:
    time.sleep(0.05)
  assert not os.path.exists(f'/proc/{out[0]}')


def test_text_of_the_service_is_hidden_and_other_text_is_not(capsys):
  read, write = os.pipe()
  warning = 'W1127 04:59:12.2  25584 slow_operation_alarm.cc:80] Very slow compile\n'
  text = Text(read, shown=True)
  os.write(write, f'{FATAL}{warning}[Gloo] Rank 0 is connected\nmine\n'.encode())
  os.close(write)
  text.join()
  assert capsys.readouterr().err == f'{warning}mine\n'
  assert lost_by(''.join(text.hidden)) == 'process 1 is gone'


def test_different_numbers_of_devices_are_refused():
  with pytest.raises(
    UserError,
    match=r'^the processes have different numbers of devices \(process 2 has 1, '
    r'the others 4\); allowed: the same on each$',
  ):
    same_devices({0: 4, 1: 4, 2: 1})


def test_options_come_before_variables():
  environment = dict(zip(launch.VARIABLES, ('a:1', '2', '0'), strict=True))
  assert launch.find_place(Place(), {}) is None
  assert launch.find_place(Place('b:2', None, 1), environment) == Place('b:2', 2, 1)


def test_a_rehearsal_has_no_place():
  with pytest.raises(UserError, match=r'^--rehearse starts all processes itself; allowed: it, or'):
    program.main(['--rehearse=2', '--process=0'])


@pytest.mark.parametrize(
  'given, message',
  [
    (
      Place('a:1'),
      'coordinator, processes, process are a:1, missing, missing; allowed: all of --coordinator',
    ),
    (Place('a', 2, 0), 'coordinator, processes, process are a, 2, 0; allowed: all of'),
    (Place('a:1', 2, -1), 'coordinator, processes, process are a:1, 2, -1; allowed: all of'),
    (
      Place('a:1', 2, 2),
      r'coordinator, processes, process are a:1, 2, 2; allowed: process 0 … processes − 1',
    ),
  ],
)
def test_a_place_that_is_not_whole_is_refused(given, message):
  with pytest.raises(UserError, match=f'^{message}'):
    launch.find_place(given, {})
