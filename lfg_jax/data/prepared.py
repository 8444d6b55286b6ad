"""TFDS data sets, read without TensorFlow from the files that `training.prepare_data` writes."""

import os
import re
from typing import Any, NamedTuple

import numpy as np

from lfg_jax.data.streams import BadExample, Source, decode


class Facts(NamedTuple):
  """What is known about a data set.

  Attributes:
    mean, std: statistics per colour, for pixels 0 … 1; empty: to be computed.
    test_split: name of the split on which errors are measured.
  """

  classes: int
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  test_split: str = 'test'


def builder(name: str, data_dir: str | None, known: tuple[str, ...]) -> Any:
  """TFDS's builder for the newest version on disk.

  This function looks for the files itself, because TFDS would try for minutes to download missing
  ones.

  Args:
    name: name of a data set.
    data_dir: where TFDS keeps its data sets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
    known: names to suggest if TFDS does not know `name`.

  Raises:
    FileNotFoundError: the data set is not on disk; the message has the command that prepares it.
    ValueError: TFDS does not know the name either.
  """
  import tensorflow_datasets as tfds  # here: it takes half a second, and `digits` does not need it

  place = data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  place = tfds.core.Path(place).expanduser()
  files = (place / name).glob('*/dataset_info.json') if re.fullmatch(r'\w+', name) else ()
  folders = [info.parent for info in files]
  folders = [folder for folder in folders if tfds.core.Version.is_valid(folder.name)]
  if not folders:
    if name not in tfds.list_builders(with_community_datasets=False):
      raise ValueError(
        f'unknown dataset {name!r}; allowed: {", ".join(known)}, any other of TFDS with images '
        'and labels, or arrays of your own: --config.data.module=FILE.py'
      )
    raise FileNotFoundError(
      f'dataset {name} is not in {place}; prepare it with: {_command(name, place)}'
    )
  newest = max(folders, key=lambda folder: tfds.core.Version(folder.name))
  return tfds.builder_from_directory(newest)


def _command(name: str, place: Any) -> str:
  return f'pip install tensorflow; lfg-prepare-data --dataset={name} --data_dir={place}'


def source(builder: Any, split: str) -> Source:
  """A split, with images still encoded.

  Raises:
    FileNotFoundError: files are missing.
    ValueError: the files do not allow random access.
  """
  import tensorflow_datasets as tfds

  info, folder = builder.info, builder.data_path
  command = _command(builder.name, folder.parent.parent)
  if split not in info.splits or not all(path.exists() for path in info.splits[split].filepaths):
    raise FileNotFoundError(
      f'{folder} lacks files of the {split} split; remove it and run: {command}'
    )
  if info.file_format.value != 'array_record':
    raise ValueError(
      f'{folder} is in the format {info.file_format.value}, which has no random access; choose '
      f'another data_dir, or remove this folder and run: {command}'
    )
  # TFDS's own decoding takes twice as long for small images.
  return builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})


def facts(builder: Any) -> Facts:
  """The facts about a data set, from its files.

  Raises:
    ValueError: it lacks labelled images of one size, or a split to test on.
  """
  features, name = dict(builder.info.features.items()), builder.name
  image, label = (features.get(feature) for feature in ('image', 'label'))
  if not (image and label and hasattr(label, 'num_classes')):
    raise ValueError(
      f'dataset {name} has the features {", ".join(sorted(features))}; allowed: '
      "'image', and 'label' with classes"
    )
  if None in image.shape or image.np_dtype != np.uint8:
    raise ValueError(
      f'dataset {name} has images of shape {image.shape}, {image.np_dtype}; '
      'allowed: uint8 of one size'
    )
  tests = [split for split in ('test', 'validation') if split in builder.info.splits]
  if not tests:
    raise ValueError(
      f'dataset {name} has the splits {", ".join(builder.info.splits)}; allowed: '
      "'train', and 'test' or 'validation'"
    )
  return Facts(label.num_classes, image.shape, test_split=tests[0])


def arrays(source: Any, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
  """All images and labels of a source, decoded."""
  image_NxHxWxC = np.empty((len(source), *facts.image_shape), np.uint8)
  label_N = np.empty(len(source), np.int32)
  # Reading all at once is twice as fast, and the encoded files are smaller than the arrays.
  for i, example in enumerate(source.__getitems__(list(range(len(source))))):
    image, label_N[i] = decode(example, i, facts.classes)
    height, width, colours = facts.image_shape
    if image.size != (width, height):
      raise BadExample(
        f'example {i} has an image of {image.height}x{image.width}; allowed: {height}x{width}'
      )
    image_NxHxWxC[i] = np.asarray(image)[..., :colours]  # grey images have three equal channels
  return image_NxHxWxC, label_N
