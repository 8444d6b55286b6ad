"""Writes experiments/results/README.md: the origin of the numbers in every table and figure.

    python experiments/paper/index.py [--results=DIR]

The program reads all JSON files of the results: reports of reproduce.py, which have a 'study';
other files with a 'commit'; and older files, whose origins are in OLD_RUNS and OLD_FILES.
"""

import fnmatch
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import report
from studies import PROGRAMS, STUDIES, published

from lfg_jax.errors import UserError
from lfg_jax.training import command_line
from lfg_jax.training.run import metrics, results

RESULTS = pathlib.Path(__file__).parents[1] / 'results'
BEFORE = 'before commit tracking'
MACHINE = '2 CPU cores'
REPRODUCE = 'python experiments/paper/reproduce.py'
INTRODUCTION = f"""# Results

Written by `python experiments/paper/index.py` from the files of this folder.

{report.EXPLANATION}
**CIFAR-10's pixels had been through JPEG (quality 75)** in every number here.
The paper: Ren, Kornblith, Liao, Hinton 2023, arXiv 2210.03310.

*LG-FG-A* is the paper's: all activities of a block perturbed at once.
*LG-FG-A+ (ours)* is another, less noisy estimator of the same gradient.
The commands here have today's names.
Every other command is as of the commit beside it: programs that were in `experiments/` then may be in
`experiments/bench/` or `experiments/paper/` now.
"""


class OldRun(NamedTuple):
  """A run that was stored without its origin.

  Attributes:
    study: the study that it belongs to.
    label: its label, with today's names of the rules.
    paper: the paper's name of the rule; None: the paper has no number.
    path: path of its file.
    key: key of its rows in the file; empty: the file has only one run.
    command: the command that made it; None: the file has the command.
    images: number of images that it was trained on; None: all.
    note: a remark about its epochs.
  """

  study: str
  label: str
  paper: str | None
  path: str
  key: str = ''
  command: str | None = None
  images: int | None = None
  note: str = ''


_CONTRASTIVE = (
  f'{REPRODUCE} cifar10-contrastive-M-8-16 --epochs=5 --images=20000 '
  '--config.batch_size=64 --rules='
)
OLD_RUNS = (
  *(
    OldRun(f'mnist-{size}', label, rule, f'mnist_{size.replace("-", "_")}_{name}.json')
    for size in ('S-1-1', 'M-1-16')
    for label, rule, name in (
      ('BP', 'BP', 'BP'),
      ('BP, plain SGD', 'BP', 'BP_sgd'),
      ('LG-FG-A', 'LG-FG-A', 'LG-FG-A'),
    )
  ),
  OldRun(
    'cifar10-M-8-16',
    'LG-FG-A',
    'LG-FG-A',
    'cifar10_M_8_16_LG-FG-A.json',
    note=' (of a schedule of 10)',
  ),
  *(
    OldRun(
      'cifar10-contrastive-M-8-16',
      name,
      None if name == 'untrained' else name,
      'cifar10_contrastive/algorithms.json',
      name,
      _CONTRASTIVE + name,
      20_000,
    )
    for name in ('BP', 'LG-BP', 'FG-A', 'LG-FG-A', 'untrained')
  ),
  *(
    OldRun(
      'figure4',
      f'{rule}, {stop} stop-gradient',
      None,
      'cifar10_contrastive/stop_gradient.json',
      f'{rule}, {stop} stop-gradient',
      f'{REPRODUCE} figure4 --rules={rule}',
      6_400,
    )
    for rule in ('LG-BP', 'LG-FG-A')
    for stop in ('with', 'without')
  ),
)
_PROBE = 'python experiments/linear_probe.py --workdir=RUN'
_LAWS = 'python experiments/compare.py --algorithms=LG-FG-A --seeds=0,1,2,3,4 '
_THROUGHPUT = (
  'python experiments/bench/throughput.py --config.batch_size=64 --config.algorithm=LG-FG-A'
)
_ON_MNIST = _LAWS + '--config=configs/mnist.py --config.model.size=S/1/1 --config.epochs=5 '


def _passes(distribution: str) -> tuple[tuple[str, str], ...]:
  """Pairs of the end of a file's name and the fields that its runs had."""
  one = f'--config.estimator.distribution={distribution}'
  return ('_1', one), (
    '8',
    f'{one} --config.estimator.num_tangents=8 --config.estimator.joint=False',
  )


