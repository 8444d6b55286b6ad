"""Each layer's error against milliseconds per step, for variants of LG-FG-A+ on real images.

    python experiments/bench/frontier.py [--dataset=cifar10] [--model=M/8/16] [--batch=16]
        [--workdir=DIR | --epochs=2] [--variants=…] [--distributions=normal,rademacher,hadamard]
        [--num_tangents=1,2,4,8,16,32] [--draws=32] [--warm_up=40] [--repetitions=10]
        [--data_dir=DIR] [--out=DIR]

Everything is measured twice: after --warm_up steps of LG-BP ('start'), and after training
('trained'). The trained network is that of the run in --workdir. Without --workdir, the program
trains LG-FG-A+ with all control variates for --epochs, in DIR/trained. The target is LG-BP's gradient on the
same images. Errors are squared, relative to the squared gradient, and averaged over draws and over
the blocks of a stack. Theory predicts the error of the signal at the tap behind each layer, which
is also measured. All variants are timed in turn. The distribution `normal` is measured with one tangent only.
Rows with 'allocated' spend the time of uniform passes as `variance.allocate` says. DIR gets
frontier.json, frontier.md and frontier.png.
"""

from typing import Any

import frontier_figure
import frontier_network
import frontier_rows
import jax
from frontier_network import VARIANTS, Bench
from frontier_rows import DISTRIBUTION, SINGLE, WITHIN
from ml_collections import ConfigDict

from lfg_jax.errors import UserError
from lfg_jax.tangents.distributions import DISTRIBUTIONS
from lfg_jax.training import command_line, configs, train
from lfg_jax.training.run import results

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Measures, prints and writes."""
  options = _parse(arguments)
  config = _config(options)
  job = train.prepare(config)
  bench = Bench(config, job.dataset, options.batch)
  folder = results.Folder(options.out, __file__, arguments)
  points = {'start': frontier_network.warm_up(bench, options.warm_up)}
  if options.workdir or options.epochs:
    points['trained'] = _trained(options, job)
  rows = frontier_rows.measure(bench, points, options)
  settings = {'model': options.model, 'dataset': options.dataset, 'batch': options.batch}
  folder.write('frontier', **settings, rows=rows)
  frontier_figure.draw(folder.path / 'frontier.png', rows)
  folder.write_table('frontier', table({**folder.origin, **settings}, rows))


def _parse(arguments: list[str]) -> command_line.Options:
  parser = results.parser(__doc__, out='runs/frontier', model='M/8/16', batch=16, repetitions=10)
  parser.option('dataset', 'cifar10')
  parser.option('data_dir', None, 'folder of the data sets')
  parser.path('workdir', None, 'of a run of LG-FG-A+, not to train')
  parser.number('epochs', 2, 'of training; 0: none', least=0)
  parser.number('warm_up', 40, 'steps of LG-BP')
  parser.names('variants', ','.join(VARIANTS), VARIANTS)
  parser.names('distributions', f'{SINGLE},rademacher,{DISTRIBUTION}', DISTRIBUTIONS)
  parser.numbers('num_tangents', '1,2,4,8,16,32')
  parser.number('draws', 32, 'of every estimate', least=2)
  return parser.parse(arguments)


def _config(options: command_line.Options) -> ConfigDict:
  """The config of the training, and of the model that is measured."""
  if not options.workdir:
    config = configs.base()
    config.dataset, config.data_dir = options.dataset, options.data_dir
    config.model.size = options.model
    config.optimizer.name, config.optimizer.learning_rate = 'adam', 1e-3
    config.epochs, config.estimator.control_variate = max(options.epochs, 1), 'all'
    return config
  config = train.load(options.workdir, options.data_dir)[0].config
  options.model, options.dataset = config.model.size, config.dataset
  base, given = dict(configs.flatten(configs.base())), dict(configs.flatten(config))
  fields = [field for field in base if field.startswith('losses.')]
  for field in ('algorithm', 'objective', 'model.norm', 'model.norm_derivative', *fields):
    if given[field] != base[field]:
      raise UserError(
        f'{options.workdir} has a run with {field}={given[field]!r}; allowed: {base[field]!r}'
      )
  return config


def _trained(options: command_line.Options, job: train.Job) -> dict[str, Any]:
  """Variables of the run in --workdir or, without it, of a run that is made in DIR/trained."""
  workdir = options.workdir or options.out / 'trained'
  if not options.workdir:
    train.train(job, workdir)
  state = jax.device_get(train.load(workdir, options.data_dir)[1])
  return {'params': state.params, **state.rest}


def table(about: dict[str, Any], rows: list[Row]) -> str:
  """A Markdown table per point: for every variant, the errors (and cosines) of all layers."""
  layers = list(dict.fromkeys(row['layer'] for row in rows))
  far = [abs(row['z']) for row in rows]
  text = (
    f'{about["model"]} on {about["dataset"]}, batch {about["batch"]}, {about["device"]}, '
    f'commit {about["commit"]}. Cells: squared error / |gradient|² (cosine).\n\n'
    f'Signals against theory: of {len(rows)} rows {sum(z > WITHIN for z in far)} are further '
    f'than {WITHIN} standard errors from it; the furthest is {max(far):.1f} away.\n'
  )
  for point in dict.fromkeys(row['point'] for row in rows):
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
      if row['point'] == point:
        key = (
          row['variant'],
          row['distribution'],
          _passes(row['num_tangents']),
          row.get('budget_passes'),
        )
        groups.setdefault(key, {})[row['layer']] = row
    cells = [
      [name, distribution, num_tangents, *_cells([own[layer] for layer in layers])]
      for (name, distribution, num_tangents, _), own in groups.items()
    ]
    head = ' | '.join(['variant | distribution | passes | ms | × BP | × paper', *layers])
    text += f'\n## {point}\n\n{results.in_table(head, cells)}\n'
  return text


def _cells(of_layers: list[Row]) -> list[str]:
  first = of_layers[0]
  return [
    f'{first["ms"]:.3g}',
    f'{first["ratio_to_bp"]:.2f}',
    f'{first["ratio_to_paper"]:.2f}',
    *(f'{row["relative_error"]:.3g} ({row["cosine"]:.3f})' for row in of_layers),
  ]


def _passes(num_tangents: int | dict[str, int]) -> str:
  if isinstance(num_tangents, int):
    return str(num_tangents)
  return ', '.join(f'{tap.removeprefix("after_")} {K}' for tap, K in num_tangents.items())


if __name__ == '__main__':
  command_line.run(main)
