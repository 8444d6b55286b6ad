"""Orbax checkpoints in WORKDIR/checkpoints, written during training and renamed when complete."""

import contextlib
import gc
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
from lfg_jax.training import processes

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

  def restore(self, like: PyTree) -> tuple[PyTree, dict[str, float]] | None:
    """Returns the newest readable checkpoint, or None if there are no checkpoints.

    It has the shapes and sharding of `like`. Newer checkpoints that cannot be read are skipped with
    a warning. They are also deleted, because their steps will be saved again.

    Raises:
      UserError: there are checkpoints, but none can be read. They may be from another version of
        the program.
    """
    # Do not read all metadata at once: one truncated file would make every checkpoint unreadable.
    options = ocp.CheckpointManagerOptions(
      lightweight_initialize=True, cleanup_tmp_directories=True
    )
    found, broken = None, {}
    with self._open(options) as manager, silence():
      for step in sorted(manager.all_steps(), reverse=True):
        try:
          found = self._read(manager, step, like)
          break
        except Exception as error:  # what a damaged file raises depends on the file
          broken[step] = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
      if broken and found is None:
        newest = max(broken)
        raise UserError(
          f'no checkpoint in {self._directory} can be read ({newest}: {broken[newest]}); '
          'remove this folder to start again'
        )
      for step, reason in broken.items():
        processes.say(
          f'warning: passing over the checkpoint of step {step}, which cannot be read ({reason})',
          file=sys.stderr,
        )
        manager.delete(step)
    return found

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
          preservation_policy=policy, best_fn=_test_error, best_mode='min'
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
