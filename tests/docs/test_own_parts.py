"""Own models, local losses, distributions of tangents and data sets: the files on the documentation's pages."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax import tap, user_files, value_and_activity_grad
from lfg_jax.local import row_losses
from lfg_jax.local.targets import Targets
from lfg_jax.training import main, train
from tests.runs import ROOT, script
from tests.statistics import ROUNDING, SIGMAS, z_of_mean

PAGES = {
  'model': 'bring_a_model',
  'loss': 'new_local_loss',
  'distribution': 'new_distribution',
  'data': 'new_data_set',
}


@pytest.fixture
def files(tmp_path):
  """Writes the first Python file of each page to disk."""
  paths = {}
  for part, page in PAGES.items():
    text = (ROOT / 'docs' / f'{page}.md').read_text()
    paths[part] = tmp_path / f'my_{part}.py'
    paths[part].write_text(text.split('```python\n')[1].split('```')[0])
  return paths


def arguments(files):
  return [
    f'--config.model.module={files["model"]}',
    f'--config.losses.module={files["loss"]}',
    f'--config.data.module={files["data"]}',
    f'--config.estimator.module={files["distribution"]}',
    '--config.model.width=32',
    '--config.epochs=4',
    '--config.batch_size=64',
    '--config.optimizer.learning_rate=0.003',
  ]


@pytest.mark.full
@pytest.mark.parametrize('rule', ['LG-FG-A+', 'LG-BP', 'BP', 'FG-W', 'LG-FA'])
def test_all_parts_from_outside_train_together(files, tmp_path, rule):
  """The images are stripes in four directions: chance is 75 % error, standard error 4 %."""
  main = script('train')['main']
  of_taps = ['--config.estimator.num_tangents_by_tap.hidden=2'] * (rule == 'LG-FG-A+')
  main([*arguments(files), *of_taps, f'--config.algorithm={rule}', f'--workdir={tmp_path / "run"}'])
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert (summary['model'], summary['dataset']) == ('my_model', 'stripes')
  assert summary['test_error_percent'] < 60
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['losses']['module'] == str(files['loss'])
  assert train.load(tmp_path / 'run')[1].step == 32  # what experiments take of a run


def test_help_knows_the_fields_of_a_model_from_outside(files, capsys):
  with pytest.raises(SystemExit):
    main.main([f'--config.model.module={files["model"]}', '--help'])
  out = capsys.readouterr().out
  assert '  model.width = 64\n      channels of both layers; allowed: 4 or more\n' in out
  assert '  estimator.num_tangents_by_tap.out = 0\n' in out and 'model.size' not in out


def test_the_loss_of_the_page_is_smoothed(files):
  row_loss = row_losses.find('', str(files['loss']))
  outputs = jax.random.normal(jax.random.key(0), (2, 5))
  targets = Targets(jnp.array([3, 0]), jnp.ones(2))
  uniform = -jax.nn.log_softmax(outputs).mean(-1)
  plain = row_losses.cross_entropy(outputs, targets)
  np.testing.assert_allclose(row_loss(outputs, targets), 0.9 * plain + 0.1 * uniform, rtol=1e-5)


def test_the_law_of_the_page_serves_any_function(files):
  distribution = user_files.load(
    'distribution', str(files['distribution']), ('distribution',)
  ).distribution

  losses = lambda w, x: jnp.tanh(tap(x @ w, 'z')).sum(-1)
  w, x = jnp.ones((3, 4)) / 5, jnp.arange(6.0).reshape(2, 3)
  exact = jax.grad(lambda w: losses(w, x).mean())(w)
  step = value_and_activity_grad(losses, distribution=distribution, num_tangents=4)
  draws = jax.vmap(lambda key: step(w, x, key=key)[1])(jax.random.split(jax.random.key(0), 4000))
  assert z_of_mean(draws, exact, ROUNDING).max() < SIGMAS
  assert z_of_mean(1.2 * draws, exact, ROUNDING).max() > SIGMAS  # the test sees what is too long


def test_every_page_with_a_file_is_in_the_contents_and_for_contributors():
  site, contributing = ((ROOT / name).read_text() for name in ('mkdocs.yml', 'CONTRIBUTING.md'))
  for page, text in itertools.product(PAGES.values(), (site, contributing)):
    assert f'{page}.md' in text
