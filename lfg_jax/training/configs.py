"""The config: its fields with their defaults, and how it is read.

A file in `configs/` has a function `get_config()` that changes fields of `base()`. The command line
changes further fields (`--config.optimizer.learning_rate=0.1`, see `command_line`). `config_checks`
finds mistakes before any long work starts. `fields` collects the meanings of all fields.
"""

import difflib
import json
import pathlib
import re
import runpy
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from lfg_jax.errors import UserError
from lfg_jax.models import registry


def base() -> ConfigDict:
  """All fields, with their defaults.

  Other docstrings explain some of the fields:

  - `rules.Options`: estimator and losses.
  - `row_losses.find`: the loss of local heads, and your own file with one.
  - `info_nce.Contrast`: the contrastive loss.
  - `datasets.load`: your own file with a data set.
  - `model_fields`: what every model has.
  - A model's `make`: the model's own. For the mixer, `sizes.mixer_spec` and `block.Style`.

  The others are explained here. `--help` prints them all.

  Attributes:
    algorithm: a learning rule: 'BP', 'L-BP', 'LG-BP', 'FA', 'L-FA', 'LG-FA', 'DFA', 'FG-W', 'FG-A',
      'LG-FG-W', 'LG-FG-A', 'LG-FG-A-paper', 'FD-W', 'FD-A', 'LG-FD-W' or 'LG-FD-A'; see
      `rules.REGISTRY`.
    loss: 'supervised' or 'contrastive'. With 'contrastive', a batch has two views of each image.
    dataset: 'digits', 'mnist', 'fashion_mnist', 'cifar10', 'imagenet2012', or the name of another
      TFDS data set.
    data_dir: folder of the data sets; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
    image_size: height and width of streamed images; None: the data set's own.
    images: number of training images to use, counted from the first; None: all.
    workers: number of processes that read and decode a stream; 0: threads.
    init_from: folder of a run from whose parameters this run starts; None: random parameters.
    shift: the largest number of pixels by which a training image is moved, in both directions of both
      axes, anew in every epoch; for data sets of arrays.
    flip: whether a training image is mirrored, left to right, in every other epoch at random; for
      data sets of arrays.
    head_hidden: channels of a hidden layer in every local head; 0: heads are linear.
    min_area: smallest area of a view's crop, as a fraction of the image's area.
    name: 'sgd', 'adam', 'adamw' or 'lars'.
    learning_rate: the highest learning rate, reached after the warm-up.
    scale_with_batch: whether the learning rate is for a batch of 256 and grows in proportion to the
      batch size.
    momentum: momentum, and Adam's b1.
    weight_decay: weight decay of kernels only; for sgd and adam, it is L2 regularisation.
    schedule: schedule of the learning rate: 'constant', 'linear', 'staircase' or 'cosine'.
    warmup_epochs: number of epochs in which the learning rate rises from 0.
    staircase_epochs: epochs at which the learning rate of a staircase falls.
    staircase_factor: factor by which a staircase multiplies the learning rate each time.
    readout_multiplier: factor on the updates of the read-out.
    head_multiplier: factor on the updates of local heads.
    epochs: number of passes over the training examples.
    batch_size: number of examples in a batch, over all devices.
    micro_batch: most examples computed at once on a device; 0: what suits the machine.
    steps_per_dispatch: number of steps that a device takes at a time, without the host; signals and
      progress wait for them. A model of convolutions takes one at a time on CPUs.
    stages: number of stages of the block pipeline, groups of devices with their own blocks; see
      `pipeline`.
    seed: random seed of parameters, order and tangents.
    eval_every: epochs between measurements of the test error.
    checkpoint_every: epochs between checkpoints.
    keep: number of newest checkpoints to keep; the one with the best test error is kept too.
    distributed: whether there are several processes; if so, calls jax.distributed.initialize().
    profile: 'FIRST:LAST', the steps for which jax.profiler writes a trace into the run's folder;
      None: no trace.
    initialization_timeout: seconds in which all processes must have started.
    heartbeat_timeout: seconds of silence after which a process counts as lost and JAX ends the
      others.
  """
  return ConfigDict(
    {
      'algorithm': 'LG-FG-A',
      'loss': 'supervised',
      'dataset': 'digits',
      'data': {'module': config_dict.placeholder(str)},
      'data_dir': config_dict.placeholder(str),
      'image_size': config_dict.placeholder(int),
      'images': config_dict.placeholder(int),
      'workers': 0,
      'init_from': config_dict.placeholder(str),
      'augment': {'shift': 0, 'flip': False},
      'model': model_fields('mixer'),
      'losses': {
        'row': 'cross_entropy',
        'module': config_dict.placeholder(str),
        'head_hidden': 0,
        'head_ahead': False,
        'head_average': 0.99,
        'patch': True,
        'group': True,
        'every': 1,
        'overlap': False,
      },
      'contrastive': {
        'temperature': 0.5,
        'stop_gradient': True,
        'shared_views': True,
        'min_area': 0.08,
      },
      'estimator': {
        'law': 'hadamard',
        'module': config_dict.placeholder(str),
        'passes': 1,
        'chunk': 4,
        'combine': 'mean',
        'taps': 'auto',
        'last_tap': 'auto',
        'guess': 'auto',
        'guess_rate': 3e-3,
        'tap_passes': dict.fromkeys(registry.find('mixer').TAPS, 0),
        'sharing': 'paper',
        'credit': 'exact',
        'step': 1e-3,
      },
      'optimizer': {
        'name': 'sgd',
        'learning_rate': 0.1,
        'scale_with_batch': False,
        'momentum': 0.9,
        'weight_decay': 0.0,
        'schedule': 'constant',
        'warmup_epochs': 0.0,
        'staircase_epochs': (),
        'staircase_factor': 0.1,
        'readout_multiplier': 0.1,
        'head_multiplier': 1.0,
      },
      'epochs': 10,
      'batch_size': 128,
      'micro_batch': 0,
      'steps_per_dispatch': 1,
      'stages': 1,
      'seed': 0,
      'eval_every': 1,
      'checkpoint_every': 1,
      'keep': 2,
      'distributed': False,
      'initialization_timeout': 300,
      'heartbeat_timeout': 25,
      'profile': config_dict.placeholder(str),
    }
  )


