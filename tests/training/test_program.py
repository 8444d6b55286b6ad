"""lfg-train: what it prints about configs, and configs by name."""

import json
import os
import re
import subprocess
import sys

import pytest

from lfg_jax.errors import UserError
from lfg_jax.local import row_losses
from lfg_jax.models import registry
from lfg_jax.tangents import distributions
from lfg_jax.training import command_line, configs, main
from lfg_jax.training.rules import rules
from tests.runs import ROOT


def printed(capsys, *arguments):
  main.main([*arguments])
  return capsys.readouterr().out


def helped(capsys, *arguments):
  with pytest.raises(SystemExit) as stop:
    main.main([*arguments, '--help'])
  assert stop.value.code == 0
  return capsys.readouterr().out


@pytest.mark.parametrize('name', registry.MODELS)
def test_help_has_every_field_with_its_meaning_and_default(capsys, name):
  lines = helped(capsys, '--config=mnist', f'--config.model.name={name}').splitlines()
  config = configs.load('mnist')
  configs.use_model(config, name, **({'size': 'M/1/16'} if name == 'mixer' else {}))
  entries = configs.table(name)
  shown = [line.split(' = ')[0].strip() for line in lines if ' = ' in line and line[2:3] != ' ']
  assert sorted(shown) == sorted(entries) == sorted(dict(configs.flatten(config)))
  for field, value in configs.flatten(config):
    text = ','.join(map(str, value)) if isinstance(value, tuple) else value
    place = lines.index(f'  {field} = {text}')
    assert lines[place + 1].startswith('      ') and len(entries[field].meaning) > 3, field
    assert value == entries[field].default or entries[field].wrong(value) is None


@pytest.mark.parametrize('name', ['digits', 'mnist', 'imagenet'])
def test_help_begins_with_common_fields_of_the_chosen_config(capsys, name):
  text, config = helped(capsys, f'--config={name}'), configs.load(name)
  shown = dict(re.findall(r'^  ([\w.]+) = (.*)$', text, re.M))
  assert list(shown)[:10] == list(command_line.COMMON)
  assert shown['epochs'] == str(config.epochs)
  assert shown['optimizer.learning_rate'] == str(config.optimizer.learning_rate)
  assert shown['model.size'] == config.model.size
  # A change on the same command line counts.
  assert '  epochs = 7\n' in helped(capsys, f'--config={name}', '--config.epochs=7')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
@pytest.mark.parametrize('arguments', [['--help'], ['--config.augment.shift=8']])
def test_text_for_any_terminal(encoding, arguments, tmp_path):
  done = subprocess.run(
    [sys.executable, ROOT / 'experiments' / 'train.py', *arguments],
    env={**os.environ, 'PYTHONIOENCODING': encoding},
    cwd=tmp_path,
    capture_output=True,
  )
  out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
  if arguments == ['--help']:
    assert (done.returncode, err) == (0, '') and 'number of tangents' in out
    assert ('0 … 1' if encoding == 'utf-8' else '0 ... 1') in out
  else:
    assert (done.returncode, out) == (2, '')
    assert ('0 … 7' if encoding == 'utf-8' else '0 ... 7') in err


@pytest.mark.parametrize(
  ('field', 'values'),
  [
    ('algorithm', rules.REGISTRY),
    ('losses.row', row_losses.ROW_LOSSES),
    ('estimator.distribution', distributions.DISTRIBUTIONS),
    ('model.norm', ('layer', 'whole', 'batch')),
  ],
)
def test_help_names_what_a_field_may_be(field, values, capsys):
  (text,) = re.findall(rf'  {field} = .*\n((?: {{6}}.*\n)+)', helped(capsys))
  assert f'allowed: {", ".join(values)}' in ' '.join(text.split())


def test_defaults_are_what_their_fields_allow():
  for name in registry.MODELS:
    for field, entry in configs.table(name).items():
      assert entry.wrong(entry.default) is None, field
  configs.validate(configs.base('mlp'))


def test_the_config_that_would_run(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shown = json.loads(printed(capsys, '--config=mnist', '--config.epochs=7', '--print_config'))
  expected = configs.load(str(ROOT / 'configs' / 'mnist.py'))
  expected.epochs = 7
  assert shown == json.loads(configs.to_json(expected))
  assert json.loads(printed(capsys, '--print_config'))['dataset'] == 'digits'
  with pytest.raises(UserError, match='epochs is 0; allowed: 1 or more'):
    main.main(['--print_config', '--config.epochs=0'])
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
