"""The block pipeline: equal to the sequential run, neighbours only, and refused where it cannot be."""

import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.training import (
  algorithms,
  configs,
  hlo,
  launch,
  optimizers,
  pipeline,
  run_log,
  stage_plan,
  train,
  update,
)
from tests.runs import FLAGS, STEPS, start, state, tiny

BATCH = 64
MIXER = {'model__size': 'S/2/4', 'model__blocks': 4}


def perceptron(**fields):
  """Eight blocks of a perceptron; the mixer is what `fields` of the model make of `tiny`."""
  if any(name.startswith('model__') for name in fields):
    return tiny(**fields)
  config = tiny()
  configs.use_model(config, 'mlp', blocks=8, channels=16, groups=4)
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  return config


def mesh_of(devices, stages):
  """The first devices, as `update.make_mesh` arranges all."""
  shape, axes = ((devices, stages), ('data', 'stage')) if stages > 1 else ((devices,), ('data',))
  return jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
                       devices=jax.devices()[:devices * stages])


def build(config, devices, stages, feed=None):
  """(feed, state before the first step, how to make steps): as `train.build`, on some of the devices."""
  dataset, mesh = data.load('digits'), mesh_of(devices, stages)
  algorithm = algorithms.make(config, dataset, update.AXIS)
  stage_plan.check(config, algorithm.made_of)
  feed = feed or update.make_feed(dataset.train, mesh, BATCH, jax.random.key(1),
                                  at_once=config.steps_per_dispatch)
  rate = optimizers.schedule(config.optimizer, feed.steps, config.epochs)
  optimizer = optimizers.make(config.optimizer, rate)
  before = update.init_state(algorithm, optimizer, jax.random.key(0), mesh)
  if stages == 1:
    return feed, before, update.make_update(algorithm, optimizer, mesh, feed)
  spans = stage_plan.spans(algorithm.made_of, stages)
  batch = update.batch_like(dataset.image_shape, BATCH)
  return feed, before, pipeline.make(algorithm, optimizer, mesh, feed, spans, before, batch)


def after(config, devices, stages, steps):
  """The state after the last steps of an epoch, of which the very last has padding."""
  feed, before, made = build(config, devices, stages)
  first, key = STEPS - steps, jax.random.key(2)
  before = before._replace(step=jax.device_put(jnp.int32(first), before.step.sharding))
  if stages == 1:
    for count, inputs in feed.epoch(0, first):
      before = made(before, key, count, *inputs)
    return jax.device_get(before)
  now = made.begin(before)
  for count, inputs in feed.epoch(0, first):
    now = made.steps(now, key, count, inputs)
  return jax.device_get(made.whole(made.finish(now, key, inputs)))


@functools.cache
def sequential(text, devices, steps):
  """As `after`, of the config that is this text."""
  config = configs_by_text[text]
  return after(config, devices, 1, steps)


configs_by_text = {}


def both(config, devices, stages, steps):
  """The states of the sequential run, which several tests share, and of the pipeline."""
  text = configs.to_json(config)
  configs_by_text[text] = config
  return sequential(text, devices, steps), after(config, devices, stages, steps)


def assert_equal(config, devices, stages, steps):
  """Bit by bit: parameters, optimizer, guesses, metrics."""
  one, several = both(config, devices, stages, steps)
  assert one.step == STEPS and one.bad_step == -1 and one.sums['loss'] > 0
  assert_same(several, one)


def assert_same(state, other):
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path)), state, other)


SLOW = pytest.mark.slow


@pytest.mark.slow
def test_contrastive_learning_is_equal_but_for_rounding():
  """XLA sums the slopes of a scanned block's rows in another order than those of a single one."""
  config = perceptron(steps_per_dispatch=7, algorithm='LG-FG-A', loss='contrastive', optimizer__name='sgd')
  one, several = both(config, 1, 4, 20)
  assert one.step == STEPS and one.sums['contrastive_loss'] > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max()),
               (one.params, one.sums), (several.params, several.sums))


@pytest.mark.parametrize('stages', [2, pytest.param(4, marks=SLOW), pytest.param(8, marks=SLOW)])
def test_equal_after_twenty_steps(stages):
  assert_equal(perceptron(steps_per_dispatch=7), 1, stages, 20)


@pytest.mark.slow
@pytest.mark.parametrize('stages, fields', [
    (2, {'algorithm': 'LG-BP'}), (8, {'algorithm': 'LG-BP'}), (4, {'algorithm': 'LG-FG-W'}),
    (2, {'algorithm': 'LG-FA', 'losses__every': 3}), (3, {'algorithm': 'LG-FD-A'}),
    (4, {'algorithm': 'LG-FG-A', **MIXER}), (4, {'algorithm': 'LG-BP', **MIXER, 'micro_batch': 16}),
    (2, {'algorithm': 'LG-FG-A-paper', **MIXER}),
    (2, {'algorithm': 'LG-BP', 'optimizer__name': 'adamw', 'optimizer__weight_decay': 0.1}),
], ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else str(value))
def test_equal_for_rules_models_and_losses(stages, fields):
  assert_equal(perceptron(steps_per_dispatch=7, **fields), 1, stages, 20)


