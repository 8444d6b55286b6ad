"""Batches of a data set too large for memory: read, decoded and cropped on the host.

A batch is a pure function of (seed, epoch, step), and an example's crop one of (seed, epoch,
index). So training that resumes at any step, on any number of processes, sees the same data as
without interruption.
"""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import operator
import os
import pathlib
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import flags
from PIL import Image

from lfg_jax import user_files
from lfg_jax.data import pictures
from lfg_jax.errors import UserError, as_one_line, as_user_errors

RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
CENTRE = 224 / 256  # side of the test crop, as a fraction of the image's short side
WORKER_SECONDS = 30  # a worker lives on after a SIGTERM, while the program handles its own
Box = tuple[float, float, float, float]  # left, top, right, bottom
INT32 = 2**31
ATTEMPTS = 10  # to find a random box that fits, before the central one is used


class Batch(NamedTuple):
  """Examples with weight 1, and padding with weight 0 in the last batch of an epoch."""

  image: np.ndarray | jax.Array  # uint8 [B, H, W, C]
  label: np.ndarray | jax.Array  # int32 [B]
  weight: np.ndarray | jax.Array  # float32 [B]


class Source(Protocol):
  """Random access to examples with an 'image' and an integer 'label'.

  The image is the bytes of an encoded file, or a uint8 array [H, W], [H, W, 1] or [H, W, 3]. What is
  done about depth, colours and orientation of files: see `pictures`.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class BadExample(ValueError):
  """An unusable example; the message is one line and has the example's index in the source."""


@dataclasses.dataclass(frozen=True)
class Stream:
  """A split read from `source`.

  Attributes:
    source: the examples.
    image_size: height and width of the returned images.
    train: whether to shuffle, with random crops and flips; otherwise the order is that of `source`,
      with central crops.
    min_area: the least area of a random crop, as a fraction of the image's (0.3: ImageNet in Ren et
      al. 2023; 0.08: SimCLR).
    seed: seed of shuffling, crops and flips.
    threads: number of threads that read and decode, if there are no workers.
    workers: number of processes that read and decode, each one batch at a time; 0: threads of this
      process.
    classes: labels are 0 … classes − 1; None: any.

  >>> source = [{'image': np.full((20, 30, 3), i, np.uint8), 'label': i} for i in range(5)]
  >>> stream = Stream(source, image_size=8, train=False)
  >>> [(batch.image.shape, batch.label.tolist(), batch.weight.tolist()) for batch in stream.epoch(0, 1, 3)]
  [((3, 8, 8, 3), [3, 4, 0], [1.0, 1.0, 0.0])]
  """

  source: Source
  image_size: int = 224
  train: bool = True
  min_area: float = 0.3
  seed: int = 0
  threads: int = 16
  workers: int = 0
  classes: int | None = None

  @property
  def examples(self) -> int:
    """Number of examples."""
    return len(self.source)

  def epoch(
    self,
    epoch: int,
    first_step: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
  ) -> Iterator[Batch]:
    """Batches of an epoch, from `first_step` on. An epoch has every example exactly once.

    Args:
      epoch: number of the epoch, which determines order, crops and flips.
      first_step: number of batches to skip, without reading them.
      batch_size: number of examples in the global batch, B.
      process_index, process_count: this process gets the process_index-th of process_count equal,
        contiguous slices of every global batch.

    Returns:
      Numpy batches, images uint8 [B / process_count, image_size, image_size, 3].

    Raises:
      ValueError: the number of processes does not divide the batch size.
      BadExample: raised by the iterator, for an unusable example.
    """
    if batch_size < 1 or batch_size % process_count:
      raise ValueError(f'batch size {batch_size} does not divide among {process_count} processes')
    import grain  # here: only streams are worth its second of start-up and warnings about jaxlib

    local = batch_size // process_count
    order = grain.MapDataset.range(self.examples)
    if self.train:
      # A hash of both numbers: with seed + epoch, as in grain, seeds 0 and 1 would share orders.
      (mixed,) = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
      order = order.shuffle(seed=int(mixed))

    def read(slot: int) -> Batch:
      step, row = divmod(slot, local)
      position = step * batch_size + process_index * local + row
      return self.example(epoch, order[position]) if position < self.examples else self._padding()

    steps = -(-self.examples // batch_size)
    slots = grain.MapDataset.range(min(first_step, steps) * local, steps * local).map(read)
    return iter(self._by_workers(slots, local) if self.workers else self._by_threads(slots, local))

  def _by_threads(self, slots: Any, batch_size: int) -> Any:
    """Reads two batches ahead of the device."""
    import grain

    options = grain.ReadOptions(
      num_threads=self.threads, prefetch_buffer_size=max(2 * batch_size, self.threads)
    )
    return slots.to_iter_dataset(options).batch(batch_size)

  def _by_workers(self, slots: Any, batch_size: int) -> Any:
    """Each of n workers makes every n-th batch, one batch ahead."""
    import grain

    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain reads its own
    self._sendable()
    init = functools.partial(_be_worker, user_files.loaded())
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    workers = grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=1)
    return slots.batch(batch_size).to_iter_dataset(alone).mp_prefetch(workers, init)

  def _sendable(self) -> None:
    """Raises UserError if the source cannot be sent to a worker."""
    import cloudpickle

    try:
      cloudpickle.dumps(self.source)
    except Exception as error:  # what is raised depends on the object that stands in the way
      reason = as_one_line(error, 'the source of a stream cannot be sent to its workers')
      raise UserError(f'{reason}; allowed: workers=0, or a source that can be pickled') from error

  def example(self, epoch: int, index: int) -> Batch:
    """One example without a batch axis, cropped as in this epoch."""
    with as_user_errors(()):  # a worker's own kinds of exceptions could not be sent from there
      example = self.source[index]
    with _named(example, index, self.classes) as (picture, label):
      flip = False
      if self.train:
        rng = np.random.default_rng((self.seed, epoch, index))
        box = random_box(rng, *picture.size, self.min_area)
        flip = rng.random() < 0.5
      else:
        box = centre_box(*picture.size)
      image = cropped(picture, box, self.image_size)
    if flip:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Batch(np.asarray(image), np.array(label, np.int32), np.array(1, np.float32))

  def _padding(self) -> Batch:
    image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    return Batch(image, np.array(0, np.int32), np.array(0, np.float32))


