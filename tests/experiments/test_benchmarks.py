"""The benchmarks run and write their rows. (The tests do not look at times.)"""

import json
import os
import random

import jax
import numpy as np
import pytest

from lfg_jax.errors import UserError
from lfg_jax.jaxpr import dependence, dependence_rules
from tests import runs
from tests.runs import ROOT

pytestmark = pytest.mark.full


@pytest.mark.parametrize(
  ('script', 'arguments', 'rows', 'field'),
  [
    (
      'bench/step_time',
      [
        '--model=S/1/2',
        '--batch=8',
        '--algorithms=LG-FG-A+',
        '--repetitions=1',
        '--precision=bfloat16',
      ],
      1,
      'ratio_to_floor',
    ),
    (
      'bench/depth',
      ['--model=S/8/2', '--batch=8', '--blocks=2,3', '--algorithms=LG-FG-A+', '--repetitions=1'],
      2,
      'temporaries_bytes',
    ),
    (
      'paper/replicated_losses',
      [
        '--batch=2',
        '--channels=8',
        '--patches=2',
        '--many_groups=1,2',
        '--many_patches=2',
        '--groups=2',
        '--repetitions=1',
      ],
      12,
      'ms',
    ),
  ],
)
def test_rows_and_figure(script, arguments, rows, field, tmp_path):
  name = script.rpartition('/')[2]
  runs.script(script)['main']([*arguments, f'--out={tmp_path}'])
  content = json.loads((tmp_path / f'{name}.json').read_text())
  assert (
    content['command'].startswith(f'python experiments/{script}.py ') and content['device'] == 'cpu'
  )
  assert len(content['rows']) == rows and all(row[field] > 0 for row in content['rows'])
  assert (tmp_path / f'{name}.png').stat().st_size > 1000


def test_pipeline_throughput(tmp_path):
  """Six processes, two for each way."""
  cores = sorted(os.sched_getaffinity(0))
  main = runs.script('bench/pipeline_throughput')['main']
  main(
    [
      '--model=S/1/4',
      '--blocks=2',
      '--algorithm=LG-BP',
      '--batch=4',
      '--steps=2',
      '--repetitions=1',
      f'--cores={cores[0]},{cores[-1]}',
      f'--out={tmp_path}',
    ]
  )
  rows = json.loads((tmp_path / 'pipeline_throughput.json').read_text())['rows']
  assert [row['way'] for row in rows] == ['limit', 'pipeline', 'data']
  assert all(row['part_of_limit'] > 0 for row in rows)
  assert rows[1]['balance'] <= rows[0]['balance'] == 1
  activity, targets, rest = 4 * 1 * 256 * 4, 4 * 8, 8 + 16  # of 4 examples; the metrics go one hop
  assert [row['sent_bytes'] for row in rows[:2]] == [0, activity + targets + rest]


def test_throughput(tmp_path):
  main = runs.script('bench/throughput')['main']
  arguments = [f'--config={ROOT}/configs/digits.py', '--config.model.size=S/1/2', '--epochs=2']
  main([f'--out={tmp_path}', '--images=320', *arguments])
  written = json.loads((tmp_path / 'throughput.json').read_text())
  assert len(written['train']) == 2 and written['ratio'] > 0
  with pytest.raises(UserError, match=r'^num_train_examples is 9999; allowed: 1 … 1438'):
    main([f'--out={tmp_path}', '--images=9999', *arguments])
  with pytest.raises(UserError, match='an epoch of 9 steps, the first 9 of which are not timed'):
    main([f'--out={tmp_path}', '--images=288', *arguments])


def test_input_speed(tmp_path):
  main = runs.script('bench/input_speed')['main']
  main(
    [
      f'--out={tmp_path}',
      '--photos=128',
      '--width=40',
      '--height=30',
      '--workers=0',
      '--config.image_size=16',
      '--config.model.size=S/1/2',
      '--config.model.channels=16',
    ]
  )
  written = json.loads((tmp_path / 'input_speed.json').read_text())
  (threads,) = written['streams']
  assert 0 < threads['waiting'] < 1 and threads['per_cpu_second'] > 0
  assert written['decoding_alone']['per_cpu_second'] > written['with_cropping']['per_cpu_second']


def test_augmentations(tmp_path):
  main = runs.script('paper/augmentations')['main']
  main(['--dataset=digits', '--images=2', '--draws=1', f'--out={tmp_path}'])
  assert (tmp_path / 'augmentations.png').stat().st_size > 1000


STUB = """
import pathlib, sys, time
options = dict(argument[2:].split('=', 1) for argument in sys.argv[1:])
workdir = pathlib.Path(options['workdir'])
workdir.mkdir(exist_ok=True)
if options['process'] == '0':
  (workdir / 'metrics.jsonl').write_text('{"step": 1}')
time.sleep(0.2)
"""


