"""The README's example runs, and its links lead somewhere."""

import contextlib
import io
import re

from tests.runs import ROOT

TEXT = (ROOT / 'README.md').read_text()


def test_example_learns():
  (code,) = re.findall(r'```python\n(.*?)```', TEXT, re.S)
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, 'README.md', 'exec'), {})
  assert out.getvalue() == 'True\n'


def test_files_named_in_it_exist():
  named = re.findall(r'\]\(([^)h#][^)]*)\)', TEXT) + re.findall(r'(?:experiments|configs|tests|docs)/[\w./]+\w', TEXT)
  assert len(named) > 8
  for path in named:
    assert (ROOT / path).exists(), path
