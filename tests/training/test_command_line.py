"""How values on a command line are read."""

import pytest

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, configs
from tests.runs import tiny


@pytest.mark.parametrize('argument, field, value', [
    ('model.norms=head,readout', 'model.norms', ('head', 'readout')),
    ("model.norms=('head', 'readout')", 'model.norms', ('head', 'readout')),
    ('model.norms=[head]', 'model.norms', ('head',)),
    ('model.norms=', 'model.norms', ()),
    ('optimizer.staircase_epochs=1,2.5', 'optimizer.staircase_epochs', (1, 2.5)),
    ('optimizer.staircase_epochs=3', 'optimizer.staircase_epochs', (3,)),
    ('data_dir=None', 'data_dir', None),
    ('data_dir=none', 'data_dir', None),
    ('data_dir=/a=b', 'data_dir', '/a=b'),
    ('model.channels=None', 'model.channels', None),
    ('losses.patch=False', 'losses.patch', False),
    ('optimizer.learning_rate=1', 'optimizer.learning_rate', 1.0),
])  # fmt: skip
def test_values_on_a_command_line(argument, field, value):
  config = tiny(data_dir='x')
  changed = command_line.override(config, [f'--config.{argument}'])
  given = dict(configs.flatten(changed))[field]
  assert (given, type(given)) == (value, type(value))
  assert config.data_dir == 'x' and config.model.channels == 16  # a copy was changed


def test_every_field_that_may_be_none_reads_none():
  fields = [name for name, value in configs.flatten(configs.base()) if value is None]
  assert len(fields) >= 6
  config = command_line.override(tiny(data_dir='x'), [f'--config.{field}=None' for field in fields])
  assert all(dict(configs.flatten(config))[field] is None for field in fields)
  configs.validate(config)


def test_none_is_for_fields_of_the_models_that_may_be_open(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text("""DEFAULTS, TAPS = {'width': int, 'size': 3}, {'out': 'out'}
make = None
""")
  own = [f'--config.model.module={path}']
  config = command_line.override(tiny(), [*own, '--config.model.width=3'])
  assert config.model.width == 3
  assert command_line.override(config, ['--config.model.width=None']).model.width is None
  for arguments in (
    [*own, '--config.model.size=None'],
    ['--config.model.name=mlp', '--config.model.channels=None'],
  ):
    with pytest.raises(UserError, match="is 'None'; allowed: int"):
      command_line.override(tiny(), arguments)
  assert (
    command_line.override(
      config, ['--config.model.module=None', '--config.model.name=mlp']
    ).model.channels
    == 256
  )


def test_values_may_be_arguments_of_their_own():
  config = command_line.override(
    tiny(), ['--config.epochs', '7', '--noconfig.losses.patch', '--config.losses.overlap']
  )
  assert (config.epochs, config.losses.patch, config.losses.overlap) == (7, False, True)
  config = command_line.override(
    tiny(), ['--config.model.name', 'mlp', '--config.model.groups', '4']
  )
  assert (config.model.name, config.model.groups) == ('mlp', 4)
