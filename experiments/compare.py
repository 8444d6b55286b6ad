"""Trains several algorithms with several seeds, and writes a table and a figure of them.

    python experiments/compare.py --algorithms=BP,LG-FG-A [--config=configs/NAME.py] [--seeds=0,1] [--out=DIR]
        [--config.field=value …]

DIR gets a folder for every run, comparison.md, comparison.json and curves.png. Run again with the same
arguments, it goes on where it stopped; with more algorithms or seeds, it adds them.
"""

import copy
import json
import pathlib
import statistics
from typing import Any

from ml_collections import ConfigDict

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, plots, run_log
from lfg_jax.training.train import prepare, train

DEFAULT = pathlib.Path(__file__).parent.parent / 'configs' / 'digits.py'
RESULT = 'comparison.json'


def main(arguments: list[str]) -> None:
  """Trains and compares."""
  parser = command_line.Parser(description=__doc__)
  parser.add_argument('--algorithms', required=True, help='names, with commas')
  parser.add_argument('--seeds', default='0', help='numbers, with commas; default: 0')
  parser.add_argument('--config', default=str(DEFAULT), help='default: configs/digits.py')
  parser.add_argument('--out', type=pathlib.Path, help='default: runs/NAME-comparison')
  options, config = command_line.parse(parser, arguments)
  algorithms, seeds = options.algorithms.split(','), command_line.numbers('seeds', options.seeds, 0)
  out = options.out or pathlib.Path('runs', pathlib.Path(options.config).stem + '-comparison')
  variants = {(name, seed): _variant(config, name, seed) for seed in seeds for name in algorithms}
  for name in algorithms:    # all mistakes before any long work
    prepare(variants[name, seeds[0]])
  _claim(out)
  origin = run_log.provenance(['experiments/compare.py', *arguments])
  for (name, seed), variant in variants.items():
    print(f'{name}, seed {seed}:')
    train(prepare(variant), out / f'{name}-seed{seed}')
    report(out, [key for key in variants if (out / '{}-seed{}'.format(*key) / 'summary.json').exists()], origin)
  print((out / 'comparison.md').read_text())


def _variant(config: ConfigDict, algorithm: str, seed: int) -> ConfigDict:
  variant = copy.deepcopy(config)
  variant.algorithm, variant.seed = algorithm, seed
  return variant


def _claim(out: pathlib.Path) -> None:
  """Makes `out` the folder of a comparison, which it must be already when it is not empty."""
  if (out / RESULT).exists():
    return
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'{out} exists and is not the folder of a comparison; name another with --out')
  out.mkdir(parents=True, exist_ok=True)
  run_log.write_atomically(out / RESULT, '{}\n')


def report(out: pathlib.Path, runs: list[tuple[str, int]], origin: dict[str, str | None]) -> None:
  """Writes comparison.json, comparison.md and curves.png of finished runs (algorithm, seed) in `out`.

  Args:
    out: the folder of the comparison.
    runs: that are finished.
    origin: `run_log.provenance` of the command.
  """
  folders: dict[str, list[pathlib.Path]] = {}
  for name, seed in runs:
    folders.setdefault(name, []).append(out / f'{name}-seed{seed}')
  summaries = {name: [json.loads((folder / 'summary.json').read_text()) for folder in own]
               for name, own in folders.items()}
  results = [summarize(name, own) for name, own in summaries.items()]
  run_log.write_atomically(out / RESULT, json.dumps({**origin, 'rows': results}, indent=2) + '\n')
  run_log.write_atomically(out / 'comparison.md', table(results))
  plots.curves(out / 'curves.png', {name: [run_log.read_rows(folder / 'metrics.jsonl') for folder in own]
                                    for name, own in folders.items()})


def summarize(algorithm: str, summaries: list[dict[str, Any]]) -> dict[str, Any]:
  """Means over seeds; the standard error of the test error is None for a single seed."""
  test = [summary['test_error'] for summary in summaries]
  return {'algorithm': algorithm, 'seeds': len(summaries), 'test_error': statistics.mean(test),
          'test_error_se': statistics.stdev(test) / len(test)**0.5 if len(test) > 1 else None,
          'train_error': statistics.mean(summary['train_error'] for summary in summaries),
          'seconds': statistics.mean(summary['seconds'] for summary in summaries),
          **{key: summaries[0][key] for key in ('model', 'dataset', 'parameters', 'steps')}}


def table(results: list[dict[str, Any]]) -> str:
  """In markdown."""
  first = results[0]
  lines = [f'{first["model"]} on {first["dataset"]}, {first["steps"]} steps; errors in %, '
           '± standard error over seeds; training error: mean over the last epoch, while it was learnt.',
           '', '| algorithm | test error | train error | seconds | seeds |', '|---|---|---|---|---|']
  for r in results:
    deviation = '' if r['test_error_se'] is None else f' ± {100 * r["test_error_se"]:.2f}'
    lines.append(f'| {r["algorithm"]} | {100 * r["test_error"]:.2f}{deviation} '
                 f'| {100 * r["train_error"]:.2f} | {r["seconds"]:.0f} | {r["seeds"]} |')
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  command_line.run(main)
