"""Draws the figures of the page "The idea", from measurements on tiny problems.

    python docs/figures.py [--out=docs/figures] [--only NAME]

Every point is measured by the library; lines without points are theory. The files are part of the
repository: the site is then built without training anything, and a change of a picture is seen in
review. Equal versions of jax and matplotlib draw equal files.
"""

import argparse
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from measurements import (
  Layers,
  cut_error,
  error_of_direction,
  layer_error,
  learned_feedback,
  relative_error,
)

import lfg_jax
from lfg_jax.local.replicated import Cut
from lfg_jax.tangents import distributions

ROOT = pathlib.Path(__file__).parents[1]
# Told apart by colour-blind readers (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, PINK, GREY = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#555555'
STYLE = {
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'lines.linewidth': 1.4,
  'lines.markersize': 4,
  'svg.hashsalt': 'lfg_jax',
}


def main(out: pathlib.Path, only: str | None = None) -> None:
  """Draws all figures, or one."""
  out.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(STYLE):
    for name in [only] if only else FIGURES:
      figure = Figure((7.6, 3.1), layout='constrained')
      FIGURES[name](figure)
      figure.savefig(out / f'{name}.svg', metadata={'Date': None})


def forward_derivative(figure: Figure) -> None:
  """One estimate of a gradient in two dimensions, and many."""
  f = lambda x: (jnp.array([1.0, 2.0]) * x**2).sum()
  x = jnp.array([1.0, 0.6])
  g = jax.grad(f)(x)
  one = lfg_jax.forward_grad(f, distribution=distributions.sphere)
  estimates = jax.vmap(lambda key: one(x, key=key))(jax.random.split(jax.random.key(0), 200))
  left, right = figure.subplots(1, 2)

  turn = jnp.linspace(0, 2 * math.pi, 200)
  for level in (0.25, 0.75, 1.72, 3, 4.7, 6.6):
    left.plot(
      jnp.sqrt(level) * jnp.cos(turn),
      jnp.sqrt(level / 2) * jnp.sin(turn),
      color='0.85',
      linewidth=0.8,
      zorder=0,
    )
  u = jnp.array([1.35, -0.42])  # of length √2, as `sphere` draws it in two dimensions
  u = u * math.sqrt(2) / jnp.linalg.norm(u)
  slope = jax.jvp(f, (x,), (u,))[1]
  scale = 0.22
  for vector, text, color, shift in (
    (g, 'gradient g', BLUE, (0.04, 0.04)),
    (slope * u, 'estimate (g·u) u', ORANGE, (-0.35, -0.33)),
  ):
    end = x + scale * vector
    left.annotate(
      '',
      end,
      x,
      arrowprops={'arrowstyle': '-|>', 'color': color, 'linewidth': 2, 'shrinkA': 0, 'shrinkB': 0},
    )
    left.text(end[0] + shift[0], end[1] + shift[1], text, color=color)
  left.axline(x, x + u, color=GREY, linewidth=0.8, linestyle=':')
  left.text(-0.45, 0.93, 'a random direction u', color=GREY, rotation=-17)
  left.plot(*x, 'ko')
  left.set(
    title='One direction, one derivative',
    xlim=(-0.9, 2.5),
    ylim=(-0.6, 1.5),
    xticks=[],
    yticks=[],
    aspect='equal',
  )
  left.spines[:].set_visible(False)

  mean = estimates.mean(0)
  right.plot(*estimates.T, '.', color=ORANGE, markersize=3)
  right.plot([0, g[0]], [0, g[1]], color=BLUE, zorder=3)
  right.plot(*g, '*', color=BLUE, markersize=12)
  right.plot(*mean, 'ks', markersize=4, zorder=4)
  right.text(g[0] + 0.35, g[1] - 0.35, 'gradient', color=BLUE)
  right.text(mean[0] - 0.1, mean[1] + 0.35, 'mean of 200', color='black', ha='center')
  right.text(-0.1, 5.2, 'single estimates', color=ORANGE, ha='right')
  right.set(
    title='200 directions',
    xlabel='first entry',
    ylabel='second entry',
    aspect='equal',
    xlim=(-4.2, 6),
  )


def dimensions(figure: Figure) -> None:
  """The error grows with the perturbed dimensions; a layer has fewer activities than weights."""
  left, right = figure.subplots(1, 2)
  sizes = [4**n for n in range(1, 7)]
  num_tangents = {1: BLUE, 16: GREEN}
  for K, color in num_tangents.items():
    own = [d for d in sizes if d > K]
    left.plot(own, [error_of_direction(d, K) for d in own], 'o', color=color)
    excess = [distributions.hadamard.excess(d, K) for d in own]
    left.plot(own, excess, color=color)
    label(left, own[-1], excess[-1], f'{K} tangent{"s" if K > 1 else ""}', color)
  left.set(
    title='Noise grows with the dimensions',
    xlabel='perturbed dimensions d',
    xscale='log',
    yscale='log',
    ylabel='squared error / |g|²',
    xlim=(None, sizes[-1] * 20),
  )
  plain(left.yaxis, 1, 10, 100, 1000)
  plain(left.xaxis, *sizes)

  fans, q, batch = [1, 4, 16, 64], 8, 16
  for kind, color in (('weight', ORANGE), ('activity', BLUE)):
    points, lines = zip(*(layer_error(kind, p, q, batch) for p in fans), strict=True)
    right.plot(fans, points, 'o', color=color)
    right.plot(fans, lines, color=color)
    label(right, fans[-1], lines[-1], {'weight': 'weights', 'activity': 'activities'}[kind], color)
  right.set(
    title=f'One layer, p inputs, {q} outputs, {batch} examples',
    xlabel='inputs p',
    xscale='log',
    yscale='log',
    xlim=(None, fans[-1] * 6),
    ylabel='variance / squared gradient',
  )
  plain(right.xaxis, *fans)
  plain(right.yaxis, 1, 10, 100)


