"""What people see of a run: its bar or lines, its last line, its figure and its summary."""

import json
import sys

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

import lfg_jax
from lfg_jax.training import command_line
from lfg_jax.training.run import metrics, plots, summary
from lfg_jax.training.run.metrics import RunLog
from tests import runs
from tests.runs import FLAGS, STEPS

ROW = {
  'step': 8,
  'epoch': 1,
  'train_error_percent': 50.0,
  'test_error_percent': 12.345,
  'learning_rate': 0.1,
}


def events(folder):
  """(step, name, value) of all scalars in a folder's TensorBoard files."""
  for path in sorted(folder.glob('events*')):
    content, at = path.read_bytes(), 0
    while at < len(content):  # records: length, its check, the event, its check
      size = int.from_bytes(content[at : at + 8], 'little')
      event = Event.FromString(content[at + 12 : at + 12 + size])
      yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
      at += 16 + size


@pytest.mark.parametrize('in_terminal', [True, False])
def test_a_terminal_shows_what_is_done_and_the_test_error(
  in_terminal, tmp_path, monkeypatch, capsys
):
  monkeypatch.delenv('CI', raising=False)
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: in_terminal)
  with RunLog(tmp_path, 0, 16, 4, active=True) as log:
    log.doing('evaluating …')
    log.write(ROW)
    log.progress(9, epoch=2, train_error_percent=40.0)
  out, err = capsys.readouterr()
  if in_terminal:
    assert out == '' and err.index('compiling …') < err.index('evaluating …')
    last = err.split('\r')[-1]
    assert 'test error 12.3 %' in last and 'train error 40 %' in last and 'compiling' not in last
  else:
    assert err == '' and out.split('  ')[:2] == ['step 8', 'epoch 1']
    assert 'test error 12.3 %' in out and 'learning rate 0.1' in out
  shown = {name: value for step, name, value in events(tmp_path / 'tensorboard') if step == 8}
  assert shown == pytest.approx({name: ROW[name] for name in ROW if name not in ('step', 'epoch')})
  # A run that goes on knows its newest test error.
  with RunLog(tmp_path, 8, 16, 4, active=True) as log:
    log.progress(9, epoch=2)
  assert ('test error 12.3 %' in capsys.readouterr().err.split('\r')[-1]) == in_terminal


def test_a_rule_keeps_its_colour():
  alone, all_rules = plots.colours_of(['LG-FG-A+']), plots.colours_of(list(plots.RULES))
  assert alone == [plots.RULES['LG-FG-A+']] != plots.colours_of(['BP'])
  assert len(set(all_rules)) == len(all_rules)
  mixed = plots.colours_of(['FA', 'BP', 'L-FA'])
  assert mixed[1] == plots.RULES['BP'] and len(set(mixed)) == 3


@pytest.mark.full
def test_what_a_run_says_and_leaves(tmp_path, monkeypatch, capsys):
  titles = []
  draw = plots.curves

  def curves(path, lines, title=None):
    titles.append((title, list(lines)))
    draw(path, lines, title)

  monkeypatch.setattr(plots, 'curves', curves)
  arguments = [f'--workdir={tmp_path / "run"}', '--config.epochs=2', '--config.seed=3', *FLAGS]
  said = []
  for _ in range(2):
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    with pytest.raises(SystemExit) as stop:
      command_line.run(runs.script('train')['main'])
    assert not stop.value.code
    said.append(capsys.readouterr().out.splitlines())
  found = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  wrong, total = found['test_mistakes'], found['test_examples']
  assert found['test_error_percent'] == pytest.approx(100 * wrong / total) and total == 359
  assert (found['seed'], found['epochs'], found['steps']) == (3, 2, 2 * STEPS)
  assert (found['jax'], found['lfg_jax']) == (jax.__version__, lfg_jax.__version__)
  last = f'test error {100 * wrong / total:.1f} % ({wrong} of {total})'
  first, again = said
  assert first[0] == 'compiling …' and first[-1] == last and len(first) == 4
  assert again == [f'{tmp_path / "run"}: finished already, after 2 epochs', last]
  assert titles == [('S/1/2 on digits, LG-FG-A+, seed 3', ['LG-FG-A+'])]
  rows = metrics.read_rows(tmp_path / 'run' / 'metrics.jsonl')
  rates = [value for _, name, value in events(tmp_path / 'run' / 'tensorboard') if 'rate' in name]
  assert rates == pytest.approx([row['learning_rate'] for row in rows])
  assert 2e-3 > rates[0] > rates[1] >= 0


def test_the_last_line_has_the_mistakes():
  counted = {'test_error_percent': 100 * 3 / 359, 'test_mistakes': 3, 'test_examples': 359}
  assert summary.last_line(counted) == 'test error 0.8 % (3 of 359)'
