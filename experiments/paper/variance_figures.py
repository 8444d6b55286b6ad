"""The figures of variance.py, one for each of its parts, from the part's rows."""

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lfg_jax.training.run import plots
from lfg_jax.training.run.plots import COLOURS

Row = dict[str, Any]
RELATIVE = 'squared error / |gradient|²'
CUTS = {'none': '--', 'block': ':', 'block+patch': '-.', 'block+group': '--', 'all': '-'}


def table1(figure: Figure, rows: list[Row]) -> None:
  """Measured over predicted, and the z-scores."""
  left, right = figure.subplots(1, 2)
  limits = [min(r['predicted'] for r in rows), max(r['predicted'] for r in rows)]
  left.plot(limits, limits, color='0.6', linewidth=0.8, zorder=0)
  for colour, estimator in zip(COLOURS[1:], ('weight', 'activity'), strict=False):
    for distribution, marker in (('normal', 'o'), ('rademacher', 'x')):
      own = [r for r in rows if (r['estimator'], r['distribution']) == (estimator, distribution)]
      left.plot(
        [r['predicted'] for r in own],
        [r['measured'] for r in own],
        marker,
        color=colour,
        markersize=4,
        label=f'{estimator}, {distribution}',
      )
  left.set(xlabel='variance per entry, predicted', ylabel='measured')
  for axis in (left.xaxis, left.yaxis):
    plots.logarithmic(axis)
  left.legend(frameon=False, fontsize='small')
  z = [(r['measured'] - r['predicted']) / r['standard_error'] for r in rows]
  right.hist(z, bins=30, color=COLOURS[1])
  right.set(
    xlabel='(measured - predicted) / standard error',
    ylabel='rows',
    title=f'largest of {len(z)}: {max(map(abs, z)):.2f}',
  )


def distributions(figure: Figure, rows: list[Row]) -> None:
  """Variance by passes."""
  axes = figure.subplots()
  names = list(dict.fromkeys(r['distribution'] for r in rows))
  ends = []
  for colour, distribution in zip(COLOURS, names, strict=False):
    own = [r for r in rows if r['distribution'] == distribution]
    counts = [r['num_tangents'] for r in own]
    bars = [3 * r['standard_error'] for r in own]
    axes.errorbar(counts, [r['measured'] for r in own], bars, fmt='o', color=colour, capsize=3)
    axes.plot(counts, [r['predicted'] for r in own], color=colour, linewidth=0.8)
    ends.append(own[-1]['predicted'])
  axes.set(
    xlabel='num_tangents, of 8 dimensions',
    ylabel='variance per entry (points: measured, ± 3 s.e.; lines: predicted)',
    ylim=(0, None),
  )
  axes.margins(x=0.02)
  plots.name_lines(axes, names, ends)


def _layers(rows: list[Row]) -> list[str]:
  return list(dict.fromkeys(r['layer'] for r in rows))


def mlp(figure: Figure, rows: list[Row]) -> None:
  """Relative error by num_tangents, a panel for every layer: a colour for estimator and taps."""
  figure.set_size_inches(11, 4)
  panels = figure.subplots(1, len(_layers(rows)), sharey=True)
  handles: dict[str, Any] = {}
  for axes, layer in zip(panels, _layers(rows), strict=True):
    kinds = dict.fromkeys((r['estimator'], r['taps']) for r in rows)
    for colour, (name, taps) in zip(COLOURS[1:], kinds, strict=False):
      for distribution, style in (
        ('normal', ':'),
        ('rademacher', '--'),
        ('haar', '-'),
        ('hadamard', '-'),
      ):
        own = [
          (r['num_tangents'], max(r['relative_error'], 1e-6))
          for r in rows
          if (r['estimator'], r['taps'], r['distribution'], r['layer'])
          == (name, taps, distribution, layer)
        ]
        if own:
          marker = 'o' if distribution == 'haar' else '.'
          handles[f'{name}, {taps}, {distribution}'] = axes.plot(
            *zip(*own, strict=True), style, marker=marker, markersize=4, color=colour
          )[0]
    axes.set(title=layer, xlabel='num_tangents')
    _grid(axes)
  panels[0].set_ylabel(RELATIVE)
  figure.legend(handles.values(), handles.keys(), loc='outside right upper', fontsize='small')


def _grid(axes: Axes) -> None:
  for axis in (axes.xaxis, axes.yaxis):
    plots.logarithmic(axis)
  axes.grid(alpha=0.3)


