"""Streams: exact epochs, resuming, processes, crops; and ImageNet's door, on a small stand-in."""

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lfg_jax import data
from lfg_jax.data import streams
from lfg_jax.errors import UserError
from lfg_jax.training import train
from tests.runs import tiny

TRAIN, VALIDATION = 11, 5


class Pictures:
  """Examples whose label is their index, and whose reading is recorded."""

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
  return streams.Stream(Pictures(count), **{'image_size': 16, 'threads': 2, **fields})


def equal(batches, others):
  return len(batches) == len(others) and all(
      np.array_equal(x, y) for pair in zip(batches, others, strict=True) for x, y in zip(*pair, strict=True))


def labels(batches):
  return [int(label) for batch in batches for label in batch.label[batch.weight == 1]]


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(('count', 'batch_size', 'steps'), [(11, 4, 3), (12, 4, 3), (3, 8, 1)])
def test_every_example_once_per_epoch(train, count, batch_size, steps):
  batches = list(stream(count, train=train).epoch(0, 0, batch_size))
  assert len(batches) == steps
  assert {batch.image.shape for batch in batches} == {(batch_size, 16, 16, 3)}
  assert {(b.image.dtype.name, b.label.dtype.name, b.weight.dtype.name) for b in batches} == {
      ('uint8', 'int32', 'float32')}
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
  """Also when it goes on within an epoch that another number of processes began."""
  whole = list(stream(23).epoch(1, 0, 6))
  for count in (1, 2, 3):
    streams_ = [stream(23) for _ in range(count)]
    parts = [list(own.epoch(1, first, 6, index, count)) for index, own in enumerate(streams_)]
    for index, (own, part) in enumerate(zip(streams_, parts, strict=True)):
      rows = slice(6 * index // count, 6 * (index + 1) // count)
      assert equal(part, [streams.Batch(*(leaf[rows] for leaf in batch)) for batch in whole[first:]])
      assert sorted(own.source.read) == sorted(labels(part))


@pytest.mark.slow
def test_worker_processes_change_nothing():
  threads = list(stream(23).epoch(1, 1, 4, 1, 2))
  for workers in (1, 3):
    batches = [streams.Batch(*map(np.array, batch)) for batch in stream(23, workers=workers).epoch(1, 1, 4, 1, 2)]
    assert equal(batches, threads)


@pytest.mark.slow
def test_a_bad_example_of_a_worker_is_named():
  examples = [stream().source[i] for i in range(TRAIN)]
  examples[6] = {'image': b'', 'label': 6}
  one = streams.Stream(examples, image_size=16, workers=2)
  with pytest.raises(streams.BadExample, match=r'^example 6 \(label 6\) has no image that can be decoded: 0 bytes; '):
    list(one.epoch(0, 0, 4))


@pytest.mark.parametrize('train', [True, False])
def test_processes_slices_make_up_the_global_batch(train):
  whole = list(stream(train=train).epoch(1, 1, 4))
  parts = [list(stream(train=train).epoch(1, 1, 4, index, 2)) for index in range(2)]
  joined = [streams.Batch(*map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*parts, strict=True)]
  assert equal(joined, whole)


def test_crops_depend_on_seed_epoch_and_example():
  one = stream(1)
  same = streams.Stream([one.source[0]] * 4, image_size=16)
  crops = [batch.image[i] for epoch in range(3) for batch in same.epoch(epoch, 0, 4) for i in range(4)]
  crops += [batch.image[0] for batch in streams.Stream(one.source, image_size=16, seed=1).epoch(0, 0, 1)]
  assert len({crop.tobytes() for crop in crops}) == 13
  tests = streams.Stream([one.source[0]] * 4, image_size=16, train=False)
  centres = [image for epoch in range(2) for batch in tests.epoch(epoch, 0, 4) for image in batch.image]
  assert len({image.tobytes() for image in centres}) == 1


def test_random_boxes_have_the_areas_ratios_and_places_asked_for():
  width, height = 400, 300
  boxes = np.array([streams.random_box(np.random.default_rng(i), width, height, 0.3) for i in range(4000)])
  left, top, right, bottom = boxes.T
  w, h = right - left, bottom - top
  area, ratio = w * h / (width * height), w / h
  assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
  assert 0.295 < area.min() < 0.31 and area.max() > 0.95
  assert 0.745 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.345
  # A place is uniform among those left: half of the crops are in the left half of their room.
  room = width - w > 20
  assert abs(np.mean((left / np.maximum(width - w, 1))[room]) - 0.5) < 0.03


def test_a_long_image_is_cropped_at_its_centre():
  assert streams.random_box(np.random.default_rng(0), 300, 10, 0.9) == (143.5, 0, 156.5, 10)
  assert streams.random_box(np.random.default_rng(0), 10, 300, 0.9) == (0, 143.5, 10, 156.5)


def test_flips_are_half_of_the_crops():
  ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
  source = [{'image': np.ascontiguousarray(ramp), 'label': 0}] * 400
  image = np.concatenate([b.image for b in streams.Stream(source, image_size=8).epoch(0, 0, 100)]).astype(int)
  flipped = image[:, 4, 0, 0] > image[:, 4, -1, 0]
  assert 160 < flipped.sum() < 240


def test_test_crop_is_the_centre_of_the_image_scaled_to_256():
  blocks = np.random.default_rng(0).integers(0, 256, (16, 20, 3))
  pixels = np.kron(blocks, np.ones((20, 20, 1))).astype(np.uint8)
  test = streams.Stream([{'image': pixels, 'label': 0}], train=False)
  batch, = test.epoch(0, 0, 1)
  scaled = np.asarray(Image.fromarray(pixels).resize((320, 256), Image.Resampling.BICUBIC))[16:-16, 48:-48]
  assert batch.image[0].shape == scaled.shape == (224, 224, 3)
  assert np.abs(batch.image[0].astype(int) - scaled).max() <= 1


def test_a_batch_that_processes_do_not_divide_is_refused():
  with pytest.raises(ValueError, match=r'^batch size 4 does not divide among 3 processes$'):
    stream().epoch(0, 0, 4, 0, 3)


def encoded(image):
  file = io.BytesIO()
  image.save(file, 'JPEG')
  return file.getvalue()


def smooth(width, height, mode='RGB'):
  """A picture without details, as a JPEG file."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  waves = [np.cos(x / 23 + y / 41 + k) + np.cos(x / 57 - y / 19 + 2 * k) for k in range(3)]
  return encoded(Image.fromarray(np.uint8(128 + 50 * np.stack(waves, -1))).convert(mode))


def fully(file, box, size):
  """The crop of the picture decoded at its own size."""
  picture = Image.open(io.BytesIO(file)).convert('RGB')
  return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('box, scale', [
    ((3, 5, 66, 68), 1), ((3.5, 5.5, 67.5, 69.5), 2), ((700, 500, 764, 600), 2), ((400, 100, 905, 600), 8),
    ((0, 0, 905, 703), 8), ((100, 200, 240, 340), 4)])
def test_a_crop_is_decoded_at_the_scale_that_it_needs(mode, box, scale):
  """The two differ by less than JPEG itself changes."""
  file = smooth(905, 703, mode)
  picture = Image.open(io.BytesIO(file))
  crop = streams.cropped(picture, box, 32)
  assert picture.size == (-(-905 // scale), -(-703 // scale))
  difference = np.abs(np.asarray(crop) - fully(file, box, 32))
  assert crop.mode == 'RGB' and difference.mean() < 1 and difference.max() <= 6
  assert scale > 1 or not difference.any()


def test_other_files_are_decoded_whole():
  file = io.BytesIO()
  Image.open(io.BytesIO(smooth(200, 100))).save(file, 'PNG')
  crop = streams.cropped(Image.open(file), (0, 0, 100, 100), 16)
  assert np.array_equal(np.asarray(crop), fully(file.getvalue(), (0, 0, 100, 100), 16))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
BAD = [({'image': encoded(NOISE)[:1500]}, r'1500 bytes; image file is truncated'),
       ({'image': b'no image'}, '8 bytes; cannot identify image file'),
       ({'image': b''}, '0 bytes; '),
       ({'image': np.zeros((3, 3, 3, 3), np.uint8)}, r'uint8 \(3, 3, 3, 3\); '),
       ({'image': np.zeros((8, 8, 3), np.float32)}, r'float32 \(8, 8, 3\); ')]


@pytest.mark.parametrize('is_train', [True, False])
@pytest.mark.parametrize('bad, message', BAD)
def test_a_bad_example_is_named(is_train, bad, message):
  one = stream()
  examples = [one.source[i] for i in range(TRAIN)]
  examples[6] = {**examples[6], **bad}
  with pytest.raises(streams.BadExample, match=rf'^example 6 \(label 6\) has no image that can be decoded: {message}'
                     ) as error:
    list(streams.Stream(examples, image_size=16, train=is_train, threads=2).epoch(0, 0, 4))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('label', [-1, 11])
def test_a_label_out_of_range_is_named(label):
  examples = [stream().source[i] for i in range(TRAIN)]
  list(streams.Stream(examples, image_size=16, classes=11).epoch(0, 0, 4))
  examples[3]['label'] = label
  with pytest.raises(streams.BadExample, match=rf'^example 3 has the label {label}; allowed: 0 … 10'):
    list(streams.Stream(examples, image_size=16, classes=11).epoch(0, 0, 4))


def test_a_grey_array_is_an_image():
  grey = [{'image': np.full((20, 30), 7, np.uint8), 'label': 0}]
  batch, = streams.Stream(grey, image_size=4).epoch(0, 0, 1)
  assert batch.image.shape == (1, 4, 4, 3) and (batch.image == 7).all()


def test_training_ends_in_the_line_of_a_bad_example(tmp_path, monkeypatch):
  examples = [{'image': np.zeros((8, 8, 3), np.uint8), 'label': i % 10} for i in range(64)]
  one = streams.Stream([*examples, {'image': b'', 'label': 0}], image_size=8, threads=2)
  dataset = data.Dataset('stand-in', 10, (8, 8, 3), (0.5,) * 3, (0.5,) * 3, one, one)
  with pytest.raises(UserError, match=r'^example 64 \(label 0\) has no image that can be decoded: 0 bytes; '):
    train.train(train.prepare(tiny(), dataset), tmp_path / 'run')


def jpegs(count):
  """Examples as ImageNet's builder yields them, every third grey."""
  rng = np.random.default_rng(0)
  for i in range(count):
    file = io.BytesIO()
    image = Image.fromarray(np.full((48, 64 + i, 3), rng.integers(0, 256, 3), np.uint8))
    (image.convert('L') if i % 3 == 0 else image).save(file, 'JPEG')
    file.seek(0)
    yield i, {'image': file, 'label': 900 + i, 'file_name': f'{i}.JPEG'}


def write_imagenet(data_dir, images=jpegs):
  """An imagenet2012 that TFDS itself writes, of other images."""
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
  batch, = dataset.test.epoch(0, 0, VALIDATION)
  expected = {example['label']: Image.open(example['image']) for _, example in jpegs(VALIDATION)}
  assert {file.mode for file in expected.values()} == {'L', 'RGB'}
  for image, label in zip(batch.image, batch.label.tolist(), strict=True):
    assert np.abs(image - np.asarray(expected[label].convert('RGB'))[0, 0].astype(int)).max() <= 2
