"""Trains one model: the program `lfg-train`, in the repository also `python experiments/train.py`.

    lfg-train [--config=NAME or FILE] [--workdir=DIR] [--config.field=value …] [--print_config]
        [--coordinator=HOST:PORT --processes=N --process=I]

Run again with the same arguments, it goes on where it stopped.
"""

import pathlib

from lfg_jax.training import command_line, configs, processes
from lfg_jax.training.train import prepare, train


def main(arguments: list[str]) -> None:
  """Trains, and prints the summary."""
  parser = command_line.Parser(description=__doc__)
  parser.add_argument('--config', default='digits', help='name of a config that comes with the package, or a file')
  parser.add_argument('--workdir', type=pathlib.Path, help='default: runs/NAME')
  parser.add_argument('--print_config', action='store_true', help='print the config that would run, and end')
  parser.add_argument('--coordinator', help='of several processes: HOST:PORT of the first; default: the cluster tells')
  parser.add_argument('--processes', type=int, help='how many')
  parser.add_argument('--process', type=int, help='which of them this is, from 0')
  options, config = command_line.parse(parser, arguments)
  if options.print_config:
    configs.validate(config)
    print(configs.to_json(config), end='')
    return
  if options.coordinator:
    config.distributed = True
    processes.connect(options.coordinator, options.processes, options.process)
  workdir = options.workdir or pathlib.Path('runs', pathlib.Path(options.config).stem)
  summary = train(prepare(config), workdir)
  print(f'{workdir}:', '  '.join(f'{name} {value}' for name, value in summary.items()))


def run() -> None:
  """The console script."""
  command_line.run(main)