def test_torture(tmp_path, monkeypatch):
  """A stub replaces training: this tests signals, exit codes and the report."""
  main, compared = runs.script('bench/torture')['main'], []
  (tmp_path / 'stub.py').write_text(STUB)
  for name, value in {
    'TRAIN': tmp_path / 'stub.py',
    'PAUSE': (0.01, 0.1),
    'START_SECONDS': 0.1,
    'same': lambda *folders: compared.append(folders),
  }.items():
    monkeypatch.setitem(main.__globals__, name, value)
  main(['--minutes=0.02', f'--out={tmp_path / "out"}'])
  found = json.loads((tmp_path / 'out' / 'torture.json').read_text())
  assert found['rounds'] == len(compared) > 0 and found['undisturbed_seconds'] > 0
  assert sum(found['signals'].values()) == len(found['stops'])


def rows(*steps):
  return ''.join(
    json.dumps({'step': step, 'examples_per_second': random.random()}) + '\n' for step in steps
  )


def test_what_a_torture_looks_for(tmp_path, monkeypatch):
  torture = runs.script('bench/torture')
  numbers = {'whole': 1.0, 'same': 1.0, 'double': 1.0, 'missing': 1.0, 'other': 1.0 + 1e-7}
  for name, steps in (
    ('whole', (5, 10)),
    ('same', (5, 10)),
    ('other', (5, 10)),
    ('missing', (10,)),
    ('double', (5, 5, 10)),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'metrics.jsonl').write_text(rows(*steps))
  same = torture['same']
  monkeypatch.setitem(
    same.__globals__, 'load', lambda folder: (None, np.float32(numbers[folder.name]))
  )
  same(tmp_path / 'whole', tmp_path / 'same')
  for name, problem in (('double', 'rows'), ('missing', 'rows'), ('other', 'parameters')):
    with pytest.raises(UserError, match=f'has other {problem}'):
      same(tmp_path / 'whole', tmp_path / name)


def test_bias_hunt(tmp_path, monkeypatch, capsys):
  """Random programs are unbiased; a hunt that was stopped goes on, but not with other programs."""
  hunt = runs.script('bench/bias_hunt')
  main, names = hunt['main'], ('relu', 'examples flipped')
  few = {name: hunt['OPERATIONS'][name] for name in names}
  monkeypatch.setitem(main.__globals__, 'OPERATIONS', few)
  monkeypatch.setitem(main.__globals__, 'KEYS', ('threefry2x32',))
  arguments = ['--draws=2000', f'--out={tmp_path}']
  main(['--programs=2', *arguments])
  first = (tmp_path / 'bias_hunt.jsonl').read_text()
  main(['--programs=3', *arguments])
  assert (tmp_path / 'bias_hunt.jsonl').read_text().startswith(first)
  rows = json.loads((tmp_path / 'bias_hunt.json').read_text())['rows']
  assert [row['verdict'] for row in rows] == ['unbiased'] * 3
  with pytest.raises(UserError, match=r'bias_hunt.jsonl has other programs; allowed: the same'):
    main(['--programs=3', '--seed=1', *arguments])
  (tmp_path / 'bias_hunt.jsonl').unlink()
  wrong = (dependence_rules._same, dependence_rules._RULES['rev'][1])
  monkeypatch.setitem(dependence_rules._RULES, 'rev', wrong)
  with pytest.raises(UserError, match='of 3 programs are biased'):
    main(['--programs=3', *arguments])
  assert 'standard errors: Program(' in capsys.readouterr().out


def forgets_what_comes_in(self, eqn, ins, seeds):
  return seeds[:1] if self.interpreter.is_visited(eqn) else RIGHT(self, eqn, ins, seeds)


RIGHT = dependence.Influence._equation
PLANTED = {
  'cumsum': 'cumsum along 0',
  'sort': 'sort along 0',
  'top_k': 'all of top_k along 0',
  'reduce_window_sum': 'reduce_window_sum along 0',
  'pad': 'pad along 0',
  'fft': 'fft along 0',
  'gather': 'gather along 0',
  'scatter-add': 'scatter_add along 0',
  'conv_general_dilated': 'convolution along 0',
  'dot_general': 'dot_general along 0',
  'triangular_solve': 'triangular_solve along 0',
  'a carry': 'scan along 0',
  'a tap in a scan': 'batch norm',
}


@pytest.mark.full
@pytest.mark.parametrize('wrong', PLANTED)
def test_the_hunt_finds_every_kind_of_wrong_rule(wrong, monkeypatch):
  hunt = runs.script('bench/bias_hunt')
  in_scan, operation = wrong == 'a tap in a scan', PLANTED[wrong]
  between, behind = ([], [operation]) if in_scan else ([operation], [])
  place = 'scan' if in_scan else 'plain'
  program = hunt['Program']([], between, behind, 1, False, place, 'threefry2x32')
  judged = lambda: hunt['judged'](program, 4000)['verdict']
  with jax.enable_x64(True):
    assert judged() == 'unbiased'
    if in_scan:
      monkeypatch.setattr(dependence.Influence, '_equation', forgets_what_comes_in)
    elif wrong == 'a carry':
      monkeypatch.setattr(dependence, '_axes', lambda label: [])
    else:
      planted = (dependence_rules._same, dependence_rules._RULES[wrong][1])
      monkeypatch.setitem(dependence_rules._RULES, wrong, planted)
    assert judged() == 'biased'
