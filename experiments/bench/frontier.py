"""Each layer's error against milliseconds per step, for variants of LG-FG-A on real images.

    python experiments/bench/frontier.py [--dataset=cifar10] [--model=M/8/16] [--batch=16]
        [--workdir=DIR | --epochs=2] [--variants=…] [--laws=normal,rademacher,hadamard]
        [--passes=1,2,4,8,16,32] [--draws=32] [--out=DIR]

All is measured twice: after --warm_up steps of LG-BP ('start'), and after training ('trained'),
which is the run in --workdir, or else --epochs of LG-FG-A with all guesses, kept in DIR/trained.
The target is LG-BP's gradient on the same images. Errors are squared and relative to the square
of the gradient, means over draws and over the blocks of a stack. Theory speaks of the signal at
the tap behind each layer, which is measured too. All variants are timed in turn. The law `normal`
is looked at with one pass only. Rows with 'allocated' spend the time that uniform passes take as
`variance.allocate` says. DIR gets frontier.json, frontier.md and frontier.png.
"""

import argparse
import json
import pathlib
from typing import Any

import frontier_figure
import frontier_network
import frontier_rows
import jax
from frontier_network import VARIANTS, Bench
from frontier_rows import LAW, SINGLE, WITHIN
from ml_collections import ConfigDict

from lfg_jax.errors import UserError
from lfg_jax.estimators.tangents import LAWS
from lfg_jax.training import command_line, configs, run_log, train

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  options = _parse(arguments)
  config = _config(options)
  job = train.prepare(config)
  bench = Bench(config, job.dataset, options.batch)
  options.out.mkdir(parents=True, exist_ok=True)
  points = {'start': frontier_network.warm_up(bench, options.warm_up)}
  if options.workdir or options.epochs:
    points['trained'] = _trained(options, job)
  rows = frontier_rows.measure(bench, points, options)
  result = {**run_log.provenance(['experiments/bench/frontier.py', *arguments]), 'model': options.model,
            'dataset': options.dataset, 'batch': options.batch, 'rows': rows}
  run_log.write_atomically(options.out / 'frontier.json', json.dumps(result, indent=1) + '\n')
  run_log.write_atomically(options.out / 'frontier.md', table(result))
  frontier_figure.draw(options.out / 'frontier.png', rows)
  print(table(result))


def _parse(arguments: list[str]) -> argparse.Namespace:
  parser = command_line.Parser(description=__doc__)
  parser.add_argument('--dataset', default='cifar10', help='default: cifar10')
  parser.add_argument('--data_dir', help='of TFDS')
  parser.add_argument('--model', default='M/8/16', help='SIZE/PATCHES/GROUPS; default: M/8/16')
  parser.add_argument('--batch', type=int, default=16, help='images; default: 16')
  parser.add_argument('--workdir', type=pathlib.Path, help='of a run of LG-FG-A, not to train')
  parser.add_argument('--epochs', type=int, default=2, help='of training; 0: none; default: 2')
  parser.add_argument('--warm_up', type=int, default=40, help='steps of LG-BP; default: 40')
  parser.add_argument('--variants', default=','.join(VARIANTS), help='names, with commas')
  parser.add_argument('--laws', default=f'{SINGLE},rademacher,{LAW}', help='names, with commas')
  parser.add_argument('--passes', default='1,2,4,8,16,32', help='numbers, with commas')
  parser.add_argument('--draws', type=int, default=32, help='of every estimate; default: 32')
  parser.add_argument('--repetitions', type=int, default=10, help='of every timing; default: 10')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/frontier'))
  options = parser.parse_args(arguments)
  _check(options)
  return options


def _check(options: argparse.Namespace) -> None:
  """Finds mistakes; takes lists apart."""
  command_line.at_least(options, batch=1, epochs=0, warm_up=1, draws=2, repetitions=1)
  options.passes = command_line.numbers('passes', options.passes, 1)
  options.variants = command_line.names('variants', options.variants, VARIANTS)
  options.laws = command_line.names('laws', options.laws, LAWS)


def _config(options: argparse.Namespace) -> ConfigDict:
  """Of the training, and of the model that is measured."""
  if not options.workdir:
    config = configs.base()
    config.dataset, config.data_dir = options.dataset, options.data_dir
    config.model.size = options.model
    config.optimizer.name, config.optimizer.learning_rate = 'adam', 1e-3
    config.epochs, config.estimator.guess = max(options.epochs, 1), 'all'
    return config
  config = train.load(options.workdir, options.data_dir)[0].config
  options.model, options.dataset = config.model.size, config.dataset
  base, given = dict(configs.flatten(configs.base())), dict(configs.flatten(config))
  fields = [field for field in base if field.startswith('losses.')]
  for field in ('algorithm', 'loss', 'model.norm', 'model.norm_derivative', *fields):
    if given[field] != base[field]:
      raise UserError(f'{options.workdir} has a run with {field}={given[field]!r}; '
                              f'allowed: {base[field]!r}')
  return config


def _trained(options: argparse.Namespace, job: train.Job) -> dict[str, Any]:
  """Variables of the run in --workdir, or of one that is made, or was, in the folder of results."""
  workdir = options.workdir or options.out / 'trained'
  if not options.workdir:
    train.train(job, workdir)
  state = jax.device_get(train.load(workdir, options.data_dir)[1])
  return {'params': state.params, **state.rest}


def table(result: dict[str, Any]) -> str:
  """In markdown: for every point and variant, errors (and cosines) of all layers."""
  rows = result['rows']
  layers = list(dict.fromkeys(row['layer'] for row in rows))
  far = [abs(row['z']) for row in rows]
  text = (f'{result["model"]} on {result["dataset"]}, batch {result["batch"]}, {result["device"]}, '
          f'commit {result["commit"]}. Cells: squared error / |gradient|² (cosine).\n\n'
          f'Signals against theory: of {len(rows)} rows {sum(z > WITHIN for z in far)} are further '
          f'than {WITHIN} standard errors from it; the furthest is {max(far):.1f} away.\n')
  for point in dict.fromkeys(row['point'] for row in rows):
    text += (f'\n## {point}\n\n| variant | law | passes | ms | × BP | × paper '
             f'| {" | ".join(layers)} |\n|{"---|" * (6 + len(layers))}\n')
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
      if row['point'] == point:
        key = (row['variant'], row['law'], _passes(row['passes']), row.get('budget_passes'))
        groups.setdefault(key, {})[row['layer']] = row
    for (name, law, passes, _), own in groups.items():
      first = own[layers[0]]
      cells = [f'{own[layer]["relative_error"]:.3g} ({own[layer]["cosine"]:.3f})'
               for layer in layers]
      text += (f'| {name} | {law} | {passes} | {first["ms"]:.3g} | {first["ratio_to_bp"]:.2f} '
               f'| {first["ratio_to_paper"]:.2f} | {" | ".join(cells)} |\n')
  return text


def _passes(passes: int | dict[str, int]) -> str:
  if isinstance(passes, int):
    return str(passes)
  return ', '.join(f'{tap.removeprefix("after_")} {K}' for tap, K in passes.items())


if __name__ == '__main__':
  command_line.run(main)
