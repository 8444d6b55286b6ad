"""The paper's tables and figures as data: the runs that each needs, and the paper's errors.

Ren, Kornblith, Liao, Hinton: Scaling Forward Gradient With Local Losses, arXiv 2210.03310.

LG-FG-A is the paper's: it perturbs all activities of a block at once. LG-FG-A+ is a less noisy
estimator of the same gradient, which the paper does not have.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Test / training error in %, in the order of COLUMNS.
PAPER = {
  'BP': '2.66/0.00 2.41/0.00 33.62/0.00 36.82/14.69 24.11/21.08 17.53/13.35 55.66/49.79',
  'L-BP': '2.38/0.00 2.16/0.00 30.75/0.00 42.38/22.80 24.69/21.80 19.13/13.60 59.11/52.50',
  'LG-BP': '2.43/0.00 2.81/0.00 33.84/0.05 54.37/39.66 29.63/25.60 23.62/16.80 68.36/62.53',
  'FA': '2.82/0.00 2.90/0.00 39.94/28.44 94.55/94.13 45.87/44.06 67.93/65.32 82.86/80.21',
  'L-FA': '3.21/0.00 2.90/0.00 39.74/28.98 87.20/85.69 37.73/36.13 31.05/26.97 83.18/79.80',
  'LG-FA': '3.11/0.00 2.50/0.00 39.73/32.32 85.45/82.83 36.72/34.06 30.49/25.56 82.57/79.53',
  'DFA': '3.31/0.00 3.17/0.00 38.80/33.69 91.17/90.28 46.09/42.76 39.26/37.17 93.51/92.51',
  'FG-W': '9.25/8.93 8.56/8.64 55.95/54.28 97.71/97.58 53.37/51.56 50.45/45.64 91.94/89.69',
  'FG-A': '3.24/1.53 3.76/1.75 59.72/41.29 98.83/98.80 54.59/52.96 56.63/56.09 97.83/97.79',
  'LG-FG-W': '9.25/8.93 5.66/4.59 52.70/51.71 97.39/97.29 52.66/50.23 52.27/48.67 91.36/88.81',
  'LG-FG-A': '3.24/1.53 2.55/0.00 30.68/19.39 58.37/44.86 32.88/29.73 26.81/23.90 73.24/66.89',
}
BACKPROP, FEEDBACK = ('BP', 'L-BP', 'LG-BP'), ('FA', 'L-FA', 'LG-FA', 'DFA')
LABELS = {'LG-FG-A+': 'LG-FG-A+ (ours)'}
NOTES = {'LG-FG-A+': "of the paper's LG-FG-A: another estimator"}


class Run(NamedTuple):
  """One line of a table or figure.

  Attributes:
    rule: the name by which `--rules` selects it.
    label: its name in table and figure.
    fields: changed fields of the config, by dotted names.
    epochs: default number of epochs.
    paper: the paper's test and training error in %; None: the paper has none.
    note: what the paper's errors refer to, where that is not obvious.
  """

  rule: str
  label: str
  fields: dict[str, Any]
  epochs: int
  paper: tuple[float, float] | None = None
  note: str = ''


class Study(NamedTuple):
  """A column of a table, or a figure.

  Attributes:
    title: title of its report.
    config: name of a file in `configs/`.
    runs: its lines.
    images: default number of training images; None: all.
    loss: what the figure's second panel shows: 'train_error_percent', or 'train_contrastive_loss'.
  """

  title: str
  config: str
  runs: tuple[Run, ...]
  images: int | None = None
  loss: str = 'train_error_percent'


class Column(NamedTuple):
  """A column of Tables 2 to 4.

  Attributes:
    title: data and model.
    config: name of a file in `configs/`.
    epochs: numbers of epochs for backprop, for feedback alignment, and for forward gradients, which
      learn more slowly.
    fields: changed fields of the config in all its runs.
  """

  title: str
  config: str
  epochs: tuple[int, int, int]
  fields: Mapping[str, Any] = MappingProxyType({})


COLUMNS = {
  'mnist-S-1-1': Column('MNIST, S/1/1', 'mnist', (30, 60, 240), {'model.size': 'S/1/1'}),
  'mnist-M-1-16': Column('MNIST, M/1/16', 'mnist', (30, 60, 100)),
  'cifar10-M-8-16': Column('CIFAR-10, M/8/16', 'cifar10', (50, 50, 100)),
  'imagenet-L-32-64': Column('ImageNet, L/32/64', 'imagenet', (120, 120, 120)),
  'cifar10-contrastive-M-8-16': Column(
    'CIFAR-10, contrastive, M/8/16', 'cifar10_contrastive', (400, 400, 400)
  ),
  'cifar10-contrastive-L-8-64': Column(
    'CIFAR-10, contrastive, L/8/64', 'cifar10_contrastive_large', (400, 400, 400)
  ),
  'imagenet-contrastive-L-32-64': Column(
    'ImageNet, contrastive, L/32/64', 'imagenet_contrastive', (800, 800, 800)
  ),
}


def published(column: str, rule: str) -> tuple[float, float]:
  """The paper's test and training error in %; `rule` is the paper's name for the rule.

  >>> published('cifar10-M-8-16', 'LG-FG-A')
  (30.68, 19.39)
  """
  test, train = PAPER[rule].split()[list(COLUMNS).index(column)].split('/')
  return float(test), float(train)


def _column(name: str) -> Study:
  title, config, epochs, fields = COLUMNS[name]

  def run(rule: str) -> Run:
    kind = 0 if rule in BACKPROP else 1 if rule in FEEDBACK else 2
    paper = published(name, rule.removesuffix('+'))
    return Run(
      rule,
      LABELS.get(rule, rule),
      {'algorithm': rule, **fields},
      epochs[kind],
      paper,
      NOTES.get(rule, ''),
    )

  runs = [run(rule) for rule in (*PAPER, 'LG-FG-A+')]
  if 'contrastive' not in name:
    return Study(f'Tables 2 to 4: {title}', config, tuple(runs))
  # Only the read-out learns: the rest moves a millionth as fast.
  still = {
    'algorithm': 'LG-BP',
    'optimizer.learning_rate': 1e-9,
    'optimizer.readout_multiplier': 1e6,
    **fields,
  }
  runs.append(Run('untrained', 'untrained', still, epochs[0]))
  return Study(f'Tables 2 to 4: {title}', config, tuple(runs), loss='train_contrastive_loss')


def _figure4() -> Study:
  fields = {'model.size': 'M/8/1', 'model.channels': 256, 'batch_size': 64}
  runs = [
    Run(
      rule,
      f'{LABELS.get(rule, rule)}, {"with" if stop else "without"} stop-gradient',
      {'algorithm': rule, 'contrastive.stop_gradient': stop, **fields},
      12,
    )
    for rule in ('LG-BP', 'LG-FG-A', 'LG-FG-A+')
    for stop in (True, False)
  ]
  return Study(
    'Figure 4: the stop-gradient of the contrastive loss, CIFAR-10, M/8/1',
    'cifar10_contrastive',
    tuple(runs),
    6_400,
    'train_contrastive_loss',
  )


def _figure6() -> Study:
  cuts = {
    'block': (False, False),
    'block+patch': (True, False),
    'block+group': (False, True),
    'all': (True, True),
  }
  runs = [
    Run(
      rule,
      f'{LABELS.get(rule, rule)}, {cut}',
      {'algorithm': rule, 'losses.patch': patch, 'losses.group': group},
      5,
    )
    for rule in ('LG-FG-A', 'LG-FG-A+')
    for cut, (patch, group) in cuts.items()
  ]
  return Study(
    'Figure 6: which cuts the local losses have, CIFAR-10, M/8/16', 'cifar10', tuple(runs), 10_000
  )


GROUPS = (1, 2, 4, 8, 16, 32, 64)


def _figure7() -> Study:
  runs = [
    Run(
      rule,
      f'{LABELS.get(rule, rule)}, G = {number}',
      {'algorithm': rule, 'model.size': f'M/8/{number}'},
      5,
    )
    for rule in ('LG-FG-A', 'LG-FG-A+')
    for number in GROUPS
  ]
  return Study(
    'Figure 7: numbers of channel groups, CIFAR-10, M/8/G', 'cifar10', tuple(runs), 10_000
  )


STUDIES = {
  **{name: _column(name) for name in COLUMNS},
  'figure4': _figure4(),
  'figure6': _figure6(),
  'figure7': _figure7(),
}
# Table 1 and figure 5 are measurements, not runs: other programs make them.
PROGRAMS = {
  'table1': ['experiments/paper/variance.py', '--parts=table1'],
  'figure5': ['experiments/paper/replicated_losses.py'],
}
