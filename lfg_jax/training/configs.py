"""Configs: their fields, how a config is made and read, and what is checked before any long work.

A file in `configs/` has a function `get_config()` that changes fields of `base()`. The command line
changes further fields (`--config.optimizer.learning_rate=0.1`, see `command_line`).
"""

import dataclasses
import difflib
import json
import math
import pathlib
import re
import runpy
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from lfg_jax import user_files
from lfg_jax.data import datasets
from lfg_jax.errors import UserError
from lfg_jax.fields import BELOW_ONE, Allowed, Field, above, at_least, described, field, one_of
from lfg_jax.local.row_losses import ROW_LOSSES
from lfg_jax.models import registry
from lfg_jax.training import optimizers
from lfg_jax.training.cost import profiling
from lfg_jax.training.rules.rules import OF_A_TAP, REGISTRY, EstimatorOptions, LossOptions

Group = dataclasses.dataclass(frozen=True)


@Group
class Data:
  """The fields of config.data."""

  module: str | None = field(None, 'Python file with your own load(data_dir); None: dataset')


@Group
class Augment:
  """The fields of config.augment, for data sets of arrays. Every epoch draws anew."""

  shift: int = field(0, 'most pixels by which a training image is moved, along both axes')
  flip: bool = field(False, 'whether half the training images are mirrored, left to right')


@Group
class Model:
  """The fields of config.model that every model has. A model's own are its `DEFAULTS`."""

  name: str = field('mixer', f'{", ".join(registry.MODELS)}; each has fields of its own')
  module: str | None = field(None, 'Python file with your own model; None: the one with that name')


@Group
class Losses(LossOptions):
  """The fields of config.losses."""

  row: str = field(
    'cross_entropy', 'of local heads; the read-out has the first', one_of(ROW_LOSSES)
  )
  module: str | None = field(None, 'Python file with your own row_loss; None: the one of row')
  head_hidden: int = field(0, 'channels of a hidden layer in local heads; 0: linear', at_least(0))


@Group
class Contrastive:
  """The fields of config.contrastive."""

  temperature: float = field(0.5, 'τ of the contrastive loss', above(0))
  stop_gradient: bool = field(True, 'whether candidates are behind a stop-gradient')
  shared_views: bool = field(True, 'whether both views of an example share their tangents')
  min_area: float = field(0.08, "smallest part of the image's area that a view has", above(0, 1))


def _are_epochs(values: tuple) -> bool:
  return all(type(value) in (int, float) and 0 <= value < math.inf for value in values)


@Group
class Optimizer:
  """The fields of config.optimizer."""

  name: str = field('sgd', 'optimizer of the parameters', one_of(optimizers.OPTIMIZERS))
  learning_rate: float = field(0.1, 'the highest, reached after the warm-up', above(0))
  scale_with_batch: bool = field(
    False, 'whether the learning rate is for a batch of 256, and grows'
  )
  momentum: float | None = field(None, 'of sgd and lars; None: 0.9', BELOW_ONE)
  b1: float | None = field(None, 'of adam and adamw; None: 0.9', BELOW_ONE)
  weight_decay: float = field(0.0, 'of kernels; for sgd and adam L2 regularisation', at_least(0))
  schedule: str = field('constant', 'of the learning rate', one_of(optimizers.SCHEDULES))
  warmup_epochs: float = field(0.0, 'epochs in which the rate rises from 0', at_least(0))
  staircase_epochs: tuple = field(
    (), 'epochs at which a staircase falls', Allowed(_are_epochs, 'numbers, 0 or more')
  )
  staircase_factor: float = field(0.1, 'by which a staircase multiplies the rate', above(0))
  readout_multiplier: float = field(0.1, 'factor on the updates of the read-out', at_least(0))
  head_multiplier: float = field(1.0, 'factor on the updates of local heads', at_least(0))


