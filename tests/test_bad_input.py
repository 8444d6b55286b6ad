"""Every expected mistake of a run ends in one line on stderr and exit code 2, before any long work."""

import subprocess
import sys

import pytest

from lfg_jax import data
from lfg_jax.estimators import tangents
from lfg_jax.models import block
from lfg_jax.training import algorithms, command_line, configs, optimizers, rules
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


@pytest.mark.parametrize('argument, message', [
    ('--config.algorithm=LG-XX', f"algorithm is 'LG-XX'; allowed: {ALGORITHMS}"),
    ('--config.model.size=X/1/1',
     "model.size is 'X/1/1'; allowed: SIZE/PATCHES/GROUPS with SIZE one of S, M, L, as in 'M/8/16'"),
    ('--config.augment.shift=8', 'augment.shift is 8; allowed: 0 … 7'),
    ('--config.augment.shift=-1', 'augment.shift is -1; allowed: 0 … 7'),
    ('--config.model.norm=instance', "model.norm is 'instance'; allowed: layer, whole, batch"),
    ('--config.model.size=S/2/3', '3 groups do not divide model.channels = 256'),
    ('--config.model.size=S/3/4', 'model.size asks for 3x3 patches, which do not divide an image of 8x8'),
    ('--config.dataset=letters',
     "unknown dataset 'letters'; allowed: digits, mnist, fashion_mnist, cifar10, imagenet2012, any other of TFDS with "
     'images and labels, or arrays of your own: --config.data.module=FILE.py'),
    ('--config.estimator.law=cauchy', f"estimator.law is 'cauchy'; allowed: {', '.join(tangents.LAWS)}"),
    ('--config.optimizer.name=sdg', f"optimizer.name is 'sdg'; allowed: {', '.join(optimizers.OPTIMIZERS)}"),
    ('--config.optimizer.schedule=wave',
     "optimizer.schedule is 'wave'; allowed: constant, linear, staircase, cosine"),
    ('--config.optimizer.learning_rate=-1', 'optimizer.learning_rate is -1.0; allowed: more than 0'),
    ('--config.optimizer.learning_rate=nan', 'optimizer.learning_rate is nan; allowed: more than 0'),
    ('--config.optimizer.momentum=1', 'optimizer.momentum is 1.0; allowed: 0 … 1, without 1'),
    ('--config.optimizer.weight_decay=-1', 'optimizer.weight_decay is -1.0; allowed: 0 or more'),
    ('--config.optimizer.warmup_epochs=20', 'optimizer.warmup_epochs is 20.0; allowed: less than epochs, 20'),
    ('--config.optimizer.staircase_epochs=1,b',
     "optimizer.staircase_epochs is (1, 'b'); allowed: numbers, 0 or more"),
    ('--config.optimizer.staircase_epochs=-1',
     'optimizer.staircase_epochs is (-1,); allowed: numbers, 0 or more'),
    ('--config.model.norms=head,readuot',
     f"model.norms is 'readuot'; did you mean readout? allowed: {', '.join(block.NORMS)}"),
    ('--config.model.channels=0', 'model.channels is 0; allowed: 1 or more'),
    ('--config.model.hidden=-2', 'model.hidden is -2; allowed: 1 or more'),
    ('--config.model.blocks=0', 'model.blocks is 0; allowed: 1 … 10000'),
    ('--config.model.blocks=-3', 'model.blocks is -3; allowed: 1 … 10000'),
    ('--config.model.pool_every=-1', 'model.pool_every is -1; allowed: 0 or more'),
    ('--config.model.channel_ratio=0', 'model.channel_ratio is 0; allowed: 1 or more'),
    ('--config.model.group_ratio=0', 'model.group_ratio is 0; allowed: 1 or more'),
    ('--config.profile=5', "profile is '5'; allowed: FIRST:LAST, steps from 1; None"),
    ('--config.profile=5:4', "profile is '5:4'; allowed: FIRST:LAST, steps from 1; None"),
    ('--config.lost_after=1', 'lost_after is 1; allowed: 2 or more'),
    ('--rehearse=0', '--rehearse is 0; allowed: 1 or more'),
    ('--process=1', 'coordinator, processes, process are missing, missing, 1; allowed: all of '
     '--coordinator=HOST:PORT --processes=N --process=I, or of the environment variables '
     'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID'),
    ('--config.image_size=0', 'image_size is 0; allowed: 1 or more, None'),
    ('--config.estimator.step=inf', 'estimator.step is inf; allowed: finite numbers'),
    ('--config.seed=2147483648', 'seed is 2147483648; allowed: integers of 32 bits'),
    ('--config.epochs=0', 'epochs is 0; allowed: 1 or more'),
    ('--config.batch_size=30', 'batch_size is 30; allowed: multiples of 8, the number of devices'),
    ('--config.epochs=many', "config field epochs is 'many'; allowed: int"),
    ('--config.losses.patch=maybe', "config field losses.patch is 'maybe'; allowed: bool"),
    ('--config.epochs=None', "config field epochs is 'None'; allowed: int"),
    ('--config.epochs', 'Missing value for flag --config.epochs'),
    ('--noconfig.epochs', "Unknown command line flag 'noconfig.epochs'. Did you mean: config.epochs ?"),
    ('--config.losses=3', 'config field losses has fields: every, group, head_ahead, head_average, head_hidden, '
     'module, overlap, patch, row; name one of them'),
    ('--config.image_size=9', 'image_size=9 is not for digits, whose images are 8x8'),
    ('--config.images=1439', 'images is 1439; allowed: 1 … 1438, of a data set that fits memory'),
    ('--config.epoch=3', f'unknown config field epoch; did you mean epochs? allowed: {TOP}'),
    ('--config.estimator.laws=normal',
     'unknown config field estimator.laws; did you mean estimator.law? allowed: chunk, combine, credit, guess, '
     'guess_rate, last_tap, law, module, passes, sharing, step, tap_passes, taps'),
    ('--config.learning_rat=1',
     f'unknown config field learning_rat; did you mean optimizer.learning_rate? allowed: {TOP}'),
    ('--config.trainer.x=1', f'unknown config field trainer; allowed: {TOP}'),
    ('--config=configs/none.py', 'config file configs/none.py not found'),
    ('--confg=configs/mnist.py', 'unknown option --confg; did you mean --config?'),
    ('--workdir', 'argument --workdir: expected one argument'),
    ('more', "unexpected argument 'more'"),
])  # fmt: skip
def test_arguments(argument, message, tmp_path, monkeypatch, capsys):
  workdir = [f'--workdir={tmp_path / "run"}']
  assert run(monkeypatch, capsys, [*workdir, argument]) == (2, '', f'train.py: {message}\n')
  assert not (tmp_path / 'run').exists()


