"""Images: data sets in memory, streams, augmentation.

In reading order: `pictures`, `streaming`, `augmentation`, `tfds_files`, `datasets`.
"""

from lfg_jax.data.datasets import (
  NAMES,
  TFDS,
  Arrays,
  Dataset,
  epoch_order,
  from_arrays,
  load,
  sequential_order,
  take,
)
from lfg_jax.data.streaming import Batch, Stream

__all__ = [
  'NAMES',
  'TFDS',
  'Arrays',
  'Batch',
  'Dataset',
  'Stream',
  'epoch_order',
  'from_arrays',
  'load',
  'sequential_order',
  'take',
]
