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

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, configs
from lfg_jax.training.hosts import connect, processes
from lfg_jax.training.hosts.processes import Membership
from lfg_jax.training.run.summary import last_line
from lfg_jax.training.train import prepare, train


def main(arguments: list[str]) -> None:
  """Trains a model and prints the summary."""
  parser = command_line.Parser(__doc__)
  parser.option('config', 'digits', 'name of a config that comes with the package, or a file')
  parser.path('workdir', None, 'folder of the run; default: runs/NAME')
  parser.switch('print_config', 'print the config that would run, and end')
  parser.option(
    'coordinator',
    None,
    'of several processes: HOST:PORT of the first; default: $JAX_COORDINATOR_ADDRESS, or as the '
    'cluster tells',
  )
  parser.number('processes', None, 'how many; default: $JAX_NUM_PROCESSES')
  parser.number('process', None, 'which this is, from 0; default: $JAX_PROCESS_ID', least=0)
  parser.number('rehearse', None, 'number of processes, on the CPUs of this machine')
  options, config = command_line.parse(parser, arguments)
  configs.validate(config)
  if options.print_config:
    print(configs.to_json(config), end='')
    return
  workdir = options.workdir or pathlib.Path('runs', pathlib.Path(options.config).stem)
  at = _place(options, config, arguments)
  if at is None:
    _train(config, workdir)
    return
  connect.run(functools.partial(_train, config, workdir, at))


def _place(
  options: command_line.Options, config: ConfigDict, arguments: list[str]
) -> Membership | None:
  """This process's place; None if the run has only one process. A rehearsal never returns."""
  given = Membership(options.coordinator, options.processes, options.process)
  if options.rehearse is not None:
    if given != Membership():
      raise UserError(
        '--rehearse starts all processes itself; allowed: it, or --coordinator --processes --process'
      )
    rehearse = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    rehearse.add_argument('--rehearse')
    connect.rehearse(options.rehearse, rehearse.parse_known_args(arguments)[1])
  at = connect.find_membership(given, os.environ)
  return Membership() if at is None and config.distributed else at


def _train(config: ConfigDict, workdir: pathlib.Path, at: Membership | None = None) -> None:
  if at is not None:
    processes.connect(config, at)
  with processes.together():
    job = prepare(config)
  processes.say(last_line(train(job, workdir)))


def run() -> None:
  """The console script."""
  command_line.run(main)
