"""The folder of a run: locks, full disks, more epochs, and new runs that start from old ones."""

import errno
import fcntl
import json
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.errors import UserError
from lfg_jax.training import configs, train
from lfg_jax.training.run import metrics, workdir
from tests.runs import STEPS, state, tiny

pytestmark = pytest.mark.full

COMPILED = {}
ENDLESS = {'optimizer__schedule': 'constant'}


def start(folder, **fields):
  return train.train(train.prepare(tiny(**fields)), folder)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
  """Lets runs share compiled functions if, at a constant rate, they differ only in their epochs."""
  original = train.build

  def build(config, *made):
    fields = {**dict(configs.flatten(config)), 'init_from': None}
    key = str({**fields, 'epochs': None} if config.optimizer.schedule == 'constant' else fields)
    if key not in COMPILED:
      COMPILED[key] = original(config, *made)
    functions, begin = COMPILED[key]
    return functions, jax.tree.map(jnp.copy, begin)  # a step takes over its memory

  monkeypatch.setattr(train, 'build', build)


def rows(folder):
  """The rows without values that depend on the clock."""
  found = metrics.read_rows(folder / 'metrics.jsonl')
  return [
    {name: value for name, value in row.items() if name != 'examples_per_second'} for row in found
  ]


def assert_same_run(folder, other):
  assert rows(folder) == rows(other)
  jax.tree.map(np.testing.assert_array_equal, state(folder), state(other))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of two epochs at a constant rate."""
  folder = tmp_path_factory.mktemp('finished') / 'run'
  start(folder, **ENDLESS)
  return folder


def test_a_second_run_of_one_folder_ends_in_one_line(tmp_path, monkeypatch):
  """So does a run that started when the first had only begun, and its folder did not exist yet."""
  job, folder = train.prepare(tiny(**ENDLESS)), tmp_path / 'run'
  lines = []

  def second(place):
    def call(*arguments, **options):
      with pytest.raises(UserError) as error:
        train.train(job, folder)
      lines.append(str(error.value))
      return place(*arguments, **options)

    return call

  monkeypatch.setattr(metrics, 'write_atomically', second(metrics.write_atomically))
  monkeypatch.setattr(train, 'build', second(train.build))
  train.train(job, folder)
  assert len(lines) >= 3 and lines[0].startswith(f'{folder} is in use by process ')
  assert len(set(lines)) == 1 and lines[0].endswith('; wait for its end, or name another folder')
  assert [row['epoch'] for row in rows(folder)] == [1, 2]
  assert train.train(job, folder)['steps'] == 2 * STEPS  # its end released the folder


def test_a_lock_left_by_a_killed_process_holds_nobody(tmp_path):
  (tmp_path / 'lock').write_text('process 1 on elsewhere')
  with workdir.claim(tmp_path, tiny()) as summary:
    assert summary is None
  assert (tmp_path / 'config.json').exists()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with workdir.claim(tmp_path, tiny()):
    assert 'has no locks; do not start this run twice' in capsys.readouterr().err


def test_a_run_with_other_fields_is_refused(finished, tmp_path):
  folder = tmp_path / 'run'
  for changes, message in (
    ({'init_from'}, None),  # None here too
    ({'augment'}, r'augment\.flip is None there, False here'),
    ({'epochs'}, 'epochs is None there, 2 here'),
  ):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    stored = json.loads((folder / 'config.json').read_text())
    kept = {name: value for name, value in stored.items() if name not in changes}
    (folder / 'config.json').write_text(json.dumps(kept))
    claim = workdir.claim(folder, tiny(**ENDLESS))
    if message is None:
      with claim as summary:
        assert summary['steps'] == 2 * STEPS
    else:
      with pytest.raises(UserError, match=message), claim:
        pass


def test_a_finished_run_goes_on_for_more_epochs(finished, tmp_path):
  folder = tmp_path / 'run'
  start(folder, epochs=1, **ENDLESS)
  for _ in range(2):  # killed as soon as it had begun to go on, it is not finished
    with workdir.claim(folder, tiny(**ENDLESS)) as summary:
      assert summary is None
  assert start(folder, epochs=2, **ENDLESS)['steps'] == 2 * STEPS
  assert_same_run(folder, finished)
  assert json.loads((folder / 'config.json').read_text())['epochs'] == 2
  assert json.loads((folder / 'summary.json').read_text())['steps'] == 2 * STEPS
  with pytest.raises(UserError, match='epochs is 2 there, 1 here'):
    start(folder, epochs=1, **ENDLESS)


def test_epochs_on_which_the_schedule_depends_are_another_run(tmp_path):
  folder = tmp_path / 'run'
  start(folder, epochs=1)
  with pytest.raises(UserError) as error:
    start(folder, epochs=2)
  assert str(error.value) == (
    f'{folder} has a run of 1 epochs, on which its cosine schedule depends, so that 2 are another run; '
    f'it may start from this one: --config.init_from={folder}, and another folder'
  )
  assert start(folder, epochs=1)['steps'] == STEPS


@pytest.mark.parametrize('field, value', [
    ('micro_batch', 4), ('steps_per_dispatch', 2), ('max_to_keep', 7), ('checkpoint_every', 2), ('eval_every', 2),
    ('data_dir', '/elsewhere'),
])  # fmt: skip
def test_what_changes_no_number_may_differ(field, value, finished, tmp_path, monkeypatch):
  assert field in workdir.MAY_DIFFER
  with workdir.claim(finished, tiny(**ENDLESS, **{field: value})) as summary:
    assert summary['steps'] == 2 * STEPS


def test_the_parts_of_a_batch_change_rounding_only(finished, tmp_path):
  """Parts have another size, as on another number of devices; 7 never divides the batch."""
  folder = tmp_path / 'run'
  start(folder, epochs=1, micro_batch=3, **ENDLESS)
  start(folder, epochs=2, micro_batch=7, steps_per_dispatch=1, **ENDLESS)
  for there, here in zip(state(finished), state(folder), strict=True):
    np.testing.assert_allclose(there, here, rtol=2e-3, atol=2e-4)


# --- a new run from an old one --------------------------------------------------------------------


def variables(folder):
  _, found = train.load(folder)
  return found


def test_a_new_run_starts_from_the_parameters_of_another(finished, tmp_path, monkeypatch):
  fields = {'init_from': str(finished), 'optimizer__name': 'sgd', 'optimizer__momentum': 0.0}
  job = train.prepare(tiny(**fields))
  seen = []
  epochs = train._epochs

  def first(config, functions, begin, *rest):
    seen.append(jax.device_get(begin))
    return epochs(config, functions, begin, *rest)

  monkeypatch.setattr(train, '_epochs', first)
  train.train(job, tmp_path / 'run')
  there, here = jax.device_get(variables(finished)), seen[0]
  assert here.step == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(here.opt_state))
  jax.tree.map(
    np.testing.assert_array_equal, here.rest['control_variate'], there.rest['control_variate']
  )
  jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
  assert (
    rows(tmp_path / 'run')[0]['train_error_percent']
    < 0.6 * rows(finished)[0]['train_error_percent']
  )
  assert rows(tmp_path / 'run')[0]['step'] == STEPS
  # It goes on, and is finished, whether the other is there or not.
  (tmp_path / 'run' / 'summary.json').unlink()
  monkeypatch.setattr(train.warm_start, 'from_run', None)
  assert train.train(job, tmp_path / 'run')['steps'] == 2 * STEPS


@pytest.mark.parametrize('fields, message', [
    ({'model__channels': 32}, r'has another model: params.readout.linear.kernel is \(16, 10\) there, \(32, 10\) here'),
    ({'model__blocks': 2}, r'has another model: params.blocks.channel.bias is missing there, \(1, 16\) here'),
    ({'init_from': '/nowhere'}, '^/nowhere is not the folder of a run: it has no config.json'),
])  # fmt: skip
def test_a_new_run_needs_the_same_model(fields, message, finished, tmp_path):
  with pytest.raises(UserError, match=message):
    start(tmp_path / 'run', **{'init_from': str(finished), **fields})
  assert not (tmp_path / 'run').exists()


def test_another_rule_may_start_from_the_parameters(finished, tmp_path):
  """Feedback alignment starts with its own matrices."""
  start(tmp_path / 'FA', init_from=str(finished), algorithm='FA', epochs=1, **ENDLESS)
  assert (
    rows(tmp_path / 'FA')[0]['train_error_percent'] < 0.8 * rows(finished)[0]['train_error_percent']
  )


# --- what goes wrong with files -------------------------------------------------------------------


@pytest.fixture
def no_file_grows():
  """A function after whose call no write to a file succeeds."""
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, old)


# Orbax's unfinished writes.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('place', ['claim', 'build', 'write', 'save', '_finish'])
def test_no_room(place, finished, tmp_path, monkeypatch, no_file_grows):
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  owner = {'claim': train.folders, 'write': metrics.RunLog, 'save': train.Checkpoints}.get(
    place, train
  )
  original, calls = getattr(owner, place), []

  def late(*arguments, **options):
    calls.append(place)
    if len(calls) == (2 if place in ('write', 'save') else 1):
      no_file_grows()
    return original(*arguments, **options)

  folder = tmp_path / 'run'
  with monkeypatch.context() as patch, pytest.raises(UserError) as error:
    patch.setattr(owner, place, late)
    start(folder, **ENDLESS)
  resource.setrlimit(resource.RLIMIT_FSIZE, old)
  line = str(error.value)
  assert line.startswith(f'{tmp_path}') and 'File too large; what was saved before is kept' in line
  assert '\n' not in line
  start(folder, **ENDLESS)
  assert_same_run(folder, finished)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk(finished, tmp_path):
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', str(tmp_path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('may not mount')
  try:
    for _ in range(2):  # and again while it is full
      with pytest.raises(
        UserError, match=r'^[^\n]*: No space left on device; what was saved before is kept'
      ):
        start(tmp_path / 'run', epochs=12, **ENDLESS)
    subprocess.run(['mount', '-o', 'remount,size=20m', str(tmp_path)], check=True)
    start(tmp_path / 'run', epochs=12, **ENDLESS)
    assert [row['epoch'] for row in rows(tmp_path / 'run')] == list(range(1, 13))
    assert rows(tmp_path / 'run')[:2] == rows(finished)
  finally:
    subprocess.run(['umount', str(tmp_path)], check=True)


def test_an_output_that_nobody_reads(tmp_path, monkeypatch):
  def close(*_):
    raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

  monkeypatch.setattr(train, 'build', close)
  with pytest.raises(
    UserError, match=r'^nobody reads the output any more; the same command goes on'
  ):
    start(tmp_path / 'run')


@pytest.mark.parametrize(
  'place, why', [('file/run', 'Not a directory'), ('/proc/run', 'No such file or directory')]
)
def test_folders_that_cannot_be(place, why, tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match=f'^{tmp_path / place}: {why}$'):
    start(tmp_path / place)


def test_a_folder_that_may_not_be_read(finished, tmp_path, monkeypatch):
  def refuse(path, *_, **__):
    raise PermissionError(13, 'Permission denied', str(path))

  for what in ('iterdir', 'mkdir'):
    (tmp_path / what).mkdir()
    with monkeypatch.context() as patch:
      patch.setattr(type(tmp_path), what, refuse)
      with pytest.raises(UserError, match=f'^{tmp_path / what}: Permission denied$'):
        start(tmp_path / what)
