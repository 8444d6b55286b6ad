"""Prepares a data set for training: `python experiments/prepare_data.py --help`."""

from lfg_jax.training import command_line
from lfg_jax.training.prepare_data import main

if __name__ == '__main__':
  command_line.run(main)
