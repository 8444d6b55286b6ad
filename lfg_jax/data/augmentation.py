"""Augmentation on the device: two random views of every image, or one that is moved and flipped.

The two views are those of SimCLR and BYOL: see Chen et al. 2020, appendix A, and Grill et al. 2020,
appendix B. A view is a crop of random size and shape, with random flips, colour jitter in random
order, greyscale, blur and solarisation. Brightness, contrast and saturation blend with black, the
image's mean grey and its grey image, as in Pillow and torchvision; hue is rotated in HSV.

Everything is per example, with its own key, under `jax.vmap` and `jax.jit`. Views are made
of floats in [0, 1].
"""

import functools
from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp

from lfg_jax import promotion
from lfg_jax.data.streaming import ATTEMPTS, RATIO

JITTER = (0.4, 0.4, 0.2, 0.1)  # strength of brightness, contrast, saturation, hue
BLUR_SIGMA = (0.1, 2.0)


class Chances(NamedTuple):
  """Probabilities of the changes to a view."""

  flip: float = 0.5
  jitter: float = 0.8
  grey: float = 0.2
  blur: float = 1.0
  solarise: float = 0.0


FIRST, SECOND = Chances(), Chances(blur=0.1, solarise=0.2)  # BYOL, table 6


def views(key_B: jax.Array, image_BxHxWxC: jax.Array, min_area: float = 0.08) -> jax.Array:
  """Two views of every image, one after the other.

  Args:
    key_B: one key for every image.
    image_BxHxWxC: uint8, with three colours or one.
    min_area: the least area of a crop, as a fraction of the image's.

  Returns:
    float32 [2B, H, W, C] of pixels 0 … 255.

  >>> views(jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 16, 16, 1), jnp.uint8)).shape
  (6, 16, 16, 1)
  """
  B, H, W, C = image_BxHxWxC.shape
  pixels = jnp.broadcast_to(image_BxHxWxC.astype(jnp.float32) / 255, (B, H, W, 3))

  def both(key: jax.Array, image: jax.Array) -> jax.Array:
    keys = jax.random.split(key)
    return jnp.stack(
      [
        one_view(k, image, min_area, chances)
        for k, chances in zip(keys, (FIRST, SECOND), strict=True)
      ]
    )

  return 255 * jax.vmap(both)(key_B, pixels).reshape(2 * B, H, W, 3)[..., :C]


def moved(
  key_B: jax.Array, image_BxHxWxC: jax.Array, shift: int = 0, flip: bool = False
) -> jax.Array:
  """Every image moved at random, and mirrored with probability 1/2.

  Args:
    key_B: one key for every image.
    image_BxHxWxC: of any type.
    shift: the largest number of pixels to move, in both directions of both axes. What comes in
      from outside of the image is black.
    flip: whether half of the images are mirrored, left to right.

  Returns:
    Images of the same shape and type.

  >>> keys, image = jax.random.split(jax.random.key(0), 3), jnp.ones((3, 4, 4, 1), jnp.uint8)
  >>> moved(keys, image, shift=1).sum((1, 2, 3)).tolist()
  [12, 16, 12]
  """
  border = ((shift, shift), (shift, shift), (0, 0))

  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    where, side = jax.random.split(key)
    if shift:
      image = dm_pix.random_crop(where, jnp.pad(image, border), image.shape)
    return dm_pix.random_flip_left_right(side, image) if flip else image

  return jax.vmap(one)(key_B, image_BxHxWxC)


def one_view(key: jax.Array, image: jax.Array, min_area: float, chances: Chances) -> jax.Array:
  """A view [H, W, 3] of one image [H, W, 3] in [0, 1]."""
  keys = jax.random.split(key, 6)
  height, width, _ = image.shape
  image = crop(image, random_box(keys[0], height, width, min_area))
  for k, chance, change in zip(
    keys[1:], chances, (_flip, jitter, _grey, _random_blur, _solarise), strict=True
  ):
    now, how = jax.random.split(k)
    image = jnp.where(jax.random.bernoulli(now, chance), change(how, image), image)
  return image


