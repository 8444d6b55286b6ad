"""The documentation builds without warnings, the things it names exist, and the notebooks run."""

import ast
import html
import inspect
import os
import re
import signal
import subprocess
import sys

import nbclient
import nbformat
import pytest

import lfg_jax
from lfg_jax.errors import LOST, UserError
from lfg_jax.training import configs, main
from lfg_jax.training.hosts import connect
from lfg_jax.training.rules import rules
from tests.runs import ROOT

NOTEBOOKS = sorted((ROOT / 'experiments' / 'notebooks').glob('*.ipynb'))
sys.path += [str(ROOT / 'experiments' / 'paper'), str(ROOT / 'docs')]
import figures  # noqa: E402
import measurements  # noqa: E402
import studies  # noqa: E402

FOLDERS = ('lfg_jax', 'tests', 'experiments', 'configs', 'docs')
PAPER_TO_CODE = (ROOT / 'docs' / 'paper_to_code.md').read_text()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder]
  run = subprocess.run(
    command,
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
  )
  assert run.returncode == 0, run.stderr[-2000:]
  return folder


def test_documentation_builds_without_warnings(site):
  assert 'value_and_forward_grad' in (site / 'api' / 'forward_gradient.html').read_text()


def public_names():
  """Those of the package, and of its distributions, which are not about drawing."""
  of_tangents = [*lfg_jax.distributions.DISTRIBUTIONS, 'DISTRIBUTIONS', 'Distribution']
  return [*lfg_jax.__all__, *(f'distributions.{name}' for name in of_tangents)]


def test_every_public_name_has_its_anchor_on_one_page(site):
  page = (site / 'api' / 'index.html').read_text()
  anchors = set(re.findall(r'id="lfg_jax\.([\w.]+)"', page))
  assert 'forward_grad' in anchors and 'nothing' not in anchors
  assert set(public_names()) - anchors == set()


def test_signatures_are_whole(site):
  """Without a formatter they are cut, or one long line."""
  page = (site / 'api' / 'index.html').read_text()
  signature = page[page.index('id="lfg_jax.value_and_activity_grad"') :].split('</pre>')[0]
  text = html.unescape(re.sub(r'<[^>]+>', '', signature))
  parameters = inspect.signature(lfg_jax.value_and_activity_grad).parameters
  assert [name for name in parameters if not re.search(rf'\n +{name}:', text)] == []
  assert max(map(len, text.splitlines())) <= 90


@pytest.mark.full
@pytest.mark.parametrize('page', ['index', 'which_estimator', 'your_own_model'])
def test_code_blocks_run_as_they_stand(page):
  """Each in an empty namespace."""
  blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / f'{page}.md').read_text(), re.S)
  assert blocks
  for block in blocks:
    exec(compile(block, f'{page}.md', 'exec'), {})


@pytest.mark.parametrize('page', ['concepts', 'paper_to_code', 'estimators', 'contrastive'])
def test_formulas_are_drawn(site, page):
  text = (site / f'{page}.html').read_text()
  source = re.sub(r'```.*?```', '', (ROOT / 'docs' / f'{page}.md').read_text(), flags=re.S)
  formulas = re.findall(r'\$\$.+?\$\$|\$[^$]+\$', source, re.S)
  assert len(formulas) > 1
  assert text.count('<math ') == text.count('</math>') == len(formulas)
  article = re.search(r'<article.*</article>', text, re.S)[0]
  code = re.compile(r'<code.*?</code>', re.S)
  assert not re.search(r'\$|\\[a-z(\[{]|arithmatex', code.sub('', article))


def test_pages_need_no_network(site):
  pages = list(site.rglob('*.html'))
  assert len(pages) > 20
  for page in pages:
    fetched = re.findall(
      r'<(?:script|img|link)\b[^>]*(?:src|href)="?(?:https?:)?//[^>]*', page.read_text()
    )
    assert not fetched, page


def test_notebooks_are_pages(site):
  assert {'bring_your_own_model', 'forward_gradients_in_ten_minutes', 'measuring_variance'} <= {
    path.stem for path in NOTEBOOKS
  }
  start = (site / 'index.html').read_text()
  for path in NOTEBOOKS:
    page = (site / 'notebooks' / f'{path.stem}.html').read_text()
    assert f'notebooks/{path.stem}.html' in start
    pictures = path.read_text().count('"image/png"')
    assert page.count('src="data:image/png;base64,') == pictures
    assert f'href="{path.name}"' in page
    assert (site / 'notebooks' / path.name).read_bytes() == path.read_bytes()


def defined(path):
  """Names at the top level of a file."""
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      yield from (target.id for target in targets if isinstance(target, ast.Name))


