"""Command lines on `absl.flags`: options, `--config.field=value`, `--help`, one-line errors."""

import ast
import codecs
import contextlib
import copy
import difflib
import functools
import itertools
import pathlib
import re
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from lfg_jax import user_files
from lfg_jax.errors import UserError, exit_code
from lfg_jax.fields import Allowed, Field, at_least, one_of
from lfg_jax.training import configs

# What `--help` shows first: the fields that most runs set.
COMMON = (
  'algorithm',
  'dataset',
  'data_dir',
  'model.name',
  'model.size',
  'epochs',
  'batch_size',
  'optimizer.learning_rate',
  'estimator.num_tangents',
  'seed',
)
WIDTH = 100
TRACEBACK = flags.DEFINE_bool('traceback', False, 'show where in the code a mistake was found')
# Where a terminal knows only ASCII.
_PLAIN = {'…': '...', '×': 'x', 'ε': 'eps', 'τ': 'tau', '−': '-', '→': '->', '±': '+-', '√': 'sqrt'}

Options = types.SimpleNamespace


def run(main: Callable[[list[str]], None]) -> NoReturn:
  """Runs a program and exits. A `UserError` or a Ctrl-C is printed as one line."""
  codecs.register_error('plain', _plain)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(AttributeError):  # something else stands for it, as in a notebook
      stream.reconfigure(errors='plain')  # type: ignore[union-attr]
  logging.set_verbosity(logging.WARNING)

  def guarded(arguments: list[str]) -> None:
    sys.exit(exit_code(functools.partial(main, arguments)))

  app.run(guarded, flags_parser=_arguments)
  sys.exit()


def _arguments(argv: list[str]) -> list[str]:
  """Leaves the parsing to the program, whose options depend on its config."""
  flags.FLAGS.mark_as_parsed()
  flags.FLAGS['traceback'].unparse()
  return argv[1:]


def _plain(error: UnicodeError) -> tuple[str, int]:
  """Replaces characters that a terminal cannot show."""
  assert isinstance(error, UnicodeEncodeError)
  text = error.object[error.start : error.end]
  return ''.join(_PLAIN.get(character, '?') for character in text), error.end


class _Values(flags.ArgumentParser):
  """Parses a value, or several with commas between them, and checks each."""

  def __init__(self, kind: Callable[[str], Any], allowed: Allowed, *, several: bool) -> None:
    self._kind, self._allowed, self._several = kind, allowed, several
    self.syntactic_help = allowed.text + ', with commas between them' * several

  def parse(self, argument: Any) -> Any:
    """Returns the value or the list."""
    parts = str(argument).split(',') if self._several else [argument]
    found = [self._kind(part) for part in parts]
    if not all(map(self._allowed.test, found)):
      raise ValueError(self.syntactic_help)
    return found if self._several else found[0]


ANY = Allowed(lambda value: True, 'any text')


