"""The figure of frontier.py."""

import pathlib
from typing import Any

from matplotlib.figure import Figure

from lfg_jax.training.run import plots

Row = dict[str, Any]
STYLES = {'hadamard': '-', 'rademacher': '--'}  # a distribution with one tangent only is a cross
EXACT = 1e-9  # smaller errors are rounding


def draw(path: pathlib.Path, rows: list[Row]) -> None:
  """Draws error against time on log axes: a row of panels per point, a column per layer."""
  points, layers = (list(dict.fromkeys(row[key] for row in rows)) for key in ('point', 'layer'))
  figure = Figure(figsize=(3.2 * len(layers) + 2.5, 3.4 * len(points)), layout='constrained')
  panels = figure.subplots(len(points), len(layers), squeeze=False)
  names = list(dict.fromkeys(row['variant'] for row in rows))
  handles: dict[str, Any] = {}
  for point, row_of_panels in zip(points, panels, strict=True):
    for layer, axes in zip(layers, row_of_panels, strict=True):
      own = [row for row in rows if (row['point'], row['layer']) == (point, layer)]
      handles |= _panel(axes, own, names)
      axes.set(title=f'{layer}, {point}')
  for row_of_panels in panels:
    row_of_panels[0].set_ylabel('squared error / |gradient|²')
  figure.legend(handles.values(), handles.keys(), loc='outside right upper', fontsize='small')
  figure.savefig(path, dpi=120)


def _panel(axes: Any, rows: list[Row], names: list[str]) -> dict[str, Any]:
  """Draws lines through the numbers of tangents; returns the legend's handles by label."""
  handles, exact = {}, []
  for colour, name in zip(plots.COLOURS, names, strict=False):
    for distribution in dict.fromkeys(
      row['distribution'] for row in rows if row['variant'] == name
    ):
      every = [row for row in rows if (row['variant'], row['distribution']) == (name, distribution)]
      own = sorted(
        (row['ms'], row['relative_error']) for row in every if row['relative_error'] > EXACT
      )
      if not own:
        exact.append(name)
        continue
      allocated = name.endswith('allocated')
      marker = 'D' if allocated else 'o' if distribution in STYLES else 'x'
      (handles[f'{name}, {distribution}'],) = axes.plot(
        *zip(*own, strict=True),
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.2,
        linestyle='none' if allocated else STYLES.get(distribution, 'none'),
      )
  for axis in (axes.xaxis, axes.yaxis) if axes.lines else ():
    plots.logarithmic(axis)
  axes.grid(alpha=0.3)
  axes.tick_params(labelsize='x-small')
  note = '\nexact, so not drawn:\n' + '\n'.join(dict.fromkeys(exact)) if exact else ''
  axes.set_xlabel('ms per step' + note, fontsize='small')
  return handles
