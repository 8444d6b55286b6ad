"""The strict modes of careful users: neither ranks nor dtypes are promoted silently."""

import jax
import pytest

from lfg_jax import data
from lfg_jax.training import optimizers, train, update
from lfg_jax.training.pipeline import partition, pipeline, pipeline_plan
from tests.runs import tiny

CASES = {
  **{
    rule: {'algorithm': rule}
    for rule in ('BP', 'LG-FA', 'DFA', 'FG-W', 'LG-FG-W', 'LG-FG-A+', 'LG-FG-A')
  },
  **{
    f'contrastive-{rule}': {'algorithm': rule, 'objective': 'contrastive'}
    for rule in ('LG-FG-A+', 'FG-A')
  },
  'own-views': {'objective': 'contrastive', 'contrastive__shared_views': False},
  'every-guess': {'estimator__control_variate': 'all', 'model__size': 'S/2/2'},
  'batch-norm': {'model__norm': 'batch', 'model__blocks': 3},
  'whole-norm': {'model__norm': 'whole'},
  'paper-derivative': {'algorithm': 'LG-FG-A', 'model__norm_derivative': False},
  'bfloat16': {'model__precision': 'bfloat16', 'model__size': 'S/2/2'},
  'pooled': {
    'model__size': 'S/4/2',
    'model__pool_every': 1,
    'model__blocks': 2,
    'model__mixing': 'conv',
  },
  'projection': {'estimator__combine': 'projection', 'estimator__num_tangents': 4},
  'independent': {
    'algorithm': 'LG-FG-W',
    'estimator__sharing': 'independent',
    'estimator__num_tangents': 4,
    'estimator__chunk': 2,
    'micro_batch': 4,
  },
  **{
    f'staged-{name}': {'pipeline_stages': 2, 'model__blocks': 2, **fields}
    for name, fields in (
      ('LG-FG-A+', {}),
      ('contrastive', {'objective': 'contrastive'}),
      ('batch-norm', {'model__norm': 'batch'}),
      ('pooled', {'model__size': 'S/4/2', 'model__pool_every': 1, 'model__mixing': 'conv'}),
    )
  },
  **{
    distribution: {'estimator__distribution': distribution, 'optimizer__name': name}
    for distribution, name in (('rademacher', 'sgd'), ('haar', 'adamw'), ('sphere', 'lars'))
  },
}


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
    yield


@pytest.fixture(scope='module')
def dataset():
  return data.load('digits')


@pytest.mark.full
@pytest.mark.parametrize('case', CASES)
def test_steps_are_traced(case, dataset):
  """Nothing is compiled. Mixed precision mixes dtypes on purpose."""
  mixed = CASES[case].get('model__precision') == 'bfloat16'
  with jax.numpy_dtype_promotion('standard' if mixed else 'strict'):
    trace_steps(CASES[case], dataset)


def trace_steps(fields, dataset):
  job = train.prepare(tiny(**fields), dataset)
  config, split = job.config, data.Arrays(*(x[:128] for x in dataset.train))
  key = jax.random.key(0)
  feed = update.make_feed(split, job.mesh, config.batch_size, key, at_once=2)
  rate = optimizers.schedule(config.optimizer, feed.steps, config.epochs, config.batch_size)
  optimizer = optimizers.make(config.optimizer, rate)
  _, inputs = next(feed.epoch(0, 0))
  state = jax.eval_shape(
    lambda key: update.init_state(job.algorithm, optimizer, key, job.mesh), key
  )
  if config.pipeline_stages > 1:
    after = trace_stages(job, optimizer, feed, state, inputs)
  else:
    step = update.make_update(job.algorithm, optimizer, job.mesh, feed)
    after = jax.eval_shape(step, state, key, 2, *inputs)
  assert after.params['readout']['linear']['kernel'].shape[-1] == 10


def trace_stages(job, optimizer, feed, state, inputs):
  spans = partition.spans(job.algorithm.composition, job.config.pipeline_stages)
  batch = update.batch_like(job.dataset.image_shape, job.config.batch_size)
  made = pipeline.make(
    pipeline_plan.make(job.algorithm, optimizer, job.mesh, feed, spans, state, batch)
  )
  after = jax.eval_shape(
    made.dispatch, jax.eval_shape(made.begin, state), jax.random.key(0), 2, 2, *inputs
  )
  return jax.eval_shape(made.whole, after)


@pytest.mark.full
def test_a_run_is_trained(tmp_path):
  """The whole run, with evaluation and checkpoints."""
  fields = {'epochs': 1, 'optimizer__warmup_epochs': 0.5}
  assert train.train(train.prepare(tiny(**fields)), tmp_path / 'run')['test_error_percent'] < 50
  train.load(tmp_path / 'run')
