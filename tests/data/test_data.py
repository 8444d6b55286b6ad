"""Data sets by name, exact epochs, and an immediate one-line error for missing data."""

import functools
import importlib.util
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import PartitionSpec as P

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.training import prepare_data


@pytest.fixture(scope='module')
def prepared():
  """A data_dir with the real mnist and cifar10, if there is one."""
  if 'LFG_TEST_DATA' not in os.environ:
    pytest.skip('LFG_TEST_DATA names no folder with mnist and cifar10')
  return os.environ['LFG_TEST_DATA']


def write(data_dir, version='3.0.1', file_format='array_record', splits=('train', 'test'), count=4):
  """Writes the folder of an mnist with 28×28 images, with empty files of examples."""
  folder = data_dir / 'mnist' / version
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(shape=(28, 28, 1)),
      'label': tfds.features.ClassLabel(num_classes=10),
    }
  )
  features.save_config(folder)
  info = {
    'name': 'mnist',
    'version': version,
    'fileFormat': file_format,
    'splits': [
      {
        'name': split,
        'shardLengths': [str(count)],
        'numBytes': '1',
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
      }
      for split in splits
    ],
  }
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  for split in splits:
    (folder / f'mnist-{split}.{file_format}-00000-of-00001').touch()
  return folder


def _records(path, count):
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  for _ in range(count):
    writer.write(b'record')
  writer.close()


def nearest_mean_accuracy(dataset):
  """Accuracy of the classifier that labels a test image by the nearest class mean."""
  train, test = (
    split.image_NxHxWxC.reshape(split.examples, -1) / np.float32(255) for split in dataset[-2:]
  )
  means = np.stack([train[dataset.train.label_N == label].mean(0) for label in range(10)])
  control_variate = np.argmin((means**2).sum(-1) - 2 * test @ means.T, axis=1)
  return np.mean(control_variate == dataset.test.label_N)


def test_digits_are_all_there_and_stratified():
  digits = data.load('digits')
  counts = [np.bincount(split.label_N) for split in (digits.train, digits.test)]
  assert sum(counts).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
  assert counts[1].tolist() == [round(0.2 * n) for n in sum(counts)]
  for split in (digits.train, digits.test):
    assert split.image_NxHxWxC.shape == (split.examples, 8, 8, 1)
    assert (split.image_NxHxWxC.dtype, split.label_N.dtype) == (np.uint8, np.int32)
    assert (split.image_NxHxWxC.min(), split.image_NxHxWxC.max()) == (0, 255)
  normalised = (digits.train.image_NxHxWxC / 255 - digits.mean) / digits.std
  assert abs(normalised.mean()) < 1e-6 and abs(normalised.std() - 1) < 1e-6


def test_digits_look_like_their_labels():
  """A nearest-mean classifier is right on nine out of ten, so images and labels match."""
  digits = data.load('digits')
  assert nearest_mean_accuracy(digits) > 0.87


@pytest.mark.parametrize(
  ('n', 'batch_size', 'steps'), [(10, 4, 3), (12, 4, 3), (3, 8, 1), (1, 1, 1)]
)
def test_orders_have_every_example_once(n, batch_size, steps):
  shuffle = jax.jit(data.epoch_order, static_argnums=(1, 2))
  for order in (shuffle(jax.random.key(0), n, batch_size), data.sequential_order(n, batch_size)):
    assert order.shape == (steps, batch_size) and order.dtype == jnp.int32
    padding = steps * batch_size - n
    flat = order.ravel().tolist()
    assert sorted(flat[:n]) == list(range(n)) and flat[n:] == [-1] * padding


def test_orders_are_shuffled_by_their_key_alone():
  one, again, other = (
    data.epoch_order(jax.random.key(seed), 100, 8).ravel().tolist() for seed in (0, 0, 1)
  )
  assert one == again != other
  assert one[:100] != list(range(100)) == data.sequential_order(100, 8).ravel().tolist()[:100]


def test_take_gathers_and_pads():
  rng = np.random.default_rng(0)
  arrays = data.Arrays(
    rng.integers(1, 256, (7, 4, 4, 3), np.uint8), np.arange(1, 8, dtype=np.int32)
  )
  row = np.array([6, 0, -1, 3, -1])
  for batch in (data.take(arrays, jnp.array(row)), jax.jit(data.take)(arrays, row)):
    assert (batch.image.dtype, batch.label.dtype, batch.weight.dtype) == (
      jnp.uint8,
      jnp.int32,
      jnp.float32,
    )
    assert batch.weight.tolist() == [1, 1, 0, 1, 0]
    assert batch.label.tolist() == [7, 1, 0, 4, 0]
    np.testing.assert_array_equal(batch.image[np.array([0, 1, 3])], arrays.image_NxHxWxC[[6, 0, 3]])
    assert not batch.image[np.array([2, 4])].any()


def test_take_under_shard_map_takes_each_devices_part():
  arrays = jax.tree.map(jnp.asarray, data.load('digits').test)
  devices = 2 if jax.device_count() > 1 else 1
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ('data',))
  sharded = jax.jit(
    jax.shard_map(data.take, mesh=mesh, in_specs=(P(), P('data')), out_specs=P('data'))
  )
  row = data.epoch_order(jax.random.key(0), arrays.examples, 48)[-1]
  assert (row == -1).any()
  jax.tree.map(np.testing.assert_array_equal, sharded(arrays, row), data.take(arrays, row))