@pytest.mark.slow
@pytest.mark.parametrize('devices, stages, fields', [
    (2, 4, {'algorithm': 'LG-FG-A'}), (2, 2, {'algorithm': 'LG-FG-A', 'loss': 'contrastive'})])
def test_equal_with_data_parallelism_beside_it(devices, stages, fields):
  assert_equal(perceptron(steps_per_dispatch=7, **fields), devices, stages, 8)


@pytest.mark.slow
def test_batch_norm_has_the_same_statistics():
  """All but bit by bit: XLA adds the read-out's mean over patches and examples in another order."""
  config = tiny(algorithm='LG-BP', optimizer__name='sgd', **MIXER, model__norm='batch')
  one, several = both(config, 1, 2, 3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), several, one)
  jax.tree.map(lambda a: np.testing.assert_array_less(0, np.abs(a)), one.rest['batch_stats'])


@pytest.mark.slow
def test_the_first_bad_step_is_told():
  fields = {'optimizer__name': 'sgd', 'optimizer__learning_rate': 1e9, 'optimizer__schedule': 'constant'}
  one, several = both(perceptron(algorithm='LG-BP', steps_per_dispatch=2, **fields), 1, 4, 12)
  assert several.bad_step == one.bad_step > STEPS - 11


@pytest.mark.slow
def test_outputs_of_different_shapes():
  config = tiny(algorithm='LG-BP')
  configs.use_model(config, 'resnet', stages=(1, 2), channels=8, groups=2, patches=2)
  assert_equal(config, 1, 3, 3)


def compiled(config, devices, stages):
  feed, before, made = build(config, devices, stages)
  shapes = jax.eval_shape(made.begin, before)
  _, inputs = next(feed.epoch(0, 0))
  return made.dispatch.lower(shapes, jax.random.key(0), 1, 1, *inputs).compile()


def test_neighbours_send_one_activity_and_nothing_else():
  """Per tick x, labels, weights, the number of examples and that of the step; then the metrics, round the ring."""
  text = compiled(perceptron(algorithm='LG-BP'), 1, 4).as_text()
  assert set(re.findall(rf' ({"|".join(hlo.COLLECTIVES)})(?:-start)?\(', text)) == {'collective-permute'}
  of_tick = BATCH * (16 + 1 + 1) * 4 + 8
  metrics = 3 * (4 * 4)    # hops × (loss, error, examples, bad step)
  assert hlo.collectives(text)['collective-permute'].sent == of_tick + metrics


def test_a_device_holds_its_own_stage():
  config = perceptron(algorithm='LG-BP')
  held = compiled(config, 1, 4).memory_analysis().argument_size_in_bytes
  feed, before, _ = build(config, 1, 1)
  own = sum(leaf.nbytes for leaf in jax.tree.leaves((before.params, before.opt_state)))
  data_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(next(feed.epoch(0, 0))[1]))
  assert held - data_bytes < 0.5 * own


@pytest.mark.parametrize('number', [1, 2, 3, 5, 7])
def test_stages_are_balanced(number):
  """Against all ways to share out seven parts."""
  costs = np.random.default_rng(number).integers(1, 9, 7).tolist()
  slowest = lambda ends: max(sum(costs[a:b]) for a, b in zip((0, *ends), ends, strict=False))
  best = min(slowest((*cuts, 7)) for cuts in itertools.combinations(range(1, 7), number - 1))
  ends = stage_plan._balanced(tuple(costs), number)
  assert (len(ends), ends[-1], slowest(ends)) == (number, 7, best)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_goes_on_with_other_stages_in_the_middle_of_an_epoch():
  """As after a signal: all batches on their way leave, and the whole state goes elsewhere."""
  config, key = perceptron(algorithm='LG-BP', steps_per_dispatch=3), jax.random.key(2)
  one = after(config, 1, 1, 7)
  now = None
  for stages, dispatches in ((4, 1), (2, 1), (8, 1)):
    feed, before, made = build(config, 1, stages)
    whole = before._replace(step=jnp.int32(STEPS - 7)) if now is None else jax.device_get(now)
    now = made.begin(jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), whole, before))
    for count, inputs in list(feed.epoch(0, int(whole.step)))[:dispatches]:
      now = made.steps(now, key, count, inputs)
    now = made.whole(made.finish(now, key, inputs))
  assert_same(jax.device_get(now), one)


