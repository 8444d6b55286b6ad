"""Every expected mistake of a run ends in one line on stderr and exit code 2, before any long work."""

import json
import subprocess
import sys

import pytest

from lfg_jax import data
from lfg_jax.models import sizes
from lfg_jax.tangents import distributions
from lfg_jax.training import command_line, configs, optimizers
from lfg_jax.training.rules import algorithms, rules
from tests import runs
from tests.runs import FLAGS, ROOT, STEPS

ALGORITHMS = ', '.join(rules.REGISTRY)
TOP = ', '.join(sorted(configs.base()))


def run(monkeypatch, capsys, arguments, script='train.py'):
  """Exit code, stdout and stderr of a script, in this process."""
  main = runs.script(script.removesuffix('.py'))['main']
  monkeypatch.setattr(sys, 'argv', [script, *arguments])
  with pytest.raises(SystemExit) as stop:
    command_line.run(main)
  out, err = capsys.readouterr()
  return stop.value.code, out, err


def told(err, *facts, program='train.py'):
  """Whether an error is one line of a program that has these facts."""
  assert err.startswith(f'{program}: ') and err.count('\n') == 1, err
  missing = [fact for fact in facts if fact not in err]
  assert not missing, (missing, err)
  return True


# An argument, and facts of the line: the field, what was given, what is allowed.
@pytest.mark.parametrize('argument, facts', [
    ('algorithm=LG-XX', ('algorithm', "'LG-XX'", ALGORITHMS)),
    ('model.size=X/1/1', ('model.size', "'X/1/1'", 'SIZE/PATCHES/GROUPS', 'S, M, L')),
    ('augment.shift=8', ('augment.shift', '8', '0 … 7')),
    ('augment.shift=-1', ('augment.shift', '-1', '0 … 7')),
    ('model.norm=instance', ('model.norm', "'instance'", 'layer, whole, batch')),
    ('model.size=S/2/3', ('3 groups', 'do not divide', 'model.channels', '256')),
    ('model.size=S/3/4', ('model.size', '3x3 patches', 'do not divide', '8x8')),
    ('dataset=letters', ("dataset 'letters'", 'digits, mnist', 'TFDS', '--config.data.module')),
    ('estimator.distribution=cauchy', ('estimator.distribution', "'cauchy'", ', '.join(distributions.DISTRIBUTIONS))),
    ('optimizer.name=sdg', ('optimizer.name', "'sdg'", ', '.join(optimizers.OPTIMIZERS))),
    ('optimizer.schedule=wave', ('optimizer.schedule', "'wave'", ', '.join(optimizers.SCHEDULES))),
    ('optimizer.learning_rate=-1', ('optimizer.learning_rate', '-1', 'more than 0')),
    ('optimizer.learning_rate=nan', ('optimizer.learning_rate', 'nan', 'more than 0')),
    ('optimizer.b1=1', ('optimizer.b1', '1', 'without 1', 'None')),
    ('optimizer.momentum=0.5', ('optimizer.momentum', '0.5', 'adam has none', 'None', 'b1')),
    ('optimizer.weight_decay=-1', ('optimizer.weight_decay', '-1', '0 or more')),
    ('optimizer.warmup_epochs=20', ('optimizer.warmup_epochs', '20', 'less than epochs')),
    ('optimizer.staircase_epochs=1,b', ('optimizer.staircase_epochs', "'b'", 'numbers, 0 or more')),
    ('optimizer.staircase_epochs=-1', ('optimizer.staircase_epochs', '-1', '0 or more')),
    ('model.norms=head,readuot', ('model.norms', "'readuot'", ', '.join(sizes.NORMS))),
    ('model.channels=0', ('model.channels', '0', '1 or more')),
    ('model.hidden=-2', ('model.hidden', '-2', '1 or more')),
    ('model.blocks=0', ('model.blocks', '0', '1 … 10000')),
    ('model.blocks=-3', ('model.blocks', '-3', '1 … 10000')),
    ('model.pool_every=-1', ('model.pool_every', '-1', '0 or more')),
    ('model.channel_ratio=0', ('model.channel_ratio', '0', '1 or more')),
    ('model.group_ratio=0', ('model.group_ratio', '0', '1 or more')),
    ('contrastive.temperature=0', ('contrastive.temperature', '0', 'more than 0')),
    ('contrastive.min_area=2', ('contrastive.min_area', '2', 'at most 1')),
    ('losses.head_average=1', ('losses.head_average', '1', 'without 1')),
    ('losses.every=0', ('losses.every', '0', '1 or more')),
    ('estimator.num_tangents_by_tap.after_group=-1', ('after_group', '-1', '0 or more')),
    ('micro_batch=-1', ('micro_batch', '-1', '0 or more')),
    ('profile=5', ('profile', "'5'", 'FIRST:LAST', 'None')),
    ('profile=5:4', ('profile', "'5:4'", 'FIRST:LAST', 'None')),
    ('heartbeat_timeout=1', ('heartbeat_timeout', '1', '2 or more')),
    ('image_size=0', ('image_size', '0', '1 or more', 'None')),
    ('estimator.control_variate_rate=inf', ('estimator.control_variate_rate', 'inf', 'finite')),
    ('seed=2147483648', ('seed', '2147483648', '32 bits')),
    ('epochs=0', ('epochs', '0', '1 or more')),
    ('batch_size=30', ('batch_size', '30', 'multiples of 8', 'devices')),
    ('epochs=many', ('epochs', "'many'", 'int')),
    ('losses.patch=maybe', ('losses.patch', "'maybe'", 'bool')),
    ('epochs=None', ('epochs', "'None'", 'int')),
    ('image_size=big', ('image_size', "'big'", 'int, None')),
    ('epochs', ('Missing value', '--config.epochs')),
    ('losses=3', ('losses has fields', 'every, group, head_ahead', 'row; name one')),
    ('model=mlp', ('model has fields', 'name', 'name one')),
    ('image_size=9', ('image_size', '9', 'digits', '8x8')),
    ('num_train_examples=1439', ('num_train_examples', '1439', '1 … 1438')),
    ('epoch=3', ('epoch;', 'did you mean epochs?', TOP)),
    ('learning_rat=1', ('learning_rat;', 'did you mean optimizer.learning_rate?', TOP)),
    ('lerning_rate=1', ('lerning_rate;', 'did you mean optimizer.learning_rate?')),
    ('estimator.distributions=x', ('did you mean estimator.distribution?', 'chunk, combine')),
    ('model.width=1', ('model.width', 'allowed: blocks')),
    ('zzz.x=1', ('zzz.x', TOP)),
])  # fmt: skip
def test_fields(argument, facts, tmp_path, monkeypatch, capsys):
  workdir = [f'--workdir={tmp_path / "run"}']
  code, out, err = run(monkeypatch, capsys, [*workdir, f'--config.{argument}'])
  assert (code, out) == (2, '') and told(err, *facts)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('argument, facts', [
    # A field without its place in the config is what one types first.
    ('--epochs=2', ('--epochs', 'did you mean --config.epochs?')),
    ('--batch=2', ('--batch', 'did you mean --config.batch_size?')),
    ('--learning_rate=1', ('did you mean --config.optimizer.learning_rate?',)),
    ('--model.size=S/1/1', ('did you mean --config.model.size?',)),
    ('--model=mlp', ('did you mean --config.model.name?',)),
    ('--optimizer=lars', ('did you mean --config.optimizer.name?',)),
    ('--confg=configs/mnist.py', ('--confg', 'did you mean --config?')),
    ('--work_dir=x', ('did you mean --workdir?',)),
    ('--zzz', ('unknown option --zzz\n',)),
    ('--config=configs/none.py', ('configs/none.py', 'not found')),
    ('--config=minst', ('minst', 'did you mean mnist?', 'cifar10')),
    ('--noconfig.epochs', ('noconfig.epochs',)),
    ('--rehearse=0', ('--rehearse', '0', '1 or more')),
    ('--rehearse=two', ('--rehearse', "'two'", '1 or more')),
    ('--process=1', ('coordinator, processes, process', 'missing', '--coordinator=HOST:PORT')),
    ('--print_config=perhaps', ('--print_config', "'perhaps'", 'true, false')),
    ('--workdir', ('Missing value', '--workdir')),
    ('more', ("unexpected argument 'more'",)),
])  # fmt: skip
def test_options(argument, facts, tmp_path, monkeypatch, capsys):
  code, out, err = run(monkeypatch, capsys, [f'--workdir={tmp_path / "run"}', argument])
  assert (code, out) == (2, '') and told(err, *facts)
  assert not (tmp_path / 'run').exists()


