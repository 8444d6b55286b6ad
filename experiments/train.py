"""Trains one model.

    python experiments/train.py [--config=configs/NAME.py] [--workdir=DIR] [--config.field=value …]
        [--coordinator=HOST:PORT --processes=N --process=I]

Run again with the same arguments, it goes on where it stopped.
"""

import pathlib

from lfg_jax.training import command_line, processes
from lfg_jax.training.train import prepare, train

DEFAULT = pathlib.Path(__file__).parent.parent / 'configs' / 'digits.py'


def main(arguments: list[str]) -> None:
  """Trains, and prints the summary."""
  parser = command_line.Parser(description=__doc__)
  parser.add_argument('--config', default=str(DEFAULT), help='default: configs/digits.py')
  parser.add_argument('--workdir', type=pathlib.Path, help='default: runs/NAME')
  parser.add_argument('--coordinator', help='of several processes: HOST:PORT of the first; default: the cluster tells')
  parser.add_argument('--processes', type=int, help='how many')
  parser.add_argument('--process', type=int, help='which of them this is, from 0')
  options, config = command_line.parse(parser, arguments)
  if options.coordinator:
    config.distributed = True
    processes.connect(options.coordinator, options.processes, options.process)
  workdir = options.workdir or pathlib.Path('runs', pathlib.Path(options.config).stem)
  summary = train(prepare(config), workdir)
  print(f'{workdir}:', '  '.join(f'{name} {value}' for name, value in summary.items()))


if __name__ == '__main__':
  command_line.run(main)
