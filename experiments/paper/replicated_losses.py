"""Figure 5: memory and time of replicated losses, naive and fused, against groups and patches.

    python experiments/paper/replicated_losses.py [--batch=16] [--channels=512] [--patches=64]
        [--groups=16] [--many_groups=1,2,4,8,16,32,64] [--many_patches=1,4,16,64,256]
        [--limit_gib=8] [--repetitions=5] [--out=DIR]

The program measures what a forward gradient needs from a loss: its values, and their derivatives
along one tangent. In the naive form, each of the P·G replicas has its own copy of the features,
with all but the replica's own entry behind a stop-gradient. A form is not run if its arrays exceed
--limit_gib. The fused form takes about a thousandth of the time, and is timed 50 times as often.
DIR gets replicated_losses.json and replicated_losses.png.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from lfg_jax.errors import UserError
from lfg_jax.local import info_nce
from lfg_jax.local.replicated import replicated_loss
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.targets import Targets
from lfg_jax.training import command_line
from lfg_jax.training.cost import timing
from lfg_jax.training.run import plots, results

Row = dict[str, Any]
OUTPUTS = {'supervised': 10, 'contrastive': 128}
KINDS = [(kind, form) for kind in OUTPUTS for form in ('naive', 'fused')]
COLOURS = [plots.COLOURS[1]] * 2 + [plots.COLOURS[2]] * 2  # one for each kind


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  parser = results.parser(__doc__, out='runs/replicated_losses', batch=16, repetitions=5)
  for name, default in (('channels', 512), ('patches', 64), ('groups', 16)):
    parser.number(name, default)
  parser.numbers('many_groups', '1,2,4,8,16,32,64')
  parser.numbers('many_patches', '1,4,16,64,256')
  parser.number('limit_gib', 8.0, least=0, kind=float)
  options = parser.parse(arguments)
  for groups in (options.groups, *options.many_groups):
    if options.channels % groups:
      raise UserError(f'{groups} groups do not divide --channels={options.channels}')
  sweeps = {
    'groups': [(options.patches, groups) for groups in options.many_groups],
    'patches': [(patches, options.groups) for patches in options.many_patches],
  }
  folder = results.Folder(options.out, __file__, arguments)
  rows: list[Row] = []
  for sweep, sizes in sweeps.items():
    for kind in OUTPUTS:
      for form in ('naive', 'fused'):
        rows += measure(sweep, kind, form, sizes, options)
        folder.write('replicated_losses', rows=rows)
  draw(folder.path / 'replicated_losses.png', rows)


def measure(
  sweep: str, kind: str, form: str, sizes: list[tuple[int, int]], options: command_line.Options
) -> list[Row]:
  """A row for every (patches, groups); sizes are timed in turn, those that do not fit are not."""
  calls, needs = {}, {}
  for size in sizes:
    run, arguments = compile_derivative(kind, form, *size, options)
    needs[size] = timing.temporaries(run)
    if needs[size] <= options.limit_gib * 2**30:
      calls[size] = functools.partial(run, *arguments)
  repetitions = {'naive': options.repetitions, 'fused': 50 * options.repetitions}[form]
  seconds = timing.interleaved(calls, repetitions)
  rows = [
    {
      'sweep': sweep,
      'kind': kind,
      'form': form,
      'batch': options.batch,
      'patches': size[0],
      'groups': size[1],
      'channels': options.channels,
      'temporaries_bytes': needs[size],
      'ms': timing.median_ms(seconds[size]) if size in calls else None,
    }
    for size in sizes
  ]
  print(*rows, sep='\n', flush=True)
  return rows


def compile_derivative(
  kind: str, form: str, patches: int, groups: int, options: command_line.Options
) -> tuple[jax.stages.Compiled, tuple]:
  """The compiled `(x, dx, kernel) -> losses, their derivatives`, and random arguments for it."""
  B, C, K = options.batch, options.channels // groups, OUTPUTS[kind]
  keys = jax.random.split(jax.random.key(0), 4)
  x_BxPxGxC, dx_BxPxGxC = (jax.random.normal(key, (B, patches, groups, C)) for key in keys[:2])
  kernel_GxCxK = 0.05 * jax.random.normal(keys[2], (groups, C, K))
  loss = local_losses(kind, form, jax.random.randint(keys[3], (B,), 0, K))
  derivative = jax.jit(lambda x, dx, w: jax.jvp(lambda x: loss(x, w), (x,), (dx,)))
  return derivative.lower(x_BxPxGxC, dx_BxPxGxC, kernel_GxCxK).compile(), (
    x_BxPxGxC,
    dx_BxPxGxC,
    kernel_GxCxK,
  )


def local_losses(
  kind: str, form: str, label_B: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """`(features [B, P, G, C], kernel [G, C, K]) -> losses [B, P, G]`."""
  row_loss = cross_entropy if kind == 'supervised' else info_nce.row_loss(info_nce.Contrast())
  targets = Targets(label_B, jnp.ones(label_B.shape))

  def fused(x_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array) -> jax.Array:
    head = {'kernel': kernel_GxCxK, 'bias': jnp.zeros(kernel_GxCxK.shape[-1])}
    return replicated_loss(row_loss, x_BxPxGxC, head, targets)

  def naive(x_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array) -> jax.Array:
    one_replica = lambda z_BxK: row_loss(z_BxK, targets)
    return jax.vmap(jax.vmap(one_replica, 1, 1), 2, 2)(replicated_outputs(x_BxPxGxC, kernel_GxCxK))

  return {'fused': fused, 'naive': naive}[form]


def replicated_outputs(x_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array) -> jax.Array:
  """[B, P, G, K]: the outputs of the head for every replica's own copy of the features."""
  _, P, G, _ = x_BxPxGxC.shape
  own_PxGxPxG = jnp.eye(P * G, dtype=bool).reshape(P, G, P, G)
  one = x_BxPxGxC[:, None, None]
  copies_BxPxGxPxGxC = jnp.where(own_PxGxPxG[None, ..., None], one, jax.lax.stop_gradient(one))
  return jnp.einsum('bpqgc,gck->bpqk', copies_BxPxGxPxGxC.mean(3), kernel_GxCxK)


def draw(path: pathlib.Path, rows: list[Row]) -> None:
  """Draws memory above and time below, against groups on the left and patches on the right."""
  figure = Figure(figsize=(9, 6), layout='constrained')
  grid = figure.subplots(2, 2)
  for column, sweep in enumerate(('groups', 'patches')):
    for line, (key, scale, label) in enumerate(
      (('temporaries_bytes', 2**-20, 'temporaries, MiB'), ('ms', 1, 'ms'))
    ):
      axes = grid[line, column]
      ends = []
      for (kind, form), colour, style in zip(KINDS, COLOURS, ('--', '-') * 2, strict=True):
        own = [
          row
          for row in rows
          if (row['sweep'], row['kind'], row['form']) == (sweep, kind, form) and row['ms']
        ]
        values = [scale * row[key] for row in own]
        axes.plot([row[sweep] for row in own], values, style, marker='o', color=colour)
        ends.append(values[-1])
      axes.set(xlabel=sweep, ylabel=label)
      axes.set_xscale('log', base=2)
      axes.xaxis.set_major_formatter('{x:g}')
      plots.logarithmic(axes.yaxis)
      axes.grid(alpha=0.3)
      plots.name_lines(axes, [', '.join(names) for names in KINDS], ends, COLOURS)
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  command_line.run(main)
