"""A run small enough to start many times, shared by the tests of training."""

import os
import pathlib
import runpy
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from lfg_jax.training import configs, update

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 23  # of an epoch: 1,438 images, 64 at a time


def tiny(**fields: Any) -> Any:
  """configs/digits.py with a small model; in the names of `fields`, `__` stands for a dot."""
  config = configs.load(str(ROOT / 'configs' / 'digits.py'))
  changes = {'model.size': 'S/1/2', 'model.channels': 16, 'epochs': 2, 'batch_size': 64}
  config.update_from_flattened_dict(
    {**changes, **{name.replace('__', '.'): v for name, v in fields.items()}}
  )
  return config


FLAGS = ['--config.model.size=S/1/2', '--config.model.channels=16', '--config.batch_size=64']


def script(name: str) -> dict[str, Any]:
  """The definitions in experiments/NAME.py, which can import the modules beside it."""
  path = ROOT / 'experiments' / f'{name}.py'
  if str(path.parent) not in sys.path:
    sys.path.append(str(path.parent))
  return runpy.run_path(str(path))


def start(script: str, *arguments: Any) -> subprocess.Popen:
  """Starts experiments/SCRIPT on one device; it uses the compilation cache, as all tests do."""
  environment = {
    **os.environ,
    'CI': '1',
    'XLA_FLAGS': ' '.join(
      flag for flag in os.environ['XLA_FLAGS'].split() if 'device_count' not in flag
    ),
  }
  command = [sys.executable, ROOT / 'experiments' / script, *arguments]
  return subprocess.Popen(
    [str(part) for part in command],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def state(workdir: pathlib.Path, part: str | None = None) -> list[np.ndarray]:
  """All arrays in the newest checkpoint, or only those of one part of the state."""
  newest = max((workdir / 'checkpoints').iterdir(), key=lambda folder: int(folder.name))
  with ocp.StandardCheckpointer() as checkpointer:
    stored = checkpointer.metadata(newest / 'state').item_metadata.tree
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored)
    restored = checkpointer.restore(newest / 'state', like)
    return jax.tree.leaves(restored[part] if part else restored)


_begun: dict[tuple[str, str], Any] = {}


def first_state(config: Any, algorithm: Any, optimizer: Any, rule: str, mesh: Any) -> Any:
  """The state before the first step, on a mesh; compiled once for all meshes.

  `rule` tells optimizers of the same config apart.
  """
  key = configs.to_json(config), rule
  if key not in _begun:
    state = update.init_state(algorithm, optimizer, jax.random.key(0), mesh)
    _begun[key] = jax.device_get(state)
  # A copy, because an update takes over the memory of its state.
  return jax.device_put(jax.tree.map(np.array, _begun[key]), NamedSharding(mesh, PartitionSpec()))
