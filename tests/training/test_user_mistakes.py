"""A mistake in a user's own file: the traceback of that file, then one line; all with --traceback."""

import pickle
import sys

import jax
import numpy as np
import pytest

from lfg_jax import data, errors, user_files
from lfg_jax.errors import UserError
from lfg_jax.training import command_line, configs, main, train
from tests.runs import FLAGS, ROOT, tiny

STREAM = """
import threading
import numpy as np
from lfg_jax import data
from lfg_jax.data.streaming import Stream

class Unusual(Exception):
  def __init__(self, number, text):
    super().__init__(text)

shade = lambda i: np.full((12, 12, 3), 3 * i, np.uint8)

def picture(i):
  return shade(i)

class Source:
  lock = None
  def __len__(self):
    return 64
  def __getitem__(self, i):
    if i == BAD:
      raise Unusual(i, 'no picture')
    return {'image': picture(i), 'label': i % 3}

def load(data_dir):
  source = Source()
  source.lock = LOCK
  split = lambda train: Stream(source, 8, train=train, workers=WORKERS, classes=3)
  return data.Dataset('mine', 3, (8, 8, 3), (.5,) * 3, (.3,) * 3, split(True), split(False))
"""


def stream_file(path, workers, bad=None, lock=None):
  values = f'WORKERS, BAD, LOCK = {workers}, {bad}, {lock}\n'
  path.write_text(STREAM.replace('\nclass Unusual', f'\n{values}\nclass Unusual', 1))
  return str(path)


def ended(monkeypatch, capsys, *arguments):
  """What lfg-train prints to stderr when it ends with code 2."""
  monkeypatch.setattr(sys, 'argv', ['lfg-train', *map(str, arguments)])
  with pytest.raises(SystemExit) as stop:
    command_line.run(main.main)
  assert stop.value.code == 2
  return capsys.readouterr().err


MODEL = (ROOT / 'docs' / 'bring_a_model.md').read_text().split('```python\n')[1].split('```')[0]
DISTRIBUTION = (
  (ROOT / 'docs' / 'new_distribution.md').read_text().split('```python\n')[1].split('```')[0]
)
MISTAKE = 'None.shape'
# part: (option, text with a mistake, what the last line begins with)
FILES = {
  'data': (
    'data.module',
    f'def helper():\n  return {MISTAKE}\n\ndef load(data_dir):\n  return helper()\n',
    'data.module {path}: ',
  ),
  'loss': (
    'losses.module',
    f'def row_loss(outputs, targets):\n  return {MISTAKE}\n',
    'losses.module {path}: ',
  ),
  'module': ('losses.module', f'x = 3\ny = {MISTAKE}\n', 'losses.module {path}: '),
  'config': ('', f'def get_config():\n  return {MISTAKE}\n', 'config file {path}: '),
  'distribution': (
    'estimator.module',
    DISTRIBUTION
    + f'\n\ndef wrong(*_):\n  return {MISTAKE}\n\ndistribution = distribution._replace(draw=wrong)\n',
    'estimator.module {path}: ',
  ),
  'model': (
    'model.module',
    MODEL + f'\n\nmade = make\ndef make(*given):\n  {MISTAKE}\n',
    '{path}, line ',
  ),
}


@pytest.mark.parametrize('part', FILES)
def test_the_frames_of_the_users_file_are_shown(part, tmp_path, monkeypatch, capsys):
  field, text, begins = FILES[part]
  path = tmp_path / 'mine.py'
  path.write_text(text)
  option = f'--config.{field}={path}' if field else f'--config={path}'
  flags = [option, f'--workdir={tmp_path / "run"}']
  err = ended(monkeypatch, capsys, *flags)
  first, *frames, last = err.splitlines()
  line = 1 + next(i for i, own in enumerate(text.splitlines()) if MISTAKE in own)
  assert first == 'Traceback through your own code:'
  assert f'  File "{path}", line {line}, in ' in err and text.splitlines()[line - 1].strip() in err
  assert all(str(path) in frame for frame in frames if frame.startswith('  File'))
  reason = "AttributeError: 'NoneType' object has no attribute 'shape'"
  assert frames[-1] == reason
  assert last.startswith(f'lfg-train: {begins.format(path=path)}') and last.endswith(reason)
  whole = ended(monkeypatch, capsys, *flags, '--traceback')
  assert 'lfg_jax/training/main.py", line' in whole and whole.splitlines()[-1] == last
  assert f'  File "{path}", line {line}, in ' in whole
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('part', ['data', 'model', 'loss', 'distribution', 'config'])
def test_a_file_that_is_not_python_shows_its_line(part, tmp_path, monkeypatch, capsys):
  field, *_ = FILES[part]
  path = tmp_path / 'mine.py'
  path.write_text('x = 1\ndef load(data_dir:\n')
  option = f'--config.{field}={path}' if field else f'--config={path}'
  err = ended(monkeypatch, capsys, option)
  assert f'  File "{path}", line 2\n    def load(data_dir:\n' in err
  assert err.endswith("SyntaxError: '(' was never closed (mine.py, line 2)\n")


