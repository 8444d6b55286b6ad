"""Error curves."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from lfg_jax.training.run_log import Row


def curves(path: pathlib.Path, runs: dict[str, Sequence[Sequence[Row]]]) -> None:
  """Draws test (solid) and training (dotted) error by epoch into a PNG file.

  Args:
    path: of the file.
    runs: by name, which gets a colour, the rows of one or more runs.
  """
  figure = Figure(figsize=(8, 5), layout='constrained')
  axes = figure.subplots()
  for index, (name, repeats) in enumerate(runs.items()):
    for number, rows in enumerate(repeats):
      for key, style in (('test_error', '-'), ('train_error', ':')):
        known = [(row['epoch'], 100 * row[key]) for row in rows if row[key] is not None]
        label = name if number == 0 and key == 'test_error' else None
        axes.plot(*zip(*known, strict=True), style, color=f'C{index % 10}', label=label)
  axes.set(xlabel='epoch', ylabel='error, % (solid: test, dotted: training)', ylim=(0, None))
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
