"""The README's example runs; its links and those for contributors have targets."""

import contextlib
import io
import re

import pytest

import lfg_jax
from tests.runs import ROOT

TEXT = (ROOT / 'README.md').read_text()


def test_example_learns():
  (code,) = re.findall(r'```python\n(.*?)```', TEXT, re.S)
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, 'README.md', 'exec'), {})
  assert out.getvalue() == 'True\n'


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_files_named_in_it_exist(name):
  text = (ROOT / name).read_text()
  named = [path for path in re.findall(r'\]\(([^)#]+)\)', text) if not path.startswith('http')]
  named += re.findall(r'(?<![\w.])(?:experiments|configs|tests|docs|lfg_jax)/[\w./]+\w', text)
  assert name == 'CHANGELOG.md' or len(named) > 8
  for path in named:
    assert (ROOT / path).exists(), path


def test_one_version():
  assert f'\nversion: {lfg_jax.__version__}\n' in (ROOT / 'CITATION.cff').read_text()
