"""The log of a run: metrics.jsonl, TensorBoard files, and a progress bar or printed lines."""

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
    )
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
    """Moves the bar to `step`."""
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(step * self._batch_size - self._bar.n)

  def write(self, row: Row) -> None:
    """Adds a row, and returns when it is in the file."""
    self.rows.append(row)
    if not self._active:
      return
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in row.items():
      if name not in ('step', 'epoch') and value is not None:
        self._event(row['step'], summary=scalar(name, value))
    self._events.flush()
    if self._bar.disable:
      print(
        '  '.join(f'{name} {value:.6g}' for name, value in row.items() if value is not None),
        flush=True,
      )

  def _event(self, step: int, **what: Any) -> None:
    self._events.write_event(Event(wall_time=time.time(), step=step, **what))

  def __enter__(self) -> 'RunLog':
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.close()
    if self._active:
      self._file.close()
      self._events.close()