def test_a_traceback_on_demand(monkeypatch, capsys):
  wrong = '--config.epochs=0'
  assert 'Traceback' not in run(monkeypatch, capsys, [wrong])[2]
  err = run(monkeypatch, capsys, ['--traceback', wrong])[2]
  assert 'Traceback' in err and told(err.splitlines(keepends=True)[-1], 'epochs', '1 or more')
  assert 'Traceback' not in run(monkeypatch, capsys, [wrong])[2]


def test_views_and_streams_are_not_augmented_twice(tmp_path, monkeypatch, capsys):
  arguments = [
    '--config.augment.flip=True',
    '--config.objective=contrastive',
    f'--workdir={tmp_path}/run',
  ]
  message = (
    "train.py: augment.flip is True, and objective='contrastive' has views of its own; "
    'allowed: augment.shift=0 and augment.flip=False\n'
  )
  assert run(monkeypatch, capsys, arguments) == (2, '', message)
  stream = data.load('digits')._replace(name='photos', train=data.Stream([], image_size=8))
  with pytest.raises(
    ValueError, match='flip is True, and photos is cropped and flipped as it is read'
  ):
    algorithms.make(runs.tiny(augment__flip=True), stream)


def test_a_convolution_has_a_size(tmp_path, monkeypatch, capsys):
  for size in (0, 9):
    arguments = [
      '--config.model.mixing=conv',
      f'--config.model.conv_size={size}',
      f'--workdir={tmp_path / "run"}',
    ]
    message = f'train.py: model.conv_size is {size}; allowed: 1 … 8, the height of an image\n'
    assert run(monkeypatch, capsys, arguments) == (2, '', message)


