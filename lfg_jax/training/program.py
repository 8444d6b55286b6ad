"""Trains one model: the program `lfg-train`, in the repository also `python experiments/train.py`.

    lfg-train [--config=NAME or FILE] [--workdir=DIR] [--config.field=value …] [--print_config]
        [--coordinator=HOST:PORT --processes=N --process=I | --rehearse=N]

If run again with the same arguments, it continues where it stopped.
"""

import argparse
import functools
import os
import pathlib

from ml_collections import ConfigDict

from lfg_jax import user_files
from lfg_jax.errors import UserError
from lfg_jax.training import command_line, config_checks, configs, guard, launch, processes
from lfg_jax.training import workdir as folders
from lfg_jax.training.processes import Place
from lfg_jax.training.train import prepare, train


def main(arguments: list[str]) -> None:
  """Trains a model and prints the summary."""
  parser = command_line.Parser(description=__doc__)
  parser.add_argument(
    '--config', default='digits', help='name of a config that comes with the package, or a file'
  )
  in_files = functools.partial(user_files.local, '--workdir')
  parser.add_argument('--workdir', type=in_files, help='default: runs/NAME')
  parser.add_argument(
    '--print_config', action='store_true', help='print the config that would run, and end'
  )
  parser.add_argument(
    '--coordinator',
    help='of several processes: HOST:PORT of the first; '
    'default: $JAX_COORDINATOR_ADDRESS, or as the cluster tells',
  )
  parser.add_argument('--processes', type=int, help='how many; default: $JAX_NUM_PROCESSES')
  parser.add_argument('--process', type=int, help='which this is, from 0; default: $JAX_PROCESS_ID')
  parser.number('rehearse', None, 'N processes on the CPUs of this machine', metavar='N')
  options, config = command_line.parse(parser, arguments)
  config_checks.validate(config)
  if options.print_config:
    print(configs.to_json(config), end='')
    return
  workdir = options.workdir or pathlib.Path('runs', pathlib.Path(options.config).stem)
  at = _place(options, config)
  if at is None:
    _train(config, workdir)
    return
  launch.run(functools.partial(_train, config, workdir, at))


def _place(options: argparse.Namespace, config: ConfigDict) -> Place | None:
  """This process's place, now in a child of a guard; None if the run has only one process."""
  given = Place(options.coordinator, options.processes, options.process)
  if options.rehearse is not None:
    if given != Place():
      raise UserError(
        '--rehearse starts all processes itself; allowed: it, or --coordinator --processes --process'
      )
    return launch.rehearse(options.rehearse, config.lost_after)
  at = launch.find_place(given, os.environ)
  if at is None and config.distributed:
    at = Place()
  if at is not None:
    guard.guard([at.process], grace=0)
  return at


def _train(config: ConfigDict, workdir: pathlib.Path, at: Place | None = None) -> None:
  if at is not None:
    processes.connect(at, config.lost_after)
  earlier = processes.is_first() and folders.is_finished(workdir, config)
  summary = train(prepare(config), workdir)
  if not earlier:  # else `train` has said so
    processes.say(f'{workdir}:', '  '.join(f'{name} {value}' for name, value in summary.items()))


def run() -> None:
  """The console script."""
  command_line.run(main)
