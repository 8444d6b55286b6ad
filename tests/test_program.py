"""lfg-train: what it prints about configs, and configs by name."""

import json
import re

import pytest

from lfg_jax.errors import UserError
from lfg_jax.estimators import tangents
from lfg_jax.losses import row_losses
from lfg_jax.models import registry
from lfg_jax.training import configs, fields, program, rules
from tests.runs import ROOT


def printed(capsys, *arguments):
  program.main([*arguments])
  return capsys.readouterr().out


@pytest.mark.parametrize('name', registry.MODELS)
def test_help_has_every_field_with_its_meaning_and_default(capsys, name):
  with pytest.raises(SystemExit) as stop:
    program.main(['--help'] if name == 'mixer' else [f'--config.model.name={name}', '--help'])
  assert stop.value.code == 0
  lines, config = capsys.readouterr().out.splitlines(), configs.base()
  configs.use_model(config, name)
  meanings = fields.meanings(config)
  for field, default in configs.flatten(config):
    shown = ','.join(map(str, default)) if isinstance(default, tuple) else default
    place = lines.index(f'  {field} = {shown}')
    assert lines[place + 1].startswith('      ') and len(meanings[field]) > 1, field
  assert len([line for line in lines if line.startswith('  model.')]) == len(config.model)


def test_a_field_without_a_meaning_is_noticed():
  wider = configs.base()
  wider.brightness = 1
  assert fields.meanings(wider)['brightness'] == ''


@pytest.mark.parametrize(
  ('field', 'table'),
  [
    ('algorithm', rules.REGISTRY),
    ('losses.row', row_losses.ROW_LOSSES),
    ('estimator.law', tangents.LAWS),
    ('model.name', registry.MODELS),
  ],
)
def test_help_names_what_a_field_may_be(field, table):
  named = set(re.findall("'([^']+)'", fields.meanings(configs.base())[field]))
  assert named == set(table)


def test_what_docstrings_explain_is_a_field():
  """So no explanation outlives its field."""
  names = {part for dotted, _ in configs.flatten(configs.base()) for part in dotted.split('.')}
  assert set(fields.explained(configs.base)) <= names


def test_the_config_that_would_run(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shown = json.loads(printed(capsys, '--config=mnist', '--config.epochs=7', '--print_config'))
  expected = configs.load(str(ROOT / 'configs' / 'mnist.py'))
  expected.epochs = 7
  assert shown == json.loads(configs.to_json(expected))
  assert json.loads(printed(capsys, '--print_config'))['dataset'] == 'digits'
  with pytest.raises(UserError, match='epochs is 0; allowed: 1 or more'):
    program.main(['--print_config', '--config.epochs=0'])
  assert not list(tmp_path.iterdir())


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert configs.load('mnist').dataset == 'mnist'
  lines = 'from lfg_jax.training import configs\n\ndef get_config():\n  return configs.base()\n'
  (tmp_path / 'mnist').write_text(lines)
  assert configs.load('mnist').dataset == 'digits'


def test_an_unknown_name_is_told_the_known_ones():
  known = ', '.join(sorted(path.stem for path in (ROOT / 'configs').glob('*.py')))
  with pytest.raises(UserError) as error:
    configs.load('minst')
  assert (
    str(error.value)
    == f'no config minst; did you mean mnist? allowed: {known}, or the path of a file'
  )