def test_missing_data_names_the_command(tmp_path, monkeypatch, capsys):
  arguments = [
    f'--config={ROOT}/configs/mnist.py',
    f'--config.data_dir={tmp_path}',
    '--workdir=/nowhere/run',
  ]
  message = (
    f'train.py: dataset mnist is not in {tmp_path}; prepare it with: '
    f'pip install tensorflow; lfg-prepare-data --dataset=mnist --data_dir={tmp_path}\n'
  )
  assert run(monkeypatch, capsys, arguments) == (2, '', message)


@pytest.mark.parametrize('body, message', [
    ('1 / 0', 'ZeroDivisionError: division by zero'),
    ("c = configs.base()\n  c.epochs = 'x'\n  return c", None),
    ('c = configs.base()\n  del c.max_to_keep\n  return c', 'config field max_to_keep is missing'),
    ('c = configs.base()\n  c.new = 1\n  return c', f'unknown config field new; allowed: {TOP}'),
    ('c = configs.base()\n  del c.losses\n  c.losses = 3\n  return c',
     'losses has fields: every, group, head_ahead, head_average, head_hidden, module, overlap, patch, row; '
     'name one of them'),
    ('c = configs.base()\n  del c.seed\n  c.seed = None\n  return c', 'seed is None; allowed: int'),
])  # fmt: skip
def test_mistakes_in_a_config_file(body, message, tmp_path, monkeypatch, capsys):
  path = tmp_path / 'mine.py'
  path.write_text(f'from lfg_jax.training import configs\n\ndef get_config():\n  {body}\n')
  code, out, err = run(monkeypatch, capsys, [f'--config={path}', f'--workdir={tmp_path / "run"}'])
  last = err.splitlines()[-1]
  assert (code, out) == (2, '')
  if message:
    assert last.endswith(message)
  else:  # the words are ml_collections'
    assert last.startswith(f'train.py: config file {path}: TypeError: ')
  raised = ': ZeroDivisionError: ' in last or ': TypeError: ' in last
  assert err.startswith('Traceback through your own code:\n') == raised
  assert raised or err.count('\n') == 1


