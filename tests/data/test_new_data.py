"""Data sets written by TFDS under any name, and own arrays: read as they were, or refused."""

import dataclasses
import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lfg_jax import data
from lfg_jax.data import datasets
from lfg_jax.errors import UserError
from lfg_jax.training import prepare_data, train
from tests.data.test_data import refusal
from tests.runs import tiny


def png(image):
  file = io.BytesIO()
  Image.fromarray(image.squeeze()).save(file, 'PNG')
  file.seek(0)
  return file


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist', 'cifar10'])
def test_small_sets_are_read_as_written(name, tmp_path):
  shape = data.TFDS[name].image_shape
  images = {
    split: np.random.default_rng(i).integers(0, 256, (count, *shape), np.uint8)
    for i, (split, count) in enumerate([('train', 10), ('test', 4)])
  }

  def examples(split):
    for label, image in enumerate(images[split]):
      yield (
        label,
        {'image': png(image), 'label': label} | ({'id': str(label)} if name == 'cifar10' else {}),
      )

  builder = tfds.builder(name, data_dir=tmp_path, file_format='array_record')
  builder._split_generators = lambda _: {split: examples(split) for split in images}
  builder.download_and_prepare()
  dataset = data.load(name, data_dir=str(tmp_path))
  assert dataset.image_shape == shape and dataset.classes == 10
  assert (dataset.train.examples, dataset.test.examples) == (10, 4)
  assert 'tensorflow' not in sys.modules
  for split, arrays in (('train', dataset.train), ('test', dataset.test)):
    assert (arrays.image_NxHxWxC.dtype, arrays.label_N.dtype) == (np.uint8, np.int32)
    assert sorted(arrays.label_N.tolist()) == list(range(len(images[split])))
    np.testing.assert_array_equal(arrays.image_NxHxWxC, images[split][arrays.label_N])


