"""The package has an order for reading: a folder imports only from those above it, a file likewise."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import lfg_jax

ROOT = pathlib.Path(lfg_jax.__file__).parent
ORDER = ('errors', 'fields', 'promotion', 'user_files', *lfg_jax._FOLDERS)


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


@pytest.mark.parametrize(
  'folder', [path.parent.relative_to(ROOT) for path in ROOT.rglob('__init__.py')], ids=str
)
def test_files_are_listed_in_the_order_in_which_they_are_read(folder):
  """The first text of a folder names what is in it; each part imports only those named before it."""
  text = ast.get_docstring(ast.parse((ROOT / folder / '__init__.py').read_text()))
  here = {
    path.stem for path in (ROOT / folder).iterdir() if path.suffix == '.py' or path.is_dir()
  } - {'__init__', '__pycache__'}
  if folder == pathlib.Path():
    here &= set(lfg_jax._FOLDERS)
  order = [name for name in re.findall(r'`(\w+)`', text) if name in here]
  assert sorted(order) == sorted(here)
  package = '.'.join(('lfg_jax', *folder.parts))
  for own in order:
    for path in {ROOT / folder / f'{own}.py', *(ROOT / folder / own).rglob('*.py')}:
      for name in imported(path) if path.exists() else ():
        other = name.removeprefix(f'{package}.').split('.')[0]
        if name.startswith(f'{package}.') and other in order:
          assert order.index(other) <= order.index(own), f'{path.relative_to(ROOT)} imports {name}'


def test_few_files_in_a_folder_and_few_lines_in_a_file():
  for folder in {path.parent for path in ROOT.rglob('*.py')}:
    entries = [p for p in folder.iterdir() if p.suffix == '.py' or p.is_dir()]
    assert len([p for p in entries if p.stem not in ('__init__', '__pycache__')]) <= 14, folder
  for path in ROOT.rglob('*.py'):
    assert len(path.read_text().splitlines()) <= 450, path


def test_no_public_function_has_the_name_of_its_module():
  modules = {path.stem for path in ROOT.rglob('*.py')} - {'__init__'}
  assert not modules & set(lfg_jax.__all__) - {'distributions'}


def test_all_is_reachable_after_one_import():
  """This is so in a fresh interpreter, which does not import folders that are not needed."""
  code = """
import sys, jax.numpy, lfg_jax
needed = [name for name in ('flax', 'optax', 'orbax', 'equinox', 'matplotlib') if name in sys.modules]
assert not needed and 'lfg_jax.training' not in sys.modules, needed
assert lfg_jax.__version__[0].isdigit()
names = 'tangents.distributions tangents.guided tangents.variance data.load local models training'
for name in names.split():
  module = lfg_jax
  for part in name.split('.'):
    module = getattr(module, part)
assert set(lfg_jax.__all__) <= set(dir(lfg_jax)) and all(hasattr(lfg_jax, n) for n in dir(lfg_jax))
"""
  subprocess.run([sys.executable, '-c', code], check=True)
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = lfg_jax.nothing


def test_one_file_depends_on_unstable_apis_of_jax():
  unstable = ('jax._src', 'jax.extend', 'jax.interpreters', 'jax.core')
  users = [
    path for path in ROOT.rglob('*.py') if any(n.startswith(unstable) for n in imported(path))
  ]
  assert [str(path.relative_to(ROOT)) for path in users] == ['jaxpr/_compat.py']
