"""Streams: exact epochs, resuming, several processes; and ImageNet, with a small stand-in."""

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lfg_jax import data
from lfg_jax.data import streaming

TRAIN, VALIDATION = 11, 5


class Pictures:
  """Examples whose label is their index; the source records which were read."""

  def __init__(self, count):
    rng = np.random.default_rng(0)
    self.images = [rng.integers(0, 256, (40 + i, 60, 3), np.uint8) for i in range(count)]
    self.read = []

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    self.read.append(index)
    return {'image': self.images[index], 'label': index}


def stream(count=TRAIN, **fields):
  return streaming.Stream(Pictures(count), **{'image_size': 16, 'threads': 2, **fields})


def equal(batches, others):
  return len(batches) == len(others) and all(
    np.array_equal(x, y)
    for pair in zip(batches, others, strict=True)
    for x, y in zip(*pair, strict=True)
  )


def labels(batches):
  return [int(label) for batch in batches for label in batch.label[batch.weight == 1]]


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(('count', 'batch_size', 'steps'), [(11, 4, 3), (12, 4, 3), (3, 8, 1)])
def test_every_example_once_per_epoch(train, count, batch_size, steps):
  batches = list(stream(count, train=train).epoch(0, 0, batch_size))
  assert len(batches) == steps
  assert {batch.image.shape for batch in batches} == {(batch_size, 16, 16, 3)}
  assert {(b.image.dtype.name, b.label.dtype.name, b.weight.dtype.name) for b in batches} == {
    ('uint8', 'int32', 'float32')
  }
  assert sorted(labels(batches)) == list(range(count))
  assert sum(batch.weight.sum() for batch in batches) == count
  assert not batches[-1].image[batches[-1].weight == 0].any()


def test_training_is_shuffled_anew_and_testing_is_not():
  train, test = stream(50), stream(50, train=False)
  orders = [labels(s.epoch(epoch, 0, 8)) for s in (train, stream(50, seed=1)) for epoch in range(3)]
  assert len({tuple(order) for order in [*orders, range(50)]}) == 7
  assert labels(test.epoch(0, 0, 8)) == labels(test.epoch(1, 0, 8)) == list(range(50))


def test_resuming_gives_the_rest_of_the_epoch_and_reads_nothing_else():
  whole = list(stream().epoch(2, 0, 4))
  for first in range(4):
    resumed = stream()
    assert equal(list(resumed.epoch(2, first, 4)), whole[first:])
    assert sorted(resumed.source.read) == sorted(labels(whole[first:]))
  assert not list(stream().epoch(2, 9, 4))


def test_threads_change_nothing():
  assert equal(list(stream(threads=1).epoch(0, 0, 4)), list(stream(threads=8).epoch(0, 0, 4)))


@pytest.mark.parametrize('first', [0, 2])
def test_a_process_reads_its_slices_only(first):
  """This also holds if another number of processes began the epoch."""
  whole = list(stream(23).epoch(1, 0, 6))
  for count in (1, 2, 3):
    streams_ = [stream(23) for _ in range(count)]
    parts = [list(own.epoch(1, first, 6, index, count)) for index, own in enumerate(streams_)]
    for index, (own, part) in enumerate(zip(streams_, parts, strict=True)):
      rows = slice(6 * index // count, 6 * (index + 1) // count)
      assert equal(
        part, [streaming.Batch(*(leaf[rows] for leaf in batch)) for batch in whole[first:]]
      )
      assert sorted(own.source.read) == sorted(labels(part))


@pytest.mark.full
def test_worker_processes_change_nothing():
  threads = list(stream(23).epoch(1, 1, 4, 1, 2))
  for workers in (1, 3):
    batches = [
      streaming.Batch(*map(np.array, batch))
      for batch in stream(23, workers=workers).epoch(1, 1, 4, 1, 2)
    ]
    assert equal(batches, threads)


@pytest.mark.full
def test_a_bad_example_of_a_worker_is_named():
  examples = [stream().source[i] for i in range(TRAIN)]
  examples[6] = {'image': b'', 'label': 6}
  one = streaming.Stream(examples, image_size=16, workers=2)
  with pytest.raises(
    streaming.BadExample,
    match=r'^example 6 \(label 6\) has no image that can be decoded: 0 bytes; ',
  ):
    list(one.epoch(0, 0, 4))


@pytest.mark.parametrize('train', [True, False])
def test_processes_slices_make_up_the_global_batch(train):
  whole = list(stream(train=train).epoch(1, 1, 4))
  parts = [list(stream(train=train).epoch(1, 1, 4, index, 2)) for index in range(2)]
  joined = [
    streaming.Batch(*map(np.concatenate, zip(*pair, strict=True)))
    for pair in zip(*parts, strict=True)
  ]
  assert equal(joined, whole)


def test_a_batch_that_processes_do_not_divide_is_refused():
  with pytest.raises(ValueError, match=r'^batch size 4 does not divide among 3 processes$'):
    stream().epoch(0, 0, 4, 0, 3)


def jpegs(count):
  """Examples as from ImageNet's builder; every third one is grey."""
  rng = np.random.default_rng(0)
  for i in range(count):
    file = io.BytesIO()
    image = Image.fromarray(np.full((48, 64 + i, 3), rng.integers(0, 256, 3), np.uint8))
    (image.convert('L') if i % 3 == 0 else image).save(file, 'JPEG')
    file.seek(0)
    yield i, {'image': file, 'label': 900 + i, 'file_name': f'{i}.JPEG'}


def write_imagenet(data_dir, images=jpegs):
  """Writes an imagenet2012 of other images, with TFDS itself."""
  builder = tfds.builder('imagenet2012', data_dir=data_dir, file_format='array_record')
  builder._split_generators = lambda _: {'train': images(TRAIN), 'validation': images(VALIDATION)}
  builder.download_and_prepare()
  return str(data_dir)


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
  """A data_dir with a small stand-in."""
  return write_imagenet(tmp_path_factory.mktemp('imagenet'))


def test_imagenet_is_a_stream_of_the_same_interface(imagenet):
  dataset = data.load('imagenet2012', data_dir=imagenet, image_size=32, seed=3)
  assert (dataset.classes, dataset.image_shape) == (1000, (32, 32, 3))
  assert (dataset.train.examples, dataset.test.examples) == (TRAIN, VALIDATION)
  assert dataset.train.train and not dataset.test.train and dataset.train.seed == 3
  assert sorted(labels(dataset.train.epoch(0, 0, 4))) == list(range(900, 900 + TRAIN))
  assert sorted(labels(dataset.test.epoch(0, 0, 4))) == list(range(900, 900 + VALIDATION))
  assert data.load('imagenet2012', data_dir=imagenet).image_shape == (224, 224, 3)
  assert 'tensorflow' not in sys.modules


def test_imagenet_pixels_are_those_of_the_files(imagenet):
  dataset = data.load('imagenet2012', data_dir=imagenet, image_size=16)
  (batch,) = dataset.test.epoch(0, 0, VALIDATION)
  expected = {example['label']: Image.open(example['image']) for _, example in jpegs(VALIDATION)}
  assert {file.mode for file in expected.values()} == {'L', 'RGB'}
  for image, label in zip(batch.image, batch.label.tolist(), strict=True):
    assert np.abs(image - np.asarray(expected[label].convert('RGB'))[0, 0].astype(int)).max() <= 2
