"""experiments/paper/variance.py: what it writes, and one line for a mistake."""

import itertools
import json

import pytest

from lfg_jax.errors import UserError
from tests.runs import script


@pytest.mark.full
def test_rows_table_and_figure(tmp_path):
  program = script('paper/variance')
  rows, figure = program['PARTS']['distributions']
  program['PARTS']['distributions'] = (lambda options: itertools.islice(rows(options), 2), figure)
  program['main']([f'--out={tmp_path}', '--parts=distributions'])
  content = json.loads((tmp_path / 'distributions.json').read_text())
  assert (
    content['command']
    == f'python experiments/paper/variance.py --out={tmp_path} --parts=distributions'
  )
  first, second = content['rows']
  assert (first['distribution'], first['num_tangents'], second['num_tangents']) == ('normal', 1, 2)
  assert abs(first['measured'] - first['predicted']) < 4 * first['standard_error']
  assert (tmp_path / 'distributions.png').stat().st_size > 1000
  assert '| estimator | distribution | num_tangents |' in (tmp_path / 'table.md').read_text()


def test_unknown_part(tmp_path):
  with pytest.raises(
    UserError, match="--parts is 'all'; allowed: table1, distributions, mlp, mixer, num_tangents"
  ):
    script('paper/variance')['main']([f'--out={tmp_path}', '--parts=all'])
