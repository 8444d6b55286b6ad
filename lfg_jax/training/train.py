"""Training: from a config to a folder with checkpoints, metrics, curves and a summary.

A run is a pure function of its config. So a run that was stopped, in whatever way, and then
continued ends as if it had never been stopped.
"""

import collections
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lfg_jax import data, user_files
from lfg_jax.data.streaming import BadExample
from lfg_jax.errors import UserError, as_user_errors
from lfg_jax.training import configs, update
from lfg_jax.training.cost import profiling
from lfg_jax.training.cost.profiling import Trace
from lfg_jax.training.hosts import processes
from lfg_jax.training.hosts.preemption import Interrupted, Signals
from lfg_jax.training.pipeline import partition
from lfg_jax.training.rules import algorithms
from lfg_jax.training.run import metrics, summary, warm_start
from lfg_jax.training.run import workdir as folders
from lfg_jax.training.run.checkpoints import Checkpoints
from lfg_jax.training.run.clock import Clock
from lfg_jax.training.run.metrics import RunLog
from lfg_jax.training.step_functions import Functions, State, build
from lfg_jax.training.update import TrainState

REFRESH_SECONDS = 1.0  # between readings of the running state, which wait for the device
IN_FLIGHT = 2  # the largest number of unfinished dispatches


class Job(NamedTuple):
  """A config that has passed all checks, with the objects that it names."""

  config: ConfigDict
  dataset: data.Dataset
  algorithm: algorithms.Algorithm
  mesh: Mesh


def prepare(config: ConfigDict, dataset: data.Dataset | None = None) -> Job:
  """Checks a config for all mistakes, and loads its data.

  Args:
    config: a run's config.
    dataset: the data set, if a config with the same data has already loaded it; None: load it.

  Raises:
    UserError: one line about the first mistake.
  """
  configs.validate(config)
  with as_user_errors():
    if config.distributed:
      processes.connect(config)
    partition.check_devices(config, jax.device_count())
    dataset = dataset or data.load(
      config.dataset,
      module=config.data.module,
      data_dir=config.data_dir,
      image_size=config.image_size,
      seed=config.seed,
      whole_images=config.objective == 'contrastive',
      workers=config.workers,
    )
    algorithm = algorithms.make(config, dataset, update.AXIS)
    partition.check(config, algorithm.composition)
  job = Job(config, dataset, algorithm, update.make_mesh(config.pipeline_stages))
  job = first_images(job, config.num_train_examples)
  steps = -(-job.dataset.train.examples // config.batch_size)
  profiling.check(config.profile, config.epochs * steps)
  return job


def first_images(job: Job, images: int | None) -> Job:
  """The job with only the first `images` training images (None: all), for short runs.

  Raises:
    UserError: there are fewer images, `images` is less than 1, or the data set is a stream.
  """
  if images is None:
    return job
  split = job.dataset.train
  if not isinstance(split, data.Arrays) or not 0 < images <= split.examples:
    raise UserError(
      f'num_train_examples is {images}; allowed: 1 … {split.examples}, of a data set that fits memory'
    )
  return job._replace(dataset=job.dataset._replace(train=jax.tree.map(lambda x: x[:images], split)))


def load(workdir: pathlib.Path, data_dir: str | None = None) -> tuple[Job, TrainState]:
  """A run's job, and its state from the newest checkpoint.

  Raises:
    UserError: the folder has no run, or no checkpoint.
  """
  config, workdir = configs.base(), user_files.local('workdir', workdir)
  stored: dict[str, Any] = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in folders.stored(workdir).items()
  }
  configs.use_model(config, stored['model.name'], stored['model.module'])
  config.update_from_flattened_dict(
    {**stored, **({'data_dir': data_dir} if data_dir else {}), 'pipeline_stages': 1}
  )
  job = prepare(config)
  state = build(*job)[1]
  with Checkpoints(workdir / 'checkpoints', config.max_to_keep) as checkpoints:
    restored = checkpoints.restore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state), own=False)
  if restored is None:
    raise UserError(f'{workdir} has no checkpoint yet')
  return job, restored[0]


def train(job: Job, workdir: pathlib.Path) -> dict[str, Any]:
  """Starts or continues the run in `workdir`; returns its summary.

  Raises:
    UserError: the folder is not this run's or is in use; the loss or an update became infinite or
      NaN; a disk is full; an example cannot be decoded.
    Interrupted: a signal stopped the run.
  """
  begin, workdir = time.monotonic(), user_files.local('workdir', workdir)
  with as_user_errors((BadExample,)), folders.file_errors(workdir), processes.losses():
    if job.config.init_from and not (workdir / 'config.json').exists():
      # Before there is a folder.
      warm_start.check(user_files.local('init_from', job.config.init_from), job.algorithm)
    with folders.claim(workdir, job.config) as finished, Signals() as signals:
      if finished:
        processes.say(folders.finished_line(workdir))
        return finished
      return _train(job, workdir, Clock(begin), signals)


def _train(job: Job, workdir: pathlib.Path, clock: Clock, signals: Signals) -> dict[str, Any]:
  """`train` in a folder that is already claimed."""
  processes.say('compiling …')
  functions, state = build(*job)
  config, active = job.config, processes.is_first()
  with Checkpoints(workdir / 'checkpoints', config.max_to_keep) as checkpoints, processes.losses():
    with clock.on('checkpoints'):
      restored = checkpoints.restore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    if restored:
      state, stored = restored
      clock.go_on(stored)
      processes.say(f'resuming {workdir} at step {int(state.step)}')
    elif config.init_from:
      state = warm_start.from_run(
        user_files.local('init_from', config.init_from), state, job.algorithm
      )
    state = functions.begin(state)
    total = config.epochs * functions.feed.steps
    with (
      RunLog(workdir, int(state.step), total, config.batch_size, active=active) as log,
      Trace(workdir / 'tensorboard', config.profile, active=active) as trace,
    ):
      observers = Observers(clock, log, signals, trace)
      state = _epochs(config, functions, state, checkpoints, observers)
    with clock.on('checkpoints'):
      checkpoints.close()
  return _finish(job, workdir, functions.whole(state), log.rows, clock)


