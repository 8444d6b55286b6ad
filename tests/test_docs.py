"""The documentation builds without a warning, and the notebooks run."""

import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))


def test_documentation_builds_without_warnings(tmp_path):
  run = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', tmp_path], cwd=ROOT,
                       capture_output=True, text=True, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
  assert run.returncode == 0, run.stderr[-2000:]
  assert 'value_and_forward_grad' in (tmp_path / 'api' / 'forward_grad' / 'index.html').read_text()


def test_there_are_notebooks():
  assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  notebook = nbformat.read(path, as_version=4)
  assert path.stat().st_size < 200_000
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()
