"""ImageNet, contrastive, with the settings of Ren et al. 2023 for L/32/64: 16 hosts × 128."""

from ml_collections import ConfigDict

from lfg_jax.training import configs


def get_config() -> ConfigDict:
  config = configs.base()
  config.dataset = 'imagenet2012'
  config.image_size = 224
  config.objective = 'contrastive'
  config.model.size = 'L/32/64'
  config.contrastive.min_area = 0.3
  config.optimizer.name = 'lars'
  config.optimizer.learning_rate = 0.1
  config.optimizer.scale_with_batch = True
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 10.0
  config.epochs = 800
  config.batch_size = 128 * 16
  return config