def test_a_mistake_that_appears_in_training_too(tmp_path):
  """A ValueError in the user's code, at the third step of an own stream."""
  path = tmp_path / 'mine.py'
  job = train.prepare(tiny(data__module=stream_file(path, 0, bad=40), model__norm='layer'))
  with pytest.raises(UserError) as error:
    train.train(job, tmp_path / 'run')
  line = 1 + path.read_text().splitlines().index("      raise Unusual(i, 'no picture')")
  assert str(error.value) == f'{path}, line {line}: Unusual: no picture'
  assert error.value.frames.count('  File') == 1


def test_our_own_errors_have_no_frames_of_users(tmp_path, monkeypatch, capsys):
  for option in ('--config.epochs=0', '--config.dataset=nothing', '--config.model.size=X'):
    assert ended(monkeypatch, capsys, option).count('\n') == 1
  assert 'Traceback' in ended(monkeypatch, capsys, '--config.epochs=0', '--traceback')


def test_errors_of_ours_stay_what_they_are():
  with pytest.raises(ZeroDivisionError), errors.as_user_errors():
    jax.tree.map(lambda x: 1 / x, 0)  # called by a library, not by us


def test_what_a_user_caused_with_an_argument_of_ours_keeps_our_line(tmp_path):
  """The line of `from_arrays`, below the user's own call."""
  path = tmp_path / 'mine.py'
  path.write_text(
    'import numpy as np\nfrom lfg_jax import data\n\ndef load(data_dir):\n'
    '  pair = np.ones((4, 2, 2, 1)), np.ones(4, int)\n  return data.from_arrays("m", pair, pair)\n'
  )
  with pytest.raises(UserError, match='its train split has images float64') as error:
    data.load('', module=str(path))
  assert 'line 6, in load' in error.value.frames and 'datasets.py' not in error.value.frames


def test_causes_are_shown(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'def load(_):\n  try:\n    1 / 0\n  except ZeroDivisionError as error:\n'
    '    raise RuntimeError("mine") from error\n'
  )
  with pytest.raises(UserError) as error:
    data.load('', module=str(path))
  frames = error.value.frames
  assert frames.index('line 3, in load') < frames.index('line 5, in load')


def test_long_reasons_are_cut_in_the_line_only(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('def load(_):\n  raise RuntimeError("a" * 5000)\n')
  with pytest.raises(UserError) as error:
    data.load('', module=str(path))
  assert len(str(error.value)) < 500 and 'a' * 5000 in error.value.frames


def test_an_error_can_be_sent_to_another_process():
  made = UserError('line')
  made.frames = 'frames'
  sent = pickle.loads(pickle.dumps(made))
  assert (str(sent), sent.frames) == ('line', 'frames')


@pytest.mark.full
def test_own_files_train_with_workers(tmp_path):
  """A source, a function and a lambda of the user's file are sent; its model and loss are beside it."""
  found = []
  for workers in (0, 2):
    path = stream_file(tmp_path / 'mine.py', workers)
    dataset = data.load('', module=path)
    found.append([[*map(np.array, b)] for b in dataset.train.epoch(0, 0, 16)])
  jax.tree.map(np.testing.assert_array_equal, *found)
  model, loss = tmp_path / 'my_model.py', tmp_path / 'my_loss.py'
  model.write_text(MODEL)
  loss.write_text(
    'from lfg_jax.local import row_losses\nrow_loss = lambda *given: row_losses.cross_entropy(*given)\n'
  )
  own = [f'--config.model.module={model}', f'--config.losses.module={loss}']
  run = [f'--config.data.module={path}', f'--workdir={tmp_path / "run"}']
  main.main([*own, *run, '--config.epochs=1', '--config.batch_size=32'])
  assert (tmp_path / 'run' / 'summary.json').exists()


@pytest.mark.full
def test_a_mistake_in_a_worker_has_its_line(tmp_path, monkeypatch, capsys):
  """Also one of a kind that only the user's file knows."""
  path = stream_file(tmp_path / 'mine.py', 1, bad=5)
  flags = [f'--config.data.module={path}', f'--workdir={tmp_path / "run"}', *FLAGS]
  err = ended(monkeypatch, capsys, *flags)
  assert f'  File "{path}", line ' in err and err.endswith(': Unusual: no picture\n')
  path = stream_file(tmp_path / 'mine.py', 1, lock='threading.Lock()')
  err = ended(monkeypatch, capsys, *flags)
  assert (
    err.count('\n') == 1 and "TypeError: cannot pickle '_thread.lock' object; allowed: w" in err
  )


def test_modules_of_the_same_name_are_two(tmp_path):
  loaded = []
  for name in ('a', 'b'):
    path = tmp_path / name / 'mine.py'
    path.parent.mkdir()
    path.write_text(f'def load(_):\n  return {name!r}\n')
    loaded.append(user_files.load('data.module', str(path), ('load',)))
  assert [module.load(None) for module in loaded] == ['a', 'b']


def test_configs_of_users_that_lack_a_function(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('x = 1\n')
  with pytest.raises(UserError, match=r"KeyError: 'get_config'$"):
    configs.load(str(path))
