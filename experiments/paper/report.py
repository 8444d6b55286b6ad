"""The report of a study, from the folders of its finished runs: STUDY.json, .md and .png."""

import itertools
import json
import pathlib
import re
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from studies import Run, Study

from lfg_jax.training import run_log

Row = dict[str, Any]
ORIGIN = 'provenance.json'  # in a run's folder
JPEG = 'CIFAR-10 in experiments/results: the pixels had been through JPEG (quality 75).'
EXPLANATION = '''Errors in %, test / training, after the last epoch; ± standard error over seeds.
Training error: mean over the last epoch, while it was learnt.
Contrastive: errors of the linear read-out.'''
# Of Okabe and Ito: colour-blind people tell them apart. Yellow is left out: it is faint on white.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
STYLES = ('-', '--', ':')
FLOOR = 0.01  # %: a logarithmic axis has no zero
PANELS = {
  'test_error': ('test error, %', 100),
  'train_error': ('training error, %', 100),
  'train_contrastive_loss': ('contrastive loss, nats, mean over heads', 1),
}


def folder(run: Run) -> str:
  """A name for the folder of a run's epochs and seeds."""
  return re.sub(r'[^\w+-]+', '-', run.label).strip('-')


def write(out: pathlib.Path, name: str, study: Study, origin: dict[str, str | None]) -> None:
  """Reports all finished runs of a study in `out`, of this command and of earlier ones."""
  rows = collect(out, study)
  content = {**origin, 'study': name, 'title': study.title, 'rows': rows}
  run_log.write_atomically(out / f'{name}.json', json.dumps(content, indent=1) + '\n')
  run_log.write_atomically(out / f'{name}.md', table(study.title, rows))
  if rows:
    draw(out / f'{name}.png', study, rows)


def collect(out: pathlib.Path, study: Study) -> list[Row]:
  """A row for every run and number of epochs and images; its seeds are taken together."""
  rows = []
  for run in study.runs:
    groups: dict[tuple[int, int], list[pathlib.Path]] = {}
    for path in sorted((out / folder(run)).glob('*/' + ORIGIN)):
      config = _read(path.with_name('config.json'))
      groups.setdefault((config['epochs'], config['images'] or 0), []).append(path.parent)
    rows += [summarize(run, own) for _, own in sorted(groups.items())]
  return rows


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text())


def summarize(run: Run, folders: list[pathlib.Path]) -> Row:
  """Means over seeds; the standard error of the test error is None for a single seed."""
  config = _read(folders[0] / 'config.json')
  summaries, origins = (
    [_read(path / name) for path in folders] for name in ('summary.json', ORIGIN)
  )
  test = [summary['test_error'] for summary in summaries]
  return {
    'label': run.label,
    'rule': run.rule,
    'algorithm': config['algorithm'],
    **{key: summaries[0][key] for key in ('model', 'dataset')},
    'epochs': config['epochs'],
    'images': config['images'],
    'seeds': [_read(path / 'config.json')['seed'] for path in folders],
    'test_error': statistics.mean(test),
    'test_error_se': statistics.stdev(test) / len(test) ** 0.5 if len(test) > 1 else None,
    'train_error': statistics.mean(summary['train_error'] for summary in summaries),
    'seconds': statistics.mean(summary['seconds'] for summary in summaries),
    'paper': run.paper,
    'paper_note': run.note,
    'origins': origins,
    'curves': [run_log.read_rows(path / 'metrics.jsonl') for path in folders],
  }


