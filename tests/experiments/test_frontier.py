"""experiments/bench/frontier.py and time_to_accuracy.py: what they write for small models."""

import json
import sys

import jax
import numpy as np
import pytest

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.training import configs
from tests.runs import FLAGS, ROOT, script
from tests.statistics import is_mean

sys.path.append(str(ROOT / 'experiments' / 'bench'))
import frontier_network as network
import frontier_rows


def run(name, *arguments):
  script(name)['main']([*arguments])


FRONTIER = ['--dataset=digits', '--model=S/1/4', '--batch=4', '--warm_up=10', '--repetitions=1']
LAYERS = ['stem/channel', 'stem/group']


def frontier(out, *arguments):
  """The last point's rows, by variant, passes and layer; and the whole content of the file."""
  run('bench/frontier', *FRONTIER, '--distributions=hadamard', *arguments, f'--out={out}')
  content = json.loads((out / 'frontier.json').read_text())
  return {
    (row['variant'], row['num_tangents'], row['layer']): row for row in content['rows']
  }, content


@pytest.mark.full
def test_errors_fall_with_passes(tmp_path):
  rows, content = frontier(
    tmp_path, '--epochs=0', '--variants=joint', '--num_tangents=1,4', '--draws=16'
  )
  assert len(rows) == len(content['rows']) == 2 * len(LAYERS)
  assert content['command'].startswith('python experiments/bench/frontier.py --dataset=digits')
  for layer in LAYERS:
    one, four = rows['joint', 1, layer], rows['joint', 4, layer]
    assert four['relative_error'] < 0.5 * one['relative_error']
    assert four['cosine'] > one['cosine']
  assert (tmp_path / 'frontier.png').stat().st_size > 1000
  assert '| joint | hadamard | 4 |' in (tmp_path / 'frontier.md').read_text()


@pytest.mark.full
def test_trained_network(tmp_path):
  rows, content = frontier(
    tmp_path, '--epochs=1', '--variants=exact last', '--num_tangents=1', '--draws=2'
  )
  assert [row['point'] for row in content['rows']] == ['start', 'start', 'trained', 'trained']
  assert rows['exact last', 1, 'stem/group']['relative_error'] < 1e-9
  row = rows['exact last', 1, 'stem/channel']
  assert row['relative_error'] > 1 and row['ms'] > 0 and row['ratio_to_bp'] > 0
  assert (tmp_path / 'trained' / 'summary.json').exists()


@pytest.mark.full
def test_errors_of_signals_are_as_theory_says():
  config = configs.base()
  config.model.size = 'S/2/4'
  bench = network.Bench(config, data.load('digits'), 4)
  variables = network.warm_up(bench, 10)
  exact = bench.exact(variables)
  for name, distribution, num_tangents in (
    ('joint', 'hadamard', 4),
    ('guess all', 'rademacher', 2),
  ):
    variant = network.Variant(name, distribution, num_tangents)
    drawn = bench.errors(variant)(variables, exact, jax.random.split(jax.random.key(1), 16))
    predicted = bench.predict(variant, exact)
    assert list(predicted) == [*LAYERS, 'blocks/token', 'blocks/channel', 'blocks/group']
    for layer, theory in predicted.items():
      errors = np.asarray(drawn[layer]['signal_error'])
      assert is_mean(errors, theory, slack=1e-6)
      is_exact = name != 'joint' and layer.endswith('group')
      assert (theory == 0) == (np.mean(drawn[layer]['relative_error']) < 1e-9) == is_exact


