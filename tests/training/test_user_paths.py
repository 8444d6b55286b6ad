"""Paths that users give: `~` is the home, wherever it stands; the address of a bucket is refused."""

import pathlib
import shutil

import pytest

from lfg_jax import data, user_files
from lfg_jax.errors import UserError
from lfg_jax.training import configs, main, prepare_data, train
from lfg_jax.training.run import results
from tests.runs import ROOT, tiny

MODULE = 'from lfg_jax import data\n\ndef load(data_dir):\n  raise ValueError(f"in {data_dir}")\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home, which is not the working directory; nothing may appear in that."""
  home, here = tmp_path / 'home', tmp_path / 'here'
  for folder in (home, here):
    folder.mkdir()
  monkeypatch.setenv('HOME', str(home))
  monkeypatch.chdir(here)
  (home / 'mine.py').write_text(MODULE)
  yield home
  assert not list(here.iterdir())


def refused(*arguments):
  with pytest.raises(UserError) as error:
    main.main([*arguments])
  return str(error.value)


@pytest.mark.parametrize(
  'spelling', ['--workdir=~/run', '--workdir ~/run', '--workdir=~/../home/run']
)
def test_the_folder_of_a_run(home, spelling):
  (home / 'run').mkdir()
  (home / 'run' / 'thesis.tex').touch()
  assert refused(*spelling.split()).endswith(
    '/run exists and is not the folder of a run; name another'
  )


@pytest.mark.full
def test_a_run_is_where_its_user_says(home):
  (home / 'mine').write_text((ROOT / 'configs' / 'digits.py').read_text())
  small = ['--config.model.size=S/1/2', '--config.model.channels=16', '--config.epochs=1']
  main.main(['--config=~/mine', '--workdir=~/run', *small])
  main.main(['--workdir=~/other', '--config.init_from=~/run', *small])
  job, state = train.load(pathlib.Path('~/other'))
  assert int(state.step) > 0 and job.config.init_from == '~/run'
  for name in ('run', 'other'):
    assert (home / name / 'summary.json').exists()


def test_files_and_folders_of_a_config(home):
  shutil.copy(ROOT / 'configs' / 'digits.py', home / 'a_config.py')
  assert configs.load('~/a_config.py').dataset == 'digits'
  assert user_files.load('data.module', '~/mine.py', ('load',)).__file__ == f'{home}/mine.py'
  told = refused('--config.data.module=~/mine.py', '--config.data_dir=~/images')
  assert told.endswith(f'ValueError: in {home}/images')
  assert f'is not in {home}/images; ' in refused('--config=mnist', '--config.data_dir=~/images')
  told = refused('--config.init_from=~/nothing')
  assert told == f'{home}/nothing is not the folder of a run: it has no config.json'


def test_other_programs(home):
  tars = ['--dataset=imagenet2012', '--manual_dir=~/tars']
  (home / 'tars').mkdir()
  (home / 'tars' / prepare_data.TARS[0]).touch()
  with pytest.raises(UserError, match=f'images: {prepare_data.TARS[1]} not found'):
    prepare_data.main(tars)
  parser = results.parser('', out='results')
  assert parser.parse(['--out=~/here']).out == home / 'here'
  assert parser.parse([]).out == pathlib.Path('results')


@pytest.mark.parametrize(
  'address', ['gs://bucket/run', 's3://bucket/run', 'file:///run', 'hdfs://a:1/b']
)
@pytest.mark.parametrize(
  'option', ['--workdir', '--config.init_from', '--config.data_dir', '--config']
)
def test_addresses_of_buckets_are_refused_at_once(option, address, home, monkeypatch):
  if option == '--config.data_dir':
    said = refused('--config=mnist', f'{option}={address}')
  else:
    monkeypatch.setattr(data, 'load', None)  # nothing is loaded before
    said = refused(f'{option}={address}')
  what = option.replace('--config.', '')
  assert said == (
    f'{what} is {address!r}; allowed: a path on this machine, as where a bucket is mounted'
  )


@pytest.mark.parametrize('call', [train.train, lambda job, folder: train.load(folder)])
def test_a_path_of_a_bucket_makes_no_folder(call, home):
  job = train.prepare(tiny())
  with pytest.raises(UserError, match=r"^workdir is 'gs:/bucket/run'; allowed: a path on this"):
    call(job, pathlib.Path('gs://bucket/run'))


def test_a_home_that_nobody_has(home):
  assert refused('--workdir=~nobody_of_this_name/run') == (
    "--workdir is '~nobody_of_this_name/run'; allowed: ~ or ~NAME of a user who has a home"
  )