def test_a_process_ends_in_one_line(tmp_path):
  command = [sys.executable, ROOT / 'experiments' / 'train.py', '--config.algorithm=X']
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr == f"train.py: algorithm is 'X'; allowed: {ALGORITHMS}\n"
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('while_training', [False, True])
def test_a_ctrl_c_ends_in_one_line(while_training):
  """While a run trains, the second one; the first one only asks it to stop."""
  code = f"""
import contextlib, signal
from lfg_jax.training import command_line
from lfg_jax.training.hosts import preemption

# A shell's background jobs ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def main(_):
  with preemption.Signals() if {while_training} else contextlib.nullcontext():
    for press in 'once', 'twice':
      print(press)
      signal.raise_signal(signal.SIGINT)

command_line.run(main)
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 130
  assert done.stdout.split() == ['once', 'twice'][: 1 + while_training]
  assert done.stderr == '-c: SIGINT: ended at once; what was saved before is kept\n'


def test_folders_of_others_stay(tmp_path, monkeypatch, capsys):
  folder, file = tmp_path / 'folder', tmp_path / 'file'
  folder.mkdir()
  (folder / 'thesis.tex').write_text('x')
  file.write_text('x')
  for path in (folder, file):
    code, _, err = run(monkeypatch, capsys, [f'--workdir={path}'])
    assert (code, err) == (
      2,
      f'train.py: {path} exists and is not the folder of a run; name another\n',
    )
  (folder / 'config.json').write_text('[3]')
  code, _, err = run(monkeypatch, capsys, [f'--workdir={folder}'])
  assert (code, err) == (
    2,
    f'train.py: {folder}/config.json is not a config that this program wrote; '
    'name another folder\n',
  )
  assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'thesis.tex']


@pytest.fixture(scope='module')
def run_of_one_epoch(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['train.py', f'--workdir={workdir}', '--config.epochs=1', *FLAGS])
    with pytest.raises(SystemExit) as stop:
      command_line.run(runs.script('train')['main'])
  assert not stop.value.code
  return workdir


@pytest.mark.full
def test_a_run_of_another_config_is_not_resumed(run_of_one_epoch, monkeypatch, capsys):
  changed = [
    '--config.epochs=1',
    '--config.model.channels=32',
    '--config.optimizer.learning_rate=1',
  ]
  code, _, err = run(monkeypatch, capsys, [f'--workdir={run_of_one_epoch}', *FLAGS, *changed])
  assert (code, err) == (
    2,
    f'train.py: {run_of_one_epoch} has a run of another config (model.channels is 16 '
    'there, 32 here, optimizer.learning_rate is 0.002 there, 1.0 here); '
    'name another folder\n',
  )


def test_a_finished_run_says_so(run_of_one_epoch, tmp_path, monkeypatch, capsys):
  path = run_of_one_epoch / 'summary.json'
  before, summary = path.stat().st_mtime_ns, json.loads(path.read_text())
  arguments = [
    f'--workdir={run_of_one_epoch}',
    '--config.epochs=1',
    f'--config.data_dir={tmp_path}',
    *FLAGS,
  ]
  code, out, err = run(monkeypatch, capsys, arguments)
  assert (not code, err) == (True, '')
  first, last = out.splitlines()
  assert first == f'{run_of_one_epoch}: finished already, after 1 epoch'
  assert f'test error {summary["test_error_percent"]:.1f} %' in last
  assert path.stat().st_mtime_ns == before


def test_infinite_loss_stops_and_keeps_the_good_checkpoint(tmp_path, monkeypatch, capsys):
  workdir = tmp_path / 'run'
  explodes = [
    '--config.optimizer.schedule=staircase',
    '--config.optimizer.staircase_epochs=(1,)',
    '--config.optimizer.staircase_factor=1e38',
    '--config.optimizer.name=sgd',
  ]
  code, _, err = run(monkeypatch, capsys, [f'--workdir={workdir}', *explodes, *FLAGS])
  assert (code, err) == (
    2,
    f'train.py: loss or update became NaN or infinite at step {STEPS + 1}; the '
    'checkpoints of before are kept; a smaller optimizer.learning_rate may help\n',
  )
  assert [folder.name for folder in (workdir / 'checkpoints').iterdir()] == [str(STEPS)]
  assert (workdir / 'metrics.jsonl').read_text().count('\n') == 1
