"""Seconds of training until the test error has fallen to given thresholds, by algorithm.

    python experiments/bench/time_to_accuracy.py --config=configs/mnist.py
        [--algorithms=BP,LG-BP,LG-FG-A,LG-FG-A+] [--thresholds=4,3,2.5] [--seeds=0,1,2]
        [--rates='BP=1e-3|3e-4,LG-FG-A+=1e-3'] [--interval=100] [--max_epochs=20] [--out=DIR]
        [--config.field=value …]

The runs of a seed take turns, --interval steps each, so that other work on the machine slows down
all of them. Compilation and evaluation are not counted. Learning rates are constant, because a
run's time would otherwise depend on its planned length. An algorithm has the config's rate, or
several in --rates. Of these, the best is the first to reach the strictest threshold that any of
them reaches. A run ends at its last threshold or after --max_epochs. Thresholds are in %, with
defaults for MNIST and CIFAR-10. DIR gets time_to_accuracy.json, .md and .png. If run again, the
program keeps the finished runs.
"""

import copy
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import time_to_accuracy_report as report
from ml_collections import ConfigDict

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, configs, train
from lfg_jax.training.run import results

ALGORITHMS = 'BP,LG-BP,LG-FG-A,LG-FG-A+'
THRESHOLDS = {'mnist': [4.0, 3.0, 2.5], 'cifar10': [55.0, 50.0, 45.0, 40.0]}
NAME = 'time_to_accuracy'

