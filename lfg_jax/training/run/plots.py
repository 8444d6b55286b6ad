"""One style for all figures: error curves by epoch, with a name at the end of each line."""

import itertools
import pathlib
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
  LogFormatterMathtext,
  LogLocator,
  MaxNLocator,
  NullLocator,
  StrMethodFormatter,
)

from lfg_jax.training.run.metrics import Row

# Okabe and Ito: colour-blind people can tell them apart. Yellow is left out: it is faint on white.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
STYLES = ('-', '--', ':')
# A learning rule has one colour in all figures. Those with another colour share the rest.
RULES = {
  'BP': COLOURS[0],
  'LG-BP': COLOURS[1],
  'LG-FG-A+': COLOURS[2],
  'LG-FG-A': COLOURS[3],
  'LG-FG-W': COLOURS[4],
  'FG-A': COLOURS[5],
  'DFA': COLOURS[6],
}
FLOOR = 0.01  # %: a logarithmic axis has no zero

Line = tuple[str, Sequence[float], Sequence[float]]  # name, x, y


def colours_of(names: Sequence[str]) -> list[str]:
  """Returns a colour for every line: that of its rule, or else the next that is free.

  >>> colours_of(['LG-FG-A+', 'else'])
  ['#D55E00', '#000000']
  """
  own = {name: RULES[name] for name in names if name in RULES}
  free = itertools.cycle([colour for colour in COLOURS if colour not in own.values()] or COLOURS)
  return [own.get(name) or next(free) for name in names]


def curves(
  path: pathlib.Path, runs: dict[str, Sequence[Sequence[Row]]], title: str | None = None
) -> None:
  """Draws test and training errors by epoch into a PNG file, as means over repeated runs.

  Args:
    path: path of the file.
    runs: for each name, the rows of one or more runs. A rule keeps its colour.
    title: of the figure.
  """
  figure = Figure(figsize=(11, 4), layout='constrained')
  figure.suptitle(title or '')
  for axes, split in zip(figure.subplots(1, 2), ('test', 'train'), strict=True):
    lines = [(name, *means(own, f'{split}_error_percent')) for name, own in runs.items()]
    panel(axes, lines, errors=True)
    axes.set(xlabel='epoch', ylabel=f'{split.replace("train", "training")} error, %')
  figure.savefig(path, dpi=110)


def means(runs: Sequence[Sequence[Row]], key: str) -> tuple[list[int], list[float]]:
  """Returns the epochs in which all runs have a value of `key`, and their means there.

  >>> means([[{'epoch': 1, 'e': 0.5}], [{'epoch': 1, 'e': 0.25}, {'epoch': 2, 'e': 0.1}]], 'e')
  ([1], [0.375])
  """
  known = [{row['epoch']: row[key] for row in rows if row[key] is not None} for rows in runs]
  epochs = sorted(set.intersection(*map(set, known)))
  return epochs, [statistics.mean(own[epoch] for own in known) for epoch in epochs]


def panel(axes: Axes, lines: Sequence[Line], *, errors: bool) -> None:
  """Draws lines over epochs. A dotted line leads from the end of a shorter line to its name.

  Args:
    errors: whether values are errors in %. If so, the axis is logarithmic if they differ widely.
  """
  values = [value for _, _, own in lines for value in own]
  last = max(epochs[-1] for _, epochs, _ in lines)
  logarithmic = errors and max(values) > 4 * max(min(values), FLOOR)
  if logarithmic:
    lines = [(name, epochs, [max(value, FLOOR) for value in own]) for name, epochs, own in lines]
    logarithmic_errors(axes)
  if logarithmic and min(values) < FLOOR:
    axes.set_title(f'{FLOOR} stands for {FLOOR} % and less', fontsize='small')
  names = [name for name, _, _ in lines]
  colours = colours_of(names)
  for index, (_, epochs, own) in enumerate(lines):
    colour, style = colours[index], STYLES[index // len(COLOURS) % len(STYLES)]
    axes.plot(epochs, own, style, marker='.', color=colour)
    axes.plot([epochs[-1], last], [own[-1]] * 2, ':', color=colour, linewidth=0.8)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.margins(x=0)
  axes.grid(alpha=0.3)
  name_lines(axes, names, [own[-1] for _, _, own in lines], colours)


def logarithmic_errors(axes: Axes) -> None:
  """Makes the axis of errors logarithmic, with ticks at 1, 2, 5, 10 … written out."""
  axes.set_yscale('log')
  axes.yaxis.set(
    major_locator=LogLocator(subs=(1, 2, 5)),
    minor_locator=NullLocator(),
    major_formatter=StrMethodFormatter('{x:g}'),
  )


def logarithmic(axis: Axis) -> None:
  """Makes an axis with something on it logarithmic, with a few ticks that are easy to read.

  Ticks are at 1, 2, 5, 10 … over less than two decades, otherwise at powers of ten.
  """
  axes = axis.axes
  (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)('log')
  axes.autoscale_view()
  low, high = axis.get_view_interval()
  is_short = high < 100 * low
  written_out = is_short or (low > 1e-4 and high < 1e5)
  axis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_short else (1,), numticks=7))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(StrMethodFormatter('{x:g}') if written_out else LogFormatterMathtext())


def name_lines(
  axes: Axes, names: Sequence[str], ends: Sequence[float], colours: Sequence[str] = COLOURS
) -> None:
  """Writes names beside the axes, in the order of the lines' ends, without overlaps."""
  axes.autoscale_view()  # sets the limits, which otherwise wait until the figure is drawn
  to_axes = axes.transData + axes.transAxes.inverted()
  heights = [float(to_axes.transform((0, end))[1]) for end in ends]
  figure = axes.get_figure(root=True)
  assert figure
  spec = axes.get_subplotspec()
  gap = 0.19 * (spec.get_gridspec().nrows if spec else 1) / figure.get_size_inches()[1]
  for index, place in enumerate(spread(heights, gap)):
    colour = colours[index % len(colours)]
    arrow = {
      'arrowstyle': '-',
      'color': colour,
      'linewidth': 0.6,
      'relpos': (0, 0.5),
      'shrinkA': 1,
      'shrinkB': 0,
    }
    axes.annotate(
      names[index],
      (1, heights[index]),
      (1.04, place),
      xycoords='axes fraction',
      va='center',
      fontsize=8,
      color=colour,
      annotation_clip=False,
      arrowprops=arrow,
    )


def spread(heights: Sequence[float], gap: float) -> list[float]:
  """Returns places near these heights, at least a gap apart, and not above 1 if they fit below.

  >>> spread([0.5, 0.5, 1.0], 0.25)
  [0.5, 0.75, 1.0]
  """
  order = sorted(range(len(heights)), key=heights.__getitem__)
  places = list(heights)
  for low, high in itertools.pairwise(order):
    places[high] = max(places[high], places[low] + gap)
  places[order[-1]] = min(places[order[-1]], 1.0)
  for high, low in itertools.pairwise(order[::-1]):
    places[low] = min(places[low], places[high] - gap)
  return places
