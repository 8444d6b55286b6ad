"""Moved images against NumPy's; the two views' operations against Pillow's, SciPy's and matplotlib's.

The views are of two real photographs.
"""

import functools

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from lfg_jax.data import augmentation
from lfg_jax.data.augmentation import Chances
from tests.statistics import SINGLE, is_mean

NEVER = Chances(0.0, 0.0, 0.0, 0.0, 0.0)
STEP = 1 / 255  # Pillow rounds to whole numbers, sometimes twice


@functools.cache
def photograph(name, size=96):
  return Image.fromarray(load_sample_image(name)).resize((size, size))


def floats(picture):
  return np.asarray(picture, np.float32) / 255


def against_pillow(found, picture, steps=1.0):
  np.testing.assert_allclose(found, floats(picture), atol=(steps + 0.01) * STEP)


photographs = pytest.mark.parametrize(
  'picture', [photograph('china.jpg'), photograph('flower.jpg')], ids=['china', 'flower']
)


@photographs
@pytest.mark.parametrize('amount', [0.6, 0.9, 1.4])
@pytest.mark.parametrize(
  ('change', 'pillow'),
  [
    (augmentation.brightness, ImageEnhance.Brightness),
    (augmentation.contrast, ImageEnhance.Contrast),
    (augmentation.saturation, ImageEnhance.Color),
  ],
)
def test_blends_are_pillows(change, pillow, amount, picture):
  found = change(floats(picture), amount)
  against_pillow(found, pillow(picture).enhance(amount), steps=2)
  assert np.abs(found - floats(picture)).max() > 5 * STEP


@photographs
@pytest.mark.parametrize('amount', [-0.1, 0.03, 0.1])
def test_hue_turns_the_circle_of_colours(amount, picture):
  hsv = matplotlib.colors.rgb_to_hsv(floats(picture).astype(np.float64))
  hsv[..., 0] = (hsv[..., 0] + amount) % 1
  np.testing.assert_allclose(
    augmentation.hue(floats(picture), amount), matplotlib.colors.hsv_to_rgb(hsv), atol=1e-4
  )


@photographs
def test_grey_flip_and_solarise(picture):
  grey = augmentation.grey(floats(picture))
  for channel in range(3):
    against_pillow(grey[..., channel], picture.convert('L'))
  key = jax.random.key(0)
  against_pillow(augmentation._flip(key, floats(picture)), ImageOps.mirror(picture))
  against_pillow(augmentation._solarise(key, floats(picture)), ImageOps.solarize(picture, 128))


@photographs
@pytest.mark.parametrize('sigma', [0.1, 0.7, 2.0])
def test_blur_is_a_gaussian_of_a_tenth_of_the_image(sigma, picture):
  expected = scipy.ndimage.gaussian_filter(
    floats(picture), (sigma, sigma, 0), mode='nearest', radius=(4, 4, 0)
  )
  np.testing.assert_allclose(
    augmentation.blur(jnp.asarray(floats(picture)), sigma), expected, atol=1e-5
  )


@photographs
def test_crop_is_pillows_bicubic(picture):
  top, left, height, width = 10.0, 30.5, 40.0, 25.25
  expected = picture.resize(
    picture.size, Image.Resampling.BICUBIC, (left, top, left + width, top + height)
  )
  found = augmentation.crop(jnp.asarray(floats(picture)), jnp.array([top, left, height, width]))
  # At the box's edges Pillow looks at no pixel outside, scale_and_translate does. Pillow rounds between its two axes.
  against_pillow(found[8:-8, 8:-8], expected.crop((8, 8, 88, 88)), steps=4)


