"""Reproduces a table or figure of the paper: does the missing runs, and writes a table and a plot.

    python experiments/paper/reproduce.py STUDY [--out=DIR] [--data_dir=DIR] [--rules=BP,LG-FG-A+]
        [--epochs=N] [--seeds=0] [--images=N] [--groups=1,4,16,64] [--dry_run]
        [--config.field=value …]

STUDY: table1, mnist-S-1-1, mnist-M-1-16, cifar10-M-8-16, imagenet-L-32-64,
cifar10-contrastive-M-8-16, cifar10-contrastive-L-8-64, imagenet-contrastive-L-32-64, figure4,
figure5, figure6, figure7.

By default, the program does all runs of the study, with the study's own epochs and images. --groups
applies to figure7 only. Rule LG-FG-A is the paper's, LG-FG-A+ ours. --dry_run
prints the commands of all runs. DIR gets a folder for every run, and after every run STUDY.json,
STUDY.md and STUDY.png. If run again, the program continues where it stopped; with more rules, seeds
or epochs, it adds them. table1 and figure5 take the arguments of the program that makes them.
"""

import pathlib
import shlex
import subprocess
import sys
from typing import NamedTuple

import report
from ml_collections import ConfigDict
from studies import GROUPS, PROGRAMS, STUDIES, Run, Study

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, configs
from lfg_jax.training.hosts.preemption import Interrupted
from lfg_jax.training.run import results
from lfg_jax.training.train import Job, prepare, train

ROOT = pathlib.Path(__file__).parents[2]


class Plan(NamedTuple):
  """A run to be trained, with its config, folder and command."""

  run: Run
  config: ConfigDict
  folder: pathlib.Path
  command: list[str]


def main(arguments: list[str]) -> None:
  """Plans, checks, trains and reports."""
  options, rest = parse(arguments)
  if options.study in PROGRAMS:
    return call(options, rest)
  study = STUDIES[options.study]
  out = options.out or pathlib.Path('runs', options.study)
  plans = [
    plan(study, run, seed, out, options, rest)
    for seed in options.seeds
    for run in selected(study, options)
  ]
  if options.dry_run:
    for planned in plans:
      print(f'# {planned.run.label}, seed {planned.config.seed}')
      print(shlex.join(['python', *planned.command]))
    return None
  jobs = prepare_all(plans)
  results.claim(out, options.study, options.study)
  folder = results.Folder(out, __file__, arguments)
  errors = []
  for planned, job in zip(plans, jobs, strict=True):
    print(f'{planned.run.label}, seed {job.config.seed}:')
    try:
      finish(planned, job, folder.origin)
    except Interrupted:
      raise
    except UserError as error:  # for example, an infinite loss: the other runs continue
      errors.append(f'{planned.run.label}: {error}')
    report.write(folder, options.study, study)
  print((out / f'{options.study}.md').read_text())
  if errors:
    raise UserError('; '.join(errors))


def parse(arguments: list[str]) -> tuple[command_line.Options, list[str]]:
  """The options, and the other arguments: changed fields, or all those of another program."""
  parser = results.parser(__doc__, out=None)
  parser.switch('dry_run', 'only print the commands')
  options, rest = parser.parse_known(arguments)
  allowed = (*PROGRAMS, *STUDIES)
  options.study = next((argument for argument in rest if not argument.startswith('-')), None)
  if options.study not in allowed:
    raise UserError(f'the study is {options.study}; allowed: {", ".join(allowed)}')
  rest.remove(options.study)
  if options.study in PROGRAMS:
    return options, rest
  parser = command_line.Parser()
  study = STUDIES[options.study]
  rules = list(dict.fromkeys(run.rule for run in study.runs))
  parser.option('data_dir', None)
  parser.names('rules', ','.join(rules), rules)
  parser.number('epochs', None)
  parser.numbers('seeds', '0', least=0)
  parser.number('images', None)
  parser.numbers('groups', '1,4,16,64')
  of_study, rest = parser.parse_known(rest)
  return command_line.Options(**{**vars(of_study), **vars(options)}), rest


def call(options: command_line.Options, rest: list[str]) -> None:
  """Runs the program that makes a study without training."""
  out = options.out or pathlib.Path('runs', options.study)
  command = [*PROGRAMS[options.study], f'--out={out}', *rest]
  print(shlex.join(['python', *command]), flush=True)
  if options.dry_run:
    return
  if code := subprocess.call([sys.executable, ROOT / command[0], *command[1:]]):
    raise UserError(f'{command[0]} ended with exit code {code}')


def selected(study: Study, options: command_line.Options) -> list[Run]:
  """The runs with the given rules and, in figure 7, with the given numbers of groups."""
  if unknown := [number for number in options.groups if number not in GROUPS]:
    raise UserError(f'--groups has {unknown[0]}; allowed: {", ".join(map(str, GROUPS))}')
  sizes = [f'M/8/{number}' for number in options.groups]
  return [
    run
    for rule in dict.fromkeys(options.rules)
    for run in study.runs
    if run.rule == rule and (options.study != 'figure7' or run.fields['model.size'] in sizes)
  ]


def plan(
  study: Study,
  run: Run,
  seed: int,
  out: pathlib.Path,
  options: command_line.Options,
  rest: list[str],
) -> Plan:
  """Plans a run: the study's config, changed by the run's fields, the options, and last `rest`."""
  path = f'configs/{study.config}.py'
  original, config = (configs.load(str(ROOT / path)) for _ in range(2))
  epochs = run.epochs if options.epochs is None else options.epochs
  images = study.images if options.images is None else options.images
  config.update_from_flattened_dict(
    {
      **run.fields,
      'epochs': epochs,
      'num_train_examples': images,
      'seed': seed,
      'eval_every': max(1, epochs // 20),
    }
  )
  if options.data_dir:
    config.data_dir = options.data_dir
  config = command_line.override(config, rest)
  size = f'-{config.num_train_examples}-images' if config.num_train_examples else ''
  folder = out / report.folder(run) / f'{config.epochs}-epochs{size}-seed{config.seed}'
  before = dict(configs.flatten(original))
  changes = [
    f'--config.{field}={value}'
    for field, value in configs.flatten(config)
    if field == 'algorithm' or value != before[field]
  ]
  command = ['experiments/train.py', f'--config={path}', f'--workdir={folder}', *changes]
  return Plan(run, config, folder, command)


def prepare_all(plans: list[Plan]) -> list[Job]:
  """Finds all mistakes before any long work."""
  first = prepare(plans[0].config)
  # All runs share one copy of the data; a stream belongs to its seed.
  shared = None if first.config.dataset == 'imagenet2012' else first.dataset
  return [first] + [prepare(planned.config, shared) for planned in plans[1:]]


def finish(planned: Plan, job: Job, origin: dict[str, str | None]) -> None:
  """Trains to the end, and records the run's origin in its folder."""
  train(job, planned.folder)
  path = planned.folder / report.ORIGIN
  if not path.exists():
    command = shlex.join(['python', *planned.command])
    results.write_json(path, {**origin, 'command': command})


if __name__ == '__main__':
  command_line.run(main)