def mixer(figure: Figure, rows: list[Row]) -> None:
  """Left: relative error of every algorithm and cut, by layer. Right: cosine against time."""
  figure.set_size_inches(13, 5)
  left, right = figure.subplots(1, 2)
  _by_layer(left, [r for r in rows if (r['num_tangents'], r['taps']) == (1, 'joint')])
  many = [
    r
    for r in rows
    if (r['estimator'], r['cut'], r['layer']) == ('LG-FG-A', 'all', 'blocks/group')
    and r['distribution'] != 'normal'
  ]
  kinds, ends = list(dict.fromkeys((r['distribution'], r['taps']) for r in many)), []
  for colour, kind in zip(COLOURS, kinds, strict=False):
    own = sorted(
      (r for r in many if (r['distribution'], r['taps']) == kind), key=lambda r: r['num_tangents']
    )
    right.plot([r['ms'] for r in own], [r['cosine'] for r in own], 'o-', color=colour)
    ends.append(own[-1]['cosine'])
    if kind[1] == 'separate':  # the others have as many
      for r in own:
        point = (r['ms'], r['cosine'])
        right.annotate(
          f'{r["num_tangents"]}', point, (-4, 5), textcoords='offset points', ha='right'
        )
  right.set(
    xlabel='ms (numbers: num_tangents)',
    ylabel='cosine to the true gradient',
    title='grouped layers of blocks 1 to 3',
  )
  plots.logarithmic(right.xaxis)
  right.grid(alpha=0.3)
  plots.name_lines(right, [f'{distribution}, {taps}' for distribution, taps in kinds], ends)


def _by_layer(axes: Axes, rows: list[Row]) -> None:
  """A colour for every algorithm, a line style for every cut."""
  layers, own_law = _layers(rows), [r for r in rows if r['distribution'] == 'rademacher']
  kinds = list(dict.fromkeys((r['estimator'], r['cut']) for r in own_law))
  rules = list(dict.fromkeys(name for name, _ in kinds))
  colours, ends = [COLOURS[rules.index(name) % len(COLOURS)] for name, _ in kinds], []
  for colour, kind in zip(colours, kinds, strict=True):
    errors = {
      r['layer']: r['relative_error'] for r in own_law if (r['estimator'], r['cut']) == kind
    }
    heights = [errors[layer] for layer in layers]
    axes.plot(range(len(layers)), heights, CUTS[kind[1]], marker='.', color=colour)
    ends.append(heights[-1])
  axes.set_xticks(range(len(layers)), layers, fontsize='small')
  axes.set(ylabel=f'{RELATIVE}, one tangent', xlim=(-0.1, len(layers) - 1))
  plots.logarithmic(axes.yaxis)
  axes.grid(alpha=0.3)
  plots.name_lines(axes, [f'{name}, {cut}' for name, cut in kinds], ends, colours)


def num_tangents(figure: Figure, rows: list[Row]) -> None:
  """Time relative to one tangent, and memory."""
  figure.set_size_inches(11, 4)
  panels = figure.subplots(1, 2)
  kinds = list(dict.fromkeys((r['distribution'], r['chunk']) for r in rows))
  names = [
    f'{distribution}, ' + (f'chunks of {chunk}' if chunk else 'at once')
    for distribution, chunk in kinds
  ]
  counts = sorted({r['num_tangents'] for r in rows})
  panels[0].plot(counts, [(1 + 2 * K) / 3 for K in counts], ':', color='0.4')
  panels[0].set_title('dotted: (1 + 2 K) / 3', fontsize='small')
  values: tuple[Callable[[Row], float], ...] = (
    lambda r: r['relative_to_one_pass'],
    lambda r: r['temporaries_bytes'] / 2**20,
  )
  labels = ('time / time of one tangent', 'temporaries, MiB')
  for axes, value, label in zip(panels, values, labels, strict=True):
    ends = []
    for colour, kind in zip(COLOURS, kinds, strict=False):
      own = [r for r in rows if (r['distribution'], r['chunk']) == kind]
      axes.plot([r['num_tangents'] for r in own], [value(r) for r in own], 'o-', color=colour)
      ends.append(value(own[-1]))
    axes.set(xlabel='num_tangents, K', ylabel=label)
    _grid(axes)
    plots.name_lines(axes, names, ends)