class Parser:
  """The options of a program: a thin layer on `absl.flags.FlagValues`.

  All have their defaults in `--help`, and one line for a mistake, a `UserError`.
  """

  def __init__(self, description: str | None = None) -> None:
    self._description = description or ''
    self._values = flags.FlagValues()
    self._required: list[str] = []
    self._hidden: list[str] = []
    self._values['traceback'] = flags.FLAGS['traceback']
    self.switch('help', 'show this text')

  @property
  def names_of_options(self) -> list[str]:
    """The names of all options."""
    return list(self._values)

  def option(
    self,
    name: str,
    default: Any,
    meaning: str | None = '',
    *,
    kind: Callable[[str], Any] = str,
    allowed: Allowed = ANY,
    several: bool = False,
    required: bool = False,
  ) -> None:
    """Adds --NAME for a value of some kind, or for several with commas between them.

    An option whose meaning is None is hidden from `--help`.
    """
    parser = _Values(kind, allowed, several=several)
    given = None if default is None else str(default)
    flags.DEFINE(parser, name, given, meaning, flag_values=self._values)
    self._hidden += [name] * (meaning is None)
    self._required += [name] * required

  def path(self, name: str, default: Any, meaning: str, *, required: bool = False) -> None:
    """Adds an option for a path on this machine; `~` is the home."""
    kind = functools.partial(user_files.local, f'--{name}')
    self.option(name, default, meaning, kind=kind, required=required)

  def number(self, *args: Any, least: float = 1, kind: type = int, **more: Any) -> None:
    """Adds an option for a number of at least `least`."""
    self.option(*args, kind=kind, allowed=at_least(least), **more)

  def numbers(self, *args: Any, **more: Any) -> None:
    """Adds an option for a list of numbers, as `number` does for one."""
    self.number(*args, several=True, **more)

  def names(self, name: str, default: str | None, allowed: Collection[str], **more: Any) -> None:
    """Adds an option for a list of names from `allowed`."""
    self.option(name, default, allowed=one_of(allowed), several=True, **more)

  def switch(self, name: str, meaning: str) -> None:
    """Adds --NAME, which has no value."""
    flags.DEFINE_bool(name, False, meaning, flag_values=self._values)

  def parse_known(self, arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Returns the options and the other arguments.

    Raises:
      UserError: an option has no value or a wrong one, or a required one is missing.
      SystemExit: after printing the text of `--help`, if there is no config.
    """
    values = self._values
    for name in values:
      if name != 'traceback':
        values[name].unparse()  # else it keeps the value of an earlier call
    values.set_gnu_getopt()
    try:
      _, *rest = values(['', *arguments], known_only=True)
    except flags.Error as error:
      raise _explained(error, values) from error
    options = Options(**values.flag_values_dict())
    if options.help and not hasattr(options, 'config'):
      self.show_help()
    missing = [f'--{name}' for name in self._required if getattr(options, name) is None]
    if missing and not options.help:
      raise UserError(f'missing: {", ".join(missing)}')
    return options, rest

  def parse(self, arguments: Sequence[str]) -> Options:
    """Returns the options; raises UserError also for arguments that are none of them."""
    options, rest = self.parse_known(arguments)
    if rest:
      raise _unexpected(rest[0], self.names_of_options)
    return options

  def show_help(self, config: ConfigDict | None = None) -> NoReturn:
    """Prints the text of `--help`, with the fields of a config, and ends the program."""
    print(self._description, '\noptions:', sep='')
    for name in self.names_of_options:
      flag = self._values[name]
      if name not in self._hidden:
        default = '' if flag.default in (None, '', False) else f'default: {flag.default_unparsed}'
        told = '; '.join(filter(None, (flag.help, default)))
        print(_wrapped(f'  --{name}: {told}', subsequent_indent=' ' * 6))
    if config is not None:
      print(help_of_fields(config), end='')
    sys.exit(0)


def help_of_fields(config: ConfigDict) -> str:
  """Returns the text about all fields of a config: values, meanings and what is allowed."""
  entries, values = configs.table_of(config), dict(configs.flatten(config))
  common = [name for name in COMMON if name in entries]
  lines = ['', 'config fields, as --config.FIELD=VALUE, with the values of the chosen config']
  for title, names in (
    ('most used', common),
    ('all others', [n for n in entries if n not in common]),
  ):
    lines.append(f'\n{title}:')
    for name in names:
      value = values[name]
      shown = ','.join(map(str, value)) if isinstance(value, tuple) else value
      lines.append(f'  {name} = {shown}')
      indent = ' ' * 6
      text = _meaning(entries[name])
      lines.append(_wrapped(text, initial_indent=indent, subsequent_indent=indent))
  return '\n'.join(lines) + '\n'


def _wrapped(text: str, **indents: Any) -> str:
  # Names such as LG-FG-A+ stay whole.
  return textwrap.fill(text, WIDTH, break_on_hyphens=False, **indents)


def _meaning(entry: Field) -> str:
  return entry.meaning + (f'; allowed: {entry.allowed.text}' if entry.allowed else '')


def parse(parser: Parser, arguments: list[str]) -> tuple[Options, ConfigDict]:
  """Returns the options of `parser` and the config with the command line's changes.

  `parser` must have the option --config.

  Raises:
    UserError: an unknown option, file or field, or a value of the wrong type.
    SystemExit: after printing the text of `--help`.
  """
  options, rest = parser.parse_known(arguments)
  config = override(configs.load(options.config), rest, parser.names_of_options)
  if options.help:
    parser.show_help(config)
  return options, config


def override(config: ConfigDict, arguments: list[str], known: Iterable[str] = ()) -> ConfigDict:
  """Returns a copy of the config with the changes of a command line.

  Args:
    config: the config to copy.
    arguments: `--config.field=value` or `--config.field value`; for a bool also `--config.field`
      and `--noconfig.field`. A tuple may be written with or without brackets and quotes. None sets
      a field to None if the field may be None.
    known: names of the program's options, as suggestions for an unknown one.

  Raises:
    UserError: an unknown option or field, or a value of the wrong type.

  >>> override(configs.base(), ['--config.model.norms=head,readout']).model.norms
  ('head', 'readout')
  """
  config, rest, open_fields = _with_model(copy.deepcopy(config), arguments), [], []
  entries = configs.table_of(config)
  for argument in arguments:
    match = re.fullmatch(r'--?(?:no)?config\.([^=]*)(?:=(.*))?', argument, re.DOTALL)
    if match:
      name, text = match.groups()
      if name not in entries:
        raise configs.unknown(name, entries)
      if text and text.lower() == 'none' and entries[name].default is None:
        open_fields.append(name)
        continue
      if text is not None and entries[name].type is tuple:
        argument = f'--config.{name}={_items(text)!r}'
    elif argument.startswith('-'):
      raise _unexpected(argument, known)
    rest.append(argument)
  values = flags.FlagValues()
  try:
    # The file is loaded before: what it returns depends on the model, which a flag may choose.
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=['', *rest])
    _, *unused = values(['', *rest])
  except (flags.Error, TypeError, ValueError) as error:
    raise _explained(error, values, entries) from error
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


def _explained(
  error: Exception, values: flags.FlagValues, entries: dict[str, Field] | None = None
) -> UserError:
  """absl's error as one line; for a wrong value, with what is allowed."""
  message = ' '.join(str(error).split())
  if match := re.match(r'flag --([^=]+)=(.*?): ', message):
    option, text = match.groups()
    if option.startswith('config.') and entries:
      name = option.removeprefix('config.')
      return UserError(f'{name} is {text!r}; allowed: {entries[name].wrong(object())}')
    allowed = values[option].parser.syntactic_help or 'true, false'
    return UserError(f'--{option} is {text!r}; allowed: {allowed}')
  return UserError(message)


def _unexpected(argument: str, known: Iterable[str]) -> UserError:
  if not argument.startswith('-'):
    return UserError(f'unexpected argument {argument!r}')
  name = argument.partition('=')[0]
  options = {option: f'--{option}' for option in known}
  close = difflib.get_close_matches(name.lstrip('-'), options, 1, 0.75)
  meant = options[close[0]] if close else None
  if not meant and 'config' in options:
    field = configs.near(name.lstrip('-'), configs.table())
    meant = f'--config.{field}' if field else None
  return UserError(f'unknown option {name}' + (f'; did you mean {meant}?' if meant else ''))


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
