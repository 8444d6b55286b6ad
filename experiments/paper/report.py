"""Writes a study's report from the folders of its finished runs: STUDY.json, .md and .png."""

import json
import pathlib
import re
from typing import Any

from matplotlib.figure import Figure
from studies import Run, Study

from lfg_jax.training.run import metrics, plots, results

Row = dict[str, Any]
ORIGIN = 'provenance.json'  # in a run's folder
JPEG = 'CIFAR-10 in experiments/results: the pixels had been through JPEG (quality 75).'
EXPLANATION = """Errors in %, test / training, after the last epoch; ± standard error over seeds.
Training error: mean over the last epoch, while it was learnt.
Contrastive: errors of the linear read-out."""
PANELS = {
  'test_error_percent': 'test error, %',
  'train_error_percent': 'training error, %',
  'train_contrastive_loss': 'contrastive loss, nats, mean over heads',
}


def folder(run: Run) -> str:
  """Name of the folder with a run's variants in epochs, images and seeds."""
  return re.sub(r'[^\w+-]+', '-', run.label).strip('-')


def write(folder: results.Folder, name: str, study: Study) -> None:
  """Reports all finished runs of a study in a folder, from this command and from earlier ones."""
  rows = collect(folder.path, study)
  folder.write(name, study=name, title=study.title, rows=rows)
  metrics.write_atomically(folder.path / f'{name}.md', table(study.title, rows))
  if rows:
    draw(folder.path / f'{name}.png', study, rows)


def collect(out: pathlib.Path, study: Study) -> list[Row]:
  """A row for every run, number of epochs and number of images; each row covers all seeds."""
  rows = []
  for run in study.runs:
    groups: dict[tuple[int, int], list[pathlib.Path]] = {}
    for path in sorted((out / folder(run)).glob('*/' + ORIGIN)):
      config = _read(path.with_name('config.json'))
      groups.setdefault((config['epochs'], config['num_train_examples'] or 0), []).append(
        path.parent
      )
    rows += [summarize(run, own) for _, own in sorted(groups.items())]
  return rows


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text())


def summarize(run: Run, folders: list[pathlib.Path]) -> Row:
  """A row from the folders of all seeds; what they have in common is taken from the first."""
  config = _read(folders[0] / 'config.json')
  summaries, origins = (
    [_read(path / name) for path in folders] for name in ('summary.json', ORIGIN)
  )
  return {
    'label': run.label,
    'rule': run.rule,
    'algorithm': config['algorithm'],
    **{key: summaries[0][key] for key in ('model', 'dataset')},
    'epochs': config['epochs'],
    'images': config['num_train_examples'],
    'seeds': [_read(path / 'config.json')['seed'] for path in folders],
    **results.over_seeds(summaries),
    'paper': run.paper,
    'paper_note': run.note,
    'origins': origins,
    'curves': [metrics.read_rows(path / 'metrics.jsonl') for path in folders],
  }


def table(title: str, rows: list[Row]) -> str:
  """The report in Markdown."""
  jpeg = f'{JPEG}\n\n' if any(row['dataset'] == 'cifar10' for row in rows) else ''
  head = 'run | here | paper | data, model | epochs | images | seeds | device | commit'
  return f'# {title}\n\n{EXPLANATION}\n\n{jpeg}{results.in_table(head, list(map(cells, rows)))}\n'


def cells(row: Row) -> list[str]:
  """The cells of a row of the table."""
  together = lambda key: ', '.join(dict.fromkeys(str(origin[key]) for origin in row['origins']))
  return [
    row['label'],
    f'{results.percent(row)} / {row["train_error_percent"]:.2f}',
    published(row),
    f'{row["dataset"]}, {row["model"]}',
    str(row['epochs']),
    str(row['images'] or 'all'),
    ', '.join(map(str, row['seeds'])),
    together('device'),
    together('commit'),
  ]


def published(row: Row) -> str:
  """The paper's errors, and the estimator that they refer to."""
  if row['paper'] is None:
    return '–'
  note = f' ({row["paper_note"]})' if row['paper_note'] else ''
  return '{:.2f} / {:.2f}'.format(*row['paper']) + note


def draw(path: pathlib.Path, study: Study, rows: list[Row]) -> None:
  """Draws the test error on the left, the training error or contrastive loss on the right."""
  figure = Figure(figsize=(14, max(4, 1 + 0.3 * len(rows))), layout='constrained')
  figure.suptitle(study.title)
  for axes, key in zip(figure.subplots(1, 2), ('test_error_percent', study.loss), strict=True):
    lines = [
      (name, *plots.means(row['curves'], key)) for name, row in zip(names(rows), rows, strict=True)
    ]
    plots.panel(axes, lines, errors=key.endswith('percent'))
    axes.set(xlabel='epoch', ylabel=PANELS[key])
  figure.savefig(path, dpi=110)


def names(rows: list[Row]) -> list[str]:
  """Labels of the rows, with epochs and images if several rows belong to one run."""
  labels = [row['label'] for row in rows]
  return [
    label
    if labels.count(label) == 1
    else f'{label}, {row["epochs"]} epochs, {row["images"] or "all"} images'
    for label, row in zip(labels, rows, strict=True)
  ]