def test_more_passes_go_where_they_are_cheap():
  bench = network.Bench(configs.base(), data.load('digits'), 4)
  errors = [
    {'layer': f'blocks/{layer}', 'num_tangents': 2, 'relative_error': 1.0}
    for layer in ('token', 'channel')
  ]
  variant = frontier_rows._allocate(bench, errors, {'token': 8.0, 'channel': 1.0}, 8)
  num_tangents = dict(variant.num_tangents_by_tap)
  assert num_tangents['after_channel'] > 8 > num_tangents['after_token']
  assert 8 * num_tangents['after_token'] + num_tangents['after_channel'] <= 9 * 8
  assert num_tangents['after_channel'] % 4 == 0  # whole chunks


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--variants=variance_reduced', "--variants is 'variance_reduced'; allowed: joint, separate"),
    ('--distributions=uniform', "--distributions is 'uniform'; allowed: normal"),
    ('--num_tangents=0', "--num_tangents is '0'; allowed: 1 or more"),
    ('--model=S', "model.size is 'S'"),
  ],
)
def test_frontier_refuses(argument, message, tmp_path):
  with pytest.raises(UserError) as error:
    run('bench/frontier', *FRONTIER, argument, f'--out={tmp_path}')
  assert message in str(error.value) and not any(tmp_path.iterdir())


ACCURACY = [f'--config={ROOT}/configs/digits.py', *FLAGS, '--interval=20', '--max_epochs=3']


@pytest.mark.full
def test_time_to_accuracy(tmp_path, capsys):
  # At a rate of next to nothing the read-out's first step is still worth an error of 49 %.
  arguments = [
    *ACCURACY,
    '--algorithms=BP,LG-FG-A+',
    '--rates=BP=1e-8|1e-2',
    '--thresholds=40,0',
    f'--out={tmp_path}',
  ]
  run('bench/time_to_accuracy', *arguments, '--seeds=0')
  content = json.loads((tmp_path / 'time_to_accuracy.json').read_text())
  rows = {(row['algorithm'], row['rate'], row['threshold']): row for row in content['rows']}
  assert not rows['BP', 1e-8, 40]['best'] and rows['BP', 1e-2, 40]['best']
  fast, forward = rows['BP', 1e-2, 40], rows['LG-FG-A+', 2e-3, 40]
  assert fast['seconds'] > 0 and fast['ratio_to_bp'] == 1
  assert forward['ratio_to_bp'] == pytest.approx(forward['seconds'] / fast['seconds'])
  assert rows['BP', 1e-2, 0]['seconds'] is None and rows['BP', 1e-2, 0]['ratio_to_bp'] is None
  for curve in content['curves']:
    assert curve['steps'] == [0, 20, 40, 60, 69] and curve['seconds'] == sorted(curve['seconds'])
    assert curve['test_error_percent'][0] > 80
  assert (tmp_path / 'time_to_accuracy.png').stat().st_size > 1000
  capsys.readouterr()
  run('bench/time_to_accuracy', *arguments, '--seeds=0')
  assert 'step 20' not in capsys.readouterr().out  # all runs were finished
  assert json.loads((tmp_path / 'time_to_accuracy.json').read_text())['curves'] == content['curves']
  with pytest.raises(UserError, match='was measured with other settings'):
    run('bench/time_to_accuracy', *arguments, '--seeds=0', '--interval=10')


def test_a_run_ends_at_its_last_threshold(tmp_path):
  run(
    'bench/time_to_accuracy',
    *ACCURACY,
    '--algorithms=BP',
    '--thresholds=60',
    '--seeds=0',
    f'--out={tmp_path}',
  )
  (curve,) = json.loads((tmp_path / 'time_to_accuracy.json').read_text())['curves']
  assert curve['finished'] and curve['test_error_percent'][-1] <= 60 < min(
    curve['test_error_percent'][:-1]
  )
  assert curve['steps'][-1] < 69


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--thresholds=1,2', "--thresholds is '1,2'; allowed: falling numbers"),
    ('--rates=LG-BP=1', "--rates has 'LG-BP'; allowed: BP"),
    ('--seeds=a', "--seeds is 'a'; allowed: 0 or more"),
    ('--interval=0', "--interval is '0'; allowed: 1 or more"),
  ],
)
def test_time_to_accuracy_refuses(argument, message, tmp_path):
  with pytest.raises(UserError) as error:
    run(
      'bench/time_to_accuracy',
      *ACCURACY,
      '--algorithms=BP',
      '--thresholds=60',
      argument,
      f'--out={tmp_path}',
    )
  assert message in str(error.value)
