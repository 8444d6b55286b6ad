"""A new run from what another has learnt: `config.init_from` names its folder."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lfg_jax.errors import UserError
from lfg_jax.training import checkpoints, workdir
from lfg_jax.training.algorithms import Algorithm
from lfg_jax.training.update import TrainState

PyTree = Any
# Of the algorithm's other variables. The optimizer of guesses begins anew, as the optimizer does.
KEPT = ('batch_stats', 'feedback', 'ahead', 'guess')


def check(folder: pathlib.Path, algorithm: Algorithm) -> None:
  """Finds what `from_run` would find, by shapes only.

  Raises:
    UserError: the folder is not the folder of a run, has no checkpoint, or one of another model.
  """
  variables = jax.eval_shape(algorithm.init, jax.random.key(0))
  here = _taken({'params': variables['params'], 'rest': variables})
  _compare(folder, _taken(_newest(folder, _shapes_of)), here)


def from_run(folder: pathlib.Path, state: TrainState, algorithm: Algorithm) -> TrainState:
  """The state with another run's parameters, and those of its `KEPT` variables that this run has too.

  They are those of its newest checkpoint that can be read. An average that it has not begins with its parameters.

  Raises:
    UserError: as `check`.
  """
  here, there = _taken(state._asdict()), _taken(_newest(folder, _read))
  if ahead := algorithm.made_of.model.ahead:
    there = {'ahead': ahead(there['params']), **there}
  _compare(folder, there, here)
  put = lambda tree, like: jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), tree, like)
  new = {name: put(tree, here[name]) for name, tree in there.items() if name in here}
  return state._replace(params=new.pop('params'), rest={**state.rest, **new})


def _taken(state: dict[str, PyTree]) -> dict[str, PyTree]:
  """What a new run takes of a state."""
  return {
    'params': state['params'],
    **{name: state['rest'][name] for name in KEPT if name in state['rest']},
  }


def _shapes_of(checkpointer: ocp.StandardCheckpointer, path: pathlib.Path) -> dict[str, PyTree]:
  return checkpointer.metadata(path).item_metadata.tree


def _read(checkpointer: ocp.StandardCheckpointer, path: pathlib.Path) -> dict[str, PyTree]:
  """Whatever its shapes are, as arrays on the host."""
  like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), _shapes_of(checkpointer, path))
  return checkpointer.restore(path, like)


def _newest(
  folder: pathlib.Path, read: Callable[[ocp.StandardCheckpointer, pathlib.Path], PyTree]
) -> PyTree:
  """What `read` finds in the newest checkpoint that it can read."""
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
  """Raises UserError when something in `there` has not the shapes that it has here."""
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
