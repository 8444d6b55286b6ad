"""Fields of configs: the default, the meaning and the allowed values of each stand in one place.

A group of fields is a dataclass. A field in it is made by `field`:

>>> @dataclasses.dataclass(frozen=True)
... class Stop:
...   epochs: int = field(10, 'number of passes over the examples', at_least(1))
...   patience: int | None = field(None, 'epochs without progress; None: any')
>>> described(Stop)['patience']
Field(default=None, meaning='epochs without progress; None: any', allowed=None, kind=<class 'int'>)

Configs, `--help` and checks are made from what `described` returns.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

INT32 = 2**31


class Allowed(NamedTuple):
  """The values that a field may have: a test of a value, and what an error says of them."""

  test: Callable[[Any], bool]
  text: str


def at_least(low: float) -> Allowed:
  """Numbers from `low` on."""
  return Allowed(lambda value: value >= low, f'{low} or more')


def between(low: float, high: float) -> Allowed:
  """Numbers from `low` to `high`."""
  return Allowed(lambda value: low <= value <= high, f'{low} … {high}')


def above(low: float, most: float = math.inf) -> Allowed:
  """Numbers greater than `low`, and at most `most`."""
  text = f'more than {low}' + (f', at most {most}' if most < math.inf else '')
  return Allowed(lambda value: low < value <= most, text)


def one_of(values: Collection[str]) -> Allowed:
  """The names in `values`."""
  return Allowed(lambda value: value in values, ', '.join(values))


BELOW_ONE = Allowed(lambda value: 0 <= value < 1, '0 … 1, without 1')


class Field(NamedTuple):
  """A field of a config.

  Attributes:
    default: its default. None: the field may be None.
    meaning: what it means.
    allowed: what it may be, besides None where that is the default; None: all of its type.
    kind: its type; None: that of the default.
  """

  default: Any
  meaning: str = ''
  allowed: Allowed | None = None
  kind: type | None = None

  @property
  def type(self) -> type:
    """The type of its values, except for None."""
    return self.kind or type(self.default)

  def wrong(self, value: Any) -> str | None:
    """Returns what is allowed if `value` is not; else None.

    >>> Field(3, allowed=at_least(1)).wrong(0), Field(3).wrong('x'), Field(3).wrong(1)
    ('1 or more', 'int', None)
    """
    none = ', None' if self.default is None else ''
    if value is None and none:
      return None
    if type(value) is not self.type and (self.type, type(value)) != (float, int):
      return self.type.__name__ + none
    if self.type is int and abs(value) >= INT32:
      return 'integers of 32 bits'
    if self.allowed and not self.allowed.test(value):
      return self.allowed.text + none
    if isinstance(value, float) and not math.isfinite(value):
      return 'finite numbers'
    return None


def field(default: Any, meaning: str, allowed: Allowed | None = None) -> Any:
  """A field of a dataclass that is a group of config fields."""
  return dataclasses.field(default=default, metadata={'meaning': meaning, 'allowed': allowed})


@functools.cache
def described(kind: type) -> Mapping[str, Field]:
  """Returns the fields of a dataclass and of the groups in it, by dotted name."""
  types_of, found = typing.get_type_hints(kind), {}
  for own in dataclasses.fields(kind):
    hint = types_of[own.name]
    if dataclasses.is_dataclass(hint):
      inside = described(typing.cast(type, hint))
      found.update({f'{own.name}.{name}': entry for name, entry in inside.items()})
    elif 'meaning' in own.metadata:
      kinds = [part for part in typing.get_args(hint) if part is not types.NoneType]
      is_union = isinstance(hint, types.UnionType)
      plain = kinds[0] if is_union else typing.get_origin(hint) or hint
      found[own.name] = Field(own.default, own.metadata['meaning'], own.metadata['allowed'], plain)
  return types.MappingProxyType(found)


def check(prefix: str, group: Any, kind: type) -> None:
  """Checks the attributes that `group` has for the fields of `kind`.

  Raises:
    ValueError: a value is not allowed; one line that calls the field PREFIX.NAME.
  """
  for name, entry in described(kind).items():
    if allowed := entry.wrong(value := getattr(group, name)):
      raise ValueError(f'{prefix}.{name} is {value!r}; allowed: {allowed}')
