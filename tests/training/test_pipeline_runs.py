"""Runs in stages: changing stages, streams, several processes, and runs that are refused."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.training import train, update
from lfg_jax.training.hosts import connect
from lfg_jax.training.run import metrics
from tests.runs import FLAGS, STEPS, start, state
from tests.training.test_pipeline import after, assert_same, build, mesh_of, perceptron


@pytest.mark.full
def test_goes_on_with_other_stages_in_the_middle_of_an_epoch():
  """As after a signal, all batches in the pipeline are finished, and the whole state is moved."""
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


@pytest.mark.full
def test_a_run_goes_on_with_other_stages(tmp_path, monkeypatch):
  """Each stage always has one device, so everything is equal bit by bit, also test errors."""
  fields = {'algorithm': 'LG-BP', 'optimizer__schedule': 'constant', 'steps_per_dispatch': 5}

  def go(folder, epochs, stages):
    monkeypatch.setattr(jax, 'device_count', lambda: stages)
    monkeypatch.setattr(update, 'make_mesh', functools.partial(mesh_of, 1))
    train.train(
      train.prepare(perceptron(4, epochs=epochs, pipeline_stages=stages, **fields)),
      tmp_path / folder,
    )
    rows = metrics.read_rows(tmp_path / folder / 'metrics.jsonl')
    return [
      {name: value for name, value in row.items() if name != 'examples_per_second'} for row in rows
    ]

  for epochs, stages in ((1, 4), (2, 2)):
    go('changing', epochs, stages)
  assert go('changing', 3, 1) == go('same', 3, 1)
  for there, here in zip(state(tmp_path / 'changing'), state(tmp_path / 'same'), strict=True):
    np.testing.assert_array_equal(there, here)


@pytest.mark.full
def test_batches_that_come_one_by_one():
  """With batches as from a stream, a dispatch is one tick, and the pipeline stays full."""
  config, steps = perceptron(4, algorithm='LG-BP', steps_per_dispatch=1), 6
  one = after(config, 1, 1, steps)
  feed, before, made = build(config, 1, 4)
  (_, (arrays, order)), *_ = feed.epoch(0, 0)
  streamed = feed._replace(fetch=lambda batch, step: batch, specs=(P(update.AXIS),), is_stream=True)
  _, _, made = build(config, 1, 4, streamed)
  now = made.begin(
    before._replace(step=jax.device_put(jnp.int32(STEPS - steps), before.step.sharding))
  )
  for step in range(STEPS - steps, STEPS):
    batch = data.datasets.take(arrays, order[step])
    now = made.steps(now, jax.random.key(2), 1, (batch,))
  now = made.finish(now, jax.random.key(2), (jax.tree.map(jnp.zeros_like, batch),))
  assert_same(jax.device_get(made.whole(now)), one)


@pytest.mark.full
def test_two_processes_are_two_stages(tmp_path):
  address = connect.free_address()
  flags = ['--config.algorithm=LG-BP', '--config.model.blocks=2', '--config.epochs=1', *FLAGS]
  both = [
    start(
      'train.py',
      f'--workdir={tmp_path / "two"}',
      '--config.pipeline_stages=2',
      f'--coordinator={address}',
      '--processes=2',
      f'--process={i}',
      *flags,
    )
    for i in range(2)
  ]
  alone = start('train.py', f'--workdir={tmp_path / "one"}', *flags)
  errors = [process.communicate(timeout=300)[1] for process in (*both, alone)]
  assert [process.returncode for process in (*both, alone)] == [0, 0, 0], errors
  for there, here in zip(state(tmp_path / 'two'), state(tmp_path / 'one'), strict=True):
    np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize(
  'processes, shares',
  [
    ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
    ([[0, 1]], [(0, 1), (0, 1)]),
    ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]),
    ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ],
)
def test_processes_of_one_pipeline_read_the_same(processes, shares, monkeypatch):
  device = lambda process: types.SimpleNamespace(process_index=process)
  mesh = types.SimpleNamespace(
    axis_names=('data', 'stage'),
    devices=[[device(process) for process in row] for row in processes],
  )
  for process, share in enumerate(shares):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    assert update._share(mesh) == share


@pytest.mark.parametrize('fields, message', [
    ({'pipeline_stages': 3}, '3; allowed: divisors of 8, the number of devices'),
    ({'pipeline_stages': 2, 'batch_size': 6}, '6; allowed: multiples of 4, the number of devices of a stage'),
    ({'pipeline_stages': 2, 'algorithm': 'BP'},
     '2, but BP learns from a loss at the end of the network, which all blocks must wait for; allowed: 1, or one of '
     'LG-BP, LG-FA, '),
    ({'pipeline_stages': 2, 'algorithm': 'L-FA'}, '2, but L-FA sends a gradient from block to block; allowed: 1, or'),
    ({'pipeline_stages': 2, 'algorithm': 'DFA'}, '2, but DFA learns from a loss at the end'),
    ({'pipeline_stages': 2, 'algorithm': 'FG-W'}, '2, but FG-W learns from a loss at the end'),
    ({'pipeline_stages': 2, 'algorithm': 'LG-BP', 'losses__overlap': True}, '2, but losses.overlap=True lets every'),
    ({'pipeline_stages': 8, 'losses__every': 2}, '8; allowed: 1 … 4, the number of parts of the network with losses'),
    ({'pipeline_stages': 4, 'optimizer__name': 'lars'},
     "4, but optimizer.name='lars' takes one ratio for all blocks of 'blocks', which are not all in one stage; "
     'allowed: 1, or sgd,'),
    ({'pipeline_stages': 0}, '0; allowed: 1 or more'),
], ids=str)  # fmt: skip
def test_refused_in_one_line(fields, message):
  with pytest.raises(UserError) as error:
    train.prepare(perceptron(**fields))
  field = 'batch_size' if 'batch_size' in fields else 'pipeline_stages'
  assert str(error.value).startswith(f'{field} is {message}') and '\n' not in str(error.value)
