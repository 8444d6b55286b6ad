"""Compares the block pipeline, on two processes of one core each, with what the machine can give.

    python experiments/bench/pipeline_throughput.py [--model=M/8/16] [--blocks=N] [--batch=64]
        [--steps=40] [--repetitions=3] [--algorithm=LG-FG-A+] [--cores=0,1] [--link=1e9] [--out=DIR]

The program does --steps steps on two cores in three ways. These take turns, --repetitions times, in
processes that stay alive:

- limit: two processes that do not communicate, each with half of the steps. This is what the
  machine can give: its two cores may be two threads of one core.
- pipeline: two stages, over gloo.
- data: data parallel, each process with half of every batch, over gloo.

Stages consist of whole blocks, so one takes longer than the other and sets the pace. Therefore the
pipeline can reach only a part of the limit, the `balance`: an even share of the cost, divided by
the slower stage's share, both by the cost model.

Bytes are those of the compiled step (see step_cost). From them, the program computes the times on a
link with --link bits per second: measured time + bits / link, without overlap. DIR gets
pipeline_throughput.json.
"""

import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import step_cost
from ml_collections import ConfigDict
from step_cost import virtual_devices

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.fields import one_of
from lfg_jax.models.sizes import parse
from lfg_jax.training import command_line, configs, train, update
from lfg_jax.training.hosts import connect, processes
from lfg_jax.training.pipeline import partition
from lfg_jax.training.rules import algorithms, rules
from lfg_jax.training.run import results

