"""experiments/paper: the paper's numbers, a restarted study, its table, and the index."""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, configs
from lfg_jax.training.rules import rules
from lfg_jax.training.run import plots
from tests.runs import ROOT

PAPER = ROOT / 'experiments' / 'paper'
sys.path.insert(0, str(PAPER))  # as when one of its programs is started
import index  # noqa: E402
import report  # noqa: E402
import reproduce  # noqa: E402
import studies  # noqa: E402

FIELDS = [
  '--config.dataset=digits',
  '--config.model.size=S/1/2',
  '--config.model.channels=16',
  '--config.batch_size=64',
]


def start(out, *arguments):
  reproduce.main(
    ['cifar10-M-8-16', f'--out={out}', '--epochs=1', '--images=256', *FIELDS, *arguments]
  )


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """A folder with LG-FG-A and LG-FG-A+; the second seed of the paper's was added last."""
  out = tmp_path_factory.mktemp('paper') / 'out'
  start(out, '--rules=LG-FG-A')
  start(out, '--rules=LG-FG-A+')
  before = {path: path.stat().st_mtime_ns for path in out.glob('*/*/summary.json')}
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    start(out, '--rules=LG-FG-A', '--seeds=0,1')
  assert len(before) == 2 and all(path.stat().st_mtime_ns == time for path, time in before.items())
  assert text.getvalue().count('finished already, after 1 epoch') == 1
  return out


def rows_of(out):
  return json.loads((out / 'cifar10-M-8-16.json').read_text())['rows']


@pytest.mark.parametrize(
  ('column', 'rule', 'errors'),
  [
    ('mnist-S-1-1', 'BP', (2.66, 0.00)),
    ('mnist-M-1-16', 'LG-FG-W', (5.66, 4.59)),
    ('cifar10-M-8-16', 'LG-FG-A', (30.68, 19.39)),
    ('imagenet-L-32-64', 'LG-BP', (54.37, 39.66)),
    ('cifar10-contrastive-M-8-16', 'DFA', (46.09, 42.76)),
    ('cifar10-contrastive-L-8-64', 'FA', (67.93, 65.32)),
    ('imagenet-contrastive-L-32-64', 'LG-FG-A', (73.24, 66.89)),
  ],
)
def test_numbers_of_the_paper(column, rule, errors):
  assert studies.published(column, rule) == errors
  runs = {run.rule: run for run in studies.STUDIES[column].runs}
  assert runs[rule].paper == errors and runs[rule].fields['algorithm'] == rule


@pytest.mark.parametrize('name', studies.STUDIES)
def test_runs_of_a_study(name):
  runs = studies.STUDIES[name].runs
  assert len({report.folder(run) for run in runs}) == len({run.label for run in runs}) == len(runs)
  for run in runs:
    assert run.fields['algorithm'] in rules.REGISTRY
    assert ('(ours)' in run.label) == (run.fields['algorithm'] == 'LG-FG-A+')
  if name in studies.COLUMNS:
    assert [run.rule for run in runs if run.rule != 'untrained'] == [*studies.PAPER, 'LG-FG-A+']


@pytest.mark.parametrize('name', studies.STUDIES)
def test_printed_commands_are_the_runs(name, capsys):
  reproduce.main(
    [name, '--dry_run', '--seeds=3', '--data_dir=D', '--config.estimator.num_tangents=2']
  )
  lines = capsys.readouterr().out.splitlines()
  options, rest = reproduce.parse(
    [name, '--seeds=3', '--data_dir=D', '--config.estimator.num_tangents=2']
  )
  selected = reproduce.selected(studies.STUDIES[name], options)
  assert len(selected) == (8 if name == 'figure7' else len(studies.STUDIES[name].runs))
  parser = command_line.Parser()
  parser.option('config', None)
  parser.option('workdir', None)
  for run, line in zip(selected, lines[1::2], strict=True):
    planned = reproduce.plan(studies.STUDIES[name], run, 3, ROOT, options, rest)
    _, program, *arguments = shlex.split(line)
    arguments[0] = arguments[0].replace('=', f'={ROOT}/', 1)
    _, config = command_line.parse(parser, arguments)
    assert program == 'experiments/train.py' and configs.to_json(config) == configs.to_json(
      planned.config
    )
    assert config.seed == 3 and config.data_dir == 'D' and config.estimator.num_tangents == 2
    assert dict(configs.flatten(config)) | run.fields == dict(configs.flatten(config))


