"""Trains one model: `python experiments/train.py --help`."""

from lfg_jax.training import command_line
from lfg_jax.training.main import main

if __name__ == '__main__':
  command_line.run(main)
