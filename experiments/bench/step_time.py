"""Measures time, memory and arithmetic of a training step by algorithm, and the machine's limit.

    python experiments/bench/step_time.py [--model=M/8/16] [--batch=64]
        [--algorithms=BP,LG-BP,FG-A,LG-FG-W,LG-FG-A+] [--num_tangents=1] [--repetitions=20]
        [--precision=float32|tensorfloat32|bfloat16] [--out=DIR]

The floor is the time that the gradient's matmuls alone would take at the rate of a plain matmul of
the same precision, measured in the same run. 1 / (× floor) is the utilisation of the machine. DIR
gets step_time.json (one row per algorithm), step_time.md and step_time.png.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from lfg_jax import data
from lfg_jax.errors import as_user_errors
from lfg_jax.fields import one_of
from lfg_jax.models import mixer
from lfg_jax.models.sizes import mixer_spec, parse
from lfg_jax.training import command_line, configs, optimizers, update
from lfg_jax.training.cost import timing
from lfg_jax.training.rules import algorithms, rules
from lfg_jax.training.rules.flop import gradient_flop
from lfg_jax.training.run import plots, results

Row = dict[str, Any]
PRECISIONS = ('float32', 'tensorfloat32', 'bfloat16')
_, BLUE, ORANGE, *_ = plots.COLOURS
DEFAULT = 'BP,LG-BP,FG-A,LG-FG-W,LG-FG-A+'


class Step(NamedTuple):
  """One compiled algorithm, with calls of its gradient and of its whole update."""

  gradient: Callable[[], Any]
  update: Callable[[], Any]
  temporaries: int
  gflop: float


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  parser = results.parser(
    __doc__, out='runs/step_time', model='M/8/16', batch=64, algorithms=DEFAULT, repetitions=20
  )
  parser.number('num_tangents', 1, 'tangents per step')
  parser.option('precision', 'float32', 'of matmuls', allowed=one_of(PRECISIONS))
  options = parser.parse(arguments)
  folder = results.Folder(options.out, __file__, arguments)
  # In a bfloat16 model, the rest may be computed in whatever precision suits the machine.
  with jax.default_matmul_precision(None if options.precision == 'bfloat16' else options.precision):
    rows = measure(options)
  folder.write('step_time', rows=rows)
  draw(folder.path / 'step_time.png', rows)
  folder.write_table('step_time', table(rows))


def measure(options: command_line.Options) -> list[Row]:
  """One row per algorithm. Backprop is always timed, for comparison with the others."""
  names, batch = options.algorithms, options.batch
  with as_user_errors():
    steps = {name: compile_step(name, options) for name in dict.fromkeys(('BP', *names))}
  product, product_flop = timing.matmul(
    jnp.bfloat16 if options.precision == 'bfloat16' else jnp.float32
  )
  functions = {'matmul': product}
  for name, step in steps.items():
    functions |= {f'{name} gradient': step.gradient, f'{name} update': step.update}
  ms = {
    name: timing.median_ms(seconds)
    for name, seconds in timing.interleaved(functions, options.repetitions).items()
  }
  rate = product_flop / 1e6 / ms['matmul']  # GFLOP/s
  return [
    {
      'algorithm': name,
      'model': options.model,
      'batch': batch,
      'num_tangents': options.num_tangents,
      'precision': options.precision,
      'matmul_gflop_per_s': rate,
      'examples_per_s': 1e3 * batch / ms[f'{name} update'],
      'ms_gradient': ms[f'{name} gradient'],
      'ms_update': ms[f'{name} update'],
      'temporaries_bytes': steps[name].temporaries,
      'gflop': steps[name].gflop,
      'gflop_per_s': 1e3 * steps[name].gflop / ms[f'{name} gradient'],
      'ratio_to_bp': ms[f'{name} gradient'] / ms['BP gradient'],
      'ratio_to_floor': ms[f'{name} gradient'] / (1e3 * steps[name].gflop / rate),
    }
    for name in names
  ]


def compile_step(name: str, options: command_line.Options) -> Step:
  """Compiles an algorithm on random images.

  They have CIFAR-10's size, or MNIST's if the whole image is one patch.
  """
  config = configs.base()
  model, batch, num_tangents = options.model, options.batch, options.num_tangents
  config.algorithm, config.model.size, config.estimator.num_tangents = name, model, num_tangents
  config.model.precision = 'bfloat16' if options.precision == 'bfloat16' else 'float32'
  images = data.TFDS['mnist' if parse(model)[1] == 1 else 'cifar10']
  keys = jax.random.split(jax.random.key(0), 4)
  split = data.Arrays(
    jax.random.randint(keys[0], (batch, *images.image_shape), 0, 256).astype(jnp.uint8),
    jax.random.randint(keys[1], (batch,), 0, images.classes),
  )
  dataset = data.Dataset(
    'random', images.classes, images.image_shape, images.mean, images.std, split, split
  )
  mesh = update.make_mesh()
  algorithm = algorithms.make(config, dataset, update.AXIS)
  optimizer = optimizers.make(config.optimizer, config.optimizer.learning_rate)
  feed = update.make_feed(split, mesh, batch)
  _, inputs = next(feed.epoch(0, 0))
  state = update.init_state(algorithm, optimizer, keys[2], mesh)
  gradient = (
    jax.jit(update.make_gradient(algorithm, mesh, feed)).lower(state, keys[3], *inputs).compile()
  )
  step = update.make_update(algorithm, optimizer, mesh, feed)

  def next_state() -> update.TrainState:
    nonlocal state
    state = step(state, keys[3], 1, *inputs)
    return state

  spec = mixer_spec(model, image_shape=images.image_shape, classes=images.classes)
  staged = mixer.staged(spec, lambda image: image)
  flop = batch * gradient_flop(
    staged, rules.REGISTRY[name], rules.Options(num_tangents=num_tangents)
  )
  return Step(
    lambda: gradient(state, keys[3], *inputs), next_state, timing.temporaries(gradient), flop / 1e9
  )


def table(rows: list[Row]) -> str:
  """The rows as a Markdown table."""
  first = rows[0]
  head = (
    'algorithm | gradient, ms | update, ms | examples/s | temporaries, MiB | GFLOP | GFLOP/s '
    '| × BP | × floor'
  )
  cells = [
    [
      r['algorithm'],
      f'{r["ms_gradient"]:.0f}',
      f'{r["ms_update"]:.0f}',
      f'{r["examples_per_s"]:.0f}',
      f'{r["temporaries_bytes"] / 2**20:.0f}',
      f'{r["gflop"]:.1f}',
      f'{r["gflop_per_s"]:.0f}',
      f'{r["ratio_to_bp"]:.2f}',
      f'{r["ratio_to_floor"]:.2f}',
    ]
    for r in rows
  ]
  return (
    f'{first["model"]}, batch {first["batch"]}, {first["num_tangents"]} tangents, '
    f'{first["precision"]}, {jax.devices()[0].device_kind}; a plain matmul: '
    f'{first["matmul_gflop_per_s"]:.0f} GFLOP/s\n\n{results.in_table(head, cells)}\n'
  )


def draw(path: pathlib.Path, rows: list[Row]) -> None:
  """Draws bars: the times of gradient and update with the floor, and the temporaries."""
  figure = Figure(figsize=(9, 3.5), layout='constrained')
  time_axes, memory_axes = figure.subplots(1, 2)
  names, places = [r['algorithm'] for r in rows], range(len(rows))
  for offset, key, colour in ((-0.2, 'ms_gradient', BLUE), (0.2, 'ms_update', ORANGE)):
    heights, label = [r[key] for r in rows], key.removeprefix('ms_')
    time_axes.bar([x + offset for x in places], heights, 0.4, color=colour, label=label)
  floor = [r['ms_gradient'] / r['ratio_to_floor'] for r in rows]
  time_axes.hlines(floor, [x - 0.4 for x in places], [x + 0.4 for x in places], 'k', label='floor')
  memory_axes.bar(places, [r['temporaries_bytes'] / 2**20 for r in rows], color=BLUE)
  time_axes.set(ylabel='ms')
  time_axes.margins(y=0.3)  # room for the legend
  memory_axes.set(ylabel='temporaries of the gradient, MiB')
  for axes in (time_axes, memory_axes):
    axes.set_xticks(places, names, rotation=20)
    axes.set_axisbelow(True)
    axes.grid(axis='y', alpha=0.3)
  time_axes.legend(frameon=False, ncols=3, loc='upper center')
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  command_line.run(main)
