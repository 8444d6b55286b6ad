"""Two processes of one run, on one host."""

import io
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from lfg_jax.errors import LOST
from lfg_jax.training.hosts import connect, processes
from lfg_jax.training.run import metrics
from tests.data.test_streams import write_imagenet
from tests.runs import FLAGS, STEPS, start, state


def two(folders, *flags, script='train.py'):
  address = connect.free_address()
  return [
    start(
      script,
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
    errors = [process.communicate(timeout=300)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  lines = [[line for line in text.splitlines() if line.startswith('train.py: ')] for text in errors]
  assert all(
    len(own) == 1 and 'Traceback (most recent' not in text
    for own, text in zip(lines, errors, strict=True)
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


# train.py, in which something happens to process 1.
DRIVER = """
import os, signal, sys
from lfg_jax.training.run import checkpoints
from lfg_jax.training import command_line
from lfg_jax.training import main, train

def raise_signal(functions, state):
  counted = [int(state.step)]

  def steps(state, count, inputs):
    state, counted[0] = functions.steps(state, count, inputs), counted[0] + count
    if counted[0] - count < 30 <= counted[0]:
      signal.raise_signal(signal.Signals['{signal}'])
    return state

  return functions._replace(steps=steps), state

def fail(*_):
  raise OSError('not just now')

build, is_second = train.build, '--process=1' in sys.argv
if is_second and '{signal}':
  train.build = lambda *job: raise_signal(*build(*job))
if is_second and {blind}:
  read = checkpoints.Checkpoints._read
  checkpoints.Checkpoints._read = lambda self, manager, step, like: (
    fail() if step > 23 else read(self, manager, step, like)
  )
sys.argv[0] = 'train.py'
command_line.run(main.main)
"""


def driven(tmp_path, *flags, signal='', blind=False):
  path = tmp_path / 'driver.py'
  path.write_text(DRIVER.format(signal=signal, blind=blind))
  return two([tmp_path / 'run'] * 2, *flags, script=path)


@pytest.mark.full
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
@pytest.mark.parametrize('flags', [[], ['--config.algorithm=LG-BP', '--config.pipeline_stages=2']])
def test_a_signal_to_one_stops_both_after_the_next_dispatch(name, flags, tmp_path):
  """Orbax asks JAX's preemption counter about steps: that must not matter. An epoch is 9, 9, 5."""
  flags = ['--config.steps_per_dispatch=9', '--config.model.blocks=2', *flags]
  codes, lines = ends(driven(tmp_path, *flags, signal=name))
  assert codes == [128 + signal.Signals[name]] * 2
  assert lines == [f'train.py: {name}: saved step 41; the same command goes on from there'] * 2
  assert (tmp_path / 'run' / 'checkpoints' / '41').is_dir()


@pytest.mark.full
def test_all_restore_the_step_that_all_can_read(tmp_path):
  """One that cannot be read by process 1, for whatever reason, is kept."""
  ends(driven(tmp_path, '--config.steps_per_dispatch=9', signal='SIGTERM'))
  checkpoints = tmp_path / 'run' / 'checkpoints'
  assert {folder.name for folder in checkpoints.iterdir()} == {'23', '41'}
  both = driven(tmp_path, '--config.steps_per_dispatch=9', signal='SIGTERM', blind=True)
  (out, errors), (_, other_errors) = [process.communicate(timeout=300) for process in both]
  aside = tmp_path / 'run' / 'checkpoints-unreadable'
  assert f'resuming {tmp_path / "run"} at step 23\n' in out
  last = 'train.py: SIGTERM: saved step 64; the same command goes on from there\n'
  assert errors == (
    'warning: passing over the checkpoint of step 41, which cannot be read (by processes [1]); '
    f'it is kept in {aside / "41"}\n{last}'
  )
  assert other_errors == last
  assert [folder.name for folder in aside.iterdir()] == ['41'] and list((aside / '41').iterdir())


@pytest.mark.full
@pytest.mark.parametrize('victim', [0, 1])
def test_one_that_is_killed_ends_the_other(tmp_path, victim):
  """By Gloo's error, or by JAX."""
  both = two([tmp_path / 'run'] * 2)
  until_a_row(both, tmp_path / 'run')
  both[victim].kill()
  other = both[1 - victim]
  errors = other.communicate(timeout=100)[1]
  assert other.returncode in (LOST, -signal.SIGABRT)
  if other.returncode == LOST:
    (line,) = [line for line in errors.splitlines() if line.startswith('train.py: ')]
    assert line.startswith(f'train.py: process {1 - victim} lost another one (')
    assert line.endswith('); the same command goes on from the last checkpoint')
  else:
    assert 'JAX distributed service' in errors


@pytest.mark.full
def test_one_that_is_silent_counts_as_lost(tmp_path):
  """The process and its connections stay alive; only its heartbeats are missing."""
  both = two([tmp_path / 'run'] * 2, '--config.heartbeat_timeout=5')
  until_a_row(both, tmp_path / 'run')
  both[1].send_signal(signal.SIGSTOP)
  try:
    errors = both[0].communicate(timeout=100)[1]
  finally:
    both[0].kill()
    both[1].kill()
  assert both[0].returncode == -signal.SIGABRT
  assert 'unhealthy' in errors


@pytest.mark.full
def test_a_mistake_that_one_finds_ends_both(tmp_path):
  """Only the first has the data."""
  address = connect.free_address()
  module = tmp_path / 'mine.py'
  module.write_text("""
import jax
from lfg_jax import data

def load(data_dir):
  if jax.process_index() == 1:
    raise ValueError('no data here')
  return data.load('digits')
""")
  flags = [f'--config.data.module={module}', *FLAGS, f'--coordinator={address}', '--processes=2']
  both = [
    start('train.py', f'--workdir={tmp_path / "run"}', f'--process={i}', *flags) for i in range(2)
  ]
  codes, lines = ends(both)
  assert codes == [2, 2]
  assert lines[0] == 'train.py: processes [1] could not begin; see what they say'
  assert 'no data here' in lines[1]
  assert not (tmp_path / 'run').exists()


@pytest.mark.full
@pytest.mark.parametrize('objective', ['supervised', 'contrastive'])
def test_a_rehearsal_is_the_run_of_one_process(tmp_path, objective, monkeypatch):
  """It is killed once on the way, and its output is that of one process. Proxies do not matter.

  The optimizer is SGD, because Adam would enlarge the rounding of zero gradients.
  """
  for name in ('http_proxy', 'https_proxy'):
    monkeypatch.setenv(name, 'http://localhost:1')
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
  out, errors = again.communicate(timeout=300)
  assert (again.returncode, errors) == (0, '')
  assert 'compiling …\nresuming' in out and out.count('test error') == out.count('epoch') + 1
  alone.communicate(timeout=120)
  assert_same_parameters(tmp_path / 'two', tmp_path / 'one')
  rows = [
    [row['step'] for row in metrics.read_rows(tmp_path / name / 'metrics.jsonl')]
    for name in ('one', 'two')
  ]
  assert rows[0] == rows[1] == [STEPS * epoch for epoch in range(1, 4)]


@pytest.mark.full
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
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
  assert_same_parameters(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.full
def test_two_folders_are_noticed(tmp_path):
  codes, lines = ends(two([tmp_path / 'one', tmp_path / 'two']))
  assert codes == [2, 2]
  for line in lines:
    assert line.startswith(
      'train.py: processes [1] do not see the folder of process 0; allowed: one --workdir'
    )


@pytest.mark.full
def test_a_refusal_of_the_first_ends_both(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  codes, lines = ends(two([tmp_path] * 2))
  assert codes == [2, 2]
  assert lines == [
    f'train.py: {tmp_path} exists and is not the folder of a run; name another',
    'train.py: processes [0] could not begin; see what they say',
  ]


def test_one_process_shares_its_folder_with_nobody(tmp_path):
  processes.share_folder(tmp_path)
  assert not list(tmp_path.iterdir())
