"""Runs continue after every kind of stop, and end as if they had never been stopped."""

import json
import shutil
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax import data
from lfg_jax.data.streaming import Stream
from lfg_jax.errors import UserError
from lfg_jax.training import train
from lfg_jax.training.hosts import preemption, processes
from lfg_jax.training.run.checkpoints import Checkpoints
from tests.runs import FLAGS, STEPS, start, state, tiny


def rows(workdir):
  """The rows without values that depend on the clock."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [
    {name: value for name, value in line.items() if name != 'examples_per_second'} for line in lines
  ]


def assert_same_run(workdir, other):
  assert rows(workdir) == rows(other)
  for a, b in zip(state(workdir), state(other), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of 8 epochs that nothing stopped."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  process = start('train.py', f'--workdir={workdir}', '--config.epochs=8', *FLAGS)
  out, err = process.communicate()
  assert process.returncode == 0 and err == '', err
  assert 'test error' in out and out.count('compiling …') == 1
  return workdir


def run_until(workdir, condition, number):
  """Starts the run; sends signal `number` as soon as `condition` holds."""
  process = start('train.py', f'--workdir={workdir}', '--config.epochs=8', *FLAGS)
  while process.poll() is None and not condition():
    time.sleep(0.002)
  process.send_signal(number)
  out, err = process.communicate()
  return process.returncode, out, err


def has_rows(workdir, number):
  path = workdir / 'metrics.jsonl'
  return lambda: path.exists() and path.read_text().count('\n') >= number


@pytest.mark.full
def test_files_of_a_run(whole):
  assert [row['epoch'] for row in rows(whole)] == list(range(1, 9))
  assert rows(whole)[-1].keys() == {
    'step',
    'epoch',
    'train_loss',
    'train_error_percent',
    'test_error_percent',
    'learning_rate',
  }
  summary = json.loads((whole / 'summary.json').read_text())
  assert (
    summary['steps'] == 8 * STEPS
    and summary['test_error_percent'] == rows(whole)[-1]['test_error_percent']
  )
  assert (summary['algorithm'], summary['model'], summary['dataset']) == (
    'LG-FG-A+',
    'S/1/2',
    'digits',
  )
  assert (whole / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert list((whole / 'tensorboard').iterdir())


@pytest.mark.full
def test_killed_run_ends_as_if_it_had_not_been(whole, tmp_path):
  """It is killed before the first save, while a checkpoint is written, and just after a row."""
  workdir = tmp_path / 'run'

  def being_written():
    return any('tmp' in folder.name for folder in (workdir / 'checkpoints').glob('*'))

  for condition in ((workdir / 'metrics.jsonl').exists, being_written, has_rows(workdir, 5)):
    code, _, _ = run_until(workdir, condition, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (workdir / 'summary.json').exists()
  code, out, err = run_until(workdir, lambda: False, 0)
  assert code == 0 and err == ''
  assert 'resuming' in out
  assert_same_run(workdir, whole)


@pytest.mark.full
def test_sigterm_saves_first(whole, tmp_path):
  workdir = tmp_path / 'run'
  code, _, err = run_until(workdir, has_rows(workdir, 2), signal.SIGTERM)
  assert code == 128 + signal.SIGTERM
  saved = max(int(folder.name) for folder in (workdir / 'checkpoints').iterdir())
  assert err == f'train.py: SIGTERM: saved step {saved}; the same command goes on from there\n'
  code, out, _ = run_until(workdir, lambda: False, 0)
  assert code == 0 and f'at step {saved}\n' in out
  assert_same_run(workdir, whole)


def interrupt_at(monkeypatch, step):
  """Presses Ctrl-C during the given step, or during those dispatched with it."""
  original = train._epoch

  def epoch(functions, state, *rest):
    begin, steps = [int(state.step)], functions.steps

    def counted(state, count, inputs):
      begin[0] += count
      state = steps(state, count, inputs)
      if begin[0] >= step:
        signal.raise_signal(signal.SIGINT)
      return state

    return original(functions._replace(steps=counted), state, *rest)

  monkeypatch.setattr(train, '_epoch', epoch)


@pytest.mark.parametrize(
  'saved, fields',
  [
    pytest.param(32, {'steps_per_dispatch': 9}, id='LG-FG-A+'),
    pytest.param(
      30,
      {'steps_per_dispatch': 1, 'algorithm': 'FA', 'model__norm': 'batch'},
      id='FA-batch',
      marks=pytest.mark.full,
    ),
  ],
)
def test_interrupted_within_an_epoch(saved, fields, tmp_path, monkeypatch):
  _interrupted_within_an_epoch(train.prepare(tiny(**fields)), saved, tmp_path, monkeypatch)


@pytest.mark.full
def test_interrupted_within_an_epoch_of_a_stream(tmp_path, monkeypatch):
  monkeypatch.setattr(data, 'load', lambda *_, **__: streamed(load('digits')))
  _interrupted_within_an_epoch(train.prepare(tiny()), 30, tmp_path, monkeypatch)


def _interrupted_within_an_epoch(job, saved, tmp_path, monkeypatch):
  train.train(job, tmp_path / 'whole')
  with (
    monkeypatch.context() as patch,
    pytest.raises(preemption.Interrupted, match=f'SIGINT: saved step {saved}'),
  ):
    interrupt_at(patch, 30)
    train.train(job, tmp_path / 'run')
  assert len(rows(tmp_path / 'run')) == 1
  train.train(job, tmp_path / 'run')
  assert_same_run(tmp_path / 'run', tmp_path / 'whole')


@pytest.mark.full
@pytest.mark.parametrize('epochs', [1, 2])
def test_interrupted_while_evaluating(epochs, tmp_path, monkeypatch):
  """No row is lost, not even that of the last epoch, and the test error is the same."""
  monkeypatch.setattr(data, 'load', lambda *_, **__: streamed(load('digits')))
  job = train.prepare(tiny(epochs=epochs))
  train.train(job, tmp_path / 'whole')
  with monkeypatch.context() as patch:
    interrupted = []

    def until_stop(self, items):
      for item in original(self, items):
        if not interrupted:
          interrupted.append(signal.raise_signal(signal.SIGINT))
        yield item
      assert len(list(items)) > 1  # batches were left

    original = patched(patch, preemption.Signals, 'until_stop', until_stop)
    with pytest.raises(preemption.Interrupted, match=f'SIGINT: saved step {STEPS}'):
      train.train(job, tmp_path / 'run')
  assert not rows(tmp_path / 'run')
  train.train(job, tmp_path / 'run')
  assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def patched(patch, owner, name, new):
  original = getattr(owner, name)
  patch.setattr(owner, name, new)
  return original


load = data.load


def streamed(dataset):
  """The same examples, in colour."""

  def stream(split, is_train):
    examples = [
      {'image': np.repeat(image, 3, -1), 'label': label}
      for image, label in zip(*split, strict=True)
    ]
    return Stream(examples, 8, train=is_train, threads=2)

  return dataset._replace(
    image_shape=(8, 8, 3),
    mean=dataset.mean * 3,
    std=dataset.std * 3,
    train=stream(dataset.train, True),
    test=stream(dataset.test, False),
  )


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """A folder with checkpoints of steps 1 … 6, of which the third is the best."""
  directory = tmp_path_factory.mktemp('kept') / 'checkpoints'
  with Checkpoints(directory, keep=2) as checkpoints:
    for step in range(1, 7):
      checkpoints.save(step, numbers(step), {'seconds': float(step)}, abs(step - 3) / 10)
  return directory


def numbers(step):
  noise = jax.random.normal(jax.random.key(0), (50, 50))
  return {'step': jnp.array(step), 'params': {'kernel': step + noise}}


LIKE = jax.eval_shape(lambda: numbers(0))


def test_newest_and_best_are_kept(kept):
  assert {folder.name for folder in kept.iterdir()} == {'3', '5', '6'}
  state, clock = Checkpoints(kept, keep=2).restore(LIKE)
  jax.tree.map(np.testing.assert_array_equal, state, numbers(6))
  assert clock == {'seconds': 6.0}


def damage(path, how):
  if how == 'missing':
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if how == 'half' else 0])


@pytest.mark.parametrize('how', ['half', 'empty', 'missing'])
@pytest.mark.parametrize(
  'name', ['largest', 'state/manifest.ocdbt', 'state/_METADATA', 'clock/metadata']
)
def test_a_damaged_checkpoint_is_passed_over(name, how, kept, tmp_path, capfd):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(kept, directory)
  files = [path for path in (directory / '6').rglob('*') if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  damage(largest if name == 'largest' else directory / '6' / name, how)
  damaged = contents(directory / '6')
  with Checkpoints(directory, keep=2) as checkpoints:
    state, _ = checkpoints.restore(LIKE)
    jax.tree.map(np.testing.assert_array_equal, state, numbers(5))
    checkpoints.save(6, numbers(6), {'seconds': 6.0}, 0.3)  # its place is free
  err = capfd.readouterr().err
  assert err.startswith('warning: passing over the checkpoint of step 6, which cannot be read (')
  assert err.count('\n') == 1
  assert Checkpoints(directory, keep=2).restore(LIKE)[0]['step'] == 6
  aside = tmp_path / 'checkpoints-unreadable' / '6'
  assert err.endswith(f'; it is kept in {aside}\n')
  assert contents(aside) == damaged


def contents(folder):
  return {
    path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


def test_what_cannot_be_read_just_now_is_kept_as_it_is(kept, tmp_path, monkeypatch, capfd):
  """Twice the same step; and a folder that is only read, as that of another run, stays whole."""
  directory, aside = tmp_path / 'checkpoints', tmp_path / 'checkpoints-unreadable'
  shutil.copytree(kept, directory)
  read = Checkpoints._read

  def fail(self, manager, step, like):
    if step == 6:
      raise PermissionError('not just now')
    return read(self, manager, step, like)

  monkeypatch.setattr(Checkpoints, '_read', fail)
  assert Checkpoints(directory, keep=2).restore(LIKE, own=False)[0]['step'] == 5
  assert {folder.name for folder in directory.iterdir()} == {'3', '5', '6'} and not aside.exists()
  for _ in range(2):
    with Checkpoints(directory, keep=2) as checkpoints:
      assert checkpoints.restore(LIKE)[0]['step'] == 5
      assert {folder.name for folder in directory.iterdir()} == {'3', '5'}
      checkpoints.save(6, numbers(6), {'seconds': 6.0}, 0.3)
  monkeypatch.setattr(Checkpoints, '_read', read)
  for name in ('6', '6-2'):
    shutil.rmtree(directory)
    directory.mkdir()
    (aside / name).rename(directory / '6')
    assert Checkpoints(directory, keep=2).restore(LIKE)[0]['step'] == 6
  assert capfd.readouterr().err.count('PermissionError: not just now') == 3


@pytest.mark.parametrize(
  'error, closes', [(processes.Lost('gone'), False), (UserError('other'), True)]
)
def test_a_write_is_not_waited_for_when_a_process_was_lost(error, closes, tmp_path, monkeypatch):
  """The lost process would never write its part."""
  closed = []
  monkeypatch.setattr(Checkpoints, 'close', lambda self: closed.append(self))
  with pytest.raises(type(error)), Checkpoints(tmp_path, keep=2):
    raise error
  assert len(closed) == closes


def test_nothing_is_removed_when_nothing_can_be_read(kept, tmp_path):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(kept, directory)
  other = {'step': LIKE['step'], 'params': {'weight': LIKE['params']['kernel']}}
  with pytest.raises(UserError, match=r'^no checkpoint in .* can be read \(6: .*; remove'):
    Checkpoints(directory, keep=2).restore(other)
  assert {folder.name for folder in directory.iterdir()} == {'3', '5', '6'}


@pytest.mark.full
def test_evaluations_may_be_rarer(tmp_path):
  config = tiny(epochs=3, eval_every=2, checkpoint_every=2, max_to_keep=1)
  summary = train.train(train.prepare(config), tmp_path / 'run')
  assert [row['test_error_percent'] is None for row in rows(tmp_path / 'run')] == [
    True,
    False,
    False,
  ]
  assert summary['test_error_percent'] == rows(tmp_path / 'run')[-1]['test_error_percent']


def test_parts_of_a_failed_write_print_nothing_and_other_mistakes_do(tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda caught: told.append(str(caught.exc_value)))
  for _ in range(2):  # a second run in this process does not wrap it again
    with Checkpoints(tmp_path, keep=1):
      for message in ('Event loop is closed', 'anything else'):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(message)))
  assert told == ['anything else'] * 2