def labelled(name, tmp_path, shape=(6, 5, 3), splits=('train', 'validation'), **features):
  """Prepares a TFDS data set of labelled images with labels 0 … 2; returns the images."""
  features = {
    'image': tfds.features.Image(shape=shape),
    'label': tfds.features.ClassLabel(num_classes=3),
    **features,
  }

  rng = np.random.default_rng(0)
  sizes = [6 if size is None else size for size in shape]
  images = {split: rng.integers(0, 200, (9, *sizes), np.uint8) for split in splits}

  def examples(split):
    for n, image in enumerate(images[split]):
      yield n, {'image': png(image), 'label': n % 3}

  with tfds.core.registered.skip_registration():

    class Labelled(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')
      _info = lambda self: tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )
      _split_generators = lambda self, _: {split: examples(split) for split in splits}
      _generate_examples = None

  Labelled.name = name
  Labelled(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  return images


def test_any_other_name_with_images_and_labels(tmp_path):
  images = labelled('flags', tmp_path)
  flags = data.load('flags', data_dir=str(tmp_path))
  assert (flags.classes, flags.image_shape, flags.train.examples) == (3, (6, 5, 3), 9)
  np.testing.assert_allclose(flags.mean, images['train'].mean((0, 1, 2)) / 255, rtol=1e-12)
  np.testing.assert_allclose(flags.std, images['train'].std((0, 1, 2)) / 255, rtol=1e-12)
  assert sorted(flags.test.image_NxHxWxC.ravel()) == sorted(images['validation'].ravel())


@pytest.mark.parametrize(('changes', 'message'), [
    ({'label': tfds.features.Scalar(np.int64)}, "dataset odd has the features image, label; allowed: 'image', and"),
    ({'shape': (None, 5, 3)}, r'odd has images of shape \(None, 5, 3\), uint8; allowed: uint8 of one size'),
    ({'splits': ('train', 'extra')}, "odd has the splits train, extra; allowed: 'train', and 'test' or 'validation'"),
])  # fmt: skip
def test_what_is_no_set_of_labelled_images_is_refused(changes, message, tmp_path):
  labelled('odd', tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    data.load('odd', data_dir=str(tmp_path))


def test_a_name_that_tfds_knows_is_told_how_to_prepare(tmp_path):
  assert refusal(FileNotFoundError, 'kmnist', data_dir=str(tmp_path)).endswith(
    f'prepare it with: pip install tensorflow; lfg-prepare-data --dataset=kmnist --data_dir={tmp_path}'
  )
  with pytest.raises(
    UserError, match=r"--dataset is 'kminst'; did you mean kmnist\? allowed: names of TFDS"
  ):
    prepare_data.main(['--dataset=kminst'])


IMAGES, LABELS = np.random.default_rng(0).integers(0, 256, (8, 4, 6, 2), np.uint8), np.arange(8) % 3


def test_arrays_of_ones_own_are_normalised_by_their_training_images():
  mine = data.from_arrays('mine', (IMAGES, LABELS), (IMAGES[:3] // 2, LABELS[:3]))
  assert (mine.name, mine.classes, mine.image_shape, mine.test.examples) == (
    'mine',
    3,
    (4, 6, 2),
    3,
  )
  assert mine.train.label_N.dtype == np.int32
  normalised = (IMAGES / 255 - mine.mean) / mine.std
  np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-12)
  np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, rtol=1e-12)


@pytest.mark.parametrize(('train', 'test', 'message'), [
    ((IMAGES / 255, LABELS), (IMAGES, LABELS), r'its train split has images float64 \[8, 4, 6, 2\]; allowed: uint8'),
    ((IMAGES[..., 0], LABELS), (IMAGES, LABELS), r'train split has images uint8 \[8, 4, 6\]; allowed'),
    ((IMAGES[:0], LABELS[:0]), (IMAGES, LABELS), r'train split has images uint8 \[0, 4, 6, 2\]; .* N at least 1'),
    ((IMAGES, LABELS), (IMAGES[:, :3], LABELS), r'test split has images uint8 \[8, 3, 6, 2\]; .* of one size in both'),
    ((IMAGES, LABELS / 1), (IMAGES, LABELS), r'train split has labels float64 \[8\] for 8 images; allowed: an integer'),
    ((IMAGES, LABELS[1:]), (IMAGES, LABELS), r'train split has labels int64 \[7\] for 8 images'),
    ((IMAGES, LABELS - 1), (IMAGES, LABELS), 'train split has labels -1 … 1; allowed: 0 … 1'),
    ((IMAGES, LABELS), (IMAGES, LABELS + 1), 'test split has labels 1 … 3; allowed: 0 … 2'),
    ((IMAGES.astype(np.uint16), LABELS), (IMAGES, LABELS), r'train split has images uint16 \[8, 4, 6, 2\]; allowed: u'),
    ((IMAGES.astype(np.int8), LABELS), (IMAGES, LABELS), r'train split has images int8'),
    ((IMAGES, LABELS), (IMAGES > 9, LABELS), r'test split has images bool'),
    ((IMAGES, LABELS > 1), (IMAGES, LABELS), r'train split has labels bool \[8\] for 8 images; allowed: an integer'),
    ((IMAGES, LABELS.astype(str)), (IMAGES, LABELS), r'train split has labels <U21 \[8\]'),
    ((IMAGES, LABELS * np.nan), (IMAGES, LABELS), r'train split has labels float64 \[8\]'),
    ((IMAGES, np.eye(8, dtype=int)), (IMAGES, LABELS), r'train split has labels int64 \[8, 8\]'),
    ((IMAGES, LABELS + 2**40), (IMAGES, LABELS), 'has 1099511627779 classes; allowed: 1 … 1000000'),
    ((IMAGES, LABELS), (IMAGES, LABELS.astype('u8') + np.uint64(2**63)), 'test split has labels 92'),
    ((0 * IMAGES, LABELS), (IMAGES, LABELS), 'has a colour that is the same in all pixels'),
])  # fmt: skip
def test_arrays_that_are_no_images_are_refused(train, test, message):
  with pytest.raises(ValueError, match=message):
    data.from_arrays('mine', train, test)


ARRAYS = data.Arrays(IMAGES[..., :1], LABELS)
STREAM = data.Stream([{'image': IMAGES[0, ..., :1], 'label': 0}], image_size=4)
SOUND = data.Dataset('mine', 3, (4, 6, 1), (0.5,), (0.3,), ARRAYS, ARRAYS)
STREAMED = SOUND._replace(
  image_shape=(4, 4, 3), mean=(0.5,) * 3, std=(0.3,) * 3, train=STREAM, test=STREAM
)


def test_a_data_set_of_ones_own_is_taken():
  taken = datasets.checked(SOUND._replace(train=ARRAYS._replace(label_N=LABELS.astype(np.uint8))))
  assert taken.train.label_N.dtype == np.int32 and taken.train.label_N.tolist() == LABELS.tolist()
  assert datasets.checked(STREAMED).train.classes == 3  # so a label out of range is named


@pytest.mark.parametrize(('dataset', 'message'), [
    (SOUND._replace(train=data.Arrays(IMAGES / 255, LABELS)), 'train split has images float64'),
    (SOUND._replace(test=data.Arrays(IMAGES, LABELS)), r'test split has images uint8 \[8, 4, 6, 2\]'),
    (SOUND._replace(classes=2), 'train split has labels 0 … 2; allowed: 0 … 1'),
    (SOUND._replace(classes=0), 'has 0 classes; allowed: 1 … 1000000'),
    (SOUND._replace(image_shape=(4, 6)), r'has image_shape \(4, 6\); allowed: \(H, W, C\)'),
    (SOUND._replace(std=(0.0,)), r'has std \(0.0,\); allowed: numbers above 0, one for each of 1 colours'),
    (SOUND._replace(mean=(0.1, 0.2)), r'has mean \(0.1, 0.2\); allowed: finite numbers, one for each of 1'),
    (SOUND._replace(mean=(np.nan,)), r'has mean \(nan,\); allowed: finite numbers'),
    (SOUND._replace(train=IMAGES), 'has a train split of type ndarray; allowed: data.Arrays, data.Stream'),
    (STREAMED._replace(image_shape=(8, 8, 3)), r'has image_shape \(8, 8, 3\); its train stream gives \(4, 4, 3\)'),
    (STREAMED._replace(test=dataclasses.replace(STREAM, classes=5)), 'has 3 classes; its test stream has 5'),
    (STREAMED._replace(test=dataclasses.replace(STREAM, source=[])), 'has a test stream of no examples'),
])  # fmt: skip
def test_a_data_set_whose_parts_do_not_fit_is_refused(dataset, message):
  with pytest.raises(ValueError, match=f'^dataset mine:? (its )?{message}') as error:
    datasets.checked(dataset)
  assert '\n' not in str(error.value)


def test_what_is_wrong_with_a_data_set_of_ones_own_is_one_line(tmp_path):
  path = tmp_path / 'mine.py'
  for text, message in (
    ('images = 1', f'data.module {path} has no load; it needs load'),
    (
      'def load(data_dir):\n  return 1 / 0',
      f'data.module {path}: ZeroDivisionError: division by zero',
    ),
    (
      'def load(data_dir):\n  return {}',
      f'data.module {path}: load gives a dict; allowed: a lfg_jax.data.Dataset',
    ),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      train.prepare(tiny(data__module=str(path)))
