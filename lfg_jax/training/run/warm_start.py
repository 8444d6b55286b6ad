"""Starts a run from what another has learned: `config.init_from` is the other run's folder."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lfg_jax.errors import UserError
from lfg_jax.training.rules.algorithms import Algorithm
from lfg_jax.training.run import checkpoints, workdir
from lfg_jax.training.update import TrainState

PyTree = Any
# The algorithm's other variables that are kept. The optimizer of the control variates starts afresh, as does
# the optimizer of the parameters.
KEPT = ('batch_stats', 'feedback', 'lookahead', 'control_variate')


def check(folder: pathlib.Path, algorithm: Algorithm) -> None:
  """Raises the errors that `from_run` would raise, but looks only at shapes.

  Raises:
    UserError: the folder does not belong to a run, has no readable checkpoint, or has one of
      another model.
  """
  variables = jax.eval_shape(algorithm.init, jax.random.key(0))
  here = _taken({'params': variables['params'], 'rest': variables})
  _compare(folder, _taken(_newest(folder, _shapes_of)), here)


def from_run(folder: pathlib.Path, state: TrainState, algorithm: Algorithm) -> TrainState:
  """The state with another run's parameters, and with its `KEPT` variables that this run also has.

  They come from the other run's newest readable checkpoint. If it lacks an average of the next
  blocks that this run needs ('lookahead'), the average starts from the other run's parameters.

  Raises:
    UserError: as in `check`.
  """
  here, there = _taken(state._asdict()), _taken(_newest(folder, _read))
  if lookahead := algorithm.composition.model.lookahead:
    there = {'lookahead': lookahead(there['params']), **there}
  _compare(folder, there, here)

  def put(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), tree, like)

  new = {name: put(tree, here[name]) for name, tree in there.items() if name in here}
  return state._replace(params=new.pop('params'), rest={**state.rest, **new})


def _taken(state: dict[str, PyTree]) -> dict[str, PyTree]:
  """The part of a state that a new run takes over."""
  return {
    'params': state['params'],
    **{name: state['rest'][name] for name in KEPT if name in state['rest']},
  }


def _shapes_of(checkpointer: ocp.StandardCheckpointer, path: pathlib.Path) -> dict[str, PyTree]:
  return checkpointer.metadata(path).item_metadata.tree


def _read(checkpointer: ocp.StandardCheckpointer, path: pathlib.Path) -> dict[str, PyTree]:
  """A checkpoint with whatever shapes it has, as arrays on the host."""
  like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), _shapes_of(checkpointer, path))
  return checkpointer.restore(path, like)


def _newest(
  folder: pathlib.Path, read: Callable[[ocp.StandardCheckpointer, pathlib.Path], PyTree]
) -> PyTree:
  """The result of `read` for the newest checkpoint that it can read."""
  workdir.stored(folder)
  steps = [path for path in (folder.absolute() / 'checkpoints').glob('*') if path.name.isdigit()]
  with ocp.StandardCheckpointer() as checkpointer, checkpoints.silence():
    for step in sorted(steps, key=lambda path: int(path.name), reverse=True):
      try:
        return read(checkpointer, step / 'state')
      except Exception:  # what a damaged file raises depends on the file
        continue
  raise UserError(f'init_from={folder} has no checkpoint that can be read')


def _compare(folder: pathlib.Path, there: dict[str, PyTree], here: dict[str, PyTree]) -> None:
  """Raises UserError if a variable that is in both `there` and `here` has different shapes."""
  for name in (name for name in here if name in there):  # parameters first
    own, other = _shapes(here[name]), _shapes(there[name])
    for path in sorted({*own, *other}):
      if own.get(path) != other.get(path):
        raise UserError(
          f'init_from={folder} has another model: {name}.{path} is {other.get(path, "missing")} '
          f'there, {own.get(path, "missing")} here'
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf.shape for path, leaf in leaves
  }
