"""Measures how fast photographs become batches: in decoding alone, in streams, and in training.

    python experiments/bench/input_speed.py [--photos=512] [--width=500] [--height=375]
        [--workers=0,2] [--out=DIR] [--config=NAME or FILE] [--config.field=value …]

The program makes the photographs: random ones, about as smooth as natural ones, as JPEG files of
quality 90. DIR gets input_speed.json, with images per second of wall-clock time and of this
process's CPU time. The latter is less affected by other work on the machine. `waiting` is the time
that a run of two epochs waits for input, as a share of its time for input and steps.
"""

import io
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from lfg_jax import data
from lfg_jax.data.streaming import Stream, decode
from lfg_jax.training import command_line
from lfg_jax.training.run import results
from lfg_jax.training.train import prepare, train

DIFFERENT = 32  # number of different photographs; then they repeat
BATCH = 64
CLASSES = 10


class Photographs:
  """A source of `count` examples, like a data set on disk."""

  def __init__(self, count: int, width: int, height: int) -> None:
    self._count = count
    self._files = [photograph(seed, width, height) for seed in range(min(count, DIFFERENT))]

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int, /) -> dict[str, Any]:
    return {'image': self._files[index % len(self._files)], 'label': index % CLASSES}


def photograph(seed: int, width: int, height: int, fall: float = 1.25) -> bytes:
  """A JPEG file with random phases, whose amplitudes are proportional to frequency^-fall."""
  rng = np.random.default_rng(seed)
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
  amplitude = np.maximum(frequency, 1 / max(width, height)) ** -fall
  spectra = (amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)) for _ in range(3))
  pixels = np.stack([np.fft.irfft2(spectrum, s=(height, width)) for spectrum in spectra], -1)
  pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
  file = io.BytesIO()
  Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90)
  return file.getvalue()


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  parser = results.parser(__doc__, out='runs/input_speed', config='imagenet')
  parser.number('photos', 512, 'of an epoch', least=2 * BATCH)
  parser.number('width', 500, 'of a photograph', least=8)
  parser.number('height', 375, least=8)
  parser.numbers('workers', '0,2', 'of streams, 0 for threads', least=0)
  options, config = command_line.parse(parser, arguments)
  folder = results.Folder(options.out, __file__, arguments)
  source = Photographs(options.photos, options.width, options.height)
  size = config.image_size or 224
  one = Stream(source, size)
  many = range(4 * DIFFERENT)
  found = {
    'cores': len(os.sched_getaffinity(0)),
    'decoding_alone': rates(lambda: len([decode(source[i], i) for i in many])),
    'with_cropping': rates(lambda: len([one.example(0, i) for i in many])),
    'streams': [
      {
        'workers': count,
        **stream_rates(Stream(source, size, workers=count)),
        'waiting': waiting(config, source, size, count),
      }
      for count in options.workers
    ],
  }
  folder.write('input_speed', **found)
  print(found)


def rates(work: Callable[[], int]) -> dict[str, float]:
  """Images per second and per CPU second of `work`, which returns their number."""
  wall, cpu = time.perf_counter(), time.process_time()
  done = work()
  return {
    'per_second': done / (time.perf_counter() - wall),
    'per_cpu_second': done / (time.process_time() - cpu),
  }


def stream_rates(stream: Stream) -> dict[str, float]:
  """Images per second of an epoch after its first batch, during which workers start.

  The CPU time of workers is not known.
  """
  batches = stream.epoch(0, 0, BATCH)
  next(batches)
  found = rates(lambda: BATCH * len([None for _ in batches]))
  return {'per_second': found['per_second']} if stream.workers else found


def waiting(config: Any, source: Photographs, size: int, workers: int) -> float:
  """The time that a run waits for input, as a share of its time for input and steps."""
  config.epochs, config.batch_size, config.optimizer.warmup_epochs = 2, BATCH, 0.0
  train_split = Stream(source, size, workers=workers)
  test_split = Stream(Photographs(BATCH, size, size), size, train=False)
  dataset = data.Dataset(
    'photographs', CLASSES, (size, size, 3), (0.5,) * 3, (0.2,) * 3, train_split, test_split
  )
  with tempfile.TemporaryDirectory() as folder:
    spent = train(prepare(config, dataset), pathlib.Path(folder))['time']
  return spent['input'] / (spent['input'] + spent['steps'])


if __name__ == '__main__':
  command_line.run(main)
