"""Encoded files and arrays as pictures with 8 bits a colour, or refused.

- Orientation: the one that an EXIF tag asks for, as a viewer shows it. TFDS and torchvision ignore
  the tag.
- Depth: of 16 bits a colour, the upper 8, as TFDS decodes them. Images of 32 bits, of floating-point
  numbers, or of 16 bits whose range the file does not tell are refused.
- Colours: grey, palette, CMYK and YCbCr become RGB. Embedded colour profiles are ignored, and so is
  transparency: a pixel has the colour that is stored for it. Both are so in TFDS and torchvision.
- Files with several pictures: the first.
"""

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL import TiffImagePlugin as tiff

ALLOWED = 'an encoded file, or uint8 [H, W], [H, W, 1] or [H, W, 3]'
SHALLOW = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'HSV')
TURN = {  # from what is stored, by EXIF's orientation; 1 is upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# Formats whose grey images of 16 bits go from 0 to 65535. Pillow scales the latter two's.
DEEP = ('PNG', 'PPM', 'JPEG2000')
BLACK_IS_ZERO, UNSIGNED = 1, 1  # values of a TIFF's tags


def opened(image: Any) -> Image.Image:
  """The picture, upright and with 8 bits a colour; a file's pixels may not be decoded yet.

  Raises:
    ValueError: it is neither a file's bytes nor an array of bytes, or its depth is not allowed.
    Exception: whatever Pillow raises for a file that it cannot decode.

  >>> opened(np.full((2, 3), 7, np.uint8)).size
  (3, 2)
  """
  if isinstance(image, bytes):
    picture = Image.open(io.BytesIO(image))
    upright = _upright(picture)
    return upright if upright.mode in SHALLOW else _upper_bits(upright, picture)
  if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
    raise ValueError(f'allowed: {ALLOWED}')
  if image.ndim == 3 and image.shape[2] == 1:
    image = image[..., 0]
  if not image.size or (image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3)):
    raise ValueError(f'allowed: {ALLOWED}')
  return Image.fromarray(image)


def as_rgb(picture: Image.Image) -> Image.Image:
  """The picture in RGB, decoded.

  >>> as_rgb(Image.new('LA', (1, 1), (9, 0))).getpixel((0, 0))
  (9, 9, 9)
  """
  picture.load()
  if picture.mode == 'P':  # of transparent palettes, Pillow warns on the direct way
    picture = picture.convert('RGBA')
  return picture if picture.mode == 'RGB' else picture.convert('RGB')


def _upright(picture: Image.Image) -> Image.Image:
  """The picture, turned as its EXIF tag asks; Pillow turns TIFFs itself.

  Not `ImageOps.exif_transpose`, which writes all tags anew and fails if one of them is damaged.
  """
  try:
    turn = None if picture.format == 'TIFF' else picture.getexif().get(ExifTags.Base.Orientation)
  except Exception:  # what a damaged tag raises depends on the damage; the picture may be sound
    return picture
  return picture.transpose(TURN[turn]) if turn in TURN else picture


def _upper_bits(picture: Image.Image, file: Any) -> Image.Image:
  """A grey picture of 16 bits as one of 8; `file` is as opened, with the format and its tags."""
  is_deep = picture.mode.startswith('I') and (file.format in DEEP or _is_deep_tiff(file))
  if not is_deep:
    raise ValueError(
      f'{file.format} in mode {picture.mode}; allowed: 8 bits a colour of grey, RGB, CMYK, YCbCr or a '
      'palette, or 16 bits that go from 0, black, to 65535, white'
    )
  return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def _is_deep_tiff(file: Any) -> bool:
  """Whether a TIFF's pixels are 0 … 65535, from black to white."""
  if file.format != 'TIFF':
    return False
  bits, kind = (file.tag_v2.get(tag) for tag in (tiff.BITSPERSAMPLE, tiff.SAMPLEFORMAT))
  is_grey = file.tag_v2.get(tiff.PHOTOMETRIC_INTERPRETATION) == BLACK_IS_ZERO
  return is_grey and bits == (16,) and kind in (None, (UNSIGNED,))
