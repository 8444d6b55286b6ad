"""Makes one table or figure of the paper: the runs that are missing, a table beside the paper's numbers, and a picture.

    python experiments/paper/reproduce.py STUDY [--out=DIR] [--data_dir=DIR] [--rules=BP,LG-FG-A] [--epochs=N]
        [--seeds=0] [--images=N] [--groups=1,4,16,64] [--dry_run] [--config.field=value …]

STUDY: table1, mnist-S-1-1, mnist-M-1-16, cifar10-M-8-16, imagenet-L-32-64, cifar10-contrastive-M-8-16,
cifar10-contrastive-L-8-64, imagenet-contrastive-L-32-64, figure4, figure5, figure6, figure7.

Rule LG-FG-A-paper is the paper's LG-FG-A; rule LG-FG-A is ours. --dry_run prints the commands of all runs. DIR gets
STUDY.json, STUDY.md and STUDY.png after every run, and a folder for every run. Run again, it goes on where it stopped;
with more rules, seeds or epochs, it adds them. table1 and figure5 take the arguments of the program that makes them.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
from typing import NamedTuple

import report
from ml_collections import ConfigDict
from studies import GROUPS, PROGRAMS, STUDIES, Run, Study, figure7

from lfg_jax import configs, run_log
from lfg_jax.configs import UserError
from lfg_jax.train import Interrupted, Job, prepare, train

ROOT = pathlib.Path(__file__).parents[2]


class Plan(NamedTuple):
  """What is to be trained, and where."""
  run: Run
  config: ConfigDict
  folder: pathlib.Path
  command: list[str]


def main(arguments: list[str]) -> None:
  """Plans, checks, trains and reports."""
  options, rest = parse(arguments)
  if options.study in PROGRAMS:
    return call(options, rest)
  study = figure7(options.groups) if options.study == 'figure7' else STUDIES[options.study]
  out = options.out or pathlib.Path('runs', options.study)
  plans = [plan(study, run, seed, out, options, rest) for seed in options.seeds
           for run in selected(study, options.rules)]
  if options.dry_run:
    for planned in plans:
      print(f'# {planned.run.label}, seed {planned.config.seed}\n{shlex.join(["python", *planned.command])}')
    return None
  origin = run_log.provenance(['experiments/paper/reproduce.py', *arguments])
  jobs = prepare_all(plans)
  claim(out, options.study)
  errors = []
  for planned, job in zip(plans, jobs, strict=True):
    print(f'{planned.run.label}, seed {job.config.seed}:')
    try:
      finish(planned, job, origin)
    except Interrupted:
      raise
    except UserError as error:    # its loss became infinite: the other runs are of use without it
      errors.append(f'{planned.run.label}: {error}')
    report.write(out, options.study, study, origin)
  print((out / f'{options.study}.md').read_text())
  if errors:
    raise UserError('; '.join(errors))


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """The options, and what is left: changes of config fields, or arguments of another program."""
  parser = configs.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                          allow_abbrev=False)
  parser.add_argument('study', metavar='STUDY', choices=[*PROGRAMS, *STUDIES])
  parser.add_argument('--out', type=pathlib.Path, help='default: runs/STUDY')
  parser.add_argument('--data_dir', help='of TFDS')
  parser.add_argument('--rules', help='names, with commas; default: all of the study')
  parser.add_argument('--epochs', type=int, help='of every run; default: as the study has it')
  parser.add_argument('--seeds', type=numbers, default=[0], help='with commas; default: 0')
  parser.add_argument('--images', type=int, help='train on the first so many; default: as the study has it')
  parser.add_argument('--groups', type=numbers, default=GROUPS, help='of figure7, with commas; default: 1,4,16,64')
  parser.add_argument('--dry_run', action='store_true', help='only print the commands')
  return parser.parse_known_args(arguments)


def numbers(text: str) -> list[int]:
  """Numbers with commas between them."""
  return [int(number) for number in text.split(',')]


def call(options: argparse.Namespace, rest: list[str]) -> None:
  """Runs the program that makes a study which has no training."""
  command = [*PROGRAMS[options.study], f'--out={options.out or pathlib.Path("runs", options.study)}', *rest]
  print(shlex.join(['python', *command]), flush=True)
  if not options.dry_run and (code := subprocess.call([sys.executable, ROOT / command[0], *command[1:]])):
    raise UserError(f'{command[0]} ended with exit code {code}')


def selected(study: Study, rules: str | None) -> list[Run]:
  """The runs of these rules."""
  allowed = list(dict.fromkeys(run.rule for run in study.runs))
  wanted = allowed if rules is None else rules.split(',')
  for rule in wanted:
    if rule not in allowed:
      raise UserError(f'--rules has {rule!r}; allowed: {", ".join(allowed)}')
  return [run for rule in dict.fromkeys(wanted) for run in study.runs if run.rule == rule]


def plan(study: Study, run: Run, seed: int, out: pathlib.Path, options: argparse.Namespace, rest: list[str]) -> Plan:
  """The run's config: the study's file, the run's fields, the options, and last the command line's fields."""
  path = f'configs/{study.config}.py'
  original, config = (configs.load(str(ROOT / path)) for _ in range(2))
  epochs = run.epochs if options.epochs is None else options.epochs
  images = study.images if options.images is None else options.images
  config.update_from_flattened_dict({**run.fields, 'epochs': epochs, 'images': images, 'seed': seed,
                                     'eval_every': max(1, epochs // 20)})
  if options.data_dir:
    config.data_dir = options.data_dir
  config = configs.override(config, rest)
  size = f'-{config.images}-images' if config.images else ''
  folder = out / report.folder(run) / f'{config.epochs}-epochs{size}-seed{config.seed}'
  before = dict(configs.flatten(original))
  changes = [f'--config.{field}={value}' for field, value in configs.flatten(config) if value != before[field]]
  command = ['experiments/train.py', f'--config={path}', f'--workdir={folder}', *changes]
  return Plan(run, config, folder, command)


def prepare_all(plans: list[Plan]) -> list[Job]:
  """All mistakes before any long work. The data of the first run serves all, but a stream belongs to its seed."""
  first = prepare(plans[0].config)
  streamed = plans[0].config.dataset == 'imagenet2012'
  return [first] + [prepare(planned.config, None if streamed else first.dataset) for planned in plans[1:]]


def claim(out: pathlib.Path, name: str) -> None:
  """Makes `out` the folder of this study, which it must be already when it is not empty."""
  if (out / f'{name}.json').exists():
    return
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'{out} exists and is not the folder of {name}; name another with --out')
  out.mkdir(parents=True, exist_ok=True)
  run_log.write_atomically(out / f'{name}.json', '{}\n')


def finish(planned: Plan, job: Job, origin: dict[str, str | None]) -> None:
  """Trains to the end; the run's folder then also tells where the run comes from."""
  train(job, planned.folder)
  path = planned.folder / report.ORIGIN
  if not path.exists():
    content = {**origin, 'command': shlex.join(['python', *planned.command])}
    run_log.write_atomically(path, json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  configs.run(main)