def random_box(key: jax.Array, height: int, width: int, min_area: float) -> jax.Array:
  """(top, left, height, width) of a crop, uniform in area, log-uniform in aspect ratio.

  It is the first of `streams.ATTEMPTS` draws that fits; if none fits, the largest central crop with
  an allowed aspect ratio.

  >>> random_box(jax.random.key(0), 10, 100, 1.0).astype(int).tolist()
  [0, 43, 10, 13]
  """
  area_key, ratio_key, place_key = jax.random.split(key, 3)
  area_A = jax.random.uniform(area_key, (ATTEMPTS,), minval=min_area) * height * width
  ratio_A = jnp.exp(
    jax.random.uniform(ratio_key, (ATTEMPTS,), minval=jnp.log(RATIO[0]), maxval=jnp.log(RATIO[1]))
  )
  size_Ax2 = jnp.stack([jnp.sqrt(area_A / ratio_A), jnp.sqrt(area_A * ratio_A)], 1)
  whole = jnp.array([height, width], jnp.float32)
  fits_A = (size_Ax2 <= whole[None]).all(1)
  central = jnp.array([min(height, width / RATIO[0]), min(width, height * RATIO[1])], jnp.float32)
  size = jnp.where(fits_A.any(), size_Ax2[jnp.argmax(fits_A)], central)
  place = jnp.where(fits_A.any(), jax.random.uniform(place_key, (2,)), 0.5) * (whole - size)
  return jnp.concatenate([place, size])


def crop(image: jax.Array, box: jax.Array) -> jax.Array:
  """The box (top, left, height, width), scaled to the image's own size by cubic interpolation."""
  scale = jnp.array(image.shape[:2], jnp.float32) / box[2:]
  scaled = jax.image.scale_and_translate(
    image, image.shape, (0, 1), scale, -box[:2] * scale, method='cubic'
  )
  return jnp.clip(scaled, 0, 1)


def jitter(key: jax.Array, image: jax.Array) -> jax.Array:
  """Brightness, contrast, saturation and hue, each once, in random order.

  Under `jax.vmap`, a switch evaluates all its branches: 16 cheap operations.
  """
  order_key, *keys = jax.random.split(key, 5)
  uniform = lambda k, strength, centre: jax.random.uniform(
    k, minval=centre - strength, maxval=centre + strength
  )
  amounts = [
    uniform(k, strength, centre)
    for k, strength, centre in zip(keys, JITTER, (1, 1, 1, 0), strict=True)
  ]
  changes = [
    functools.partial(change, amount=amount)
    for change, amount in zip((brightness, contrast, saturation, hue), amounts, strict=True)
  ]
  order = jax.random.permutation(order_key, len(changes))
  for position in range(len(changes)):
    image = jax.lax.switch(order[position], changes, image)
  return image


def brightness(image: jax.Array, amount: jax.Array | float) -> jax.Array:
  """Blends with black: amount 0 is black, 1 the image."""
  return _blend(jnp.zeros_like(image), image, amount)


def contrast(image: jax.Array, amount: jax.Array | float) -> jax.Array:
  """Blends with the mean of the grey image."""
  return _blend(grey(image).mean(), image, amount)


def saturation(image: jax.Array, amount: jax.Array | float) -> jax.Array:
  """Blends with the grey image."""
  return _blend(grey(image), image, amount)


def hue(image: jax.Array, amount: jax.Array | float) -> jax.Array:
  """Rotates the hue by a fraction of the full circle."""
  with promotion.allowed():
    turned = dm_pix.adjust_hue(image, amount)
  return jnp.clip(turned, 0, 1)


def grey(image: jax.Array) -> jax.Array:
  """[H, W, 3]: three equal channels of luma (ITU-R 601)."""
  return dm_pix.rgb_to_grayscale(image, keep_dims=True)


def _blend(a: jax.Array, b: jax.Array, amount: jax.Array | float) -> jax.Array:
  return jnp.clip(a + amount * (b - a), 0, 1)


def blur(image: jax.Array, sigma: jax.Array | float) -> jax.Array:
  """Gaussian blur with a kernel of a tenth of the image (odd, rounded up) and a repeated border.

  It is a sum of shifted images: on CPUs, a convolution with one kernel per image is slow, and the
  blur in dm-pix has a black border.
  """
  radius = image.shape[0] // 20
  weight_K = jnp.exp(-(jnp.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
  weight_K = weight_K / weight_K.sum()
  for axis in (0, 1):
    padded = jnp.pad(
      image, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode='edge'
    )
    shifted = [
      jax.lax.slice_in_dim(padded, k, k + image.shape[axis], axis=axis)
      for k in range(2 * radius + 1)
    ]
    image = sum((w * s for w, s in zip(weight_K, shifted, strict=True)), jnp.zeros(()))
  return image


def _flip(key: jax.Array, image: jax.Array) -> jax.Array:
  del key
  return dm_pix.flip_left_right(image)


def _grey(key: jax.Array, image: jax.Array) -> jax.Array:
  del key
  return grey(image)


def _random_blur(key: jax.Array, image: jax.Array) -> jax.Array:
  return blur(image, jax.random.uniform(key, minval=BLUR_SIGMA[0], maxval=BLUR_SIGMA[1]))


def _solarise(key: jax.Array, image: jax.Array) -> jax.Array:
  del key
  return dm_pix.solarize(image, 0.5)
