"""The log of a run: metrics.jsonl, TensorBoard files, and a progress bar or printed lines.

Errors are in %, here and wherever else people look, and their names say so.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

Row = dict[str, Any]


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically: readers see either the old or the new content."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)


def read_rows(path: pathlib.Path) -> list[Row]:
  """All complete rows of a file; none if it does not exist.

  A last line without a newline was cut short, and is left out.
  """
  if not path.exists():
    return []
  return [
    json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')
  ]


def in_words(row: Row) -> str:
  """A row as people read it; what is None is left out.

  >>> in_words({'epoch': 2, 'train_loss': 0.51234, 'test_error_percent': 2.2284, 'speed': None})
  'epoch 2  train loss 0.512  test error 2.23 %'
  """

  def digits(value: float) -> str:
    return f'{value:.3g}' if isinstance(value, float) and value < 1000 else f'{value:.0f}'

  words = {
    name.replace('_', ' '): digits(value) for name, value in row.items() if value is not None
  }
  return '  '.join(
    f'{name.removesuffix(" percent")} {value}' + ' %' * name.endswith(' percent')
    for name, value in words.items()
  )


class RunLog:
  """A context manager that writes rows of metrics.

  It writes only if `active`, that is, in the first process.

  Attributes:
    rows: all rows of the run.
  """

  def __init__(
    self, workdir: pathlib.Path, step: int, total_steps: int, batch_size: int, *, active: bool
  ) -> None:
    """Continues at `step`, and drops later rows, which a killed run has left."""
    path = workdir / 'metrics.jsonl'
    self.rows = [row for row in read_rows(path) if row['step'] <= step]
    self._active = active
    self._batch_size = batch_size
    bar_is_useful = active and sys.stderr.isatty() and 'CI' not in os.environ
    self._bar = tqdm.tqdm(
      total=total_steps * batch_size,
      initial=step * batch_size,
      unit=' examples',
      unit_scale=True,
      disable=not bar_is_useful,
      dynamic_ncols=True,
      desc='compiling …',
    )
    measured = [row for row in self.rows if row['test_error_percent'] is not None]
    self._test_error = measured[-1]['test_error_percent'] if measured else None
    if not active:
      return
    write_atomically(path, ''.join(json.dumps(row) + '\n' for row in self.rows))
    self._file = path.open('a')
    (workdir / 'tensorboard').mkdir(exist_ok=True)
    # Not a SummaryWriter, whose thread would report a full disk on its own.
    self._events = EventsWriter(str(workdir / 'tensorboard' / 'events'))
    # Hides earlier events of the steps that are about to be repeated.
    self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

  def progress(self, step: int, **shown: Any) -> None:
    """Moves the bar to `step`, and shows metrics, the newest test error among them."""
    row = {**shown, 'test_error_percent': self._test_error}
    self._bar.set_description('', refresh=False)
    self._bar.set_postfix_str(in_words(row), refresh=False)
    self._bar.update(step * self._batch_size - self._bar.n)

  def doing(self, what: str) -> None:
    """Says in the bar what takes long now, until the next `progress`."""
    self._bar.set_description(what)

  def write(self, row: Row) -> None:
    """Adds a row, and returns when it is in the file."""
    self.rows.append(row)
    if row['test_error_percent'] is not None:
      self._test_error = row['test_error_percent']
    if not self._active:
      return
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in row.items():
      if name not in ('step', 'epoch') and value is not None:
        self._event(row['step'], summary=scalar(name, value))
    self._events.flush()
    if self._bar.disable:
      print(in_words(row), flush=True)
    else:
      self.progress(row['step'], epoch=row['epoch'])

  def _event(self, step: int, **what: Any) -> None:
    self._events.write_event(Event(wall_time=time.time(), step=step, **what))

  def __enter__(self) -> 'RunLog':
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.close()
    if self._active:
      self._file.close()
      self._events.close()
