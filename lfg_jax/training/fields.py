"""The meanings of all config fields, read from the docstrings that explain them."""

import inspect
import re
import textwrap
from typing import Any

from ml_collections import ConfigDict

from lfg_jax.data import datasets
from lfg_jax.losses import info_nce, row_losses
from lfg_jax.models import registry
from lfg_jax.training import configs, rules

# Whose docstrings explain the fields of a part of the config. `configs.base` explains the rest.
EXPLAINED: dict[str, tuple[Any, ...]] = {
  'data': (datasets.load,),
  'losses': (rules.Options, row_losses.find),
  'estimator': (rules.Options,),
  'contrastive': (info_nce.Contrast,),
}
_ENTRY = re.compile(r'^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)', re.M)


def explained(thing: Any) -> dict[str, str]:
  """Returns the entries `name: text` of a docstring's lists.

  >>> explained(rules.Options)['every']
  'number of blocks per stage of a greedy rule.'
  """
  text = textwrap.indent(inspect.getdoc(thing) or '', '  ')
  return {
    name: ' '.join(entry.split())
    for names, entry in _ENTRY.findall(text)
    for name in names.split(', ')
  }


def meanings(config: ConfigDict) -> dict[str, str]:
  """Returns all fields' meanings, by dotted name. Fields of `tap_passes` share one meaning."""
  found, rest = {}, explained(configs.base)
  module = registry.find(config.model.name, config.model.module)
  of_model = (*getattr(module, 'EXPLAINED', (module.make,)), configs.model_fields)
  known = {
    part: {name: text for thing in things for name, text in explained(thing).items()}
    for part, things in {**EXPLAINED, 'model': of_model}.items()
  }
  for dotted, _ in configs.flatten(config):
    part, _, name = dotted.partition('.')
    texts = {**rest, **known.get(part, {})} if name else rest
    found[dotted] = texts.get((name or part).partition('.')[0], '')
  return found


def table(config: ConfigDict, width: int = 100) -> str:
  """Returns the text for `--help`: all fields of a config, with values (defaults) and meanings."""
  lines = [
    'config fields, as --config.FIELD=VALUE (defaults are of configs.base(); '
    'a config file may set others, which',
    '--print_config shows):',
  ]
  texts = meanings(config)
  for field, default in configs.flatten(config):
    lines.append(f'  {field} = {_shown(default)}')
    lines += textwrap.wrap(texts[field], width, initial_indent=' ' * 6, subsequent_indent=' ' * 6)
  return '\n'.join(lines) + '\n'


def _shown(value: Any) -> str:
  return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
