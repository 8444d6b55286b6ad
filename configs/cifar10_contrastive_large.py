"""CIFAR-10, contrastive, with the large model."""

import pathlib

from ml_collections import ConfigDict

from lfg_jax.training import configs


def get_config() -> ConfigDict:
  config = configs.load(str(pathlib.Path(__file__).with_name('cifar10_contrastive.py')))
  config.model.size = 'L/8/64'
  return config
