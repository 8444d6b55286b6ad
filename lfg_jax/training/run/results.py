"""Shared parts of the measuring programs: options, and result files that record their origin."""

import json
import pathlib
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

from lfg_jax.errors import UserError, as_user_errors
from lfg_jax.training.command_line import Parser
from lfg_jax.training.rules import rules
from lfg_jax.training.run import metrics

ROOT = pathlib.Path(__file__).parents[3]


def parser(
  description: str | None,
  *,
  out: str | None,
  config: str | None = None,
  model: str | None = None,
  batch: int | None = None,
  algorithms: str | None = None,
  seeds: str | None = None,
  repetitions: int | None = None,
) -> Parser:
  """A parser with --out and with the shared options for which a default is given."""
  made = Parser(description)
  made.path('out', out, 'folder of the results')
  if config:
    made.option('config', config, 'name of a config, or a file')
  if model:
    made.option('model', model, 'SIZE/PATCHES/GROUPS')
  if batch:
    made.number('batch', batch, 'examples per step')
  if algorithms:
    made.names('algorithms', algorithms, rules.REGISTRY)
  if seeds:
    made.numbers('seeds', seeds, least=0)
  if repetitions:
    made.number('repetitions', repetitions, 'of every timing')
  return made


def provenance(script: str, arguments: list[str]) -> dict[str, str | None]:
  """The origin of a result; every JSON file of results begins with it.

  Args:
    script: the `__file__` of the program that measures.
    arguments: its command-line arguments.

  Returns:
    'command', as typed in the repository's root; 'commit', which ends in '-dirty' if tracked files
    differ from it and is None outside git; 'jax', its version; 'device', the kind of device.
  """
  path = pathlib.Path(script).resolve()
  name = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
  return {
    'command': shlex.join(['python', name, *arguments]),
    'commit': _commit(),
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
  }


def _commit() -> str | None:
  """The commit of the repository that contains this file; None outside git."""
  # --exclude=* excludes all tags, which leaves the short hash.
  command = ['git', 'describe', '--always', '--dirty', '--exclude=*']
  folder = pathlib.Path(__file__).parent
  try:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  except FileNotFoundError:
    return None
  return done.stdout.strip() or None


class Folder:
  """A folder of results.

  Attributes:
    path: the folder's path.
    origin: the entries with which its JSON files begin; see `provenance`.
  """

  def __init__(self, path: pathlib.Path, script: str, arguments: list[str]) -> None:
    """Creates the folder if it does not exist."""
    with as_user_errors():
      path.mkdir(parents=True, exist_ok=True)
    self.path, self.origin = path, provenance(script, arguments)

  def write(self, name: str, **content: Any) -> None:
    """Writes NAME.json: the origin, then `content`, usually `rows`."""
    write_json(self.path / f'{name}.json', {**self.origin, **content})

  def write_table(self, name: str, text: str) -> None:
    """Writes NAME.md and prints it."""
    metrics.write_atomically(self.path / f'{name}.md', text)
    print(text)


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes a JSON file atomically: readers see either the old or the new content."""
  metrics.write_atomically(path, json.dumps(content, indent=1) + '\n')


def claim(path: pathlib.Path, name: str, what: str) -> None:
  """Claims a folder by writing an empty NAME.json, unless the folder already has this file.

  Raises:
    UserError: `path` is a file, or a folder that is not empty and lacks NAME.json; so it is not the
      folder of `what`.
  """
  if (path / f'{name}.json').exists():
    return
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path} exists and is not the folder of {what}; name another with --out')
  path.mkdir(parents=True, exist_ok=True)
  write_json(path / f'{name}.json', {})


def in_table(head: str, rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; an empty string if there are no rows.

  >>> print(in_table('name | ms', [['BP', '3']]))
  | name | ms |
  |---|---|
  | BP | 3 |
  """
  lines = [
    f'| {head} |',
    '|---' * (head.count('|') + 1) + '|',
    *(f'| {" | ".join(row)} |' for row in rows),
  ]
  return '\n'.join(lines) if rows else ''


def over_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, float | None]:
  """Means over runs that differ only in the seed, from the contents of their `summary.json`.

  The standard error of the test error is None for a single run.
  """
  test = [summary['test_error_percent'] for summary in summaries]
  return {
    'test_error_percent': statistics.mean(test),
    'test_error_percent_se': statistics.stdev(test) / len(test) ** 0.5 if len(test) > 1 else None,
    **{
      key: statistics.mean(summary[key] for summary in summaries)
      for key in ('train_error_percent', 'seconds')
    },
  }


def percent(row: dict[str, Any]) -> str:
  """The test error from `over_seeds`, with its standard error if there is one.

  >>> percent({'test_error_percent': 2.23, 'test_error_percent_se': 0.43})
  '2.23 ± 0.43'
  """
  error, deviation = row['test_error_percent'], row['test_error_percent_se']
  return f'{error:.2f}' + ('' if deviation is None else f' ± {deviation:.2f}')
