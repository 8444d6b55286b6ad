"""Tests that a run of several processes ends as if undisturbed, despite SIGTERMs and SIGKILLs.

    python experiments/bench/torture.py [--minutes=30] [--seed=0] [--processes=2] [--out=DIR]
        [--config=NAME or FILE] [--config.field=value …]

The run is done once undisturbed. It is then repeated until the time is over, with signals to random
processes at random moments. After each signal, the same command is given again. At the end of every
run, its parameters must be equal to the undisturbed ones bit for bit, and no row of metrics may be
missing or duplicated. DIR gets torture.json.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from lfg_jax.errors import LOST, UserError
from lfg_jax.training import command_line, configs
from lfg_jax.training.hosts import connect
from lfg_jax.training.run import metrics, results
from lfg_jax.training.train import load

TRAIN = pathlib.Path(__file__).parents[1] / 'train.py'
SIGNALS = (signal.SIGTERM, signal.SIGKILL)
EARLY = 0.2  # the fraction of signals that come while the processes start
START_SECONDS = 5.0  # such an early signal comes within this time
PAUSE = (0.1, 20.0)  # seconds from the start of training to any other signal, log-uniform
PATIENCE = 60  # seconds in which all processes must end after a signal to a run that trains
START_PATIENCE = 10  # the same while the processes start and wait for each other
ALLOWED = (0, LOST, *(128 + number for number in (*SIGNALS, signal.SIGABRT)))  # JAX aborts


class Stop(NamedTuple):
  """An attempt that a signal ended.

  Attributes:
    signal, victim: the signal, and the process that got it.
    codes: exit codes of all processes.
    seconds: time from the signal until all processes had ended.
    trained: whether the run had begun to train; before that, processes wait for each other as long
      as JAX does.
  """

  signal: str
  victim: int
  codes: list[int]
  seconds: float
  trained: bool


def main(arguments: list[str]) -> None:
  """Does all runs, prints and writes."""
  parser = results.parser(__doc__, out='runs/torture', config='digits')
  parser.number('minutes', 30, least=0, kind=float)
  parser.number('seed', 0, 'of signals and moments', least=0)
  parser.number('processes', 2, least=2)
  options, config = command_line.parse(parser, arguments)
  configs.validate(config)
  results.claim(options.out, 'torture', 'a torture')
  shutil.rmtree(options.out)
  folder = results.Folder(options.out, __file__, arguments)
  folder.write('torture')  # marks the folder again as that of a torture
  flags = [f'--config={options.config}', *(a for a in arguments if a.startswith('--config.'))]
  whole = options.out / 'whole'
  begin = time.monotonic()
  undisturbed = wait(start(whole, options.processes, flags), None)
  if any(undisturbed):
    raise UserError(f'the undisturbed run ended with {undisturbed}; see above')
  seconds, end = time.monotonic() - begin, time.monotonic() + 60 * options.minutes
  rng, stops, rounds = random.Random(options.seed), [], 0
  while time.monotonic() < end:
    rounds += 1
    stops += torment(options.out / f'round{rounds}', options.processes, flags, rng, end)
    same(whole, options.out / f'round{rounds}')
  found = {'rounds': rounds, 'undisturbed_seconds': seconds, **report(stops)}
  folder.write('torture', **found)
  print({name: value for name, value in found.items() if name != 'stops'})


def start(workdir: pathlib.Path, processes: int, flags: list[str]) -> list[subprocess.Popen]:
  """Starts the processes of a run, on CPUs; their output goes to files beside the folder."""
  address = connect.free_address()
  started = []
  for process in range(processes):
    command = [
      sys.executable,
      str(TRAIN),
      f'--workdir={workdir}',
      f'--coordinator={address}',
      f'--processes={processes}',
      f'--process={process}',
      *flags,
    ]
    with workdir.with_name(f'{workdir.name}-{process}.txt').open('a') as file:
      started.append(
        subprocess.Popen(
          command, stdout=file, stderr=file, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'CI': '1'}
        )
      )
  return started


def wait(running: list[subprocess.Popen], patience: float | None) -> list[int]:
  """Waits for all processes, and returns their exit codes as a shell reports them.

  After `patience` seconds (None: never), it kills those that still run.
  """
  end = time.monotonic() + (float('inf') if patience is None else patience)
  while any(process.poll() is None for process in running):
    if time.monotonic() > end:
      for process in running:
        process.kill()
    time.sleep(0.05)
  codes = [process.returncode for process in running]
  return [128 - code if code < 0 else code for code in codes]


def torment(
  workdir: pathlib.Path, processes: int, flags: list[str], rng: random.Random, end: float
) -> list[Stop]:
  """Takes a run to its end, with signals until the time `end`; returns the stops."""
  stops: list[Stop] = []
  while True:
    running = start(workdir, processes, flags)
    trained = await_moment(running, workdir, rng, end)
    number, victim, sent = rng.choice(SIGNALS), rng.randrange(processes), time.monotonic()
    if sent < end:
      running[victim].send_signal(number)
    codes = wait(running, None if sent >= end else PATIENCE if trained else START_PATIENCE)
    seconds = round(time.monotonic() - sent, 2)
    if not any(codes):
      return stops
    if sent >= end or not set(codes) <= {*ALLOWED} or (trained and seconds > PATIENCE):
      raise UserError(
        f'exit codes {codes}, {seconds} s after {number.name} to process {victim}; '
        f'see {workdir.parent}'
      )
    stops.append(Stop(number.name, victim, codes, seconds, trained))


def await_moment(
  running: list[subprocess.Popen], workdir: pathlib.Path, rng: random.Random, end: float
) -> bool:
  """Waits for a random moment or the time `end`; returns whether the run then trains."""
  begin, rows = time.time(), workdir / 'metrics.jsonl'
  goes_on = lambda: time.monotonic() < end and running[0].poll() is None
  trains = lambda: rows.exists() and rows.stat().st_mtime > begin
  early, place = rng.random() < EARLY, rng.random()
  while not early and goes_on() and not trains():
    time.sleep(0.02)
  pause = START_SECONDS * place if early else PAUSE[0] * (PAUSE[1] / PAUSE[0]) ** place
  until = time.monotonic() + pause
  while goes_on() and time.monotonic() < until:
    time.sleep(0.02)
  return trains()


def same(whole: pathlib.Path, other: pathlib.Path) -> None:
  """Raises UserError if two finished runs differ."""
  rows = [
    [
      {name: value for name, value in row.items() if name != 'examples_per_second'}
      for row in metrics.read_rows(folder / 'metrics.jsonl')
    ]
    for folder in (whole, other)
  ]
  if rows[0] != rows[1]:
    steps = [[row['step'] for row in own] for own in rows]
    raise UserError(f'{other} has other rows than {whole}: steps {steps[1]} and {steps[0]}')
  for a, b in zip(*(jax.tree.leaves(load(folder)[1]) for folder in (whole, other)), strict=True):
    if not np.array_equal(a, b):
      raise UserError(f'{other} has other parameters than {whole}, by up to {np.abs(a - b).max()}')


def report(stops: list[Stop]) -> dict[str, Any]:
  """The number of stops by signal and while training, the slowest end, and all stops."""
  trained = [stop for stop in stops if stop.trained]
  counts = {kind.name: sum(stop.signal == kind.name for stop in stops) for kind in SIGNALS}
  return {
    'signals': counts,
    'while_training': len(trained),
    'slowest_end': max((stop.seconds for stop in trained), default=None),
    'stops': [stop._asdict() for stop in stops],
  }


if __name__ == '__main__':
  command_line.run(main)