def missing(named):
  """What is wrong with `file` or `file::name`; '' if nothing."""
  file, _, name = named.partition('::')
  path = ROOT / file
  if not path.exists():
    return f'{file} does not exist'
  return f'{file} has no {name}' if name and name not in defined(path) else ''


def wrong(command):
  """What is wrong with a command; '' if nothing."""
  _, script, *arguments = command.split()
  if missing(script):
    return missing(script)
  known_studies = {*studies.STUDIES, *studies.PROGRAMS}
  if script.endswith('reproduce.py') and arguments[0] not in known_studies:
    return f'no study {arguments[0]}'
  for argument in arguments:
    flag, _, value = argument.partition('=')
    if flag == '--config':
      problem = missing(value)
    elif flag == '--config.algorithm':
      problem = '' if value in rules.REGISTRY else f'no algorithm {value}'
    else:
      known = not flag.startswith('-') or flag.removeprefix('--') in (ROOT / script).read_text()
      problem = '' if known else f'{script} has no {flag}'
    if problem:
      return problem
  return ''


def test_the_page_of_the_paper_links_to_sources(site):
  page = (site / 'paper_to_code.html').read_text()
  assert 'href="api/replicated.html#lfg_jax.local.replicated.replicated_loss"' in page
  entry = (site / 'api' / 'replicated.html').read_text()
  assert 'Source code in <code>lfg_jax/local/replicated.py</code>' in entry


def test_what_the_page_of_the_paper_names_exists():
  quoted = re.findall(r'`([^`\n]+)`', PAPER_TO_CODE)
  files = [text for text in quoted if text.split('/')[0] in FOLDERS and ' ' not in text]
  commands = [text for text in quoted if text.startswith('python ')]
  assert len(files) > 40 and len(commands) > 15
  reproduced = {command.split()[2] for command in commands if 'reproduce.py' in command}
  assert reproduced == {*studies.STUDIES, *studies.PROGRAMS}
  assert set(filter(None, [*map(missing, files), *map(wrong, commands)])) == set()


@pytest.mark.parametrize(
  'text, problem',
  [
    ('experiments/nothing.py', 'experiments/nothing.py does not exist'),
    ('lfg_jax/training/rules/rules.py::Rules', 'lfg_jax/training/rules/rules.py has no Rules'),
  ],
)
def test_missing_files_and_names_are_noticed(text, problem):
  assert missing(text) == problem


def test_the_page_of_launching_has_options_and_fields_that_exist():
  page = (ROOT / 'docs' / 'launch.md').read_text()
  known = set(re.findall(r'--\w+', main.__doc__)) | {'--workdir', '--config'}
  commands = re.findall(r'lfg-train(?:[^\n`]*\\\n)*[^\n`]*', page)
  used = {option for command in commands for option in re.findall(r'(--\w+)[=\]]', command)}
  assert used - {'--config'} and used <= known
  fields = {field for field in re.findall(r'--config\.([\w.]+)=', page)}
  assert fields and fields <= {name for name, _ in configs.flatten(configs.base())}
  assert set(re.findall(r'`(JAX_\w+)`', page)) == set(connect.VARIABLES)
  assert all(f'| {code}' in page for code in (LOST, 128 + signal.SIGTERM, UserError.exit_code))


@pytest.mark.parametrize(
  'command, problem',
  [
    ('python experiments/paper/reproduce.py table2', 'no study table2'),
    ('python experiments/train.py --config=configs/svhn.py', 'configs/svhn.py does not exist'),
    ('python experiments/train.py --config.algorithm=LG-FG', 'no algorithm LG-FG'),
    ('python experiments/bench/depth.py --deep', 'experiments/bench/depth.py has no --deep'),
  ],
)
def test_wrong_commands_are_noticed(command, problem):
  assert wrong(command) == problem


@pytest.mark.full
def test_figures_of_the_page_of_the_idea_can_be_drawn(tmp_path):
  """The quickest and the one that uses most of the library."""
  for name in ('forward_derivative', 'less_noise'):
    figures.main(tmp_path, name)
    assert '<svg' in (tmp_path / f'{name}.svg').read_text()


def test_figures_are_measured():
  excess = measurements.distributions.hadamard.excess(16, 4)
  assert measurements.error_of_direction(16, 4) == pytest.approx(excess, rel=0.2)
  drawn = {path.stem for path in (ROOT / 'docs' / 'figures').glob('*.svg')}
  assert drawn == set(figures.FIGURES)


@pytest.mark.full
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  notebook = nbformat.read(path, as_version=4)
  assert path.stat().st_size < 200_000
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()
