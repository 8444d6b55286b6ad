"""Every program in experiments/ says how it is called, and a test runs it."""

import re

import pytest

from tests import runs

EXPERIMENTS = runs.ROOT / 'experiments'
FILES = sorted(EXPERIMENTS.rglob('*.py'))
PROGRAMS = [
  path.relative_to(EXPERIMENTS).with_suffix('').as_posix()
  for path in FILES
  if "__name__ == '__main__'" in path.read_text()
]
# They only give names to programs of the package, which have tests of their own.
SHORT = ('train', 'prepare_data')
OTHERS = ('test_bad_input.py', 'test_experiments.py')  # tests that run no program to its end


@pytest.mark.parametrize('name', PROGRAMS)
def test_help_has_the_command(name, capsys):
  with pytest.raises(SystemExit) as stop:
    runs.script(name)['main'](['--help'])
  assert not stop.value.code
  assert name in SHORT or f'python experiments/{name}.py ' in capsys.readouterr().out


@pytest.mark.parametrize('name', sorted({*PROGRAMS} - {*SHORT}))
def test_a_test_runs_it(name):
  folder, _, module = name.rpartition('/')
  started = re.compile(rf"'{name}'" + rf'|^import {module}\b' * (folder == 'paper'), re.MULTILINE)
  tests = [path for path in (runs.ROOT / 'tests').rglob('test_*.py') if path.name not in OTHERS]
  assert any(started.search(path.read_text()) for path in tests), f'no test runs {name}.py'


def test_scripts_are_short():
  for path in FILES:
    assert len(path.read_text().splitlines()) < 300, path