def test_views_and_streams_are_not_augmented_twice(tmp_path, monkeypatch, capsys):
  arguments = [
    '--config.augment.flip=True',
    '--config.loss=contrastive',
    f'--workdir={tmp_path}/run',
  ]
  message = (
    "train.py: augment.flip is True, and loss='contrastive' has views of its own; "
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
    f'python -m lfg_jax.training.prepare_data --dataset=mnist --data_dir={tmp_path}\n'
  )
  assert run(monkeypatch, capsys, arguments) == (2, '', message)


@pytest.mark.parametrize('body, message', [
    ('1 / 0', 'ZeroDivisionError: division by zero'),
    ("c = configs.base()\n  c.epochs = 'x'\n  return c", None),
    ('c = configs.base()\n  del c.keep\n  return c', 'config field keep is missing'),
    ('c = configs.base()\n  c.new = 1\n  return c', f'unknown config field new; allowed: {TOP}'),
    ('c = configs.base()\n  del c.losses\n  c.losses = 3\n  return c',
     'config field losses is 3; allowed: fields every, group, head_ahead, head_average, head_hidden, module, overlap, '
     'patch, row'),
    ('c = configs.base()\n  del c.seed\n  c.seed = None\n  return c',
     'config field seed is None; allowed: int'),
])  # fmt: skip
def test_mistakes_in_a_config_file(body, message, tmp_path, monkeypatch, capsys):
  path = tmp_path / 'mine.py'
  path.write_text(f'from lfg_jax.training import configs\n\ndef get_config():\n  {body}\n')
  code, out, err = run(monkeypatch, capsys, [f'--config={path}', f'--workdir={tmp_path / "run"}'])
  assert (code, out, err.count('\n')) == (2, '', 1)
  if message:
    assert err.endswith(f'{message}\n')
  else:  # the words are ml_collections'
    assert err.startswith(f'train.py: config file {path}: TypeError: ')


def test_a_process_ends_in_one_line(tmp_path):
  command = [sys.executable, ROOT / 'experiments' / 'train.py', '--config.algorithm=X']
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr == f"train.py: algorithm is 'X'; allowed: {ALGORITHMS}\n"
  assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
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
  before = (run_of_one_epoch / 'summary.json').stat().st_mtime_ns
  arguments = [
    f'--workdir={run_of_one_epoch}',
    '--config.epochs=1',
    f'--config.data_dir={tmp_path}',
    *FLAGS,
  ]
  code, out, err = run(monkeypatch, capsys, arguments)
  assert (not code, err) == (True, '')
  assert out.startswith(f'{run_of_one_epoch} has this run finished\n')
  assert (run_of_one_epoch / 'summary.json').stat().st_mtime_ns == before


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
