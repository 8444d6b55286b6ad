"""Files of any depth, colour space and orientation: as they look, with 8 bits a colour, or refused."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image

from lfg_jax.data import streaming

BYTE_40x40 = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1))
DEEP_40x40 = BYTE_40x40 * np.uint16(256) + np.arange(40, dtype=np.uint16) * 6
COLOUR = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def file_of(picture, form='PNG', **fields):
  file = io.BytesIO()
  picture.save(file, form, **fields)
  return file.getvalue()


def pixels(image):
  """What a stream reads: the decoded picture; its crop must be of the same colours."""
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    picture, _ = streaming.decode({'image': image, 'label': 0}, 0)
  one = streaming.Stream([{'image': image, 'label': 0}], image_size=8, train=False)
  (batch,) = one.epoch(0, 0, 1)
  box = streaming.centre_box(*picture.size)
  crop = picture.resize((8, 8), Image.Resampling.BICUBIC, box=box)
  assert np.abs(batch.image[0].astype(int) - np.asarray(crop)).max() <= 6
  return np.asarray(picture)


@pytest.mark.parametrize(
  ('form', 'fields'),
  [('PNG', {}), ('PPM', {}), ('TIFF', {}), ('JPEG2000', {'irreversible': False})],
)
def test_grey_of_16_bits_keeps_its_upper_8(form, fields):
  found = pixels(file_of(Image.fromarray(DEEP_40x40), form, **fields))
  np.testing.assert_array_equal(found, np.repeat(BYTE_40x40[..., None], 3, -1))


def test_colours_of_16_bits_keep_their_upper_8():
  """Pillow can't write them: a PPM by hand."""
  deep = (COLOUR.astype('>u2') << 8) + 200
  found = pixels(b'P6 20 12 65535\n' + deep.astype('>u2').tobytes())
  assert np.abs(found.astype(int) - COLOUR).max() <= 1


@pytest.mark.parametrize(
  ('pixels_40x40', 'fields', 'mode'),
  [
    (DEEP_40x40.astype(np.float32), {}, 'F'),
    (BYTE_40x40 / np.float32(255), {}, 'F'),
    (DEEP_40x40.astype(np.int32), {}, 'I'),
    (DEEP_40x40, {'tiffinfo': {262: 0}}, 'I;16'),  # 0 is white
  ],
)
def test_depths_of_unknown_range_are_refused(pixels_40x40, fields, mode):
  file = file_of(Image.fromarray(pixels_40x40), 'TIFF', **fields)
  with pytest.raises(
    streaming.BadExample, match=rf'^example 3 .* TIFF in mode {mode}; allowed: 8 '
  ):
    streaming.decode({'image': file, 'label': 0}, 3)


def tiff_of_12_bits(value):
  """Pillow can't write one: two grey pixels, in three bytes."""
  tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
  entries = b''.join(struct.pack('<HHII', tag, 4, 1, number) for tag, number in tags.items())
  pixels = (value << 12 | value).to_bytes(3, 'big') + b'\0'
  return (
    b'II*\0' + struct.pack('<I', 12) + pixels + struct.pack('<H', len(tags)) + entries + bytes(4)
  )


def test_grey_of_12_bits_is_refused():
  file = tiff_of_12_bits(0xFFF)
  assert np.asarray(Image.open(io.BytesIO(file))).tolist() == [[0xFFF, 0xFFF]]
  with pytest.raises(streaming.BadExample, match='TIFF in mode I;16; allowed: 8 bits'):
    streaming.decode({'image': file, 'label': 0}, 0)


def test_colours_of_another_space_are_refused():
  file = file_of(Image.frombytes('LAB', (20, 12), COLOUR.tobytes()), 'TIFF')
  with pytest.raises(
    streaming.BadExample, match='TIFF in mode LAB; allowed: 8 bits a colour of grey,'
  ):
    streaming.decode({'image': file, 'label': 0}, 0)


@pytest.mark.parametrize('form', ['PNG', 'TIFF'])
def test_black_and_white(form):
  bits = BYTE_40x40 > 99
  found = pixels(file_of(Image.fromarray(bits), form))
  np.testing.assert_array_equal(found[..., 0], 255 * bits)


@pytest.mark.parametrize('transparency', [None, 0, bytes([0, 128])])
def test_palettes(transparency):
  """Transparency, of one entry or by entry, hides no colour."""
  picture = Image.fromarray(np.indices((12, 20)).sum(0).astype(np.uint8) % 2).convert('P')
  picture.putpalette([200, 10, 30, 5, 90, 250])
  fields = {} if transparency is None else {'transparency': transparency}
  found = pixels(file_of(picture, **fields))
  assert found[0, 0].tolist() == [200, 10, 30] and found[0, 1].tolist() == [5, 90, 250]


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparency_is_ignored(mode):
  alpha = Image.fromarray(BYTE_40x40[:12, :20].copy())
  plain = Image.fromarray(COLOUR).convert(mode.removesuffix('A'))
  picture = plain.copy()
  picture.putalpha(alpha)
  assert picture.mode == mode
  np.testing.assert_array_equal(pixels(file_of(picture)), np.asarray(plain.convert('RGB')))