def refusal(error, *args, **kwargs):
  """The message with which `load` refuses; it must be one line, and come at once."""
  start = time.monotonic()
  with pytest.raises(error) as caught:
    data.load(*args, **kwargs)
  assert time.monotonic() - start < 1
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_unknown_name_is_refused_with_the_known_ones():
  message = refusal(ValueError, 'minst')
  assert message == (
    "unknown dataset 'minst'; allowed: digits, mnist, fashion_mnist, cifar10, imagenet2012, any other "
    'of TFDS with images and labels, or arrays of your own: --config.data.module=FILE.py'
  )


def test_image_size_of_arrays_is_their_own():
  assert refusal(ValueError, 'digits', image_size=16) == (
    'image_size=16 is not for digits, whose images are 8x8'
  )
  assert data.load('digits', image_size=8).image_shape == (8, 8, 1)


@pytest.mark.parametrize('name', data.TFDS)
def test_missing_data_is_refused_with_the_command_that_prepares_it(name, tmp_path):
  assert refusal(FileNotFoundError, name, data_dir=str(tmp_path)) == (
    f'dataset {name} is not in {tmp_path}; prepare it with: '
    f'pip install tensorflow; lfg-prepare-data --dataset={name} --data_dir={tmp_path}'
  )


def test_the_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'elsewhere'))
  assert f'--data_dir={tmp_path / "elsewhere"}' in refusal(FileNotFoundError, 'mnist')
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert f'--data_dir={tmp_path / "tensorflow_datasets"}' in refusal(FileNotFoundError, 'mnist')


def test_a_broken_off_preparation_is_not_taken_for_data(tmp_path):
  write(tmp_path, version='incomplete.ABCDEF_3.0.1')
  assert 'is not in' in refusal(FileNotFoundError, 'mnist', data_dir=str(tmp_path))


def test_missing_files_and_splits_are_refused(tmp_path):
  folder = write(tmp_path)
  (folder / 'mnist-test.array_record-00000-of-00001').unlink()
  _records(folder / 'mnist-train.array_record-00000-of-00001', 4)
  expected = (
    f'{folder}/mnist-test.array_record-00000-of-00001 is missing; remove {folder} and run: '
    f'pip install tensorflow; lfg-prepare-data --dataset=mnist --data_dir={tmp_path}'
  )
  assert refusal(FileNotFoundError, 'mnist', data_dir=str(tmp_path)) == expected


def test_the_newest_version_is_read(tmp_path):
  for version in ('3.0.2', '3.0.10', '3.0.9'):
    write(tmp_path, version=version, splits=('train',))
  (tmp_path / 'mnist' / '3.0.10' / 'mnist-train.array_record-00000-of-00001').unlink()
  message = refusal(FileNotFoundError, 'mnist', data_dir=str(tmp_path))
  assert message.startswith(f'{tmp_path}/mnist/3.0.10/mnist-train.array_record-00000-of-00001 is')


def test_files_without_random_access_are_refused(tmp_path):
  folder = write(tmp_path, file_format='tfrecord')
  message = refusal(ValueError, 'mnist', data_dir=str(tmp_path))
  assert message.startswith(f'{folder} is in the format tfrecord, which has no random access;')
  assert '--dataset=mnist' in message


def test_preparing_checks_what_the_user_has_to_provide(tmp_path, monkeypatch):
  with pytest.raises(
    UserError, match=r'^imagenet2012 must be .* ILSVRC2012_img_train.tar, .*--manual_dir$'
  ):
    prepare_data.main(['--dataset=imagenet2012', f'--manual_dir={tmp_path}'])
  for tar in prepare_data.TARS:
    (tmp_path / tar).touch()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  for dataset in data.TFDS:
    with pytest.raises(
      UserError, match=r'^preparing data needs TensorFlow .*: pip install tensorflow$'
    ):
      prepare_data.main([f'--dataset={dataset}', f'--manual_dir={tmp_path}'])


@functools.cache
def loaded(name, data_dir):
  return data.load(name, data_dir=data_dir)


@pytest.mark.parametrize(
  ('name', 'image_shape', 'train', 'per_class'),
  [
    ('mnist', (28, 28, 1), 60000, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    ('cifar10', (32, 32, 3), 50000, [1000] * 10),
  ],
)
def test_the_real_data(prepared, name, image_shape, train, per_class):
  dataset = loaded(name, prepared)
  assert dataset.image_shape == image_shape and dataset.classes == 10
  assert (dataset.train.examples, dataset.test.examples) == (train, 10000)
  assert np.bincount(dataset.test.label_N).tolist() == per_class
  for split in (dataset.train, dataset.test):
    assert split.image_NxHxWxC.shape[1:] == image_shape and split.image_NxHxWxC.dtype == np.uint8
    assert split.label_N.dtype == np.int32
    np.testing.assert_allclose(split.image_NxHxWxC.mean((0, 1, 2)) / 255, dataset.mean, atol=0.005)
  assert 'tensorflow' not in sys.modules


def test_real_mnist_looks_like_its_labels(prepared):
  assert abs(nearest_mean_accuracy(loaded('mnist', prepared)) - 0.8203) < 1e-3  # the known value