@pytest.mark.full
def test_a_study_goes_on_and_adds_runs(study):
  assert [(row['label'], row['seeds']) for row in rows_of(study)] == [
    ('LG-FG-A', [0, 1]),
    ('LG-FG-A+ (ours)', [0]),
  ]
  assert {path.relative_to(study).as_posix() for path in study.glob('*/*')} == {
    'LG-FG-A/1-epochs-256-images-seed0',
    'LG-FG-A/1-epochs-256-images-seed1',
    'LG-FG-A+-ours/1-epochs-256-images-seed0',
  }
  assert (study / 'cifar10-M-8-16.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.full
def test_both_kinds_of_lg_fg_a_are_told_apart(study):
  text = (study / 'cifar10-M-8-16.md').read_text()
  paper, ours = (line.split(' | ') for line in text.splitlines() if line.startswith('| LG-FG-A'))
  assert paper[0] == '| LG-FG-A'
  assert paper[2] == '30.68 / 19.39'
  assert ours[0] == '| LG-FG-A+ (ours)'
  assert ours[2] == "30.68 / 19.39 (of the paper's LG-FG-A: another estimator)"
  for row in rows_of(study):
    folders = sorted((study / row['label'].replace(' (ours)', '-ours')).iterdir())
    own = [json.loads((folder / 'summary.json').read_text()) for folder in folders]
    assert {summary['algorithm'] for summary in own} == {row['algorithm']}
    errors = [summary['test_error_percent'] for summary in own]
    assert row['test_error_percent'] == pytest.approx(sum(errors) / len(errors))
    assert row['test_error_percent_se'] == (
      pytest.approx(abs(errors[0] - errors[1]) / 2) if len(errors) > 1 else None
    )
    assert all({'command', 'commit', 'jax', 'device'} == {*origin} for origin in row['origins'])
    assert '--config.num_train_examples=256' in row['origins'][0]['command']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['table9'], 'table9; allowed: table1, figure5'),
    (['figure6', '--rules=XX'], r"--rules is 'XX'; allowed: LG-FG-A, LG-FG-A\+,"),
    (['figure7', '--groups=3'], '--groups has 3; allowed: 1, 2, 4, 8, 16, 32, 64$'),
    (['figure6', '--seeds=a'], "--seeds is 'a'; allowed: 0 or more"),
    (['figure6', '--config.epoch=3'], 'unknown config field epoch; did you mean epochs'),
    (['figure6', '--epoch=3'], 'unknown option --epoch$'),
    (['cifar10-M-8-16', '--epochs=0'], "epochs is '0'; allowed: 1 or more"),
    (['cifar10-M-8-16', '--images=9999', *FIELDS], 'num_train_examples is 9999; allowed: 1 … 1438'),
    (
      ['cifar10-M-8-16', '--data_dir=/nowhere'],
      'dataset cifar10 is not in /nowhere; prepare it with',
    ),
  ],
)
def test_mistakes(arguments, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    reproduce.main([*arguments, f'--out={tmp_path / "out"}'])
  assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def test_folders_of_others_stay(tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(UserError, match='exists and is not the folder of cifar10-M-8-16'):
    start(tmp_path, '--rules=BP')


def test_names_beside_the_lines_keep_apart():
  places = plots.spread([0.5, 0.5, 0.52, 1.0, 0.0, 0.99], 0.1)
  ordered = sorted(places)
  assert all(high - low > 0.0999 for low, high in itertools.pairwise(ordered))
  assert max(places) <= 1 and places[4] == 0.0


@pytest.mark.full
def test_index_is_of_the_files_that_are_there(study, tmp_path):
  text = index.index(index.RESULTS)
  assert text == (index.RESULTS / 'README.md').read_text(), 'run: python experiments/paper/index.py'
  assert '`unknown`' not in text and 'JPEG (quality 75)' in text
  for path in index.RESULTS.rglob('*.json'):
    assert f'({path.relative_to(index.RESULTS).as_posix()})' in text
  (tmp_path / 'new.json').write_text((study / 'cifar10-M-8-16.json').read_text())
  index.main([f'--results={tmp_path}'])
  (line,) = re.findall(r'\| LG-FG-A\+ \(ours\) \|.*', (tmp_path / 'README.md').read_text())
  assert "of the paper's LG-FG-A: another estimator" in line
  assert '--config.algorithm=LG-FG-A+ ' in line and '`python experiments/train.py ' in line


@pytest.mark.parametrize(
  ('name', 'program'),
  [('table1', 'paper/variance.py --parts=table1'), ('figure5', 'paper/replicated_losses.py')],
)
def test_programs_get_their_arguments(name, program, tmp_path, capsys):
  reproduce.main([name, f'--out={tmp_path}', '--groups=2', '--dry_run'])
  command = f'python experiments/{program} --out={tmp_path} --groups=2\n'
  assert capsys.readouterr().out == command


def test_mistakes_of_programs(tmp_path, capfd):
  with pytest.raises(UserError, match=r'replicated_losses\.py ended with exit code 2$'):
    reproduce.main(['figure5', f'--out={tmp_path}', '--epochs=3'])
  assert capfd.readouterr().err == 'replicated_losses.py: unknown option --epochs\n'


def test_gpu_script_starts_what_there_is(tmp_path):
  """Stubs replace python, whose stub records its arguments, and sleep."""
  for name, text in (('python', f'echo "$@" >> {tmp_path}/commands'), ('sleep', 'true')):
    (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
    (tmp_path / name).chmod(0o755)
  settings = {
    'SMALL': '1',
    'OUT': str(tmp_path / 'out'),
    'PATH': f'{tmp_path}:{os.environ["PATH"]}',
  }
  subprocess.run(['bash', PAPER / 'gpu.sh'], check=True, env={**os.environ, **settings})
  commands = [line.split() for line in (tmp_path / 'commands').read_text().splitlines()]
  assert len(commands) == 22 and all((ROOT / script).exists() for script, *_ in commands)
  for script, *arguments in commands:
    if script == 'experiments/paper/reproduce.py':
      reproduce.main([*arguments, '--dry_run'])
