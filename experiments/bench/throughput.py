"""Compares training with its bare update in speed: the cost of input, logging and dispatch.

    python experiments/bench/throughput.py [--images=1280] [--epochs=3] [--out=DIR]
        [--config=configs/NAME.py] [--config.field=value …]

The program trains on the first --images images, and times the update alone before and after. DIR
gets throughput.json.
"""

import pathlib
import statistics
import tempfile
import time

import jax

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, optimizers, update
from lfg_jax.training.run import metrics, results
from lfg_jax.training.train import Job, first_images, prepare, train


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  parser = results.parser(__doc__, out='runs/throughput', config='cifar10')
  parser.number('images', 1280, 'of an epoch')
  parser.number('epochs', 3)
  options, config = command_line.parse(parser, arguments)
  if config.pipeline_stages > 1:
    raise UserError(
      f'pipeline_stages is {config.pipeline_stages}; allowed: 1, as the bare update has it'
    )
  config.epochs = config.eval_every = options.epochs
  job = first_images(prepare(config), options.images)
  steps = -(-job.dataset.train.examples // config.batch_size)
  if steps <= config.steps_per_dispatch:
    raise UserError(
      f'--images is {options.images}: an epoch of {steps} steps, the first '
      f'{config.steps_per_dispatch} of which are not timed; allowed: more steps '
      'than config.steps_per_dispatch'
    )
  folder = results.Folder(options.out, __file__, arguments)
  bare = Bare(job)
  before = bare.examples_per_second()
  with tempfile.TemporaryDirectory() as workdir:
    train(job, pathlib.Path(workdir))
    rows = metrics.read_rows(pathlib.Path(workdir, 'metrics.jsonl'))
    speeds = [row['examples_per_second'] for row in rows]
  after = bare.examples_per_second()
  found = {
    'algorithm': config.algorithm,
    'model': config.model.size,
    'batch_size': config.batch_size,
    'train': speeds,
    'bare': [before, after],
    'ratio': statistics.median(speeds) / statistics.mean([before, after]),
  }
  folder.write('throughput', **found)
  print(found)


class Bare:
  """The compiled update of a job, on its first batches."""

  def __init__(self, job: Job) -> None:
    config = job.config
    self.batch_size = config.batch_size
    feed = update.make_feed(job.dataset.train, job.mesh, config.batch_size, jax.random.key(0))
    self.steps = feed.steps
    optimizer = optimizers.make(
      config.optimizer, optimizers.schedule(config.optimizer, feed.steps, config.epochs)
    )
    _, self.inputs = next(feed.epoch(0, 0))
    self.state = update.init_state(job.algorithm, optimizer, jax.random.key(1), job.mesh)
    self.update = update.make_update(job.algorithm, optimizer, job.mesh, feed)
    self._run(1)

  def _run(self, steps: int) -> None:
    for _ in range(steps):
      self.state = self.update(self.state, jax.random.key(2), 1, *self.inputs)
    jax.block_until_ready(self.state)

  def examples_per_second(self) -> float:
    """Speed, measured over as many steps as an epoch has."""
    begin = time.perf_counter()
    self._run(self.steps)
    return self.steps * self.batch_size / (time.perf_counter() - begin)


if __name__ == '__main__':
  command_line.run(main)