@pytest.mark.parametrize('mode', ['CMYK', 'YCbCr'])
def test_jpegs_of_other_colours(mode):
  smooth = np.stack([BYTE_40x40, BYTE_40x40.T, 255 - BYTE_40x40], -1)
  found = pixels(file_of(Image.fromarray(smooth).convert(mode), 'JPEG', quality=95))
  assert np.abs(found.astype(int) - smooth).mean() < 3


@pytest.mark.parametrize('size', [1, 40], ids=['small', 'large enough for a draft'])
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_the_orientation_of_the_tag_is_applied(form, orientation, size):
  """Worked out from the tag's definition: where row 0 and column 0 of the file are."""
  upright = np.zeros((12, 20, 3), np.uint8)
  upright[:6, :10] = 240, 40, 40
  upright[6:, :10] = 40, 240, 40
  upright[:6, 10:] = 40, 40, 240
  upright = np.kron(upright, np.ones((size, size, 1), np.uint8))
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.swapaxes(0, 1),
    6: np.rot90(upright),
    7: upright[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(upright, -1),
  }[orientation]
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  lossless = {'WEBP': {'lossless': True}, 'JPEG': {'quality': 95, 'subsampling': 0}}.get(form, {})
  found = pixels(
    file_of(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **lossless)
  )
  assert found.shape == upright.shape
  assert np.abs(found.astype(int) - upright).mean() < 6


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP'])
def test_damaged_tags_leave_the_picture(form):
  exif, rng = Image.Exif(), np.random.default_rng(0)
  exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, 72.5
  exif[ExifTags.Base.Make] = 'camera'
  whole, picture = exif.tobytes(), Image.fromarray(np.full((12, 20, 3), 90, np.uint8))
  for _ in range(300):
    damaged = bytearray(whole)
    for place in rng.integers(0, len(whole), 3):
      damaged[place] = rng.integers(256)
    file = file_of(picture, form, exif=bytes(damaged))
    assert (np.asarray(streaming.decode({'image': file, 'label': 0}, 0)[0]) == 90).all()


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF'])
def test_a_truncated_file_is_named(form):
  whole = file_of(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), form
  )
  for part in (len(whole) // 2, len(whole) * 3 // 4):
    with pytest.raises(streaming.BadExample, match=rf'^example 4 .*: {part} bytes; '):
      streaming.decode({'image': whole[:part], 'label': 0}, 4)


@pytest.mark.parametrize('shape', [(12, 20), (12, 20, 1), (12, 20, 3)])
def test_arrays_of_bytes_are_images(shape):
  image = np.full(shape, 7, np.uint8)
  assert pixels(image).shape == (12, 20, 3) and (pixels(image) == 7).all()


@pytest.mark.parametrize(
  'image',
  [
    DEEP_40x40,
    DEEP_40x40.astype(np.int32),
    DEEP_40x40.astype(np.float32),
    COLOUR.astype(np.uint16),
    COLOUR / 255,
    BYTE_40x40 > 9,
    COLOUR[..., :2],
    np.concatenate([COLOUR, COLOUR[..., :1]], -1),
    COLOUR[:0],
    COLOUR[0, 0],
    COLOUR.tolist(),
    'picture.png',
    None,
  ],
  ids=lambda image: f'{getattr(image, "dtype", type(image))}{getattr(image, "shape", "")}',
)
def test_other_arrays_are_refused(image):
  with pytest.raises(
    streaming.BadExample, match=r'^example 2 \(label 0\) .*; allowed: an encoded file, or u'
  ) as error:
    streaming.decode({'image': image, 'label': 0}, 2)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('label', 'told'),
  [
    (1.0, 'label 1.0, float; allowed: an integer'),
    (np.float32(1.7), r'label .*1.7.*, float32 \(\); allowed: an integer'),
    ('3', "label '3', str; allowed: an integer"),
    (None, 'label None, NoneType; allowed: an integer'),
    (np.array([3]), r'label array\(\[3\]\), int64 \(1,\); allowed: an integer'),
    (2**40, 'label 1099511627776; allowed: -2147483648 … 2147483647'),
  ],
)
def test_labels_that_are_no_integers_are_refused(label, told):
  with pytest.raises(streaming.BadExample, match=rf'^example 5 has the {told}$'):
    streaming.decode({'image': COLOUR, 'label': label}, 5)


@pytest.mark.parametrize('label', [2, np.int64(2), np.uint8(2), np.array(2)])
def test_integers_of_any_type_are_labels(label):
  assert streaming.decode({'image': COLOUR, 'label': label}, 5)[1] == 2


@pytest.mark.parametrize(
  ('example', 'told'),
  [((COLOUR, 1), 'tuple'), ({'image': COLOUR}, r"the fields \['image'\]"), (None, 'NoneType')],
)
def test_examples_of_another_form_are_refused(example, told):
  with pytest.raises(
    streaming.BadExample, match=rf"^example 6 is {told}; allowed: a dict with 'image' and"
  ):
    streaming.decode(example, 6)
