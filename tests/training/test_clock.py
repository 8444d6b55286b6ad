"""Where time goes, traces of steps, and how far dispatch runs ahead."""

import time

import jax
import jax.numpy as jnp
import pytest

from lfg_jax.errors import UserError
from lfg_jax.training import train
from lfg_jax.training.cost import profiling
from lfg_jax.training.run import clock
from lfg_jax.training.update import Feed
from tests.runs import STEPS, tiny


def test_compilation_counts_as_compilation_wherever_it_happens():
  watch = clock.Clock(time.monotonic())
  function = jax.jit(lambda x: jax.jit(lambda y: jnp.linalg.qr(y @ y.T)[0])(x) + jnp.cumsum(x, 1))
  begin = time.monotonic()
  with watch.on('steps'):
    jax.block_until_ready(function(jnp.ones((3, 3))))
    time.sleep(0.2)
  whole, read = time.monotonic() - begin, watch.read()
  assert 0 < read['compiling'] < whole - 0.2
  assert 0.2 <= read['steps'] < whole - read['compiling'] + 0.01
  with watch.on('steps'):
    jax.block_until_ready(function(jnp.ones((3, 3))))
  assert watch.read()['compiling'] == read['compiling']


def test_compilation_inside_another_counts_once(monkeypatch):
  monkeypatch.setattr(clock, '_spans', [])
  for begin, end in ((1, 2), (2, 4), (0, 5), (6, 7)):
    clock._compiled('/jax/core/compile/backend_compile_duration', begin, end)
  clock._compiled('/jax/checkpoint/write', 8, 20)
  assert clock.compiling() == 6


def test_waiting_for_items_counts_as_input():
  watch = clock.Clock(time.monotonic())

  def items():
    for i in range(2):
      time.sleep(0.1)
      yield i

  for _ in watch.waiting(items()):
    time.sleep(0.3)
  assert 0.2 <= watch.read()['input'] < 0.4


def test_a_clock_goes_on_from_what_was_stored():
  watch = clock.Clock(time.monotonic() - 1)
  with watch.on('evaluation'):
    time.sleep(0.01)
  watch.go_on({'seconds': 10, 'evaluation': 2, 'compiling': 3})
  read = watch.read()
  assert 11 <= read['seconds'] < 12 and 2 < read['evaluation'] < 3 <= read['compiling'] < 4
  watch.go_on({'seconds': 5})  # stored by an older version
  assert watch.read()['seconds'] >= 16


@pytest.mark.parametrize(
  'steps, traced',
  [('1:1', (0, 9)), ('9:9', (0, 9)), ('10:10', (9, 18)), ('9:10', (0, 18)), ('12:25', (9, 27))],
)
def test_a_trace_has_the_dispatches_of_its_steps(steps, traced, monkeypatch, tmp_path):
  now, seen = [0], []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: seen.append(now[0]))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: seen.append(now[0]))
  for active in (True, False):
    with profiling.Trace(tmp_path, steps, active=active) as trace:
      for step in range(0, 45, 9):
        now[0] = step
        trace.before(step, 9)
        now[0] = step + 9
        trace.after(step + 9, jnp.ones(()))
  assert tuple(seen) == traced


def test_a_run_that_goes_on_behind_the_steps_has_no_trace(monkeypatch, tmp_path):
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: pytest.fail('traces'))
  with profiling.Trace(tmp_path, '3:9', active=True) as trace:
    trace.before(9, 9)
    trace.after(18, jnp.ones(()))


def test_a_trace_ends_with_the_run(monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: seen.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: seen.append('stop'))
  with profiling.Trace(tmp_path, '1:9', active=True) as trace:
    trace.before(0, 3)
  assert seen == ['start', 'stop']


def test_a_trace_past_the_end_is_refused():
  profiling.check(f'1:{2 * STEPS}', 2 * STEPS)
  with pytest.raises(
    UserError, match=rf"^profile is '5:{2 * STEPS + 1}'; allowed: 1 … {2 * STEPS}, the steps"
  ):
    train.prepare(tiny(profile=f'5:{2 * STEPS + 1}'))


@pytest.mark.full
def test_a_run_leaves_a_trace_and_tells_where_its_time_went(tmp_path):
  summary = train.train(
    train.prepare(tiny(profile='10:12', steps_per_dispatch=1)), tmp_path / 'run'
  )
  (trace,) = (tmp_path / 'run' / 'tensorboard').glob('plugins/profile/*/*.xplane.pb')
  assert trace.stat().st_size
  assert summary['time'].keys() == {*clock.PARTS, 'other'}
  assert sum(summary['time'].values()) == pytest.approx(summary['seconds'], abs=0.05)
  assert min(summary['time'][part] for part in ('compiling', 'steps', 'checkpoints')) > 0
  rate = summary['flop_per_second']
  assert rate == pytest.approx(
    train.prepare(tiny()).algorithm.flop * 64 * 2 * STEPS / summary['time']['steps'], rel=0.05
  )


def test_no_more_than_two_dispatches_are_not_done(monkeypatch):
  ahead, states = [], []

  @jax.jit
  def step(state):
    busy = jax.lax.fori_loop(0, 2000, lambda _, x: jnp.sin(x), jnp.ones(10_000)).sum()
    return state._replace(step=state.step + 1, bad_step=jnp.where(busy > 1e9, 1, -1))

  def steps(state, count, inputs):
    ahead.append(sum(not old.bad_step.is_ready() for old in states))
    states.append(step(state))
    return states[-1]

  epoch = lambda epoch, first: ((1, ()) for _ in range(first, 20))
  functions = train.Functions(Feed(20, None, (), epoch, 1, False), steps, None, None)
  state = train.TrainState(
    jnp.zeros((), jnp.int32),
    {},
    {},
    {},
    {'examples': jnp.ones(()), 'error': jnp.ones(())},
    jnp.full((), -1),
  )
  quiet = type(
    'Quiet',
    (),
    {name: lambda *_, **__: None for name in ('progress', 'before', 'after', 'ask', 'stops')},
  )()
  monkeypatch.setattr(train, 'REFRESH_SECONDS', 1e9)
  train._epoch(functions, state, 0, 1, train.Observers(clock.Clock(0), quiet, quiet, quiet))
  assert len(ahead) == 20 and max(ahead) == train.IN_FLIGHT
