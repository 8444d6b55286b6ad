"""Trains one model.

    python experiments/train.py [--config=configs/NAME.py] [--workdir=DIR] [--config.field=value …]

Run again with the same arguments, it goes on where it stopped.
"""

import argparse
import pathlib

from lfg_jax import configs
from lfg_jax.train import prepare, train

DEFAULT = pathlib.Path(__file__).parent.parent / 'configs' / 'digits.py'


def main(arguments: list[str]) -> None:
  """Trains, and prints the summary."""
  parser = configs.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                          allow_abbrev=False)
  parser.add_argument('--config', default=str(DEFAULT), help='default: configs/digits.py')
  parser.add_argument('--workdir', type=pathlib.Path, help='default: runs/NAME')
  options, config = configs.parse(parser, arguments)
  workdir = options.workdir or pathlib.Path('runs', pathlib.Path(options.config).stem)
  summary = train(prepare(config), workdir)
  print(f'{workdir}:', '  '.join(f'{name} {value}' for name, value in summary.items()))


if __name__ == '__main__':
  configs.run(main)
