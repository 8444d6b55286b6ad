"""Two processes of one run, on one machine."""

import re
import signal
import socket
import time

import jax
import pytest

from lfg_jax.errors import UserError
from lfg_jax.training import processes, train
from tests.runs import FLAGS, start, tiny


def two(folders):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  return [start('train.py', f'--workdir={folder}', f'--coordinator={address}', '--processes=2', f'--process={i}',
                '--config.epochs=5000', *FLAGS) for i, folder in enumerate(folders)]


def ends(both):
  """Exit codes, and what the program itself said at last."""
  try:
    errors = [process.communicate(timeout=120)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  lines = [[line for line in text.splitlines() if line.startswith('train.py: ')] for text in errors]
  assert all(len(own) == 1 and 'Traceback' not in text for own, text in zip(lines, errors, strict=True)), errors
  return [process.returncode for process in both], [line for line, in lines]


@pytest.mark.slow
def test_a_signal_to_one_ends_both_with_what_they_saved(tmp_path):
  """Nine steps are dispatched at once, so that few numbers of steps are looked at."""
  both = two([tmp_path / 'run'] * 2)
  rows = tmp_path / 'run' / 'metrics.jsonl'
  while both[0].poll() is None and not (rows.exists() and rows.read_text()):
    time.sleep(0.02)
  both[1].send_signal(signal.SIGTERM)
  codes, lines = ends(both)
  assert codes == [128 + signal.SIGTERM] * 2
  assert lines[0] == lines[1]
  step = re.fullmatch(r'train.py: SIGTERM: saved step (\d+); the same command goes on from there', lines[0])[1]
  assert (tmp_path / 'run' / 'checkpoints' / step).is_dir()


@pytest.mark.slow
def test_two_folders_are_noticed(tmp_path):
  codes, lines = ends(two([tmp_path / 'one', tmp_path / 'two']))
  assert codes == [2, 2]
  for line in lines:
    assert line.startswith('train.py: processes [1] do not see the folder of process 0; allowed: one --workdir')


@pytest.mark.slow
def test_a_refusal_of_the_first_ends_both(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  codes, lines = ends(two([tmp_path] * 2))
  assert codes == [2, 2]
  assert lines == [f'train.py: {tmp_path} exists and is not the folder of a run; name another',
                   'train.py: process 0 could not begin; see what it says']


@pytest.mark.parametrize('error', [ValueError('coordinator_address should be defined.'), RuntimeError('two\nlines')])
def test_without_a_cluster_a_line_says_what_to_give(error, monkeypatch):
  def initialize(*_):
    raise error

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(UserError, match=r'^the processes cannot be connected \([a-z_. ]+\); where JAX knows no '
                                              r'cluster, give each --coordinator=HOST:PORT --processes=N --process=I'):
    train.prepare(tiny(distributed=True))


def test_one_process_shares_its_folder_with_nobody(tmp_path):
  processes.share_folder(tmp_path)
  assert not list(tmp_path.iterdir())
