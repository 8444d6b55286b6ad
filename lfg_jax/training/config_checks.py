"""Checks what a config contains: the names, types and ranges of its fields."""

import difflib
import math
from typing import Any

from ml_collections import ConfigDict

from lfg_jax.errors import UserError
from lfg_jax.training import configs, optimizers, profiling

INT32 = 2**31


def _from(low: float) -> tuple[Any, str]:
  return lambda v: low <= v < math.inf, f'{low} or more'


# field: (test, what is allowed)
_RANGES: dict[str, tuple[Any, str]] = {
  **dict.fromkeys(
    (
      'epochs',
      'batch_size',
      'steps_per_dispatch',
      'stages',
      'eval_every',
      'checkpoint_every',
      'keep',
    ),
    _from(1),
  ),
  'initialization_timeout': _from(1),
  'heartbeat_timeout': _from(2),
  'profile': (
    lambda v: v is None or profiling.steps_of(v) is not None,
    'FIRST:LAST, steps from 1; None',
  ),
  'image_size': (lambda v: v is None or v >= 1, '1 or more, None'),
  **dict.fromkeys(
    (
      'seed',
      'workers',
      'losses.head_hidden',
      'optimizer.weight_decay',
      'optimizer.warmup_epochs',
      'optimizer.readout_multiplier',
      'optimizer.head_multiplier',
    ),
    _from(0),
  ),
  **dict.fromkeys(
    ('optimizer.learning_rate', 'optimizer.staircase_factor'),
    (lambda v: 0 < v < math.inf, 'more than 0'),
  ),
  'optimizer.staircase_epochs': (
    lambda v: all(type(epoch) in (int, float) and 0 <= epoch < math.inf for epoch in v),
    'numbers, 0 or more',
  ),
  'optimizer.momentum': (lambda v: 0 <= v < 1, '0 … 1, without 1'),
  'optimizer.name': (lambda v: v in optimizers.OPTIMIZERS, ', '.join(optimizers.OPTIMIZERS)),
  'optimizer.schedule': (lambda v: v in optimizers.SCHEDULES, ', '.join(optimizers.SCHEDULES)),
}


def validate(config: ConfigDict) -> None:
  """Checks the names and types of all fields, and those ranges that no other module checks.

  Raises:
    UserError: a field is unknown, missing or wrong. The line says what is allowed.
  """
  _same_fields(config, configs.defaults(config), '')
  given = dict(configs.flatten(config))
  for field, (test, allowed) in _RANGES.items():
    if not test(given[field]):
      raise UserError(f'{field} is {given[field]!r}; allowed: {allowed}')
  for field, value in given.items():
    if isinstance(value, int) and abs(value) >= INT32:
      raise UserError(f'{field} is {value!r}; allowed: integers of 32 bits')
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f'{field} is {value!r}; allowed: finite numbers')
  warmup, epochs = config.optimizer.warmup_epochs, config.epochs
  if warmup >= epochs:
    raise UserError(f'optimizer.warmup_epochs is {warmup!r}; allowed: less than epochs, {epochs}')


def _same_fields(config: Any, wanted: ConfigDict, prefix: str) -> None:
  """Raises UserError if names or types of fields differ from those of `wanted`."""
  for field in config:
    if field not in wanted:
      raise unknown(prefix + field, wanted)
  for field, default in wanted.items():
    if field not in config:
      raise UserError(f'config field {prefix}{field} is missing')
    value, kind = config[field], wanted.get_type(field)
    if isinstance(default, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise UserError(
          f'config field {prefix}{field} is {_line(value)}; allowed: fields {", ".join(default)}'
        )
      _same_fields(value, default, f'{prefix}{field}.')
    elif (
      type(value) is not kind
      and (value, default) != (None, None)
      and (kind, type(value)) != (float, int)
    ):
      raise UserError(f'config field {prefix}{field} is {_line(value)}; allowed: {kind.__name__}')


def _line(value: Any) -> str:
  """A value of any type as one short line."""
  text = ' '.join(repr(value).split())
  return text if len(text) <= 80 else f'{text[:80]}…'


def unknown(field: str, wanted: ConfigDict) -> UserError:
  """Returns the error for an unknown field (dotted name); `wanted` has the fields allowed there."""
  known = [name for name, _ in configs.flatten(configs.base())]
  near = difflib.get_close_matches(field, known, 1, 0.75)
  last = {name.rpartition('.')[2]: name for name in known}
  near = near or [
    last[name] for name in difflib.get_close_matches(field.rpartition('.')[2], last, 1, 0.75)
  ]
  hint = f'did you mean {near[0]}? ' if near else ''
  return UserError(f'unknown config field {field}; {hint}allowed: {", ".join(sorted(wanted))}')