def _be_worker(own: Iterable[tuple[pathlib.Path, bytes]], *_: int) -> None:
  """Called in a worker: makes it end with the program, not before by Ctrl-C or SIGTERM.

  It then knows the user's `own` files, as the source may be defined in one.
  """

  def end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
      parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: threading.Timer(WORKER_SECONDS, os._exit, (1,)).start())
  user_files.load_again(own)


def random_box(rng: np.random.Generator, width: int, height: int, min_area: float) -> Box:
  """(left, top, right, bottom) of a random crop.

  Its area is uniform in [min_area, 1], its aspect ratio log-uniform. If no random box fits, as in a
  very long image, it is the largest central box with an allowed ratio.

  >>> random_box(np.random.default_rng(0), 100, 10, 1.0)
  (43.5, 0.0, 56.5, 10.0)
  """
  for _ in range(ATTEMPTS):
    area = rng.uniform(min_area, 1) * width * height
    ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  return _central(
    width, height, min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
  )


def centre_box(width: int, height: int) -> Box:
  """(left, top, right, bottom) of the central square of an image.

  It holds the central 224×224 pixels of the image, scaled so that its short side is 256.

  >>> centre_box(512, 256)
  (144.0, 16.0, 368.0, 240.0)
  """
  side = CENTRE * min(width, height)
  return _central(width, height, side, side)


def _central(width: int, height: int, w: float, h: float) -> Box:
  return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def decode(
  example: Mapping[str, Any], index: int, classes: int | None = None
) -> tuple[Image.Image, int]:
  """The image in RGB (some of ImageNet's files are grey), and the label.

  Raises:
    BadExample: the file is not an image or is truncated, the array is not an image, or the label is
      not an integer or out of range.
  """
  with _named(example, index, classes) as (picture, label):
    return pictures.as_rgb(picture), label


@contextlib.contextmanager
def _named(
  example: Mapping[str, Any], index: int, classes: int | None
) -> Iterator[tuple[Image.Image, int]]:
  """Yields picture and label; whatever is wrong with the picture, until the end, is a `BadExample`."""
  if not isinstance(example, Mapping) or not {'image', 'label'} <= {*example}:
    given = (
      f'the fields {sorted(example)}' if isinstance(example, Mapping) else type(example).__name__
    )
    raise BadExample(f"example {index} is {given}; allowed: a dict with 'image' and 'label'")
  label, image = _integer(example['label'], index, classes), example['image']
  try:
    yield pictures.opened(image), label
  # What Pillow raises depends on the file.
  except Exception as error:
    reason = ' '.join(str(error).split())
    raise BadExample(
      f'example {index} (label {label}) has no image that can be decoded: {_kind(image)}; {reason}'
    ) from error


def _integer(label: Any, index: int, classes: int | None) -> int:
  low, high = (-INT32, INT32 - 1) if classes is None else (0, classes - 1)
  try:
    number = operator.index(label)
  except TypeError as error:
    raise BadExample(
      f'example {index} has the label {_short(label)}, {_kind(label)}; allowed: an integer'
    ) from error
  if not low <= number <= high:
    raise BadExample(f'example {index} has the label {number}; allowed: {low} … {high}')
  return number


def _kind(value: Any) -> str:
  if isinstance(value, bytes):
    return f'{len(value)} bytes'
  return f'{value.dtype} {value.shape}' if hasattr(value, 'dtype') else type(value).__name__


def _short(value: Any, width: int = 40) -> str:
  text = ' '.join(repr(value).split())
  return text if len(text) <= width else f'{text[:width]}…'


def cropped(picture: Image.Image, box: Box, size: int) -> Image.Image:
  """The box in RGB, scaled to size × size.

  Cropping and scaling resample only once. JPEG files are decoded at 1/2, 1/4 or 1/8 of their size
  if the box then still has at least `size` pixels a side. That is much cheaper, and omits only
  frequencies that scaling would remove.

  >>> cropped(Image.new('L', (8, 4)), (0, 0, 4, 4), 2).getpixel((1, 1))
  (0, 0, 0)
  """
  width, height = picture.size
  shrink = min(box[2] - box[0], box[3] - box[1]) / size
  scale = max(s for s in (1, 2, 4, 8) if s <= max(shrink, 1))
  least = (max(1, width // scale), max(1, height // scale))
  if scale > 1 and (drafted := picture.draft('RGB', least)):
    ratio = drafted[1][2] / width
    left, top, right, bottom = (ratio * side for side in box)
    box = left, top, right, bottom
  return pictures.as_rgb(picture).resize((size, size), Image.Resampling.BICUBIC, box=box)