WAYS = ('limit', 'pipeline', 'data')
Row = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Measures, prints and writes; with --way, works as one of the processes."""
  parser = results.parser(
    __doc__, out='runs/pipeline_throughput', model='M/8/16', batch=64, repetitions=3
  )
  local = [name for name, rule in rules.REGISTRY.items() if rule.cut]
  parser.option('algorithm', 'LG-FG-A+', 'one that learns block by block', allowed=one_of(local))
  parser.number('blocks', 0, 'of the network; 0: as its size implies', least=0)
  parser.number('steps', 40, least=2)
  parser.numbers('cores', '0,1', 'of the two processes', least=0)
  parser.number('link', 1e9, 'bits per second', kind=float)
  parser.option('way', None, None, allowed=one_of(WAYS))  # of one process
  parser.option('coordinator', None, None)
  parser.option('process', None, None, kind=int)
  options = parser.parse(arguments)
  if len(options.cores) != 2:
    raise UserError(f'--cores has {len(options.cores)} of them; allowed: two')
  if options.way:
    work(options)
    return
  seconds = measure(options, arguments)
  virtual_devices(2)
  rows = report(options, seconds)
  folder = results.Folder(options.out, __file__, arguments)
  folder.write('pipeline_throughput', link=options.link, rows=rows)
  print(*rows, sep='\n')


def config_of(options: command_line.Options, way: str) -> ConfigDict:
  """A config for one epoch of --steps steps, dispatched at once."""
  config = configs.base()
  config.algorithm, config.model.size, config.batch_size = (
    options.algorithm,
    options.model,
    options.batch,
  )
  config.model.blocks = options.blocks or None
  config.dataset = 'mnist' if parse(options.model)[1] == 1 else 'cifar10'
  config.steps_per_dispatch = options.steps
  config.pipeline_stages = 2 if way == 'pipeline' else 1
  return config


# --- one process ----------------------------------------------------------------------------------


def work(options: command_line.Options) -> None:
  """Works as one process: trains an epoch for every line that it reads, and prints the seconds."""
  os.sched_setaffinity(0, {options.cores[options.process]})
  steps = options.steps
  if options.way == 'limit':
    steps //= 2
  else:
    at = processes.Membership(options.coordinator, 2, options.process)
    processes.connect(configs.base(), at)
  config = config_of(options, options.way)
  facts = step_cost.images_of(config)
  keys = jax.random.split(jax.random.key(0))
  split = data.Arrays(
    jax.device_get(
      jax.random.randint(keys[0], (steps * options.batch, *facts.image_shape), 0, 256)
    ).astype('uint8'),
    jax.device_get(jax.random.randint(keys[1], (steps * options.batch,), 0, facts.classes)),
  )
  dataset = facts._replace(train=split, test=split)
  algorithm = algorithms.make(config, dataset, update.AXIS)
  job = train.Job(config, dataset, algorithm, update.make_mesh(config.pipeline_stages))
  functions, state = train.build(*job)
  state = functions.begin(state)
  for line in itertools.chain(['compile'], iter(sys.stdin.readline, '')):
    begin = time.perf_counter()
    for count, inputs in functions.feed.epoch(0, 0):
      state = functions.steps(state, count, inputs)
    state = jax.block_until_ready(functions.finish(state, inputs))
    print(f'{line.strip()} {time.perf_counter() - begin}', flush=True)


# --- all of them ----------------------------------------------------------------------------------


def measure(options: command_line.Options, arguments: list[str]) -> dict[str, list[float]]:
  """Seconds of every way and repetition, as measured by the slower process."""
  started: dict[str, list[subprocess.Popen]] = {}
  seconds: dict[str, list[float]] = {way: [] for way in WAYS}
  try:
    # One after the other: processes that wait for each other give up after half a minute.
    for way in WAYS:
      started[way] = start(way, arguments)
      for process in started[way]:
        answer(process)  # it has compiled
    for _ in range(options.repetitions):
      for way, both in started.items():
        for process in both:
          process.stdin.write('go\n')
          process.stdin.flush()
        seconds[way].append(max([answer(process) for process in both]))
  finally:
    for process in (process for both in started.values() for process in both):
      process.kill()
  return seconds


def start(way: str, arguments: list[str]) -> list[subprocess.Popen]:
  """Starts the two processes of a way."""
  address = connect.free_address()
  flags = os.environ.get('XLA_FLAGS', '').split()
  environment = {
    **os.environ,
    'XLA_FLAGS': ' '.join(flag for flag in flags if 'device_count' not in flag),
  }
  command = [
    sys.executable,
    str(pathlib.Path(__file__).resolve()),
    *arguments,
    f'--way={way}',
    f'--coordinator={address}',
  ]
  return [
    subprocess.Popen(
      [*command, f'--process={i}'],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]


def answer(process: subprocess.Popen) -> float:
  """Seconds from a process's next answer; skips the lines that gloo prints."""
  for line in process.stdout:
    if line.startswith(('go ', 'compile ')):
      return float(line.split()[1])
  raise UserError('one of the processes ended; see what it says above')


def balance(options: command_line.Options) -> float:
  """The part of the limit that two stages of unequal cost can reach."""
  config = config_of(options, 'pipeline')
  composition = algorithms.make(config, step_cost.images_of(config), update.AXIS).composition
  costs = partition.costs(composition)
  slowest = max(sum(costs[span.start : span.stop]) for span in partition.spans(composition, 2))
  return sum(costs) / 2 / slowest


def report(options: command_line.Options, seconds: dict[str, list[float]]) -> list[Row]:
  """A row for every way: median time per step, measured and on the link, relative to the limit."""
  sent = {
    'limit': 0,
    **{way: step_cost.cost(config_of(options, way), 2).sent for way in ('pipeline', 'data')},
  }
  median = {way: statistics.median(times) / options.steps for way, times in seconds.items()}
  on_link = {way: median[way] + 8 * sent[way] / options.link for way in WAYS}
  return [
    {
      'way': way,
      'model': options.model,
      'blocks': options.blocks,
      'balance': balance(options) if way == 'pipeline' else 1.0,
      'batch': options.batch,
      'ms_per_step': 1e3 * median[way],
      'part_of_limit': median['limit'] / median[way],
      'sent_bytes': sent[way],
      'ms_per_step_on_link': 1e3 * on_link[way],
      'part_of_limit_on_link': median['limit'] / on_link[way],
      'seconds': seconds[way],
    }
    for way in WAYS
  ]


if __name__ == '__main__':
  command_line.run(main)
