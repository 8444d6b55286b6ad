"""A comparison, and what it does if it is started again."""

import json

import pytest
from matplotlib.figure import Figure

from lfg_jax.local import row_losses
from lfg_jax.local.heads import Heads
from lfg_jax.models import sizes
from lfg_jax.training import configs
from lfg_jax.training.rules import rules
from tests.runs import FLAGS, ROOT, STEPS, script


def compare(out, names, seeds):
  main = script('compare')['main']
  main([f'--algorithms={names}', f'--seeds={seeds}', f'--out={out}', '--config.epochs=2', *FLAGS])


def summary(folder):
  return json.loads((folder / 'summary.json').read_text())


@pytest.mark.full
def test_comparison_goes_on(tmp_path, capsys):
  out = tmp_path / 'out'
  compare(out, 'BP', '0')
  first = summary(out / 'BP-seed0')
  assert '±' not in (out / 'comparison.md').read_text().splitlines()[-1]
  capsys.readouterr()
  compare(out, 'BP,LG-BP', '0,1')
  assert summary(out / 'BP-seed0') == first
  assert capsys.readouterr().out.count('finished already, after 2 epochs') == 1
  summaries = {
    name: [summary(out / f'{name}-seed{seed}') for seed in (0, 1)] for name in ('BP', 'LG-BP')
  }
  assert summaries['BP'][0]['train_error_percent'] != summaries['BP'][1]['train_error_percent']
  content = json.loads((out / 'comparison.json').read_text())
  assert content['command'].startswith(
    'python experiments/compare.py --algorithms=BP,LG-BP --seeds=0,1 '
  )
  results = content['rows']
  assert [result['algorithm'] for result in results] == ['BP', 'LG-BP']
  for result in results:
    own = summaries[result['algorithm']]
    errors = [run['test_error_percent'] for run in own]
    assert result['test_error_percent'] == pytest.approx(sum(errors) / 2)
    assert result['test_error_percent_se'] == pytest.approx(abs(errors[0] - errors[1]) / 2)
    assert result['seeds'] == 2 and result['steps'] == 2 * STEPS
    assert result['seconds'] == pytest.approx((own[0]['seconds'] + own[1]['seconds']) / 2)
  lines = (out / 'comparison.md').read_text().splitlines()
  assert lines[2:4] == [
    '| algorithm | test error | train error | seconds | seeds |',
    '|---|---|---|---|---|',
  ]
  r = results[1]
  assert lines[5] == (
    f'| LG-BP | {r["test_error_percent"]:.2f} ± {r["test_error_percent_se"]:.2f} '
    f'| {r["train_error_percent"]:.2f} | {r["seconds"]:.0f} | 2 |'
  )
  assert (out / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_base_config_has_the_defaults_of_the_code():
  base, style, heads = configs.base(), sizes.Style(), Heads()
  assert set(base.estimator.num_tangents_by_tap.values()) == {0}
  assert rules.Options.read(base, num_tangents_by_tap={}) == rules.Options()
  assert (row_losses.find(base.losses.row), base.losses.head_hidden) == (
    heads.row_loss,
    heads.hidden,
  )
  for field in ('mixing', 'conv_size', 'norm', 'norms', 'init', 'pool', 'norm_derivative'):
    assert base.model[field] == getattr(style, field)


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem
)
def test_configs_are_valid(path):
  configs.validate(configs.load(str(path)))


def test_headline(tmp_path):
  """The README's figure has a named line for every rule, at the means of the committed runs."""
  headline = script('headline')
  rows = json.loads((ROOT / 'experiments/results/digits/comparison.json').read_text())['rows']
  axes = Figure().subplots()
  headline['errors'](axes, rows)
  drawn = [line.get_ydata().tolist() for line in axes.lines]
  assert drawn == [row['curve']['test_error_percent'] for row in rows]
  names = [text.get_text().split(' ')[0] for text in axes.texts]
  assert names == [row['algorithm'] for row in rows]
  headline['main']([f'--out={tmp_path / "it.png"}'])
  assert (tmp_path / 'it.png').read_bytes().startswith(b'\x89PNG')
