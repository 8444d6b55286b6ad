"""Trains several algorithms with several seeds; writes a table and a figure that compare them.

    python experiments/compare.py --algorithms=BP,LG-FG-A+ [--config=NAME or FILE] [--seeds=0,1]
        [--out=runs/NAME-comparison] [--config.field=value …]

--out gets a folder for every run, comparison.md, comparison.json and curves.png. If run again with
the same arguments, the program continues where it stopped; with more algorithms or seeds, it adds
them.
"""

import copy
import json
import pathlib
import statistics
from typing import Any

from ml_collections import ConfigDict

from lfg_jax.training import command_line
from lfg_jax.training.rules import rules
from lfg_jax.training.run import metrics, plots, results
from lfg_jax.training.train import prepare, train

NAME = 'comparison'


def main(arguments: list[str]) -> None:
  """Trains all algorithms with all seeds, and compares them."""
  parser = results.parser(__doc__, out=None, config='digits', seeds='0')
  parser.names('algorithms', None, rules.REGISTRY, required=True)
  options, config = command_line.parse(parser, arguments)
  out = options.out or pathlib.Path('runs', pathlib.Path(options.config).stem + '-comparison')
  variants = {
    (name, seed): _variant(config, name, seed)
    for seed in options.seeds
    for name in options.algorithms
  }
  for name in options.algorithms:  # all mistakes before any long work
    prepare(variants[name, options.seeds[0]])
  results.claim(out, NAME, 'a comparison')
  folder = results.Folder(out, __file__, arguments)
  for (name, seed), variant in variants.items():
    print(f'{name}, seed {seed}:')
    train(prepare(variant), out / f'{name}-seed{seed}')
    report(
      folder,
      [
        (name, seed)
        for name, seed in variants
        if (out / f'{name}-seed{seed}' / 'summary.json').exists()
      ],
    )
  print((out / f'{NAME}.md').read_text())


def _variant(config: ConfigDict, algorithm: str, seed: int) -> ConfigDict:
  variant = copy.deepcopy(config)
  variant.algorithm, variant.seed = algorithm, seed
  return variant


def report(folder: results.Folder, runs: list[tuple[str, int]]) -> None:
  """Writes comparison.json, comparison.md and curves.png of finished runs (algorithm, seed)."""
  workdirs: dict[str, list[pathlib.Path]] = {}
  for name, seed in runs:
    workdirs.setdefault(name, []).append(folder.path / f'{name}-seed{seed}')
  rows = [
    {
      **summarize(name, [json.loads((workdir / 'summary.json').read_text()) for workdir in own]),
      'curve': curve([metrics.read_rows(workdir / 'metrics.jsonl') for workdir in own]),
    }
    for name, own in workdirs.items()
  ]
  folder.write(NAME, rows=rows)
  metrics.write_atomically(folder.path / f'{NAME}.md', table(rows))
  plots.curves(
    folder.path / 'curves.png',
    {
      name: [metrics.read_rows(workdir / 'metrics.jsonl') for workdir in own]
      for name, own in workdirs.items()
    },
  )


def summarize(algorithm: str, summaries: list[dict[str, Any]]) -> dict[str, Any]:
  """A row for one algorithm; what all its seeds have in common is taken from the first."""
  return {
    'algorithm': algorithm,
    'seeds': len(summaries),
    **results.over_seeds(summaries),
    **{key: summaries[0][key] for key in ('model', 'dataset', 'parameters', 'steps')},
  }


def curve(runs: list[list[metrics.Row]]) -> dict[str, list[float]]:
  """Test errors by epoch: means over runs, and their standard errors (0 for one run)."""
  epochs, means = plots.means(runs, 'test_error_percent')
  by_epoch = [
    [row['test_error_percent'] for run in runs for row in run if row['epoch'] == epoch]
    for epoch in epochs
  ]
  spread = lambda own: statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else 0.0
  return {
    'epoch': epochs,
    'test_error_percent': means,
    'standard_error_percent': list(map(spread, by_epoch)),
  }


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  first = rows[0]
  cells = [
    [
      row['algorithm'],
      results.percent(row),
      f'{row["train_error_percent"]:.2f}',
      f'{row["seconds"]:.0f}',
      str(row['seeds']),
    ]
    for row in rows
  ]
  head = 'algorithm | test error | train error | seconds | seeds'
  return (
    f'{first["model"]} on {first["dataset"]}, {first["steps"]} steps; errors in %, '
    '± standard error over seeds; training error: mean over the last epoch, while it was '
    f'learnt.\n\n{results.in_table(head, cells)}\n'
  )


if __name__ == '__main__':
  command_line.run(main)
