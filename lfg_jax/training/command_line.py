"""Command lines: `--config.field=value` and the options of scripts; one-line errors."""

import argparse
import ast
import copy
import difflib
import functools
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from lfg_jax.errors import UserError, exit_code
from lfg_jax.training import config_checks, configs, fields


class Parser(argparse.ArgumentParser):
  """A parser that raises `UserError` for mistakes and shows its description verbatim."""

  def __init__(self, description: str | None = None) -> None:
    super().__init__(
      description=description,
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
    """Parses, and keeps the arguments, because the text of `--help` depends on them."""
    self._arguments = list(args or ())
    return super().parse_known_args(args, namespace)

  def format_help(self) -> str:
    """Appends the config's fields, with those of the chosen model, if there is a --config."""
    text = super().format_help()
    if '--config' not in self._option_string_actions:
      return text
    return f'{text}\n{fields.table(_with_model(configs.base(), self._arguments))}'

  def error(self, message: str) -> NoReturn:
    """Raises UserError, where argparse would print the usage and exit."""
    raise UserError(message)

  def option(self, name: str, default: Any, meaning: str = '', **more: Any) -> None:
    """Adds --NAME, with its default in the help text."""
    told = '' if default in (None, '') else f'default: {default}'
    self.add_argument(
      f'--{name}', default=default, help='; '.join(filter(None, [meaning, told])), **more
    )

  def number(
    self,
    name: str,
    default: float | None,
    meaning: str = '',
    *,
    least: float = 1,
    kind: type = int,
    **more: Any,
  ) -> None:
    """Adds an option for a number of at least `least`."""
    self.option(name, default, meaning, type=functools.partial(_number, name, least, kind), **more)

  def numbers(
    self,
    name: str,
    default: str | None,
    meaning: str = 'numbers, with commas',
    *,
    least: float = 1,
    kind: type = int,
  ) -> None:
    """Adds an option for a list of numbers, each at least `least`."""
    self.option(name, default, meaning, type=functools.partial(_numbers, name, least, kind))

  def names(
    self,
    name: str,
    default: str | None,
    allowed: Collection[str],
    meaning: str = 'names, with commas',
    **more: Any,
  ) -> None:
    """Adds an option for a list of names from `allowed`."""
    self.option(name, default, meaning, type=functools.partial(_names, name, allowed), **more)


def run(main: Callable[[list[str]], None]) -> NoReturn:
  """Runs a program and exits. A `UserError` or a Ctrl-C is printed as one line."""
  sys.exit(exit_code(functools.partial(main, sys.argv[1:])))


def parse(
  parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, ConfigDict]:
  """Returns the options of `parser` and the config with the command line's changes.

  `parser` must have the option --config.

  Raises:
    UserError: an unknown option, file or field, or a value of the wrong type.
  """
  options, rest = parser.parse_known_args(arguments)
  known = re.findall(r'--\w+', parser.format_usage())
  return options, override(configs.load(options.config), rest, known)


def override(config: ConfigDict, arguments: list[str], known: Iterable[str] = ()) -> ConfigDict:
  """Returns a copy of the config with the changes of a command line.

  Args:
    config: the config to copy.
    arguments: `--config.field=value` or `--config.field value`; for a bool also `--config.field`
      and `--noconfig.field`. A tuple may be written with or without brackets and quotes. None sets
      a field to None if the field may be None.
    known: further options of the program, as suggestions for an unknown one.

  Raises:
    UserError: an unknown option or field, or a value of the wrong type.

  >>> override(configs.base(), ['--config.model.norms=head,readout']).model.norms
  ('head', 'readout')
  """
  config, rest, open_fields = _with_model(copy.deepcopy(config), arguments), [], []
  for argument in arguments:
    match = re.fullmatch(r'--?(?:no)?config\.([^=]*)(?:=(.*))?', argument, re.DOTALL)
    if match:
      dotted, text = match.groups()
      node, field = _find(config, dotted)
      if text and text.lower() == 'none' and configs.may_be_none(dotted, config):
        open_fields.append(dotted)
        continue
      if text is not None and node.get_type(field) is tuple:
        argument = f'--config.{dotted}={_items(text)!r}'
    elif argument.startswith('-'):
      raise _unexpected(argument, known)
    rest.append(argument)
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=['', *rest])
    _, *unused = values(['', *rest])
  except (flags.Error, TypeError, ValueError) as error:
    raise _explained(error, config) from error
  if unused:
    raise _unexpected(unused[0], known)
  values.config.update_from_flattened_dict(dict.fromkeys(open_fields))
  return values.config


