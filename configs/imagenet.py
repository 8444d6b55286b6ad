"""ImageNet with the settings of Ren et al. 2023 for L/32/64, on one host with batch size 256."""

from ml_collections import ConfigDict

from lfg_jax.training import configs


def get_config() -> ConfigDict:
  config = configs.base()
  config.dataset = 'imagenet2012'
  config.image_size = 224
  config.model.size = 'L/32/64'
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.05
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 10.0
  config.epochs = 120
  config.batch_size = 256
  return config
