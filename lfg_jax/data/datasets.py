"""Data sets by name: small ones as arrays that live on the device, ImageNet as a stream.

`digits` is part of the package: the 1,797 8×8 images that scikit-learn has, the test part of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository,
doi 10.24432/C50P49, CC BY 4.0). The others are TFDS data sets, prepared as array_record files by
`training.prepare_data` and read without TensorFlow.
"""

import importlib.resources
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax.data.streams import BadExample, Batch, Source, Stream, decode


class Arrays(NamedTuple):
  """A split that fits in memory."""
  image_NxHxWxC: np.ndarray | jax.Array    # uint8
  label_N: np.ndarray | jax.Array          # int32

  @property
  def examples(self) -> int:
    """How many there are."""
    return len(self.label_N)


class Dataset(NamedTuple):
  """A data set with its per-channel statistics, in units where pixels are 0 … 1."""
  name: str
  classes: int
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  train: Arrays | Stream
  test: Arrays | Stream


class _Facts(NamedTuple):
  classes: int
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  test_split: str = 'test'


TFDS = {
    'mnist': _Facts(10, (28, 28, 1), (0.1307,), (0.3081,)),
    'fashion_mnist': _Facts(10, (28, 28, 1), (0.2860,), (0.3530,)),
    'cifar10': _Facts(10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # ImageNet's own test split has no labels: the field reports the validation split.
    'imagenet2012': _Facts(1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 'validation'),
}
NAMES = ('digits', *TFDS)


def load(name: str, *, data_dir: str | None = None, image_size: int | None = None, seed: int = 0,
         whole_images: bool = False, workers: int = 0) -> Dataset:
  """A data set by name.

  Args:
    name: one of `NAMES`.
    data_dir: where TFDS keeps its data sets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
    image_size: height and width of streamed images (224); arrays have their own.
    seed: of a stream's order and crops; arrays are shuffled by `epoch_order`.
    whole_images: a training stream crops no more than it must, because views are cropped on the device.
    workers: processes that read a stream; 0: threads of this one.

  Raises:
    ValueError: unknown name, another image size than the arrays have, files without random access.
    FileNotFoundError: the data set is not there; the message has the command that prepares it.

  >>> digits = load('digits')
  >>> digits.image_shape, digits.train.examples, digits.test.examples
  ((8, 8, 1), 1438, 359)
  """
  if name not in NAMES:
    raise ValueError(f'unknown dataset {name!r}; allowed: {", ".join(NAMES)}')
  own_size = 8 if name == 'digits' else TFDS[name].image_shape[0]
  if name != 'imagenet2012' and image_size not in (None, own_size):
    raise ValueError(f'image_size={image_size} is not for {name}, whose images are {own_size}x{own_size}')
  if name == 'digits':
    return _digits()
  facts = TFDS[name]
  train, test = (_source(name, split, data_dir) for split in ('train', facts.test_split))
  if name == 'imagenet2012':
    size = image_size or own_size
    return Dataset(name, facts.classes, (size, size, 3), facts.mean, facts.std,
                   Stream(train, size, train=True, min_area=1.0 if whole_images else 0.3, seed=seed,
                          workers=workers, classes=facts.classes),
                   Stream(test, size, train=False, seed=seed, workers=workers, classes=facts.classes))
  return Dataset(name, *facts[:4], _arrays(train, facts), _arrays(test, facts))


def epoch_order(key: jax.Array, n: int, batch_size: int) -> jax.Array:
  """A random permutation of 0 … n−1 cut into rows, int32 [steps, B]; the last row is filled up with −1.

  >>> sorted(epoch_order(jax.random.key(0), 5, 3).ravel().tolist())
  [-1, 0, 1, 2, 3, 4]
  """
  return _rows(jax.random.permutation(key, n), batch_size)


def sequential_order(n: int, batch_size: int) -> jax.Array:
  """0 … n−1 cut into rows, int32 [steps, B]; the last row is filled up with −1.

  >>> sequential_order(5, 3).tolist()
  [[0, 1, 2], [3, 4, -1]]
  """
  return _rows(jnp.arange(n), batch_size)


def _rows(order_N: jax.Array, batch_size: int) -> jax.Array:
  padding = -len(order_N) % batch_size
  return jnp.pad(order_N.astype(jnp.int32), (0, padding), constant_values=-1).reshape(-1, batch_size)


def take(arrays: Arrays, row_B: jax.Array) -> Batch:
  """The examples that a row of an order names; all zeros where it is −1.

  Pure, for use under jit and shard_map: with `arrays` on every device, `row_B` may be a device's part.

  >>> arrays = Arrays(np.full((2, 1, 1, 1), 7, np.uint8), np.array([3, 4], np.int32))
  >>> batch = take(arrays, jnp.array([1, -1]))
  >>> batch.image.ravel().tolist(), batch.label.tolist(), batch.weight.tolist()
  ([7, 0], [4, 0], [1.0, 0.0])
  """
  real_B = row_B >= 0
  index_B = jnp.where(real_B, row_B, 0)
  image_BxHxWxC = jnp.asarray(arrays.image_NxHxWxC)[index_B]
  return Batch(jnp.where(real_B[:, None, None, None], image_BxHxWxC, jnp.uint8(0)),
               jnp.where(real_B, jnp.asarray(arrays.label_N)[index_B], 0), real_B.astype(jnp.float32))


def _digits() -> Dataset:
  """Test: the 3rd, 8th, 13th … example of every class, 359 in all: a rule needs no random generator."""
  with (importlib.resources.files('lfg_jax.data') / 'digits.npz').open('rb') as file, np.load(file) as stored:
    image_Nx8x8, label_N = stored['image'], stored['label'].astype(np.int32)
  image_Nx8x8x1 = np.round(image_Nx8x8[..., None] * (255 / 16)).astype(np.uint8)    # stored as 0 … 16
  is_test_N = np.zeros(len(label_N), bool)
  for label in range(10):
    is_test_N[np.flatnonzero(label_N == label)[2::5]] = True
  train, test = (Arrays(image_Nx8x8x1[part_N], label_N[part_N]) for part_N in (~is_test_N, is_test_N))
  pixels = train.image_NxHxWxC / 255
  return Dataset('digits', 10, (8, 8, 1), (float(pixels.mean()),), (float(pixels.std()),), train, test)


def _source(name: str, split: str, data_dir: str | None) -> Source:
  """A split of a prepared TFDS data set, images still encoded.

  Looks for the files itself: on a data set that is not there, TFDS tries to download it for minutes.
  """
  import tensorflow_datasets as tfds  # here: half a second that `digits` does without

  place = tfds.core.Path(data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()
  command = f'python -m lfg_jax.training.prepare_data --dataset={name} --data_dir={place}'
  folders = [info.parent for info in (place / name).glob('*/dataset_info.json')]
  folders = [folder for folder in folders if tfds.core.Version.is_valid(folder.name)]
  if not folders:
    raise FileNotFoundError(f'dataset {name} is not in {place}; prepare it with: {command}')
  folder = max(folders, key=lambda folder: tfds.core.Version(folder.name))
  builder = tfds.builder_from_directory(folder)
  info = builder.info
  if split not in info.splits or not all(path.exists() for path in info.splits[split].filepaths):
    raise FileNotFoundError(f'{folder} lacks files of the {split} split; remove it and run: {command}')
  if info.file_format.value != 'array_record':
    raise ValueError(f'{folder} is in the format {info.file_format.value}, which has no random access; '
                     f'choose another data_dir, or remove this folder and run: {command}')
  # TFDS's own decoding takes twice as long for small images.
  return builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})


def _arrays(source: Any, facts: _Facts) -> Arrays:
  """All examples of a source, decoded."""
  image_NxHxWxC = np.empty((len(source), *facts.image_shape), np.uint8)
  label_N = np.empty(len(source), np.int32)
  # Read at once: twice as fast as one by one, and the encoded files are smaller than the arrays.
  for i, example in enumerate(source.__getitems__(list(range(len(source))))):
    image, label_N[i] = decode(example, i, facts.classes)
    height, width, colours = facts.image_shape
    if image.size != (width, height):
      raise BadExample(f'example {i} has an image of {image.height}x{image.width}; allowed: {height}x{width}')
    image_NxHxWxC[i] = np.asarray(image)[..., :colours]    # the three of a grey image are the same
  return Arrays(image_NxHxWxC, label_N)
