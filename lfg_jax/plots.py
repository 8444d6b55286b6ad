"""Error curves."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from lfg_jax.run_log import Row


def curves(path: pathlib.Path, runs: dict[str, Sequence[Row]]) -> None:
  """Draws test (solid) and training (dotted) error by epoch, a colour for each run, into a PNG file."""
  figure = Figure(figsize=(8, 5), layout='constrained')
  axes = figure.subplots()
  for index, (name, rows) in enumerate(runs.items()):
    for key, style, label in (('test_error', '-', name), ('train_error', ':', None)):
      known = [(row['epoch'], 100 * row[key]) for row in rows if row[key] is not None]
      axes.plot(*zip(*known, strict=True), style, color=f'C{index % 10}', label=label)
  axes.set(xlabel='epoch', ylabel='error, % (solid: test, dotted: training)', ylim=(0, None))
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
