"""The figures of variance.py, one for each of its parts, from the part's rows."""

from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]


def table1(figure: Figure, rows: list[Row]) -> None:
  """Measured over predicted, and the z-scores."""
  left, right = figure.subplots(1, 2)
  for index, estimator in enumerate(('weight', 'activity')):
    for law, marker in (('normal', 'o'), ('rademacher', 'x')):
      own = [r for r in rows if (r['estimator'], r['law']) == (estimator, law)]
      left.loglog(
        [r['predicted'] for r in own],
        [r['measured'] for r in own],
        marker,
        color=f'C{index}',
        label=f'{estimator}, {law}',
        alpha=0.6,
      )
  limits = [min(r['predicted'] for r in rows), max(r['predicted'] for r in rows)]
  left.plot(limits, limits, 'k-', linewidth=0.5)
  left.set(xlabel='predicted variance per entry', ylabel='measured')
  left.legend()
  z = [(r['measured'] - r['predicted']) / r['standard_error'] for r in rows]
  right.hist(z, bins=30)
  right.set(
    xlabel='(measured - predicted) / standard error',
    ylabel='rows',
    title=f'largest of {len(z)}: {max(map(abs, z)):.2f}',
  )


def laws(figure: Figure, rows: list[Row]) -> None:
  """Variance by passes."""
  axes = figure.subplots()
  for index, law in enumerate(dict.fromkeys(r['law'] for r in rows)):
    own = [r for r in rows if r['law'] == law]
    axes.errorbar(
      [r['passes'] for r in own],
      [r['measured'] for r in own],
      [3 * r['standard_error'] for r in own],
      fmt='o',
      color=f'C{index}',
      label=law,
      capsize=3,
    )
    axes.plot(
      [r['passes'] for r in own], [r['predicted'] for r in own], color=f'C{index}', linewidth=0.8
    )
  axes.set(
    xlabel='passes, of 8 dimensions',
    ylabel='variance per entry (points: measured, ± 3 s.e.; lines: predicted)',
    ylim=(0, None),
  )
  axes.legend()


def _layers(rows: list[Row]) -> list[str]:
  return list(dict.fromkeys(r['layer'] for r in rows))


def mlp(figure: Figure, rows: list[Row]) -> None:
  """Relative error by passes, a panel for every layer."""
  panels = figure.subplots(1, len(_layers(rows)), sharey=True)
  for axes, layer in zip(panels, _layers(rows), strict=True):
    for index, (name, taps) in enumerate(dict.fromkeys((r['estimator'], r['taps']) for r in rows)):
      for law, style in (('normal', ':'), ('rademacher', '--'), ('haar', '-'), ('hadamard', '-')):
        own = [
          r
          for r in rows
          if (r['estimator'], r['taps'], r['law'], r['layer']) == (name, taps, law, layer)
        ]
        if own:
          axes.loglog(
            [r['passes'] for r in own],
            [max(r['relative_error'], 1e-6) for r in own],
            style,
            marker='.',
            color=f'C{index}',
            label=f'{name}, {taps}, {law}',
          )
    axes.set(title=layer, xlabel='passes')
  panels[0].set(ylabel='squared error / |gradient|²')
  panels[-1].legend(fontsize='x-small')


def mixer(figure: Figure, rows: list[Row]) -> None:
  """Left: relative error of every algorithm and cut, by layer. Right: cosine against time."""
  figure.set_size_inches(13, 6)
  left, right = figure.subplots(1, 2)
  layers = _layers(rows)
  single = [
    r for r in rows if r['passes'] == 1 and r['taps'] == 'joint' and r['law'] == 'rademacher'
  ]
  for index, (name, cut) in enumerate(dict.fromkeys((r['estimator'], r['cut']) for r in single)):
    own = {
      r['layer']: r['relative_error'] for r in single if (r['estimator'], r['cut']) == (name, cut)
    }
    left.semilogy(
      [own[layer] for layer in layers],
      'os'[name.endswith('W')] + '-',
      color=f'C{index}',
      label=f'{name}, {cut}',
    )
  left.set_xticks(range(len(layers)), layers, rotation=60, fontsize='small')
  left.set(ylabel='squared error / |gradient|², one Rademacher pass')
  left.legend(fontsize='x-small', loc='upper center', bbox_to_anchor=(0.5, -0.22), ncols=3)
  many = [
    r
    for r in rows
    if (r['estimator'], r['cut']) == ('LG-FG-A-paper', 'all')
    and r['layer'] == 'blocks/group'
    and r['law'] != 'normal'
  ]
  for law, taps in dict.fromkeys((r['law'], r['taps']) for r in many):
    own = sorted(
      ((r['ms'], r['cosine'], r['passes']) for r in many if (r['law'], r['taps']) == (law, taps)),
      key=lambda point: point[2],
    )
    right.semilogx([o[0] for o in own], [o[1] for o in own], 'o-', label=f'{law}, {taps}')
    for ms, cosine, count in own:
      right.annotate(str(count), (ms, cosine), fontsize='x-small')
  ticks = (32, 64, 128, 256, 512, 1024)
  right.set_xticks(ticks, map(str, ticks))
  right.minorticks_off()
  right.set(
    xlabel='ms (numbers: passes)',
    ylabel='cosine to the true gradient',
    title='grouped layers of blocks 1 to 3',
  )
  right.legend(fontsize='small')


def passes(figure: Figure, rows: list[Row]) -> None:
  """Time relative to one pass, and memory."""
  left, right = figure.subplots(1, 2)
  for law, chunk in dict.fromkeys((r['law'], r['chunk']) for r in rows):
    own = [r for r in rows if (r['law'], r['chunk']) == (law, chunk)]
    label = f'{law}, ' + (f'chunks of {chunk}' if chunk else 'at once')
    left.loglog(
      [r['passes'] for r in own], [r['relative_to_one_pass'] for r in own], 'o-', label=label
    )
    right.loglog(
      [r['passes'] for r in own], [r['temporaries_bytes'] / 2**20 for r in own], 'o-', label=label
    )
  counts = sorted({r['passes'] for r in rows})
  left.loglog(counts, [(1 + 2 * K) / 3 for K in counts], 'k:', label='(1 + 2 K) / 3')
  left.set(xlabel='passes', ylabel='time / time of one pass')
  right.set(xlabel='passes', ylabel='temporaries, MiB')
  left.legend()
