"""Two processes of one run, on one host."""

import io
import os
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

from lfg_jax.errors import LOST, UserError
from lfg_jax.training import launch, processes, run_log, train
from tests.runs import FLAGS, STEPS, start, state, tiny
from tests.test_streams import write_imagenet


def two(folders, *flags):
  address = launch.free_address()
  return [
    start(
      'train.py',
      f'--workdir={folder}',
      f'--coordinator={address}',
      '--processes=2',
      f'--process={i}',
      '--config.epochs=5000',
      *FLAGS,
      *flags,
    )
    for i, folder in enumerate(folders)
  ]


def until_a_row(both, folder):
  """Waits until an epoch is done."""
  rows = folder / 'metrics.jsonl'
  while both[0].poll() is None and not (rows.exists() and rows.read_text()):
    time.sleep(0.02)


def ends(both):
  """Exit codes, and the single line that the program itself printed in each process."""
  try:
    errors = [process.communicate(timeout=120)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  lines = [[line for line in text.splitlines() if line.startswith('train.py: ')] for text in errors]
  assert all(
    len(own) == 1 and 'Traceback' not in text for own, text in zip(lines, errors, strict=True)
  ), errors
  return [process.returncode for process in both], [line for (line,) in lines]


def assert_same_parameters(folder, other):
  for a, b in zip(state(folder, 'params'), state(other, 'params'), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def noise(count):
  """Examples as from ImageNet's builder.

  They are noise, because norms divide by the variance: flat images would enlarge rounding errors.
  """
  for i in range(count):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)).save(
      file, 'JPEG'
    )
    file.seek(0)
    yield i, {'image': file, 'label': i, 'file_name': f'{i}.JPEG'}


@pytest.mark.slow
def test_a_signal_to_one_ends_both_with_what_they_saved(tmp_path):
  """Nine steps are dispatched at once, so that processes look for signals at few steps."""
  both = two([tmp_path / 'run'] * 2)
  until_a_row(both, tmp_path / 'run')
  both[1].send_signal(signal.SIGTERM)
  codes, lines = ends(both)
  assert codes == [128 + signal.SIGTERM] * 2
  assert lines[0] == lines[1]
  step = re.fullmatch(
    r'train.py: SIGTERM: saved step (\d+); the same command goes on from there', lines[0]
  )[1]
  assert (tmp_path / 'run' / 'checkpoints' / step).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_one_that_is_killed_ends_the_other_in_a_line(tmp_path, victim):
  both = two([tmp_path / 'run'] * 2)
  until_a_row(both, tmp_path / 'run')
  begin = time.monotonic()
  both[victim].kill()
  other = both[1 - victim]
  errors = other.communicate(timeout=60)[1]
  assert time.monotonic() - begin < 15  # a broken connection tells, before 25 seconds of silence do
  assert other.returncode == LOST
  (line,) = errors.splitlines()
  assert re.fullmatch(
    rf'train.py: process {1 - victim} lost another one \(.*\); '
    'the same command goes on from the last checkpoint',
    line,
  )


