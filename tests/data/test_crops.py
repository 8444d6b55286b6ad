"""Crops of streamed images are decoded at the scale they need; unreadable examples are named."""

import io

import numpy as np
import pytest
from PIL import Image

from lfg_jax import data
from lfg_jax.data import streaming
from lfg_jax.errors import UserError
from lfg_jax.training import train
from tests.data.test_streams import TRAIN, stream
from tests.runs import tiny


def test_crops_depend_on_seed_epoch_and_example():
  one = stream(1)
  same = streaming.Stream([one.source[0]] * 4, image_size=16)
  crops = [
    batch.image[i] for epoch in range(3) for batch in same.epoch(epoch, 0, 4) for i in range(4)
  ]
  crops += [
    batch.image[0] for batch in streaming.Stream(one.source, image_size=16, seed=1).epoch(0, 0, 1)
  ]
  assert len({crop.tobytes() for crop in crops}) == 13
  tests = streaming.Stream([one.source[0]] * 4, image_size=16, train=False)
  centres = [
    image for epoch in range(2) for batch in tests.epoch(epoch, 0, 4) for image in batch.image
  ]
  assert len({image.tobytes() for image in centres}) == 1


def test_random_boxes_have_the_areas_ratios_and_places_asked_for():
  width, height = 400, 300
  boxes = np.array(
    [streaming.random_box(np.random.default_rng(i), width, height, 0.3) for i in range(4000)]
  )
  left, top, right, bottom = boxes.T
  w, h = right - left, bottom - top
  area, ratio = w * h / (width * height), w / h
  assert (
    (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
  )
  assert 0.295 < area.min() < 0.31 and area.max() > 0.95
  assert 0.745 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.345
  # A place is uniform among those left: half of the crops are in the left half of their room.
  room = width - w > 20
  assert abs(np.mean((left / np.maximum(width - w, 1))[room]) - 0.5) < 0.03


def test_a_long_image_is_cropped_at_its_centre():
  assert streaming.random_box(np.random.default_rng(0), 300, 10, 0.9) == (143.5, 0, 156.5, 10)
  assert streaming.random_box(np.random.default_rng(0), 10, 300, 0.9) == (0, 143.5, 10, 156.5)


def test_flips_are_half_of_the_crops():
  ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
  source = [{'image': np.ascontiguousarray(ramp), 'label': 0}] * 400
  image = np.concatenate(
    [b.image for b in streaming.Stream(source, image_size=8).epoch(0, 0, 100)]
  ).astype(int)
  flipped = image[:, 4, 0, 0] > image[:, 4, -1, 0]
  assert 160 < flipped.sum() < 240


def test_test_crop_is_the_centre_of_the_image_scaled_to_256():
  blocks = np.random.default_rng(0).integers(0, 256, (16, 20, 3))
  pixels = np.kron(blocks, np.ones((20, 20, 1))).astype(np.uint8)
  test = streaming.Stream([{'image': pixels, 'label': 0}], train=False)
  (batch,) = test.epoch(0, 0, 1)
  scaled = Image.fromarray(pixels).resize((320, 256), Image.Resampling.BICUBIC)
  scaled = np.asarray(scaled)[16:-16, 48:-48]
  assert batch.image[0].shape == scaled.shape == (224, 224, 3)
  assert np.abs(batch.image[0].astype(int) - scaled).max() <= 1


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
  """The crop of the picture, decoded at its full size."""
  picture = Image.open(io.BytesIO(file)).convert('RGB')
  return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box)).astype(int)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize(
  'box, scale',
  [
    ((3, 5, 66, 68), 1),
    ((3.5, 5.5, 67.5, 69.5), 2),
    ((700, 500, 764, 600), 2),
    ((400, 100, 905, 600), 8),
    ((0, 0, 905, 703), 8),
    ((100, 200, 240, 340), 4),
  ],
)
def test_a_crop_is_decoded_at_the_scale_that_it_needs(mode, box, scale):
  """It differs from the crop at full size by less than JPEG changes the picture."""
  file = smooth(905, 703, mode)
  picture = Image.open(io.BytesIO(file))
  crop = streaming.cropped(picture, box, 32)
  assert picture.size == (-(-905 // scale), -(-703 // scale))
  difference = np.abs(np.asarray(crop) - fully(file, box, 32))
  assert crop.mode == 'RGB' and difference.mean() < 1 and difference.max() <= 6
  assert scale > 1 or not difference.any()


def test_other_files_are_decoded_whole():
  file = io.BytesIO()
  Image.open(io.BytesIO(smooth(200, 100))).save(file, 'PNG')
  crop = streaming.cropped(Image.open(file), (0, 0, 100, 100), 16)
  assert np.array_equal(np.asarray(crop), fully(file.getvalue(), (0, 0, 100, 100), 16))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
BAD = [
  ({'image': encoded(NOISE)[:1500]}, r'1500 bytes; image file is truncated'),
  ({'image': b'no image'}, '8 bytes; cannot identify image file'),
  ({'image': b''}, '0 bytes; '),
  ({'image': np.zeros((3, 3, 3, 3), np.uint8)}, r'uint8 \(3, 3, 3, 3\); '),
  ({'image': np.zeros((8, 8, 3), np.float32)}, r'float32 \(8, 8, 3\); '),
]


@pytest.mark.parametrize('is_train', [True, False])
@pytest.mark.parametrize('bad, message', BAD)
def test_a_bad_example_is_named(is_train, bad, message):
  one = stream()
  examples = [one.source[i] for i in range(TRAIN)]
  examples[6] = {**examples[6], **bad}
  with pytest.raises(
    streaming.BadExample,
    match=rf'^example 6 \(label 6\) has no image that can be decoded: {message}',
  ) as error:
    list(streaming.Stream(examples, image_size=16, train=is_train, threads=2).epoch(0, 0, 4))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('label', [-1, 11])
def test_a_label_out_of_range_is_named(label):
  examples = [stream().source[i] for i in range(TRAIN)]
  list(streaming.Stream(examples, image_size=16, classes=11).epoch(0, 0, 4))
  examples[3]['label'] = label
  with pytest.raises(
    streaming.BadExample, match=rf'^example 3 has the label {label}; allowed: 0 … 10'
  ):
    list(streaming.Stream(examples, image_size=16, classes=11).epoch(0, 0, 4))


def test_a_grey_array_is_an_image():
  grey = [{'image': np.full((20, 30), 7, np.uint8), 'label': 0}]
  (batch,) = streaming.Stream(grey, image_size=4).epoch(0, 0, 1)
  assert batch.image.shape == (1, 4, 4, 3) and (batch.image == 7).all()


def test_training_ends_in_the_line_of_a_bad_example(tmp_path, monkeypatch):
  examples = [{'image': np.zeros((8, 8, 3), np.uint8), 'label': i % 10} for i in range(64)]
  one = streaming.Stream([*examples, {'image': b'', 'label': 0}], image_size=8, threads=2)
  dataset = data.Dataset('stand-in', 10, (8, 8, 3), (0.5,) * 3, (0.5,) * 3, one, one)
  with pytest.raises(
    UserError, match=r'^example 64 \(label 0\) has no image that can be decoded: 0 bytes; '
  ):
    train.train(train.prepare(tiny(), dataset), tmp_path / 'run')
