"""The benchmarks run and write their rows. (Times are looked at where they are run, not here.)"""

import json
import runpy

import pytest

from lfg_jax.errors import UserError
from tests.runs import ROOT

pytestmark = pytest.mark.slow

EXPERIMENTS = ROOT / 'experiments'


@pytest.mark.parametrize(('name', 'arguments', 'rows', 'field'), [
    ('step_time', ['--model=S/1/2', '--batch=8', '--algorithms=LG-FG-A', '--repetitions=1', '--precision=bfloat16'], 1,
     'ratio_to_floor'),
    ('depth', ['--model=S/8/2', '--batch=8', '--blocks=2,3', '--algorithms=LG-FG-A', '--repetitions=1'], 2,
     'temporaries_bytes'),
    ('replicated_losses', ['--batch=2', '--channels=8', '--patches=2', '--many_groups=1,2', '--many_patches=2',
                           '--groups=2', '--repetitions=1'], 12, 'ms'),
])
def test_rows_and_figure(name, arguments, rows, field, tmp_path):
  runpy.run_path(str(EXPERIMENTS / f'{name}.py'))['main']([*arguments, f'--out={tmp_path}'])
  content = json.loads((tmp_path / f'{name}.json').read_text())
  assert content['command'].startswith(f'python experiments/{name}.py ') and content['device'] == 'cpu'
  assert len(content['rows']) == rows and all(row[field] > 0 for row in content['rows'])
  assert (tmp_path / f'{name}.png').stat().st_size > 1000


def test_throughput(tmp_path):
  main = runpy.run_path(str(EXPERIMENTS / 'throughput.py'))['main']
  arguments = [f'--config={ROOT}/configs/digits.py', '--config.model.size=S/1/2', '--epochs=2']
  main([f'--out={tmp_path}', '--images=320', *arguments])
  written = json.loads((tmp_path / 'throughput.json').read_text())
  assert len(written['train']) == 2 and written['ratio'] > 0
  with pytest.raises(UserError, match=r'^images is 9999; allowed: 1 … 1438'):
    main([f'--out={tmp_path}', '--images=9999', *arguments])
  with pytest.raises(UserError, match='an epoch of 9 steps, the first 9 of which are not timed'):
    main([f'--out={tmp_path}', '--images=288', *arguments])
