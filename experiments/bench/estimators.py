"""Error against time and memory for estimators of a gradient, on four standard problems.

    python experiments/bench/estimators.py [--problems=mlp,mixer,transformer,gru] [--draws=400]
        [--steps=300] [--out=DIR]

Each problem is measured at initialisation ('start') and after --steps steps of Adam along the exact
gradient ('trained'), by `lfg_jax.compare`: all estimators of a problem take turns. Problems are in
estimator_problems.py and estimator_mixer.py; estimators that the package does not have are in
rivals.py, with their sources. DIR gets estimators.json (a row per problem, point and estimator),
estimators.md, start.png and trained.png.
"""

import pathlib
from typing import Any

import estimator_mixer
import estimator_problems
import jax
from matplotlib.figure import Figure

import lfg_jax
from lfg_jax.training import command_line
from lfg_jax.training.run import plots, results

Row = dict[str, Any]
PROBLEMS = {
  'mlp': estimator_problems.mlp,
  'mixer': estimator_mixer.mixer,
  'transformer': estimator_problems.transformer,
  'gru': estimator_problems.recurrent,
}
POINTS = {'start': 'at initialisation', 'trained': 'after training by backprop'}
BACKPROP = 'backprop'
EXACT = 1e-9  # smaller errors are rounding
MARKERS = 'osD^v<>PX*hpd8H'


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  parser = results.parser(__doc__, out='runs/estimators')
  parser.names('problems', ','.join(PROBLEMS), PROBLEMS)
  parser.number('draws', 400, 'of every estimate', least=2)
  parser.number('steps', 300, 'of training')
  options = parser.parse(arguments)
  folder, rows = results.Folder(options.out, __file__, arguments), []
  for name in options.problems:
    for row in measure(name, options.draws, options.steps):
      rows.append(row)
      folder.write('estimators', draws=options.draws, steps=options.steps, rows=rows)
  for point, words in POINTS.items():
    draw(folder.path / f'{point}.png', [row for row in rows if row['point'] == point], words)
  folder.write_table('estimators', table(rows))


def measure(name: str, draws: int, steps: int) -> list[Row]:
  """A row per point and estimator of a problem."""
  problem, rows = PROBLEMS[name](), []
  for point, params in (('start', problem.params), ('trained', problem.trained(steps))):
    named = problem.estimators(params, jax.random.key(1))
    estimators = {f'{family}, K = {K}': estimator for (family, K), estimator in named.items()}
    compared = lfg_jax.compare(estimators, problem.losses, draws=draws)
    found = compared(params, *problem.batch(0), key=jax.random.key(2))
    print(f'{problem.title}, {POINTS[point]}\n{found}\n', flush=True)
    exact = found.rows[0]
    for (family, K), row in zip([(BACKPROP, 1), *named], found.rows, strict=True):
      about = {'problem': name, 'title': problem.title, 'point': point, 'family': family, 'K': K}
      rows.append(
        {
          **about,
          **{field: value for field, value in row._asdict().items() if field != 'name'},
          'time_ratio': row.microseconds / exact.microseconds,
          'memory_ratio': row.temporaries / exact.temporaries if exact.temporaries else None,
        }
      )
  return rows


def table(rows: list[Row]) -> str:
  """A Markdown table per problem, with the errors at both points."""
  text = 'Squared error / |gradient|². Time and temporary memory: multiples of those of backprop.\n'
  for problem in dict.fromkeys(row['problem'] for row in rows):
    own = [row for row in rows if row['problem'] == problem]
    names = dict.fromkeys((row['family'], row['K']) for row in own)
    cells = []
    for name in names:
      start, trained = (row for row in own if (row['family'], row['K']) == name)
      cells.append(
        [
          name[0],
          str(name[1]),
          *(f'{row["error"]:.3g}' if row['error'] > EXACT else 'exact' for row in (start, trained)),
          f'{trained["cosine"]:.3f}',
          f'{trained["time_ratio"]:.2f}',
          f'{trained["memory_ratio"] or 0:.2f}',
          'yes' if start['is_biased'] or trained['is_biased'] else '',
        ]
      )
    head = (
      'estimator | K | error, start | error, trained | cosine, trained | time | memory | biased'
    )
    text += f'\n## {own[0]["title"]}\n\n{results.in_table(head, cells)}\n'
  return text


