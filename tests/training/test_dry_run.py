"""The dry run against the compiled program: bytes sent, operations and memory."""

import json
import sys

import jax
import pytest

from lfg_jax.errors import UserError
from lfg_jax.training import configs
from lfg_jax.training.rules import algorithms, rules
from lfg_jax.training.rules.flop import gradient_flop
from tests.runs import ROOT, script

sys.path.append(str(ROOT / 'experiments' / 'bench'))
import step_cost

BATCH, WIDTH = 64, 16
SCALARS = 3  # loss, error, and the number of examples


def config_of(stages=1, algorithm='LG-BP'):
  config = configs.base()
  configs.use_model(config, 'mlp', blocks=8, channels=WIDTH, groups=4)
  config.algorithm, config.pipeline_stages, config.batch_size = algorithm, stages, BATCH
  return config


def model_of(config):
  return algorithms.make(config, step_cost.images_of(config)).composition.model


def parameters(config):
  return sum(
    leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model_of(config).init, jax.random.key(0)))
  )


def test_data_parallel_sums_gradients_and_nothing_else():
  config = config_of()
  cost = step_cost.cost(config, 4)
  assert set(cost.collectives) == {'all-reduce'}
  assert cost.collectives['all-reduce'].payload == 4 * (parameters(config) + SCALARS)
  assert cost.sent == pytest.approx(2 * 3 / 4 * 4 * parameters(config), rel=0.01)
  assert (
    cost.parameters == parameters(config)
    and 8 * cost.parameters < cost.state < 8 * cost.parameters + 100
  )


def test_a_pipeline_sends_one_activity_to_its_neighbour_and_nothing_else():
  cost = step_cost.cost(config_of(stages=4), 4)
  assert set(cost.collectives) == {'collective-permute'}
  targets, metrics = BATCH * 8 + 8, 3 * 16  # the metrics go round the ring, in 3 hops
  assert cost.sent == BATCH * WIDTH * 4 + targets + metrics
  assert cost.parameters < 0.6 * parameters(config_of())


@pytest.mark.full
def test_data_parallel_stages_sum_their_own_gradients():
  cost = step_cost.cost(config_of(stages=2), 4)
  assert set(cost.collectives) == {'all-reduce', 'collective-permute'}
  all_reduce = cost.collectives['all-reduce'].payload
  # The rows of gradients are as long as those of the largest stage and the metrics.
  assert 4 * cost.parameters <= all_reduce <= 4 * (cost.parameters + 300)
  half = BATCH // 2
  assert cost.collectives['collective-permute'].sent == half * (WIDTH * 4 + 8) + 8 + 16


@pytest.mark.full
@pytest.mark.parametrize('algorithm', ['LG-BP', 'BP'])
def test_operations_are_those_of_the_cost_model(algorithm):
  config = config_of(algorithm=algorithm)
  flop = gradient_flop(model_of(config), rules.REGISTRY[algorithm], rules.Options())
  counted = step_cost.cost(config, 4).flop / (BATCH // 4)
  assert flop <= counted <= 2 * flop  # heads and read-out come on top


def test_predicted_seconds():
  cost = step_cost.Cost(1, 1, 1, 100, {'all-reduce': step_cost.hlo.Sent(1, 10, 20)})
  assert cost.seconds(flops=50, link=16) == 2 + 10


@pytest.mark.full
def test_the_script_writes_where_its_numbers_come_from(tmp_path):
  main = script('bench/dry_run')['main']
  small = [
    '--config=digits',
    '--config.model.size=S/1/2',
    '--config.model.channels=16',
    '--config.model.blocks=2',
  ]
  main([*small, '--devices=2', '--stages=1,2', '--batch_per_device=4', f'--out={tmp_path}'])
  content = json.loads((tmp_path / 'dry_run.json').read_text())
  assert (
    content['command'].startswith('python experiments/bench/dry_run.py --config=digits')
    and content['flops'] == 1e14
  )
  assert [
    (row['stages'], row['batch_size'], row['step_seconds'] > 0) for row in content['rows']
  ] == [(1, 8, True), (2, 8, True)]
  assert (tmp_path / 'dry_run.md').read_text().count('\n') == 6
  with pytest.raises(
    UserError, match=r'^pipeline_stages is 3; allowed: divisors of 2, the number of devices'
  ):
    main([*small, '--devices=2', '--stages=3', f'--out={tmp_path}'])
