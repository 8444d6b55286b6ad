"""The package has an order for reading: a folder imports only from those above it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import lfg_jax

ROOT = pathlib.Path(lfg_jax.__file__).parent
ORDER = (
  'errors',
  'hlo',
  'promotion',
  'user_files',
  'estimators',
  'losses',
  'models',
  'data',
  'training',
)


def imported(path):
  """Dotted names of everything that a file imports, also inside functions."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_folders_import_upwards_only():
  seen = set()
  for path in ROOT.rglob('*.py'):
    own = path.relative_to(ROOT).parts[0].removesuffix('.py')
    if own == '__init__':
      continue
    for name in imported(path):
      if name.startswith('lfg_jax.') and name.split('.')[1] in ORDER:
        other = name.split('.')[1]
        seen.add((own, other))
        assert ORDER.index(other) <= ORDER.index(own), f'{path.relative_to(ROOT)} imports {name}'
  assert ('training', 'estimators') in seen and {own for own, _ in seen} <= set(ORDER)


def test_no_public_function_has_the_name_of_its_module():
  modules = {path.stem for path in ROOT.rglob('*.py')}
  assert not modules & set(lfg_jax.__all__) - {
    path.name for path in ROOT.iterdir() if path.is_dir()
  }


def test_all_is_reachable_after_one_import():
  """This is so in a fresh interpreter, which does not import folders that are not needed."""
  code = """
import sys, lfg_jax
assert 'lfg_jax.training' not in sys.modules and 'lfg_jax.data' not in sys.modules
assert lfg_jax.__version__[0].isdigit()
names = 'estimators.tangents estimators.guided estimators.variance data.load losses models training'
for name in names.split():
  module = lfg_jax
  for part in name.split('.'):
    module = getattr(module, part)
assert set(lfg_jax.__all__) <= set(dir(lfg_jax))
"""
  subprocess.run([sys.executable, '-c', code], check=True)
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = lfg_jax.nothing