@pytest.mark.slow
def test_a_run_goes_on_with_other_stages(tmp_path, monkeypatch):
  """One device of data parallelism throughout, so that all is equal bit by bit; test errors too."""
  fields = {'algorithm': 'LG-BP', 'optimizer__schedule': 'constant', 'steps_per_dispatch': 5}

  def go(folder, epochs, stages):
    monkeypatch.setattr(jax, 'device_count', lambda: stages)
    monkeypatch.setattr(update, 'make_mesh', functools.partial(mesh_of, 1))
    train.train(train.prepare(perceptron(epochs=epochs, stages=stages, **fields)), tmp_path / folder)
    rows = run_log.read_rows(tmp_path / folder / 'metrics.jsonl')
    return [{name: value for name, value in row.items() if name != 'examples_per_second'} for row in rows]

  for epochs, stages in ((1, 4), (2, 2)):
    go('changing', epochs, stages)
  assert go('changing', 3, 1) == go('same', 3, 1)
  for there, here in zip(state(tmp_path / 'changing'), state(tmp_path / 'same'), strict=True):
    np.testing.assert_array_equal(there, here)


@pytest.mark.slow
def test_batches_that_come_one_by_one():
  """As those of a stream: one tick per dispatch, and the pipeline stays full."""
  config, steps = perceptron(algorithm='LG-BP', steps_per_dispatch=1), 6
  one = after(config, 1, 1, steps)
  feed, before, made = build(config, 1, 4)
  (_, (arrays, order)), *_ = feed.epoch(0, 0)
  streamed = feed._replace(fetch=lambda batch, step: batch, specs=(P(update.AXIS),), is_stream=True)
  _, _, made = build(config, 1, 4, streamed)
  now = made.begin(before._replace(step=jax.device_put(jnp.int32(STEPS - steps), before.step.sharding)))
  for step in range(STEPS - steps, STEPS):
    batch = data.datasets.take(arrays, order[step])
    now = made.steps(now, jax.random.key(2), 1, (batch,))
  now = made.finish(now, jax.random.key(2), (jax.tree.map(jnp.zeros_like, batch),))
  assert_same(jax.device_get(made.whole(now)), one)


@pytest.mark.slow
def test_two_processes_are_two_stages(tmp_path):
  address = launch.free_address()
  flags = ['--config.algorithm=LG-BP', '--config.model.blocks=2', '--config.epochs=1', *FLAGS]
  both = [start('train.py', f'--workdir={tmp_path / "two"}', '--config.stages=2', f'--coordinator={address}',
                '--processes=2', f'--process={i}', *flags) for i in range(2)]
  alone = start('train.py', f'--workdir={tmp_path / "one"}', *flags)
  errors = [process.communicate(timeout=300)[1] for process in (*both, alone)]
  assert [process.returncode for process in (*both, alone)] == [0, 0, 0], errors
  for there, here in zip(state(tmp_path / 'two'), state(tmp_path / 'one'), strict=True):
    np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize('processes, shares', [
    ([[0, 0], [1, 1]], [(0, 2), (1, 2)]), ([[0, 1]], [(0, 1), (0, 1)]),
    ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]), ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)])])
def test_processes_of_one_pipeline_read_the_same(processes, shares, monkeypatch):
  device = lambda process: types.SimpleNamespace(process_index=process)
  mesh = types.SimpleNamespace(axis_names=('data', 'stage'),
                               devices=[[device(process) for process in row] for row in processes])
  for process, share in enumerate(shares):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    assert update._share(mesh) == share


@pytest.mark.parametrize('fields, message', [
    ({'stages': 3}, 'stages is 3; allowed: divisors of 8, the number of devices'),
    ({'stages': 2, 'batch_size': 6}, 'batch_size is 6; allowed: multiples of 4, the number of devices of a stage'),
    ({'stages': 2, 'algorithm': 'BP'}, 'stages is 2, but BP learns from a loss at the end of the network, which all '
                                       'blocks must wait for; allowed: 1, or one of LG-BP, LG-FA, '),
    ({'stages': 2, 'algorithm': 'L-FA'}, 'stages is 2, but L-FA sends a gradient from block to block; allowed: 1, or'),
    ({'stages': 2, 'algorithm': 'DFA'}, 'stages is 2, but DFA learns from a loss at the end'),
    ({'stages': 2, 'algorithm': 'FG-W'}, 'stages is 2, but FG-W learns from a loss at the end'),
    ({'stages': 2, 'algorithm': 'LG-BP', 'losses__overlap': True}, 'stages is 2, but losses.overlap=True lets every'),
    ({'stages': 8, 'losses__every': 2}, 'stages is 8; allowed: 1 … 4, the number of parts of the network with losses'),
    ({'stages': 4, 'optimizer__name': 'lars'}, "stages is 4, but optimizer.name='lars' takes one ratio for all blocks "
                                               "of 'blocks', which are not all in one stage; allowed: 1, or sgd,"),
    ({'stages': 0}, 'stages is 0; allowed: 1 or more'),
], ids=str)
def test_refused_in_one_line(fields, message):
  with pytest.raises(UserError) as error:
    train.prepare(perceptron(**fields))
  assert str(error.value).startswith(message) and '\n' not in str(error.value)
