"""Trains one model.

    python experiments/train.py [--config=configs/NAME.py] [--workdir=DIR] [--config.field=value …]

Run again with the same arguments, it goes on where it stopped.
"""

import argparse
import pathlib
import sys

from lfg_jax import configs
from lfg_jax.train import Interrupted, prepare, train

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def main(arguments: list[str]) -> int:
  """Returns the exit code: 2 for a mistake in the arguments or a loss that is not finite."""
  parser = configs.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                          allow_abbrev=False)
  parser.add_argument('--config', default=str(CONFIGS / 'digits.py'), help='default: configs/digits.py')
  parser.add_argument('--workdir', type=pathlib.Path, help='default: runs/NAME')
  try:
    options, config = configs.parse(parser, arguments)
    summary = train(prepare(config), options.workdir or pathlib.Path('runs', pathlib.Path(options.config).stem))
  except configs.UserError as error:
    print(f'train.py: {error}', file=sys.stderr)
    return 2
  except Interrupted as interruption:
    print(f'train.py: {interruption}', file=sys.stderr)
    return 128 + interruption.signum
  print('  '.join(f'{name} {value}' for name, value in summary.items()))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
