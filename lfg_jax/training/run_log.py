"""What a run writes for people: metrics.jsonl, TensorBoard files, a progress bar or lines."""

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
  """Either the old or the new content is there at any moment."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)


def read_rows(path: pathlib.Path) -> list[Row]:
  """All whole rows: a last line without its end was cut short."""
  if not path.exists():
    return []
  return [
    json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')
  ]


class RunLog:
  """Writes rows of metrics; a context manager. Does nothing when not `active` (processes but the first).

  Attributes:
    rows: all rows of the run.
  """

  def __init__(
    self, workdir: pathlib.Path, step: int, total_steps: int, batch_size: int, *, active: bool
  ) -> None:
    """Goes on at `step`: rows after it, of a run that was killed, are dropped."""
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
    # Not by a SummaryWriter, whose thread would tell of a full disk by itself.
    self._events = EventsWriter(str(workdir / 'tensorboard' / 'events'))
    # Events of steps that will come again are hidden.
    self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

  def progress(self, step: int, **shown: Any) -> None:
    """Moves the bar to `step`."""
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(step * self._batch_size - self._bar.n)

  def write(self, row: Row) -> None:
    """Adds a row, which is in the file when this returns."""
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