def draw(path: pathlib.Path, rows: list[Row], words: str) -> None:
  """Draws error against time and against memory: a row of panels per problem."""
  problems = list(dict.fromkeys(row['problem'] for row in rows))
  figure = Figure(figsize=(12.5, 4.1 * len(problems)), layout='constrained')
  panels = figure.subplots(len(problems), 2, squeeze=False, sharey='row')
  families = list(dict.fromkeys(row['family'] for row in rows if row['family'] != BACKPROP))
  for problem, pair in zip(problems, panels, strict=True):
    own = [row for row in rows if row['problem'] == problem and row['error'] > EXACT]
    for axes, key in zip(pair, ('time_ratio', 'memory_ratio'), strict=True):
      _panel(axes, own, key, families)
    pair[0].set(ylabel='squared error / |gradient|²')
    pair[0].set_title(next(row['title'] for row in own), loc='left', fontweight='bold')
    _names(pair[1], own, families)
  for axes, label in zip(panels[-1], ('time', 'temporary memory'), strict=True):
    axes.set_xlabel(f'{label} of an estimate, multiples of backprop')
  figure.suptitle(
    f'Estimates of a gradient, {words}: lower is closer to the gradient, left is cheaper.\n'
    'Numbers: tangents K, or pairs. Hollow: biased, even on average not the gradient. Backprop: '
    'exact, at the grey line.'
  )
  figure.savefig(path, dpi=100)


def _colour(family: str, families: list[str]) -> str:
  return plots.COLOURS[families.index(family) % len(plots.COLOURS)]


def _panel(axes: Any, rows: list[Row], key: str, families: list[str]) -> None:
  """A line through the numbers of tangents of every family, dotted from its end to the edge."""
  axes.axvline(1, color='0.6', linewidth=2, zorder=0)
  for family in dict.fromkeys(row['family'] for row in rows):
    own = [row for row in rows if row['family'] == family]
    x, y = [max(row[key], 1e-2) for row in own], [row['error'] for row in own]
    colour = _colour(family, families)
    axes.plot(
      x,
      y,
      color=colour,
      marker=MARKERS[families.index(family) % len(MARKERS)],
      markerfacecolor='w' if own[-1]['is_biased'] else colour,
      markersize=6,
      linewidth=1.2,
    )
    for row, a, b in zip(own, x, y, strict=True):
      if len(own) > 1 or row['K'] > 1:
        axes.annotate(
          str(row['K']), (a, b), (4, 4), textcoords='offset points', fontsize=7, color=colour
        )
  for axis in (axes.xaxis, axes.yaxis):
    plots.logarithmic(axis)
  right = axes.get_xlim()[1]
  for family in dict.fromkeys(row['family'] for row in rows):
    end = [row for row in rows if row['family'] == family][-1]
    axes.plot(
      [max(end[key], 1e-2), right],
      [end['error']] * 2,
      ':',
      color=_colour(family, families),
      linewidth=0.8,
    )
  axes.set_xlim(right=right)
  axes.grid(alpha=0.3)


def _names(axes: Any, rows: list[Row], families: list[str]) -> None:
  """Names of the families beside the panel, at the height of their last point."""
  ends = {row['family']: row for row in rows}
  plots.name_lines(
    axes,
    [family + ', biased' * row['is_biased'] for family, row in ends.items()],
    [row['error'] for row in ends.values()],
    [_colour(family, families) for family in ends],
  )


if __name__ == '__main__':
  command_line.run(main)
