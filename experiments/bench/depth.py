"""Measures the temporaries, compile time and run time of a gradient against depth.

    python experiments/bench/depth.py [--model=M/8/16] [--batch=64] [--micro_batch=0]
        [--algorithms=BP,LG-FG-A+] [--blocks=2,4,8,16,32,64] [--repetitions=3] [--out=DIR]

Backprop must keep the activities of all blocks, a local rule those of one block. DIR gets
depth.json (one row per algorithm and depth) and depth.png. Temporaries are those of the gradient.
If a batch is processed in parts, they include a copy of all gradients, those of a part, which is
subtracted.
"""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from lfg_jax import data
from lfg_jax.errors import as_user_errors
from lfg_jax.local.staged import StagedModel
from lfg_jax.models import mixer
from lfg_jax.models.sizes import mixer_spec, parse, patches
from lfg_jax.training import command_line
from lfg_jax.training.cost import timing
from lfg_jax.training.rules import algorithms, rules
from lfg_jax.training.run import plots, results

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  parser = results.parser(
    __doc__, out='runs/depth', model='M/8/16', batch=64, algorithms='BP,LG-FG-A+', repetitions=3
  )
  parser.number('micro_batch', 0, 'examples at once; 0: what suits the machine', least=0)
  parser.numbers('blocks', '2,4,8,16,32,64')
  options = parser.parse(arguments)
  with as_user_errors():
    for blocks in options.blocks:  # all mistakes before any long work
      model_of(options.model, blocks)
  folder = results.Folder(options.out, __file__, arguments)
  rows: list[Row] = []
  for blocks in options.blocks:
    for name in options.algorithms:
      rows.append(measure(name, blocks, options))
      print(rows[-1])
      folder.write('depth', rows=rows)
  draw(folder.path / 'depth.png', rows)


def model_of(size: str, blocks: int) -> StagedModel:
  """A model with this many blocks, for images of CIFAR-10's size."""
  images = data.TFDS['cifar10']
  spec = mixer_spec(size, image_shape=images.image_shape, classes=images.classes, blocks=blocks)
  prepare = functools.partial(patches, side=parse(size)[1], mean=images.mean, std=images.std)
  return mixer.staged(spec, prepare)


def measure(name: str, blocks: int, options: command_line.Options) -> Row:
  """Compiles and times one gradient on random images of CIFAR-10's size."""
  images = data.TFDS['cifar10']
  model = model_of(options.model, blocks)
  algorithm = algorithms.compose(
    rules.REGISTRY[name], rules.Options(micro_batch=options.micro_batch), model
  )
  keys = jax.random.split(jax.random.key(0), 4)
  batch = data.Batch(
    jax.random.randint(keys[0], (options.batch, *images.image_shape), 0, 256).astype(jnp.uint8),
    jax.random.randint(keys[1], (options.batch,), 0, images.classes),
    jnp.full((options.batch,), 1 / options.batch),
  )
  variables = jax.jit(algorithm.init)(keys[2])
  lowered = jax.jit(algorithm.gradient).lower(variables, keys[3], batch)
  begin = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - begin
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables['params']))
  in_parts = algorithm.composition.microbatches(options.batch) > 1
  return {
    'algorithm': name,
    'model': options.model,
    'batch': options.batch,
    'micro_batch': options.micro_batch,
    'blocks': blocks,
    'parameters_bytes': weights,
    'temporaries_bytes': timing.temporaries(compiled) - in_parts * weights,
    'compile_seconds': seconds,
    'ms_gradient': timing.one_ms(lambda: compiled(variables, keys[3], batch), options.repetitions),
  }


def draw(path: pathlib.Path, rows: list[Row]) -> None:
  """Draws three panels against the number of blocks."""
  figure = Figure(figsize=(11, 3.3), layout='constrained')
  panels = (
    ('temporaries_bytes', 2**-20, 'temporaries, MiB'),
    ('compile_seconds', 1, 'compile time, s'),
    ('ms_gradient', 1, 'gradient, ms'),
  )
  names = list(dict.fromkeys(row['algorithm'] for row in rows))
  for axes, (key, scale, label) in zip(figure.subplots(1, 3), panels, strict=True):
    ends = []
    for colour, name in zip(plots.COLOURS, names, strict=False):
      own = [row for row in rows if row['algorithm'] == name]
      values = [scale * row[key] for row in own]
      axes.plot([row['blocks'] for row in own], values, 'o-', color=colour)
      ends.append(values[-1])
    axes.set(xlabel='blocks', ylabel=label, ylim=(0, None))
    counts = sorted({row['blocks'] for row in rows})
    axes.set_xscale('log', base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.grid(alpha=0.3)
    plots.name_lines(axes, names, ends)
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  command_line.run(main)