def _with_model(config: ConfigDict, arguments: list[str]) -> ConfigDict:
  """Gives the config the fields of the model that flags choose, for other flags to set."""
  chosen: dict[str, str] = {}
  for argument, following in itertools.pairwise([*arguments, '']):
    if match := re.fullmatch(r'--?config\.model\.(name|module)(?:=(.*))?', argument, re.DOTALL):
      chosen[match[1]] = following if match[2] is None else match[2]
  module = chosen.get('module', config.model.module)
  module = None if module is None or module.lower() == 'none' else module
  name = pathlib.Path(module).stem if module else chosen.get('name', config.model.name)
  if chosen and (name, module) != (config.model.name, config.model.module):
    configs.use_model(config, name, module)
  return config


def _explained(error: Exception, config: ConfigDict) -> UserError:
  """absl's error as one line; for a wrong value, with what is allowed."""
  if match := re.match(r'flag --config\.([^=]+)=(.*?): ', str(error), re.DOTALL):
    dotted, text = match.groups()
    node, field = _find(config, dotted)
    kind = node.get_type(field).__name__
    return UserError(f'config field {dotted} is {text!r}; allowed: {kind}')
  return UserError(' '.join(str(error).split()))


def _unexpected(argument: str, known: Iterable[str]) -> UserError:
  if not argument.startswith('-'):
    return UserError(f'unexpected argument {argument!r}')
  name = argument.partition('=')[0]
  near = difflib.get_close_matches(name, [*known, '--config'], 1)
  return UserError(f'unknown option {name}' + (f'; did you mean {near[0]}?' if near else ''))


def _find(config: ConfigDict, dotted: str) -> tuple[ConfigDict, str]:
  """The part of the config that holds the field named by a flag, and the field's name in it."""
  node: Any = config
  *parents, last = names = dotted.split('.')
  for i, field in enumerate(names):
    if not isinstance(node, ConfigDict) or field not in node:
      wanted = node if isinstance(node, ConfigDict) else ConfigDict()
      raise config_checks.unknown('.'.join(names[: i + 1]), wanted)
    node = node[field]
  if isinstance(node, ConfigDict):
    raise UserError(
      f'config field {dotted} has fields: {", ".join(sorted(node))}; name one of them'
    )
  for field in parents:
    config = config[field]
  return config, last


def _items(text: str) -> tuple:
  """The items of a list, written with or without brackets and quotes.

  >>> _items('1, 2.5'), _items("('a', b)"), _items('[a]'), _items('')
  ((1, 2.5), ('a', 'b'), ('a',), ())
  """
  inner = text.strip()
  if inner[:1] + inner[-1:] in ('()', '[]'):
    inner = inner[1:-1]
  return tuple(_item(part.strip()) for part in inner.split(',') if part.strip())


def _item(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


# --- values of options ----------------------------------------------------------------------------


def _number(option: str, least: float, kind: type, text: str) -> Any:
  """Parses a number of at least `least`; raises UserError otherwise.

  >>> _number('batch', 1, int, '64')
  64
  """
  try:
    found = kind(text)
  except ValueError as error:
    raise UserError(f'--{option} is {text!r}; allowed: numbers, {least} or more') from error
  if not found >= least:  # also rejects nan
    raise UserError(f'--{option} is {found}; allowed: {least} or more')
  return found


def _numbers(option: str, least: float, kind: type, text: str) -> list[Any]:
  """Parses comma-separated numbers, each at least `least`; raises UserError otherwise.

  >>> _numbers('seeds', 0, int, '0,3')
  [0, 3]
  """
  try:
    found = [kind(part) for part in text.split(',')]
  except ValueError as error:
    raise UserError(f'--{option} is {text!r}; allowed: numbers with commas between them') from error
  if not all(number >= least for number in found):
    raise UserError(f'--{option} has {min(found)}; allowed: {least} or more')
  return found


def _names(option: str, allowed: Collection[str], text: str) -> list[str]:
  """Parses comma-separated names; raises UserError for one that is not allowed.

  >>> _names('algorithms', ('BP', 'FA', 'DFA'), 'BP,FA')
  ['BP', 'FA']
  """
  found = text.split(',')
  if unknown := [name for name in found if name not in allowed]:
    raise UserError(f'--{option} has {unknown[0]!r}; allowed: {", ".join(allowed)}')
  return found
