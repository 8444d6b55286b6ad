"""Fashion-MNIST, trained like MNIST."""

from ml_collections import ConfigDict

from lfg_jax.training import configs


def get_config() -> ConfigDict:
  config = configs.base()
  config.dataset = 'fashion_mnist'
  config.model.size = 'M/4/16'
  config.optimizer.name = 'adam'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = 'cosine'
  config.epochs = 30
  config.batch_size = 128
  return config