def table(title: str, rows: list[Row]) -> str:
  """In markdown."""
  lines = [f'# {title}', '', EXPLANATION, '']
  if any(row['dataset'] == 'cifar10' for row in rows):
    lines += [JPEG, '']
  lines += [
    '| run | here | paper | data, model | epochs | images | seeds | device | commit |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  return '\n'.join([*lines, *(f'| {" | ".join(cells(row))} |' for row in rows)]) + '\n'


def cells(row: Row) -> list[str]:
  """A row of the table."""
  together = lambda key: ', '.join(dict.fromkeys(str(origin[key]) for origin in row['origins']))
  return [
    row['label'],
    errors(row),
    published(row),
    f'{row["dataset"]}, {row["model"]}',
    str(row['epochs']),
    str(row['images'] or 'all'),
    ', '.join(map(str, row['seeds'])),
    together('device'),
    together('commit'),
  ]


def errors(row: Row) -> str:
  """Ours."""
  deviation = '' if row['test_error_se'] is None else f' ± {100 * row["test_error_se"]:.2f}'
  return f'{100 * row["test_error"]:.2f}{deviation} / {100 * row["train_error"]:.2f}'


def published(row: Row) -> str:
  """The paper's, and of which estimator."""
  if row['paper'] is None:
    return '–'
  note = f' ({row["paper_note"]})' if row['paper_note'] else ''
  return '{:.2f} / {:.2f}'.format(*row['paper']) + note


def draw(path: pathlib.Path, study: Study, rows: list[Row]) -> None:
  """Test error on the left; training error or contrastive loss on the right."""
  figure = Figure(figsize=(14, max(4, 1 + 0.3 * len(rows))), layout='constrained')
  figure.suptitle(study.title)
  for axes, key in zip(figure.subplots(1, 2), ('test_error', study.loss), strict=True):
    label, scale = PANELS[key]
    panel(axes, rows, key, scale)
    axes.set(xlabel='epoch', ylabel=label)
  figure.savefig(path, dpi=110)


def panel(axes: Axes, rows: list[Row], key: str, scale: float) -> None:
  """Means over seeds by epoch. A dotted line goes on from the end of a shorter run to its name."""
  lines = [mean_curve(row['curves'], key, scale) for row in rows]
  values = [value for _, own in lines for value in own]
  last = max(epochs[-1] for epochs, _ in lines)
  if logarithmic := scale == 100 and max(values) > 4 * max(min(values), FLOOR):
    lines = [(epochs, [max(value, FLOOR) for value in own]) for epochs, own in lines]
    axes.set_yscale('log')
    axes.yaxis.set(
      major_locator=LogLocator(subs=(1, 2, 5)),
      major_formatter=StrMethodFormatter('{x:g}'),
      minor_locator=NullLocator(),
    )
  if logarithmic and min(values) < FLOOR:
    axes.set_title(f'{FLOOR} stands for {FLOOR} % and less', fontsize='small')
  for index, (epochs, own) in enumerate(lines):
    colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
    axes.plot(epochs, own, style, marker='.', color=colour)
    axes.plot([epochs[-1], last], [own[-1]] * 2, ':', color=colour, linewidth=0.8)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.margins(x=0)
  axes.grid(alpha=0.3)
  name_lines(axes, names(rows), [own[-1] for _, own in lines])


def mean_curve(
  curves: list[list[run_log.Row]], key: str, scale: float
) -> tuple[list[int], list[float]]:
  """Epochs, and means over seeds where all of them have a value."""
  known = [
    {row['epoch']: scale * row[key] for row in rows if row[key] is not None} for rows in curves
  ]
  epochs = sorted(set.intersection(*map(set, known)))
  return epochs, [statistics.mean(own[epoch] for own in known) for epoch in epochs]


def names(rows: list[Row]) -> list[str]:
  """Labels, which tell more where a run is there with several numbers of epochs or images."""
  labels = [row['label'] for row in rows]
  return [
    label
    if labels.count(label) == 1
    else f'{label}, {row["epochs"]} epochs, {row["images"] or "all"} images'
    for label, row in zip(labels, rows, strict=True)
  ]


def name_lines(axes: Axes, labels: list[str], ends: list[float]) -> None:
  """Writes the names beside the axes, in the order of the lines' ends, none over another."""
  axes.autoscale_view()  # the limits, which are else not known before the figure is drawn
  to_axes = axes.transData + axes.transAxes.inverted()
  heights = [float(to_axes.transform((0, end))[1]) for end in ends]
  gap = 0.19 / axes.figure.get_size_inches()[1]
  for index, place in enumerate(spread(heights, gap)):
    colour = COLOURS[index % len(COLOURS)]
    axes.annotate(
      labels[index],
      (1, heights[index]),
      (1.04, place),
      xycoords='axes fraction',
      va='center',
      fontsize=8,
      color=colour,
      annotation_clip=False,
      arrowprops={
        'arrowstyle': '-',
        'color': colour,
        'linewidth': 0.6,
        'relpos': (0, 0.5),
        'shrinkA': 1,
        'shrinkB': 0,
      },
    )


def spread(heights: list[float], gap: float) -> list[float]:
  """Places near these heights, at least a gap apart, and not above 1 where they fit below.

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
