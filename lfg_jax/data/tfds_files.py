"""TFDS data sets, read without TensorFlow from the files that `training.prepare_data` writes."""

import bisect
import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lfg_jax import user_files
from lfg_jax.data.streaming import BadExample, Source, decode

OPENED_AT_ONCE = 32  # files, for their numbers of examples; a network answers them together


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

  given = data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  # array_record reads files only.
  place = tfds.core.Path(user_files.local('data_dir' if data_dir else '$TFDS_DATA_DIR', given))
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
  advice = _advice(newest, _command(name, place))
  with _damage(newest / 'features.json', advice):
    tfds.features.FeatureConnector.from_config(newest)
  with _damage(newest / 'dataset_info.json', advice):
    return tfds.builder_from_directory(newest)


def _command(name: str, place: Any) -> str:
  return f'pip install tensorflow; lfg-prepare-data --dataset={name} --data_dir={place}'


def _advice(folder: Any, command: str) -> str:
  return f'remove {folder} and run: {command}'


@contextlib.contextmanager
def _damage(file: Any, advice: str) -> Iterator[None]:
  """Whatever the readers of a file raise, as a `Damaged` that names it."""
  try:
    yield
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise Damaged(f'{file} is damaged ({type(error).__name__}: {reason}); {advice}') from error


class Damaged(BadExample):
  """A file that was written by TFDS and has changed since; the message is one line."""


class Shards:
  """A split in files; what cannot be read is a `Damaged` that names the file."""

  def __init__(self, examples: Any, paths: Sequence[Any], lengths: Sequence[int], advice: str):
    """`examples` are read from `paths`, which have as many of them as `lengths` says."""
    self._examples, self._paths, self._advice = examples, [*map(str, paths)], advice
    self._ends = list(itertools.accumulate(lengths))

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    with _damage(self._paths[bisect.bisect(self._ends, index)], self._advice):
      return _whole(self._examples[index])

  def __getitems__(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
    try:
      return [_whole(example) for example in self._examples.__getitems__(indices)]
    except Exception:
      for index in indices:  # finds the file
        self[index]
      raise


def _whole(example: Mapping[str, Any]) -> Mapping[str, Any]:
  """The example; where a file ends early, array_record gives records without content."""
  if example.get('image') is None or example.get('label') is None:
    raise ValueError('an empty record')
  return example


def _check_shard(path: Any, examples: int, advice: str) -> None:
  """Raises `Damaged` if the file has another number of examples."""
  from array_record.python.array_record_module import ArrayRecordReader

  with _damage(path, advice):
    reader = ArrayRecordReader(str(path))
    try:
      found = reader.num_records()
      if not reader.ok() or found != examples:
        raise ValueError(f'it has {found} examples, dataset_info.json says {examples}')
    finally:
      reader.close()


def source(builder: Any, split: str) -> Source:
  """A split, with images still encoded.

  Raises:
    FileNotFoundError: files are missing.
    ValueError: the files do not allow random access, or one of them is damaged.
  """
  import tensorflow_datasets as tfds

  info, folder = builder.info, builder.data_path
  command = _command(builder.name, folder.parent.parent)
  advice = _advice(folder, command)
  paths = info.splits[split].filepaths if split in info.splits else []
  if not paths:
    raise FileNotFoundError(f'{folder} has no {split} split; {advice}')
  if missing := [path for path in paths if not path.exists()]:
    raise FileNotFoundError(f'{missing[0]} is missing; {advice}')
  if info.file_format.value != 'array_record':
    raise ValueError(
      f'{folder} is in the format {info.file_format.value}, which has no random access; choose '
      f'another data_dir, or remove this folder and run: {command}'
    )
  lengths = info.splits[split].shard_lengths
  with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
    list(pool.map(functools.partial(_check_shard, advice=advice), paths, lengths))
  # TFDS's own decoding takes twice as long for small images.
  examples = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
  return Shards(examples, paths, lengths, advice)


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