@Group
class Config:
  """All fields but those of the chosen model, and those for every tap of it."""

  algorithm: str = field('LG-FG-A+', 'a learning rule', one_of(REGISTRY))
  objective: str = field(
    'supervised', 'contrastive: two views of each image', one_of(('supervised', 'contrastive'))
  )
  dataset: str = field('digits', f'{", ".join(datasets.NAMES)}, or another name of TFDS')
  data_dir: str | None = field(None, 'None: $TFDS_DATA_DIR or ~/tensorflow_datasets')
  epochs: int = field(10, 'number of passes over the training examples', at_least(1))
  batch_size: int = field(128, 'examples in a batch, over all devices', at_least(1))
  seed: int = field(0, 'random seed of parameters, order and tangents', at_least(0))
  model: Model = dataclasses.field(default_factory=Model)
  estimator: EstimatorOptions = dataclasses.field(default_factory=EstimatorOptions)
  losses: Losses = dataclasses.field(default_factory=Losses)
  contrastive: Contrastive = dataclasses.field(default_factory=Contrastive)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  data: Data = dataclasses.field(default_factory=Data)
  image_size: int | None = field(None, "of streams; None: the data set's own", at_least(1))
  num_train_examples: int | None = field(None, 'the first so many; None: all')
  workers: int = field(0, 'processes that read and decode a stream; 0: threads', at_least(0))
  augment: Augment = dataclasses.field(default_factory=Augment)
  init_from: str | None = field(None, 'folder of a run that has learned first parameters')
  micro_batch: int = field(0, 'most examples at once on a device; 0: what suits it', at_least(0))
  steps_per_dispatch: int = field(
    1,
    'steps that a device takes at a time; signals and progress wait for them. A model of '
    'convolutions takes one at a time on CPUs',
    at_least(1),
  )
  pipeline_stages: int = field(1, 'groups of devices with their own blocks', at_least(1))
  eval_every: int = field(1, 'epochs between measurements of the test error', at_least(1))
  checkpoint_every: int = field(1, 'epochs between checkpoints', at_least(1))
  max_to_keep: int = field(2, 'newest checkpoints to keep, besides the best', at_least(1))
  distributed: bool = field(False, 'whether to call jax.distributed.initialize()')
  initialization_timeout: int = field(300, 'seconds for all processes to start', at_least(1))
  heartbeat_timeout: int = field(25, 'seconds of silence; then JAX ends the others', at_least(2))
  profile: str | None = field(
    None,
    'steps that jax.profiler traces',
    Allowed(lambda text: profiling.steps_of(text) is not None, 'FIRST:LAST, steps from 1'),
  )


def table(name: str = 'mixer', module: str | None = None) -> dict[str, Field]:
  """Returns all fields, by dotted name, with those of the model with a name or in a file.

  Raises:
    UserError: there is no such model.
  """
  model = registry.find(name, module)
  own = {f'model.{field}': entry for field, entry in registry.fields_of(model).items()}
  taps = {f'estimator.num_tangents_by_tap.{tap}': OF_A_TAP for tap in model.TAPS}
  found = {**described(Config), **own, **taps}
  groups = list(dict.fromkeys(field.partition('.')[0] for field in found))
  return dict(sorted(found.items(), key=lambda item: groups.index(item[0].partition('.')[0])))


def table_of(config: ConfigDict) -> dict[str, Field]:
  """Returns the `table` of the model that a config names, or that of the default model."""
  model = config.get('model')
  known = isinstance(model, ConfigDict) and (model.get('name'), model.get('module'))
  if known and isinstance(known[0], str) and isinstance(known[1], str | None):
    return table(*known)
  return table()


def base(name: str = 'mixer', module: str | None = None) -> ConfigDict:
  """Returns a config with the defaults of all fields; the arguments are those of `table`.

  >>> base('mlp').model.blocks
  3
  """
  config: dict[str, Any] = {}
  for dotted, entry in table(name, module).items():
    *parents, last = dotted.split('.')
    node = config
    for parent in parents:
      node = node.setdefault(parent, {})
    is_open = entry.default is None
    node[last] = config_dict.placeholder(entry.type) if is_open else entry.default
  made = ConfigDict(config)
  made.model.update(name=name, module=module)
  return made


def use_model(
  config: ConfigDict, name: str = 'mixer', module: str | None = None, **fields: Any
) -> None:
  """Sets the config's model, with its default fields except for those given.

  >>> config = base()
  >>> use_model(config, 'mlp', blocks=2)
  >>> sorted(config.model.to_dict())
  ['blocks', 'channels', 'groups', 'module', 'name']
  """
  fresh = base(name, module)
  with config.unlocked():
    config.model = fresh.model
    taps = fresh.estimator.get('num_tangents_by_tap', ConfigDict())
    config.estimator.num_tangents_by_tap = taps
  config.model.update(fields)


