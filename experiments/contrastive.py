"""Contrastive learning on CIFAR-10: with and without the stop-gradient (figure 4 of the paper), and by algorithm.

    python experiments/contrastive.py --study=stop_gradient|algorithms [--images=N] [--out=DIR]
        [--config=configs/NAME.py] [--config.field=value …]

--images trains on the first N images only. DIR gets a folder for every run, STUDY.json with the curves, and
STUDY.png. Run again with the same arguments, it goes on where it stopped.
"""

import argparse
import copy
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lfg_jax import configs, run_log
from lfg_jax.train import first_images, prepare, train

DEFAULT = pathlib.Path(__file__).parent.parent / 'configs' / 'cifar10_contrastive.py'
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    'stop_gradient': {f'{name}, {"with" if stop else "without"} stop-gradient':
                      {'algorithm': name, 'contrastive.stop_gradient': stop, 'model.size': 'M/8/1',
                       'model.channels': 256} for name in ('LG-FG-A', 'LG-BP') for stop in (True, False)},
    'algorithms': {**{name: {'algorithm': name} for name in ('BP', 'LG-BP', 'FG-A', 'LG-FG-A')},
                   # Only the read-out learns: the rest moves a millionth as fast.
                   'untrained': {'algorithm': 'LG-BP', 'optimizer.learning_rate': 1e-9,
                                 'optimizer.readout_multiplier': 1e6}},
}


def main(arguments: list[str]) -> None:
  """Trains all runs of a study."""
  parser = configs.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                          allow_abbrev=False)
  parser.add_argument('--study', choices=list(STUDIES), required=True)
  parser.add_argument('--images', type=int, help='train on the first so many; default: all')
  parser.add_argument('--config', default=str(DEFAULT), help='default: configs/cifar10_contrastive.py')
  parser.add_argument('--out', type=pathlib.Path, help='default: runs/STUDY')
  options, config = configs.parse(parser, arguments)
  out = options.out or pathlib.Path('runs', options.study)
  rows = {}
  for name, fields in STUDIES[options.study].items():
    print(f'{name}:')
    folder = out / name.replace(', ', '-').replace(' ', '-')
    train(first_images(prepare(_variant(config, fields)), options.images), folder)
    rows[name] = run_log.read_rows(folder / 'metrics.jsonl')
    _report(out, options.study, rows, arguments)


def _variant(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
  variant = copy.deepcopy(config)
  variant.update_from_flattened_dict(fields)
  return variant


def _report(out: pathlib.Path, study: str, rows: dict[str, list[run_log.Row]], arguments: list[str]) -> None:
  """STUDY.json and STUDY.png: contrastive loss of the heads, and test error of the read-out."""
  content = {'command': ['python', 'experiments/contrastive.py', *arguments],
             'data': 'CIFAR-10 whose pixels went through JPEG (quality 75) if prepared from such a copy',
             'runs': rows}
  run_log.write_atomically(out / f'{study}.json', json.dumps(content, indent=1) + '\n')
  figure = Figure(figsize=(10, 4), layout='constrained')
  for axes, key, label in zip(figure.subplots(1, 2), ('train_contrastive_loss', 'test_error'),
                              ('contrastive loss, nats, mean over heads', 'test error of the read-out'), strict=True):
    for name, own in rows.items():
      known = [(row['epoch'], row[key]) for row in own if row[key] is not None]
      axes.plot(*zip(*known, strict=True), label=name)
    axes.set(xlabel='epoch', ylabel=label)
    axes.grid(alpha=0.3)
  figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=len(rows),
                fontsize='small')
  figure.savefig(out / f'{study}.png', dpi=120)


if __name__ == '__main__':
  configs.run(main)
