"""Data sets by name: small ones as arrays on the device, ImageNet as a stream.

`digits` is part of the package: the 1,797 8×8 images from scikit-learn, which are the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, doi 10.24432/C50P49, CC BY 4.0). The others are TFDS data sets (see `prepared`), or your
own.
"""

import dataclasses
import importlib.resources
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax import user_files
from lfg_jax.data import tfds_files
from lfg_jax.data.streaming import Batch, Stream
from lfg_jax.data.tfds_files import Facts


class Arrays(NamedTuple):
  """A split that fits in memory."""

  image_NxHxWxC: np.ndarray | jax.Array  # uint8
  label_N: np.ndarray | jax.Array  # int32

  @property
  def examples(self) -> int:
    """Number of examples."""
    return len(self.label_N)


class Dataset(NamedTuple):
  """A data set with its per-channel statistics, for pixels 0 … 1."""

  name: str
  classes: int
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  train: Arrays | Stream
  test: Arrays | Stream


TFDS = {
  'mnist': Facts(10, (28, 28, 1), (0.1307,), (0.3081,)),
  'fashion_mnist': Facts(10, (28, 28, 1), (0.2860,), (0.3530,)),
  'cifar10': Facts(10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  # ImageNet's own test split has no labels: the field reports the validation split.
  'imagenet2012': Facts(
    1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 'validation'
  ),
}
NAMES = ('digits', *TFDS)
MOST_CLASSES = 10**6


def load(
  name: str,
  *,
  module: str | None = None,
  data_dir: str | None = None,
  image_size: int | None = None,
  seed: int = 0,
  whole_images: bool = False,
  workers: int = 0,
) -> Dataset:
  """A data set by name, or from a file.

  Args:
    name: one of `NAMES`, or the name of any TFDS data set with labels and images of one size, whose
      statistics are then computed.
    module: a Python file with your own data set, as `load(data_dir) -> Dataset` (see
      `from_arrays`); None: the data set with that name.
    data_dir: where TFDS keeps its data sets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
    image_size: height and width of streamed images (224); arrays have their own.
    seed: of a stream's order and crops; `epoch_order` shuffles arrays.
    whole_images: whether a training stream crops as little as possible, because the device crops
      the views.
    workers: number of processes that read a stream; 0: threads of this process.

  Raises:
    ValueError: the name is unknown, the arrays have another image size, or the files do not allow
      random access.
    FileNotFoundError: the data set is not on disk; the message has the command that prepares it.
    UserError: your own file has a mistake.

  >>> digits = load('digits')
  >>> digits.image_shape, digits.train.examples, digits.test.examples
  ((8, 8, 1), 1438, 359)
  """
  if name == 'imagenet2012' and module is None:
    return _imagenet(data_dir, image_size, seed, whole_images, workers)
  if module is not None:
    dataset = _own(module, data_dir)
  else:
    dataset = _digits() if name == 'digits' else _prepared(name, data_dir)
  height, width, _ = dataset.image_shape
  if image_size not in (None, height):
    raise ValueError(
      f'image_size={image_size} is not for {dataset.name}, whose images are {height}x{width}'
    )
  return dataset


def _own(module: str, data_dir: str | None) -> Dataset:
  own = user_files.load('data.module', module, ('load',))
  with user_files.mistakes(f'data.module {module}'):
    dataset = own.load(data_dir and os.path.expanduser(data_dir))
  if not isinstance(dataset, Dataset):
    raise ValueError(
      f'data.module {module}: load gives a {type(dataset).__name__}; allowed: a '
      'lfg_jax.data.Dataset, as data.from_arrays makes it'
    )
  return checked(dataset)


def checked(dataset: Dataset) -> Dataset:
  """The data set, with labels int32, if its splits are as its other fields say.

  Raises:
    ValueError: one line, about the first field that does not fit.

  >>> checked(load('digits')).classes
  10
  """
  name, classes, shape, mean, std, *splits = dataset
  what = f'dataset {name} has'
  if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
    raise ValueError(f'{what} image_shape {shape}; allowed: (H, W, C)')
  for field, numbers, least in (('mean', mean, -math.inf), ('std', std, 0)):
    if len(numbers) != shape[2] or not all(least < number < math.inf for number in numbers):
      allowed = 'finite numbers' if least else 'numbers above 0'
      raise ValueError(
        f'{what} {field} {numbers}; allowed: {allowed}, one for each of {shape[2]} colours'
      )
  taken = [
    _taken(name, which, split, shape, classes)
    for which, split in zip(('train', 'test'), splits, strict=True)
  ]
  return dataset._replace(train=taken[0], test=taken[1])


def _taken(name: str, which: str, split: Any, shape: tuple[int, ...], classes: int) -> Any:
  """A split of `checked`; one of another class than ours is as it is."""
  if isinstance(split, Arrays):
    return _split(name, which, split, tuple(shape), classes)
  if isinstance(split, Stream):
    return _stream(f'dataset {name} has', which, split, tuple(shape), classes)
  if not hasattr(split, 'epoch'):
    raise ValueError(
      f'dataset {name} has a {which} split of type {type(split).__name__}; allowed: data.Arrays, '
      'data.Stream'
    )
  return split


def _stream(what: str, which: str, stream: Stream, shape: tuple[int, ...], classes: int) -> Stream:
  """The stream, if its images and labels are those of its data set."""
  wanted = (stream.image_size, stream.image_size, 3)
  if wanted != tuple(shape):
    raise ValueError(f'{what} image_shape {shape}; its {which} stream gives {wanted}')
  if stream.classes not in (None, classes):
    raise ValueError(f'{what} {classes} classes; its {which} stream has {stream.classes}')
  if not stream.examples:
    raise ValueError(f'{what} a {which} stream of no examples; allowed: 1 or more')
  return stream if stream.classes else dataclasses.replace(stream, classes=classes)


def _imagenet(
  data_dir: str | None, image_size: int | None, seed: int, whole_images: bool, workers: int
) -> Dataset:
  name, facts = 'imagenet2012', TFDS['imagenet2012']
  builder = tfds_files.builder(name, data_dir, NAMES)
  train, test = (tfds_files.source(builder, split) for split in ('train', facts.test_split))
  size = image_size or facts.image_shape[0]
  return Dataset(
    name,
    facts.classes,
    (size, size, 3),
    facts.mean,
    facts.std,
    Stream(
      train,
      size,
      train=True,
      min_area=1.0 if whole_images else 0.3,
      seed=seed,
      workers=workers,
      classes=facts.classes,
    ),
    Stream(test, size, train=False, seed=seed, workers=workers, classes=facts.classes),
  )


def _prepared(name: str, data_dir: str | None) -> Dataset:
  builder = tfds_files.builder(name, data_dir, NAMES)
  facts = TFDS.get(name) or tfds_files.facts(builder)
  # Look for both before reading either.
  sources = [tfds_files.source(builder, split) for split in ('train', facts.test_split)]
  train, test = (tfds_files.arrays(source, facts) for source in sources)
  if facts.mean:
    return Dataset(name, *facts[:4], Arrays(*train), Arrays(*test))
  return from_arrays(name, train, test, facts.classes)


Pair = tuple[np.ndarray, np.ndarray]  # images and labels


def from_arrays(name: str, train: Pair, test: Pair, classes: int | None = None) -> Dataset:
  """A data set of arrays, with the statistics of its training images.

  Args:
    name: for summaries.
    train, test: images uint8 [N, H, W, C], pixels 0 … 255, and labels [N], integers from 0.
    classes: number of classes; None: the largest label in `train`, plus 1.

  Raises:
    ValueError: one line, for arrays of another form.

  >>> image, label = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), np.array([0, 1])
  >>> mine = from_arrays('mine', (image, label), (image, label))
  >>> mine.classes, mine.image_shape, [round(255 * m, 1) for m in mine.mean]
  (2, (2, 2, 3), [10.5, 11.5, 12.5])
  """
  image, label = map(np.asarray, train)
  if classes is None:
    numbers = label if np.issubdtype(label.dtype, np.integer) else ()
    classes = int(np.max(numbers, initial=0)) + 1
  splits = [
    _split(name, which, given, image.shape[1:], classes)
    for which, given in (('train', train), ('test', test))
  ]
  mean_C = image.mean((0, 1, 2), dtype=np.float64)
  # Not np.std, which would take eight times the memory of the images.
  square_C = np.einsum('nhwc,nhwc->c', image, image, dtype=np.float64, casting='safe')
  square_C = square_C / image[..., 0].size
  std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
  if not std_C.all():
    raise ValueError(
      f'dataset {name} has a colour that is the same in all pixels of its training '
      'images; leave it out'
    )
  mean, std = (tuple((numbers / 255).tolist()) for numbers in (mean_C, std_C))
  height, width, colours = image.shape[1:]
  return Dataset(name, classes, (height, width, colours), mean, std, *splits)


def _split(
  name: str, which: str, given: Pair | Arrays, shape: tuple[int, ...], classes: int
) -> Arrays:
  """The arrays of a split, if `from_arrays` allows them."""
  image, label = map(np.asarray, given)
  what = f'dataset {name}: its {which} split has'
  if not isinstance(classes, int | np.integer) or not 1 <= classes <= MOST_CLASSES:
    raise ValueError(f'dataset {name} has {classes!r} classes; allowed: 1 … {MOST_CLASSES}')
  if image.dtype != np.uint8 or image.ndim != 4 or not image.size or image.shape[1:] != shape:
    raise ValueError(
      f'{what} images {image.dtype} {list(image.shape)}; allowed: uint8 [N, H, W, C], '
      'pixels 0 … 255, N at least 1, of one size in both splits'
    )
  if not np.issubdtype(label.dtype, np.integer) or label.shape != image.shape[:1]:
    raise ValueError(
      f'{what} labels {label.dtype} {list(label.shape)} for {len(image)} images; '
      'allowed: an integer for each'
    )
  if label.min() < 0 or label.max() >= classes:
    raise ValueError(f'{what} labels {label.min()} … {label.max()}; allowed: 0 … {classes - 1}')
  return Arrays(image, label.astype(np.int32))


def epoch_order(key: jax.Array, n: int, batch_size: int) -> jax.Array:
  """A random permutation of 0 … n−1 in rows, int32 [steps, B]; the last row is padded with −1.

  >>> sorted(epoch_order(jax.random.key(0), 5, 3).ravel().tolist())
  [-1, 0, 1, 2, 3, 4]
  """
  return _rows(jax.random.permutation(key, n), batch_size)


def sequential_order(n: int, batch_size: int) -> jax.Array:
  """0 … n−1 in rows, int32 [steps, B]; the last row is padded with −1.

  >>> sequential_order(5, 3).tolist()
  [[0, 1, 2], [3, 4, -1]]
  """
  return _rows(jnp.arange(n), batch_size)


def _rows(order_N: jax.Array, batch_size: int) -> jax.Array:
  padding = -len(order_N) % batch_size
  return jnp.pad(order_N.astype(jnp.int32), (0, padding), constant_values=-1).reshape(
    -1, batch_size
  )


def take(arrays: Arrays, row_B: jax.Array) -> Batch:
  """The examples in a row of an order; zeros where the row is −1.

  It is pure, for use under jit and shard_map: with `arrays` on every device, `row_B` may be a
  device's part of the row.

  >>> arrays = Arrays(np.full((2, 1, 1, 1), 7, np.uint8), np.array([3, 4], np.int32))
  >>> batch = take(arrays, jnp.array([1, -1]))
  >>> batch.image.ravel().tolist(), batch.label.tolist(), batch.weight.tolist()
  ([7, 0], [4, 0], [1.0, 0.0])
  """
  real_B = row_B >= 0
  index_B = jnp.where(real_B, row_B, 0)
  image_BxHxWxC = jnp.asarray(arrays.image_NxHxWxC)[index_B]
  return Batch(
    jnp.where(real_B[:, None, None, None], image_BxHxWxC, jnp.uint8(0)),
    jnp.where(real_B, jnp.asarray(arrays.label_N)[index_B], 0),
    real_B.astype(jnp.float32),
  )


def _digits() -> Dataset:
  """The digits. The test images are the 3rd, 8th, 13th … example of every class, 359 in all."""
  with (
    (importlib.resources.files('lfg_jax.data') / 'digits.npz').open('rb') as file,
    np.load(file) as stored,
  ):
    image_Nx8x8, label_N = stored['image'], stored['label'].astype(np.int32)
  image_Nx8x8x1 = np.round(image_Nx8x8[..., None] * (255 / 16)).astype(np.uint8)  # stored as 0 … 16
  is_test_N = np.zeros(len(label_N), bool)
  for label in range(10):
    is_test_N[np.flatnonzero(label_N == label)[2::5]] = True
  train, test = ((image_Nx8x8x1[part_N], label_N[part_N]) for part_N in (~is_test_N, is_test_N))
  return from_arrays('digits', train, test)