Curve = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Trains, measures and writes."""
  options, config = _parse(arguments)
  names = options.algorithms
  rates = _rates(options.rates, names, config.optimizer.learning_rate)
  cases = [(name, rate) for name in names for rate in rates[name]]
  dataset = None
  for name in names:  # all mistakes before any long work
    dataset = train.prepare(_variant(config, name, rates[name][0], 0), dataset).dataset
  settings = _settings(config, options)
  folder = results.Folder(options.out, __file__, arguments)
  curves = _kept(folder.path / f'{NAME}.json', settings)
  for seed in options.seeds:
    done = [_case(curve) for curve in curves]
    runs = [
      Training(train.prepare(_variant(config, *case, seed), dataset), options)
      for case in cases
      if (*case, seed) not in done
    ]
    while any(not run.curve['finished'] for run in runs):
      for run in runs:
        if not run.curve['finished']:
          run.advance()
          _write(folder, settings, [*curves, *(run.curve for run in runs)])
    curves += [run.curve for run in runs]
  rows = report.rows(curves, options.thresholds)
  report.draw(folder.path / f'{NAME}.png', curves, rows, options.thresholds)
  folder.write_table(NAME, report.table(rows, {**folder.origin, 'settings': settings}))


def _parse(arguments: list[str]) -> tuple[command_line.Options, ConfigDict]:
  parser = results.parser(__doc__, out=None, config='mnist', algorithms=ALGORITHMS, seeds='0,1,2')
  parser.numbers('thresholds', None, 'test errors in %, with commas, falling', least=0, kind=float)
  parser.option('rates', '', "of algorithms: 'BP=1e-3|3e-4,LG-BP=1e-3'")
  parser.number('interval', 100, 'steps between evaluations')
  parser.number('max_epochs', 20)
  options, config = command_line.parse(parser, arguments)
  options.thresholds = options.thresholds or THRESHOLDS.get(config.dataset)
  if not options.thresholds:
    raise UserError(f'{config.dataset} has no default thresholds; give --thresholds, in %')
  if options.thresholds != sorted(options.thresholds, reverse=True):
    shown = ','.join(f'{threshold:g}' for threshold in options.thresholds)
    raise UserError(f'--thresholds is {shown!r}; allowed: falling numbers')
  options.out = options.out or pathlib.Path('runs', 'time_to_accuracy', config.dataset)
  if config.init_from:
    raise UserError(f'init_from is {config.init_from!r}; allowed here: None')
  config.optimizer.schedule, config.epochs = 'constant', options.max_epochs
  return options, config


def _rates(text: str, names: list[str], default: float) -> dict[str, list[float]]:
  """The learning rates to try, by algorithm."""
  rates = {name: [default] for name in names}
  for part in text.split(',') if text else ():
    name, _, values = part.partition('=')
    if name not in rates:
      raise UserError(f'--rates has {name!r}; allowed: {", ".join(names)}')
    try:
      rates[name] = [float(value) for value in values.split('|')]
    except ValueError as error:
      raise UserError(f'--rates has {part!r}; allowed: ALGORITHM=RATE|RATE…') from error
  return rates


def _variant(config: ConfigDict, algorithm: str, rate: float, seed: int) -> ConfigDict:
  variant = copy.deepcopy(config)
  variant.algorithm, variant.optimizer.learning_rate, variant.seed = algorithm, rate, seed
  return variant


def _settings(config: ConfigDict, options: command_line.Options) -> dict[str, Any]:
  """The settings that all runs in one folder have in common."""
  fields = json.loads(configs.to_json(_variant(config, '', 0.0, 0)))
  for field in ('data_dir', 'init_from'):  # says where the data is, not which; refused above
    del fields[field]
  return {'config': fields, 'thresholds': options.thresholds, 'interval': options.interval}


def _case(curve: Curve) -> tuple[str, float, int]:
  return curve['algorithm'], curve['rate'], curve['seed']


def _kept(path: pathlib.Path, settings: dict[str, Any]) -> list[Curve]:
  """The curves of finished runs in the file of results; none if there is no such file."""
  if not path.exists():
    return []
  content = json.loads(path.read_text())
  if content['settings'] != settings:
    raise UserError(f'{path} was measured with other settings; name another folder with --out')
  return [curve for curve in content['curves'] if curve['finished']]


def _write(folder: results.Folder, settings: dict[str, Any], curves: list[Curve]) -> None:
  finished = [curve for curve in curves if curve['finished']]
  rows = report.rows(finished, settings['thresholds'])
  folder.write(NAME, settings=settings, rows=rows, curves=curves)


class Training:
  """One compiled run, which is trained interval by interval.

  Attributes:
    curve: test errors, with the steps and the seconds of training before each; 'finished' is True
      once no more will come.
  """

  def __init__(self, job: train.Job, options: command_line.Options) -> None:
    self.interval, self.strictest = options.interval, options.thresholds[-1]
    self.functions, state = train.build(*job)
    error = 100 * self.functions.test_error(state)
    self.state = self.functions.begin(state)
    self.total = options.max_epochs * self.functions.feed.steps
    _, inputs = next(self.functions.feed.epoch(0, 0))
    # The first step compiles. It gets a copy, because it takes over its argument's memory.
    jax.block_until_ready(self.functions.steps(jax.tree.map(jnp.copy, self.state), 1, inputs))
    self.curve = {
      'algorithm': job.config.algorithm,
      'rate': job.config.optimizer.learning_rate,
      'seed': job.config.seed,
      'steps': [0],
      'seconds': [0.0],
      'test_error_percent': [error],
      'finished': False,
    }

  def advance(self) -> None:
    """Trains for an interval, timing it, and evaluates."""
    step = self.curve['steps'][-1]
    end = min(step + self.interval, self.total)
    begin = time.perf_counter()
    while step < end:
      epoch, first = divmod(step, self.functions.feed.steps)
      for count, inputs in self.functions.feed.epoch(epoch, first):
        count = min(count, end - step)
        self.state = self.functions.steps(self.state, count, inputs)
        step += count
        if step == end:
          break
    self.state = jax.block_until_ready(self.functions.finish(self.state, inputs))
    seconds = time.perf_counter() - begin
    error = 100 * self.functions.test_error(self.functions.whole(self.state))
    is_finite = int(self.state.bad_step) < 0
    self.curve['steps'].append(step)
    self.curve['seconds'].append(self.curve['seconds'][-1] + seconds)
    self.curve['test_error_percent'].append(error if is_finite else 100.0)
    self.curve['finished'] = step == self.total or error <= self.strictest or not is_finite
    name, rate, seed = _case(self.curve)
    print(
      f'{name}, rate {rate:g}, seed {seed}: step {step}, {self.curve["seconds"][-1]:.1f} s, '
      f'test error {error:.2f} %',
      flush=True,
    )


if __name__ == '__main__':
  command_line.run(main)
