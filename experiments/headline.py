"""Draws the README's figure: test error by epoch, beside the memory of a gradient against depth.

    python experiments/headline.py [--comparison=FILE] [--depth=FILE] [--out=FILE]

The first file is from `compare.py`, the second from `bench/depth.py`.
"""

import json
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lfg_jax.training import command_line
from lfg_jax.training.run import plots

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'experiments' / 'results'
ENDS = {'BP': 'BP (backprop)', 'LG-FG-A+': 'LG-FG-A+ (ours)', 'LG-FG-A': "LG-FG-A (the paper's)"}


def main(arguments: list[str]) -> None:
  """Draws both panels into one PNG file."""
  parser = command_line.Parser(__doc__)
  parser.path('comparison', RESULTS / 'digits' / 'comparison.json', 'of compare.py')
  parser.path('depth', RESULTS / 'depth' / 'depth.json', 'of bench/depth.py')
  parser.path('out', ROOT / 'docs' / 'figures' / 'headline.png', 'the figure')
  options = parser.parse(arguments)
  figure = Figure(figsize=(11, 3.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  errors(left, json.loads(options.comparison.read_text())['rows'])
  memory(right, json.loads(options.depth.read_text())['rows'])
  figure.savefig(options.out, dpi=110)


def errors(axes: Axes, rows: list[dict[str, Any]]) -> None:
  """Test error by epoch, with a band of one standard error over seeds."""
  names = [row['algorithm'] for row in rows]
  colours = plots.colours_of(names)
  for row, colour in zip(rows, colours, strict=True):
    epochs, means, spread = row['curve'].values()
    axes.plot(epochs, means, '.-', color=colour)
    low, high = ([m + side * s for m, s in zip(means, spread, strict=True)] for side in (-1, 1))
    axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
  axes.set(title=f'{rows[0]["dataset"]}, mean and standard error of {rows[0]["seeds"]} seeds')
  axes.set(xlabel='epoch', ylabel='test error, %')
  plots.logarithmic_errors(axes)
  axes.grid(alpha=0.3)
  ends = [row['curve']['test_error_percent'][-1] for row in rows]
  plots.name_lines(axes, [ENDS.get(name, name) for name in names], ends, colours)


def memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
  """Temporaries of a gradient against the number of blocks."""
  names = list(dict.fromkeys(row['algorithm'] for row in rows))
  colours, ends = plots.colours_of(names), []
  for name, colour in zip(names, colours, strict=True):
    own = [row for row in rows if row['algorithm'] == name]
    mebibytes = [row['temporaries_bytes'] / 2**20 for row in own]
    axes.plot([row['blocks'] for row in own], mebibytes, 'o-', color=colour)
    ends.append(mebibytes[-1])
  axes.set(title=f'LocalMixer {rows[0]["model"]} with more blocks, batch {rows[0]["batch"]}')
  axes.set(xlabel='blocks', ylabel='temporaries of a gradient, MiB', ylim=(0, None))
  axes.grid(alpha=0.3)
  plots.name_lines(axes, [ENDS.get(name, name) for name in names], ends, colours)


if __name__ == '__main__':
  command_line.run(main)
