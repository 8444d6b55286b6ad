"""CIFAR-10, contrastive: two augmented views, projection heads, a linear read-out on the side."""

from ml_collections import ConfigDict

from lfg_jax.training import configs


def get_config() -> ConfigDict:
  config = configs.base()
  config.dataset = 'cifar10'
  config.objective = 'contrastive'
  config.model.size = 'M/8/16'
  config.contrastive.min_area = 0.3  # forward gradients learn more from milder crops
  config.optimizer.name = 'adam'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = 'cosine'
  config.optimizer.readout_multiplier = 1.0
  config.epochs = 400
  config.batch_size = 256
  return config
