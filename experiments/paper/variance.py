"""Measures the variance of forward gradients: against theory, and on real images layer by layer.

    python experiments/paper/variance.py [--out=DIR] [--parts=table1,distributions,mlp,mixer,num_tangents]
        [--data_dir=DIR] [--draws=N]

| part | what |
|---|---|
| table1 | one linear layer: Table 1 for p, q = 2, 8, 64, batch 1, 16, 128, normal and Rademacher |
| distributions | one linear layer: all distributions, 1 to 8 tangents |
| mlp | an MLP on the embedded digits, layer by layer: the estimators for arbitrary modules |
| mixer | M/8/16 on CIFAR-10, layer by layer: algorithms, cuts, distributions, numbers of tangents |
| num_tangents | M/8/16: time and memory of K tangents, all at once and in chunks |

CIFAR-10's images have been through JPEG (quality 75, see prepare_data.py). DIR gets table.md and,
for every part, PART.json with its rows, and PART.png. If a row of table1 or distributions is not within
three standard errors of theory, it is measured again with four times as many new draws
(`measured_again`).
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import variance_figures as figures
import variance_networks as networks
from matplotlib.figure import Figure

from lfg_jax import data
from lfg_jax.errors import as_user_errors
from lfg_jax.estimators import linear_layer
from lfg_jax.tangents import variance
from lfg_jax.tangents.distributions import DISTRIBUTIONS
from lfg_jax.tangents.sampling import Sampling
from lfg_jax.training import command_line
from lfg_jax.training.cost import timing
from lfg_jax.training.run import metrics, results

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Runs the selected parts."""
  parser = results.parser(__doc__, out='runs/variance')
  parser.names('parts', ','.join(PARTS), PARTS)
  parser.option('data_dir', None, 'folder of the data sets')
  parser.number('draws', 16, 'of every estimate on images', least=2)
  options = parser.parse(arguments)
  if {'mixer', 'num_tangents'} & {*options.parts}:
    with as_user_errors():
      data.load('cifar10', data_dir=options.data_dir)  # before any long work
  folder = results.Folder(options.out, __file__, arguments)
  for part in options.parts:
    rows: list[Row] = []
    for row in PARTS[part][0](options):
      rows.append(row)
      print({name: _short(value) for name, value in row.items()}, flush=True)
      folder.write(part, rows=rows)
    figure = Figure(figsize=(9, 5), layout='constrained')
    PARTS[part][1](figure, rows)
    figure.savefig(folder.path / f'{part}.png', dpi=100)
  metrics.write_atomically(folder.path / 'table.md', table(folder.path))


def _short(value: Any) -> Any:
  return float(f'{value:.4g}') if isinstance(value, float) else value


def table(out: pathlib.Path) -> str:
  """All parts in the folder, as Markdown tables."""
  text = ''
  for path in sorted(out.glob('*.json')):
    content = json.loads(path.read_text())
    rows = content['rows'] if isinstance(content, dict) else content  # older files have only rows
    names = list(rows[0])
    cells = [[str(_short(row[name])) for name in names] for row in rows]
    text += f'\n## {path.stem}\n\n{results.in_table(" | ".join(names), cells)}\n'
  return text.lstrip()


# --- one linear layer -----------------------------------------------------------------------------


def _linear_row(
  estimator: str, distribution: str, num_tangents: int, shared: bool, batch: int, p: int, q: int
) -> Row:
  layer = linear_layer.random_layer(jax.random.key(p + 100 * q), p, q)
  estimate = layer.estimate(
    estimator, Sampling(DISTRIBUTIONS[distribution], num_tangents, shared), batch
  )
  predicted = variance.predicted(
    estimator,
    DISTRIBUTIONS[distribution],
    num_tangents,
    shared=shared,
    batch=batch,
    p=p,
    q=q,
    V=layer.V,
    S=layer.S,
  )
  size = p * q * batch * num_tangents
  # Small batches of small layers have the longest tails: their standard error needs many draws.
  draws, at_once = min(40_000, max(300, 100_000_000 // size)), min(200, max(10, 2_000_000 // size))
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)  # hundreds of programs, each run once
  measured = variance.measure(estimate, layer.truth, jax.random.key(2), draws, at_once=at_once)
  # Of hundreds of rows, one may lie outside by chance. Four times the draws tell chance from error:
  # the distance of an error, in standard errors, doubles.
  again = bool(abs(measured.squared_error - predicted) > 3 * measured.squared_error_se)
  if again:
    measured = variance.measure(
      estimate, layer.truth, jax.random.key(3), 4 * draws, at_once=at_once
    )
  jax.config.update('jax_disable_most_optimizations', before)
  return {
    'estimator': estimator,
    'distribution': distribution,
    'num_tangents': num_tangents,
    'sharing': 'shared' if shared else 'independent',
    'batch': batch,
    'p': p,
    'q': q,
    'bias_z': float(measured.bias_z(layer.truth)),
    'measured': float(measured.squared_error),
    'standard_error': float(measured.squared_error_se),
    'predicted': predicted,
    'measured_again': again,
    'cosine': float(measured.cosine),
    'ms': timing.one_ms(functools.partial(jax.jit(estimate), jax.random.key(0))),
  }


def table1(options: command_line.Options) -> Iterator[Row]:
  """Rows for all combinations of layer size, batch, estimator, distribution and sharing."""
  del options
  for p, q, batch in ((p, q, n) for p in (2, 8, 64) for q in (2, 8, 64) for n in (1, 16, 128)):
    for estimator in ('weight', 'activity'):
      for distribution in ('normal', 'rademacher'):
        for shared in (True, False):
          yield _linear_row(estimator, distribution, 1, shared, batch, p, q)


def distributions(options: command_line.Options) -> Iterator[Row]:
  """Rows for all distributions on an 8 × 8 layer, whose activity has 8 dimensions."""
  del options
  for distribution in DISTRIBUTIONS:
    for num_tangents in (1, 2, 4, 6, 8):
      yield _linear_row('activity', distribution, num_tangents, False, 16, 8, 8)


PARTS = {
  'table1': (table1, figures.table1),
  'distributions': (distributions, figures.distributions),
  'mlp': (networks.mlp, figures.mlp),
  'mixer': (networks.mixer, figures.mixer),
  'num_tangents': (networks.num_tangents, figures.num_tangents),
}


if __name__ == '__main__':
  command_line.run(main)
