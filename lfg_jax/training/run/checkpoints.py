"""Orbax checkpoints in WORKDIR/checkpoints, written during training and renamed when complete."""

import contextlib
import gc
import itertools
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from lfg_jax.errors import UserError
from lfg_jax.training.hosts import processes

PyTree = Any
_HOOK = 'report_but_closed_loops'


def _test_error(metrics: dict[str, float]) -> float:
  return metrics['test_error']


class Checkpoints:
  """Saves and restores `(state, clock)`. As a context manager, it waits for the last write.

  `clock` maps names to seconds: how long the run took, and on what it spent the time. The newest
  `keep` checkpoints are kept, and the one with the smallest test error.
  """

  def __init__(self, directory: pathlib.Path, keep: int) -> None:
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax logs every step and file
    self._directory = directory.absolute()
    self._keep = keep
    self._manager: ocp.CheckpointManager | None = None

  def restore(self, like: PyTree, *, own: bool = True) -> tuple[PyTree, dict[str, float]] | None:
    """Returns the newest checkpoint that all processes can read; None: there are no checkpoints.

    It has the shapes and sharding of `like`. Newer checkpoints are passed over with a warning. If
    the folder is this run's `own`, they are moved beside it, because their steps will be saved
    again.

    Raises:
      UserError: there are checkpoints, but none can be read. They may be from another version of
        the program.
    """
    # Each process reads alone, because Orbax's barriers would wait for one that cannot. Do not read
    # all metadata at once: one truncated file would make every checkpoint unreadable.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    options = ocp.CheckpointManagerOptions(
      lightweight_initialize=True, read_only=True, multiprocessing_options=alone
    )
    found, broken = None, {}
    with self._open(options) as manager, silence():
      steps = sorted(manager.all_steps())
      while (step := processes.of_first(steps.pop() if steps else -1)) >= 0:
        error = None
        try:
          found = self._read(manager, step, like)
        except Exception as caught:  # what a damaged file raises depends on the file
          error = caught
        if not (failed := processes.failing(error is not None)):
          break
        found, broken[step] = None, _reason(error, failed)
    if broken and found is None:
      newest = max(broken)
      raise UserError(
        f'no checkpoint in {self._directory} can be read ({newest}: {broken[newest]}); '
        'remove this folder to start again'
      )
    for step, reason in broken.items() if processes.is_first() else ():
      place = self._move_aside(step) if own else self._directory
      print(
        f'warning: passing over the checkpoint of step {step}, which cannot be read ({reason}); '
        f'it is kept in {place}',
        file=sys.stderr,
        flush=True,
      )
    processes.of_first(0)  # the others see it moved
    return found

  def _move_aside(self, step: int) -> pathlib.Path:
    """Renames the folder of a checkpoint; returns where it is then."""
    aside = self._directory.with_name(f'{self._directory.name}-unreadable')
    aside.mkdir(exist_ok=True)
    names = itertools.chain([f'{step}'], (f'{step}-{i}' for i in itertools.count(2)))
    place = next(aside / name for name in names if not (aside / name).exists())
    (self._directory / str(step)).rename(place)
    return place

  def save(
    self, step: int, state: PyTree, clock: dict[str, float], test_error: float | None
  ) -> None:
    """Starts saving, unless `step` is already saved; on return, `state` may be overwritten."""
    if self._manager is None:
      best = BestN(
        get_metric_fn=_test_error, reverse=True, n=1, keep_checkpoints_without_metrics=False
      )
      policy = AnyPreservationPolicy([LatestN(self._keep), best])
      # Without best_fn, Orbax writes no metrics.
      self._manager = self._open(
        ocp.CheckpointManagerOptions(
          preservation_policy=policy,
          best_fn=_test_error,
          best_mode='min',
          cleanup_tmp_directories=True,
        )
      )
    if step in self._manager.all_steps():
      return
    # The next update reuses the buffers of `state` while Orbax still reads.
    state = jax.tree.map(jnp.copy, state)
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), clock=ocp.args.JsonSave(clock)),
      metrics=None if test_error is None else {'test_error': test_error},
    )

  def close(self) -> None:
    """Waits until everything is on disk."""
    if self._manager is not None:
      with silence():
        self._manager.close()
      self._manager = None

  def __enter__(self) -> 'Checkpoints':
    _ignore_closed_loops()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
    # An unfinished write waits for every process, and so forever for a lost one.
    if kind is not processes.Lost:
      self.close()

  def _open(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory, options=options, item_names=('state', 'clock', 'metrics')
    )

  def _read(
    self, manager: ocp.CheckpointManager, step: int, like: PyTree
  ) -> tuple[PyTree, dict[str, float]]:
    manager.metrics(step)  # `save` reads them again, so they must be intact
    restored = manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(like), clock=ocp.args.JsonRestore()),
    )
    return restored['state'], restored['clock']


def _reason(error: Exception | None, failed: list[int]) -> str:
  """Why some processes cannot read a checkpoint; only the error of this one is at hand."""
  if error is None:
    return f'by processes {failed}'
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def _ignore_closed_loops() -> None:
  """Suppresses the tracebacks of the parts of a failed write, until the program ends.

  These parts finish after Orbax has given up and closed the event loop to which they report.
  """
  hook = sys.unraisablehook

  def report(caught: 'sys.UnraisableHookArgs') -> None:
    if str(caught.exc_value) != 'Event loop is closed':
      hook(caught)

  report.__name__ = _HOOK
  if getattr(hook, '__name__', '') != _HOOK:
    sys.unraisablehook = report


@contextlib.contextmanager
def silence() -> Iterator[None]:
  """Suppresses reports of unfinished parts of a failed read or write; the exception stays."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  logger = logging.getLogger('asyncio')
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    gc.collect()  # makes unfinished parts report now
    sys.unraisablehook = hook
    logger.setLevel(level)
