"""CIFAR-10."""

from ml_collections import ConfigDict

from lfg_jax.training import configs


def get_config() -> ConfigDict:
  config = configs.base()
  config.dataset = 'cifar10'
  config.model.size = 'M/8/16'
  config.optimizer.name = 'adam'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = 'cosine'
  config.epochs = 100
  config.batch_size = 128
  return config