@pytest.mark.parametrize('min_area', [0.08, 0.4])
def test_boxes(min_area):
  keys = jax.random.split(jax.random.key(0), 4000)
  boxes = np.asarray(
    jax.jit(jax.vmap(lambda k: augmentation.random_box(k, 32, 32, min_area)))(keys), np.float64
  )
  top, left, height, width = boxes.T
  assert (
    (boxes[:, :2] >= 0).all() and (top + height <= 32.001).all() and (left + width <= 32.001).all()
  )
  area, ratio = height * width / 32**2, width / height
  assert area.min() >= min_area - 1e-4 and area.max() <= 1.001
  assert ratio.min() >= 0.7499 and ratio.max() <= 1.3334
  assert is_mean(np.log(ratio), 0)  # symmetric in height and width
  # Small boxes always fit: below half the image the area is uniform.
  small = area[area < 0.5]
  assert (
    abs(small.mean() - (min_area + 0.5) / 2)
    < SINGLE * (0.5 - min_area) / 12**0.5 / len(small) ** 0.5
  )


@pytest.mark.full
@pytest.mark.parametrize(
  ('field', 'chance'),
  [('flip', 0.5), ('jitter', 0.8), ('grey', 0.2), ('blur', 0.1), ('solarise', 0.2)],
)
def test_how_often_a_view_is_changed(field, chance):
  """The crop is the whole image, and only one change is possible."""
  image = jnp.asarray(floats(photograph('china.jpg', 20)))
  chances = NEVER._replace(**{field: chance})
  view = lambda key: augmentation.one_view(key, image, 1.0, chances)
  same = jax.jit(lambda key: augmentation.one_view(key, image, 1.0, NEVER))(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 1000)
  views = jax.jit(jax.vmap(view))(keys)
  boxes = jax.jit(jax.vmap(lambda k: augmentation.one_view(k, image, 1.0, NEVER)))(keys)
  changed = np.asarray(jnp.abs(views - boxes).max((1, 2, 3)) > 1e-3)
  assert same.shape == image.shape
  # Of blurs, those below σ = 0.3 change nothing to see.
  expected = chance * (1.7 / 1.9 if field == 'blur' else 1)
  assert abs(changed.mean() - expected) < 4.5 * (expected * (1 - expected) / 1000) ** 0.5


@pytest.mark.full
def test_views_of_an_example_depend_on_its_key_only():
  keys = jax.random.split(jax.random.key(0), 4)
  images = jnp.stack(
    [jnp.asarray(np.asarray(photograph(name, 32))) for name in ('china.jpg', 'flower.jpg')] * 2
  )
  run = jax.jit(augmentation.views)
  both, half = run(keys, images), run(keys[2:], images[2:])
  np.testing.assert_allclose(both[4:], half, atol=1e-3)
  assert jnp.abs(both[0] - both[1]).max() > 1 and jnp.abs(both[0] - both[4]).max() > 1
  assert both.min() >= 0 and both.max() <= 255


def test_moves_and_flips_are_all_equally_likely():
  """Each of 3 × 3 moves and two sides: counts of 3,600 draws within 4.5 σ of 200."""
  image = np.arange(1, 25, dtype=np.uint8).reshape(4, 3, 2)
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  expected = [
    padded[top : top + 4, left : left + 3][:, ::side]
    for top in range(3)
    for left in range(3)
    for side in (1, -1)
  ]
  keys = jax.random.split(jax.random.key(0), 3600)
  move = jax.jit(functools.partial(augmentation.moved, shift=1, flip=True))
  found = np.asarray(move(keys, np.broadcast_to(image, (3600, 4, 3, 2))))
  counts = np.array([(found == one).all((1, 2, 3)).sum() for one in expected])
  assert found.dtype == np.uint8 and counts.sum() == 3600
  assert np.abs(counts - 200).max() < 4.5 * (3600 / 18 * 17 / 18) ** 0.5


@pytest.mark.parametrize(('fields', 'moves'), [({'shift': 1}, 9), ({'flip': True}, 2)])
def test_only_what_is_asked_for_changes(fields, moves):
  image = np.broadcast_to(np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1), (200, 4, 4, 1))
  found = augmentation.moved(jax.random.split(jax.random.key(0), 200), image, **fields)
  assert len(np.unique(found, axis=0)) == moves