def local_losses(figure: Figure) -> None:
  """The error of one layer by number of groups; and what the copies of the loss cost."""
  left, right = figure.subplots(1, 2)
  groups, patches, channels = [1, 2, 4, 8, 16, 32], 16, 64
  cuts = {
    'block': (Cut(False, False), GREY),
    'block × group': (Cut(False, True), ORANGE),
    'block × patch': (Cut(True, False), GREEN),
    'block × patch × group': (Cut(True, True), BLUE),
  }
  for name, (cut, color) in cuts.items():
    errors = [cut_error(cut, patches, channels, G) for G in groups]
    left.plot(groups, errors, 'o-', color=color)
    label(left, groups[-1], errors[-1], name, color)
  left.set(
    title=f'{patches} patches, {channels} channels',
    xlabel='groups',
    xscale='log',
    yscale='log',
    ylabel='squared error / |g|²',
    xlim=(None, groups[-1] * 40),
  )
  plain(left.xaxis, *groups)
  plain(left.yaxis, 1, 10, 100)

  path = ROOT / 'experiments' / 'results' / 'replicated_losses' / 'replicated_losses.json'
  stored = json.loads(path.read_text())
  rows = stored['rows'] if isinstance(stored, dict) else stored
  for form, color, text in (('naive', ORANGE, 'stored copies'), ('fused', BLUE, 'fused')):
    own = [r for r in rows if (r['sweep'], r['kind'], r['form']) == ('groups', 'supervised', form)]
    xs, ys = [r['groups'] for r in own], [r['temporaries_bytes'] / 2**20 for r in own]
    right.plot(xs, ys, 'o-', color=color)
    label(right, xs[-1], ys[-1], text, color)
  right.set(
    title='64 patches, 512 channels, 16 examples',
    xlabel='groups',
    xscale='log',
    yscale='log',
    ylabel='memory of the loss, MiB',
    xlim=(None, xs[-1] * 10),
  )
  plain(right.xaxis, *xs)
  plain(right.yaxis, 0.1, 1, 10, 100, 1000, 10000)


def less_noise(figure: Figure) -> None:
  """What each step from the paper's LG-FG-A to the default does to the three layers."""
  width, batch, classes = 16, 64, 10
  keys = jax.random.split(jax.random.key(6), 6)
  layers = Layers(
    jax.random.normal(keys[0], (batch, width)),
    jax.random.normal(keys[1], (width, classes)) / math.sqrt(width),
    jax.random.randint(keys[2], (batch,), 0, classes),
  )
  params = {
    name: jax.random.normal(key, (width, width)) * math.sqrt(2 / width)
    for name, key in zip(('first', 'second', 'third'), keys[3:], strict=True)
  }

  feedback = learned_feedback(layers, params)
  back = lambda activities: layers.signal(activities['third']) @ feedback
  last_exact = {'joint': False, 'taps': ('first', 'second')}
  steps = {
    'all at once\n(the paper)': {},
    'one layer\nat a time': {'joint': False},
    'the last\nexact': last_exact,
    'a learned control variate\nfor the second': {
      **last_exact,
      'control_variate': lambda activities, _: {'second': back(activities)},
    },
  }
  errors = [
    relative_error(layers.losses, lambda p: layers.losses(p).mean(), params, **options)
    for options in steps.values()
  ]
  axes = figure.subplots()
  for name, color in (('first', GREY), ('second', ORANGE), ('third', BLUE)):
    ys = [error[name] for error in errors]
    axes.plot(range(len(steps)), ys, 'o-', color=color)
    label(axes, len(steps) - 1, ys[-1], f'{name} layer', color)
  axes.set(
    title='Three layers of 16 units under one loss, one tangent',
    ylim=(-0.7, None),
    xlim=(-0.3, len(steps) - 0.4),
    xticks=range(len(steps)),
    xticklabels=steps,
    ylabel='squared error / |g|²',
  )


def plain(axis: Axis, *ticks: float) -> None:
  """These numbers on a logarithmic axis, as they are."""
  axis.set_ticks(ticks, [f'{tick:,}' for tick in ticks])
  axis.set_ticks([], minor=True)


def label(axes: Axes, x: float, y: float, text: str, color: str) -> None:
  """Writes a line's name behind its end."""
  axes.annotate(text, (x, y), (6, 0), textcoords='offset points', va='center', color=color)


FIGURES = {
  'forward_derivative': forward_derivative,
  'dimensions': dimensions,
  'local_losses': local_losses,
  'less_noise': less_noise,
}


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(__file__).parent / 'figures')
  parser.add_argument('--only', choices=FIGURES)
  options = parser.parse_args()
  main(options.out, options.only)