def model_fields(name: str, module: str | None = None) -> dict[str, Any]:
  """Returns the fields of config.model, for the model with this name or the one in a file.

  Attributes:
    name: name of the model: 'mixer', 'mlp' or 'resnet'; each has further fields of its own.
    module: a Python file with your own model; None: the model with that name.

  Raises:
    UserError: there is no such model.
  """
  defaults = registry.find(name, module).DEFAULTS
  as_placeholder = lambda v: config_dict.placeholder(v) if isinstance(v, type) else v
  path = config_dict.placeholder(str)
  path.set(module)
  return {'name': name, 'module': path, **{f: as_placeholder(v) for f, v in defaults.items()}}


def use_model(
  config: ConfigDict, name: str = 'mixer', module: str | None = None, **fields: Any
) -> None:
  """Sets the config's model, with its default fields except for those given.

  >>> config = base()
  >>> use_model(config, 'mlp', blocks=2)
  >>> sorted(config.model.to_dict())
  ['blocks', 'channels', 'groups', 'module', 'name']
  """
  with config.unlocked():
    config.model = ConfigDict(model_fields(name, module))
    taps = registry.find(name, module).TAPS
    config.estimator.tap_passes = ConfigDict(dict.fromkeys(taps, 0))
  config.model.update(fields)


def defaults(config: ConfigDict) -> ConfigDict:
  """The defaults of all fields, including those of the config's own model."""
  wanted, model = base(), config.get('model')
  if (
    isinstance(model, ConfigDict)
    and isinstance(model.get('name'), str)
    and (isinstance(model.get('module'), str | None))
  ):
    use_model(wanted, model.name, model.get('module'))
  return wanted


def may_be_none(field: str, config: ConfigDict) -> bool:
  """Whether a field, by its dotted name, may be None in a config with this model.

  >>> may_be_none('model.hidden', base()), may_be_none('model.size', base())
  (True, False)
  """
  part, _, name = field.partition('.')
  if part == 'model' and name != 'module':
    defaults = registry.find(config.model.name, config.model.module).DEFAULTS
    return isinstance(defaults.get(name), type)
  return dict(flatten(base())).get(field, 0) is None


def flatten(config: ConfigDict | dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) for every field.

  >>> dict(flatten({'a': 1, 'b': {'c': 2}}))
  {'a': 1, 'b.c': 2}
  """
  for field, value in config.items():
    if isinstance(value, (ConfigDict, dict)):
      yield from flatten(value, f'{prefix}{field}.')
    else:
      yield prefix + field, value


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
  path = str(_find(path))
  try:
    return runpy.run_path(path)['get_config']()
  except Exception as error:  # whatever the user's file raises
    raise UserError(
      f'config file {path}: {type(error).__name__}: {" ".join(str(error).split())}'
    ) from error


def _find(path: str) -> pathlib.Path:
  if pathlib.Path(path).is_file():
    return pathlib.Path(path)
  if not re.fullmatch(r'\w+', path):
    raise UserError(f'config file {path} not found')
  if (named := folder() / f'{path}.py').is_file():
    return named
  known = sorted(file.stem for file in folder().glob('*.py'))
  near = difflib.get_close_matches(path, known, 1)
  hint = f'did you mean {near[0]}? ' if near else ''
  raise UserError(f'no config {path}; {hint}allowed: {", ".join(known)}, or the path of a file')