class Observers(NamedTuple):
  """The objects that observe a run while it trains."""

  clock: Clock
  log: RunLog
  signals: Signals
  trace: Trace


def _epochs(
  config: ConfigDict,
  functions: Functions,
  state: State,
  checkpoints: Checkpoints,
  observers: Observers,
) -> State:
  """Trains for the remaining epochs; returns the final state."""
  steps, clock, signals = functions.feed.steps, observers.clock, observers.signals
  for epoch in range(_first_epoch(int(state.step), steps, observers.log), config.epochs):
    speed = None
    if int(state.step) < (epoch + 1) * steps:
      state, speed = _epoch(functions, state, epoch, config.batch_size, observers)
    if (bad := int(state.bad_step)) >= 0:
      raise UserError(
        f'loss or update became NaN or infinite at step {bad}; the checkpoints of before are '
        'kept; a smaller optimizer.learning_rate may help'
      )
    step, done = int(state.step), epoch + 1
    is_whole, is_last = step == done * steps, step == config.epochs * steps
    evaluates = is_whole and (is_last or done % config.eval_every == 0)
    saves = is_last or signals.stop or (is_whole and done % config.checkpoint_every == 0)
    whole: State = functions.whole(state) if evaluates or saves else None
    error = None
    if evaluates and not signals.stop:
      observers.log.doing('evaluating …')
      with clock.on('evaluation'):
        error = functions.test_error(whole, signals.until_stop)
    has_row = is_whole and not (evaluates and signals.stop)
    if has_row:
      observers.log.write(
        {
          'step': step,
          'epoch': done,
          **_means(state),
          'test_error_percent': None if error is None else 100 * error,
          'learning_rate': float(functions.learning_rate(step - 1)),
          'examples_per_second': speed,
        }
      )
    if saves or signals.stop:
      with clock.on('checkpoints'):
        checkpoints.save(step, whole, clock.read(), error if has_row else None)
    if signals.stop and not (is_last and has_row):
      raise Interrupted(step, signals.stop)
  return state


def _first_epoch(step: int, steps: int, log: RunLog) -> int:
  """The epoch to go on with; one that ended without its row, in its evaluation, is the one."""
  has_row = step == 0 or any(row['step'] == step for row in log.rows)
  return step // steps - (step % steps == 0 and not processes.of_first(has_row))


def _epoch(
  functions: Functions, state: State, epoch: int, batch_size: int, observers: Observers
) -> tuple[State, float | None]:
  """Trains to the end of an epoch, or until a signal or a step that is not finite.

  Also returns the speed in examples per second. The speed excludes the first dispatch, which may
  include compilation; it is None if there is no other dispatch.
  """
  clock, log, whole = observers.clock, observers.log, epoch * functions.feed.steps
  step = first = int(state.step) % functions.feed.steps
  begin, shown, untimed = time.monotonic(), time.monotonic(), 0
  bad_steps: collections.deque[jax.Array] = collections.deque()
  for count, inputs in clock.waiting(functions.feed.epoch(epoch, first)):
    with clock.on('steps'):
      question = observers.signals.ask()
      observers.trace.before(whole + step, count)
      state = functions.steps(state, count, inputs)
      if step == first:
        jax.block_until_ready(state)
        begin, untimed = time.monotonic(), count
        log.progress(int(state.step), epoch=epoch + 1)
      step += count
      # Waits until at most IN_FLIGHT dispatches are unfinished: no signal has to wait for more.
      bad_steps.append(jnp.copy(state.bad_step))
      if len(bad_steps) > IN_FLIGHT and int(bad_steps.popleft()) >= 0:
        break
      observers.trace.after(whole + step, state)
      if time.monotonic() - shown > REFRESH_SECONDS:
        log.progress(int(state.step), epoch=epoch + 1, **_means(state))
        shown = time.monotonic()
      stops = observers.signals.stops(question)
    if stops:
      break
  with clock.on('steps'):
    state = functions.finish(state, inputs)
    log.progress(int(state.step), epoch=epoch + 1, **_means(state))
  timed = step - first - untimed
  return state, timed * batch_size / (time.monotonic() - begin) if timed else None


def _means(state: State) -> dict[str, float]:
  """Mean training metrics of the epoch so far."""
  means = {name: float(value / state.sums['examples']) for name, value in state.sums.items()}
  del means['examples']
  error = 100 * means.pop('error')
  return {'train_error_percent': error, **{f'train_{name}': means[name] for name in means}}


def _finish(
  job: Job, workdir: pathlib.Path, state: TrainState, rows: list[metrics.Row], clock: Clock
) -> dict[str, Any]:
  """Writes the curves and the summary; returns the summary."""
  config, steps, flop = job.config, int(state.step), job.algorithm.flop
  test, last = job.dataset.test.examples, rows[-1]
  facts = {
    'algorithm': config.algorithm,
    'model': config.model.get('size', config.model.name),
    'dataset': job.dataset.name,
    'seed': config.seed,
    'epochs': config.epochs,
    'steps': steps,
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    'train_error_percent': last['train_error_percent'],
    'test_error_percent': last['test_error_percent'],
    'test_mistakes': round(last['test_error_percent'] / 100 * test),
    'test_examples': test,
  }
  all_flop = None if flop is None else flop * steps * config.batch_size
  return summary.write(workdir, facts, rows, clock.read(), all_flop)