def validate(config: ConfigDict) -> None:
  """Checks the names, types and ranges of all fields, each by itself, and of a few together.

  Raises:
    UserError: a field is unknown, missing or wrong. The line says what is allowed.
  """
  wanted, given = table_of(config), dict(flatten(config))
  for name in given:
    if name not in wanted:
      raise unknown(name, wanted)
  for name, entry in wanted.items():
    if name not in given:
      raise UserError(f'config field {name} is missing')
    if allowed := entry.wrong(given[name]):
      shown = ' '.join(repr(given[name]).split())
      shown = shown if len(shown) <= 80 else f'{shown[:80]}…'
      raise UserError(f'{name} is {shown}; allowed: {allowed}')
  if config.init_from:
    user_files.local('init_from', config.init_from)
  name, warmup, epochs = config.optimizer.name, config.optimizer.warmup_epochs, config.epochs
  if warmup >= epochs:
    raise UserError(f'optimizer.warmup_epochs is {warmup!r}; allowed: less than epochs, {epochs}')
  own, other = ('b1', 'momentum') if name in optimizers.ADAPTIVE else ('momentum', 'b1')
  if (value := config.optimizer[other]) is not None:
    raise UserError(
      f'optimizer.{other} is {value!r}, and {name} has none; allowed: None; its own is {own}'
    )


def _inside(part: str, wanted: Iterable[str]) -> list[str]:
  """The names right inside a group of fields; '' is the whole config."""
  prefix = f'{part}.' if part else ''
  inside = (name.removeprefix(prefix) for name in wanted if name.startswith(prefix))
  return sorted({name.partition('.')[0] for name in inside})


def near(name: str, known: dict[str, Field]) -> str | None:
  """Returns the field that was meant by a name without its group, or with a typing error.

  >>> [near(name, table()) for name in ('batch', 'optimizer.learning_rat', 'lr')]
  ['batch_size', 'optimizer.learning_rate', None]
  """
  last = {field.rpartition('.')[2]: field for field in reversed(known)}
  names, own = {**last, **{field: field for field in known}}, name.rpartition('.')[2]
  begins = [text for text in (*known, *last) if len(own) > 2 and text.startswith(own)]
  exact = [text for text in (name, own) if text in names]
  close = [
    found for text in (name, own) for found in difflib.get_close_matches(text, names, 1, 0.75)
  ]
  return next((names[text] for text in (*exact, *begins, *close)), None)


def unknown(name: str, known: dict[str, Field]) -> UserError:
  """Returns the error for a name that is no field, with the names that are allowed there."""
  if inside := _inside(name, known):
    return UserError(f'{name} has fields: {", ".join(inside)}; name one of them')
  meant = near(name, known)
  hint = f'did you mean {meant}? ' if meant else ''
  part = name.rpartition('.')[0]
  while not (allowed := _inside(part, known)):
    part = part.rpartition('.')[0]
  return UserError(f'unknown config field {name}; {hint}allowed: {", ".join(allowed)}')


def flatten(config: ConfigDict | dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) for every field.

  >>> dict(flatten({'a': 1, 'b': {'c': 2}}))
  {'a': 1, 'b.c': 2}
  """
  for name, value in config.items():
    if isinstance(value, (ConfigDict, dict)):
      yield from flatten(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


def to_json(config: ConfigDict) -> str:
  """Canonical JSON: equal if and only if the configs are equal."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def folder() -> pathlib.Path:
  """The folder of the config files: inside an installed package, beside it in the repository."""
  package = pathlib.Path(__file__).parent.parent
  inside = package / 'configs'
  return inside if inside.is_dir() else package.parent / 'configs'


def load(path: str) -> ConfigDict:
  """Returns the config that `get_config()` of a file returns.

  Args:
    path: path of a file, or the name of one in `folder()`, such as 'digits'.

  Raises:
    UserError: the file does not exist, or has an error.
  """
  path = str(_find(user_files.local('--config', path)))
  with user_files.mistakes(f'config file {path}'):
    return runpy.run_path(path)['get_config']()


def _find(file: pathlib.Path) -> pathlib.Path:
  if file.is_file():
    return file
  path = str(file)
  if not re.fullmatch(r'\w+', path):
    raise UserError(f'config file {path} not found')
  if (named := folder() / f'{path}.py').is_file():
    return named
  known = sorted(file.stem for file in folder().glob('*.py'))
  close = difflib.get_close_matches(path, known, 1)
  hint = f'did you mean {close[0]}? ' if close else ''
  raise UserError(f'no config {path}; {hint}allowed: {", ".join(known)}, or the path of a file')