@pytest.mark.slow
def test_one_that_is_silent_counts_as_lost(tmp_path):
  """The process and its connections stay alive; only its heartbeats are missing."""
  both = two([tmp_path / 'run'] * 2, '--config.lost_after=5')
  until_a_row(both, tmp_path / 'run')
  child = subprocess.run(['pgrep', '-P', str(both[1].pid)], capture_output=True, text=True).stdout
  os.kill(int(child), signal.SIGSTOP)
  begin = time.monotonic()
  try:
    errors = both[0].communicate(timeout=60)[1]
  finally:
    both[0].kill()
    os.kill(int(child), signal.SIGKILL)
  assert time.monotonic() - begin < 15
  assert both[1].wait(10) == 128 + signal.SIGKILL
  assert both[0].returncode == LOST
  assert errors == (
    'train.py: process 0 lost another one (process 1 is gone); '
    'the same command goes on from the last checkpoint\n'
  )


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['supervised', 'contrastive'])
def test_a_rehearsal_is_the_run_of_one_process(tmp_path, objective):
  """It is killed once on the way, and its output is that of one process.

  The optimizer is SGD, because Adam would enlarge the rounding of zero gradients.
  """
  flags = [
    *FLAGS,
    '--config.epochs=3',
    '--config.steps_per_dispatch=1',
    f'--config.objective={objective}',
    '--config.optimizer.name=sgd',
    '--config.optimizer.learning_rate=0.002',
  ]
  rehearsal = [start('train.py', '--rehearse=2', f'--workdir={tmp_path / "two"}', *flags)]
  while rehearsal[0].poll() is None and not list(tmp_path.glob('two/checkpoints/[0-9][0-9]')):
    time.sleep(0.02)
  child = subprocess.run(
    ['pgrep', '-P', str(rehearsal[0].pid)], capture_output=True, text=True
  ).stdout.split()
  os.kill(int(child[1]), signal.SIGKILL)
  assert rehearsal[0].wait(60) == 128 + signal.SIGKILL
  again, alone = (
    start('train.py', *options, f'--workdir={tmp_path / name}', *flags)
    for options, name in ((['--rehearse=2'], 'two'), ([], 'one'))
  )
  out, errors = again.communicate(timeout=120)
  assert (again.returncode, errors) == (0, '')
  assert (
    out.startswith('compiling …\nresuming') and out.count('test error') == out.count('epoch') + 1
  )
  alone.communicate(timeout=120)
  assert_same_parameters(tmp_path / 'two', tmp_path / 'one')
  rows = [
    [row['step'] for row in run_log.read_rows(tmp_path / name / 'metrics.jsonl')]
    for name in ('one', 'two')
  ]
  assert rows[0] == rows[1] == [STEPS * epoch for epoch in range(1, 4)]


@pytest.mark.slow
def test_a_stream_goes_on_within_an_epoch_on_another_number_of_processes(tmp_path):
  """Eleven images in batches of two: the last batch has padding. Two processes stop on the way."""
  data_dir = write_imagenet(tmp_path / 'data', noise)
  flags = [
    '--config=imagenet',
    f'--config.data_dir={data_dir}',
    '--config.image_size=16',
    *FLAGS[:2],
    '--config.batch_size=2',
    '--config.epochs=40',
    '--config.optimizer.learning_rate=0.002',
    '--config.optimizer.warmup_epochs=0',
    '--config.eval_every=40',
    '--config.checkpoint_every=100',
  ]
  two_processes = start('train.py', '--rehearse=2', f'--workdir={tmp_path / "two"}', *flags)
  until_a_row([two_processes], tmp_path / 'two')
  two_processes.send_signal(signal.SIGTERM)
  errors = two_processes.communicate(timeout=60)[1]
  assert two_processes.returncode == 128 + signal.SIGTERM, errors
  again, alone = (
    start('train.py', f'--workdir={tmp_path / name}', *flags) for name in ('two', 'one')
  )
  for process in (again, alone):
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
  assert_same_parameters(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.slow
def test_two_folders_are_noticed(tmp_path):
  codes, lines = ends(two([tmp_path / 'one', tmp_path / 'two']))
  assert codes == [2, 2]
  for line in lines:
    assert line.startswith(
      'train.py: processes [1] do not see the folder of process 0; allowed: one --workdir'
    )


@pytest.mark.slow
def test_a_refusal_of_the_first_ends_both(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  codes, lines = ends(two([tmp_path] * 2))
  assert codes == [2, 2]
  assert lines == [
    f'train.py: {tmp_path} exists and is not the folder of a run; name another',
    'train.py: process 0 could not begin; see what it says',
  ]


@pytest.mark.parametrize(
  'error', [ValueError('coordinator_address should be defined.'), RuntimeError('two\nlines')]
)
def test_without_a_cluster_a_line_says_what_to_give(error, monkeypatch):
  def initialize(*_, **__):
    raise error

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(
    UserError,
    match=r'^the processes cannot be connected \([a-z_. ]+\); where JAX knows no '
    r'cluster, give each --coordinator=HOST:PORT --processes=N --process=I',
  ):
    train.prepare(tiny(distributed=True))


def test_one_process_shares_its_folder_with_nobody(tmp_path):
  processes.share_folder(tmp_path)
  assert not list(tmp_path.iterdir())