# Commands, by a pattern of the file's path.
OLD_FILES = {
  'variance/table1.json': f'{REPRODUCE} table1',
  'replicated_losses/*.json': f'{REPRODUCE} figure5',
  **{
    f'variance/{part}.json': f'python experiments/paper/variance.py --parts={part}'
    for part in ('distributions', 'mlp', 'mixer', 'num_tangents')
  },
  'cifar10_contrastive/linear_probe_M_4_16.json': f'{_PROBE} --pairs=2',
  'cifar10_contrastive/linear_probe_*.json': f'{_PROBE} --images=20000 --pairs=4',
  'depth/depth.json': 'python experiments/bench/depth.py',
  'digits/comparison.json': 'python experiments/compare.py --algorithms=BP,LG-BP,FG-W,FG-A,LG-FG-A',
  **{
    f'distributions/digits_{distribution}{num_tangents}.json': _LAWS + fields
    for distribution in ('normal', 'rademacher', 'hadamard')
    for num_tangents, fields in _passes(distribution)
  },
  **{
    f'distributions/mnist_{distribution}{num_tangents.strip("_1")}.json': _ON_MNIST + fields
    for distribution in ('normal', 'rademacher', 'hadamard')
    for num_tangents, fields in _passes(distribution)
  },
  'step_time/step_time.json': 'python experiments/bench/step_time.py --algorithms=BP,LG-BP,FG-A,LG-FG-W,LG-FG-A',
  'throughput/throughput.json': _THROUGHPUT,
}
FIGURES = {
  'table1': 'Table 1: variances of forward gradients',
  'figure5': 'Figure 5: cost of replicated losses',
  **{name: study.title for name, study in STUDIES.items()},
}


def main(arguments: list[str]) -> None:
  """Writes the index."""
  parser = command_line.Parser(__doc__)
  parser.option('results', RESULTS, 'folder of the results', kind=pathlib.Path)
  folder = parser.parse(arguments).results
  if not folder.is_dir():
    raise UserError(f'--results is {folder}; allowed: a folder')
  metrics.write_atomically(folder / 'README.md', index(folder))
  print(folder / 'README.md')


def index(folder: pathlib.Path) -> str:
  """The text of the README."""
  files = {
    path.relative_to(folder).as_posix(): json.loads(path.read_text())
    for path in folder.rglob('*.json')
  }
  files = dict(sorted(files.items()))
  text = INTRODUCTION
  for study, title in FIGURES.items():
    body = measurements(files, study) if study in PROGRAMS else runs(files, study)
    text += f'\n## {title}\n\n{body or f"Not run yet: `{REPRODUCE} {study}`."}\n'
  return f'{text}\n## Other measurements\n\n{measurements(files, None)}\n'


def runs(files: dict[str, Any], study: str) -> str:
  """A table of a study's new and old runs."""
  rows = [*new_rows(files, study), *old_rows(files, study)]
  return results.in_table(
    'run | here | paper | epochs | images | seeds | device | commit | file | command', rows
  )


def new_rows(files: dict[str, Any], study: str) -> Iterator[list[str]]:
  """Table rows of a study's runs, from reports."""
  for path, content in files.items():
    if isinstance(content, dict) and content.get('study') == study:
      for row in content['rows']:
        label, here, paper, _, *rest = report.cells(row)
        yield [label, here, paper, *rest, link(path), f'`{row["origins"][0]["command"]}`']


def old_rows(files: dict[str, Any], study: str) -> Iterator[list[str]]:
  """Table rows of a study's runs, from OLD_RUNS."""
  for run in OLD_RUNS:
    if run.study == study and run.path in files:
      content = files[run.path]
      rows = content['runs'][run.key] if run.key else content['rows']
      last = [row for row in rows if row['test_error_percent'] is not None][-1]
      paper = '{:.2f} / {:.2f}'.format(*published(study, run.paper)) if run.paper else '–'
      yield [
        run.label,
        f'{last["test_error_percent"]:.2f} / {last["train_error_percent"]:.2f}',
        paper,
        f'{last["epoch"]}{run.note}',
        str(run.images or 'all'),
        '0',
        MACHINE,
        BEFORE,
        link(run.path),
        f'`{run.command or named_today(content["command"], run.label)}`',
      ]


def named_today(command: str, label: str) -> str:
  """A stored command, with the name of the paper's LG-FG-A, which was the default then."""
  return f'{command} --config.algorithm={label}' if label == 'LG-FG-A' else command


def measurements(files: dict[str, Any], study: str | None) -> str:
  """A table of files that are not runs: those of a study in PROGRAMS, or (None) of no study."""
  rows = []
  for path, content in files.items():
    if path in {run.path for run in OLD_RUNS} or (isinstance(content, dict) and 'study' in content):
      continue
    if isinstance(content, dict) and 'commit' in content:
      origin = [str(content[key]) for key in ('device', 'commit', 'command')]
    else:
      origin = [MACHINE, BEFORE, old_command(path)]
    if study == belongs_to(origin[2], path):
      rows.append([link(path), *origin[:2], f'`{origin[2]}`'])
  return results.in_table('file | device | commit | command', rows)


def belongs_to(command: str, path: str) -> str | None:
  """The study in PROGRAMS that a file belongs to; None if there is none."""
  if path.endswith('table1.json'):
    return 'table1'
  return 'figure5' if 'replicated_losses' in command or command.endswith('figure5') else None


def old_command(path: str) -> str:
  """The command that made a file, if the file does not have it."""
  for pattern, command in OLD_FILES.items():
    if fnmatch.fnmatch(path, pattern):
      return command
  return 'unknown'


def link(path: str) -> str:
  """A Markdown link to a file of the results."""
  return f'[{path}]({path})'


if __name__ == '__main__':
  command_line.run(main)
