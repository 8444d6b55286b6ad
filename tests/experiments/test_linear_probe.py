"""experiments/linear_probe.py: against the online read-out, and against scikit-learn on the exported features."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lfg_jax.errors import UserError
from lfg_jax.training.train import prepare, train
from tests.runs import script, tiny

pytestmark = pytest.mark.full


def probe(*arguments):
  script('linear_probe')['main']([str(a) for a in arguments])


@pytest.fixture(scope='module')
def supervised(tmp_path_factory):
  """Folder and summary of a run."""
  config = tiny(
    model__size='S/2/4', model__channels=64, epochs=6, optimizer__readout_multiplier=1.0
  )
  folder = tmp_path_factory.mktemp('supervised') / 'run'
  return folder, train(prepare(config), folder)


def test_probe_of_a_run(supervised):
  folder, summary = supervised
  probe(f'--workdir={folder}')
  report = json.loads((folder / 'linear_probe.json').read_text())
  features = np.load(folder / 'features.npz')
  assert features['train_x'].shape == (1438, 64) and features['test_x'].shape == (359, 64)
  # The features and the read-out of the checkpoint make the trainer's own number.
  assert report['online_test_error_percent'] == pytest.approx(
    summary['test_error_percent'], abs=1e-4
  )
  # Same minimum: C = 1/(N l2) is scikit-learn's form of the penalty.
  model = LogisticRegression(C=1 / (1438 * 1e-4), max_iter=5000, tol=1e-8).fit(
    features['train_x'], features['train_y']
  )
  error = 100 * (1 - model.score(features['test_x'], features['test_y']))
  assert abs(report['test_error_percent'] - error) <= 100 / 359 + 1e-9
  assert (
    abs(report['test_error_percent'] - report['online_test_error_percent'])
    < 3 * report['test_error_percent_se'] + 1
  )
  assert report['train_error_percent'] < 3


def test_pairs_are_refused_where_there_are_no_views(supervised):
  with pytest.raises(
    UserError, match=r'--pairs is 2, and .* has a supervised run, which has no views'
  ):
    probe(f'--workdir={supervised[0]}', '--pairs=2')
  with pytest.raises(UserError, match="--pairs is '-1'; allowed: 0 or more"):
    probe(f'--workdir={supervised[0]}', '--pairs=-1')


def test_probe_of_a_contrastive_run_on_what_its_read_out_saw(tmp_path):
  config = tiny(
    objective='contrastive',
    model__size='S/2/4',
    model__channels=64,
    epochs=4,
    eval_every=4,
    optimizer__readout_multiplier=10.0,
  )
  folder = tmp_path / 'run'
  train(prepare(config), folder)
  probe(f'--workdir={folder}', '--pairs=2', '--iterations=100')
  report = json.loads((folder / 'linear_probe.json').read_text())
  features = np.load(folder / 'features.npz')
  assert features['train_x'].shape == (2 * 2 * 1438, 64) and features['test_x'].shape == (359, 64)
  assert len(np.unique(features['train_x'], axis=0)) == 2 * 2 * 1438
  # Three standard errors. With the views' labels in another order, the probe has errors of 0.9.
  assert (
    abs(report['test_error_percent'] - report['online_test_error_percent'])
    < 3 * report['test_error_percent_se']
  )
  assert report['train_error_percent'] < 70


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='is not the folder of a run: it has no config'):
    probe(f'--workdir={tmp_path}')
