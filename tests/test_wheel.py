"""The built wheel works for somebody who has only its dependencies."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import nbformat
import pytest

from tests.runs import FLAGS, ROOT

pytestmark = pytest.mark.full

NOTEBOOK = ROOT / 'experiments' / 'notebooks' / 'compose_your_own_estimator.ipynb'
SOURCES = ('lfg_jax', 'configs', 'pyproject.toml', 'README.md', 'LICENSE')
# Equinox is for the tests only: to import it is an error.
PROGRAM = """
import importlib.metadata, importlib.resources, pkgutil, sys
sys.modules['equinox'] = None
import lfg_jax
from lfg_jax import data
assert lfg_jax.__file__.startswith(sys.prefix), lfg_jax.__file__
assert lfg_jax.__version__ == importlib.metadata.version('lfg_jax'), lfg_jax.__version__
for module in pkgutil.walk_packages(lfg_jax.__path__, 'lfg_jax.'):
  importlib.import_module(module.name)
assert importlib.resources.files(lfg_jax).joinpath('py.typed').is_file()
assert len(data.load('digits').train.label_N) == 1438
exec(sys.argv[1], {})
"""


def run(*command, cwd, env=None):
  command = list(map(str, command))
  done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


@pytest.fixture(scope='module')
def python(tmp_path_factory):
  """The Python of a new environment with the wheel; it sees this one's other packages."""
  folder = tmp_path_factory.mktemp('stranger')
  source = folder / 'source'
  source.mkdir()
  for name in SOURCES:
    path = ROOT / name
    copy = shutil.copytree if path.is_dir() else shutil.copy
    copy(path, source / name)
  pip = (sys.executable, '-m', 'pip')
  offline = ('--quiet', '--no-deps', '--no-index', '--disable-pip-version-check')
  run(*pip, 'wheel', *offline, '--no-build-isolation', '-w', folder, source, cwd=folder)
  (wheel,) = folder.glob('*.whl')

  venv.create(folder / 'venv', symlinks=True)
  python = folder / 'venv' / 'bin' / 'python'
  run(*pip, '--python', python, 'install', *offline, wheel, cwd=folder)
  (site,) = (folder / 'venv').glob('lib/python*/site-packages')
  # A path in such a file comes last, and its own .pth files (an editable lfg_jax) are not read.
  (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
  return python


def test_a_stranger_runs_the_example(python):
  example = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)[1]
  out = run(python, '-I', '-c', PROGRAM, example, cwd=python.parent)
  assert out.split() == ['True']


def test_a_stranger_trains(python, tmp_path):
  """Training uses the console script outside the repository, and a config in the wheel."""
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  program = python.with_name('lfg-train')
  run(
    program,
    *FLAGS,
    '--config.epochs=1',
    '--config.num_train_examples=256',
    cwd=tmp_path,
    env=environment,
  )
  summary = json.loads((tmp_path / 'runs' / 'digits' / 'summary.json').read_text())
  assert summary['steps'] == 256 // 64 and summary['dataset'] == 'digits'


def test_the_wheel_has_every_folder_and_config(python):
  (site,) = python.parent.parent.glob('lib/python*/site-packages')
  files = lambda root, folder: {
    path.relative_to(root / folder).as_posix() for path in (root / folder).rglob('*.py')
  }
  assert files(site, 'lfg_jax/configs') == files(ROOT, 'configs') != set()
  inside = {path for path in files(site, 'lfg_jax') if not path.startswith('configs/')}
  assert inside == files(ROOT, 'lfg_jax')


@pytest.mark.skipif(not NOTEBOOK.exists(), reason='not written yet')
def test_a_stranger_composes_an_estimator(python):
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  code = '\n'.join(cell.source for cell in notebook.cells if cell.cell_type == 'code')
  program = "import sys; sys.modules['equinox'] = None; exec(sys.argv[1], {})"
  run(python, '-I', '-c', program, code, cwd=python.parent, env={**os.environ, 'MPLBACKEND': 'agg'})
